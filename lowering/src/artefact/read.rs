//! Opening an artefact: the manifest says what must be there, and everything is checked before it is used.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use memmap2::Mmap;
use qrmc_ir::{Module, RawWeight, TensorType, WeightError, WeightSource, parse, parse_type, verify};
use serde_json::{Map, Value};

use super::ArtefactError;
use super::manifest::{FORMAT, Manifest};

/// Most bytes of a header or a text file that are read.
const TEXT_LIMIT: u64 = 256 << 20;

/// Whether a folder looks like an artefact.
pub fn is_artefact(path: &Path) -> bool {
    path.join("manifest.json").is_file() && path.join("model.qir").is_file()
}

/// Checks one tensor, by its number.
pub type Check<'a> = dyn Fn(usize) -> Result<(), ArtefactError> + Sync + 'a;
/// Runs a check for every number below a count, on threads if the caller has some.
pub type Spread<'a> = dyn Fn(usize, &Check<'_>) -> Result<(), ArtefactError> + 'a;

/// An opened artefact.
#[derive(Debug)]
pub struct Artefact {
    /// The folder.
    pub path: PathBuf,
    /// The manifest.
    pub manifest: Manifest,
    /// The graph.
    pub module: Module,
    tensors: HashMap<String, Stored>,
    shards: Vec<Shard>,
}

/// A mapped file of tensors.
#[derive(Debug)]
struct Shard {
    map: Arc<Mmap>,
    /// The same memory, to be lent on.
    bytes: Bytes,
}

/// Lets a shared map stand where owned bytes are wanted.
struct Mapped(Arc<Mmap>);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[derive(Debug)]
struct Stored {
    ty: TensorType,
    map: usize,
    from: usize,
    to: usize,
    /// Whether its bytes were compared with the manifest's hash.
    checked: AtomicBool,
}

impl Artefact {
    /// Opens a folder. Every tensor and file of the manifest must be there with its hash; `spread` runs the checks of
    /// all tensors, on threads if the caller has some.
    ///
    /// # Errors
    /// The first thing that is missing or altered, by name.
    pub fn open(path: &Path, spread: &Spread<'_>) -> Result<Self, ArtefactError> {
        let a = Artefact::map(path)?;
        a.check(spread, |_| true)?;
        Ok(a)
    }

    /// As [`Artefact::open`], but the bytes of no tensor are looked at. A tensor is checked by [`Artefact::check`], or when
    /// it is first asked for.
    ///
    /// # Errors
    /// As [`Artefact::open`].
    pub fn map(path: &Path) -> Result<Self, ArtefactError> {
        let text = read_text(&path.join("manifest.json"))?;
        let manifest_path = path.join("manifest.json");
        let manifest: Manifest = serde_json::from_str(&text).map_err(|e| {
            ArtefactError::new(&manifest_path, format!("is no manifest: {e}")).hint("compile the model again")
        })?;
        if manifest.format != FORMAT {
            let what = format!("format {}; this qrmc reads {FORMAT}", manifest.format);
            return Err(
                ArtefactError::new(&manifest_path, what).hint("use the qrmc that wrote it, or compile again")
            );
        }
        for (name, hash) in &manifest.files {
            plain_name(path, name)?;
            let file = path.join(name);
            let bytes = File::open(&file).map_err(|e| missing(&file, &e))?;
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(bytes).map_err(|e| missing(&file, &e))?;
            if hasher.finalize().to_hex().as_str() != hash {
                return Err(altered(&file, "this file"));
            }
        }
        let qir = path.join("model.qir");
        if !manifest.files.contains_key("model.qir") {
            return Err(
                ArtefactError::new(&manifest_path, "lists no model.qir").hint("compile the model again")
            );
        }
        let module = parse(&read_text(&qir)?).map_err(|d| ArtefactError::new(&qir, d.to_string()))?;
        if let Err(faults) = verify(&module) {
            return Err(ArtefactError::new(&qir, faults[0].to_string()));
        }
        let mut a =
            Artefact { path: path.to_owned(), manifest, module, tensors: HashMap::new(), shards: Vec::new() };
        a.map_tensors()?;
        a.check_declared()?;
        Ok(a)
    }

