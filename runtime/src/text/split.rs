//! Finding the files of a split in a folder laid out as on the Hugging Face hub.

use std::fmt;
use std::path::{Path, PathBuf};

use super::TextError;
use super::rows::name_list;

/// A part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// `train`
    Train,
    /// `validation`, also written `valid`, `val` or `dev`
    Validation,
    /// `test`
    Test,
}

impl Split {
    /// All splits, in the order in which they are usually listed.
    pub const ALL: [Split; 3] = [Split::Train, Split::Validation, Split::Test];

    fn names(self) -> &'static [&'static str] {
        match self {
            Split::Train => &["train"],
            Split::Validation => &["validation", "valid", "val", "dev"],
            Split::Test => &["test"],
        }
    }

    /// Whether a file's name says that it belongs to this split: the first of its words that names any split decides.
    fn claims(self, file: &str) -> bool {
        let lower = file.to_ascii_lowercase();
        let words = lower.split(|c: char| !c.is_ascii_alphanumeric());
        let named = |word: &str| Split::ALL.into_iter().find(|s| s.names().contains(&word));
        words.into_iter().find_map(named) == Some(self)
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.names()[0])
    }
}

impl std::str::FromStr for Split {
    type Err = TextError;

    fn from_str(s: &str) -> Result<Self, TextError> {
        Split::ALL.into_iter().find(|split| split.names().contains(&s)).ok_or_else(|| {
            TextError::new("split", format!("`{s}` is not a split"), "write train, validation or test")
        })
    }
}

/// How a file holds its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Parquet,
    Arrow,
    Json(Codec),
    Text,
}

/// How a JSON file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    Plain,
    Zstd,
    Gzip,
}

impl Format {
    /// The format that a file's name promises.
    pub(super) fn of(name: &str) -> Option<Self> {
        let lower = name.to_ascii_lowercase();
        let (stem, codec) = match lower.rsplit_once('.')? {
            (stem, "zst") => (stem, Codec::Zstd),
            (stem, "gz") => (stem, Codec::Gzip),
            _ => (lower.as_str(), Codec::Plain),
        };
        match stem.rsplit_once('.')?.1 {
            "jsonl" | "ndjson" | "json" => Some(Format::Json(codec)),
            "parquet" if codec == Codec::Plain => Some(Format::Parquet),
            "arrow" if codec == Codec::Plain => Some(Format::Arrow),
            "txt" | "raw" | "md" if codec == Codec::Plain => Some(Format::Text),
            _ => None,
        }
    }

    /// Formats of lower rank win when a split is there in several.
    fn rank(self, name: &str) -> u8 {
        let lines = !name.to_ascii_lowercase().ends_with(".json");
        match self {
            Format::Parquet => 0,
            Format::Arrow => 1,
            Format::Json(Codec::Plain) if lines => 2,
            Format::Json(Codec::Zstd) => 3,
            Format::Json(Codec::Gzip) => 4,
            Format::Json(Codec::Plain) => 5,
            Format::Text => 6,
        }
    }
}

/// The readable forms, in the words of an error.
pub(super) const READABLE: &str =
    ".parquet, .arrow, .jsonl, .ndjson or .json (also with .zst or .gz), .txt, .raw or .md";

struct Listing {
    files: Vec<String>,
    folders: Vec<String>,
}

fn list(folder: &Path) -> Result<Listing, TextError> {
    let fault =
        |e: std::io::Error| TextError::at(folder, format!("cannot list the folder: {e}"), "check the path");
    let mut out = Listing { files: Vec::new(), folders: Vec::new() };
    for entry in std::fs::read_dir(folder).map_err(fault)? {
        let entry = entry.map_err(fault)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.starts_with('.') {
            continue;
        }
        // Follows symbolic links: the hub's cache is made of them.
        match std::fs::metadata(entry.path()) {
            Ok(meta) if meta.is_dir() => out.folders.push(name),
            Ok(_) => out.files.push(name),
            Err(_) => {}
        }
    }
    out.files.sort();
    out.folders.sort();
    Ok(out)
}

/// The files of `split` in `folder`, in name order: from the folder itself, else from its sub-folder that is named as
/// the split, else from its `data`, `main` or `default`, else from its only sub-folder. Where the split is there in several formats, parquet wins, then Arrow, then JSON, then text.
pub(super) fn find(folder: &Path, split: Split) -> Result<Vec<PathBuf>, TextError> {
    let top = list(folder)?;
    if let Some(files) = pick(folder, &top, |name| split.claims(name) || is_saved(name, split))? {
        return Ok(files);
    }
    if let Some(name) = top.folders.iter().find(|n| split.names().contains(&n.as_str())) {
        let sub = folder.join(name);
        // Descriptions of the data lie beside it in `.json` and `.md` files.
        let data = |name: &str| {
            Format::of(name).is_some_and(|f| f.rank(name) < Format::Json(Codec::Plain).rank(".json"))
        };
        if let Some(files) = pick(&sub, &list(&sub)?, data)? {
            return Ok(files);
        }
    }
    let only = |_: &&String| top.folders.len() == 1;
    let usual = ["data", "main", "default"].into_iter().find(|n| top.folders.iter().any(|f| f == n));
    let mut seen = top.files.clone();
    match usual.map(str::to_owned).or_else(|| top.folders.first().filter(only).cloned()) {
        Some(name) => {
            let sub = folder.join(&name);
            let inner = list(&sub)?;
            if let Some(files) = pick(&sub, &inner, |name| split.claims(name))? {
                return Ok(files);
            }
            seen.extend(inner.files.iter().chain(&inner.folders).map(|f| format!("{name}/{f}")));
        }
        None => seen.extend(top.folders.iter().map(|f| format!("{f}/"))),
    }
    let what = format!("no file of the {split} split here; the folder holds {}", name_list(&seen));
    let hint = format!(
        "give the file or sub-folder itself, another split, or name a file `{split}` with {READABLE}"
    );
    Err(TextError::at(folder, what, hint))
}

