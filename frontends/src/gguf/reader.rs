//! The container: header, metadata and the table of tensors. Nothing in it is believed before it is checked
//! against the bytes that are really there.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::dequant::GgmlType;
use crate::ImportError;
use crate::hf::map_file;

/// How deep arrays of arrays may nest.
const MAX_NESTING: u32 = 4;
/// Most dimensions a tensor may have.
const MAX_DIMS: u32 = 4;
const FETCH_AGAIN: &str = "the file is cut short or damaged: download it again";

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Meta {
    /// Any unsigned integer.
    Uint(u64),
    /// Any signed integer.
    Int(i64),
    /// Single precision.
    F32(f32),
    /// Double precision.
    F64(f64),
    /// True or false.
    Bool(bool),
    /// UTF-8 text.
    Str(String),
    /// A list, left where it is in the file.
    Array(Array),
}

impl fmt::Display for Meta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Meta::Uint(v) => write!(f, "the integer {v}"),
            Meta::Int(v) => write!(f, "the integer {v}"),
            Meta::F32(v) => write!(f, "the float {v}"),
            Meta::F64(v) => write!(f, "the float {v}"),
            Meta::Bool(v) => write!(f, "{v}"),
            Meta::Str(v) => write!(f, "the string `{}`", v.chars().take(60).collect::<String>()),
            Meta::Array(a) => write!(f, "a list of {} values of {}", a.len, kind_name(a.kind)),
        }
    }
}

/// A list in the metadata: checked, but not copied.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    kind: u32,
    len: usize,
    at: Range<usize>,
}

/// One entry of the table of tensors.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// Name in the file, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Sizes, outermost first (the file lists them innermost first).
    pub shape: Vec<usize>,
    /// How the elements are stored.
    pub ty: GgmlType,
    /// Where the bytes are in the file.
    pub(super) at: Range<usize>,
}

/// A mapped GGUF file whose structure has been checked. The file must not change while it is open.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Bytes,
    version: u32,
    meta: HashMap<String, Meta>,
    tensors: Vec<GgufTensor>,
}

impl GgufFile {
    /// Maps a file and checks its structure; no tensor is read.
    ///
    /// # Errors
    /// If it is no GGUF of version 2 or 3 in little-endian order, if any count, length, type or offset does
    /// not fit the file, if a name comes twice, or if a tensor is of a type that is not dequantised.
    pub fn open(path: &Path) -> Result<Self, ImportError> {
        let map = map_file(path, 24)?;
        let mut cur = Cursor { path, bytes: &map, pos: 0 };
        let version = check_version(&mut cur)?;
        let n_tensors = cur.u64("the number of tensors")?;
        let n_meta = cur.u64("the number of metadata entries")?;
        // Least bytes: key length, type and a one-byte value; name length, rank, one size, type and offset.
        cur.fits(n_meta, 13, "metadata entries")?;
        let mut meta = HashMap::new();
        for i in 0..n_meta {
            let key = cur.string(&format!("the key of metadata entry {i}"))?.to_owned();
            let kind = cur.u32(&format!("the type of `{key}`"))?;
            let value = cur.value(kind, &key, 0)?;
            if meta.insert(key.clone(), value).is_some() {
                return Err(cur.fail(format!("metadata key `{key}` comes twice")));
            }
        }
        let align = match meta.get("general.alignment") {
            None => 32,
            Some(&Meta::Uint(n)) if n.is_power_of_two() && n <= 1 << 20 => n as usize,
            Some(other) => {
                let what = format!("`general.alignment` is {other}; a power of two up to 1048576 is wanted");
                return Err(cur.fail(what));
            }
        };
        cur.fits(n_tensors, 32, "tensors")?;
        let mut infos = Vec::new();
        for i in 0..n_tensors {
            infos.push(tensor_info(&mut cur, i)?);
        }
        let data = cur.pos.next_multiple_of(align);
        let tensors = place(&cur, infos, data, align)?;
        Ok(GgufFile { path: path.to_owned(), map, version, meta, tensors })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Tensors in the order of the table.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The stored bytes of a tensor of this file.
    pub fn bytes(&self, tensor: &GgufTensor) -> &[u8] {
        &self.map[tensor.at.clone()]
    }

    /// As [`GgufFile::bytes`], in memory that outlives the borrow.
    pub(super) fn shared(&self, tensor: &GgufTensor) -> Bytes {
        self.map.slice(tensor.at.clone())
    }

    /// A metadata value.
    pub fn meta(&self, key: &str) -> Option<&Meta> {
        self.meta.get(key)
    }
}

fn kind_name(kind: u32) -> &'static str {
    const NAMES: [&str; 13] =
        ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "list", "u64", "i64", "f64"];
    NAMES.get(kind as usize).unwrap_or(&"no known type")
}