    /// Compares the tensors that `which` chooses with their hashes.
    ///
    /// # Errors
    /// The first that was altered, by name.
    pub fn check(&self, spread: &Spread<'_>, which: impl Fn(&str) -> bool) -> Result<(), ArtefactError> {
        let mut names: Vec<&String> = self.manifest.tensors.keys().filter(|n| which(n)).collect();
        // A long one at the end would leave all threads but one without work.
        names.sort_by_key(|n| std::cmp::Reverse(self.manifest.tensors[*n].bytes));
        spread(names.len(), &|i| self.check_tensor(names[i], &self.tensors[names[i]]))
    }

    fn check_tensor(&self, name: &str, s: &Stored) -> Result<(), ArtefactError> {
        if s.checked.load(Ordering::Acquire) {
            return Ok(());
        }
        let info = &self.manifest.tensors[name];
        if blake3::hash(&self.shards[s.map].bytes[s.from..s.to]).to_hex().as_str() != info.hash {
            return Err(altered(&self.path.join(&info.file), &format!("tensor `{name}`")));
        }
        s.checked.store(true, Ordering::Release);
        Ok(())
    }

    /// A tensor whose bytes were checked, now or before.
    fn tensor(&self, name: &str) -> Result<&Stored, WeightError> {
        let Some(s) = self.tensors.get(name) else {
            return Err(WeightError::new(name, format!("is not in {}", self.path.display())));
        };
        self.check_tensor(name, s).map_err(|e| WeightError::new(name, e.to_string()))?;
        Ok(s)
    }

    fn map_tensors(&mut self) -> Result<(), ArtefactError> {
        let mut files: Vec<&str> = self.manifest.tensors.values().map(|t| t.file.as_str()).collect();
        files.sort_unstable();
        files.dedup();
        let mut found = HashMap::new();
        for (i, file) in files.iter().enumerate() {
            plain_name(&self.path, file)?;
            let path = self.path.join(file);
            let shard = map_file(&path)?;
            for (name, from, to) in entries(&path, &shard.bytes)? {
                found.insert(name, (i, from, to));
            }
            self.shards.push(shard);
        }
        for (name, info) in &self.manifest.tensors {
            let path = self.path.join(&info.file);
            let ty = parse_type(&info.ty).map_err(|d| {
                ArtefactError::new(&self.path, format!("manifest.json, tensor `{name}`: {}", d.message))
            })?;
            let Some(&(map, from, to)) = found.get(name) else {
                return Err(ArtefactError::new(&path, format!("tensor `{name}` is missing"))
                    .hint("the manifest lists it; copy the folder again or compile again"));
            };
            if ty.bytes() != Some(to - from) || info.bytes != (to - from) as u64 {
                let what =
                    format!("tensor `{name}` has {} bytes, the manifest says {}", to - from, info.bytes);
                return Err(ArtefactError::new(&path, what).hint("copy the folder again or compile again"));
            }
            self.tensors.insert(name.clone(), Stored { ty, map, from, to, checked: AtomicBool::new(false) });
        }
        Ok(())
    }

    fn check_declared(&self) -> Result<(), ArtefactError> {
        for w in self.module.weights() {
            match self.tensors.get(&w.name) {
                Some(s) if s.ty == w.ty => {}
                Some(s) => {
                    let what = format!("tensor `{}` is {}, model.qir says {}", w.name, s.ty, w.ty);
                    return Err(ArtefactError::new(&self.path, what));
                }
                None => {
                    let what = format!("tensor `{}` of model.qir is not in the manifest", w.name);
                    return Err(ArtefactError::new(&self.path, what).hint("compile the model again"));
                }
            }
        }
        Ok(())
    }

    /// A file of the artefact, such as `tokenizer.json`.
    pub fn file(&self, name: &str) -> Option<Vec<u8>> {
        std::fs::read(self.path.join(name)).ok()
    }
}

impl WeightSource for Artefact {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        let s = self.tensor(name)?;
        Ok(RawWeight { ty: s.ty.clone(), bytes: (&self.shards[s.map].bytes[s.from..s.to]).into() })
    }

    fn shared(&self, name: &str) -> Result<Option<Bytes>, WeightError> {
        let s = self.tensor(name)?;
        Ok(Some(self.shards[s.map].bytes.slice(s.from..s.to)))
    }

    fn release(&self, name: &str) {
        if let Some(s) = self.tensors.get(name) {
            self.shards[s.map].release(s.from, s.to);
        }
    }
}

