//! Presets: named pipelines with a method's published defaults.

use qrmc_ir::{Rule, ScaleType};

use crate::annotate::AnnotateOptions;
use crate::clip_search::ClipSearchOptions;
use crate::gptq::GptqOptions;
use crate::options::{Bits, Group, OptionError, OptionInfo, OptionValue, options};
use crate::pipeline::{Call, Pipeline};
use crate::place::PlaceOptions;
use crate::registry::{CallError, call_error, find, unknown_pass};
use crate::rtn::RtnOptions;
use crate::scale::ScaleOptions;

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

/// All presets.
pub const PRESETS: [Preset; 3] = [
    Preset {
        name: "rtn",
        summary: "weights rounded to nearest, zero in the range (methods.md §1.2)",
        options: RtnPreset::info,
        expand: |given| RtnPreset::read(given).map(|o| o.expand()),
    },
    Preset {
        name: "awq",
        summary: "AWQ: searched scales folded away, searched clips, rounding to nearest (methods.md §3)",
        options: AwqPreset::info,
        expand: |given| AwqPreset::read(given).map(|o| o.expand()),
    },
    Preset {
        name: "gptq",
        summary: "GPTQ: clipped by squared error, columns with large inputs first (methods.md §4)",
        options: GptqPreset::info,
        expand: |given| GptqPreset::read(given).map(|o| o.expand()),
    },
];

options! {
    /// Options of the preset `rtn`.
    struct RtnPreset {
        /// bits of a weight
        bits: Bits = Bits(4),
        /// weights that share a scale
        group: Group = Group::Size(128),
        /// signed codes without a zero point
        sym: bool = false,
        /// clip search by squared error^1.2 of the weights (GPTQ's `mse`)
        mse: bool = false,
        /// type in which scales are stored
        scale: ScaleType = ScaleType::F32,
    }
}

impl RtnPreset {
    fn expand(&self) -> Vec<Call> {
        let annotate = AnnotateOptions {
            w: self.bits,
            group: self.group,
            sym: self.sym,
            rule: if self.mse { Rule::Mse } else { Rule::MinMax },
            scale: self.scale,
        };
        vec![call("annotate", annotate.write()), call("rtn", RtnOptions {}.write())]
    }
}

options! {
    /// Options of the preset `awq`.
    struct AwqPreset {
        /// bits of a weight
        bits: Bits = Bits(4),
        /// weights that share a scale
        group: Group = Group::Size(128),
        /// signed codes without a zero point
        sym: bool = false,
        /// search scales
        scales: bool = true,
        /// search clips
        clips: bool = true,
        /// type in which scales are stored
        scale: ScaleType = ScaleType::F32,
    }
}

impl AwqPreset {
    fn expand(&self) -> Vec<Call> {
        let mut calls = Vec::new();
        if self.scales {
            let search = ScaleOptions {
                w: self.bits,
                group: self.group,
                sym: self.sym,
                scale: self.scale,
                ..ScaleOptions::default()
            };
            calls.push(call("scale", search.write()));
            calls.push(call("place-transforms", PlaceOptions::default().write()));
        }
        let annotate = AnnotateOptions {
            w: self.bits,
            group: self.group,
            sym: self.sym,
            rule: Rule::Awq,
            scale: self.scale,
        };
        calls.push(call("annotate", annotate.write()));
        if self.clips {
            calls.push(call("clip-search", ClipSearchOptions::default().write()));
        }
        calls.push(call("rtn", RtnOptions {}.write()));
        calls
    }
}

options! {
    /// Options of the preset `gptq`.
    struct GptqPreset {
        /// bits of a weight
        bits: Bits = Bits(4),
        /// weights that share a scale
        group: Group = Group::Size(128),
        /// signed codes without a zero point
        sym: bool = false,
        /// clip search by squared error^1.2 of the weights
        mse: bool = true,
        /// columns with large inputs first (act-order)
        order: bool = true,
        /// damping as a share of the mean square of the inputs
        damp: f64 = 0.01,
        /// type in which scales are stored
        scale: ScaleType = ScaleType::F32,
    }
}

impl GptqPreset {
    fn expand(&self) -> Vec<Call> {
        let annotate = AnnotateOptions {
            w: self.bits,
            group: self.group,
            sym: self.sym,
            rule: if self.mse { Rule::Mse } else { Rule::MinMax },
            scale: self.scale,
        };
        let gptq = GptqOptions { order: self.order, damp: self.damp, ..GptqOptions::default() };
        vec![call("annotate", annotate.write()), call("gptq", gptq.write())]
    }
}

fn call(name: &str, options: Vec<(String, OptionValue)>) -> Call {
    Call { name: name.to_owned(), options }
}

/// Replaces presets by the passes they stand for, every option of every pass written out.
///
/// `rtn` and `gptq` are names of both a preset and a pass: with a stage of annotation before it, the pass is meant.
///
/// # Errors
/// If a name or an option is unknown.
pub fn expand_presets(pipeline: &Pipeline) -> Result<Pipeline, CallError> {
    let mut out: Vec<Call> = Vec::new();
    for c in &pipeline.0 {
        let annotated = out.iter().any(|c| c.name == "annotate");
        let preset =
            PRESETS.iter().find(|p| p.name == c.name).filter(|_| !(annotated && find(&c.name).is_some()));
        match preset {
            Some(p) => {
                let options = widths(&c.options);
                let calls = (p.expand)(&options).map_err(|e| call_error(&c.name, &e, &(p.options)()))?;
                out.extend(calls);
            }
            None if find(&c.name).is_some() => out.push(crate::build(c)?.call()),
            None => return Err(unknown_pass(&c.name)),
        }
    }
    Ok(Pipeline(out))
}

/// `w` says the same as `bits` for a weight-only method.
fn widths(given: &Given) -> Vec<(String, OptionValue)> {
    given.iter().map(|(k, v)| (if k == "w" { "bits".to_owned() } else { k.clone() }, v.clone())).collect()
}
