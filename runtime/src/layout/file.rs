//! Reading a layout file. Nothing in it is believed before it was checked.
#![allow(unsafe_code, reason = "the file is mapped, not copied")]

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use bytes::Bytes;
use memmap2::{Mmap, MmapOptions};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::Tiled;
use crate::cpu::Pool;
use crate::cpu::tiles::{Form, Tiles};

const MAGIC: [u8; 8] = *b"qrmclay\n";
/// Version of the file and of the order of tiles: what one version writes, another does not read.
pub(super) const VERSION: u32 = 1;
/// What the order is for.
pub(super) const TARGET: &str = "cpu";
/// Bytes of the header.
pub(super) const HEADER: usize = 64;
/// Parts start on multiples of this.
const ALIGN: usize = 64;
/// Bytes that have a checksum of their own.
const CHUNK: usize = 1 << 20;
/// Most bytes of an index that are read.
const INDEX_LIMIT: u64 = 64 << 20;

/// What the file holds, in the order of the file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Index {
    pub(super) target: String,
    pub(super) entries: Vec<Entry>,
}

/// One weight.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) weight: Tiled,
    /// Identities of its tensors.
    pub(super) is: Vec<String>,
    /// Where its parts start.
    pub(super) at: u64,
    /// XXH3 of each chunk of each part.
    pub(super) sums: Vec<u64>,
}

/// Where the parts of an entry lie behind its start, and where the next entry starts.
pub(super) fn places(form: &Form) -> ([Range<usize>; 4], usize) {
    let mut at = 0;
    let parts = form.lengths().map(|len| {
        let from = at;
        at = (from + len).next_multiple_of(ALIGN);
        from..from + len
    });
    (parts, at)
}

/// The chunks of the parts of an entry, in order.
pub(super) fn chunks(parts: [&[u8]; 4]) -> impl Iterator<Item = &[u8]> {
    parts.into_iter().flat_map(|p| p.chunks(CHUNK))
}

/// The header of a file whose index lies at `at`.
pub(super) fn header(at: u64, index: &[u8]) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    out[..8].copy_from_slice(&MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    for (to, value) in [(16, at), (24, index.len() as u64), (32, xxh3_64(index))] {
        out[to..to + 8].copy_from_slice(&value.to_le_bytes());
    }
    let sum = xxh3_64(&out[..56]);
    out[56..].copy_from_slice(&sum.to_le_bytes());
    out
}

/// Maps a part of a file.
pub(super) fn map(file: &File, at: u64, len: usize) -> std::io::Result<Bytes> {
    // SAFETY: the map is only read. A layout file is never changed under its name: a new one takes its place by a rename,
    // and the inode of the old one lives as long as its maps. A file that something else shortens meanwhile ends the
    // process with a signal, as documented in docs/artefact.md.
    let map: Mmap = unsafe { MmapOptions::new().offset(at).len(len).map(file) }?;
    Ok(Bytes::from_owner(map))
}

/// The tiles of the wanted weights; `None` if there is no file. An error says why the file is of no use.
pub(super) fn read(
    pool: &Pool,
    path: &Path,
    wanted: &[(Tiled, Vec<String>)],
) -> Result<Option<Vec<(Tiled, Tiles)>>, String> {
    let unread = |e: std::io::Error| format!("cannot be read: {e}");
    let meta = match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(unread)?,
    };
    if !meta.is_file() {
        return Err("is no regular file".into());
    }
    let file = File::open(path).map_err(unread)?;
    let size = file.metadata().map_err(unread)?.len();
    let len = usize::try_from(size).map_err(|_| format!("has {size} bytes, too many for this machine"))?;
    if len < HEADER {
        return Err(format!("has {len} bytes, too few for its header"));
    }
    let all = map(&file, 0, len).map_err(unread)?;
    let (index, end) = index(&all)?;
    let entries = check_index(&index, end, wanted)?;
    check_bytes(pool, &all, &entries)?;
    let mut out = Vec::with_capacity(entries.len());
    for (entry, at) in entries {
        let (parts, _) = places(&entry.weight.form);
        let tiles = Tiles::shared(entry.weight.form, parts.map(|p| all.slice(at + p.start..at + p.end)));
        let tiles = tiles.ok_or_else(|| format!("`{}` is not where it should be", entry.weight.codes))?;
        out.push((entry.weight.clone(), tiles));
    }
    Ok(Some(out))
}

