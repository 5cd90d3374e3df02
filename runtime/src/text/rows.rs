//! From the columns of a data set to the text (or the messages) of each row.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::{Map, Value};

use super::TextError;
use super::chat::Message;

/// Takes one row of a table; `Ok(false)` ends the reading.
pub(super) type Sink<'a> = dyn FnMut(&Layout, Map<String, Value>) -> Result<bool, TextError> + 'a;

/// Runs a reader of tables that panics on some damaged files instead of returning an error.
pub(super) fn guarded(
    path: &Path,
    format: &str,
    hint: &str,
    read: impl FnOnce() -> Result<(), TextError>,
) -> Result<(), TextError> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| {
        Err(TextError::at(path, format!("the {format} data contradicts its own schema"), hint))
    })
}

/// One row of a corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Row {
    /// Running text.
    Text(String),
    /// A conversation, to be rendered with the model's chat template.
    Messages(Vec<Message>),
}

impl Row {
    /// Bytes of text in the row.
    pub fn len(&self) -> usize {
        match self {
            Row::Text(text) => text.len(),
            Row::Messages(messages) => messages.iter().map(|m| m.role.len() + m.content.len()).sum(),
        }
    }

    /// Whether the row holds no text at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What is understood when no column is named, in the words of an error.
const UNDERSTOOD: &str = "`text`, `full_prompt` with `generated_text`, `question` with `answer`, `problem` with \
                          `solution`, or `messages`";

/// A column of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Column {
    /// Its name.
    pub(super) name: String,
    /// Whether it may hold text or messages, by its type or by its first value.
    pub(super) text: bool,
}

/// What a caller wants of a table.
#[derive(Debug, Clone, Copy)]
pub(super) enum Wanted<'a> {
    /// The text of each row, by the usual names.
    Usual,
    /// One column that the user named.
    Column(&'a str),
    /// Several columns, each for itself.
    Fields(&'a [&'a str]),
}

/// Which columns make a row, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Layout {
    /// One column, named by the caller or `text` or `messages`.
    Column(String),
    /// `full_prompt` + the answer in `generated_text` + two newlines.
    Trace,
    /// Columns joined by newlines: one between question and answer, two between problem and solution.
    Joined(Vec<String>, &'static str),
    /// Rows that are bare strings.
    Bare,
}

impl Layout {
    /// Chooses a layout for a table with these columns.
    pub(super) fn choose(columns: &[Column], wanted: Wanted<'_>, file: &Path) -> Result<Self, TextError> {
        let has = |name: &str| columns.iter().any(|c| c.name == name);
        let joined = |names: [&str; 2], by| Ok(Layout::Joined(names.map(str::to_owned).to_vec(), by));
        let names: Vec<&str> = columns.iter().map(|c| c.name.as_str()).collect();
        let required = |name: &str| {
            let what = format!("there is no column `{name}`; the columns are {}", name_list(&names));
            if has(name) {
                Ok(name.to_owned())
            } else {
                Err(TextError::at(file, what, "name one of these columns"))
            }
        };
        match wanted {
            Wanted::Column(name) => Ok(Layout::Column(required(name)?)),
            Wanted::Fields(fields) => {
                let fields: Result<_, TextError> = fields.iter().map(|name| required(name)).collect();
                let hint = "give the data set that the task is made from, with these columns";
                Ok(Layout::Joined(fields.map_err(|e| TextError { hint: hint.into(), ..e })?, "\n"))
            }
            Wanted::Usual if has("text") => Ok(Layout::Column("text".into())),
            Wanted::Usual if has("full_prompt") && has("generated_text") => Ok(Layout::Trace),
            Wanted::Usual if has("question") && has("answer") => joined(["question", "answer"], "\n"),
            Wanted::Usual if has("problem") && has("solution") => joined(["problem", "solution"], "\n\n"),
            Wanted::Usual if has("messages") => Ok(Layout::Column("messages".into())),
            Wanted::Usual => {
                let what = format!("none of the columns {} is known to hold text", name_list(&names));
                let candidates: Vec<&str> =
                    columns.iter().filter(|c| c.text).map(|c| c.name.as_str()).collect();
                let hint = match candidates[..] {
                    [] => format!("none holds text; provide {UNDERSTOOD}"),
                    _ => format!(
                        "name the column with --calib-column (eval: --column): {} may hold text; or provide {UNDERSTOOD}",
                        name_list(&candidates)
                    ),
                };
                Err(TextError::at(file, what, hint))
            }
        }
    }

