//! Quantization methods as rewrites: transform, annotate, round.
//!
//! A pass sees execution only through [`qrmc_ir::Engine`] and names no target.

mod affine;
mod annotate;
mod calibrate;
mod check;
mod clip_search;
mod edges;
mod fuse_norm;
mod gptq;
mod grad;
mod manager;
mod options;
mod parallel;
mod part_bias;
mod pass;
mod pipeline;
mod place;
mod presets;
mod registry;
mod rotate;
mod rtn;
mod scale;
mod skip;
mod smooth;
mod static_caches;
mod static_inputs;
mod static_keys;
mod static_scales;
mod unit;

pub use affine::{KroneckerPair, kronecker_pairs};
pub use calibrate::{Calibration, LayerRun, NoStore, StepStore};
pub use check::{
    Gap, Sourced, compare_logits, compare_sourced, forward, logit_gap, seeded_input, seeded_tokens,
};
pub use manager::{Manager, PassReport, PipelineError, legal};
pub use options::{OptionInfo, OptionValue};
pub use pass::{Event, LayerLoss, Pass, PassCx, PassError, PassInfo, Preserves, Report, Stage};
pub use pipeline::{Call, Pipeline, parse_pipeline};
pub use place::place_transforms;
pub use presets::{PRESETS, Preset, expand_presets};
pub use registry::{PASSES, PassEntry, build, find};
pub use unit::{Overlay, Unit};
