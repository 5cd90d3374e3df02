//! Choosing the codes of one weight, a column at a time, each error moved to the columns that come later
//! (methods.md §4.1 step 6, §4.2).

use std::sync::{Mutex, PoisonError};

use qrmc_ir::grid::{QParam, dequantize, quantize, snap};
use qrmc_ir::linalg::MatView;
use qrmc_ir::{Builder, Data, Elem, Grain, Op, QuantSpec, Rule, Shape, Tensor, TensorType, pack};

use super::GptqOptions;
use super::gram::{Gram, chunks};
use crate::calibrate::LayerResult;
use crate::pass::{PassCx, PassError};
use crate::unit::Unit;

/// Rows of a weight that one task takes through a block of columns.
const ROWS: usize = 32;
/// Rows whose loss is computed at a time.
const LOSS_ROWS: usize = 512;

/// A weight to be rounded.
pub(super) struct Job {
    /// `[out, in]`, columns of dead inputs still in place.
    pub(super) w: Tensor,
    pub(super) spec: QuantSpec,
    pub(super) rule: Rule,
}

/// What all weights behind one input share.
pub(super) struct Shared<'a> {
    pub(super) gram: &'a Gram,
    /// Columns in the order in which they are rounded.
    pub(super) order: &'a [usize],
    /// Inputs that are always 0.
    pub(super) dead: &'a [usize],
    /// What was added to the squares of the Gram matrix; `None` if it has no factors.
    pub(super) damping: Option<f64>,
}

/// Codes, scales and zero points of a weight, and its losses.
pub(super) struct Rounded {
    /// Unsigned: less the smallest code.
    codes: Vec<u8>,
    cols: usize,
    sides: Vec<QParam>,
    /// `tr((w - q) H (w - q)ᵀ)` over `tr(w H wᵀ)`, rounded to nearest and as it is.
    pub(super) losses: [f64; 2],
    /// Whether errors were moved. Where not, every weight is rounded to nearest.
    pub(super) moved: bool,
}

impl Job {
    fn size(&self) -> (usize, usize) {
        (self.w.shape()[0], self.w.shape()[1])
    }

    /// Which scale belongs to an element.
    fn side(&self, row: usize, col: usize) -> usize {
        match self.spec.grain {
            Grain::Tensor => 0,
            Grain::Group(g) => row * (self.size().1 / g as usize) + col / g as usize,
            Grain::Row | Grain::Token | Grain::Channel => row,
        }
    }

    /// Rounds the weight.
    pub(super) fn round(
        mut self,
        unit: &Unit,
        cx: &mut PassCx<'_>,
        o: &GptqOptions,
        shared: &Shared<'_>,
    ) -> Result<Rounded, PassError> {
        let (rows, cols) = self.size();
        let grouped = matches!(self.spec.grain, Grain::Group(_));
        // A row's scale is taken from the whole row, a group's after dead columns are 0.
        let mut sides = match grouped {
            true => Vec::new(),
            false => choose(unit, cx, &self.w, self.spec, self.rule)?,
        };
        let mut w = match self.w.into_data() {
            Data::F32(v) => v,
            _ => Vec::new(),
        };
        for row in w.chunks_mut(cols.max(1)) {
            shared.dead.iter().for_each(|&j| row[j] = 0.0);
        }
        self.w = Tensor::f32([rows, cols], w);
        if grouped {
            sides = choose(unit, cx, &self.w, self.spec, self.rule)?;
        }
        let [norm, before] = self.nearest_losses(cx, shared.gram, &sides);
        let relative = |x: f64| if norm > 0.0 { x / norm } else { 0.0 };
        if let Some(damping) = shared.damping {
            let moved = self.columns(unit, cx, o, shared, sides.clone())?;
            let after = moved.squared - damping * moved.distance;
            // Everything that goes wrong with a number ends up in this sum.
            if moved.squared.is_finite() {
                let losses = [relative(before), relative(after.max(0.0))];
                return Ok(Rounded { codes: moved.codes, cols, sides: moved.sides, losses, moved: true });
            }
        }
        let w = self.w.as_f32().unwrap_or(&[]);
        let code = |(i, &x): (usize, &f32)| {
            (quantize(x, sides[self.side(i / cols, i % cols)], self.spec) - self.spec.qmin()) as u8
        };
        let codes = w.iter().enumerate().map(code).collect();
        Ok(Rounded { codes, cols, sides, losses: [relative(before); 2], moved: false })
    }

