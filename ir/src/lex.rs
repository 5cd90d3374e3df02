//! Tokens of the text form.

use std::fmt;

/// One token.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Token<'a> {
    /// `func`, `matmul.t`, `bf16`, `fuse-norm`
    Word(&'a str),
    /// `@layer0`, without the sign.
    At(&'a str),
    /// `%x`, without the sign.
    Percent(&'a str),
    /// Digits with an optional sign.
    Int(i64),
    /// Anything else that reads as a number.
    Real(f64),
    /// A quoted string, still escaped.
    Str(&'a str),
    /// `{ } ( ) [ ] < > , : = ->`
    Punct(&'static str),
    /// End of text.
    End,
}

impl fmt::Display for Token<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Token::Word(w) => write!(f, "`{w}`"),
            Token::At(n) => write!(f, "`@{n}`"),
            Token::Percent(n) => write!(f, "`%{n}`"),
            Token::Int(n) => write!(f, "`{n}`"),
            Token::Real(x) => write!(f, "`{x}`"),
            Token::Str(s) => write!(f, "\"{s}\""),
            Token::Punct(p) => write!(f, "`{p}`"),
            Token::End => f.write_str("the end of the text"),
        }
    }
}

const PUNCT: [&str; 12] = ["->", "{", "}", "(", ")", "[", "]", "<", ">", ",", ":", "="];

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '/')
}

/// Splits text into tokens, one at a time. `//` starts a comment.
pub(crate) struct Lexer<'a> {
    rest: &'a str,
    /// Line of the token that comes next, from 1.
    pub(crate) line: usize,
}

impl<'a> Lexer<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Lexer { rest: text, line: 1 }
    }

    fn take(&mut self, bytes: usize) -> &'a str {
        let (head, rest) = self.rest.split_at(bytes);
        self.rest = rest;
        head
    }

    fn skip_blank(&mut self) {
        loop {
            let blank = self.rest.len() - self.rest.trim_start().len();
            let skipped = self.take(blank);
            self.line += skipped.matches('\n').count();
            if !self.rest.starts_with("//") {
                return;
            }
            let end = self.rest.find('\n').unwrap_or(self.rest.len());
            self.take(end);
        }
    }

    /// The next token.
    pub(crate) fn next(&mut self) -> Result<Token<'a>, String> {
        self.skip_blank();
        let Some(c) = self.rest.chars().next() else { return Ok(Token::End) };
        let name_len = |s: &str| s.find(|c| !is_name(c)).unwrap_or(s.len());
        if c == '@' || c == '%' {
            let n = name_len(&self.rest[1..]);
            if n == 0 {
                return Err(format!("`{c}` without a name after it"));
            }
            let name = &self.take(n + 1)[1..];
            return Ok(if c == '@' { Token::At(name) } else { Token::Percent(name) });
        }
        if c == '"' {
            let mut escaped = false;
            let end = self.rest[1..].find(|c| {
                let close = c == '"' && !escaped;
                escaped = c == '\\' && !escaped;
                close
            });
            let Some(end) = end else { return Err("a string that does not end".into()) };
            let body = &self.take(end + 2)[1..end + 1];
            self.line += body.matches('\n').count();
            return Ok(Token::Str(body));
        }
        if let Some(p) = PUNCT.iter().find(|p| self.rest.starts_with(**p)) {
            self.take(p.len());
            return Ok(Token::Punct(p));
        }
        if is_name(c) {
            let mut n = name_len(self.rest);
            // `1e+5` has a sign that names do not.
            if self.rest[n..].starts_with('+') && self.rest[..n].ends_with('e') && c.is_ascii_digit() {
                n += 1 + name_len(&self.rest[n + 1..]);
            }
            let word = self.take(n);
            let numeric = word.trim_start_matches('-').starts_with(|c: char| c.is_ascii_digit());
            if numeric || matches!(word, "inf" | "-inf" | "NaN") {
                if let Ok(i) = word.parse::<i64>() {
                    return Ok(Token::Int(i));
                }
                return word.parse::<f64>().map(Token::Real).map_err(|_| format!("`{word}` is no number"));
            }
            return Ok(Token::Word(word));
        }
        Err(format!("unexpected character `{}`", c.escape_default()))
    }
}