/// Refuses names that lead out of the folder.
fn plain_name(folder: &Path, name: &str) -> Result<(), ArtefactError> {
    if name.contains(['/', '\\']) || name.starts_with('.') || name.is_empty() {
        return Err(ArtefactError::new(folder, format!("manifest.json names the file `{name}`"))
            .hint("the files of an artefact lie in its own folder"));
    }
    Ok(())
}

fn read_text(path: &Path) -> Result<String, ArtefactError> {
    let meta = std::fs::metadata(path).map_err(|e| missing(path, &e))?;
    if meta.len() > TEXT_LIMIT {
        return Err(ArtefactError::new(path, format!("has {} bytes, which no artefact writes", meta.len())));
    }
    let bytes = std::fs::read(path).map_err(|e| missing(path, &e))?;
    String::from_utf8(bytes).map_err(|_| ArtefactError::new(path, "is not UTF-8"))
}

fn missing(path: &Path, e: &std::io::Error) -> ArtefactError {
    ArtefactError::io(path, "read", e)
        .hint("a part of the artefact is missing; copy the folder again or compile again")
}

fn altered(path: &Path, what: &str) -> ArtefactError {
    ArtefactError::new(path, format!("{what} was altered: its hash is not the manifest's"))
        .hint("copy the folder again or compile again")
}

#[allow(unsafe_code, reason = "files are mapped, not copied")]
fn map_file(path: &Path) -> Result<Shard, ArtefactError> {
    let file = File::open(path).map_err(|e| missing(path, &e))?;
    // SAFETY: the map is only read, and every byte is checked against the manifest's hash before it is used. A file
    // that another process shortens meanwhile ends the process with a signal, as documented in docs/artefact.md.
    let map = unsafe { Mmap::map(&file) };
    let map = Arc::new(map.map_err(|e| ArtefactError::io(path, "map", &e))?);
    let bytes = Bytes::from_owner(Mapped(map.clone()));
    Ok(Shard { map, bytes })
}

impl Shard {
    /// Gives back the pages that hold some bytes; they are read again from the file when they are next looked at.
    #[cfg(unix)]
    #[allow(unsafe_code, reason = "advice on mapped pages")]
    fn release(&self, from: usize, to: usize) {
        use memmap2::UncheckedAdvice;
        // SAFETY: the map is of a file and never written, so that a page that is dropped and read again holds what it
        // held: nothing that anybody sees through `bytes` changes.
        let done = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, from, to - from) };
        // Advice that is not taken costs memory, nothing else.
        let _ = done;
    }

    #[cfg(not(unix))]
    fn release(&self, _: usize, _: usize) {}
}

/// Names and byte ranges of a safetensors file.
fn entries(path: &Path, map: &[u8]) -> Result<Vec<(String, usize, usize)>, ArtefactError> {
    let bad = |what: String| ArtefactError::new(path, what).hint("copy the folder again or compile again");
    let Some((len, rest)) = map.split_at_checked(8) else {
        return Err(bad(format!("has {} bytes, too few for a header", map.len())));
    };
    let len = len.iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b));
    let Some((head, data)) = usize::try_from(len).ok().and_then(|n| rest.split_at_checked(n)) else {
        return Err(bad(format!("a header of {len} bytes does not fit a file of {} bytes", map.len())));
    };
    let start = 8 + head.len();
    let head: Map<String, Value> =
        serde_json::from_slice(head).map_err(|e| bad(format!("the header is no JSON object: {e}")))?;
    let mut out = Vec::new();
    for (name, info) in head {
        if name == "__metadata__" {
            continue;
        }
        let range: Option<[usize; 2]> = serde_json::from_value(info["data_offsets"].clone()).ok();
        match range {
            Some([from, to]) if from <= to && to <= data.len() => out.push((name, start + from, start + to)),
            _ => return Err(bad(format!("tensor `{name}` lies outside the file of {} bytes", map.len()))),
        }
    }
    Ok(out)
}
