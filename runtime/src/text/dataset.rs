//! Reading a text corpus from a file or a folder, and joining its rows.

use std::path::{Path, PathBuf};

use super::chat::Message;
use super::files::{Cells, is_plain, is_whole, read_file};
use super::rows::{Layout, Row, Wanted, name_list};
use super::split::Split;
use super::{TextError, split};

/// What to read of a corpus.
#[derive(Debug, Clone)]
pub struct ReadOptions<'a> {
    /// The split to take from a folder; a file is read whatever its name.
    pub split: Split,
    /// The column that holds the text (or the messages), where the usual names do not apply.
    pub column: Option<&'a str>,
    /// Stop after this many rows.
    pub max_rows: Option<usize>,
    /// Refuse a file that decompresses to more bytes than this, and a corpus with more bytes of text.
    pub max_bytes: u64,
}

impl ReadOptions<'_> {
    /// All rows of a split, up to 8 GiB of text.
    pub fn new(split: Split) -> Self {
        Self { split, column: None, max_rows: None, max_bytes: 8 << 30 }
    }
}

/// The rows of a corpus, in file order, and where they came from.
#[derive(Debug, Clone)]
pub struct Corpus {
    /// The rows.
    pub rows: Vec<Row>,
    /// The files read, in order.
    pub files: Vec<PathBuf>,
    /// Which columns made a row, in words.
    pub layout: String,
    /// How the rows are joined unless the caller says otherwise.
    pub default_join: Join,
}

/// How rows become one text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Join {
    /// WikiText calibration text: rows that are `""` dropped, the others stripped, joined with two newlines.
    WikiTrain,
    /// Perplexity text: all rows as they are, joined with two newlines.
    All,
    /// Rows as they are, one after another: a whole text file, and reasoning traces, which end in two newlines.
    Concat,
}

impl Join {
    /// The rule in words, for reports.
    pub fn describe(self) -> &'static str {
        match self {
            Join::WikiTrain => "empty rows dropped, the others stripped, joined with two newlines",
            Join::All => "all rows as they are, joined with two newlines",
            Join::Concat => "all rows as they are, one after another",
        }
    }

    /// Applies the rule.
    pub fn join<'a>(self, rows: impl IntoIterator<Item = &'a str>) -> String {
        let rows = rows.into_iter();
        let mut out = String::new();
        let mut push = |text: &str, separator: &str, first: &mut bool| {
            if !std::mem::take(first) {
                out.push_str(separator);
            }
            out.push_str(text);
        };
        let mut first = true;
        for row in rows {
            match self {
                // A row of blanks is not `""`: it is stripped to nothing and still takes part in the join.
                Join::WikiTrain if row.is_empty() => {}
                Join::WikiTrain => push(strip(row), "\n\n", &mut first),
                Join::All => push(row, "\n\n", &mut first),
                Join::Concat => push(row, "", &mut first),
            }
        }
        out
    }
}

/// Python's `str.strip()`, which counts the four ASCII separators as space where Rust's `trim` does not.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

impl Corpus {
    /// One line that says what was read.
    pub fn describe(&self) -> String {
        let files: Vec<String> = self
            .files
            .iter()
            .map(|f| f.file_name().map_or_else(String::new, |n| n.to_string_lossy().into()))
            .collect();
        let rows = if self.rows.len() == 1 { "row" } else { "rows" };
        format!("{} {rows} of {} from {}", self.rows.len(), self.layout, name_list(&files))
    }

    /// The rows as one text. Conversations must be rendered first, with [`Corpus::render`].
    pub fn join(&self, join: Join) -> Result<String, TextError> {
        Ok(join.join(self.texts()?))
    }

    /// The text of each row. Conversations must be rendered first, with [`Corpus::render`].
    pub fn texts(&self) -> Result<Vec<&str>, TextError> {
        let rows = self.rows.iter().enumerate().map(|(i, row)| match row {
            Row::Text(text) => Ok(text.as_str()),
            Row::Messages(_) => Err(TextError::new(
                self.place(),
                format!("row {} is a conversation, not a text", i + 1),
                "render it with the model's chat template first",
            )),
        });
        rows.collect()
    }

    /// Turns each conversation into text with `template`, which is a chat template's renderer.
    pub fn render(
        &mut self,
        mut template: impl FnMut(&[Message]) -> Result<String, TextError>,
    ) -> Result<(), TextError> {
        for row in &mut self.rows {
            if let Row::Messages(messages) = row {
                *row = Row::Text(template(messages)?);
            }
        }
        Ok(())
    }

    fn place(&self) -> String {
        self.files.first().map_or_else(|| "corpus".into(), |f| f.display().to_string())
    }
}

