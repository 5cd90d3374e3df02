//! Pipeline text: `name{key=value,..},name` or, safe in any shell, `name:key=value,..`.

use std::fmt;

use crate::options::{OptionValue, is_word_char};

/// One pass or preset with its options, as written.
#[derive(Clone, PartialEq, Debug)]
pub struct Call {
    /// Name; `_` is read as `-`.
    pub name: String,
    /// Options in the order given.
    pub options: Vec<(String, OptionValue)>,
}

/// A list of calls.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Pipeline(pub Vec<Call>);

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if self.options.is_empty() {
            return Ok(());
        }
        f.write_str("{")?;
        for (i, (k, v)) in self.options.iter().enumerate() {
            write!(f, "{}{k}={v}", if i > 0 { "," } else { "" })?;
        }
        f.write_str("}")
    }
}

impl fmt::Display for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, c) in self.0.iter().enumerate() {
            write!(f, "{}{c}", if i > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

/// Text that is no pipeline: where, and what was expected.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("pipeline `{text}`, at character {at}: {what}")]
pub struct PipelineSyntax {
    /// The whole text.
    pub text: String,
    /// Character, from 1.
    pub at: usize,
    /// What was expected.
    pub what: String,
}

/// Reads pipeline text.
///
/// # Errors
/// Where the text stops being a pipeline.
pub fn parse_pipeline(text: &str) -> Result<Pipeline, PipelineSyntax> {
    let mut p = Parser { text, at: 0 };
    let calls = p.pipeline().map_err(|what| PipelineSyntax {
        text: text.to_owned(),
        at: text[..p.at].chars().count() + 1,
        what,
    })?;
    Ok(Pipeline(calls))
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn peek(&mut self) -> Option<char> {
        let rest = &self.text[self.at..];
        let trimmed = rest.trim_start();
        self.at += rest.len() - trimmed.len();
        trimmed.chars().next()
    }

    fn eat(&mut self, c: char) -> bool {
        let yes = self.peek() == Some(c);
        if yes {
            self.at += c.len_utf8();
        }
        yes
    }

    fn word(&mut self, what: &str) -> Result<String, String> {
        self.peek();
        let rest = &self.text[self.at..];
        let n = rest.find(|c: char| !is_word_char(c)).unwrap_or(rest.len());
        if n == 0 {
            return Err(match rest.chars().next() {
                Some(c) => format!("expected {what}, found `{c}`"),
                None => format!("expected {what}, found the end"),
            });
        }
        self.at += n;
        Ok(rest[..n].to_owned())
    }

    fn pipeline(&mut self) -> Result<Vec<Call>, String> {
        let mut calls = Vec::new();
        loop {
            calls.push(self.call()?);
            if self.peek().is_none() {
                return Ok(calls);
            }
            if !self.eat(',') {
                return Err("expected `,` or the end".into());
            }
        }
    }

    fn call(&mut self) -> Result<Call, String> {
        let name = self.word("the name of a pass")?.replace('_', "-");
        let mut options = Vec::new();
        if self.eat('{') {
            while !self.eat('}') {
                if !options.is_empty() && !self.eat(',') {
                    return Err("expected `,` or `}`".into());
                }
                options.append(&mut self.option()?);
            }
        } else if self.eat(':') {
            // Without braces the options run to the end: the form that no shell expands.
            loop {
                options.append(&mut self.option()?);
                if !self.eat(',') {
                    break;
                }
            }
        } else if self.peek() == Some('=') {
            return Err(format!(
                "`{name}` looks like a name and an option in one: did your shell expand the braces? Quote the argument, or write `pass:key=value`"
            ));
        }
        Ok(Call { name, options })
    }

    fn option(&mut self) -> Result<Vec<(String, OptionValue)>, String> {
        let key = self.word("the name of an option")?;
        if !self.eat('=') {
            // `w4a4kv4` stands for its three widths.
            return scheme(&key).ok_or_else(|| format!("option `{key}` has no value: write `{key}=..`"));
        }
        Ok(vec![(key, self.value()?)])
    }

    fn value(&mut self) -> Result<OptionValue, String> {
        if self.eat('[') {
            let mut items = Vec::new();
            while !self.eat(']') {
                if !items.is_empty() && !self.eat(',') {
                    return Err("expected `,` or `]`".into());
                }
                items.push(self.value()?);
            }
            return Ok(OptionValue::List(items));
        }
        if self.eat('"') {
            let rest = &self.text[self.at..];
            let Some(n) = rest.find('"') else { return Err("a string that does not end".into()) };
            self.at += n + 1;
            return Ok(OptionValue::Word(rest[..n].to_owned()));
        }
        let w = self.word("a value")?;
        Ok(if w.parse::<f64>().is_ok() { OptionValue::Number(w) } else { OptionValue::Word(w) })
    }
}

/// `w4a4kv4`: widths without their signs of equality.
fn scheme(word: &str) -> Option<Vec<(String, OptionValue)>> {
    let mut rest = word;
    let mut out = Vec::new();
    while !rest.is_empty() {
        let (key, tail) = rest.split_at(rest.find(|c: char| c.is_ascii_digit())?);
        let (n, tail) = tail.split_at(tail.find(|c: char| !c.is_ascii_digit()).unwrap_or(tail.len()));
        if !matches!(key, "w" | "a" | "kv") {
            return None;
        }
        out.push((key.to_owned(), OptionValue::Number(n.to_owned())));
        rest = tail;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_form_reads_back() {
        for (text, normal) in [
            ("rtn", "rtn"),
            ("awq{bits=4,group=64}", "awq{bits=4,group=64}"),
            ("awq:bits=4,group=64", "awq{bits=4,group=64}"),
            (" place_transforms , rtn{ bits = 3 }", "place-transforms,rtn{bits=3}"),
            ("clip-search{skip=[q_proj,k_proj]}", "clip-search{skip=[q_proj,k_proj]}"),
            ("rtn{w4}", "rtn{w=4}"),
            ("x{w4a4kv4}", "x{w=4,a=4,kv=4}"),
            ("x{s=\"a b\",t=[\"4\",c]}", "x{s=\"a b\",t=[\"4\",c]}"),
            ("x{a=-1,b=0.5,c=\"layer.3\"}", "x{a=-1,b=0.5,c=layer.3}"),
        ] {
            let p = parse_pipeline(text).unwrap();
            assert_eq!(p.to_string(), normal);
            assert_eq!(parse_pipeline(normal).unwrap(), p);
        }
    }

    #[test]
    fn errors_name_the_place() {
        for (text, at, what) in [
            ("", 1, "the name of a pass"),
            ("rtn,", 5, "the name of a pass"),
            ("rtn{bits}", 9, "has no value"),
            ("rtn{bits=4", 11, "`,` or `}`"),
            ("rtnbits=4", 8, "expand the braces"),
        ] {
            let e = parse_pipeline(text).unwrap_err();
            assert_eq!(e.at, at, "{e}");
            assert!(e.what.contains(what), "{e}");
        }
    }
}
