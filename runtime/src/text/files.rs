//! One file of rows, whatever its format.

use std::path::Path;

use serde_json::{Map, Value};

use super::rows::{Layout, Wanted, json_columns};
use super::split::{Codec, Format, READABLE};
use super::{TextError, arrow, jsonl, parquet};

/// What one row of a file is.
pub(super) enum Cells<'a> {
    /// Columns, and which of them make a row.
    Map(&'a Layout, Map<String, Value>),
    /// A bare string, or a whole file of text.
    Text(String),
}

/// Takes one row; `Ok(false)` ends the reading.
pub(super) type Sink<'a> = dyn FnMut(Cells<'_>) -> Result<bool, TextError> + 'a;

/// Whether a file is one text, without rows.
pub(super) fn is_whole(path: &Path) -> Result<bool, TextError> {
    Ok(format(path)? == Format::Text)
}

/// Whether the text of a file lies in it as it is, without compression or columns of bytes.
pub(super) fn is_plain(path: &Path) -> bool {
    matches!(format(path), Ok(Format::Text | Format::Json(Codec::Plain)))
}

fn format(path: &Path) -> Result<Format, TextError> {
    let name = path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    Format::of(&name).ok_or_else(|| {
        let what = "the name does not end in a known form of text";
        TextError::at(path, what, format!("give a file that ends in {READABLE}"))
    })
}

/// Reads a file row by row. More than `max_bytes` are refused.
pub(super) fn read_file(
    path: &Path,
    wanted: Wanted<'_>,
    max_bytes: u64,
    sink: &mut Sink<'_>,
) -> Result<(), TextError> {
    let mut map = |layout: &Layout, row| sink(Cells::Map(layout, row));
    match format(path)? {
        Format::Parquet => parquet::read(path, wanted, max_bytes, &mut map),
        Format::Arrow => arrow::read(path, wanted, max_bytes, &mut map),
        Format::Text => {
            sink(Cells::Text(text(path, wanted, max_bytes)?))?;
            Ok(())
        }
        Format::Json(codec) => {
            let mut rows = Json { path, wanted, layout: None, row: 0 };
            jsonl::read(path, codec, max_bytes, &mut |value| rows.take(value, sink))
        }
    }
}

fn text(path: &Path, wanted: Wanted<'_>, max_bytes: u64) -> Result<String, TextError> {
    let cannot = |e: std::io::Error| {
        TextError::at(path, format!("cannot be read: {e}"), "check the path and its permissions")
    };
    match wanted {
        Wanted::Usual => {}
        Wanted::Column(column) => {
            let what = format!("a text file has no column `{column}`");
            return Err(TextError::at(path, what, "leave the column out"));
        }
        Wanted::Fields(_) => {
            let what = "a text file has no columns";
            return Err(TextError::at(path, what, "give a parquet, arrow or jsonl file"));
        }
    }
    let size = std::fs::metadata(path).map_err(cannot)?.len();
    if size > max_bytes {
        let what = format!("it has {size} bytes; the size limit is {max_bytes}");
        return Err(TextError::at(path, what, "raise the limit or give a shorter text"));
    }
    String::from_utf8(std::fs::read(path).map_err(cannot)?).map_err(|e| {
        let what = format!("is not UTF-8 from byte {} on", e.utf8_error().valid_up_to());
        TextError::at(path, what, "convert it to UTF-8")
    })
}

/// The rows of a JSON file: objects of one layout, or bare strings.
struct Json<'a> {
    path: &'a Path,
    wanted: Wanted<'a>,
    layout: Option<Layout>,
    row: u64,
}

impl Json<'_> {
    fn take(&mut self, value: Value, sink: &mut Sink<'_>) -> Result<bool, TextError> {
        self.row += 1;
        match (value, &self.layout, self.wanted) {
            (Value::Object(map), Some(layout), _) => sink(Cells::Map(layout, map)),
            (Value::Object(map), None, wanted) => {
                let layout = Layout::choose(&json_columns(&map), wanted, self.path)?;
                sink(Cells::Map(self.layout.insert(layout), map))
            }
            (Value::String(text), None | Some(Layout::Bare), Wanted::Usual) => {
                self.layout = Some(Layout::Bare);
                sink(Cells::Text(text))
            }
            _ => {
                let what = format!("row {} is neither an object nor, as all rows, a string", self.row);
                Err(TextError::at(self.path, what, "write one object with named columns a row"))
            }
        }
    }
}
