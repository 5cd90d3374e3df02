//! Writing a layout file, a weight at a time.

use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Result, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use xxhash_rust::xxh3::xxh3_64;

use super::file::{Entry, HEADER, Index, TARGET, chunks, header, map, places};
use super::{FILE, Tiled};
use crate::cpu::Pool;
use crate::cpu::tiles::Tiles;

/// Temporary names that are tried.
const TRIES: usize = 64;
/// A file without an owner that was not touched for this long is a leftover.
const YOUNG: Duration = Duration::from_secs(600);

/// A layout file in the making, under a name of its own. It is removed unless it is published.
#[derive(Debug)]
pub(super) struct Writer {
    file: File,
    temporary: PathBuf,
    at: u64,
    index: Index,
}

impl Writer {
    /// Starts a file beside `path`, and removes what processes that ended too early left there ten minutes ago or earlier.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        clear(folder);
        let mut last = Error::from(ErrorKind::AlreadyExists);
        for n in 0..TRIES {
            let temporary = folder.join(format!("{FILE}.{}-{n}.partial", std::process::id()));
            match OpenOptions::new().read(true).write(true).create_new(true).open(&temporary) {
                Ok(mut file) => {
                    // Says that someone is at work. Where there are no locks, leftovers stay.
                    let _ = file.try_lock();
                    let index = Index { target: TARGET.into(), entries: Vec::new() };
                    let begun = file.write_all(&[0; HEADER]);
                    let out = Writer { file, temporary, at: HEADER as u64, index };
                    return begun.map(|()| out);
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => last = e,
                Err(e) => return Err(e),
            }
        }
        Err(last)
    }

    /// Weights written.
    pub(super) fn len(&self) -> usize {
        self.index.entries.len()
    }

    /// Appends a weight, and maps it.
    pub(super) fn add(
        &mut self,
        pool: &Pool,
        weight: &Tiled,
        is: Vec<String>,
        tiles: &Tiles,
    ) -> Result<Tiles> {
        let form = tiles.form();
        let (parts, len) = places(&form);
        let bytes = tiles.parts();
        let pieces: Vec<&[u8]> = chunks(bytes).collect();
        let sums = pool.map(pieces.len(), |i| xxh3_64(pieces[i]));
        let mut end = 0;
        for (place, bytes) in parts.iter().zip(bytes) {
            self.fill(place.start - end)?;
            self.file.write_all(bytes)?;
            end = place.end;
        }
        self.fill(len - end)?;
        let mapped = map(&self.file, self.at, len)?;
        let tiles = Tiles::shared(form, parts.map(|p| mapped.slice(p)))
            .ok_or_else(|| Error::other("what was written cannot be mapped in place"))?;
        self.index.entries.push(Entry { weight: weight.clone(), is, at: self.at, sums });
        self.at += len as u64;
        Ok(tiles)
    }

    /// Forces what was written to the disk: once this has succeeded, mapped weights are what was written.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_data()
    }

    /// Ends the file with its index and gives it its name.
    pub(super) fn publish(mut self, path: &Path) -> Result<()> {
        let index = serde_json::to_vec(&self.index).map_err(Error::other)?;
        self.file.write_all(&index)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&header(self.at, &index))?;
        std::fs::rename(&self.temporary, path)?;
        self.temporary = PathBuf::new();
        Ok(())
    }

    /// Writes fewer zeros than an alignment.
    fn fill(&mut self, len: usize) -> Result<()> {
        self.file.write_all(&[0; HEADER][..len])
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.temporary.as_os_str().is_empty() {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Removes old temporary files that no process holds. A young one may be about to be locked.
fn clear(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let temporary =
            name.strip_prefix(FILE).is_some_and(|n| n.starts_with('.') && n.ends_with(".partial"));
        let old = |m: std::fs::Metadata| Some(m.modified().ok()?.elapsed().ok()? > YOUNG);
        if temporary
            && entry.metadata().ok().and_then(old) == Some(true)
            && File::open(entry.path()).is_ok_and(|f| f.try_lock().is_ok())
        {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