    /// `tr(w H wᵀ)`, and the same of what rounding to nearest does to `w`.
    fn nearest_losses(&self, cx: &mut PassCx<'_>, gram: &Gram, sides: &[QParam]) -> [f64; 2] {
        let (rows, cols) = self.size();
        let w = self.w.as_f32().unwrap_or(&[]);
        let mut sums = [0.0; 2];
        let mut wide = Vec::new();
        for (at, part) in w.chunks((LOSS_ROWS * cols).max(1)).enumerate() {
            wide.clear();
            wide.extend(part.iter().map(|&x| f64::from(x)));
            sums[0] += gram.quadratic(cx.engine, &wide);
            chunks(cx.engine, &mut wide, cols, &|row, wide| {
                for (col, x) in wide.iter_mut().enumerate() {
                    let q = sides[self.side(at * LOSS_ROWS + row, col)];
                    *x -= f64::from(snap(*x as f32, q, self.spec));
                }
            });
            sums[1] += gram.quadratic(cx.engine, &wide);
        }
        cx.report.flops("gptq", 2.0 * rows as f64 * (cols * cols) as f64);
        sums
    }

    fn columns(
        &self,
        unit: &Unit,
        cx: &mut PassCx<'_>,
        o: &GptqOptions,
        shared: &Shared<'_>,
        mut sides: Vec<QParam>,
    ) -> Result<Columns, PassError> {
        let (rows, cols) = self.size();
        let first = self.w.as_f32().unwrap_or(&[]);
        let order = shared.order;
        // In the order of rounding, with the errors of earlier blocks in it.
        let mut w = vec![0.0f64; rows * cols];
        chunks(cx.engine, &mut w, cols, &|row, w| {
            let from = &first[row * cols..(row + 1) * cols];
            w.iter_mut().zip(order).for_each(|(w, &c)| *w = f64::from(from[c]));
        });
        let moving = match self.spec.grain {
            Grain::Group(g) if !o.order => Some(g as usize),
            _ => None,
        };
        let mut out = Columns { codes: vec![0; rows * cols], sides: Vec::new(), squared: 0.0, distance: 0.0 };
        let mut sums = vec![[0.0f64; 2]; rows];
        let mut errors = Vec::new();
        let mut b0 = 0;
        while b0 < cols {
            if cx.report.interrupted() {
                return Err(PassError::Interrupted);
            }
            let b1 = block_end(b0, cols, o, moving);
            let m = b1 - b0;
            for start in (b0..b1).filter(|c| moving.is_some_and(|g| c % g == 0)) {
                let g = moving.unwrap_or(cols);
                let part: Vec<f32> =
                    w.chunks(cols).flat_map(|r| r[start..start + g].iter().map(|&x| x as f32)).collect();
                let spec = QuantSpec { grain: Grain::Row, ..self.spec };
                let new = choose(unit, cx, &Tensor::f32([rows, g], part), spec, self.rule)?;
                new.into_iter().enumerate().for_each(|(row, q)| sides[self.side(row, start)] = q);
            }
            let u = shared.gram.upper(b0, b1);
            errors.clear();
            errors.resize(rows * m, 0.0);
            let parts: Vec<_> = errors
                .chunks_mut(ROWS * m)
                .zip(out.codes.chunks_mut(ROWS * cols))
                .zip(sums.chunks_mut(ROWS))
                .map(Mutex::new)
                .collect();
            cx.engine.parallel(parts.len(), &|at| {
                let mut part = parts[at].lock().unwrap_or_else(PoisonError::into_inner);
                let ((errors, codes), sums) = &mut *part;
                for (r, e) in errors.chunks_mut(m).enumerate() {
                    let row = at * ROWS + r;
                    e.copy_from_slice(&w[row * cols + b0..][..m]);
                    for i in 0..m {
                        let col = order[b0 + i];
                        let q = sides[self.side(row, col)];
                        let code = quantize(e[i] as f32, q, self.spec);
                        let value = f64::from(dequantize(code, q));
                        let error = (e[i] - value) / u[i * m + i];
                        let gap = f64::from(first[row * cols + col]) - value;
                        sums[r][0] += error * error;
                        sums[r][1] += gap * gap;
                        codes[r * cols + col] = (code - self.spec.qmin()) as u8;
                        e[i] = error;
                        e[i + 1..].iter_mut().zip(&u[i * m + i + 1..]).for_each(|(e, u)| *e -= error * u);
                    }
                }
            });
            drop(parts);
            if b1 < cols {
                let errors = MatView::new(&errors, rows, m, m);
                cx.engine.add_product(errors, shared.gram.beyond(b0, b1), -1.0, &mut w[b1..], cols);
            }
            cx.report.flops("gptq", 2.0 * (rows * m) as f64 * (cols - b1) as f64);
            b0 = b1;
        }
        out.sides = sides;
        for s in &sums {
            out.squared += s[0];
            out.distance += s[1];
        }
        Ok(out)
    }
}

