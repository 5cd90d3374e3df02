//! GGUF files, read as if they were Hugging Face folders: tensors under Hugging Face names, `config.json`
//! and the tokenizer files rebuilt from the metadata. Linear layers in `Q4_0`, `Q5_0` and `Q8_0`, and in `Q4_1` and
//! `Q5_1` where every minimum is a whole number of steps, can be had as codes; every other type is de-quantized.
//!
//! Versions 2 and 3, little-endian, one file, architectures `llama`, `qwen2` and `qwen3`.

mod bpe;
mod codes;
mod config;
mod dequant;
mod reader;
mod rope;
mod spm;
#[cfg(test)]
mod testing;
mod tokenizer;
mod vocabulary;
mod weights;

use std::path::Path;

pub use dequant::GgmlType;
pub use reader::{Array, GgufFile, GgufTensor, Meta};
pub use vocabulary::Vocabulary;
pub use weights::GgufCheckpoint;

use crate::{ImportError, Integers, Opened, SideFile};

/// Opens a GGUF file. Weights are mapped and dequantised only when asked for; the file must not change
/// while it is open. A file without a tokenizer is fine here: it has `config.json` alone to hand on.
///
/// # Errors
/// If the file is damaged, or uses a version, architecture, tensor type, rope scaling or tokenizer that
/// cannot be carried over exactly. Each error names what was seen and what would be read.
pub fn open_file(path: &Path, integers: Integers) -> Result<Opened, ImportError> {
    let file = GgufFile::open(path)?;
    let format = format!("GGUF v{}", file.version());
    let model = config::Model::read(&file)?;
    let special = tokenizer::Special::read(&file)?;
    let config = config::config_json(&file, &model, &special)?;
    let mut files = vec![json_file("config.json", &config)];
    files.push(json_file("generation_config.json", &tokenizer::generation_config(&special)));
    if let Some((tokenizer, settings)) = tokenizer::tokenizer_files(&file, &model, &special)? {
        // Not indented: it has a line for every token and merge.
        files.push(SideFile { name: "tokenizer.json".to_owned(), bytes: tokenizer.to_string().into_bytes() });
        files.push(json_file("tokenizer_config.json", &settings));
    }
    let weights = Box::new(GgufCheckpoint::new(file, &model, integers)?);
    let notes = weights.notes(integers);
    Ok(Opened { path: path.to_owned(), format, quantization: None, config, weights, files, notes })
}

fn json_file(name: &str, value: &serde_json::Value) -> SideFile {
    SideFile { name: name.to_owned(), bytes: format!("{value:#}\n").into_bytes() }
}
