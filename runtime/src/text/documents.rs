//! Calibration by documents: each is tokenised on its own, in the order of a published shuffle.

use super::dataset::strip;
use super::random::hf_permutation;
use super::{TextError, Tokenizer};

/// The seed of the published shuffle of documents.
pub const SHUFFLE_SEED: u64 = 42;

/// How documents become windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    /// AWQ: each document stripped; those longer than a window skipped; the first that are not, joined and cut into
    /// windows; the tail dropped.
    Packed,
    /// KVQuant: the first documents, each cut at the length of a window; one window a document.
    Truncated,
}

impl Pick {
    /// The rule in words, for reports.
    pub fn describe(self) -> &'static str {
        match self {
            Pick::Packed => {
                "documents in the order of a shuffle with seed 42, stripped, longer ones skipped, joined and cut"
            }
            Pick::Truncated => {
                "the first documents in the order of a shuffle with seed 42, each cut at that length"
            }
        }
    }
}

/// Documents, and tokens of theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Dropped {
    /// Documents.
    pub documents: usize,
    /// Tokens.
    pub tokens: usize,
}

impl Dropped {
    fn add(&mut self, tokens: usize) {
        self.documents += 1;
        self.tokens += tokens;
    }
}

/// Windows made of documents, and what became of the documents.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Documents {
    /// The windows.
    pub windows: Vec<Vec<u32>>,
    /// Tokens of each document that was looked at, in the order of the shuffle.
    pub lengths: Vec<usize>,
    /// Documents that were used, in whole or in part.
    pub used: usize,
    /// Documents without a token.
    pub empty: usize,
    /// Documents that were skipped because they are longer than a window.
    pub too_long: Dropped,
    /// Documents that were cut at the length of a window, and the tokens cut off.
    pub cut: Dropped,
    /// Tokens behind the last whole window.
    pub tail: usize,
}

