//! `rotate`: QuaRot's rotations (methods.md §7.2), inserted; `place-transforms` then finds what need not stay online.

use qrmc_ir::random::LegacyNumpy;
use qrmc_ir::{Builder, Diag, Func, Module, Op, Tensor, ValueId, WeightId, hadamard, rewrite};

use crate::edges::{Producer, caches, inputs, producer, transform_edge, width};
use crate::fuse_norm::fuse;
use crate::options::{OptionValue, options};
use crate::parallel::check_tp;
use crate::pass::{Pass, PassCx, PassError, PassInfo, Preserves, Stage};
use crate::skip::{Skip, Skipped};
use crate::unit::Unit;

options! {
    /// Options of `rotate`.
    struct RotateOptions {
        /// change the basis of the residual stream by a random Hadamard matrix
        residual: bool = true,
        /// rotate values within heads
        heads: bool = true,
        /// rotate queries and keys within heads, after the positions are in them
        qk: bool = true,
        /// rotate the input of the last linear layer of the feed-forward block
        down: bool = true,
        /// seed of the signs of the residual rotation
        seed: u32 = 0,
        /// ranks of tensor parallelism: no rotation mixes channels of two ranks
        tp: u32 = 1,
        /// layers whose own rotations are left out; the residual stream is one for all
        skip: Skip = Skip::default(),
    }
}

/// The pass.
pub(crate) struct Rotate(pub(crate) RotateOptions);

impl Pass for Rotate {
    fn info(&self) -> PassInfo {
        PassInfo {
            name: "rotate",
            summary: "spread outliers by Hadamard rotations of residual stream, heads and feed-forward block (QuaRot)",
            preserves: Preserves::Within(1e-4),
            accepts: (Stage::Float, Stage::Float),
            calibrates: false,
            transforms: true,
        }
    }

    fn options(&self) -> Vec<(String, OptionValue)> {
        self.0.write()
    }

    fn legal(&self, module: &Module) -> Result<(), Diag> {
        let (o, facts) = (&self.0, &module.facts);
        check_tp(facts, o.tp)?;
        o.skip.on(module)?;
        if let Some(lacks) = module.lacks().filter(|_| o.residual) {
            let m = format!(
                "`rotate`: the residual stream changes its basis, and this is a block of a decoder: it has {lacks}"
            );
            return Err(Diag::new("Q0612", m)
                .hint("leave the residual stream as it is: `rotate{residual=false}`, or `quarot-kv`"));
        }
        let has = |on: bool, n: u64, what: &str, option: &str| {
            if !on || hadamard::core_order(n).is_some() {
                return Ok(());
            }
            let near = hadamard::near(n).iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            Err(Diag::new("Q0207", format!("no Hadamard matrix of size {n} can be built for the {what}"))
                .hint(format!("leave it out with `{option}=false`; sizes near it that can be built: {near}")))
        };
        has(o.residual, facts.hidden, "residual stream", "residual")?;
        has(o.heads || o.qk, facts.head_dim, "heads", "heads")?;
        has(o.down, facts.intermediate / u64::from(o.tp), "feed-forward block of one rank", "down")
    }

    fn run(&self, unit: &mut Unit, _cx: &mut PassCx<'_>) -> Result<(), PassError> {
        let o = &self.0;
        let skip = o.skip.on(&unit.module)?;
        if o.residual {
            fuse(&mut unit.module)?;
            let n = unit.module.facts.hidden as usize;
            let id = unit.define("rotation.signs", Tensor::f32([n], signs(o.seed, n)))?;
            residual(&mut unit.module, id)?;
        }
        for (index, layer) in unit.module.layers().into_iter().enumerate() {
            let new = within(&unit.module, unit.module.func(layer), o, &skip, index)?;
            unit.module.funcs[layer.0 as usize] = new;
        }
        Ok(())
    }
}

/// `2 * randint(0, 2) - 1` of PyTorch's CPU generator (methods.md §2.6).
fn signs(seed: u32, n: usize) -> Vec<f32> {
    let mut draw = LegacyNumpy::new(seed);
    (0..n).map(|_| if draw.next_u32() % 2 == 1 { 1.0 } else { -1.0 }).collect()
}