/// The index, and where it starts.
fn index(all: &[u8]) -> Result<(Index, usize), String> {
    let (head, _) = all.split_at(HEADER);
    let number = |at: usize| head[at..at + 8].iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b));
    if head[..8] != MAGIC {
        return Err("is no layout file: its first bytes are others".into());
    }
    if number(56) != xxh3_64(&head[..56]) {
        return Err("is damaged: its header has another checksum".into());
    }
    let version = number(8);
    if version != u64::from(VERSION) {
        return Err(format!("has version {version}, this qrmc uses {VERSION}"));
    }
    let (at, len) = (number(16), number(24));
    if len > INDEX_LIMIT || at < HEADER as u64 || at.checked_add(len) != Some(all.len() as u64) {
        return Err(format!("is cut short or damaged: {} bytes, an index of {len} bytes at {at}", all.len()));
    }
    let bytes = &all[at as usize..];
    if xxh3_64(bytes) != number(32) {
        return Err("is damaged: its index has another checksum".into());
    }
    let index = serde_json::from_slice(bytes).map_err(|e| format!("is damaged: its index is none: {e}"))?;
    Ok((index, at as usize))
}

/// The entries with their places, if they are what is wanted and fill the file up to `end`.
fn check_index<'a>(
    index: &'a Index,
    end: usize,
    wanted: &[(Tiled, Vec<String>)],
) -> Result<Vec<(&'a Entry, usize)>, String> {
    if index.target != TARGET {
        return Err(format!("is for the target {:?}, not {TARGET}", index.target));
    }
    let other = || "belongs to another artefact or another version of it".to_owned();
    if index.entries.len() != wanted.len() {
        return Err(other());
    }
    let mut at = HEADER;
    let mut out = Vec::with_capacity(wanted.len());
    for e in &index.entries {
        // The form of what is wanted comes from the graph, so its lengths are those of weights that exist.
        if !wanted.iter().any(|(t, is)| *t == e.weight && *is == e.is)
            || out.iter().any(|(o, _): &(&Entry, usize)| o.weight == e.weight)
        {
            return Err(other());
        }
        let (parts, len) = places(&e.weight.form);
        let sums: usize = parts.iter().map(|p| p.len().div_ceil(CHUNK)).sum();
        let next = at.checked_add(len).filter(|&n| n <= end);
        match next {
            Some(next) if e.at == at as u64 && e.sums.len() == sums => {
                out.push((e, at));
                at = next;
            }
            _ => return Err(format!("is damaged: `{}` does not lie where it should", e.weight.codes)),
        }
    }
    if at != end {
        return Err(format!("is damaged: its weights end at {at}, its index starts at {end}"));
    }
    Ok(out)
}

/// Compares every byte of the entries with what was written.
fn check_bytes(pool: &Pool, all: &[u8], entries: &[(&Entry, usize)]) -> Result<(), String> {
    let mut jobs: Vec<(&Entry, &[u8], u64)> = Vec::new();
    for &(e, at) in entries {
        let (parts, len) = places(&e.weight.form);
        let bytes = parts.clone().map(|p| &all[at + p.start..at + p.end]);
        jobs.extend(chunks(bytes).zip(&e.sums).map(|(chunk, &sum)| (e, chunk, sum)));
        let ends = [parts[1].start, parts[2].start, parts[3].start, len];
        let filled = parts.iter().zip(ends).all(|(p, end)| all[at + p.end..at + end].iter().all(|&b| b == 0));
        if !filled {
            return Err(format!("is damaged: there is something behind a part of `{}`", e.weight.codes));
        }
    }
    let good = pool.map(jobs.len(), |i| xxh3_64(jobs[i].1) == jobs[i].2);
    match good.iter().position(|g| !g) {
        None => Ok(()),
        Some(i) => Err(format!("is damaged: `{}` has another checksum", jobs[i].0.weight.codes)),
    }
}
