//! The text form, in.

mod types;

use std::collections::HashMap;

use crate::build::Builder;
use crate::diag::{Diag, Place};
use crate::lex::{Lexer, Token};
use crate::module::{ModelFacts, Module, ValueId};
use crate::op::Op;
use crate::print::VERSION;
use crate::types::TensorType;

/// Reads a module from its text form.
///
/// # Errors
/// The first fault, with its line. Types are checked while reading; [`crate::verify`] checks the rest.
pub fn parse(text: &str) -> Result<Module, Diag> {
    let mut p = Parser { lex: Lexer::new(text), token: Token::End, line: 1 };
    p.advance()?;
    p.module()
}

/// Reads a tensor type such as `bf16[4096, 256]`.
///
/// # Errors
/// If the text is no type or goes on after it.
pub fn parse_type(text: &str) -> Result<TensorType, Diag> {
    let mut p = Parser { lex: Lexer::new(text), token: Token::End, line: 1 };
    p.advance()?;
    let ty = p.ty()?;
    if p.token != Token::End {
        return p.unexpected("the end of the type");
    }
    Ok(ty)
}

struct Parser<'a> {
    lex: Lexer<'a>,
    token: Token<'a>,
    /// Line of `token`.
    line: usize,
}

type Parsed<T> = Result<T, Diag>;

impl<'a> Parser<'a> {
    fn fail<T>(&self, code: &'static str, message: impl Into<String>) -> Parsed<T> {
        Err(Diag::new(code, message).at(Place { line: Some(self.line), ..Place::default() }))
    }

    fn unexpected<T>(&self, want: &str) -> Parsed<T> {
        self.fail("Q0001", format!("expected {want}, found {}", self.token))
    }