/// The residual stream changes its basis: every function that reads it turns it back first, and every function that
/// gives it out turns it last.
fn residual(module: &mut Module, signs: WeightId) -> Result<(), Diag> {
    let n = module.facts.hidden;
    let layers = module.layers();
    let (embed, head) = (module.find_func("embed"), module.find_func("head"));
    let ends = layers.iter().map(|&l| (l, true, true));
    let ends = ends.chain(embed.map(|f| (f, false, true))).chain(head.map(|f| (f, true, false)));
    for (func, reads, writes) in ends.collect::<Vec<_>>() {
        let old = module.func(func);
        let (input, output) = (old.params.first().copied(), old.results.first().copied());
        let turn = |b: &mut Builder<'_>, x: ValueId, inverse: bool| {
            let s = b.weight(signs);
            b.op1(Op::Hadamard { block: n, inverse }, &[x, s])
        };
        let mut back = None;
        let new = rewrite(module, old, |b, node, ins| {
            let mut ins = ins.to_vec();
            for (new, _) in ins.iter_mut().zip(&node.ins).filter(|(_, old)| reads && Some(**old) == input) {
                *new = match back {
                    Some(v) => v,
                    None => *back.insert(turn(b, *new, true)?),
                };
            }
            let mut outs = match node.op {
                Op::Weight(w) => vec![b.weight(w)],
                _ => b.op(node.op.clone(), &ins)?,
            };
            if let Some(at) = node.outs.iter().position(|o| writes && Some(*o) == output) {
                outs[at] = turn(b, outs[at], false)?;
            }
            Ok(Some(outs))
        })?;
        module.funcs[func.0 as usize] = new;
    }
    Ok(())
}

/// Inserts the rotations within one layer.
fn within(module: &Module, f: &Func, o: &RotateOptions, skip: &Skipped, index: usize) -> Result<Func, Diag> {
    if skip.layer(index) {
        return Ok(f.clone());
    }
    let head = module.facts.head_dim;
    let mut f = f.clone();
    for (on, kind) in [(o.heads, Producer::Attention), (o.down, Producer::Product)] {
        // One such value a layer; a rewrite renumbers, so that the second one is looked for anew.
        if let Some((x, _)) = inputs(&f).into_iter().find(|(x, _)| on && producer(&f, *x) == kind) {
            let block = if kind == Producer::Attention { head } else { width(&f, x) / u64::from(o.tp) };
            f = transform_edge(
                module,
                &f,
                x,
                |b, x| {
                    let x = b.op1(Op::Hadamard { block, inverse: false }, &[x])?;
                    b.op1(Op::Edge, &[x])
                },
                |b, w, _| b.op1(Op::Hadamard { block, inverse: false }, &[w]),
            )?;
        }
    }
    if o.qk { rotate_keys(module, &f, head) } else { Ok(f) }
}

/// Queries and keys change their basis together, so that their products stay.
fn rotate_keys(module: &Module, f: &Func, head: u64) -> Result<Func, Diag> {
    let keys: Vec<ValueId> = caches(f).iter().filter(|c| c.keys).map(|c| c.new).collect();
    let op = Op::Hadamard { block: head, inverse: false };
    rewrite(module, f, |b, node, ins| {
        let mut ins = ins.to_vec();
        match node.op {
            Op::Attention(_) => ins[0] = b.op1(op.clone(), &[ins[0]])?,
            Op::CacheAppend if keys.contains(&node.ins[1]) => {
                let k = b.op1(op.clone(), &[ins[1]])?;
                ins[1] = b.op1(Op::Edge, &[k])?;
            }
            _ => return Ok(None),
        }
        b.op(node.op.clone(), &ins).map(Some)
    })
}

#[cfg(test)]
mod tests {
    use super::signs;

    // methods.md §2.6 [golden]: torch's stream after manual_seed(0).
    #[test]
    fn signs_are_the_published_ones() {
        let want = [-1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        assert_eq!(signs(0, 10), want);
    }
}
