//! `affine`: FlatQuant's learned transforms (methods.md §7.3). Each quantized edge of a layer gets an invertible transform
//! whose inverse its weights absorb; the layer with its quantizers is trained to give what the float layer gives.
//!
//! What is trained is the graph that will run: the transforms are inserted, placed by `place-transforms`, and the result
//! with its quantizers is differentiated.

mod init;
mod insert;
mod scope;
mod train;

use qrmc_ir::{Diag, FuncId, Module, Tensor};

use crate::calibrate::{LayerResult, LayerRun, Stream, walk_layers};
use crate::options::{CacheWidth, OptionType, OptionValue, Width, options, word_option};
use crate::parallel::check_tp;
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::pipeline::Call;
use crate::skip::Skip;
use crate::unit::Unit;

pub use scope::KroneckerPair;
use scope::Scope;
pub(crate) use scope::{Clips, Edges};

/// How a matrix is made of parameters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Form {
    /// The matrix is the parameter.
    Direct,
    /// `U diag(s) Vᵀ`, `U` and `V` orthogonal by Cayley's map.
    Svd,
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Form::Direct { "direct" } else { "svd" })
    }
}

word_option!(Form, "direct or svd", "direct" => Form::Direct, "svd" => Form::Svd);

/// Products of matrices in the steps of training, on a machine with a matrix unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Products {
    /// As everywhere else.
    F32,
    /// The engine's coarse ones.
    Split,
    /// The engine's coarse ones, and gradients of linear layers from factors rounded to bfloat16.
    Bf16,
}

impl std::fmt::Display for Products {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Products::F32 => "f32",
            Products::Split => "split",
            Products::Bf16 => "bf16",
        })
    }
}

word_option!(
    Products,
    "bf16, split or f32",
    "bf16" => Products::Bf16,
    "split" => Products::Split,
    "f32" => Products::F32
);

options! {
    /// Options of `affine`.
    struct AffineOptions {
        /// bits of a weight during training, one symmetric scale a row
        w: Width = Width(4),
        /// bits of the input of a linear layer during training
        a: Width = Width(4),
        /// signed codes without a zero point for activations during training
        a_sym: bool = false,
        /// bits of cached keys and values during training
        kv: CacheWidth = CacheWidth(4),
        /// linear layers with 8 bits, as in `annotate`: what they read gets no transform and no learned clip
        wide: Skip = Skip::default(),
        /// what gets a transform: every edge, the inputs behind norms and the feed-forward product, or those behind norms
        edges: Edges = Edges::All,
        /// learned clips of an activation: one for each end of its range, or one for both
        clips: Clips = Clips::Two,
        /// passes over the calibration text
        epochs: u32 = 15,
        /// windows in a step
        batch: u32 = 4,
        /// learning rate of transforms
        lr: f64 = 5e-3,
        /// learning rate of clips
        clip_lr: f64 = 5e-2,
        /// how matrices are made of parameters: themselves, or rotations and singular values
        form: Form = Form::Direct,
        /// scale of each channel beside the matrices
        diag: bool = true,
        /// share of the activations' range in the first scales
        alpha: f64 = 0.3,
        /// seed of the first matrices
        seed: u32 = 0,
        /// move what needs not stay online into weights (the published code's reparameterization)
        fold: bool = true,
        /// on a machine with a matrix unit: split products (2^-15), these with gradients from bf16 factors, or all in f32
        products: Products = Products::Bf16,
        /// ranks of tensor parallelism: no transform mixes channels of two ranks
        tp: u32 = 1,
        /// layers that stay as they are
        skip: Skip = Skip::default(),
    }
}

/// The pass.
pub(crate) struct Affine(pub(crate) AffineOptions);

impl Pass for Affine {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "affine",
            summary: "train invertible transforms and clips around the quantized edges of each layer (FlatQuant)",
            preserves: Preserves::Within(1e-4),
            accepts: (Stage::Float, Stage::Float),
            calibrates: true,
            transforms: true,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn legal(&self, module: &Module) -> Result<(), Diag> {
        let o = &self.0;
        check_tp(&module.facts, o.tp)?;
        o.skip.on(module)?;
        let bad = |what: String, hint: &str| Err(Diag::new("Q0602", format!("`affine`: {what}")).hint(hint));
        if o.batch == 0 || o.epochs == 0 {
            return bad(format!("{} windows a step, {} epochs", o.batch, o.epochs), "4 and 15 are published");
        }
        for (name, rate) in [("lr", o.lr), ("clip_lr", o.clip_lr)] {
            if !(rate > 0.0 && rate < 1.0) {
                return bad(format!("{name} is {rate}"), "a learning rate is above 0 and below 1");
            }
        }
        if !(0.0..=1.0).contains(&o.alpha) {
            return bad(format!("alpha is {}", o.alpha), "from 0 to 1; 0.3 is published");
        }
        o.wide.matching(module, "wide")?;
        scope::pairs(module, o).map(drop)
    }

    fn run(&self, unit: &mut Unit, cx: &mut PassCx<'_>) -> Result<(), PassError> {
        let o = &self.0;
        let skip = o.skip.on(&unit.module)?;
        let name = self.call().to_string();
        let mut work = |unit: &Unit, cx: &mut PassCx<'_>, run: &LayerRun<'_>| {
            if skip.layer(run.index) || Scope::of(&unit.module, run.func, o)?.is_empty() {
                let next = crate::calibrate::observe(unit, cx, run, &[])?.1;
                return Ok((LayerResult::new(), next));
            }
            // The random numbers of a layer come after those of the layers before it.
            let before = (0..run.index).filter(|i| !skip.layer(*i)).count();
            train::layer(o, unit, cx, run, before)
        };
        let apply = |unit: &mut Unit, func: FuncId, result: LayerResult| -> Result<(), PassError> {
            if result.is_empty() {
                return Ok(());
            }
            insert::layer(unit, func, o, &|name| find(&result, name))?;
            Ok(())
        };
        walk_layers(unit, cx, (&name, Stream::Before), &mut work, &mut |u, f, r, _| apply(u, f, r))
    }
}

/// The Kronecker pairs that a call of `affine` trains on a module; none for another pass.
///
/// # Errors
/// If the call has other options, or the pass does not fit the module.
pub fn kronecker_pairs(call: &Call, module: &Module) -> Result<Vec<KroneckerPair>, Diag> {
    if call.name != "affine" {
        return Ok(Vec::new());
    }
    let o = AffineOptions::read(&call.options);
    scope::pairs(module, &o.map_err(|e| Diag::new("Q0602", format!("`affine`: {e}")))?)
}

/// A tensor of a layer's result.
fn find(result: &LayerResult, name: &str) -> Option<Tensor> {
    result.iter().find(|(n, _)| n == name).map(|(_, t)| t.clone())
}