/// Reads a corpus from a file, or the files of one split from a folder.
///
/// A folder is searched for the hub's file names (`train-00000-of-00001.parquet`, `test.jsonl`, `val.jsonl.zst`,
/// `wiki.test.raw`, `wikitext-train.arrow`, ...) in itself, in a sub-folder named as the split, in `data`, `main` or
/// `default`, and in a single sub-folder. Where a split is there in several formats, parquet wins, then Arrow, then JSON,
/// then text.
pub fn read_corpus(path: &Path, options: &ReadOptions<'_>) -> Result<Corpus, TextError> {
    let files = files_of(path, options.split)?;
    let mut reading = Reading { options, rows: Vec::new(), bytes: 0, layout: None, whole: true };
    for file in &files {
        if reading.full() {
            break;
        }
        reading.file(file)?;
    }
    if reading.rows.is_empty() {
        return Err(TextError::at(path, "there are no rows", "give a file or split that has some"));
    }
    let default_join = match (&reading.layout, reading.whole) {
        (_, true) | (Some(Layout::Trace), _) => Join::Concat,
        _ => Join::All,
    };
    let layout = match &reading.layout {
        Some(layout) => layout.describe(),
        None => "whole files".into(),
    };
    Ok(Corpus { rows: reading.rows, files, layout, default_join })
}

/// Rows of several columns, each for itself.
#[derive(Debug, Clone)]
pub struct Fields {
    /// The columns that were asked for, of each row.
    pub rows: Vec<Vec<String>>,
    /// The files read, in order.
    pub files: Vec<PathBuf>,
}

/// Reads some columns of a file, or of the files of one split of a folder. Numbers are read as text.
pub fn read_fields(path: &Path, options: &ReadOptions<'_>, columns: &[&str]) -> Result<Fields, TextError> {
    let files = files_of(path, options.split)?;
    let mut rows: Vec<Vec<String>> = Vec::new();
    let room = |n: usize| options.max_rows.is_none_or(|max| n < max);
    for file in files.iter().take_while(|_| room(0)) {
        read_file(file, Wanted::Fields(columns), options.max_bytes, &mut |cells| {
            if !room(rows.len()) {
                return Ok(false);
            }
            let row = match cells {
                Cells::Map(layout, mut map) => layout.fields(|name| map.remove(name)),
                Cells::Text(_) => Err("is a bare string, without columns".into()),
            };
            let at = rows.len() + 1;
            rows.push(
                row.map_err(|e| TextError::at(file, format!("row {at}: {e}"), "drop or mend the row"))?,
            );
            Ok(room(rows.len()))
        })?;
    }
    if rows.is_empty() {
        return Err(TextError::at(path, "there are no rows", "give a file or split that has some"));
    }
    Ok(Fields { rows, files })
}

/// Bytes of memory that reading and tokenizing may take, about: the text three times over and its tokens. Columnar and
/// compressed files hold about twice their size of text.
///
/// # Errors
/// If the files of the split are not there.
pub fn text_bytes(path: &Path, split: Split) -> Result<u64, TextError> {
    let of_file =
        |f: PathBuf| std::fs::metadata(&f).map_or(0, |m| m.len()) * if is_plain(&f) { 4 } else { 8 };
    Ok(files_of(path, split)?.into_iter().map(of_file).sum())
}

/// The file itself, or the files of a split of a folder.
fn files_of(path: &Path, split: Split) -> Result<Vec<PathBuf>, TextError> {
    let meta = std::fs::metadata(path).map_err(|e| {
        TextError::at(path, format!("cannot be read: {e}"), "check the path and its permissions")
    })?;
    if meta.is_dir() { split::find(path, split) } else { Ok(vec![path.to_owned()]) }
}

struct Reading<'a> {
    options: &'a ReadOptions<'a>,
    rows: Vec<Row>,
    bytes: u64,
    layout: Option<Layout>,
    whole: bool,
}