/// Makes windows of at most `seqlen` tokens from at most `count` documents.
///
/// The tokenizer adds to each document what it adds to a text, such as BOS.
///
/// # Errors
/// If there is no window, or none has two tokens of text.
pub fn document_windows(
    documents: &[&str],
    tokenizer: &Tokenizer,
    (seqlen, count): (usize, usize),
    pick: Pick,
) -> Result<Documents, TextError> {
    let fault = |what: String, hint: &str| TextError::new("documents", what, hint);
    let n = u32::try_from(documents.len())
        .map_err(|_| fault(format!("{} documents are too many to shuffle", documents.len()), "give fewer"))?;
    let mut out = Documents::default();
    let mut stream: Vec<u32> = Vec::new();
    let (prefix, suffix) = tokenizer.added_ids();
    for (looked, &at) in hf_permutation(SHUFFLE_SEED, n).iter().enumerate() {
        let full = match pick {
            Pick::Packed => out.used == count,
            Pick::Truncated => looked == count,
        };
        if full {
            break;
        }
        let text = documents[at as usize];
        let mut ids = tokenizer.encode(if pick == Pick::Packed { strip(text) } else { text }, true)?;
        out.lengths.push(ids.len());
        if ids.is_empty() {
            out.empty += 1;
            continue;
        }
        match pick {
            Pick::Packed if ids.len() > seqlen => {
                out.too_long.add(ids.len());
                continue;
            }
            Pick::Packed => stream.extend(ids),
            Pick::Truncated => {
                if ids.len() > seqlen {
                    out.cut.add(ids.len() - seqlen);
                    // What the tokenizer puts behind a text stays behind it.
                    ids.truncate(seqlen.saturating_sub(suffix.len()));
                    ids.extend(&suffix[suffix.len().saturating_sub(seqlen)..]);
                }
                out.windows.push(ids);
            }
        }
        out.used += 1;
    }
    if pick == Pick::Packed {
        out.tail = stream.len() % seqlen.max(1);
        out.windows = stream.chunks_exact(seqlen.max(1)).map(<[u32]>::to_vec).collect();
    }
    let least = if pick == Pick::Packed { 2 } else { prefix.len() + suffix.len() + 2 };
    if out.windows.iter().any(|w| w.len() >= least) {
        return Ok(out);
    }
    let (looked, long) = (out.lengths.len(), out.too_long.documents);
    Err(match pick {
        Pick::Packed if documents.len() == 1 => fault(
            format!(
                "the text is one document of {} tokens, so that windows of {seqlen} cannot be packed",
                out.lengths[0]
            ),
            "take windows of the whole text with --sampling random, or give a data set with a row a document",
        ),
        Pick::Packed => fault(
            format!(
                "of {looked} documents {long} have more than {seqlen} tokens, and the others make {} together: \
                 no window of {seqlen} can be packed",
                stream.len()
            ),
            "give other text, more --nsamples, or another --seqlen",
        ),
        Pick::Truncated => fault(
            format!("the first {looked} documents give no window with 2 tokens of text"),
            "give text with longer documents, or a longer --seqlen",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::tests::{byte_fallback, load, tiny};
    use super::*;

    /// The published order of ten documents.
    const ORDER: [usize; 10] = [5, 6, 0, 7, 3, 2, 4, 9, 1, 8];

    fn texts() -> Vec<String> {
        // Document `i` has `i + 1` letters, and BOS in front.
        (0..10).map(|i| format!(" {}\n", "z ".repeat(i + 1))).collect()
    }

    fn made(texts: &[String], size: (usize, usize), pick: Pick) -> Result<Documents, TextError> {
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        document_windows(&texts, &tiny(), size, pick)
    }

    #[test]
    fn packed_documents_in_shuffled_order() {
        let (t, texts) = (tiny(), texts());
        let ids = |i: usize| t.encode(texts[i].trim(), true).unwrap();
        let (limit, want) = (6, 4);
        let got = made(&texts, (limit, want), Pick::Packed).unwrap();
        let (mut stream, mut skipped, mut looked) = (Vec::new(), 0, 0);
        let mut used = 0;
        for i in ORDER {
            if used == want {
                break;
            }
            looked += 1;
            if ids(i).len() > limit {
                skipped += 1;
            } else {
                stream.extend(ids(i));
                used += 1;
            }
        }
        assert!(skipped > 1 && used == want);
        assert_eq!((got.used, got.too_long.documents, got.lengths.len()), (used, skipped, looked));
        assert_eq!(got.windows.concat(), stream[..stream.len() / limit * limit]);
        assert_eq!(got.tail, stream.len() % limit);
        assert!(got.windows.iter().all(|w| w.len() == limit));
    }

    #[test]
    fn truncated_documents_in_shuffled_order() {
        let (t, texts) = (tiny(), texts());
        let got = made(&texts, (5, 4), Pick::Truncated).unwrap();
        let ids = |i: usize| t.encode(&texts[i], true).unwrap();
        let want: Vec<Vec<u32>> =
            ORDER[..4].iter().map(|&i| ids(i)[..ids(i).len().min(5)].to_vec()).collect();
        assert_eq!(got.windows, want);
        assert_eq!(got.lengths, ORDER[..4].iter().map(|&i| ids(i).len()).collect::<Vec<_>>());
        let cut: usize = ORDER[..4].iter().map(|&i| ids(i).len().saturating_sub(5)).sum();
        assert_eq!((got.cut.tokens, got.used, got.tail), (cut, 4, 0));
    }

    #[test]
    fn what_stands_behind_a_text_stays_there() {
        let mut json = byte_fallback();
        let end = serde_json::json!({"SpecialToken": {"id": "</s>", "type_id": 0}});
        json["post_processor"]["single"].as_array_mut().unwrap().push(end);
        json["post_processor"]["special_tokens"]["</s>"] =
            serde_json::json!({"id": "</s>", "ids": [2], "tokens": ["</s>"]});
        let t = load(&json, None).unwrap();
        assert_eq!(t.added_ids(), (&[1][..], &[2][..]));
        let got = document_windows(&["ab ab ab ab"], &t, (4, 1), Pick::Truncated).unwrap();
        let whole = t.encode("ab ab ab ab", true).unwrap();
        assert_eq!(got.windows, [[&whole[..3], &[2]].concat()]);
    }

    #[test]
    fn documents_that_make_no_window() {
        for (texts, pick, words) in [
            (vec!["a b c d e f g h"], Pick::Packed, "one document of"),
            (vec!["a b c d e f g h", "a b c d e f g h i"], Pick::Packed, "2 have more than 4 tokens"),
            (vec!["a", "b"], Pick::Packed, "make 4 together"),
            (vec!["a", ""], Pick::Truncated, "no window with 2 tokens"),
            (vec![], Pick::Packed, "of 0 documents"),
        ] {
            let texts: Vec<String> = texts.into_iter().map(str::to_owned).collect();
            let size = if words.contains("together") { (9, 5) } else { (4, 5) };
            let err = made(&texts, size, pick).unwrap_err().to_string();
            assert!(err.contains(words), "{err}");
        }
    }
}
