//! Safetensors files, mapped. The header is checked in full before any tensor is believed.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use memmap2::Mmap;
use qrmc_ir::{Elem, RawWeight, TensorType, WeightError, WeightSource};
use serde_json::Value;

use super::open::{Pairs, read_small};
use crate::{Checkpoint, ImportError};

/// Longest header that is believed, in bytes; the limit of the format's own library.
const MAX_HEADER: u64 = 100_000_000;
/// Advice for files that do not hold what their header says.
const FETCH_AGAIN: &str = "the file is cut short or damaged: download it again";

/// Maps a regular file of at least `min` bytes for reading.
///
/// # Errors
/// If it cannot be opened, is no regular file, or is shorter.
pub(crate) fn map_file(path: &Path, min: u64) -> Result<Bytes, ImportError> {
    let file = File::open(path).map_err(|e| ImportError::io(path, "open it", &e))?;
    let meta = file.metadata().map_err(|e| ImportError::io(path, "read its size", &e))?;
    if !meta.is_file() {
        return Err(ImportError::new(path, "this is not a regular file"));
    }
    if meta.len() < min {
        let what = format!("the file has {} bytes, its header alone needs {min}", meta.len());
        return Err(ImportError::new(path, what).hint(FETCH_AGAIN));
    }
    #[allow(unsafe_code, reason = "mapping a file is the only way to read weights larger than memory")]
    // SAFETY: the map is read-only and private to this process's view. The contract of every reader
    // here is that a checkpoint is not changed while it is open; bytes are only ever read as `u8`.
    let map = unsafe { Mmap::map(&file) };
    map.map(Bytes::from_owner).map_err(|e| ImportError::io(path, "map it", &e))
}

/// One tensor of a file: its type and its bytes, both checked.
#[derive(Clone, Debug)]
struct Entry {
    name: String,
    ty: TensorType,
    bytes: Range<usize>,
}

/// The end of the name of a tensor that says which shape another one has before packing: two 64-bit integers.
const SHAPE: &str = ".weight_shape";

/// The end of the name of a tensor that vllm-ascend stores as 64-bit integers in models in f16: handed out as `i32[n, 2]`.
const DEQ_SCALE: &str = ".deq_scale";

/// One mapped `.safetensors` file whose header has been checked. The file must not change while it is open.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Bytes,
    entries: Vec<Entry>,
    /// Names and values of the tensors that end in [`SHAPE`], which are no weights.
    shapes: Vec<(String, [i64; 2])>,
}

impl SafetensorsFile {
    /// Maps a file and checks its header; no tensor is read.
    ///
    /// # Errors
    /// If the file is too short, the header is no JSON object of tensors, a tensor's type is not one of
    /// F32, F16, BF16, I32, I8, U8 (I64 for two numbers under a name that ends in `.weight_shape`, and for a list under one
    /// that ends in `.deq_scale`), or offsets leave the file, overlap, leave holes or disagree with the shape.
    pub fn open(path: &Path) -> Result<Self, ImportError> {
        let map = map_file(path, 8)?;
        let (entries, shapes) = check_header(path, &map)?;
        // What this crate lets through, the format's own library must accept as well.
        safetensors::SafeTensors::read_metadata(&map).map_err(|e| {
            ImportError::new(path, format!("the safetensors library refuses the header: {e}"))
        })?;
        let number = |at: usize| map[at..].first_chunk().map_or(0, |b| i64::from_le_bytes(*b));
        let shapes =
            shapes.into_iter().map(|e| (e.name, [0, 8].map(|i| number(e.bytes.start + i)))).collect();
        Ok(SafetensorsFile { path: path.to_owned(), map, entries, shapes })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names and types in the order of the bytes.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorType)> {
        self.entries.iter().map(|e| (e.name.as_str(), &e.ty))
    }
}

/// Size in bytes and element type of a safetensors dtype, if it can be imported.
fn elem_of(dtype: &str) -> Option<Elem> {
    Some(match dtype {
        "F32" => Elem::F32,
        "F16" => Elem::F16,
        "BF16" => Elem::BF16,
        "I32" => Elem::I32,
        "I8" => Elem::I8,
        "U8" => Elem::U8,
        _ => return None,
    })
}

