//! Writing an artefact: into a folder beside the place it will have, which it takes in one step.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::manifest::{Manifest, SourceInfo, TensorInfo};
use super::shards::{ShardWriter, StoredTensor, TensorPlan};
use super::{ArtefactError, FORMAT};

/// A folder in the making. Until [`Output::publish`] the target is untouched.
#[derive(Debug)]
pub struct Output {
    target: PathBuf,
    partial: PathBuf,
    /// Held while this output is in the making.
    _lock: std::fs::File,
}

impl Output {
    /// Prepares `<target>.partial`. What an interrupted run left there is cleared, kept steps aside.
    ///
    /// # Errors
    /// If the target holds something that is not this kind of output (`ours` tells), or nothing can be written beside it.
    pub fn prepare(target: &Path, ours: impl Fn(&Path) -> bool) -> Result<Self, ArtefactError> {
        let Some(name) = target.file_name() else {
            return Err(
                ArtefactError::new(target, "is no name for an output folder").hint("give a folder with -o")
            );
        };
        if target.exists() {
            let empty = std::fs::read_dir(target).is_ok_and(|mut d| d.next().is_none());
            if !empty && !ours(target) {
                return Err(ArtefactError::new(target, "exists and holds something else")
                    .hint("choose another folder with -o, or move what is there away; nothing was changed"));
            }
        }
        let mut partial = name.to_owned();
        partial.push(".partial");
        let partial = target.with_file_name(partial);
        let new = partial.join("new");
        let lock = || {
            std::fs::create_dir_all(&partial)?;
            std::fs::File::create(partial.join("lock"))
        };
        let lock = lock().map_err(|e| ArtefactError::io(&partial, "write beside the output", &e))?;
        if let Err(std::fs::TryLockError::WouldBlock) = lock.try_lock() {
            return Err(ArtefactError::new(&partial, "another qrmc is writing this output")
                .hint("wait for it, or choose another folder with -o"));
        }
        let make = || -> std::io::Result<()> {
            if new.exists() {
                std::fs::remove_dir_all(&new)?;
            }
            std::fs::create_dir_all(&new)?;
            // A folder that can be made but not written to should be found out now, not after hours.
            let probe = new.join(".probe");
            std::fs::write(&probe, b"x")?;
            std::fs::remove_file(&probe)
        };
        make().map_err(|e| ArtefactError::io(&partial, "write beside the output", &e))?;
        Ok(Output { target: target.to_owned(), partial, _lock: lock })
    }

    /// Where the new files go.
    pub fn folder(&self) -> PathBuf {
        self.partial.join("new")
    }

    /// Where finished steps are kept until the output is published.
    pub fn steps(&self) -> PathBuf {
        self.partial.join("steps")
    }

    /// Writes one file and forces it to disk.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn file(&self, name: &str, bytes: &[u8]) -> Result<(), ArtefactError> {
        let path = self.folder().join(name);
        let write = || -> std::io::Result<()> {
            let mut f = std::fs::File::create(&path)?;
            f.write_all(bytes)?;
            f.sync_all()
        };
        write().map_err(|e| ArtefactError::io(&path, "write", &e))
    }

    /// Puts the new folder in the place of the target, and removes what was there and the kept steps.
    ///
    /// # Errors
    /// If the rename fails; then what was there is put back.
    pub fn publish(self) -> Result<(), ArtefactError> {
        let old = self.partial.join("old");
        let io = |e: std::io::Error| ArtefactError::io(&self.target, "put the output in place", &e);
        if old.exists() {
            std::fs::remove_dir_all(&old).map_err(io)?;
        }
        let had = self.target.exists();
        if had {
            std::fs::rename(&self.target, &old).map_err(io)?;
        }
        if let Err(e) = std::fs::rename(self.folder(), &self.target) {
            if had {
                std::fs::rename(&old, &self.target).map_err(io)?;
            }
            return Err(io(e));
        }
        // The output is in place; leftovers cannot make this run fail any more.
        let _ = std::fs::remove_dir_all(&self.partial);
        Ok(())
    }
}

/// Writes the tensors and files of an artefact in order, and its manifest last.
pub struct ArtefactWriter<'a> {
    output: &'a Output,
    shards: ShardWriter,
    types: BTreeMap<String, String>,
    tensors: BTreeMap<String, TensorInfo>,
    files: BTreeMap<String, String>,
    /// The tensor in the making.
    open: Option<(String, TensorInfo, blake3::Hasher)>,
}

impl<'a> ArtefactWriter<'a> {
    /// Plans the tensors, in the order in which they will come.
    pub fn new(output: &'a Output, plan: Vec<TensorPlan>, shard_bytes: u64) -> Self {
        let types = plan.iter().map(|p| (p.name.clone(), p.ty.to_string())).collect();
        let plan = plan.iter().map(TensorPlan::stored).collect();
        ArtefactWriter::over(output, ShardWriter::new(&output.folder(), plan, shard_bytes), types)
    }

