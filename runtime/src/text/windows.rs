//! Windows of tokens: for calibration and for perplexity.

use std::ops::Range;

use super::TextError;
use super::random::PyRandom;

/// How calibration windows are chosen from one long token sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampling {
    /// The published sampler: each start is Python's `randint(0, tokens - seqlen - 1)` after `random.seed(seed)`.
    /// Windows may overlap.
    Random {
        /// The seed; 0 in the published scripts.
        seed: u64,
    },
    /// Windows one after another from the start of the text.
    First,
}

impl Sampling {
    /// The rule in words, for reports.
    pub fn describe(self) -> String {
        match self {
            Sampling::Random { seed } => {
                format!("windows start where Python's random.seed({seed}) puts them")
            }
            Sampling::First => "windows follow one another from the start of the text".into(),
        }
    }
}

/// The ranges of `count` calibration windows of `seqlen` tokens in a text of `tokens` tokens.
///
/// `Random` needs one token more than a window. `First` gives fewer windows than asked for where the text ends.
pub fn calibration_windows(
    tokens: usize,
    seqlen: usize,
    count: usize,
    sampling: Sampling,
) -> Result<Vec<Range<usize>>, TextError> {
    let spare = usize::from(matches!(sampling, Sampling::Random { .. }));
    check(tokens, seqlen, spare)?;
    if count == 0 {
        return Err(fault("0 calibration windows were asked for", "ask for at least one"));
    }
    Ok(match sampling {
        Sampling::Random { seed } => {
            let mut rng = PyRandom::new(seed);
            let last = (tokens - seqlen - 1) as u64;
            (0..count).map(|_| rng.randint(0, last) as usize).map(|start| start..start + seqlen).collect()
        }
        Sampling::First => (0..count.min(tokens / seqlen)).map(|i| i * seqlen..(i + 1) * seqlen).collect(),
    })
}

/// One window of an evaluation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EvalWindow {
    /// The tokens the model sees.
    pub range: Range<usize>,
    /// The first token, counted within the window, whose prediction is scored. It is never 0: nothing predicts the
    /// first token of a window.
    pub first_scored: usize,
}

impl EvalWindow {
    /// How many predictions the window scores.
    pub fn scored(&self) -> usize {
        self.range.len() - self.first_scored
    }
}

/// The windows of a perplexity run over `tokens` tokens: `ctx` tokens each, `stride` apart, at most `limit` of them.
///
/// With `stride == ctx` windows do not overlap and each scores its last `ctx - 1` tokens. With a smaller stride each
/// window after the first scores only its last `stride` tokens. A tail shorter than a window is dropped.
pub fn eval_windows(
    tokens: usize,
    ctx: usize,
    stride: usize,
    limit: Option<usize>,
) -> Result<Vec<EvalWindow>, TextError> {
    if ctx < 2 {
        return Err(fault(
            format!("a context of {ctx} tokens predicts nothing"),
            "use a context of at least 2",
        ));
    }
    if stride == 0 || stride > ctx {
        let hint = format!("use a stride from 1 to {ctx}; {ctx} means windows that do not overlap");
        return Err(fault(format!("a stride of {stride} does not fit a context of {ctx}"), hint));
    }
    if limit == Some(0) {
        return Err(fault("a limit of 0 windows leaves nothing to evaluate", "ask for at least one"));
    }
    check(tokens, ctx, 0)?;
    let count = ((tokens - ctx) / stride + 1).min(limit.unwrap_or(usize::MAX));
    let window = |i: usize| {
        let start = i * stride;
        EvalWindow { range: start..start + ctx, first_scored: if i == 0 { 1 } else { (ctx - stride).max(1) } }
    };
    Ok((0..count).map(window).collect())
}

fn check(tokens: usize, seqlen: usize, spare: usize) -> Result<(), TextError> {
    if seqlen == 0 {
        return Err(fault("a window of 0 tokens was asked for", "use a length of at least 1"));
    }
    if tokens.saturating_sub(spare) >= seqlen {
        return Ok(());
    }
    let what = format!("the text has {tokens} tokens, too few for a window of {seqlen}");
    Err(match tokens.saturating_sub(spare) {
        0 => fault(what, "give a longer text"),
        largest => fault(what, format!("give a longer text, or a length of at most {largest}")),
    })
}

fn fault(what: impl Into<String>, hint: impl Into<String>) -> TextError {
    TextError::new("windows", what, hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_starts() {
        let got = calibration_windows(1_000_000, 2048, 4, Sampling::Random { seed: 0 }).unwrap();
        assert_eq!(got.iter().map(|w| w.start).collect::<Vec<_>>(), [885_440, 403_958, 794_772, 933_488]);
        assert!(got.iter().all(|w| w.len() == 2048));
    }

    #[test]
    fn the_shortest_texts() {
        let random = Sampling::Random { seed: 3 };
        assert_eq!(calibration_windows(9, 8, 2, random).unwrap(), [0..8, 0..8]);
        let err = calibration_windows(8, 8, 2, random).unwrap_err();
        assert!(err.what.contains("8 tokens") && err.hint.contains("at most 7"), "{err}");
        assert_eq!(calibration_windows(17, 8, 3, Sampling::First).unwrap(), [0..8, 8..16]);
        assert!(calibration_windows(0, 8, 2, Sampling::First).is_err());
        assert!(calibration_windows(9, 0, 2, Sampling::First).is_err());
        assert!(calibration_windows(9, 8, 0, Sampling::First).is_err());
    }

    #[test]
    fn windows_without_overlap_drop_the_tail() {
        let got = eval_windows(388_447, 512, 512, None).unwrap();
        assert_eq!(got.len(), 758);
        assert_eq!(got[757].range, 757 * 512..758 * 512);
        assert!(got.iter().all(|w| w.scored() == 511));
        assert_eq!(eval_windows(388_447, 512, 512, Some(160)).unwrap().len(), 160);
    }

    #[test]
    fn overlapping_windows_score_each_token_once() {
        let got = eval_windows(20, 8, 3, None).unwrap();
        let mut scored: Vec<usize> =
            got.iter().flat_map(|w| w.range.start + w.first_scored..w.range.end).collect();
        assert_eq!(scored, (1..20).collect::<Vec<_>>());
        scored.dedup();
        assert_eq!(scored.len(), 19);
    }

    #[test]
    fn bad_settings_are_refused() {
        for (ctx, stride, limit) in
            [(1, 1, None), (8, 0, None), (8, 9, None), (8, 8, Some(0)), (21, 21, None)]
        {
            assert!(eval_windows(20, ctx, stride, limit).is_err(), "{ctx} {stride} {limit:?}");
        }
    }
}
