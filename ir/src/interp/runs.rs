//! What works on runs of elements that share a scale: [`crate::grid`] on `f32` values, as every engine does.

use super::wide;
use crate::grid::{self, FakeGrad, QParam};
use crate::module::{Func, Node};
use crate::quant::{QuantSpec, Rule};
use crate::tensor::{Data, Tensor};
use crate::types::Elem;

/// Factors on the ends of ranges, by run.
struct Factors {
    hi: Vec<f32>,
    lo: Vec<f32>,
    run: usize,
    per_row: usize,
}

impl Factors {
    fn of(given: &[&Tensor], x: &Tensor, spec: QuantSpec) -> Self {
        let (rows, cols) = matrix_of(x);
        let run = grid::run_length(spec, rows, cols);
        let (hi, lo) = match given {
            [hi, lo, ..] => (floats(hi), floats(lo)),
            _ => (vec![1.0], vec![1.0]),
        };
        Factors { hi, lo, run, per_row: (cols / run).max(1) }
    }

    /// Which factor a run has.
    fn index(&self, run: usize) -> usize {
        grid::factor_of(run, self.per_row, self.hi.len())
    }

    fn at(&self, run: usize) -> (f32, f32) {
        (self.hi[self.index(run)], self.lo[self.index(run)])
    }
}

pub(super) fn fake_quant_grad(ins: &[&Tensor], spec: QuantSpec, rule: Rule) -> Vec<Tensor> {
    let (dy, given) = (ins[ins.len() - 1], &ins[1..ins.len() - 1]);
    let f = Factors::of(given, ins[0], spec);
    let (x, dy) = (floats(ins[0]), floats(dy));
    let mut dx = vec![0.0; x.len()];
    let mut sums = vec![FakeGrad::default(); f.hi.len()];
    for (i, ((x, dy), dx)) in x.chunks(f.run).zip(dy.chunks(f.run)).zip(dx.chunks_mut(f.run)).enumerate() {
        let g = grid::fake_grad_run(x, dy, spec, rule, f.at(i), dx);
        let sum = &mut sums[f.index(i)];
        *sum = FakeGrad { hi: sum.hi + g.hi, lo: sum.lo + g.lo };
    }
    let mut out = vec![Tensor::f32(ins[0].shape(), dx)];
    if !given.is_empty() {
        out.push(Tensor::f32([sums.len()], sums.iter().map(|s| s.hi as f32).collect()));
        out.push(Tensor::f32([sums.len()], sums.iter().map(|s| s.lo as f32).collect()));
    }
    out
}

pub(super) fn clip_range(ins: &[&Tensor], spec: QuantSpec) -> Tensor {
    let (w, hi, lo) = (floats(ins[0]), floats(ins[1]), floats(ins[2]));
    let run = Factors::of(&[], ins[0], spec).run;
    let mut y = vec![0.0; w.len()];
    for (i, (w, y)) in w.chunks(run).zip(y.chunks_mut(run)).enumerate() {
        grid::clip_range_run(w, (hi[i], lo[i]), y);
    }
    Tensor::f32(ins[0].shape(), y)
}

pub(super) fn clip_range_grad(ins: &[&Tensor], spec: QuantSpec) -> Vec<Tensor> {
    let (w, hi, lo, dy) = (floats(ins[0]), floats(ins[1]), floats(ins[2]), floats(ins[3]));
    let run = Factors::of(&[], ins[0], spec).run;
    let mut dw = vec![0.0; w.len()];
    let mut sides = [Vec::new(), Vec::new()];
    for (i, ((w, dy), dw)) in w.chunks(run).zip(dy.chunks(run)).zip(dw.chunks_mut(run)).enumerate() {
        let g = grid::clip_range_grad_run(w, dy, (hi[i], lo[i]), dw);
        sides[0].push(g.hi as f32);
        sides[1].push(g.lo as f32);
    }
    let [hi, lo] = sides.map(|v| Tensor::f32(ins[1].shape(), v));
    vec![Tensor::f32(ins[0].shape(), dw), hi, lo]
}

fn floats(t: &Tensor) -> Vec<f32> {
    match t.data() {
        Data::F32(v) => v.clone(),
        _ => wide(t).iter().map(|&x| x as f32).collect(),
    }
}

pub(super) fn matrix_of(t: &Tensor) -> (usize, usize) {
    let cols = t.shape().last().copied().unwrap_or(1);
    (t.len() / cols.max(1), cols)
}

pub(super) fn qparams(ins: &[&Tensor], spec: QuantSpec, rule: Rule) -> Vec<Tensor> {
    let x = ins[0];
    let factors = Factors::of(&ins[1..], x, spec);
    let data = floats(x);
    let groups: Vec<QParam> = data
        .chunks(factors.run)
        .enumerate()
        .map(|(i, g)| {
            let (hi, lo) = factors.at(i);
            grid::qparam_scaled(g, spec, rule, hi, lo)
        })
        .collect();
    let shape = spec
        .scale_shape(&crate::Shape::fixed(x.shape()))
        .ok()
        .and_then(|s| s.as_fixed())
        .unwrap_or_else(|| unreachable!("verified grain"));
    let mut out = vec![Tensor::f32(shape.clone(), groups.iter().map(|q| q.scale).collect())];
    if spec.zero {
        out.push(Tensor::new(shape, Data::U8(groups.iter().map(|q| q.zero as u8).collect())));
    }
    out
}

/// Scale and zero point of each run, from the operands of `qcast` or `dcast`.
fn sides(ins: &[&Tensor]) -> Vec<QParam> {
    let zeros: Option<&[u8]> = ins.get(1).and_then(|z| match z.data() {
        Data::U8(v) => Some(&v[..]),
        _ => None,
    });
    let zero = |i: usize| zeros.map_or(0, |z| i32::from(z[i]));
    floats(ins[0]).iter().enumerate().map(|(i, &scale)| QParam { scale, zero: zero(i) }).collect()
}

pub(super) fn qcast(ins: &[&Tensor], spec: QuantSpec) -> Tensor {
    let (rows, cols) = matrix_of(ins[0]);
    let run = grid::run_length(spec, rows, cols);
    let q = sides(&ins[1..]);
    let data = floats(ins[0]);
    let codes = data
        .iter()
        .enumerate()
        .map(|(i, &x)| grid::quantize(x, q[grid::scale_index(spec, i, run, cols)], spec));
    let data = if spec.signed {
        Data::I8(codes.map(|c| c as i8).collect())
    } else {
        Data::U8(codes.map(|c| c as u8).collect())
    };
    Tensor::new(ins[0].shape(), data)
}

pub(super) fn dcast(func: &Func, node: &Node, ins: &[&Tensor]) -> Tensor {
    let Elem::Quant(spec) = func.ty(node.ins[0]).elem else { unreachable!("verified codes") };
    let (rows, cols) = matrix_of(ins[0]);
    let run = grid::run_length(spec, rows, cols);
    let q = sides(&ins[1..]);
    let code = |i: usize| match ins[0].data() {
        Data::I8(v) => i32::from(v[i]),
        Data::U8(v) => i32::from(v[i]),
        _ => 0,
    };
    let data = (0..ins[0].len())
        .map(|i| grid::dequantize(code(i), q[grid::scale_index(spec, i, run, cols)]))
        .collect();
    Tensor::f32(ins[0].shape(), data)
}
