//! Writing safetensors a tensor at a time: headers are known before any data is.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use qrmc_ir::{Data, Elem, Tensor, TensorType};
use serde_json::{Map, Value, json};

use super::ArtefactError;

/// Bytes of a hash.
const HASH: usize = 32;

/// A tensor that will be written.
#[derive(Clone, PartialEq, Debug)]
pub struct TensorPlan {
    /// Name.
    pub name: String,
    /// Logical type with a fixed shape.
    pub ty: TensorType,
}

impl TensorPlan {
    /// Bytes in storage.
    pub fn bytes(&self) -> u64 {
        self.ty.bytes().unwrap_or(0) as u64
    }

    /// What a safetensors file says of it: codes are rows of bytes.
    pub fn stored(&self) -> StoredTensor {
        let mut shape = self.ty.shape.as_fixed().unwrap_or_default();
        let dtype = match self.ty.elem {
            Elem::F32 => Dtype::F32,
            Elem::F16 => Dtype::F16,
            Elem::BF16 => Dtype::BF16,
            Elem::F64 => Dtype::F64,
            Elem::I32 => Dtype::I32,
            Elem::I8 => Dtype::I8,
            Elem::U8 => Dtype::U8,
            Elem::Quant(_) => {
                if let Some(last) = shape.last_mut() {
                    *last = self.ty.elem.row_bytes(*last);
                }
                Dtype::U8
            }
        };
        StoredTensor { name: self.name.clone(), dtype, shape }
    }
}

/// An element type of safetensors files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "the format's own names")]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I8,
    U8,
}

impl Dtype {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            Dtype::I8 | Dtype::U8 => 1,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// A tensor as a safetensors file describes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoredTensor {
    /// Name.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl StoredTensor {
    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product::<u64>() * self.dtype.bytes() as u64
    }
}

/// Writes planned tensors, in order, into numbered shards of a folder.
pub struct ShardWriter {
    folder: PathBuf,
    stem: &'static str,
    shards: Vec<Vec<StoredTensor>>,
    shard: usize,
    next: usize,
    out: Option<BufWriter<File>>,
    /// Bytes that the tensor in the making still wants.
    open: Option<u64>,
}

impl ShardWriter {
    /// Divides the tensors into shards of at most `shard_bytes`; one that is larger stands alone.
    pub fn new(folder: &Path, plan: Vec<StoredTensor>, shard_bytes: u64) -> Self {
        ShardWriter::named(folder, "model", plan, shard_bytes)
    }

    /// As [`ShardWriter::new`], with file names that begin with `stem`.
    pub fn named(folder: &Path, stem: &'static str, plan: Vec<StoredTensor>, shard_bytes: u64) -> Self {
        let mut shards: Vec<Vec<StoredTensor>> = vec![Vec::new()];
        let mut size = 0u64;
        for t in plan {
            let bytes = t.bytes();
            match shards.last_mut() {
                Some(last) if last.is_empty() || size + bytes <= shard_bytes => last.push(t),
                _ => {
                    size = 0;
                    shards.push(vec![t]);
                }
            }
            size += bytes;
        }
        ShardWriter { folder: folder.to_owned(), stem, shards, shard: 0, next: 0, out: None, open: None }
    }

    /// Name of the index of several shards.
    pub fn index_name(&self) -> String {
        format!("{}.safetensors.index.json", self.stem)
    }

    /// Number of shards.
    pub fn count(&self) -> usize {
        self.shards.len()
    }

    /// File name of shard `i`.
    pub fn file_name(&self, i: usize) -> String {
        if self.shards.len() == 1 {
            return format!("{}.safetensors", self.stem);
        }
        format!("{}-{:05}-of-{:05}.safetensors", self.stem, i + 1, self.shards.len())
    }