impl Reading<'_> {
    fn full(&self) -> bool {
        self.options.max_rows.is_some_and(|max| self.rows.len() >= max)
    }

    fn file(&mut self, path: &Path) -> Result<(), TextError> {
        let wanted = self.options.column.map_or(Wanted::Usual, Wanted::Column);
        let whole = is_whole(path)?;
        self.whole &= whole;
        read_file(path, wanted, self.options.max_bytes, &mut |cells| match cells {
            Cells::Text(text) if whole => {
                self.count(path, text.len() as u64)?;
                self.rows.push(Row::Text(text));
                Ok(true)
            }
            Cells::Text(text) => self.push(path, &Layout::Bare, Row::Text(text)),
            Cells::Map(layout, mut map) => {
                let row = layout.row(|name| map.remove(name)).map_err(|e| {
                    let hint = "drop or mend the row, or name another column";
                    TextError::at(path, format!("row {}: {e}", self.rows.len() + 1), hint)
                })?;
                self.push(path, layout, row)
            }
        })
    }

    fn push(&mut self, path: &Path, layout: &Layout, row: Row) -> Result<bool, TextError> {
        if self.full() {
            return Ok(false);
        }
        self.count(path, row.len() as u64)?;
        match &self.layout {
            None => self.layout = Some(layout.clone()),
            Some(first) if first == layout => {}
            Some(first) => {
                let what = format!(
                    "its text is {}, but that of earlier files is {}",
                    layout.describe(),
                    first.describe()
                );
                return Err(TextError::at(path, what, "name one column that all files have"));
            }
        }
        self.rows.push(row);
        Ok(!self.full())
    }

    fn count(&mut self, path: &Path, bytes: u64) -> Result<(), TextError> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > self.options.max_bytes {
            let what = format!("the text so far exceeds the size limit of {} bytes", self.options.max_bytes);
            return Err(TextError::at(path, what, "raise the limit or read fewer rows"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(files: &[(&str, &str)], target: &str, options: &ReadOptions<'_>) -> Result<Corpus, TextError> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        read_corpus(&dir.path().join(target), options)
    }

    fn texts(corpus: &Corpus) -> Vec<&str> {
        let mut out = Vec::new();
        for row in &corpus.rows {
            match row {
                Row::Text(text) => out.push(text.as_str()),
                Row::Messages(_) => out.push("(messages)"),
            }
        }
        out
    }

    const TEST: ReadOptions<'static> =
        ReadOptions { split: Split::Test, column: None, max_rows: None, max_bytes: 1 << 20 };

    #[test]
    fn joins() {
        let rows = ["", " = T = \n", "", " \n", "a\u{1f}"];
        assert_eq!(Join::WikiTrain.join(rows), "= T =\n\n\n\na");
        assert_eq!(Join::All.join(rows), "\n\n = T = \n\n\n\n\n \n\n\na\u{1f}");
        assert_eq!(Join::Concat.join(rows), " = T = \n \na\u{1f}");
        assert_eq!(Join::All.join([]), "");
    }

    #[test]
    fn whole_text_is_one_row() {
        let got = corpus(&[("notes.txt", "a\n\n b\r\n")], "notes.txt", &TEST).unwrap();
        assert_eq!(got.join(got.default_join).unwrap(), "a\n\n b\r\n");
        assert_eq!(got.describe(), "1 row of whole files from `notes.txt`");
        let err = corpus(&[("x.csv", "a,b")], "x.csv", &TEST).unwrap_err();
        assert!(err.hint.contains(".jsonl"), "{err}");
        let err = corpus(&[("x.txt", "a")], "x.txt", &ReadOptions { column: Some("c"), ..TEST }).unwrap_err();
        assert!(err.what.contains("no column `c`"), "{err}");
    }

    #[test]
    fn json_rows_in_order_and_limits() {
        let text = "{\"text\":\"a\",\"n\":1}\n{\"n\":2,\"text\":\"b\"}\n{\"text\":\"c\"}\n";
        let files = [("test.jsonl", text)];
        let got = corpus(&files, "", &TEST).unwrap();
        assert_eq!(texts(&got), ["a", "b", "c"]);
        assert_eq!(got.default_join, Join::All);
        let got = corpus(&files, "", &ReadOptions { max_rows: Some(2), ..TEST }).unwrap();
        assert_eq!(texts(&got), ["a", "b"]);
        let err = corpus(&files, "", &ReadOptions { max_bytes: 40, ..TEST }).unwrap_err();
        assert!(err.what.contains("limit"), "{err}");
        let err = corpus(&files, "", &ReadOptions { column: Some("n"), ..TEST }).unwrap_err();
        assert!(err.what.contains("row 1: column `n` holds a number"), "{err}");
        let err = corpus(&files, "", &ReadOptions { split: Split::Train, ..TEST }).unwrap_err();
        assert!(err.what.contains("`test.jsonl`"), "{err}");
    }

    #[test]
    fn traces_and_strings_in_arrays() {
        let text = "[{\"full_prompt\":\"P\",\"generated_text\":[\"xy\"]},{\"full_prompt\":\"Q\",\"generated_text\":\"z\"}]";
        let got = corpus(&[("t.jsonl", text)], "t.jsonl", &TEST).unwrap();
        assert_eq!(got.join(got.default_join).unwrap(), "Pxy\n\nQz\n\n");
        let got = corpus(&[("t.json", "[\"a\",\"b\"]")], "t.json", &TEST).unwrap();
        assert_eq!(texts(&got), ["a", "b"]);
        assert!(corpus(&[("t.json", "[\"a\",{\"text\":\"b\"}]")], "t.json", &TEST).is_err());
        assert!(corpus(&[("t.json", "[1]")], "t.json", &TEST).is_err());
        assert!(corpus(&[("t.json", "")], "t.json", &TEST).unwrap_err().what.contains("no rows"));
    }

    #[test]
    fn conversations_must_be_rendered_before_joining() {
        let text = "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]}";
        let mut got = corpus(&[("t.jsonl", text)], "t.jsonl", &TEST).unwrap();
        assert!(got.join(Join::All).unwrap_err().hint.contains("chat template"));
        got.render(|m| Ok(format!("<{}>{}", m[0].role, m[0].content))).unwrap();
        assert_eq!(got.join(Join::All).unwrap(), "<user>hi");
    }
}
