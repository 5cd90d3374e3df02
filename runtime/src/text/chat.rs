//! Chat templates: from messages to the prompt a model was trained on.
//!
//! Templates are Jinja programs written for `transformers`, and are rendered under its rules: blocks are trimmed, the
//! methods of Python's strings and dicts are there, `raise_exception` stops with its message, `tojson` writes JSON as
//! Python does. `strftime_now` is not defined, so that a prompt does not depend on the day: a template that tests for
//! it takes its own fixed date, one that calls it untested is refused.
//!
//! A rendered chat holds its special tokens already: tokenise it without adding any, or it gets two BOS tokens.

use std::io;
use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use super::TextError;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// Makes a message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    env: Environment<'static>,
    specials: Map<String, serde_json::Value>,
}

/// No sensible prompt is longer; a template in a runaway loop meets this.
const MAX_OUTPUT: usize = 64 << 20;
const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template; `specials` are the variables it sees by name, such as `bos_token`.
    pub fn new(source: &str, specials: &[(&str, &str)]) -> Result<Self, TextError> {
        let specials = specials.iter().map(|&(k, v)| (k.to_owned(), v.into())).collect();
        Self::compile(source, specials)
    }

    /// Takes the template from `chat_template.jinja`, else from `tokenizer_config.json`; `None` when neither has one.
    ///
    /// In the latter it is a string, or a list of named ones of which `default` is used.
    pub fn from_config(
        config: &Map<String, serde_json::Value>,
        jinja: Option<&str>,
    ) -> Result<Option<Self>, TextError> {
        use serde_json::Value as Json;
        let fault =
            |what: String, hint: &str| TextError::new("tokenizer_config.json: chat_template", what, hint);
        let source = match (jinja, config.get("chat_template")) {
            (Some(source), _) => source,
            (None, None | Some(Json::Null)) => return Ok(None),
            (None, Some(Json::String(source))) => source,
            (None, Some(Json::Array(list))) => {
                let named = |name: &str| {
                    let entry = list.iter().find(|t| t.get("name").and_then(Json::as_str) == Some(name));
                    entry.and_then(|t| t.get("template")).and_then(Json::as_str)
                };
                named("default").ok_or_else(|| {
                    let names: Vec<&str> = list.iter().filter_map(|t| t.get("name")?.as_str()).collect();
                    let what = format!("holds no template named `default`; the names are {names:?}");
                    fault(what, "rename the template to use to `default`, or put it in chat_template.jinja")
                })?
            }
            _ => {
                return Err(fault(
                    "is neither a string nor a list".into(),
                    "restore it from the original model",
                ));
            }
        };
        let token = |(key, value): (&String, &Json)| {
            let special = key.ends_with("_token").then(|| special_token(value)).flatten()?;
            Some((key.clone(), special.into()))
        };
        Self::compile(source, config.iter().filter_map(token).collect()).map(Some)
    }

    fn compile(source: &str, specials: Map<String, serde_json::Value>) -> Result<Self, TextError> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_filter("tojson", to_json);
        env.add_template_owned(NAME, without_generation_tags(source)).map_err(|e| {
            TextError::new(
                "chat template",
                format!("does not compile: {e:#}"),
                "restore it from the original model",
            )
        })?;
        Ok(Self { env, specials })
    }

    /// Renders a conversation, with the start of the model's answer when `add_generation_prompt` is set.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TextError> {
        self.render_with(messages, add_generation_prompt, &Map::new())
    }

    /// Renders with further template variables, such as `enable_thinking` or `date_string`.
    pub fn render_with(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        vars: &Map<String, serde_json::Value>,
    ) -> Result<String, TextError> {
        let mut context = self.specials.clone();
        // `transformers` passes these two even when there are none, so templates see none and not undefined.
        context.extend(["tools", "documents"].map(|name| (name.to_owned(), serde_json::Value::Null)));
        context.extend(vars.clone());
        let turn = |m: &Message| {
            ordered([("role", Value::from(m.role.as_str())), ("content", Value::from(m.content.as_str()))])
        };
        let context = minijinja::context! {
            messages => messages.iter().map(turn).collect::<Vec<_>>(),
            add_generation_prompt => add_generation_prompt,
            ..from_json(serde_json::Value::Object(context))
        };
        let fail = |e: Error| {
            let text = format!("{e}");
            let hint = if text.contains("strftime_now") {
                "prompts must not depend on the day: replace strftime_now in the template by a fixed date"
            } else {
                "check the roles and their order, or the template"
            };
            TextError::new("chat template", format!("cannot render: {text}"), hint)
        };
        let mut out = CappedWriter(Vec::new());
        let template = self.env.get_template(NAME).map_err(fail)?;
        template.render_captured_to(context, &mut out).map_err(fail)?;
        String::from_utf8(out.0)
            .map_err(|_| TextError::new("chat template", "rendered no UTF-8", "check the template"))
    }
}