    /// Writes the next planned tensor; gives the name of its file.
    ///
    /// # Errors
    /// If the name or the length is not the planned one, or the file cannot be written.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<String, ArtefactError> {
        let file = self.begin(name)?;
        self.put(bytes)?;
        self.end()?;
        Ok(file)
    }

    /// Begins the next planned tensor, whose bytes come by [`ShardWriter::put`]; gives the name of its file.
    ///
    /// # Errors
    /// If another tensor is planned, or the file cannot be written.
    pub fn begin(&mut self, name: &str) -> Result<String, ArtefactError> {
        while self.shards.get(self.shard).is_some_and(|s| self.next == s.len()) {
            self.close()?;
            self.shard += 1;
            self.next = 0;
        }
        let file = self.file_name(self.shard);
        let path = self.folder.join(&file);
        let planned = self.shards.get(self.shard).and_then(|s| s.get(self.next));
        let Some(planned) = planned.filter(|p| p.name == name && self.open.is_none()) else {
            let want = planned.map_or("nothing".to_owned(), |p| format!("`{}`", p.name));
            return Err(ArtefactError::new(&path, format!("`{name}` stands where {want} was planned")));
        };
        self.open = Some(planned.bytes());
        if self.out.is_none() {
            let f = File::create(&path).map_err(|e| ArtefactError::io(&path, "create", &e))?;
            let mut out = BufWriter::with_capacity(1 << 20, f);
            out.write_all(&header(&self.shards[self.shard]))
                .map_err(|e| ArtefactError::io(&path, "write", &e))?;
            self.out = Some(out);
        }
        Ok(file)
    }

    /// Writes the next bytes of the tensor that was begun.
    ///
    /// # Errors
    /// If they are more than were planned, or the file cannot be written.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), ArtefactError> {
        let path = self.folder.join(self.file_name(self.shard));
        let (Some(open), Some(out)) = (&mut self.open, &mut self.out) else {
            return Err(ArtefactError::new(&path, "bytes of no tensor"));
        };
        let Some(rest) = open.checked_sub(bytes.len() as u64) else {
            let name = &self.shards[self.shard][self.next].name;
            return Err(ArtefactError::new(&path, format!("`{name}` has more bytes than were planned")));
        };
        *open = rest;
        out.write_all(bytes).map_err(|e| ArtefactError::io(&path, "write", &e))
    }

    /// Ends the tensor that was begun.
    ///
    /// # Errors
    /// If bytes are missing.
    pub fn end(&mut self) -> Result<(), ArtefactError> {
        match self.open.take() {
            Some(0) => {
                self.next += 1;
                Ok(())
            }
            left => {
                let path = self.folder.join(self.file_name(self.shard));
                let what = format!("{} planned bytes were not written", left.unwrap_or(0));
                Err(ArtefactError::new(&path, what))
            }
        }
    }

    fn close(&mut self) -> Result<(), ArtefactError> {
        let Some(out) = self.out.take() else { return Ok(()) };
        let path = self.folder.join(self.file_name(self.shard));
        let f = out.into_inner().map_err(|e| ArtefactError::io(&path, "write", e.error()))?;
        f.sync_all().map_err(|e| ArtefactError::io(&path, "write", &e))
    }

    /// Ends the last shard.
    ///
    /// # Errors
    /// If a planned tensor was not written, or the file cannot be written.
    pub fn finish(mut self) -> Result<(), ArtefactError> {
        self.close()?;
        let written =
            self.shard + 1 >= self.shards.len() && self.shards.last().is_none_or(|s| s.len() == self.next);
        if written {
            Ok(())
        } else {
            Err(ArtefactError::new(&self.folder, "planned tensors were not written"))
        }
    }
}

