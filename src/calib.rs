//! Calibration text: found, read, tokenised, cut into windows.

use std::path::{Path, PathBuf};

use qrmc_passes::Calibration;
use qrmc_runtime::text::windows::{Sampling, calibration_windows};
use qrmc_runtime::text::{Join, ReadOptions, Split, Tokenizer, read_corpus};

use crate::fail::Failure;
use crate::settings;

/// What the command line says about calibration.
#[derive(Clone, Debug)]
pub(crate) struct CalibSettings {
    pub(crate) path: PathBuf,
    pub(crate) column: Option<String>,
    pub(crate) nsamples: usize,
    pub(crate) seqlen: usize,
    pub(crate) sampling: Sampling,
}

/// The small text that ships with the repository, for the shipped model.
pub(crate) fn shipped_text() -> Option<PathBuf> {
    settings::shipped("wikitext-2-train-sample.txt")
}

/// Reads the text and cuts the windows.
pub(crate) fn load(s: &CalibSettings, tokenizer: &Tokenizer) -> Result<Calibration, Failure> {
    let mut options = ReadOptions::new(Split::Train);
    options.column = s.column.as_deref();
    let mut corpus = read_corpus(&s.path, &options)?;
    corpus.render(|messages| match tokenizer.chat() {
        Some(chat) => chat.render(messages, false),
        None => Err(qrmc_runtime::text::TextError::new(
            "tokenizer_config.json",
            "the model has no chat template, and the calibration text is conversations",
            "give plain text, or put the template into chat_template.jinja",
        )),
    })?;
    let join = match corpus.default_join {
        Join::All => Join::WikiTrain,
        other => other,
    };
    let text = corpus.join(join)?;
    let tokens = tokenizer.encode(&text, true)?;
    let ranges = calibration_windows(tokens.len(), s.seqlen, s.nsamples, s.sampling)?;
    let windows: Vec<Vec<i32>> =
        ranges.into_iter().map(|r| tokens[r].iter().map(|&t| t as i32).collect()).collect();
    let description = format!(
        "{} windows of {} tokens out of {} from {}: {}; {}; {}",
        windows.len(),
        s.seqlen,
        tokens.len(),
        show(&s.path),
        corpus.describe(),
        join.describe(),
        s.sampling.describe()
    );
    Ok(Calibration { windows, description })
}

fn show(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}