    fn advance(&mut self) -> Parsed<Token<'a>> {
        let next = self.lex.next();
        let line = self.lex.line;
        match next {
            Ok(t) => {
                self.line = line;
                Ok(std::mem::replace(&mut self.token, t))
            }
            Err(message) => {
                self.line = line;
                self.fail("Q0001", message)
            }
        }
    }

    fn eat(&mut self, p: &'static str) -> Parsed<bool> {
        let yes = self.token == Token::Punct(p);
        if yes {
            self.advance()?;
        }
        Ok(yes)
    }

    fn expect(&mut self, p: &'static str) -> Parsed<()> {
        if self.eat(p)? { Ok(()) } else { self.unexpected(&format!("`{p}`")) }
    }

    fn word(&mut self, want: &str) -> Parsed<&'a str> {
        match self.token {
            Token::Word(w) => {
                self.advance()?;
                Ok(w)
            }
            _ => self.unexpected(want),
        }
    }

    fn keyword(&mut self, w: &str) -> Parsed<bool> {
        let yes = self.token == Token::Word(w);
        if yes {
            self.advance()?;
        }
        Ok(yes)
    }

    fn at(&mut self, want: &str) -> Parsed<&'a str> {
        match self.token {
            Token::At(n) => {
                self.advance()?;
                Ok(n)
            }
            _ => self.unexpected(want),
        }
    }

    fn count(&mut self, want: &str) -> Parsed<u64> {
        match self.token {
            Token::Int(n) if n >= 0 => {
                self.advance()?;
                Ok(n as u64)
            }
            _ => self.unexpected(want),
        }
    }

    /// Items up to `close`, which the caller has not seen yet.
    fn list<T>(
        &mut self,
        close: &'static str,
        mut item: impl FnMut(&mut Self) -> Parsed<T>,
    ) -> Parsed<Vec<T>> {
        let mut items = Vec::new();
        while !self.eat(close)? {
            if !items.is_empty() {
                self.expect(",")?;
            }
            items.push(item(self)?);
        }
        Ok(items)
    }

    fn module(&mut self) -> Parsed<Module> {
        if !self.keyword("qir")? {
            return self.unexpected("`qir` and the version of the text form");
        }
        let version = self.count("a version")?;
        if version != u64::from(VERSION) {
            return self
                .fail("Q0002", format!("version {version} of the text form; this qrmc reads {VERSION}"));
        }
        let mut module = Module::default();
        loop {
            if self.keyword("fact")? {
                self.fact(&mut module.facts)?;
            } else if self.keyword("applied")? {
                module.history.push(self.string()?);
            } else if self.keyword("weight")? {
                let name = self.at("a weight name")?;
                self.expect(":")?;
                let ty = self.ty()?;
                if module.find_weight(name).is_some() {
                    return self.fail("Q0303", format!("weight @{name} is declared twice"));
                }
                if module.declare(name, ty).is_err() {
                    return self.fail("Q0303", format!("weight @{name} is declared twice"));
                }
            } else if self.keyword("func")? {
                let f = self.func(&module)?;
                module.funcs.push(f);
            } else if self.token == Token::End {
                return Ok(module);
            } else {
                return self.unexpected("`fact`, `applied`, `weight` or `func`");
            }
        }
    }

    fn string(&mut self) -> Parsed<String> {
        let Token::Str(body) = self.token else { return self.unexpected("a string") };
        let mut out = String::new();
        let mut chars = body.chars();
        while let Some(c) = chars.next() {
            match (c, c == '\\') {
                (_, true) => match chars.next() {
                    Some('n') => out.push('\n'),
                    Some('t') => out.push('\t'),
                    Some('r') => out.push('\r'),
                    Some(c @ ('"' | '\\' | '\'')) => out.push(c),
                    _ => return self.fail("Q0001", "an escape that is none of \\n \\t \\r \\\" \\\\"),
                },
                (c, _) => out.push(c),
            }
        }
        self.advance()?;
        Ok(out)
    }

    fn fact(&mut self, facts: &mut ModelFacts) -> Parsed<()> {
        let key = self.word("the name of a fact")?;
        self.expect("=")?;
        let slot = match key {
            "arch" => {
                facts.arch = self.word("an architecture")?.to_owned();
                return Ok(());
            }
            "eos" => {
                self.expect("[")?;
                let ids = self.list("]", |p| p.count("a token id"))?;
                facts.eos = ids.into_iter().map(|n| n as u32).collect();
                return Ok(());
            }
            "bos" => {
                facts.bos = Some(self.count("a token id")? as u32);
                return Ok(());
            }
            "hidden" => &mut facts.hidden,
            "intermediate" => &mut facts.intermediate,
            "layers" => &mut facts.layers,
            "heads" => &mut facts.heads,
            "kv_heads" => &mut facts.kv_heads,
            "head_dim" => &mut facts.head_dim,
            "vocab" => &mut facts.vocab,
            "context" => &mut facts.context,
            _ => return self.fail("Q0001", format!("`{key}` is no fact of a model")),
        };
        *slot = match self.token {
            Token::Int(n) if n >= 0 => n as u64,
            _ => return self.unexpected("a whole number"),
        };
        self.advance()?;
        Ok(())
    }

    fn func(&mut self, module: &Module) -> Parsed<crate::Func> {
        let name = self.at("a function name")?;
        if module.find_func(name).is_some() {
            return self.fail("Q0301", format!("function @{name} is defined twice"));
        }
        let mut b = Builder::new(module, name);
        let mut names: HashMap<&'a str, ValueId> = HashMap::new();
        self.expect("(")?;
        let params = self.list(")", |p| {
            let Token::Percent(n) = p.token else { return p.unexpected("a parameter such as `%x`") };
            p.advance()?;
            p.expect(":")?;
            Ok((n, p.ty()?))
        })?;
        for (n, ty) in params {
            let id = b.param(stable(n), ty);
            if names.insert(n, id).is_some() {
                return self.fail("Q0105", format!("%{n} is defined twice"));
            }
        }
        self.expect("->")?;
        self.expect("(")?;
        let declared = self.list(")", Self::ty)?;
        self.expect("{")?;
        loop {
            let line = self.line;
            if self.keyword("return")? {
                let results = self.operands(&mut b, &names, module)?;
                let have: Vec<TensorType> = results.iter().map(|&r| b.ty(r).clone()).collect();
                if have != declared {
                    let show =
                        |ts: &[TensorType]| ts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                    let m = format!("@{name} returns ({}), not ({})", show(&have), show(&declared));
                    let place = Place { line: Some(line), ..Place::default() };
                    return Err(Diag::new("Q0104", m).at(place));
                }
                self.expect("}")?;
                return Ok(b.finish(&results));
            }
            self.node(&mut b, &mut names, module)?;
        }
    }

    fn node(
        &mut self,
        b: &mut Builder<'_>,
        names: &mut HashMap<&'a str, ValueId>,
        module: &Module,
    ) -> Parsed<()> {
        let line = self.line;
        let mut outs = Vec::new();
        loop {
            let Token::Percent(n) = self.token else {
                return self.unexpected("a value such as `%y`, or `return`");
            };
            outs.push(n);
            self.advance()?;
            if !self.eat(",")? {
                break;
            }
        }
        self.expect("=")?;
        let word = self.word("an operation")?;
        let target = match (word, self.token) {
            ("call" | "weight", Token::At(n)) => {
                self.advance()?;
                Some(n)
            }
            _ => None,
        };
        let ins = match self.token {
            Token::Percent(_) | Token::At(_) => self.operands(b, names, module)?,
            _ => Vec::new(),
        };
        let mut attrs = Vec::new();
        if self.token == Token::Punct("{") {
            self.advance()?;
            attrs = self.list("}", |p| {
                let key = p.word("the name of an attribute")?.to_owned();
                p.expect("=")?;
                Ok((key, p.attr()?))
            })?;
        }
        let here = |code, m: String| Diag::new(code, m).at(Place { line: Some(line), ..Place::default() });
        let op = match (word, target) {
            ("call", Some(f)) => match module.find_func(f) {
                Some(id) => Op::Call(id),
                None => return Err(here("Q0302", format!("@{f} is called but not defined before this"))),
            },
            ("weight", Some(w)) => match module.find_weight(w) {
                Some(id) => Op::Weight(id),
                None => return Err(here("Q0107", format!("weight @{w} is not declared"))),
            },
            _ => Op::from_text(word, attrs).map_err(|m| here("Q0003", m))?,
        };
        let results = b.op(op, &ins).map_err(|mut d| {
            d.place.line = Some(line);
            d
        })?;
        if results.len() != outs.len() {
            let m = format!("`{word}` has {} results, {} are named", results.len(), outs.len());
            return Err(here("Q0102", m));
        }
        for (n, id) in outs.into_iter().zip(results) {
            if names.insert(n, id).is_some() {
                return Err(here("Q0105", format!("%{n} is defined twice")));
            }
            if let Some(n) = stable(n) {
                b.name(id, n);
            }
        }
        Ok(())
    }

    fn operands(
        &mut self,
        b: &mut Builder<'_>,
        names: &HashMap<&'a str, ValueId>,
        module: &Module,
    ) -> Parsed<Vec<ValueId>> {
        let mut ins = Vec::new();
        loop {
            ins.push(match self.token {
                Token::Percent(n) => match names.get(n) {
                    Some(&v) => v,
                    None => return self.fail("Q0101", format!("%{n} is used but not defined before this")),
                },
                Token::At(n) => match module.find_weight(n) {
                    Some(id) => b.weight(id),
                    None => return self.fail("Q0107", format!("weight @{n} is not declared")),
                },
                _ => return self.unexpected("a value"),
            });
            self.advance()?;
            if !self.eat(",")? {
                return Ok(ins);
            }
        }
    }
}

/// Numbers are not names: the printer gives them anew.
fn stable(name: &str) -> Option<&str> {
    Some(name).filter(|n| n.parse::<u64>().is_err())
}
