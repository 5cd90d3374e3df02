use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;
use xxhash_rust::xxh3::xxh3_64;

use super::file::HEADER;
use super::*;
use crate::cpu::WeightView;
use crate::cpu::testing::noise;

/// Some weights of different forms: `[n, k]`, bits, group, and whether they have zero points.
const FORMS: [(usize, usize, u8, usize, bool); 4] =
    [(40, 96, 4, 32, true), (16, 128, 3, 128, false), (5, 72, 8, 24, true), (33, 64, 2, 64, false)];

fn tiled(i: usize) -> Tiled {
    let (n, k, bits, group, zero) = FORMS[i];
    let form = Form { n, k, bits, group, zero: (!zero).then_some(1 << (bits - 1)) };
    let name = |of: &str| format!("w{i}.{of}");
    Tiled { codes: name("codes"), scale: name("scale"), zero: zero.then(|| name("zero")), form }
}

fn built(pool: &Pool, i: usize) -> Tiles {
    let (n, k, bits, group, zero) = FORMS[i];
    let any = |len: usize, seed| -> Vec<u8> {
        noise(len, seed).iter().map(|x| ((x + 1.0) * 1e4) as u32 as u8 & ((1u16 << bits) - 1) as u8).collect()
    };
    let mut codes = Vec::new();
    any(n * k, 1 + i as u64)
        .chunks(k)
        .for_each(|r| qrmc_ir::pack::pack_row(r.iter().copied(), bits, &mut codes));
    let scales = noise(n * k / group, 2);
    let zeros = zero.then(|| any(n * k / group, 3));
    let view = WeightView::Packed {
        bits,
        signed: !zero,
        codes: &codes,
        group,
        scales: &scales,
        zeros: zeros.as_deref(),
    };
    Tiles::new(pool, &view, n, k).unwrap()
}

fn wanted() -> Vec<Tiled> {
    (0..FORMS.len()).map(tiled).collect()
}

fn identity(name: &str) -> Option<String> {
    Some(format!("hash of {name}"))
}

fn open(dir: &TempDir) -> Layouts {
    Layouts::open(&Pool::alone(), dir.path(), wanted(), &identity)
}

/// Loads all weights as a session does, and says what was noted.
fn load(dir: &TempDir, pool: &Pool) -> (Vec<Tiles>, Vec<String>) {
    let mut l = Layouts::open(pool, dir.path(), wanted(), &identity);
    let weight = |(i, t): (usize, Tiled)| match l.get(&t) {
        Some(tiles) => tiles,
        None => l.put(pool, &t, built(pool, i)),
    };
    let all = wanted().into_iter().enumerate().map(weight).collect();
    assert!(l.finish());
    (all, l.take_notes())
}

fn expected() -> Vec<Tiles> {
    (0..FORMS.len()).map(|i| built(&Pool::alone(), i)).collect()
}

/// A folder with a good file.
fn made() -> (TempDir, PathBuf, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let (all, notes) = load(&dir, &Pool::alone());
    assert!(all == expected() && notes.is_empty(), "{notes:?}");
    let path = dir.path().join(FILE);
    let bytes = fs::read(&path).unwrap();
    (dir, path, bytes)
}

#[test]
fn a_file_is_written_once_and_read_bit_for_bit() {
    let (dir, path, bytes) = made();
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let l = open(&dir);
    for t in wanted() {
        assert!(l.get(&t).is_some() && t.names().all(|n| l.covers(n)));
    }
    assert!(!l.covers("w0"));
    for threads in [1, 3] {
        let pool = Pool::new(threads).unwrap();
        assert_eq!(load(&dir, &pool), (expected(), vec![]));
        let other = tempfile::tempdir().unwrap();
        load(&other, &pool);
        assert!(fs::read(other.path().join(FILE)).unwrap() == bytes, "{threads} threads");
    }
    assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), modified);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside the file");
}

#[test]
fn the_order_of_tiles_belongs_to_the_version() {
    let (.., bytes) = made();
    // Where this changes, `file::VERSION` must change as well.
    assert_eq!((file::VERSION, xxh3_64(&bytes)), (1, ORDER), "{:#x}", xxh3_64(&bytes));
}

/// XXH3 of the file of version 1.
const ORDER: u64 = 0x087d_f3a3_ffa7_4cce;

/// Replaces the file, as damage would, and expects a note with these words and a good file after it.
fn expect_note(bytes: &[u8], words: &str, good: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    fs::write(&path, bytes).unwrap();
    let (all, notes) = load(&dir, &Pool::alone());
    assert!(all == expected(), "{words}");
    assert!(notes.len() == 1 && notes[0].contains(words) && notes[0].contains(FILE), "{words}: {notes:?}");
    assert!(fs::read(&path).unwrap() == good, "{words}");
}