/// The text of a special token in `tokenizer_config.json`: a string, or an object with `content`.
pub(super) fn special_token(value: &serde_json::Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// A dict that keeps its order, as Python's do.
#[derive(Debug)]
struct Ordered(Vec<(String, Value)>);

impl Object for Ordered {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let key = key.as_str()?;
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.iter().map(|(k, _)| Value::from(k.as_str())).collect())
    }
}

fn ordered<K: Into<String>>(items: impl IntoIterator<Item = (K, Value)>) -> Value {
    Value::from_object(Ordered(items.into_iter().map(|(k, v)| (k.into(), v)).collect()))
}

fn from_json(value: serde_json::Value) -> Value {
    match value {
        serde_json::Value::Object(map) => ordered(map.into_iter().map(|(k, v)| (k, from_json(v)))),
        serde_json::Value::Array(items) => items.into_iter().map(from_json).collect(),
        other => Value::from_serialize(&other),
    }
}

struct CappedWriter(Vec<u8>);

impl io::Write for CappedWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other("the prompt is longer than 64 MiB"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Turns `{% generation %}` and `{% endgeneration %}`, which mark the assistant's tokens for training and render as
/// their contents, into an `if` that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let signs: &[char] = &['-', '+'];
        match tag[2..end].trim_matches(signs).trim() {
            "generation" => out.push_str(&tag[..end].replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag[..end].replacen("endgeneration", "endif", 1)),
            _ => out.push_str(&tag[..end]),
        }
        rest = &tag[end..];
    }
    out + rest
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    if ascii == Some(true) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson(ensure_ascii=true) is not supported"));
    }
    let mut out = String::new();
    write_json(&value, indent.map(|n| n.min(16)), 0, &mut out)?;
    Ok(Value::from_safe_string(out))
}

fn write_json(value: &Value, indent: Option<usize>, level: usize, out: &mut String) -> Result<(), Error> {
    if level > 100 {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the value is nested too deeply"));
    }
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let line = |out: &mut String, level: usize| {
        if let Some(n) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', n * level));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool | ValueKind::Number => {
            out.push_str(&serde_json::to_value(value).map_err(as_error)?.to_string())
        }
        ValueKind::String => out.push_str(&quoted(value.as_str().unwrap_or_default())),
        ValueKind::Map | ValueKind::Seq | ValueKind::Iterable => {
            let map = value.kind() == ValueKind::Map;
            out.push(if map { '{' } else { '[' });
            let mut empty = true;
            for item in value.try_iter()? {
                if !std::mem::take(&mut empty) {
                    out.push_str(comma);
                }
                line(out, level + 1);
                if map {
                    out.push_str(&quoted(&item.to_string()));
                    out.push_str(": ");
                    write_json(&value.get_item(&item)?, indent, level + 1, out)?;
                } else {
                    write_json(&item, indent, level + 1, out)?;
                }
            }
            if !empty {
                line(out, level);
            }
            out.push(if map { '}' } else { ']' });
        }
        kind => {
            return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} has no JSON form")));
        }
    }
    Ok(())
}

fn as_error(e: serde_json::Error) -> Error {
    Error::new(ErrorKind::BadSerialization, e.to_string())
}

#[cfg(test)]
#[path = "chat_tests.rs"]
mod tests;
