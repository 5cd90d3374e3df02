//! Methods that quantize caches, or weights, activations and caches.

use qrmc_ir::{Rule, ScaleType};

use super::call;
use crate::affine::{AffineOptions, Clips, Edges, Form};
use crate::annotate::AnnotateOptions;
use crate::options::{CacheBits, CacheWidth, Group, OptionType, OptionValue, Width, options, word_option};
use crate::part_bias::PartBiasOptions;
use crate::pipeline::Call;
use crate::rotate::RotateOptions;
use crate::rtn::RtnOptions;
use crate::skip::Skip;
use crate::smooth::SmoothOptions;
use crate::static_keys::StaticKeysOptions;

options! {
    /// Options of the preset `kvquant`.
    struct KvquantPreset {
        /// bits of cached keys and values
        bits: CacheBits = CacheBits(4),
        /// keep the bias of the key projection out of the cache
        pre_bias: bool = true,
        /// layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

impl KvquantPreset {
    pub(super) fn expand(&self) -> Vec<Call> {
        let keys = StaticKeysOptions { bits: self.bits, pre_bias: self.pre_bias, skip: self.skip.clone() };
        let values = AnnotateOptions {
            w: Width(16),
            kv: CacheWidth(self.bits.0),
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
        bits: CacheBits = CacheBits(4),
        /// factor on the ranges
        clip: f64 = 0.95,
        /// what becomes of the bias of the keys: quantized with them as published, or added behind
        bias: KeyBias = KeyBias::Plain,
        /// layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

impl QuarotKvPreset {
    pub(super) fn expand(&self) -> Vec<Call> {
        let rotate = RotateOptions {
            residual: false,
            heads: false,
            down: false,
            skip: self.skip.clone(),
            ..RotateOptions::default()
        };
        let annotate = AnnotateOptions {
            w: Width(16),
            kv: CacheWidth(self.bits.0),
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
        /// bits of the head's weight, rounded to nearest; its input stays float
        head: Width = Width(16),
        /// bits of the input of a linear layer
        a: Width = Width(8),
        /// bits of cached keys and values
        kv: CacheWidth = CacheWidth(8),
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
    match (annotate.w.quantized(), annotate.head.quantized()) {
        (Some(_), _) => calls.push(call("gptq", vec![])),
        (None, Some(_)) => calls.push(call("rtn", RtnOptions {}.write())),
        (None, None) => {}
    }
    calls
}

impl SmoothquantPreset {
    pub(super) fn expand(&self) -> Vec<Call> {
        let smooth = SmoothOptions { alpha: self.alpha, skip: self.skip.clone() };
        let annotate = AnnotateOptions {
            w: self.w,
            head: self.head,
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
        /// bits of the head's weight, rounded to nearest; its input stays float
        head: Width = Width(16),
        /// bits of the input of a linear layer
        a: Width = Width(4),
        /// bits of cached keys and values
        kv: CacheWidth = CacheWidth(4),
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
    pub(super) fn expand(&self) -> Vec<Call> {
        let rotate = RotateOptions { seed: self.seed, tp: self.tp, ..RotateOptions::default() };
        let annotate = AnnotateOptions {
            w: self.w,
            head: self.head,
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
        /// bits of the head's weight, rounded to nearest; its input stays float
        head: Width = Width(16),
        /// bits of the input of a linear layer
        a: Width = Width(4),
        /// signed codes without a zero point for activations
        a_sym: bool = false,
        /// bits of cached keys and values
        kv: CacheWidth = CacheWidth(4),
        /// type in which scales of weights are stored
        scale: ScaleType = ScaleType::F32,
        /// linear layers with weights and inputs of 8 bits, without transform and clip
        wide: Skip = Skip::default(),
        /// what gets a transform: every edge, the inputs behind norms and the feed-forward product, or those behind norms
        edges: Edges = Edges::All,
        /// learned clips of an activation: one for each end of its range, or one for both
        clips: Clips = Clips::Two,
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
    pub(super) fn expand(&self) -> Vec<Call> {
        let affine = AffineOptions {
            w: self.w,
            a: self.a,
            a_sym: self.a_sym,
            kv: self.kv,
            wide: self.wide.clone(),
            edges: self.edges,
            clips: self.clips,
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
            head: self.head,
            group: Group::Row,
            sym: true,
            scale: self.scale,
            a: self.a,
            a_sym: self.a_sym,
            kv: self.kv,
            tp: self.tp,
            wide: self.wide.clone(),
            skip: self.skip.clone(),
            ..AnnotateOptions::default()
        };
        let mut calls = vec![call("affine", affine.write()), call("annotate", annotate.write())];
        let weights = self.w.quantized().or(self.head.quantized()).is_some() || self.wide != Skip::default();
        if weights {
            calls.push(call("rtn", RtnOptions {}.write()));
        }
        calls
    }
}
