//! Kernels held against the reference interpreter, step by step on the same operands.

use std::collections::HashSet;

use qrmc_ir::{
    Data, Dim, EngineError, Module, NoWeights, Tensor, TensorType, WeightDecl, WeightSource, interp,
    structural_hash,
};
use qrmc_lowering::{Kernel, Step};

use crate::caches::{Caches, pages};
use crate::engine::{CpuEngine, Input, Loaded, Source, Watch};
use crate::session::{last_row, layer_caches, load_end};

/// How far a float result may be from the reference, relative to the largest magnitude of the result, or to the largest sum
/// of the magnitudes of what a product adds.
pub const BOUND: f64 = 2e-5;

/// Most channels of hidden states that are made up: a larger fact is not believed, and the run says what it wants.
const MOST_HIDDEN: u64 = 1 << 20;

/// Bytes of memory that the reference takes for each element of the operands of a step, about.
pub const REFERENCE_BYTES: u64 = 40;

/// What the steps of one kind gave.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct KindParity {
    /// Name of the kernel, without what its attributes are.
    pub kernel: String,
    /// Steps compared.
    pub steps: u64,
    /// Codes, zero points and the scales that go with them.
    pub integers: u64,
    /// How many of these differ from the reference.
    pub unequal: u64,
    /// The largest distance of a float from the reference, relative as [`BOUND`] says.
    pub gap: f64,
}

impl KindParity {
    fn holds(&self) -> bool {
        self.unequal == 0 && self.gap <= BOUND
    }
}

/// Kernels against the reference.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Parity {
    /// By kind, in the order in which they first ran.
    pub kinds: Vec<KindParity>,
    /// Steps that were not compared for the size of their operands.
    pub left_out: u64,
}

/// How much of a model is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Steps with more elements in their operands are left out: the reference takes [`REFERENCE_BYTES`] for each.
    pub elements: u64,
    /// Whether layers of the same structure as one before are run.
    pub every_layer: bool,
}

impl Extent {
    /// Everything.
    pub const ALL: Extent = Extent { elements: u64::MAX, every_layer: true };

    /// What takes seconds: everything of a small model, one layer of each structure and no large matrices of a large one.
    pub fn quick(module: &Module) -> Self {
        let elements =
            |w: &WeightDecl| w.ty.shape.as_fixed().map_or(0, |s| s.iter().product::<usize>() as u64);
        let all: u64 = module.weights().iter().map(elements).sum();
        Extent { elements: 1 << 22, every_layer: all <= 1 << 28 }
    }
}

/// Compares the steps of a run.
struct Comparing<'a> {
    module: &'a Module,
    /// Most elements of all operands of a step.
    limit: u64,
    parity: &'a mut Parity,
}

impl Watch for Comparing<'_> {
    fn wants(&mut self, step: &Step) -> bool {
        let elements = |ty: &TensorType| {
            ty.shape.0.iter().map(|d| if let Dim::Fixed(n) = d { *n } else { 1 }).product::<u64>()
        };
        let wanted = step.ins.iter().map(|(_, ty)| elements(ty)).sum::<u64>() <= self.limit;
        self.parity.left_out += u64::from(!wanted);
        wanted
    }

    fn see(&mut self, step: &Step, ins: &[Tensor], outs: &[Tensor]) -> Result<(), EngineError> {
        self.parity.compare(self.module, step, ins, outs)
    }
}

impl Parity {
    /// Runs `tokens` arbitrary tokens, or as many hidden states, through a decoder or a block of one and then two more, each
    /// alone, and compares the steps. One function is in memory at a time.
    ///
    /// # Errors
    /// If the module is no decoder, or what the engine says.
    pub fn of_model(
        engine: &CpuEngine,
        module: &Module,
        weights: &dyn WeightSource,
        tokens: usize,
        seed: u64,
        extent: Extent,
    ) -> Result<Self, EngineError> {
        let mut parity = Parity::default();
        let load = |name: &str| load_end(engine, module, name, &mut Source::new(weights, None));
        let mut run = |f: &Loaded, args: &mut [Input<'_>]| {
            let mut watch = Comparing { module, limit: extent.elements, parity: &mut parity };
            Ok::<Tensor, EngineError>(f.run_watched(args, &mut watch)?.remove(0))
        };
        let block = module.lacks().is_some();
        let has = |name: &str| !block || module.find_func(name).is_some();
        let mut streams = Vec::new();
        if has("embed") {
            let mut random = ids(module.facts.vocab, seed);
            let embed = load("embed")?;
            for n in [tokens, 1, 1] {
                let ids = Tensor::i32([1, n], random.by_ref().take(n).collect());
                streams.push(run(&embed, &mut [Input::Tensor(&ids)])?);
            }
        } else {
            let hidden = module.facts.hidden.min(MOST_HIDDEN) as usize;
            let mut random = ids(1 << 16, seed).map(|i| i as f32 / 32768.0 - 1.0);
            let row = |n: usize| Tensor::f32([1, n, hidden], random.by_ref().take(n * hidden).collect());
            streams.extend([tokens, 1, 1].map(row));
        }
        let mut seen = HashSet::new();
        for f in module.layers() {
            if !seen.insert(structural_hash(module, module.func(f))) && !extent.every_layer {
                continue;
            }
            let layer = engine.load(module, module.func(f), weights)?;
            let mut caches = Caches::new(vec![layer_caches(&layer, &module.facts)], pages(tokens + 2));
            let sequence = caches.add();
            for x in &mut streams {
                let rows = [(sequence, x.shape()[1])];
                caches.extend(&rows)?;
                let (stores, segments) = caches.run(&rows);
                let pos = Tensor::i32([rows[0].1], segments.new_positions().collect());
                let [(k, v)] = stores else { continue };
                let (k, v) = (Input::Cache(k, &segments), Input::Cache(v, &segments));
                *x = run(&layer, &mut [Input::Tensor(x), Input::Tensor(&pos), k, v])?;
            }
        }
        if has("head") {
            let head = load("head")?;
            for x in &streams {
                run(&head, &mut [Input::Tensor(&last_row(x))])?;
            }
        }
        Ok(parity)
    }