fn check_version(cur: &mut Cursor<'_>) -> Result<u32, ImportError> {
    let magic = cur.take(4, "the magic")?;
    if magic != b"GGUF" {
        let what = format!("the file starts with {magic:02x?}, not with `GGUF`");
        return Err(cur.fail(what).hint("name a .gguf file, or a folder that holds config.json"));
    }
    let version = cur.u32("the version")?;
    match version {
        2 | 3 => Ok(version),
        1 => Err(cur
            .fail("this is GGUF version 1; versions 2 and 3 are read")
            .hint("convert the model again with a current llama.cpp")),
        v if v != 0 && v.swap_bytes() <= 0xffff => {
            let what =
                format!("this is a big-endian GGUF (version {}); only little-endian is read", v.swap_bytes());
            Err(cur.fail(what).hint("convert it with gguf-convert-endian"))
        }
        v => Err(cur.fail(format!("this is GGUF version {v}; versions 2 and 3 are read"))),
    }
}

struct Info {
    name: String,
    shape: Vec<usize>,
    ty: GgmlType,
    offset: u64,
    bytes: usize,
}

fn tensor_info(cur: &mut Cursor<'_>, i: u64) -> Result<Info, ImportError> {
    let name = cur.string(&format!("the name of tensor {i}"))?.to_owned();
    let what = format!("the entry of tensor `{name}`");
    let rank = cur.u32(&what)?;
    if rank == 0 || rank > MAX_DIMS {
        return Err(cur.fail(format!("tensor `{name}` has {rank} dimensions; 1 to {MAX_DIMS} are allowed")));
    }
    let mut shape = Vec::with_capacity(rank as usize);
    for _ in 0..rank {
        shape.push(usize::try_from(cur.u64(&what)?).unwrap_or(usize::MAX));
    }
    let id = cur.u32(&what)?;
    let ty = GgmlType::from_id(id).map_err(|why| {
        cur.fail(format!("tensor `{name}` {why}")).hint("take a file in one of the types that are read")
    })?;
    let offset = cur.u64(&what)?;
    let (block, size) = (ty.block_len(), ty.block_bytes());
    if !shape[0].is_multiple_of(block) || shape.contains(&0) {
        let what = format!(
            "tensor `{name}` has sizes {shape:?} (innermost first), no whole blocks of {block} for {ty}"
        );
        return Err(cur.fail(what));
    }
    let bytes =
        shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).and_then(|n| (n / block).checked_mul(size));
    let bytes = bytes.ok_or_else(|| {
        cur.fail(format!("tensor `{name}` of sizes {shape:?} has more elements than an address can count"))
    })?;
    shape.reverse();
    Ok(Info { name, shape, ty, offset, bytes })
}

/// Gives every tensor its place in the file, if it has one of its own.
fn place(
    cur: &Cursor<'_>,
    infos: Vec<Info>,
    data: usize,
    align: usize,
) -> Result<Vec<GgufTensor>, ImportError> {
    let size = cur.bytes.len();
    let mut tensors = Vec::with_capacity(infos.len());
    for Info { name, shape, ty, offset, bytes } in infos {
        if !offset.is_multiple_of(align as u64) {
            return Err(
                cur.fail(format!("tensor `{name}` starts at data byte {offset}, no multiple of {align}"))
            );
        }
        let start = usize::try_from(offset).ok().and_then(|o| data.checked_add(o));
        let at = start.and_then(|s| Some(s..s.checked_add(bytes)?)).filter(|r| r.end <= size);
        let Some(at) = at else {
            let what = format!(
                "the file ends after {size} bytes but tensor `{name}` needs {bytes} from byte {data} + {offset} on"
            );
            return Err(cur.fail(what).hint("download this file again: it is cut short"));
        };
        tensors.push(GgufTensor { name, shape, ty, at });
    }
    let mut sorted: Vec<&GgufTensor> = tensors.iter().collect();
    sorted.sort_by_key(|t| t.at.start);
    for pair in sorted.windows(2) {
        if pair[1].at.start < pair[0].at.end {
            let (a, b) = (&pair[0], &pair[1]);
            let what = format!(
                "tensor `{}` starts at byte {}, inside `{}`, which ends at {}",
                b.name, b.at.start, a.name, a.at.end
            );
            return Err(cur.fail(what).hint(FETCH_AGAIN));
        }
    }
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = sorted.windows(2).find(|p| p[0].name == p[1].name) {
        return Err(cur.fail(format!("tensor `{}` comes twice", pair[0].name)));
    }
    Ok(tensors)
}

mod cursor;
mod values;
use cursor::Cursor;

#[cfg(test)]
mod tests;