    /// The columns that are read.
    pub(super) fn columns(&self) -> Vec<&str> {
        match self {
            Layout::Column(name) => vec![name],
            Layout::Trace => vec!["full_prompt", "generated_text"],
            Layout::Joined(names, _) => names.iter().map(String::as_str).collect(),
            Layout::Bare => Vec::new(),
        }
    }

    /// The layout in words.
    pub(super) fn describe(&self) -> String {
        match self {
            Layout::Column(name) => format!("column `{name}`"),
            Layout::Trace => "`full_prompt` followed by the full `generated_text` and two newlines".into(),
            Layout::Joined(names, by) => {
                let names: Vec<String> = names.iter().map(|n| format!("`{n}`")).collect();
                let by = if *by == "\n" { "a newline" } else { "a blank line" };
                format!("{} joined by {by}", names.join(" and "))
            }
            Layout::Bare => "the strings themselves".into(),
        }
    }

    /// Makes a row from its columns, in the order of [`Layout::columns`]; the error says which column is at fault.
    pub(super) fn row(&self, mut values: impl FnMut(&str) -> Option<Value>) -> Result<Row, String> {
        let mut get = |name: &str| values(name).ok_or_else(|| format!("column `{name}` is missing"));
        match self {
            Layout::Column(name) => match get(name)? {
                Value::Array(items) if items.iter().any(Value::is_object) => {
                    messages(name, items).map(Row::Messages)
                }
                Value::Array(items) if items.len() != 1 => Err(format!(
                    "column `{name}` holds a list of {} values where one text is wanted",
                    items.len()
                )),
                value => string(name, value).map(Row::Text),
            },
            Layout::Trace => {
                let mut text = string("full_prompt", get("full_prompt")?)?;
                text.push_str(&string("generated_text", get("generated_text")?)?);
                text.push_str("\n\n");
                Ok(Row::Text(text))
            }
            Layout::Joined(names, by) => {
                let texts: Result<Vec<String>, String> =
                    names.iter().map(|name| string(name, get(name)?)).collect();
                Ok(Row::Text(texts?.join(by)))
            }
            Layout::Bare => Err("a bare string is wanted, as in the first row".into()),
        }
    }

    /// The columns of a row each for itself, in the order of [`Layout::columns`]; numbers count as text.
    pub(super) fn fields(
        &self,
        mut values: impl FnMut(&str) -> Option<Value>,
    ) -> Result<Vec<String>, String> {
        let field = |name: &str| match values(name).ok_or_else(|| format!("column `{name}` is missing"))? {
            Value::Number(n) => Ok(n.to_string()),
            value => string(name, value),
        };
        self.columns().into_iter().map(field).collect()
    }
}

/// The columns of a JSON row.
pub(super) fn json_columns(row: &Map<String, Value>) -> Vec<Column> {
    let text = |v: &Value| matches!(v, Value::String(_) | Value::Array(_));
    row.iter().map(|(name, value)| Column { name: name.clone(), text: text(value) }).collect()
}

/// A string, or the first of a list of strings (the first of several answers to one prompt).
fn string(column: &str, value: Value) -> Result<String, String> {
    let kind = match value {
        Value::String(text) => return Ok(text),
        Value::Array(items) => match items.into_iter().next() {
            Some(Value::String(text)) => return Ok(text),
            Some(_) => "a list of something else",
            None => "an empty list",
        },
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::Object(_) => "an object",
    };
    Err(format!("column `{column}` holds {kind} where text is wanted"))
}

fn messages(column: &str, items: Vec<Value>) -> Result<Vec<Message>, String> {
    let one = |(i, item): (usize, Value)| -> Result<Message, String> {
        let Value::Object(mut map) = item else {
            return Err(format!("message {} of column `{column}` is not an object", i + 1));
        };
        let mut field = |name: &str| match map.remove(name) {
            Some(Value::String(text)) => Ok(text),
            _ => Err(format!("message {} of column `{column}` has no string `{name}`", i + 1)),
        };
        Ok(Message { role: field("role")?, content: field("content")? })
    };
    items.into_iter().enumerate().map(one).collect()
}