    /// Names of the kernels that do not do what the reference does.
    pub fn broken(&self) -> Vec<&str> {
        self.kinds.iter().filter(|k| !k.holds()).map(|k| k.kernel.as_str()).collect()
    }

    /// Whether all integers are equal and all floats within [`BOUND`].
    pub fn holds(&self) -> bool {
        self.kinds.iter().all(KindParity::holds)
    }

    /// Computes what the step means from its operands, and compares its results.
    ///
    /// # Errors
    /// If the step is ill-formed.
    pub fn compare(
        &mut self,
        module: &Module,
        step: &Step,
        ins: &[Tensor],
        outs: &[Tensor],
    ) -> Result<(), EngineError> {
        let func = step.define(module)?;
        let want = interp::run(module, &func, &NoWeights, ins, &func.results)?;
        let sizes = match step.magnitudes(module)? {
            Some(f) => &interp::run(module, &f, &NoWeights, ins, &f.results)?,
            None => &want,
        };
        let name = step.kernel.to_string();
        let name =
            name.split(" {").next().unwrap_or_default().split(" (").next().unwrap_or_default().to_owned();
        let at = self.kinds.iter().position(|k| k.kernel == name).unwrap_or_else(|| {
            self.kinds.push(KindParity { kernel: name, ..KindParity::default() });
            self.kinds.len() - 1
        });
        let kind = &mut self.kinds[at];
        kind.steps += 1;
        for ((got, want), size) in outs.iter().zip(&want).zip(sizes) {
            let exact = matches!(step.kernel, Kernel::Quantize(..)) || got.as_f32().is_none();
            match (got.data(), want.data()) {
                (Data::F32(g), Data::F32(w)) if exact => {
                    kind.integers += g.len() as u64;
                    kind.unequal += differing(g.iter().map(|x| x.to_bits()), w.iter().map(|x| x.to_bits()));
                }
                (Data::F32(g), Data::F32(w)) => {
                    kind.gap = worse(kind.gap, gap(g, w, size.as_f32().unwrap_or(w)));
                }
                (Data::U8(g), Data::U8(w)) => {
                    kind.integers += g.len() as u64;
                    kind.unequal += differing(g, w);
                }
                (Data::I8(g), Data::I8(w)) => {
                    kind.integers += g.len() as u64;
                    kind.unequal += differing(g, w);
                }
                _ => kind.unequal += 1,
            }
            if got.len() != want.len() {
                kind.unequal += 1;
            }
        }
        Ok(())
    }
}

/// Arbitrary token ids that depend on the seed alone.
fn ids(vocab: u64, seed: u64) -> impl Iterator<Item = i32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % vocab.max(1)) as i32
    })
}

fn differing<T: PartialEq>(a: impl IntoIterator<Item = T>, b: impl IntoIterator<Item = T>) -> u64 {
    a.into_iter().zip(b).filter(|(a, b)| a != b).count() as u64
}

/// The larger of two gaps; what is no number is larger than all.
fn worse(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}

/// The largest distance over the largest of `sizes`, or over the smallest number with all its bits; not finite where only
/// one of the two is no number.
fn gap(got: &[f32], want: &[f32], sizes: &[f32]) -> f64 {
    let largest = sizes.iter().map(|w| f64::from(w.abs())).fold(f64::from(f32::MIN_POSITIVE), f64::max);
    let distance = |(g, w): (&f32, &f32)| match g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan() {
        true => 0.0,
        false => f64::from((g - w).abs()),
    };
    let worst = got.iter().zip(want).map(distance).fold(0.0, worse);
    if worst == 0.0 { 0.0 } else { worst / largest }
}

#[cfg(test)]
mod tests;