/// What the loop over columns gives.
struct Columns {
    codes: Vec<u8>,
    sides: Vec<QParam>,
    /// Sum of the squared errors over `U`'s diagonal, which is `tr((w - q) (H + damping) (w - q)ᵀ)`.
    squared: f64,
    /// `|w - q|²`
    distance: f64,
}

/// Where the block that starts at `from` ends. A group whose scale is chosen on the way starts a block, so that all
/// errors before it are in its columns; the published code lets it start inside.
fn block_end(from: usize, cols: usize, o: &GptqOptions, moving: Option<usize>) -> usize {
    let block = o.block as usize;
    let end = (from / block + 1) * block;
    let group = moving.filter(|_| !o.stale).map_or(cols, |g| (from / g + 1) * g);
    end.min(group).min(cols)
}

/// Scales and zero points by the rule of the annotation: `@sides(w [rows, k]) -> scale [, zero]`.
fn choose(
    unit: &Unit,
    cx: &PassCx<'_>,
    w: &Tensor,
    spec: QuantSpec,
    rule: Rule,
) -> Result<Vec<QParam>, PassError> {
    let mut b = Builder::new(&unit.module, "sides");
    let p = b.param(Some("w"), TensorType::new(Elem::F32, Shape::fixed(w.shape())));
    let sides = b.op(Op::QParams(spec, rule), &[p])?;
    let out = cx.run(unit, &b.finish(&sides), &[w])?;
    let scales = out[0].as_f32().unwrap_or(&[]);
    let zeros = match out.get(1).map(Tensor::data) {
        Some(Data::U8(z)) => &z[..],
        _ => &[],
    };
    let zero = |i: usize| zeros.get(i).map_or(0, |&z| i32::from(z));
    Ok(scales.iter().enumerate().map(|(i, &scale)| QParam { scale, zero: zero(i) }).collect())
}

impl Rounded {
    /// The named results of a layer: packed codes, scales, zero points, losses.
    pub(super) fn store(&self, role: &str, spec: QuantSpec, scale_shape: &[usize]) -> LayerResult {
        let cols = self.cols;
        let mut packed = Vec::new();
        for row in self.codes.chunks(cols.max(1)) {
            pack::pack_row(row.iter().copied(), spec.bits, &mut packed);
        }
        let scales: Vec<f32> = self.sides.iter().map(|q| q.scale).collect();
        let zeros: Vec<u8> = self.sides.iter().map(|q| q.zero as u8).collect();
        let mut result = vec![
            (format!("{role}.codes"), Tensor::new([packed.len()], Data::U8(packed))),
            (format!("{role}.scale"), Tensor::f32(scale_shape, scales)),
        ];
        if spec.zero {
            result.push((format!("{role}.zero"), Tensor::new(scale_shape, Data::U8(zeros))));
        }
        result.push((format!("{role}.loss"), Tensor::new([2], Data::F64(self.losses.to_vec()))));
        result
    }

    #[cfg(test)]
    pub(super) fn parts(&self) -> (&[u8], &[QParam]) {
        (&self.codes, &self.sides)
    }
}
