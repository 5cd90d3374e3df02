//! What calibration text looks like: how long its documents are, and what was left out.

use qrmc_runtime::text::documents::Dropped;
use serde_json::{Value, json};

use crate::ui::table;

/// What the length of a document is counted in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unit {
    Tokens,
    Characters,
}

/// Figures about calibration text.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    /// One line for people and for the recipe.
    pub(crate) description: String,
    unit: Unit,
    /// Length of each document that was looked at.
    pub(crate) lengths: Vec<usize>,
    /// Documents that were not looked at, since there were enough.
    pub(crate) unseen: usize,
    /// Documents without content.
    pub(crate) empty: usize,
    /// Left out because they are longer than a window.
    pub(crate) too_long: Dropped,
    /// Cut at the length of a window, and what was cut off.
    pub(crate) cut: Dropped,
    /// Tokens behind the last whole window.
    pub(crate) tail: usize,
    /// Tokens of all documents that were looked at.
    pub(crate) tokens: usize,
    pub(crate) windows: usize,
    /// Tokens in all windows.
    pub(crate) window_tokens: usize,
    /// Tokens of the text that some window holds.
    pub(crate) distinct_tokens: usize,
}

/// Most ranges of lengths that are shown.
const RANGES: u32 = 8;
/// Characters of the longest bar.
const BAR: usize = 30;

impl Report {
    pub(crate) fn new(unit: Unit, lengths: Vec<usize>) -> Self {
        Report {
            description: String::new(),
            unit,
            lengths,
            unseen: 0,
            empty: 0,
            too_long: Dropped::default(),
            cut: Dropped::default(),
            tail: 0,
            tokens: 0,
            windows: 0,
            window_tokens: 0,
            distinct_tokens: 0,
        }
    }

    fn unit(&self) -> &'static str {
        match self.unit {
            Unit::Tokens => "tokens",
            Unit::Characters => "characters",
        }
    }

    /// Share of the tokens of all windows that other windows hold, too.
    fn overlap(&self) -> f64 {
        1.0 - self.distinct_tokens as f64 / self.window_tokens.max(1) as f64
    }

    /// What was left out and why, in words.
    fn left_out(&self) -> Vec<String> {
        let mut out = Vec::new();
        let mut say = |n: usize, text: String| {
            if n > 0 {
                out.push(text);
            }
        };
        let Report { too_long, cut, .. } = self;
        say(self.empty, format!("{} documents are empty", self.empty));
        let long = format!("{} documents with {} tokens are too long", too_long.documents, too_long.tokens);
        say(too_long.documents, long);
        say(cut.documents, format!("{} tokens are cut off {} documents", cut.tokens, cut.documents));
        say(self.tail, format!("a tail of {} tokens is dropped", self.tail));
        say(self.unseen, format!("{} further documents are not needed", self.unseen));
        out
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut out = format!("calibration: {}", self.description);
        let n = self.lengths.len();
        if n > 1 {
            let ranges = ranges(&self.lengths);
            let top = ranges.iter().map(|r| r.2).max().unwrap_or(1).max(1);
            let rows: Vec<Vec<String>> = ranges
                .iter()
                .map(|&(from, to, count)| {
                    let bar = "#".repeat((count * BAR).div_ceil(top));
                    let share = format!("{:.1} %", 100.0 * count as f64 / n as f64);
                    vec![format!("{from} to {to}"), count.to_string(), share, bar]
                })
                .collect();
            out += &format!("\n{}", table(&[self.unit(), "documents", "share", ""], &rows));
        }
        out += &format!("\n{n} documents, {} tokens, {} windows", self.tokens, self.windows);
        if self.overlap() > 0.0 {
            out += &format!(", {:.1} % of whose tokens are in other windows, too", 100.0 * self.overlap());
        }
        for line in self.left_out() {
            out += &format!("; {line}");
        }
        out
    }

    pub(crate) fn json(&self) -> Value {
        let dropped = |d: &Dropped| json!({ "documents": d.documents, "tokens": d.tokens });
        json!({
            "description": self.description,
            "windows": self.windows,
            "window_tokens": self.window_tokens,
            "overlap": self.overlap(),
            "documents": self.lengths.len(),
            "tokens": self.tokens,
            "empty": self.empty,
            "too_long": dropped(&self.too_long),
            "cut": dropped(&self.cut),
            "tail_tokens": self.tail,
            "not_needed": self.unseen,
            "length_unit": self.unit(),
            "lengths": ranges(&self.lengths).iter()
                .map(|(from, to, n)| json!({ "from": from, "to": to, "documents": n })).collect::<Vec<_>>(),
        })
    }
}

/// How many lengths are in each range between powers of two: `(from, to, count)`. The shortest are taken together.
fn ranges(lengths: &[usize]) -> Vec<(usize, usize, usize)> {
    let log = |n: usize| n.max(1).ilog2();
    let Some(top) = lengths.iter().map(|&n| log(n)).max() else { return Vec::new() };
    let least = lengths.iter().map(|&n| log(n)).min().unwrap_or(0);
    let first = least.max(top.saturating_sub(RANGES - 1));
    let lowest = lengths.iter().copied().min().unwrap_or(0);
    (first..=top)
        .map(|b| {
            let count = lengths.iter().filter(|&&n| log(n).max(first) == b).count();
            let from = if b == first { lowest.min(1 << b) } else { 1 << b };
            (from, (1usize << b) - 1 + (1usize << b), count)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_in_ranges() {
        assert!(ranges(&[]).is_empty());
        assert_eq!(ranges(&[0]), [(0, 1, 1)]);
        assert_eq!(ranges(&[0, 1, 2, 3, 4]), [(0, 1, 2), (2, 3, 2), (4, 7, 1)]);
        let many = ranges(&(1..=5000).collect::<Vec<_>>());
        assert_eq!((many.len(), many[0], many[7]), (8, (1, 63, 63), (4096, 8191, 905)));
        assert_eq!(many.iter().map(|r| r.2).sum::<usize>(), 5000);
        assert_eq!(ranges(&[usize::MAX]), [(1 << 63, usize::MAX, 1)]);
    }

    #[test]
    fn words() {
        let mut r = Report::new(Unit::Tokens, vec![3, 600, 5]);
        r.description = "2 windows".into();
        (r.too_long, r.tail, r.windows, r.window_tokens, r.distinct_tokens) =
            (Dropped { documents: 1, tokens: 600 }, 2, 2, 6, 3);
        let text = r.text();
        for words in [
            "2 windows",
            "3 to 7",
            "66.7 %",
            "1 documents with 600 tokens are too long",
            "50.0 %",
            "tail of 2",
        ] {
            assert!(text.contains(words), "{text}");
        }
        assert_eq!(r.json()["too_long"]["tokens"], 600);
    }
}