/// Names in backquotes, at most twenty of them, each cut at eighty characters.
pub(super) fn name_list<S: AsRef<str>>(names: &[S]) -> String {
    if names.is_empty() {
        return "(none)".into();
    }
    let short = |n: &S| format!("`{}`", n.as_ref().chars().take(80).collect::<String>());
    let mut out = names.iter().take(20).map(short).collect::<Vec<_>>().join(", ");
    if names.len() > 20 {
        out.push_str(&format!(" and {} more", names.len() - 20));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value, wanted: Option<&str>) -> Result<Row, String> {
        let Value::Object(mut map) = value else { unreachable!("tests pass objects") };
        let layout =
            Layout::choose(&json_columns(&map), wanted.map_or(Wanted::Usual, Wanted::Column), Path::new("f"))
                .map_err(|e| e.to_string())?;
        layout.row(|name| map.remove(name))
    }

    fn text(s: &str) -> Result<Row, String> {
        Ok(Row::Text(s.into()))
    }

    #[test]
    fn columns_by_priority() {
        assert_eq!(
            read(json!({"messages": [], "text": "a", "question": "q", "answer": "b"}), None),
            text("a")
        );
        assert_eq!(read(json!({"question": "q", "answer": "b"}), None), text("q\nb"));
        assert_eq!(read(json!({"problem": "p", "solution": "", "answer": "3"}), None), text("p\n\n"));
        assert_eq!(read(json!({"problem": "p", "solution": "s", "answer": "3"}), Some("answer")), text("3"));
    }

    #[test]
    fn traces_use_the_full_text() {
        assert_eq!(read(json!({"full_prompt": "P", "generated_text": "xyz"}), None), text("Pxyz\n\n"));
        assert_eq!(
            read(json!({"full_prompt": "P", "generated_text": ["xyz", "no"]}), None),
            text("Pxyz\n\n")
        );
        assert!(
            read(json!({"full_prompt": "P", "generated_text": []}), None).unwrap_err().contains("empty list")
        );
    }

    #[test]
    fn fields_stand_for_themselves() {
        let Value::Object(mut map) = json!({"q": "a", "n": 7, "x": null}) else { unreachable!("an object") };
        let choose = |fields: &[&str]| {
            Layout::choose(&json_columns(&map), Wanted::Fields(fields), Path::new("f"))
                .map_err(|e| e.to_string())
        };
        let err = choose(&["q", "gold"]).unwrap_err();
        assert!(err.contains("no column `gold`") && err.contains("`q`, `n`, `x`"), "{err}");
        let (good, bad) = (choose(&["n", "q"]).unwrap(), choose(&["x"]).unwrap());
        assert_eq!(good.fields(|name| map.remove(name)).unwrap(), ["7", "a"]);
        assert!(bad.fields(|name| map.remove(name)).unwrap_err().contains("holds null"));
    }

    #[test]
    fn messages_stay_messages() {
        let got = read(json!({"messages": [{"role": "user", "content": "hi", "name": null}]}), None);
        assert_eq!(got, Ok(Row::Messages(vec![Message::new("user", "hi")])));
        let err = read(json!({"messages": [{"role": "user", "content": null}]}), None).unwrap_err();
        assert_eq!(err, "message 1 of column `messages` has no string `content`");
    }

    #[test]
    fn refusals_name_what_was_seen() {
        let err = read(json!({"foo": "a", "bar": 1}), None).unwrap_err();
        assert!(err.contains("`foo`, `bar`") && err.contains("`full_prompt`"), "{err}");
        assert!(err.contains("--calib-column (eval: --column): `foo` may hold text"), "{err}");
        assert!(read(json!({"n": 1}), None).unwrap_err().contains("none holds text"));
        let err = read(json!({"foo": "a"}), Some("text")).unwrap_err();
        assert!(err.contains("no column `text`") && err.contains("`foo`"), "{err}");
        assert!(read(json!({"text": null}), None).unwrap_err().contains("holds null"));
        assert!(read(json!({"text": ["a", "b"]}), None).unwrap_err().contains("list of 2"));
    }
}