/// The splits for which [`super::read_corpus`] would find files in a folder.
pub fn available_splits(folder: &Path) -> Vec<Split> {
    Split::ALL.into_iter().filter(|&split| find(folder, split).is_ok()).collect()
}

/// Whether a file is of a single data set that `datasets` saved to disk, which is no part of a split: it is trained on.
fn is_saved(name: &str, split: Split) -> bool {
    split == Split::Train && name.starts_with("data-") && Format::of(name) == Some(Format::Arrow)
}

fn pick(
    folder: &Path,
    listing: &Listing,
    wanted: impl Fn(&str) -> bool,
) -> Result<Option<Vec<PathBuf>>, TextError> {
    let rank = |name: &String| Format::of(name).map(|format| format.rank(name));
    let mine = || listing.files.iter().filter(|name| wanted(name));
    let Some(best) = mine().filter_map(rank).min() else { return Ok(None) };
    let names: Vec<&String> = mine().filter(|&name| rank(name) == Some(best)).collect();
    check_shards(folder, &names)?;
    Ok(Some(names.into_iter().map(|name| folder.join(name)).collect()))
}

/// The `k` and `n` of a name such as `train-00000-of-00002.parquet`.
fn shard(name: &str) -> Option<(u32, u32)> {
    let (head, tail) = name.split_once("-of-")?;
    let digits = tail.split(|c: char| !c.is_ascii_digit()).next()?;
    Some((head.rsplit('-').next()?.parse().ok()?, digits.parse().ok()?))
}

fn check_shards(folder: &Path, names: &[&String]) -> Result<(), TextError> {
    let shards: Vec<(u32, u32)> = names.iter().filter_map(|name| shard(name)).collect();
    for &(_, count) in &shards {
        let present = shards.iter().filter(|s| s.1 == count).count();
        if present != count as usize {
            let what = format!("{present} of {count} shards are here: {}", name_list(names));
            return Err(TextError::at(folder, what, "fetch the missing files, or give the one file to read"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        dir
    }

    fn found(files: &[&str], split: Split) -> Result<Vec<String>, String> {
        let dir = folder(files);
        let paths = find(dir.path(), split).map_err(|e| e.to_string())?;
        Ok(paths.iter().map(|p| p.strip_prefix(dir.path()).unwrap().to_str().unwrap().to_owned()).collect())
    }

    #[test]
    fn usual_names() {
        let all = ["train.txt", "val.jsonl.zst", "wiki.test.raw", "README.md"];
        assert_eq!(found(&all, Split::Train).unwrap(), ["train.txt"]);
        assert_eq!(found(&all, Split::Validation).unwrap(), ["val.jsonl.zst"]);
        assert_eq!(found(&all, Split::Test).unwrap(), ["wiki.test.raw"]);
        assert_eq!(available_splits(folder(&all[1..]).path()), [Split::Validation, Split::Test]);
    }

    #[test]
    fn parquet_wins_and_shards_are_ordered() {
        let all = [
            "test.jsonl",
            "wiki.test.raw",
            "test-00001-of-00002.parquet",
            "test-00000-of-00002.parquet",
            "train-00000-of-00001.parquet",
        ];
        let want = ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"];
        assert_eq!(found(&all, Split::Test).unwrap(), want);
        let err = found(&all[2..3], Split::Test).unwrap_err();
        assert!(err.contains("1 of 2 shards"), "{err}");
    }

    #[test]
    fn sub_folders() {
        assert_eq!(
            found(&["README.md", "main/test.jsonl", "socratic/test.jsonl"], Split::Test).unwrap(),
            ["main/test.jsonl"]
        );
        assert_eq!(found(&["only/train.json"], Split::Train).unwrap(), ["only/train.json"]);
        let err = found(&["a/train.json", "b/train.json", "notes.md"], Split::Train).unwrap_err();
        assert!(err.contains("`notes.md`, `a/`, `b/`"), "{err}");
        let err = found(&["x/train.json", "y.csv"], Split::Test).unwrap_err();
        assert!(err.contains("`y.csv`, `x/train.json`"), "{err}");
    }

    #[test]
    fn what_datasets_saves_and_caches() {
        let saved = ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"];
        assert_eq!(found(&saved, Split::Train).unwrap(), saved[..1]);
        assert!(found(&saved, Split::Test).is_err());
        let dict =
            ["dataset_dict.json", "test/data-00000-of-00001.arrow", "test/state.json", "train/x.arrow"];
        assert_eq!(found(&dict, Split::Test).unwrap(), dict[1..2]);
        assert_eq!(found(&dict, Split::Train).unwrap(), dict[3..]);
        let cache = ["dataset_info.json", "wikitext-test.arrow", "wikitext-train.arrow"];
        assert_eq!(found(&cache, Split::Test).unwrap(), cache[1..2]);
    }

    #[test]
    fn names_that_mention_two_splits_belong_to_the_first() {
        assert_eq!(found(&["train_test.jsonl", "latest.jsonl"], Split::Train).unwrap(), ["train_test.jsonl"]);
        assert!(found(&["train_test.jsonl", "latest.jsonl"], Split::Test).is_err());
        assert_eq!("val".parse::<Split>().unwrap(), Split::Validation);
        assert!("all".parse::<Split>().is_err());
    }
}
