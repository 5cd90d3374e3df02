//! A Hugging Face folder as a whole.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use super::SafetensorsFolder;
use crate::{ImportError, Integers, Opened, SideFile, quantized};

/// Longest JSON or text file that is read into memory, in bytes.
const MAX_SMALL: u64 = 512 << 20;

/// Files that travel with the model, in the order in which they are handed on.
const SIDE_FILES: [&str; 11] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// A JSON object as its pairs, duplicates included.
pub(super) struct Pairs(pub(super) Vec<(String, Value)>);

impl Pairs {
    /// A name that comes more than once.
    pub(super) fn duplicate(&self) -> Option<&str> {
        let mut seen = HashSet::new();
        self.0.iter().map(|(name, _)| name.as_str()).find(|name| !seen.insert(*name))
    }
}

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Collect;
        impl<'de> Visitor<'de> for Collect {
            type Value = Pairs;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Collect)
    }
}

/// Reads a whole file that is not weights.
///
/// # Errors
/// If it cannot be read or is longer than half a gibibyte.
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>, ImportError> {
    let size = fs::metadata(path).map_err(|e| ImportError::io(path, "read its size", &e))?.len();
    if size > MAX_SMALL {
        return Err(ImportError::new(
            path,
            format!("the file has {size} bytes, more than the {MAX_SMALL} allowed"),
        ));
    }
    fs::read(path).map_err(|e| ImportError::io(path, "read it", &e))
}

/// Opens a folder with `config.json` and safetensors weights. Weights are mapped, not read, and the folder
/// must not change while it is open. A folder without tokenizer files is fine here.
///
/// # Errors
/// If the folder or `config.json` is missing or is not what its name says, if there are no safetensors
/// weights, or as [`SafetensorsFolder::open`]; also if the weights are quantized in a way that is not understood, or
/// codes and configuration contradict each other.
pub fn open_folder(path: &Path, integers: Integers) -> Result<Opened, ImportError> {
    let fail = |what: &str| ImportError::new(path, what);
    if !path.exists() {
        return Err(fail("there is no such folder"));
    }
    if !path.is_dir() {
        return Err(fail("this is a file, not a folder").hint("name the folder that holds config.json"));
    }
    let config = read_config(path)?;
    // First, so that a method that is not read is named, and not the type of its tensors.
    let configured = quantized::configured(path, &config, read_small)?;
    let weights = SafetensorsFolder::open_named(path, configured.stem())?.ok_or_else(|| no_weights(path))?;
    let weights = quantized::open(path, configured, weights, integers, read_small)?;
    let files = side_files(path)?;
    let format = match &weights.format {
        Some(codes) => format!("Hugging Face folder, {codes}"),
        None => "Hugging Face folder".to_owned(),
    };
    let quantized::Weights { weights, quantization, notes, .. } = weights;
    Ok(Opened { path: path.to_owned(), format, quantization, config, weights, files, notes })
}

/// The files of a folder that travel with the model.
///
/// # Errors
/// If one cannot be read.
pub(crate) fn side_files(folder: &Path) -> Result<Vec<SideFile>, ImportError> {
    let there = SIDE_FILES.iter().map(|name| (name, folder.join(name))).filter(|(_, file)| file.is_file());
    there.map(|(name, file)| Ok(SideFile { name: (*name).to_owned(), bytes: read_small(&file)? })).collect()
}

fn read_config(folder: &Path) -> Result<Value, ImportError> {
    let path = folder.join("config.json");
    if !path.is_file() {
        let error = ImportError::new(folder, "there is no config.json in this folder");
        return Err(match names(folder).into_iter().find(|n| n.ends_with(".gguf")) {
            Some(gguf) => error.hint(format!("name the GGUF file itself: {}", folder.join(gguf).display())),
            None => error.hint("name the folder that holds the model's config.json and *.safetensors files"),
        });
    }
    let config: Value = serde_json::from_slice(&read_small(&path)?).map_err(|e| {
        ImportError::new(&path, format!("this is not JSON: {e}")).hint("download the file again")
    })?;
    if !config.is_object() {
        return Err(
            ImportError::new(&path, "this is JSON, but not an object").hint("download the file again")
        );
    }
    Ok(config)
}

fn no_weights(folder: &Path) -> ImportError {
    let names = names(folder);
    if let Some(bin) = names.iter().find(|n| n.starts_with("pytorch_model") && n.ends_with(".bin")) {
        return ImportError::new(folder, format!("the weights are in `{bin}`, a pickle, which is not read"))
            .hint(
                "convert them: in Python, `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)` \
             writes model.safetensors",
            );
    }
    let error =
        ImportError::new(folder, "there is neither model.safetensors nor model.safetensors.index.json here");
    match names.iter().find(|n| n.ends_with(".safetensors")) {
        Some(other) => error.hint(format!("`{other}` is there: rename it, or fetch the index that names it")),
        None => error.hint("download the weights into this folder"),
    }
}

/// Names of the files of a folder, sorted; empty if it cannot be listed.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::super::safetensors::tests::write_safetensors;
    use super::*;

    fn refused(path: &Path) -> ImportError {
        open_folder(path, Integers::Keep).err().expect("this folder must be refused")
    }

    #[test]
    fn a_folder_hands_on_its_side_files_byte_for_byte() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "{\"model_type\": \"llama\"}\n").unwrap();
        fs::write(dir.path().join("tokenizer.json"), [0xff, 0x00, 0x7b]).unwrap();
        fs::write(dir.path().join("README.md"), "not a side file").unwrap();
        write_safetensors(&dir.path().join("model.safetensors"), &[("w", "F32", &[1], 4)]);
        let opened = open_folder(dir.path(), Integers::Keep).ok().unwrap();
        assert_eq!(opened.config["model_type"], "llama");
        let names: Vec<_> = opened.files.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["config.json", "tokenizer.json"]);
        assert_eq!(opened.files[1].bytes, [0xff, 0x00, 0x7b]);
        assert_eq!(opened.weights.tensors().len(), 1);
        assert_eq!(opened.weights.weight_files(), [dir.path().join("model.safetensors")]);
    }

    #[test]
    fn folders_that_are_none() {
        let dir = tempfile::tempdir().unwrap();
        assert!(refused(&dir.path().join("nowhere")).what.contains("no such folder"));
        let file = dir.path().join("f");
        fs::write(&file, "x").unwrap();
        assert!(refused(&file).hint.unwrap().contains("folder"));
        assert!(refused(dir.path()).what.contains("no config.json"));
        fs::write(dir.path().join("m.gguf"), "x").unwrap();
        assert!(refused(dir.path()).hint.unwrap().contains("m.gguf"));
    }

    #[test]
    fn configs_that_are_none() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(refused(dir.path()).what.contains("not JSON"));
        fs::write(dir.path().join("config.json"), "[1]").unwrap();
        let error = refused(dir.path());
        assert!(error.what.contains("not an object") && error.path.ends_with("config.json"));
    }

    #[test]
    fn weights_that_are_missing_or_pickled() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert!(refused(dir.path()).what.contains("neither model.safetensors"));
        write_safetensors(&dir.path().join("other.safetensors"), &[]);
        assert!(refused(dir.path()).hint.unwrap().contains("other.safetensors"));
        fs::remove_file(dir.path().join("other.safetensors")).unwrap();
        fs::write(dir.path().join("pytorch_model-00001-of-00002.bin"), "x").unwrap();
        let error = refused(dir.path());
        assert!(
            error.what.contains("pytorch_model-00001-of-00002.bin")
                && error.hint.unwrap().contains("save_pretrained")
        );
    }
}
