//! Finished steps on disk: one file a key, written under another name first.

use std::path::PathBuf;

use qrmc_ir::{Hash, Tensor};
use qrmc_lowering::artefact::{read_tensors, write_tensors};
use qrmc_passes::StepStore;

/// Keeps steps in a folder.
pub(crate) struct DiskStore {
    folder: PathBuf,
}

impl DiskStore {
    pub(crate) fn new(folder: PathBuf) -> Self {
        DiskStore { folder }
    }

    fn path(&self, key: &Hash) -> PathBuf {
        self.folder.join(format!("{}.step", key.hex()))
    }
}

impl StepStore for DiskStore {
    fn get(&self, key: &Hash) -> Option<Vec<(String, Tensor)>> {
        read_tensors(&self.path(key))
    }

    fn put(&self, key: &Hash, tensors: &[(String, Tensor)]) -> Result<(), String> {
        std::fs::create_dir_all(&self.folder).map_err(|e| format!("{}: {e}", self.folder.display()))?;
        write_tensors(&self.path(key), tensors).map_err(|e| e.to_string())
    }

    fn forget(&self, key: &Hash) {
        // A step that stays costs disk, nothing else.
        let _ = std::fs::remove_file(self.path(key));
    }
}
