//! From the columns of a data set to the text (or the messages) of each row.

use std::path::Path;

use serde_json::Value;

use super::TextError;
use super::chat::Message;

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

/// Which columns make a row, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Layout {
    /// One column, named by the caller or `text` or `messages`.
    Column(String),
    /// `full_prompt` + the answer in `generated_text` + two newlines.
    Trace,
    /// Two columns joined by one newline.
    Pair(&'static str, &'static str),
    /// Rows that are bare strings.
    Bare,
}

impl Layout {
    /// Chooses a layout for a table with these columns; `wanted` overrides the choice.
    pub(super) fn choose(columns: &[String], wanted: Option<&str>, file: &Path) -> Result<Self, TextError> {
        let has = |name: &str| columns.iter().any(|c| c == name);
        if let Some(name) = wanted {
            if has(name) {
                return Ok(Layout::Column(name.to_owned()));
            }
            let what = format!("there is no column `{name}`; the columns are {}", name_list(columns));
            return Err(TextError::at(file, what, "name one of these columns"));
        }
        if has("text") {
            Ok(Layout::Column("text".into()))
        } else if has("full_prompt") && has("generated_text") {
            Ok(Layout::Trace)
        } else if has("question") && has("answer") {
            Ok(Layout::Pair("question", "answer"))
        } else if has("problem") && has("solution") {
            Ok(Layout::Pair("problem", "solution"))
        } else if has("messages") {
            Ok(Layout::Column("messages".into()))
        } else {
            let what = format!("none of the columns {} is known to hold text", name_list(columns));
            Err(TextError::at(file, what, format!("name the column to read, or provide {UNDERSTOOD}")))
        }
    }

    /// The columns that are read.
    pub(super) fn columns(&self) -> Vec<&str> {
        match self {
            Layout::Column(name) => vec![name],
            Layout::Trace => vec!["full_prompt", "generated_text"],
            Layout::Pair(a, b) => vec![a, b],
            Layout::Bare => Vec::new(),
        }
    }

    /// The layout in words.
    pub(super) fn describe(&self) -> String {
        match self {
            Layout::Column(name) => format!("column `{name}`"),
            Layout::Trace => "`full_prompt` followed by the full `generated_text` and two newlines".into(),
            Layout::Pair(a, b) => format!("`{a}` and `{b}` joined by a newline"),
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
            Layout::Pair(a, b) => {
                let mut text = string(a, get(a)?)?;
                text.push('\n');
                text.push_str(&string(b, get(b)?)?);
                Ok(Row::Text(text))
            }
            Layout::Bare => Err("a bare string is wanted, as in the first row".into()),
        }
    }
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
        let columns: Vec<String> = map.keys().cloned().collect();
        let layout = Layout::choose(&columns, wanted, Path::new("f")).map_err(|e| e.to_string())?;
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
        assert_eq!(read(json!({"problem": "p", "solution": "", "answer": "3"}), None), text("p\n"));
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
        let err = read(json!({"foo": "a"}), Some("text")).unwrap_err();
        assert!(err.contains("no column `text`") && err.contains("`foo`"), "{err}");
        assert!(read(json!({"text": null}), None).unwrap_err().contains("holds null"));
        assert!(read(json!({"text": ["a", "b"]}), None).unwrap_err().contains("list of 2"));
    }
}
