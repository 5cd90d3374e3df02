//! The file of external data: tensors one after another, each written once.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::artefact::ArtefactError;

/// Where large tensors start, so that readers can map them: a page.
const PAGE: u64 = 4096;
/// Where the others start.
const LINE: u64 = 64;
/// Tensors from here on are large.
const LARGE: u64 = 1 << 20;

/// A place in the file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Span {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// The file in the making.
pub(super) struct DataFile {
    path: PathBuf,
    out: BufWriter<File>,
    at: u64,
}

impl DataFile {
    /// Creates the file.
    pub(super) fn create(path: &Path) -> Result<Self, ArtefactError> {
        let f = File::create(path).map_err(|e| ArtefactError::io(path, "create", &e))?;
        Ok(DataFile { path: path.to_owned(), out: BufWriter::with_capacity(1 << 20, f), at: 0 })
    }

    /// Appends the bytes of a tensor; the gap before them is 0.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<Span, ArtefactError> {
        let len = bytes.len() as u64;
        let offset = self.at.next_multiple_of(if len >= LARGE { PAGE } else { LINE });
        let gap = vec![0; (offset - self.at) as usize];
        let write = self.out.write_all(&gap).and_then(|()| self.out.write_all(bytes));
        write.map_err(|e| ArtefactError::io(&self.path, "write", &e))?;
        self.at = offset + len;
        Ok(Span { offset, len })
    }

    /// Forces everything to disk.
    pub(super) fn finish(self) -> Result<(), ArtefactError> {
        let DataFile { path, out, .. } = self;
        let f = out.into_inner().map_err(|e| ArtefactError::io(&path, "write", e.error()))?;
        f.sync_all().map_err(|e| ArtefactError::io(&path, "write", &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_tensors_start_on_pages() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let mut f = DataFile::create(&path).unwrap();
        let large = vec![7; LARGE as usize];
        let spans = [f.put(&[1, 2, 3]).unwrap(), f.put(&[4]).unwrap(), f.put(&large).unwrap()];
        f.finish().unwrap();
        assert_eq!(spans.map(|s| s.offset), [0, 64, 4096]);
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 4096 + large.len());
        assert_eq!((bytes[2], bytes[3], bytes[64], bytes[65]), (3, 0, 4, 0));
        assert_eq!(bytes[4096..], large);
    }
}
