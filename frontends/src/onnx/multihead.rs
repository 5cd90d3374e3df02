//! `MultiHeadAttention` as the builder of onnxruntime-genai writes it: keys and values repeated for each query head, the
//! mask added.

use std::rc::Rc;

use super::attention::Scores;
use super::eval::{Eval, Made, Val, one};
use super::file::Node;
use super::term::Term;
use super::view::{Digit, Kind, Real};

/// What its operands are.
const OPERANDS: [&str; 10] = [
    "queries",
    "keys",
    "values",
    "a bias of all projections",
    "a mask of the keys of each sequence",
    "a mask",
    "a cache of keys",
    "a cache of values",
    "the length of a cache",
    "places in a cache",
];
const MASK: usize = 5;
const PASTS: [usize; 2] = [6, 7];

impl Eval {
    pub(super) fn multihead(&mut self, node: &Node, ins: &[Option<Val>]) -> Made {
        let get = |i: usize| ins.get(i).and_then(Option::as_ref);
        let read = |i: usize| i < 3 || i == MASK || PASTS.contains(&i);
        if let Some(i) = (0..ins.len()).find(|&i| !read(i) && get(i).is_some()) {
            let what = OPERANDS.get(i).copied().unwrap_or("something new");
            return Err(format!("operand {i} of MultiHeadAttention, {what}, which is not read"));
        }
        if node.outputs.get(3).is_some_and(|o| !o.is_empty()) {
            return Err("products of queries and keys as an output".into());
        }
        let heads = node.int("num_heads").and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
        let heads = heads.ok_or("no number of heads")?;
        let mut sides = Vec::new();
        for (i, what) in OPERANDS.iter().enumerate().take(3) {
            match get(i) {
                Some(Val::Real(r)) if r.axes.len() == 3 => sides.push(split(r, heads)?),
                v => {
                    let is = self.describe(&v.cloned());
                    return Err(format!("{what} that are {is}, not activations of three axes"));
                }
            }
        }
        let [q, mut k, mut v] = <[Real; 3]>::try_from(sides).map_err(|_| "an operand is missing")?;
        let mut caches = Vec::new();
        for (i, new) in PASTS.into_iter().zip([&mut k, &mut v]) {
            match get(i) {
                None => {}
                Some(Val::Real(past)) => {
                    *new = self.behind(past, new)?;
                    caches.push(Val::Real(new.clone()));
                }
                Some(_) => return Err(format!("{} that is no input of the model", OPERANDS[i])),
            }
        }
        let d = q.dims()[3];
        let scale = match node.float("scale").unwrap_or(0.0) {
            0.0 => 1.0 / (d as f64).sqrt(),
            s => f64::from(s),
        };
        let Val::Scores(scores) = self.scores(&q, &k.transposed(&[0, 1, 3, 2])?)? else {
            return Err("queries and keys without products".into());
        };
        let causal = node.int("unidirectional").unwrap_or(0) != 0;
        let mask = match get(MASK) {
            None => None,
            Some(v) => Some(self.known(v).ok_or("a mask that is computed from tokens")?),
        };
        let scores = scores.finished(scale, causal, mask.as_deref())?;
        let y = self.weighted(&Rc::new(scores), &v)?;
        let [Val::Real(y)] = &y[..] else { return Err("attention without a result".into()) };
        let (batch, new) = (self.probe.batch, self.probe.new);
        let y = y.transposed(&[0, 2, 1, 3])?.reshaped(&[batch, new, heads * d])?;
        let mut out = one(y)?;
        out.extend(caches);
        Ok(out)
    }

    /// New keys or values behind those of a cache.
    fn behind(&mut self, past: &Real, new: &Real) -> Result<Real, String> {
        if !matches!(self.terms.get(past.t), Term::Past(_)) || self.terms.n(past.t) != self.terms.n(new.t) {
            return Err("a cache that is no input of the model, or has other heads".into());
        }
        let mut axes = past.axes.clone();
        let in_order = new.axes.iter().zip(&axes).enumerate().all(|(i, (a, b))| i == 2 || a == b);
        if axes.len() != 4 || !in_order {
            return Err("a cache whose heads lie in another order".into());
        }
        axes[2] = vec![Digit::pos(self.probe.all())];
        Ok(Real { t: self.terms.append(past.t, new.t), axes })
    }
}

/// `[B, S, heads * d] -> [B, heads, S, d]`
fn split(r: &Real, heads: usize) -> Result<Real, String> {
    let dims = r.dims();
    if !dims[2].is_multiple_of(heads) || !r.axes[1].iter().all(|d| d.kind == Kind::Pos) {
        return Err(format!("{heads} heads of activations {dims:?}"));
    }
    r.reshaped(&[dims[0], dims[1], heads, dims[2] / heads])?.transposed(&[0, 2, 1, 3])
}

impl Scores {
    /// The shares of keys.
    fn finished(
        &self,
        scale: f64,
        causal: bool,
        mask: Option<&super::known::Known>,
    ) -> Result<Scores, String> {
        match mask {
            Some(mask) if !self.is_causal(mask) => {
                Err("a mask that is not causal attention to all earlier positions".into())
            }
            None if !causal => Err("attention without a causal mask: qrmc reads decoders".into()),
            _ => Ok(self.shares(scale)),
        }
    }
}
