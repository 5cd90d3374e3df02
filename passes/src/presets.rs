//! Presets: named pipelines with a method's published defaults.

use qrmc_ir::{Rule, ScaleType};

use crate::affine::{AffineOptions, Form};
use crate::annotate::AnnotateOptions;
use crate::clip_search::ClipSearchOptions;
use crate::gptq::GptqOptions;
use crate::options::{
    Bits, Group, OptionError, OptionInfo, OptionType, OptionValue, Width, options, word_option,
};
use crate::part_bias::PartBiasOptions;
use crate::pipeline::{Call, Pipeline};
use crate::place::PlaceOptions;
use crate::registry::{CallError, call_error, find, unknown_pass};
use crate::rotate::RotateOptions;
use crate::rtn::RtnOptions;
use crate::scale::ScaleOptions;
use crate::skip::Skip;
use crate::smooth::SmoothOptions;
use crate::static_keys::StaticKeysOptions;

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

options! {
    /// Options of the preset `rtn`.
    struct RtnPreset {
        /// bits of a weight
        bits: Width = Width(4),
        /// weights that share a scale
        group: Group = Group::Size(128),
        /// signed codes without a zero point
        sym: bool = false,
        /// clip search by squared error^1.2 of the weights (GPTQ's `mse`)
        mse: bool = false,
        /// type in which scales are stored
        scale: ScaleType = ScaleType::F32,
        /// bits of the input of a linear layer
        a: Width = Width(16),
        /// bits of cached keys and values
        kv: Width = Width(16),
        /// ranks of tensor parallelism
        tp: u32 = 1,
        /// layers and linear layers that stay as they are
        skip: Skip = Skip::default(),
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
            a: self.a,
            kv: self.kv,
            tp: self.tp,
            skip: self.skip.clone(),
            ..AnnotateOptions::default()
        };
        let mut calls = vec![call("annotate", annotate.write())];
        if self.bits.quantized().is_some() {
            calls.push(call("rtn", RtnOptions {}.write()));
        }
        calls
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
        /// ranks of tensor parallelism
        tp: u32 = 1,
        /// layers and linear layers that stay as they are
        skip: Skip = Skip::default(),
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
                skip: self.skip.clone(),
                ..ScaleOptions::default()
            };
            calls.push(call("scale", search.write()));
        }
        let annotate = AnnotateOptions {
            w: Width(self.bits.0),
            group: self.group,
            sym: self.sym,
            rule: Rule::Awq,
            scale: self.scale,
            tp: self.tp,
            skip: self.skip.clone(),
            ..AnnotateOptions::default()
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
        /// ranks of tensor parallelism
        tp: u32 = 1,
        /// layers and linear layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

impl GptqPreset {
    fn expand(&self) -> Vec<Call> {
        let annotate = AnnotateOptions {
            w: Width(self.bits.0),
            group: self.group,
            sym: self.sym,
            rule: if self.mse { Rule::Mse } else { Rule::MinMax },
            scale: self.scale,
            tp: self.tp,
            skip: self.skip.clone(),
            ..AnnotateOptions::default()
        };
        let gptq = GptqOptions { order: self.order, damp: self.damp, ..GptqOptions::default() };
        vec![call("annotate", annotate.write()), call("gptq", gptq.write())]
    }
}

options! {
    /// Options of the preset `kvquant`.
    struct KvquantPreset {
        /// bits of cached keys and values
        bits: Bits = Bits(4),
        /// keep the bias of the key projection out of the cache
        pre_bias: bool = true,
        /// layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

impl KvquantPreset {
    fn expand(&self) -> Vec<Call> {
        let keys = StaticKeysOptions { bits: self.bits, pre_bias: self.pre_bias, skip: self.skip.clone() };
        let values = AnnotateOptions {
            w: Width(16),
            kv: Width(self.bits.0),
            keys: false,
            skip: self.skip.clone(),
            ..AnnotateOptions::default()
        };
        vec![call("static-keys", keys.write()), call("annotate", values.write())]
    }
}

/// What to do with the bias of the keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum KeyBias {
    /// It is rotated and quantized with the keys.
    Plain,
    /// It is added behind the quantizer.
    Aware,
}

impl std::fmt::Display for KeyBias {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == KeyBias::Plain { "plain" } else { "aware" })
    }
}

word_option!(KeyBias, "plain or aware", "plain" => KeyBias::Plain, "aware" => KeyBias::Aware);