fn header(tensors: &[StoredTensor]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut at = 0u64;
    for t in tensors {
        let end = at + t.bytes();
        let dtype = t.dtype.to_string();
        map.insert(t.name.clone(), json!({ "dtype": dtype, "shape": t.shape, "data_offsets": [at, end] }));
        at = end;
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    // Data starts on a multiple of 8 bytes, as the reference writer has it.
    while !text.len().is_multiple_of(8) {
        text.push(b' ');
    }
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.append(&mut text);
    out
}

/// Writes host tensors to one safetensors file, whole or not at all. The hash in front tells a damaged file from a good
/// one. One tensor at a time is in memory a second time.
///
/// # Errors
/// If the file cannot be written.
pub fn write_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), ArtefactError> {
    let plan: Vec<StoredTensor> =
        tensors.iter().map(|(name, t)| TensorPlan { name: name.clone(), ty: t.ty() }.stored()).collect();
    let head = header(&plan);
    let io = |e: std::io::Error| ArtefactError::io(path, "write", &e);
    let temporary = path.with_extension("tmp");
    let mut f = File::create(&temporary).map_err(io)?;
    let mut hash = blake3::Hasher::new();
    hash.update(&(head.len() as u64 + plan.iter().map(StoredTensor::bytes).sum::<u64>()).to_le_bytes());
    f.write_all(&[0; HASH]).map_err(io)?;
    let mut put = |bytes: &[u8]| {
        hash.update(bytes);
        f.write_all(bytes).map_err(io)
    };
    put(&head)?;
    for (_, t) in tensors {
        put(&t.to_le_bytes(t.elem()).map_err(|e| ArtefactError::new(path, e))?)?;
    }
    let mut publish = || -> std::io::Result<()> {
        f.seek(SeekFrom::Start(0))?;
        f.write_all(hash.finalize().as_bytes())?;
        f.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    publish().map_err(io)
}

/// Reads what [`write_tensors`] wrote; `None` if the file is missing or damaged.
pub fn read_tensors(path: &Path) -> Option<Vec<(String, Tensor)>> {
    let mut f = File::open(path).ok()?;
    let mut stored = [0; HASH];
    f.read_exact(&mut stored).ok()?;
    let len = f.metadata().ok()?.len().checked_sub(HASH as u64)?;
    let mut hash = blake3::Hasher::new();
    hash.update(&len.to_le_bytes());
    hash.update_reader(&mut f).ok()?;
    if *hash.finalize().as_bytes() != stored {
        return None;
    }
    let mut read = |at: u64, n: u64| -> Option<Vec<u8>> {
        if at.checked_add(n)? > len {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(n).ok()?];
        f.seek(SeekFrom::Start(HASH as u64 + at)).ok()?;
        f.read_exact(&mut bytes).ok()?;
        Some(bytes)
    };
    let head_len = u64::from_le_bytes(read(0, 8)?.try_into().ok()?);
    let head: Map<String, Value> = serde_json::from_slice(&read(8, head_len)?).ok()?;
    let mut out = Vec::new();
    for (name, info) in head.iter().filter(|(n, _)| *n != "__metadata__") {
        let shape: Vec<usize> = serde_json::from_value(info["shape"].clone()).ok()?;
        let [from, to]: [u64; 2] = serde_json::from_value(info["data_offsets"].clone()).ok()?;
        let data = read((8 + head_len).checked_add(from)?, to.checked_sub(from)?)?;
        let elem = match info["dtype"].as_str()? {
            "F32" => Elem::F32,
            "F64" => Elem::F64,
            "I32" => Elem::I32,
            "I8" => Elem::I8,
            "U8" => Elem::U8,
            _ => return None,
        };
        out.push((name.clone(), Tensor::from_le_bytes(elem, &shape, &data).ok()?));
    }
    Some(out)
}

/// Bytes of a host tensor in a declared type: floats rounded, codes packed.
pub(crate) fn stored_bytes(t: &Tensor, ty: &TensorType) -> Result<Vec<u8>, String> {
    match (ty.elem, t.data()) {
        (Elem::Quant(spec), _) => qrmc_ir::pack::pack(t, spec),
        (elem, Data::F32(v)) => match v.iter().position(|x| !x.is_finite()) {
            None => t.to_le_bytes(elem),
            Some(at) => Err(format!("element {at} is NaN or infinite")),
        },
        (elem, _) => t.to_le_bytes(elem),
    }
}

#[cfg(test)]
mod tests;
