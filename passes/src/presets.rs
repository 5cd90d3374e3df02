//! Presets: named pipelines with a method's published defaults.

mod activations;
mod weights;

use activations::{FlatquantPreset, KvquantPreset, QuarotKvPreset, QuarotPreset, SmoothquantPreset};
use weights::{AwqPreset, GptqPreset, RtnPreset};

use crate::options::{OptionError, OptionInfo, OptionValue};
use crate::pipeline::{Call, Pipeline};
use crate::place::PlaceOptions;
use crate::registry::{CallError, call_error, find, unknown_pass};

type Given = [(String, OptionValue)];

/// A named pipeline.
pub struct Preset {
    /// Name.
    pub name: &'static str,
    /// One line of help.
    pub summary: &'static str,
    /// Its options.
    pub options: fn() -> Vec<OptionInfo>,
    expand: fn(&Given) -> Result<Vec<Call>, OptionError>,
}

macro_rules! preset {
    ($name:literal, $options:ident, $summary:literal) => {
        Preset {
            name: $name,
            summary: $summary,
            options: $options::info,
            expand: |given| $options::read(given).map(|o| o.expand()),
        }
    };
}

/// All presets.
pub const PRESETS: [Preset; 8] = [
    preset!("rtn", RtnPreset, "rounding to nearest, zero in the range (methods.md §1.2)"),
    preset!(
        "awq",
        AwqPreset,
        "AWQ: searched scales folded away, searched clips, rounding to nearest (methods.md §3)"
    ),
    preset!(
        "gptq",
        GptqPreset,
        "GPTQ: clipped by squared error, columns with large inputs first (methods.md §4)"
    ),
    preset!(
        "kvquant",
        KvquantPreset,
        "KVQuant*: static keys before their positions, dynamic values (methods.md §6.1)"
    ),
    preset!(
        "quarot-kv",
        QuarotKvPreset,
        "QuaRot-KV: caches only, keys rotated within heads (methods.md §6.2)"
    ),
    preset!(
        "smoothquant",
        SmoothquantPreset,
        "SmoothQuant: smoothing scales folded away, GPTQ (methods.md §5)"
    ),
    preset!(
        "quarot",
        QuarotPreset,
        "QuaRot: rotations, GPTQ, clipped activations and caches (methods.md §7.2)"
    ),
    preset!(
        "flatquant",
        FlatquantPreset,
        "FlatQuant: learned affine transforms and clips, rounding to nearest (methods.md §7.3)"
    ),
];

fn call(name: &str, options: Vec<(String, OptionValue)>) -> Call {
    Call { name: name.to_owned(), options }
}

/// Replaces presets by the passes they stand for, puts `place-transforms` behind passes that insert transforms, and
/// writes out every option of every pass. `tp` is the number of ranks where a call does not say.
///
/// `rtn` and `gptq` are both presets and passes: with a stage of annotation before them, the passes are meant.
///
/// # Errors
/// If a name or an option is unknown.
pub fn expand_presets(pipeline: &Pipeline, tp: u32) -> Result<Pipeline, CallError> {
    let mut out: Vec<Call> = Vec::new();
    for c in &pipeline.0 {
        let annotated = out.iter().any(|c| c.name == "annotate");
        let preset =
            PRESETS.iter().find(|p| p.name == c.name).filter(|_| !(annotated && find(&c.name).is_some()));
        let known = match (preset, find(&c.name)) {
            (Some(p), _) => (p.options)(),
            (None, Some(p)) => (p.options)(),
            (None, None) => return Err(unknown_pass(&c.name)),
        };
        let mut given = widths(&c.options, &known);
        if tp != 1 && known.iter().any(|o| o.name == "tp") && !given.iter().any(|(k, _)| k == "tp") {
            given.push(("tp".into(), OptionValue::Number(tp.to_string())));
        }
        match preset {
            Some(p) => out.extend((p.expand)(&given).map_err(|e| call_error(&c.name, &e, &known))?),
            None => out.push(Call { name: c.name.clone(), options: given }),
        }
    }
    let mut all: Vec<Call> = Vec::new();
    for (i, c) in out.iter().enumerate() {
        let pass = crate::build(c)?;
        all.push(pass.call());
        let placed = out.get(i + 1).is_some_and(|n| n.name == "place-transforms");
        let stays = pass.call().options.contains(&("fold".into(), OptionValue::Word("false".into())));
        if pass.info().transforms && !placed && !stays {
            all.push(call("place-transforms", PlaceOptions::default().write()));
        }
    }
    Ok(Pipeline(all))
}

/// `w` says the same as `bits` for a method that has no `w`.
fn widths(given: &Given, known: &[OptionInfo]) -> Vec<(String, OptionValue)> {
    let alias = |k: &String| k == "w" && !known.iter().any(|o| o.name == "w");
    given.iter().map(|(k, v)| (if alias(k) { "bits".to_owned() } else { k.clone() }, v.clone())).collect()
}
