//! Which layers and linear layers a pass leaves alone.

use qrmc_ir::{Diag, Module};
use regex::Regex;

use crate::edges::{linears, role};
use crate::options::{OptionType, OptionValue};

/// Patterns: `last`, a layer's number, or a regular expression on the whole of `layer3`, `down_proj` or
/// `layer3.down_proj`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Skip(pub(crate) Vec<String>);

impl OptionType for Skip {
    const KIND: &'static str =
        "`none`, `last`, numbers of layers, or regular expressions such as layer1.* or down_proj";

    fn read(value: &OptionValue) -> Option<Self> {
        let word = |v: &OptionValue| match v {
            OptionValue::Word(w) | OptionValue::Number(w) => Some(w.clone()),
            OptionValue::List(_) => None,
        };
        let words = match value {
            OptionValue::Word(w) if w == "none" => vec![],
            OptionValue::List(v) => v.iter().map(word).collect::<Option<_>>()?,
            v => vec![word(v)?],
        };
        let skip = Skip(words);
        skip.compile().is_ok().then_some(skip)
    }

    fn write(&self) -> OptionValue {
        let value = |w: &String| match w.parse::<u32>() {
            Ok(_) => OptionValue::Number(w.clone()),
            Err(_) => OptionValue::Word(w.clone()),
        };
        match &self.0[..] {
            [] => OptionValue::Word("none".into()),
            [one] => value(one),
            many => OptionValue::List(many.iter().map(value).collect()),
        }
    }
}

impl Skip {
    fn compile(&self) -> Result<Vec<Regex>, regex::Error> {
        let words = self.0.iter().filter(|w| *w != "last" && w.parse::<u32>().is_err());
        words.map(|w| Regex::new(&format!("^(?:{w})$"))).collect()
    }

    /// The patterns on a module, whether they match or not.
    pub(crate) fn resolve(&self, module: &Module) -> Skipped {
        let mut layers = vec![false; module.layers().len()];
        for w in &self.0 {
            let at = if w == "last" { layers.len().checked_sub(1) } else { w.parse().ok() };
            at.and_then(|n: usize| layers.get_mut(n)).into_iter().for_each(|l| *l = true);
        }
        Skipped { layers, patterns: self.compile().unwrap_or_default() }
    }

    /// The patterns on a module, where what they match is skipped.
    ///
    /// # Errors
    /// As [`Skip::matching`], or if everything is skipped.
    pub(crate) fn on(&self, module: &Module) -> Result<Skipped, Diag> {
        let (s, layers) = (self.matching(module, "skip")?, module.layers());
        if !layers.is_empty() && (0..layers.len()).all(|i| s.layer(i)) {
            let m = "`skip` leaves no layer";
            return Err(Diag::new("Q0607", m).hint("leave the pass out instead"));
        }
        Ok(s)
    }

    /// The patterns of an option on a module.
    ///
    /// # Errors
    /// If a pattern matches nothing.
    pub(crate) fn matching(&self, module: &Module, option: &str) -> Result<Skipped, Diag> {
        let (s, layers) = (self.resolve(module), module.layers());
        let bad = |m: String, hint: String| Err(Diag::new("Q0607", m).hint(hint));
        let last = layers.len().saturating_sub(1);
        if let Some(n) = self.0.iter().filter_map(|w| w.parse::<usize>().ok()).find(|n| *n >= layers.len()) {
            return bad(format!("`{option}`: there is no layer {n}"), format!("layers are 0 to {last}"));
        }
        let roles: Vec<String> = layers.first().map_or(vec![], |&l| {
            let f = module.func(l);
            linears(f).iter().map(|l| role(module, f, l)).collect()
        });
        for p in &s.patterns {
            let in_layer = |i: usize| {
                let here = format!("layer{i}");
                p.is_match(&here) || roles.iter().any(|r| p.is_match(&format!("{here}.{r}")))
            };
            if !roles.iter().any(|r| p.is_match(r)) && !(0..layers.len()).any(in_layer) {
                let text = p.as_str().trim_start_matches("^(?:").trim_end_matches(")$").to_owned();
                let m = format!("`{option}`: `{text}` matches no layer and no linear layer");
                let hint = format!("layers are layer0 to layer{last}; linear layers: {}", roles.join(", "));
                return bad(m, hint);
            }
        }
        Ok(s)
    }
}

/// [`Skip`] on a module.
#[derive(Clone, Debug)]
pub(crate) struct Skipped {
    layers: Vec<bool>,
    patterns: Vec<Regex>,
}

impl Skipped {
    /// Whether a whole layer is left alone.
    pub(crate) fn layer(&self, index: usize) -> bool {
        self.layers.get(index).copied().unwrap_or(false)
            || self.patterns.iter().any(|p| p.is_match(&format!("layer{index}")))
    }

    /// Whether a linear layer is left alone.
    pub(crate) fn linear(&self, index: usize, role: &str) -> bool {
        self.layer(index)
            || self.patterns.iter().any(|p| p.is_match(role) || p.is_match(&format!("layer{index}.{role}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes() {
        let word = |w: &str| OptionValue::Word(w.into());
        for v in [word("none"), word("last"), word("layer1[0-9]"), OptionValue::Number("3".into())] {
            assert_eq!(Skip::read(&v).unwrap().write(), v);
        }
        let list = OptionValue::List(vec![OptionValue::Number("0".into()), word("last")]);
        assert_eq!(Skip::read(&list).unwrap().write(), list);
        assert!(Skip::read(&word("layer(")).is_none());
    }
}
