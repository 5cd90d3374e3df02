//! Calibration text: found, read, tokenised, cut into windows.

mod report;

use std::path::{Path, PathBuf};

use qrmc_passes::Calibration;
use qrmc_runtime::text::documents::{Pick, document_windows};
use qrmc_runtime::text::windows::{Sampling, calibration_windows};
use qrmc_runtime::text::{
    Corpus, Join, ReadOptions, Split, TextError, Tokenizer, available_splits, read_corpus, text_bytes,
};

use crate::cli::SamplingKind;
use crate::fail::Failure;
use crate::settings;
pub(crate) use report::{Report, Unit};

/// What the command line says about calibration.
#[derive(Clone, Debug)]
pub(crate) struct CalibSettings {
    pub(crate) path: PathBuf,
    pub(crate) column: Option<String>,
    pub(crate) nsamples: usize,
    pub(crate) seqlen: usize,
    pub(crate) sampling: SamplingKind,
    /// Of `SamplingKind::Random`.
    pub(crate) seed: u64,
}

/// The small text that ships with the repository, for the shipped model.
pub(crate) fn shipped_text() -> Option<PathBuf> {
    settings::shipped("wikitext-2-train-sample.txt")
}

/// The split of a folder that is calibrated on: train, or validation where there is no train split (pile-val).
fn split(path: &Path) -> Split {
    let there = if path.is_dir() { available_splits(path) } else { Vec::new() };
    if !there.contains(&Split::Train) && there.contains(&Split::Validation) {
        Split::Validation
    } else {
        Split::Train
    }
}

/// Bytes of memory that [`load`] may take, about.
pub(crate) fn load_bytes(s: &CalibSettings) -> Result<u64, Failure> {
    Ok(text_bytes(&s.path, split(&s.path))?)
}

/// Reads the text and cuts the windows.
pub(crate) fn load(s: &CalibSettings, tokenizer: &Tokenizer) -> Result<(Calibration, Report), Failure> {
    let mut options = ReadOptions::new(split(&s.path));
    options.column = s.column.as_deref();
    let mut corpus = read_corpus(&s.path, &options)?;
    corpus.render(|messages| match tokenizer.chat() {
        Some(chat) => chat.render(messages, false),
        None => Err(TextError::new(
            "tokenizer_config.json",
            "the model has no chat template, and the calibration text is conversations",
            "give plain text, or put the template into chat_template.jinja",
        )),
    })?;
    let (windows, report) = match s.sampling {
        SamplingKind::Random => of_one_text(s, &corpus, tokenizer, Sampling::Random { seed: s.seed })?,
        SamplingKind::First => of_one_text(s, &corpus, tokenizer, Sampling::First)?,
        SamplingKind::Packed => of_documents(s, &corpus, tokenizer, Pick::Packed)?,
        SamplingKind::Documents => of_documents(s, &corpus, tokenizer, Pick::Truncated)?,
    };
    let windows = windows.into_iter().map(|w| w.into_iter().map(|t| t as i32).collect()).collect();
    Ok((Calibration { windows, description: report.description.clone() }, report))
}

/// Where the text is from.
fn from(s: &CalibSettings, corpus: &Corpus) -> String {
    let name =
        s.path.file_name().map_or_else(|| s.path.display().to_string(), |n| n.to_string_lossy().into());
    format!("{name}: {}", corpus.describe())
}

/// Windows of all rows joined and tokenised at once.
fn of_one_text(
    s: &CalibSettings,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    sampling: Sampling,
) -> Result<(Vec<Vec<u32>>, Report), Failure> {
    let join = match corpus.default_join {
        Join::All => Join::WikiTrain,
        other => other,
    };
    let tokens = tokenizer.encode(&corpus.join(join)?, true)?;
    let ranges = calibration_windows(tokens.len(), s.seqlen, s.nsamples, sampling)?;
    // Tokenising each row for itself would double the time, so rows are told in characters.
    let lengths: Vec<usize> = corpus.texts()?.iter().map(|t| t.chars().count()).collect();
    let mut report = Report::new(Unit::Characters, lengths);
    report.empty = report.lengths.iter().filter(|&&n| n == 0).count();
    report.tokens = tokens.len();
    report.windows = ranges.len();
    report.window_tokens = ranges.len() * s.seqlen;
    let mut seen = vec![false; tokens.len()];
    ranges.iter().for_each(|r| seen[r.clone()].fill(true));
    report.distinct_tokens = seen.iter().filter(|&&s| s).count();
    report.description = format!(
        "{} windows of {} tokens out of {} from {}; {}; {}",
        ranges.len(),
        s.seqlen,
        tokens.len(),
        from(s, corpus),
        join.describe(),
        sampling.describe()
    );
    Ok((ranges.into_iter().map(|r| tokens[r].to_vec()).collect(), report))
}

/// Windows of rows that are tokenised each for itself.
fn of_documents(
    s: &CalibSettings,
    corpus: &Corpus,
    tokenizer: &Tokenizer,
    pick: Pick,
) -> Result<(Vec<Vec<u32>>, Report), Failure> {
    let made = document_windows(&corpus.texts()?, tokenizer, (s.seqlen, s.nsamples), pick)?;
    let mut report = Report::new(Unit::Tokens, made.lengths);
    report.unseen = corpus.rows.len() - report.lengths.len();
    report.tokens = report.lengths.iter().sum();
    report.empty = made.empty;
    report.too_long = made.too_long;
    report.cut = made.cut;
    report.tail = made.tail;
    report.windows = made.windows.len();
    report.window_tokens = made.windows.iter().map(Vec::len).sum();
    report.distinct_tokens = report.window_tokens;
    let of = match pick {
        Pick::Packed => "",
        Pick::Truncated => "at most ",
    };
    report.description = format!(
        "{} windows of {of}{} tokens, {} in all, of {} documents from {}; {}",
        report.windows,
        s.seqlen,
        report.window_tokens,
        made.used,
        from(s, corpus),
        pick.describe()
    );
    Ok((made.windows, report))
}
