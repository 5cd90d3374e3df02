//! The layout file of an artefact: its packed weights in the order of the kernels, written once and mapped from then on.
//!
//! The file is a cache. What it says is believed only if it was made for exactly the tensors at hand, by this version of the
//! layout, and every byte of it is as it was written; otherwise it is made again. It lies beside the shards and is written
//! under a temporary name, so several processes may make it at once.
//!
//! | bytes | are |
//! |---|---|
//! | 64 | magic, version, place and XXH3 of the index, XXH3 of these bytes; little-endian |
//! | … | for each weight: codes, scales, zero points, weighted sums, each on a multiple of 64 and filled up with 0 |
//! | the rest | the index, JSON: names, types and hashes of the tensors, form, place, XXH3 of each MiB of each part |

mod file;
#[cfg(test)]
mod tests;
mod write;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cpu::Pool;
use crate::cpu::tiles::{Form, Tiles};
use write::Writer;

/// Name of the file in the folder of an artefact.
pub const FILE: &str = "layout.cpu";

/// A packed weight that is kept in tiles: the names of its tensors, and its form.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Tiled {
    /// The codes.
    pub codes: String,
    /// Their scales.
    pub scale: String,
    /// Their zero points.
    pub zero: Option<String>,
    /// Shape, codes, groups and zero points.
    pub form: Form,
}

impl Tiled {
    /// Names of the tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        [Some(&self.codes), Some(&self.scale), self.zero.as_ref()].into_iter().flatten().map(String::as_str)
    }
}

/// Gives the identity of a tensor by name: text that differs where type or bytes differ.
pub type Identity<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// The tiles of an artefact's layout file, or a new file in the making.
#[derive(Debug)]
pub struct Layouts {
    path: PathBuf,
    found: Vec<(Tiled, Tiles)>,
    /// What a new file is to hold, with the identities of its tensors; empty if the file is good.
    wanted: Vec<(Tiled, Vec<String>)>,
    writer: Option<Writer>,
    notes: Vec<String>,
}

impl Layouts {
    /// Maps the layout file of a folder and checks all of it on the pool's threads. If it is absent, or not what `wanted`
    /// needs, a new one is made as weights are loaded.
    pub fn open(pool: &Pool, folder: &Path, wanted: Vec<Tiled>, identity: &Identity<'_>) -> Self {
        let path = folder.join(FILE);
        let of = |t: &Tiled| t.names().map(identity).collect::<Option<Vec<String>>>();
        let named: Option<Vec<_>> = wanted.into_iter().map(|t| of(&t).map(|is| (t, is))).collect();
        let mut out =
            Layouts { path, found: Vec::new(), wanted: Vec::new(), writer: None, notes: Vec::new() };
        // Tiles of big-endian hosts stay in memory.
        let Some(wanted) = named.filter(|w| !w.is_empty() && cfg!(target_endian = "little")) else {
            return out;
        };
        match file::read(pool, &out.path, &wanted) {
            Ok(Some(found)) => out.found = found,
            Ok(None) => out.wanted = wanted,
            Err(why) => {
                out.note(&format!("{why}; it is made again"));
                out.wanted = wanted;
            }
        }
        out
    }

    /// Whether the bytes of a tensor are in the file, in another order, so that they need not be read for its tiles.
    pub fn covers(&self, name: &str) -> bool {
        self.found.iter().any(|(t, _)| t.names().any(|n| n == name))
    }

    /// The tiles of a weight, if the file holds them.
    pub(crate) fn get(&self, tiled: &Tiled) -> Option<Tiles> {
        self.found.iter().find(|(t, _)| t == tiled).map(|(_, tiles)| tiles.clone())
    }

    /// Takes tiles for the new file. Gives them back as they lie in the file, or as they came if they cannot be written.
    pub(crate) fn put(&mut self, pool: &Pool, tiled: &Tiled, tiles: Tiles) -> Tiles {
        let Some((_, is)) = self.wanted.iter().find(|(t, _)| t == tiled) else { return tiles };
        let is = is.clone();
        if self.writer.is_none() {
            match Writer::create(&self.path) {
                Ok(w) => self.writer = Some(w),
                Err(e) => {
                    self.unwritten(&e);
                    return tiles;
                }
            }
        }
        let Some(writer) = &mut self.writer else { return tiles };
        match writer.add(pool, tiled, is, &tiles) {
            Ok(mapped) => mapped,
            Err(e) => {
                self.unwritten(&e);
                tiles
            }
        }
    }

    /// Publishes the new file, if there is one and it is complete. `false` if tiles that [`Layouts::put`] gave back cannot be
    /// trusted, because the system could not store them; then the weights are to be loaded without a file.
    pub(crate) fn finish(&mut self) -> bool {
        let Some(writer) = self.writer.take() else { return true };
        if let Err(e) = writer.sync() {
            self.unwritten(&e);
            return false;
        }
        if !self.wanted.is_empty()
            && writer.len() == self.wanted.len()
            && let Err(e) = writer.publish(&self.path)
        {
            self.unwritten(&e);
        }
        self.wanted.clear();
        true
    }

    /// What went another way than usual, each once.
    pub fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    /// No more tiles are written; the writer is kept until its maps are known to be good.
    fn unwritten(&mut self, e: &std::io::Error) {
        self.wanted.clear();
        self.note(&format!(
            "cannot be written: {e}; weights are brought into order at every start, in memory"
        ));
    }

    fn note(&mut self, what: &str) {
        self.notes.push(format!("note: {}: {what}", self.path.display()));
    }
}