options! {
    /// Options of the preset `quarot-kv`.
    struct QuarotKvPreset {
        /// bits of cached keys and values
        bits: Bits = Bits(4),
        /// factor on the ranges
        clip: f64 = 0.95,
        /// what becomes of the bias of the keys: quantized with them as published, or added behind
        bias: KeyBias = KeyBias::Plain,
        /// layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

impl QuarotKvPreset {
    fn expand(&self) -> Vec<Call> {
        let rotate = RotateOptions {
            residual: false,
            heads: false,
            down: false,
            skip: self.skip.clone(),
            ..RotateOptions::default()
        };
        let annotate = AnnotateOptions {
            w: Width(16),
            kv: Width(self.bits.0),
            kv_clip: self.clip,
            skip: self.skip.clone(),
            ..AnnotateOptions::default()
        };
        let mut calls = vec![call("rotate", rotate.write())];
        if self.bias == KeyBias::Aware {
            calls.push(call("part-bias", PartBiasOptions { skip: self.skip.clone() }.write()));
        }
        calls.push(call("annotate", annotate.write()));
        calls
    }
}

options! {
    /// Options of the preset `smoothquant`.
    struct SmoothquantPreset {
        /// how much range moves from activations into weights
        alpha: f64 = 0.85,
        /// bits of a weight
        w: Width = Width(8),
        /// bits of the input of a linear layer
        a: Width = Width(8),
        /// bits of cached keys and values
        kv: Width = Width(8),
        /// ranks of tensor parallelism
        tp: u32 = 1,
        /// layers and linear layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

/// Weights with one symmetric scale a row and clip search, rounded by GPTQ without an order of columns.
fn rows(annotate: AnnotateOptions) -> Vec<Call> {
    let annotate = AnnotateOptions { group: Group::Row, sym: true, rule: Rule::Mse, ..annotate };
    let mut calls = vec![call("annotate", annotate.write())];
    if annotate.w.quantized().is_some() {
        calls.push(call("gptq", vec![]));
    }
    calls
}

impl SmoothquantPreset {
    fn expand(&self) -> Vec<Call> {
        let smooth = SmoothOptions { alpha: self.alpha, skip: self.skip.clone() };
        let annotate = AnnotateOptions {
            w: self.w,
            a: self.a,
            kv: self.kv,
            tp: self.tp,
            skip: self.skip.clone(),
            ..AnnotateOptions::default()
        };
        let mut calls = vec![call("smooth", smooth.write())];
        calls.extend(rows(annotate));
        calls
    }
}

options! {
    /// Options of the preset `quarot`.
    struct QuarotPreset {
        /// bits of a weight
        w: Width = Width(4),
        /// bits of the input of a linear layer
        a: Width = Width(4),
        /// bits of cached keys and values
        kv: Width = Width(4),
        /// factor on the range of activations
        a_clip: f64 = 0.9,
        /// factor on the range of cached keys and values
        kv_clip: f64 = 0.95,
        /// seed of the signs of the residual rotation
        seed: u32 = 0,
        /// ranks of tensor parallelism
        tp: u32 = 1,
        /// layers and linear layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

impl QuarotPreset {
    fn expand(&self) -> Vec<Call> {
        let rotate = RotateOptions { seed: self.seed, tp: self.tp, ..RotateOptions::default() };
        let annotate = AnnotateOptions {
            w: self.w,
            a: self.a,
            a_clip: self.a_clip,
            kv: self.kv,
            kv_clip: self.kv_clip,
            tp: self.tp,
            skip: self.skip.clone(),
            ..AnnotateOptions::default()
        };
        let mut calls = vec![call("rotate", rotate.write())];
        calls.extend(rows(annotate));
        calls
    }
}

options! {
    /// Options of the preset `flatquant`.
    struct FlatquantPreset {
        /// bits of a weight
        w: Width = Width(4),
        /// bits of the input of a linear layer
        a: Width = Width(4),
        /// bits of cached keys and values
        kv: Width = Width(4),
        /// passes over the calibration text
        epochs: u32 = 15,
        /// windows in a step
        batch: u32 = 4,
        /// learning rate of transforms; that of clips is ten times as high
        lr: f64 = 5e-3,
        /// how matrices are made of parameters
        form: Form = Form::Direct,
        /// seed of the first matrices
        seed: u32 = 0,
        /// move what needs not stay online into weights; the function is the same without
        fold: bool = true,
        /// ranks of tensor parallelism
        tp: u32 = 1,
        /// layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

impl FlatquantPreset {
    fn expand(&self) -> Vec<Call> {
        let affine = AffineOptions {
            w: self.w,
            a: self.a,
            kv: self.kv,
            epochs: self.epochs,
            batch: self.batch,
            lr: self.lr,
            clip_lr: 10.0 * self.lr,
            form: self.form,
            seed: self.seed,
            fold: self.fold,
            tp: self.tp,
            skip: self.skip.clone(),
            ..AffineOptions::default()
        };
        let annotate = AnnotateOptions {
            w: self.w,
            group: Group::Row,
            sym: true,
            a: self.a,
            kv: self.kv,
            tp: self.tp,
            skip: self.skip.clone(),
            ..AnnotateOptions::default()
        };
        let mut calls = vec![call("affine", affine.write()), call("annotate", annotate.write())];
        if self.w.quantized().is_some() {
            calls.push(call("rtn", RtnOptions {}.write()));
        }
        calls
    }
}

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