/// The tensors in the order of their bytes, and those of [`SHAPE`] apart.
fn check_header(path: &Path, map: &[u8]) -> Result<(Vec<Entry>, Vec<Entry>), ImportError> {
    let fail = |what: String| ImportError::new(path, what);
    let size = map.len() as u64;
    let len = map.first_chunk().map(|b| u64::from_le_bytes(*b)).unwrap_or(u64::MAX);
    if len > MAX_HEADER {
        return Err(fail(format!(
            "the header claims {len} bytes, more than the {MAX_HEADER} that are allowed"
        ))
        .hint("this is no safetensors file, or it is damaged: download it again"));
    }
    if len > size.saturating_sub(8) {
        let what = format!("the header claims {len} bytes, but the file ends after {size}");
        return Err(fail(what).hint(FETCH_AGAIN));
    }
    let start = 8 + len as usize;
    let text = std::str::from_utf8(&map[8..start]).map_err(|e| {
        fail(format!("the header is not UTF-8 at its byte {}", e.valid_up_to())).hint(FETCH_AGAIN)
    })?;
    if !text.trim_start().starts_with('{') {
        return Err(fail("the header is not a JSON object".into()).hint(FETCH_AGAIN));
    }
    let header: Pairs = serde_json::from_str(text)
        .map_err(|e| fail(format!("the header is not a JSON object: {e}")).hint(FETCH_AGAIN))?;
    if let Some(name) = header.duplicate() {
        return Err(fail(format!("the header names tensor `{name}` twice")));
    }
    let mut entries = Vec::new();
    for (name, info) in header.0.into_iter().filter(|(name, _)| name != "__metadata__") {
        entries.push(check_entry(path, name, &info, start, map.len())?);
    }
    entries.sort_by_key(|e| (e.bytes.start, e.bytes.end));
    let mut end = start;
    let mut last = "the header";
    for e in &entries {
        let (from, data) = (e.bytes.start - start, end - start);
        if e.bytes.start < end {
            let what = format!(
                "tensor `{}` starts at data byte {from}, inside `{last}`, which ends at {data}",
                e.name
            );
            return Err(fail(what).hint(FETCH_AGAIN));
        }
        if e.bytes.start > end {
            let what = format!("data bytes {data}..{from} before tensor `{}` belong to no tensor", e.name);
            return Err(fail(what).hint(FETCH_AGAIN));
        }
        (end, last) = (e.bytes.end, &e.name);
    }
    if end != map.len() {
        let what = format!("the last {} bytes of the file belong to no tensor", map.len() - end);
        return Err(fail(what).hint(FETCH_AGAIN));
    }
    Ok(entries.into_iter().partition(|e| e.ty.elem != Elem::F64))
}

