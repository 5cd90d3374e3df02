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

    /// The type and shape that a safetensors header gives it: codes are rows of bytes.
    fn stored(&self) -> (&'static str, Vec<usize>) {
        let mut shape = self.ty.shape.as_fixed().unwrap_or_default();
        let dtype = match self.ty.elem {
            Elem::F32 => "F32",
            Elem::F16 => "F16",
            Elem::BF16 => "BF16",
            Elem::F64 => "F64",
            Elem::I32 => "I32",
            Elem::I8 => "I8",
            Elem::U8 => "U8",
            Elem::Quant(_) => {
                if let Some(last) = shape.last_mut() {
                    *last = self.ty.elem.row_bytes(*last);
                }
                "U8"
            }
        };
        (dtype, shape)
    }
}

/// Writes planned tensors, in order, into numbered shards of a folder.
pub struct ShardWriter {
    folder: PathBuf,
    shards: Vec<Vec<TensorPlan>>,
    shard: usize,
    next: usize,
    out: Option<BufWriter<File>>,
}

impl ShardWriter {
    /// Divides the tensors into shards of at most `shard_bytes`; one that is larger stands alone.
    pub fn new(folder: &Path, plan: Vec<TensorPlan>, shard_bytes: u64) -> Self {
        let mut shards: Vec<Vec<TensorPlan>> = vec![Vec::new()];
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
        ShardWriter { folder: folder.to_owned(), shards, shard: 0, next: 0, out: None }
    }

    /// Number of shards.
    pub fn count(&self) -> usize {
        self.shards.len()
    }

    /// File name of shard `i`.
    pub fn file_name(&self, i: usize) -> String {
        if self.shards.len() == 1 {
            return "model.safetensors".into();
        }
        format!("model-{:05}-of-{:05}.safetensors", i + 1, self.shards.len())
    }

    /// Writes the next planned tensor; gives the name of its file.
    ///
    /// # Errors
    /// If the name or the length is not the planned one, or the file cannot be written.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<String, ArtefactError> {
        while self.shards.get(self.shard).is_some_and(|s| self.next == s.len()) {
            self.close()?;
            self.shard += 1;
            self.next = 0;
        }
        let file = self.file_name(self.shard);
        let path = self.folder.join(&file);
        let planned = self.shards.get(self.shard).and_then(|s| s.get(self.next));
        if planned.is_none_or(|p| p.name != name || p.bytes() != bytes.len() as u64) {
            let want =
                planned.map_or("nothing".to_owned(), |p| format!("`{}` of {} bytes", p.name, p.bytes()));
            let what = format!("`{name}` of {} bytes stands where {want} was planned", bytes.len());
            return Err(ArtefactError::new(&path, what));
        }
        let out = match &mut self.out {
            Some(out) => out,
            None => {
                let f = File::create(&path).map_err(|e| ArtefactError::io(&path, "create", &e))?;
                let mut out = BufWriter::with_capacity(1 << 20, f);
                out.write_all(&header(&self.shards[self.shard]))
                    .map_err(|e| ArtefactError::io(&path, "write", &e))?;
                self.out.insert(out)
            }
        };
        out.write_all(bytes).map_err(|e| ArtefactError::io(&path, "write", &e))?;
        self.next += 1;
        Ok(file)
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

fn header(tensors: &[TensorPlan]) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut at = 0u64;
    for t in tensors {
        let (dtype, shape) = t.stored();
        let end = at + t.bytes();
        map.insert(t.name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, end] }));
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
    let plan: Vec<TensorPlan> =
        tensors.iter().map(|(name, t)| TensorPlan { name: name.clone(), ty: t.ty() }).collect();
    let head = header(&plan);
    let io = |e: std::io::Error| ArtefactError::io(path, "write", &e);
    let temporary = path.with_extension("tmp");
    let mut f = File::create(&temporary).map_err(io)?;
    let mut hash = blake3::Hasher::new();
    hash.update(&(head.len() as u64 + plan.iter().map(TensorPlan::bytes).sum::<u64>()).to_le_bytes());
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
mod tests {
    use super::*;
    use qrmc_ir::Shape;

    fn plan(name: &str, n: usize) -> TensorPlan {
        TensorPlan { name: name.into(), ty: TensorType::new(Elem::F32, Shape::fixed(&[n])) }
    }

    #[test]
    fn shards_hold_what_was_planned() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = ShardWriter::new(dir.path(), vec![plan("a", 2), plan("b", 1), plan("c", 4)], 12);
        assert_eq!(w.count(), 2);
        assert_eq!(w.write("a", &[1; 8]).unwrap(), "model-00001-of-00002.safetensors");
        assert!(w.write("c", &[2; 16]).is_err(), "another tensor was planned");
        w.write("b", &[2; 4]).unwrap();
        assert_eq!(w.write("c", &[3; 16]).unwrap(), "model-00002-of-00002.safetensors");
        w.finish().unwrap();
        let bytes = std::fs::read(dir.path().join("model-00001-of-00002.safetensors")).unwrap();
        assert_eq!(bytes[bytes.len() - 12..], [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
        assert!(bytes.len().is_multiple_of(4) && (bytes.len() - 12).is_multiple_of(8));
    }

    #[test]
    fn unwritten_tensors_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = ShardWriter::new(dir.path(), vec![plan("a", 1), plan("b", 1)], 100);
        w.write("a", &[0; 4]).unwrap();
        assert!(w.finish().is_err());
    }

    // Every write to /dev/full fails as on a full disk.
    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_told_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/dev/full", dir.path().join("model.safetensors")).unwrap();
        let mut w = ShardWriter::new(dir.path(), vec![plan("a", 1 << 20)], 1 << 30);
        let e = w.write("a", &vec![0; 4 << 20]).and_then(|_| w.finish()).unwrap_err();
        assert!(
            e.what.contains("cannot write") && e.hint.as_deref().is_some_and(|h| h.contains("disk is full")),
            "{e}"
        );
    }

    #[test]
    fn kept_tensors_come_back_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.step");
        let tensors = vec![
            ("s".to_owned(), Tensor::f32([2], vec![1.5, -2.0])),
            ("loss".to_owned(), Tensor::new([1], Data::F64(vec![0.1]))),
        ];
        write_tensors(&path, &tensors).unwrap();
        assert_eq!(read_tensors(&path).unwrap(), tensors);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - 1;
        bytes[at] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(read_tensors(&path), None);
        std::fs::write(&path, &bytes[..20]).unwrap();
        assert_eq!(read_tensors(&path), None);
    }
}
