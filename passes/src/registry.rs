//! Every pass, in one table. Help, documentation and `qrmc passes` are made from it.

use crate::affine::{Affine, AffineOptions};
use crate::annotate::{Annotate, AnnotateOptions};
use crate::clip_search::{ClipSearch, ClipSearchOptions};
use crate::fuse_norm::{FuseNorm, FuseNormOptions};
use crate::gptq::{Gptq, GptqOptions};
use crate::options::{OptionError, OptionInfo, OptionValue};
use crate::part_bias::{PartBias, PartBiasOptions};
use crate::pass::{Pass, PassInfo};
use crate::place::{Place, PlaceOptions};
use crate::rotate::{Rotate, RotateOptions};
use crate::rtn::{Rtn, RtnOptions};
use crate::scale::{Scale, ScaleOptions};
use crate::smooth::{Smooth, SmoothOptions};
use crate::static_caches::StaticCachesOptions;
use crate::static_inputs::StaticInputsOptions;
use crate::static_keys::StaticKeysOptions;
use crate::static_scales::StaticPass;

type Given = [(String, OptionValue)];

/// One pass.
pub struct PassEntry {
    make: fn(&Given) -> Result<Box<dyn Pass>, OptionError>,
    /// Its options.
    pub options: fn() -> Vec<OptionInfo>,
}

impl PassEntry {
    /// Facts about the pass.
    pub fn info(&self) -> PassInfo {
        match (self.make)(&[]) {
            Ok(p) => p.info(),
            Err(e) => unreachable!("every option has a default: {e}"),
        }
    }
}

macro_rules! entry {
    ($pass:ident, $options:ident) => {
        PassEntry { make: |given| Ok(Box::new($pass($options::read(given)?))), options: $options::info }
    };
}

/// All passes, in the order of the documentation.
pub const PASSES: [PassEntry; 14] = [
    entry!(FuseNorm, FuseNormOptions),
    entry!(Rotate, RotateOptions),
    entry!(Smooth, SmoothOptions),
    entry!(Scale, ScaleOptions),
    entry!(Affine, AffineOptions),
    entry!(Place, PlaceOptions),
    entry!(PartBias, PartBiasOptions),
    entry!(Annotate, AnnotateOptions),
    entry!(StaticPass, StaticInputsOptions),
    entry!(StaticPass, StaticKeysOptions),
    entry!(StaticPass, StaticCachesOptions),
    entry!(ClipSearch, ClipSearchOptions),
    entry!(Rtn, RtnOptions),
    entry!(Gptq, GptqOptions),
];

/// The pass of this name.
pub fn find(name: &str) -> Option<&'static PassEntry> {
    PASSES.iter().find(|p| p.info().name == name)
}

/// Names of all passes and presets, and the one nearest to a misspelt name.
fn nearest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names.map(|n| (distance(word, n), n)).filter(|(d, n)| *d <= 1 + n.len() / 3).min().map(|(_, n)| n)
}

/// Edit distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let next = (diagonal + usize::from(ca != *cb)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}

/// A call that names no pass, or an option that the pass does not take.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[error("{what}")]
pub struct CallError {
    /// What was seen.
    pub what: String,
    /// What to write instead.
    pub hint: Option<String>,
}

pub(crate) fn call_error(name: &str, e: &OptionError, options: &[OptionInfo]) -> CallError {
    let all = || {
        let list = options.iter().map(|o| o.name).collect::<Vec<_>>().join(", ");
        if list.is_empty() {
            format!("`{name}` takes no options")
        } else {
            format!("options of `{name}`: {list}")
        }
    };
    let hint = match e {
        OptionError::Unknown(o) => match nearest(o, options.iter().map(|o| o.name)) {
            Some(n) => format!("did you mean `{n}`? {}", all()),
            None => all(),
        },
        OptionError::Value { name, .. } => {
            options.iter().find(|o| o.name == *name).map_or_else(all, |o| format!("{}: {}", o.name, o.help))
        }
    };
    CallError { what: format!("`{name}`: {e}"), hint: Some(hint) }
}

pub(crate) fn unknown_pass(name: &str) -> CallError {
    let passes = PASSES.iter().map(|p| p.info().name);
    let names: Vec<&str> = passes.chain(crate::PRESETS.iter().map(|p| p.name)).collect();
    let hint = if let Some(glued) = names.iter().find(|n| name.starts_with(**n) && name.contains('=')) {
        format!(
            "did your shell expand the braces of `{glued}{{..}}`? quote the argument, or write `{glued}:key=value`"
        )
    } else {
        match nearest(name, names.iter().copied()) {
            Some(n) => format!("did you mean `{n}`? `qrmc passes` lists all"),
            None => "`qrmc passes` lists all".into(),
        }
    };
    CallError { what: format!("there is no pass or preset `{name}`"), hint: Some(hint) }
}

/// Makes the pass that a call names.
///
/// # Errors
/// If there is none of this name, or it does not take these options.
pub fn build(call: &crate::Call) -> Result<Box<dyn Pass>, CallError> {
    let entry = find(&call.name).ok_or_else(|| unknown_pass(&call.name))?;
    (entry.make)(&call.options).map_err(|e| call_error(&call.name, &e, &(entry.options)()))
}