/// Checks one entry of the header; `start` and `size` are where tensor data starts and ends in the file.
fn check_entry(
    path: &Path,
    name: String,
    info: &Value,
    start: usize,
    size: usize,
) -> Result<Entry, ImportError> {
    let fail = |what: String| ImportError::new(path, format!("tensor `{name}`: {what}"));
    let numbers = |key: &str| -> Option<Vec<usize>> {
        let list = info.get(key)?.as_array()?;
        list.iter().map(|v| usize::try_from(v.as_u64()?).ok()).collect()
    };
    let dtype = info.get("dtype").and_then(Value::as_str).ok_or_else(|| fail("it has no `dtype`".into()))?;
    let shape = numbers("shape").ok_or_else(|| fail("its `shape` is not a list of sizes".into()))?;
    // No type of the IR holds these; the one of their width marks them until `check_header` takes them out.
    let is_shape = dtype == "I64" && name.ends_with(SHAPE) && shape == [2];
    // Bits of floats in the low half of each: words, low ones first.
    let is_wide = dtype == "I64" && name.ends_with(DEQ_SCALE) && shape.len() == 1;
    let shape = if is_wide { vec![shape[0], 2] } else { shape };
    let elem = elem_of(dtype).or(is_shape.then_some(Elem::F64)).or(is_wide.then_some(Elem::I32)).ok_or_else(
        || {
            let hint = "convert the checkpoint to F32, F16 or BF16 (I32, I8 and U8 are read as well)";
            fail(format!("its dtype is {dtype}, which cannot be imported")).hint(hint)
        },
    )?;
    let (from, to) = match numbers("data_offsets").as_deref() {
        Some(&[from, to]) => (from, to),
        _ => return Err(fail("its `data_offsets` are not two byte offsets".into())),
    };
    if from > to {
        return Err(
            fail(format!("its data starts at byte {from} and ends before that, at {to}")).hint(FETCH_AGAIN)
        );
    }
    let need = shape.iter().try_fold(elem.bits() / 8, |n, &d| n.checked_mul(d)).ok_or_else(|| {
        fail(format!("its shape {shape:?} has more elements than an address can count")).hint(FETCH_AGAIN)
    })?;
    if to - from != need {
        let what =
            format!("its shape {shape:?} of {dtype} needs {need} bytes, the header gives it {}", to - from);
        return Err(fail(what).hint(FETCH_AGAIN));
    }
    if to > size - start {
        let what =
            format!("the file ends after {size} bytes but this tensor needs {}", start.saturating_add(to));
        return Err(fail(what).hint("download this file again: it is cut short"));
    }
    let ty = TensorType::new(elem, shape.as_slice());
    Ok(Entry { name, ty, bytes: start + from..start + to })
}

/// The weights of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.
#[derive(Debug)]
pub struct SafetensorsFolder {
    files: Vec<SafetensorsFile>,
    /// File and entry of every tensor, in file order.
    order: Vec<(usize, usize)>,
    by_name: HashMap<String, usize>,
}

impl SafetensorsFolder {
    /// Opens `model.safetensors` of `folder`, or its index and all shards. `None` if there is neither.
    ///
    /// # Errors
    /// As [`SafetensorsFile::open`]; if the index is no index, names a shard that is missing or outside the
    /// folder, or a tensor that its shard does not hold.
    pub fn open(folder: &Path) -> Result<Option<Self>, ImportError> {
        Self::open_named(folder, "model")
    }

