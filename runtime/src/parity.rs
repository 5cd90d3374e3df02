//! Kernels held against the reference interpreter, step by step on the same operands.

use qrmc_ir::{Data, EngineError, Module, RawWeight, Tensor, WeightError, WeightSource, interp};
use qrmc_lowering::{Kernel, Step};

/// How far a float result may be from the reference, relative to the largest magnitude of the result.
pub const BOUND: f64 = 2e-5;

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
    /// The largest distance of a float from the reference, relative to the largest magnitude of its result.
    pub gap: f64,
}

/// Kernels against the reference, by kind.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Parity(pub Vec<KindParity>);

struct NoWeights;

impl WeightSource for NoWeights {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        Err(WeightError::new(name, "a step has operands, no weights"))
    }
}

impl Parity {
    /// Whether all integers are equal and all floats within [`BOUND`].
    pub fn holds(&self) -> bool {
        self.0.iter().all(|k| k.unequal == 0 && k.gap <= BOUND)
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
        let name = step.kernel.to_string();
        let name =
            name.split(" {").next().unwrap_or_default().split(" (").next().unwrap_or_default().to_owned();
        let at = self.0.iter().position(|k| k.kernel == name).unwrap_or_else(|| {
            self.0.push(KindParity { kernel: name, ..KindParity::default() });
            self.0.len() - 1
        });
        let kind = &mut self.0[at];
        kind.steps += 1;
        for (got, want) in outs.iter().zip(&want) {
            let exact = matches!(step.kernel, Kernel::Quantize(..)) || got.as_f32().is_none();
            match (got.data(), want.data()) {
                (Data::F32(g), Data::F32(w)) if exact => {
                    kind.integers += g.len() as u64;
                    kind.unequal += differing(g.iter().map(|x| x.to_bits()), w.iter().map(|x| x.to_bits()));
                }
                (Data::F32(g), Data::F32(w)) => kind.gap = kind.gap.max(gap(g, w)),
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

fn differing<T: PartialEq>(a: impl IntoIterator<Item = T>, b: impl IntoIterator<Item = T>) -> u64 {
    a.into_iter().zip(b).filter(|(a, b)| a != b).count() as u64
}

/// The largest distance over the largest magnitude; not finite where only one of the two is no number.
fn gap(got: &[f32], want: &[f32]) -> f64 {
    let largest = want.iter().map(|w| f64::from(w.abs())).fold(0.0, f64::max);
    let distance = |(g, w): (&f32, &f32)| match g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan() {
        true => 0.0,
        false => f64::from((g - w).abs()),
    };
    let worst =
        got.iter().zip(want).map(distance).fold(0.0, |a: f64, d| if d > a || d.is_nan() { d } else { a });
    if worst == 0.0 { 0.0 } else { worst / largest }
}

#[cfg(test)]
mod tests;