    /// Plans tensors that have no type of the IR, in files whose names begin with `stem`.
    pub fn stored(output: &'a Output, stem: &'static str, plan: Vec<StoredTensor>, shard_bytes: u64) -> Self {
        let ty = |t: &StoredTensor| {
            let shape: Vec<String> = t.shape.iter().map(ToString::to_string).collect();
            (t.name.clone(), format!("{}[{}]", t.dtype.to_string().to_lowercase(), shape.join(", ")))
        };
        let types = plan.iter().map(ty).collect();
        ArtefactWriter::over(output, ShardWriter::named(&output.folder(), stem, plan, shard_bytes), types)
    }

    fn over(output: &'a Output, shards: ShardWriter, types: BTreeMap<String, String>) -> Self {
        ArtefactWriter { output, shards, types, tensors: BTreeMap::new(), files: BTreeMap::new(), open: None }
    }

    /// Writes the next tensor.
    ///
    /// # Errors
    /// As [`ShardWriter::write`].
    pub fn tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), ArtefactError> {
        self.begin(name)?;
        self.put(bytes)?;
        self.end()
    }

    /// Begins the next tensor, whose bytes come by [`ArtefactWriter::put`].
    ///
    /// # Errors
    /// As [`ShardWriter::begin`].
    pub fn begin(&mut self, name: &str) -> Result<(), ArtefactError> {
        let file = self.shards.begin(name)?;
        let ty = self.types.get(name).cloned().unwrap_or_default();
        let info = TensorInfo { ty, file, bytes: 0, hash: String::new() };
        self.open = Some((name.to_owned(), info, blake3::Hasher::new()));
        Ok(())
    }

    /// Writes the next bytes of the tensor that was begun.
    ///
    /// # Errors
    /// As [`ShardWriter::put`].
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), ArtefactError> {
        self.shards.put(bytes)?;
        if let Some((_, info, hash)) = &mut self.open {
            info.bytes += bytes.len() as u64;
            hash.update(bytes);
        }
        Ok(())
    }

    /// Ends the tensor that was begun.
    ///
    /// # Errors
    /// As [`ShardWriter::end`].
    pub fn end(&mut self) -> Result<(), ArtefactError> {
        self.shards.end()?;
        if let Some((name, mut info, hash)) = self.open.take() {
            info.hash = hash.finalize().to_hex().to_string();
            self.tensors.insert(name, info);
        }
        Ok(())
    }

    /// Writes another file.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn file(&mut self, name: &str, bytes: &[u8]) -> Result<(), ArtefactError> {
        self.output.file(name, bytes)?;
        self.files.insert(name.to_owned(), blake3::hash(bytes).to_hex().to_string());
        Ok(())
    }

    /// Takes in a file that was written into the folder by other means.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn written(&mut self, name: &str) -> Result<(), ArtefactError> {
        let path = self.output.folder().join(name);
        let io = |e: std::io::Error| ArtefactError::io(&path, "read", &e);
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(std::fs::File::open(&path).map_err(io)?).map_err(io)?;
        self.files.insert(name.to_owned(), hasher.finalize().to_hex().to_string());
        Ok(())
    }

    /// Writes the index that tells Hugging Face readers which shard holds a tensor, if there are several.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn index(&mut self) -> Result<(), ArtefactError> {
        if self.shards.count() == 1 {
            return Ok(());
        }
        let total: u64 = self.tensors.values().map(|t| t.bytes).sum();
        let map: BTreeMap<&str, &str> =
            self.tensors.iter().map(|(n, t)| (n.as_str(), t.file.as_str())).collect();
        let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": map });
        self.file(&self.shards.index_name(), format!("{index:#}\n").as_bytes())
    }

    /// Writes the manifest.
    ///
    /// # Errors
    /// If a planned tensor is missing or the file cannot be written.
    pub fn finish(
        self,
        qrmc: &str,
        source: SourceInfo,
        pipeline: Vec<String>,
    ) -> Result<Manifest, ArtefactError> {
        self.shards.finish()?;
        let manifest = Manifest {
            format: FORMAT,
            qrmc: qrmc.to_owned(),
            source,
            pipeline,
            files: self.files,
            tensors: self.tensors,
        };
        let mut text = serde_json::to_string_pretty(&manifest)
            .map_err(|e| ArtefactError::new(&self.output.folder(), e.to_string()))?;
        text.push('\n');
        self.output.file("manifest.json", text.as_bytes())?;
        Ok(manifest)
    }
}
