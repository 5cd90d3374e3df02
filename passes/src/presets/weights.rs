//! Methods that quantize weights alone, or round plainly.

use qrmc_ir::{Rule, ScaleType};

use super::call;
use crate::annotate::AnnotateOptions;
use crate::clip_search::ClipSearchOptions;
use crate::gptq::GptqOptions;
use crate::options::{Bits, CacheWidth, Group, Width, options};
use crate::pipeline::Call;
use crate::rtn::RtnOptions;
use crate::scale::ScaleOptions;
use crate::skip::Skip;

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
        /// bits of the head's weight, rounded to nearest; its input stays float
        head: Width = Width(16),
        /// bits of the input of a linear layer
        a: Width = Width(16),
        /// bits of cached keys and values
        kv: CacheWidth = CacheWidth(16),
        /// ranks of tensor parallelism
        tp: u32 = 1,
        /// layers and linear layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

impl RtnPreset {
    pub(super) fn expand(&self) -> Vec<Call> {
        let annotate = AnnotateOptions {
            w: self.bits,
            group: self.group,
            sym: self.sym,
            rule: if self.mse { Rule::Mse } else { Rule::MinMax },
            scale: self.scale,
            head: self.head,
            a: self.a,
            kv: self.kv,
            tp: self.tp,
            skip: self.skip.clone(),
            ..AnnotateOptions::default()
        };
        let mut calls = vec![call("annotate", annotate.write())];
        if self.bits.quantized().or(self.head.quantized()).is_some() {
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
        /// bits of the head's weight, rounded to nearest; its input stays float
        head: Width = Width(16),
        /// ranks of tensor parallelism
        tp: u32 = 1,
        /// layers and linear layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

impl AwqPreset {
    pub(super) fn expand(&self) -> Vec<Call> {
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
            head: self.head,
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
        /// bits of the head's weight, rounded to nearest; its input stays float
        head: Width = Width(16),
        /// ranks of tensor parallelism
        tp: u32 = 1,
        /// layers and linear layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

impl GptqPreset {
    pub(super) fn expand(&self) -> Vec<Call> {
        let annotate = AnnotateOptions {
            w: Width(self.bits.0),
            group: self.group,
            sym: self.sym,
            rule: if self.mse { Rule::Mse } else { Rule::MinMax },
            scale: self.scale,
            head: self.head,
            tp: self.tp,
            skip: self.skip.clone(),
            ..AnnotateOptions::default()
        };
        let gptq = GptqOptions { order: self.order, damp: self.damp, ..GptqOptions::default() };
        vec![call("annotate", annotate.write()), call("gptq", gptq.write())]
    }
}