    /// As [`SafetensorsFolder::open`], of files whose names begin with `stem`.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn open_named(folder: &Path, stem: &str) -> Result<Option<Self>, ImportError> {
        let single = folder.join(format!("{stem}.safetensors"));
        if single.exists() {
            let file = SafetensorsFile::open(&single)?;
            return Ok(Some(Self::collect(vec![file], |_, _| true)));
        }
        let index = folder.join(format!("{stem}.safetensors.index.json"));
        if !index.exists() {
            return Ok(None);
        }
        Self::open_index(folder, &index).map(Some)
    }

    fn open_index(folder: &Path, index: &Path) -> Result<Self, ImportError> {
        let fail = |what: String| ImportError::new(index, what);
        let bytes = read_small(index)?;
        let top: Value =
            serde_json::from_slice(&bytes).map_err(|e| fail(format!("this is not JSON: {e}")))?;
        if !top.is_object() {
            return Err(fail("the index is not a JSON object".into()));
        }
        // Read a second time for the map alone, because a `Value` forgets which names come twice.
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: Pairs,
        }
        let map = serde_json::from_slice::<Index>(&bytes)
            .map_err(|e| fail(format!("the index has no `weight_map` from tensor names to shards: {e}")))?
            .weight_map;
        if let Some(name) = map.duplicate() {
            return Err(fail(format!("the index names tensor `{name}` twice")));
        }
        let mut wanted: HashMap<String, String> = HashMap::with_capacity(map.0.len());
        for (name, shard) in map.0 {
            let shard = match shard.as_str() {
                Some(s) if !s.is_empty() && Path::new(s).file_name().is_some_and(|f| f == s) => s.to_owned(),
                Some(s) => {
                    return Err(fail(format!("tensor `{name}`: shard `{s}` is not a plain file name")));
                }
                None => return Err(fail(format!("tensor `{name}`: the shard is not a string"))),
            };
            wanted.insert(name, shard);
        }
        let mut shards: Vec<&String> = wanted.values().collect();
        shards.sort();
        shards.dedup();
        let total = shards.len();
        let mut files = Vec::with_capacity(total);
        for (i, shard) in shards.into_iter().enumerate() {
            let path = folder.join(shard);
            if !path.exists() {
                let what =
                    format!("the index names shard `{shard}` ({} of {total}), which is not there", i + 1);
                return Err(fail(what).hint("download the missing shard into the folder"));
            }
            files.push(SafetensorsFile::open(&path)?);
        }
        let of = |f: &SafetensorsFile| f.path.file_name().map(|n| n.to_string_lossy().into_owned());
        let names = |f: &'_ SafetensorsFile| -> Vec<String> {
            let shapes = f.shapes.iter().map(|(name, _)| name);
            f.entries.iter().map(|e| &e.name).chain(shapes).cloned().collect()
        };
        let held: HashSet<(Option<String>, String)> =
            files.iter().flat_map(|f| names(f).into_iter().map(move |n| (of(f), n))).collect();
        for (name, shard) in &wanted {
            if !held.contains(&(Some(shard.clone()), name.clone())) {
                return Err(fail(format!(
                    "the index puts tensor `{name}` into `{shard}`, which does not hold it"
                ))
                .hint("the index and the shards are of different checkpoints: download both again"));
            }
        }
        Ok(Self::collect(files, |file, name| {
            wanted.get(name).is_some_and(|shard| file.path.file_name().is_some_and(|n| n == shard.as_str()))
        }))
    }

    fn collect(files: Vec<SafetensorsFile>, keep: impl Fn(&SafetensorsFile, &str) -> bool) -> Self {
        let mut order = Vec::new();
        let mut by_name = HashMap::new();
        for (f, file) in files.iter().enumerate() {
            for (e, entry) in file.entries.iter().enumerate().filter(|(_, e)| keep(file, &e.name)) {
                by_name.insert(entry.name.clone(), order.len());
                order.push((f, e));
            }
        }
        SafetensorsFolder { files, order, by_name }
    }
}

impl SafetensorsFolder {
    /// Shapes before packing that the files give for other tensors: the name without `.weight_shape`, and two sizes.
    pub(crate) fn shapes(&self) -> impl Iterator<Item = (&str, [i64; 2])> {
        let all = self.files.iter().flat_map(|f| &f.shapes);
        all.map(|(name, shape)| (name.strip_suffix(SHAPE).unwrap_or(name), *shape))
    }

    /// Type of a tensor.
    pub(crate) fn ty(&self, name: &str) -> Option<&TensorType> {
        self.find(name).ok().map(|(_, e)| &e.ty)
    }

    fn find(&self, name: &str) -> Result<(&SafetensorsFile, &Entry), WeightError> {
        let &at = self.by_name.get(name).ok_or_else(|| {
            let files: Vec<_> = self.files.iter().map(|f| f.path.display().to_string()).collect();
            WeightError::new(name, format!("no such tensor in {}", files.join(", ")))
        })?;
        let (f, e) = self.order[at];
        Ok((&self.files[f], &self.files[f].entries[e]))
    }
}

impl WeightSource for SafetensorsFolder {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        let (file, entry) = self.find(name)?;
        Ok(RawWeight { ty: entry.ty.clone(), bytes: Cow::Borrowed(&file.map[entry.bytes.clone()]) })
    }

    fn shared(&self, name: &str) -> Result<Option<Bytes>, WeightError> {
        let (file, entry) = self.find(name)?;
        Ok(Some(file.map.slice(entry.bytes.clone())))
    }
}

impl Checkpoint for SafetensorsFolder {
    fn tensors(&self) -> Vec<(String, TensorType)> {
        let entry = |&(f, e): &(usize, usize)| &self.files[f].entries[e];
        self.order.iter().map(entry).map(|e| (e.name.clone(), e.ty.clone())).collect()
    }

    fn weight_files(&self) -> Vec<PathBuf> {
        self.files.iter().map(|f| f.path.clone()).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests;