#[test]
fn every_flipped_byte_is_noticed() {
    let (dir, path, good) = made();
    let step = |at: usize| if at < HEADER + 256 || at + 1500 > good.len() { 1 } else { 97 };
    let mut at = 0;
    while at < good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::remove_file(&path).unwrap();
        fs::write(&path, &bad).unwrap();
        let mut l = open(&dir);
        let notes = l.take_notes();
        assert!(notes.len() == 1 && wanted().iter().all(|t| l.get(t).is_none()), "byte {at}: {notes:?}");
        at += step(at);
    }
    for (at, words) in
        [(0, "first bytes"), (9, "header"), (HEADER, "`w0.codes` has another"), (good.len() - 5, "index")]
    {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        expect_note(&bad, words, &good);
    }
}

#[test]
fn files_that_are_cut_or_longer_are_made_again() {
    let (.., good) = made();
    for len in [0, 1, HEADER - 1] {
        expect_note(&good[..len], if len == 0 { "0 bytes" } else { "too few" }, &good);
    }
    for len in [HEADER, 1000, good.len() - 1] {
        expect_note(&good[..len], "cut short", &good);
    }
    expect_note(&[&good[..], b"x"].concat(), "cut short", &good);
    expect_note(b"what is this?", "too few", &good);
    expect_note(&[7; 4096], "first bytes", &good);
}

/// The good file with another header or index, with checksums that fit.
fn forged(good: &[u8], version: u32, edit: impl Fn(&mut serde_json::Value)) -> Vec<u8> {
    let number = |at: usize| u64::from_le_bytes(good[at..at + 8].try_into().unwrap());
    let at = number(16) as usize;
    let mut index = serde_json::from_slice(&good[at..]).unwrap();
    edit(&mut index);
    let index = serde_json::to_vec(&index).unwrap();
    let mut head = file::header(at as u64, &index);
    head[8..12].copy_from_slice(&version.to_le_bytes());
    let sum = xxh3_64(&head[..56]).to_le_bytes();
    head[56..].copy_from_slice(&sum);
    [&head, &good[HEADER..at], &index].concat()
}

#[test]
fn files_of_other_versions_and_artefacts_are_made_again() {
    use serde_json::json;
    let (.., good) = made();
    assert!(forged(&good, 1, |_| ()) == good);
    expect_note(&forged(&good, 2, |_| ()), "version 2", &good);
    type Edit = fn(&mut serde_json::Value);
    let edits: [(Edit, &str); 9] = [
        (|v| v["target"] = json!("cuda"), "target"),
        (|v| v["entries"] = json!([]), "another artefact"),
        (|v| v["entries"][0]["is"][1] = json!("hash of another"), "another artefact"),
        (|v| v["entries"][1] = v["entries"][0].clone(), "another artefact"),
        (|v| v["entries"][2]["weight"]["form"]["n"] = json!(u64::MAX), "another artefact"),
        (|v| v["entries"][0]["at"] = json!(u64::MAX), "where it should"),
        (|v| v["entries"][0]["sums"] = json!([]), "where it should"),
        (|v| v["entries"][3]["sums"][0] = json!(7), "another checksum"),
        (|v| *v = json!({"target": "cpu", "entries": -1}), "its index is none"),
    ];
    for (edit, words) in edits {
        expect_note(&forged(&good, 1, edit), words, &good);
    }
}

#[test]
fn a_file_that_cannot_be_written_costs_a_note() {
    // A folder in the place of the file is in the way of the rename, whoever asks.
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join(FILE).join("inside")).unwrap();
    let (all, notes) = load(&dir, &Pool::alone());
    assert!(all == expected());
    assert!(notes.len() == 2 && notes[0].contains("no regular file"), "{notes:?}");
    assert!(notes[1].contains("cannot be written"), "{notes:?}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    // No folder at all, as good as one that is read-only.
    let gone = tempfile::tempdir().unwrap();
    fs::remove_dir(gone.path()).unwrap();
    let (all, notes) = load(&gone, &Pool::alone());
    assert!(all == expected() && notes.len() == 1 && notes[0].contains("in memory"), "{notes:?}");
}

#[test]
fn several_may_make_it_at_once() {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|s| {
        for _ in 0..6 {
            s.spawn(|| assert_eq!(load(&dir, &Pool::alone()), (expected(), vec![])));
        }
    });
    let (other, _, good) = made();
    assert!(fs::read(dir.path().join(FILE)).unwrap() == good);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    // Tiles stay what they are when the file is replaced under them.
    let (old, _) = load(&other, &Pool::alone());
    fs::remove_file(other.path().join(FILE)).unwrap();
    load(&other, &Pool::alone());
    assert!(old == expected());
}

#[test]
fn a_model_without_tiles_has_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut l = Layouts::open(&Pool::alone(), dir.path(), Vec::new(), &identity);
    assert!(l.finish() && l.take_notes().is_empty());
    let mut l = Layouts::open(&Pool::alone(), dir.path(), wanted(), &|_| None);
    l.put(&Pool::alone(), &tiled(0), built(&Pool::alone(), 0));
    assert!(l.finish() && l.take_notes().is_empty());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
