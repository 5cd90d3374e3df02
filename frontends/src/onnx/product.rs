//! Products with stored matrices, and what runs of channels are cut from and joined to.

use std::rc::Rc;

use qrmc_ir::{Grain, QuantSpec};

use super::eval::{Eval, Made, Val, one, rows};
use super::file::{Node, Type};
use super::matrix::{Body, Matrix, Order};
use super::term::{Bin, Pos, T, Term};
use super::view::{Axis, Digit, Kind, Real};

impl Eval {
    pub(super) fn product(&mut self, node: &Node, ins: &[Option<Val>]) -> Option<Made> {
        let (a, b) = (ins.first()?.as_ref()?, ins.get(1)?.as_ref()?);
        Some(match (node.op.as_str(), a, b) {
            ("MatMul", Val::Real(x), Val::Real(y)) => self.scores(x, y).map(|s| vec![s]),
            ("MatMul", Val::Scores(s), Val::Real(v)) => self.weighted(s, v),
            ("MatMul", Val::Real(x), w) => self.by_right(x, w),
            ("MatMul", w, Val::Real(x)) => self.by_left(w, x),
            ("Gemm", Val::Real(x), w) => self.gemm(node, x, w, ins.get(2).and_then(Option::as_ref)),
            ("MatMulInteger", Val::Real(x), Val::Stored { tensor, dims, swapped: true }) => {
                self.dot(x, *tensor, dims, ins.get(3).and_then(Option::as_ref))
            }
            _ => return None,
        })
    }

    fn gemm(&mut self, node: &Node, x: &Real, w: &Val, bias: Option<&Val>) -> Made {
        let one_or = |name| node.float(name).unwrap_or(1.0);
        if one_or("alpha") != 1.0 || one_or("beta") != 1.0 || node.int("transA").unwrap_or(0) != 0 {
            return Err("factors other than 1, or a transposed left side".into());
        }
        let m = self.matrix(w, node.int("transB").unwrap_or(0) == 0)?;
        let y = self.linear(x, m)?;
        match bias {
            None => one(y),
            Some(b) => {
                let b = self.beside(b, &y.axes)?;
                one(self.elementwise(Bin::Add, &y, &b)?)
            }
        }
    }

    /// `x W` where all channels of `x` are its last axis.
    pub(super) fn linear(&mut self, x: &Real, m: Matrix) -> Result<Real, String> {
        let t = rows(&self.terms, x)?;
        if m.cols != self.terms.n(t) || m.rows == 0 {
            return Err(format!("{} channels by a matrix of {} columns", self.terms.n(t), m.cols));
        }
        let mut axes = x.axes.clone();
        if let Some(last) = axes.last_mut() {
            *last = channels(m.rows, 1);
        }
        Ok(Real { t: self.terms.linear(t, Rc::new(m)), axes })
    }

    fn by_right(&mut self, x: &Real, w: &Val) -> Made {
        let Some((k, stride)) = x.last() else { return Err("a product along no channels".into()) };
        let m = self.matrix(w, true)?;
        if stride == 1 && k == self.terms.n(x.t) {
            return one(self.linear(x, m)?);
        }
        if m.rows != m.cols || m.cols != k {
            return Err(format!("runs of {k} channels by a matrix of {} to {}", m.cols, m.rows));
        }
        let m = self.matrix(w, false)?;
        one(Real { t: self.terms.mode(x.t, Rc::new(m), stride, 1), axes: x.axes.clone() })
    }

    /// `mᵀ X` along the last axis but one: a mode product with `m`.
    fn by_left(&mut self, w: &Val, x: &Real) -> Made {
        let rank = x.axes.len();
        let channel = |a: &Axis| match a[..] {
            [d] if d.kind == Kind::Chan => Some((d.size as u64, d.stride)),
            _ => None,
        };
        let (dims, along) = (self.dims(w), rank.checked_sub(2).and_then(|i| channel(&x.axes[i])));
        let (Some((l, inner)), [.., p, q]) = (along, &dims[..]) else {
            return Err("a product from the left along no channels".into());
        };
        let n = self.terms.n(x.t);
        if *p != *q || *q as u64 != l || inner == 0 {
            return Err(format!("a matrix of {dims:?} from the left of {l} channels"));
        }
        let (m, count) = match dims[..] {
            [_, _] => (self.matrix(w, true)?, 1),
            // One for each of the outermost runs.
            [count, 1, _, _] => {
                let lead = rank.checked_sub(4).and_then(|i| channel(&x.axes[i]));
                if lead != Some((count as u64, n / count as u64)) {
                    return Err(format!("{count} matrices beside other runs"));
                }
                (self.stack(w, count)?, count as u64)
            }
            _ => return Err(format!("matrices of {dims:?}")),
        };
        one(Real { t: self.terms.mode(x.t, Rc::new(m), inner, count), axes: x.axes.clone() })
    }

    /// Several square matrices, each transposed, under one another.
    fn stack(&self, w: &Val, count: usize) -> Result<Matrix, String> {
        let k = self.known(w).ok_or("large matrices for ranks")?;
        let [.., l, _] = k.dims[..] else { return Err("no matrices".into()) };
        let k = k.reshaped(vec![count, l, l]).transposed(&[0, 2, 1])?;
        let v = k.as_floats().ok_or("a matrix of integers")?;
        let body = Body::Literal(v.iter().map(|x| x.to_bits()).collect());
        let rows = (count * l) as u64;
        Ok(Matrix { body, rows, cols: l as u64, first: 0, stored: rows })
    }

    /// A product of codes, in whole numbers.
    fn dot(&mut self, x: &Real, tensor: usize, dims: &[usize], zero: Option<&Val>) -> Made {
        let t = rows(&self.terms, x)?;
        let [cols, rows] = dims[..] else { return Err("codes of no matrix".into()) };
        let stored = self.stored(tensor);
        if cols as u64 != self.terms.n(t) || stored.ty != Type::U8 || stored.dims.len() != 2 {
            return Err("a product with codes of another form than qrmc writes".into());
        }
        let zero = match zero {
            Some(Val::Stored { tensor, .. }) => *tensor,
            _ => return Err("zero points that are not stored".into()),
        };
        let z = self.stored(zero);
        if z.ty != Type::U8 || ![1, rows as u64].contains(&z.count()) {
            return Err(format!("zero points {:?} of {rows} rows", z.dims));
        }
        let middle = z.bytes.iter().all(|&z| z == 128);
        let spec = if middle { QuantSpec::sym(8, Grain::Row) } else { QuantSpec::asym(8, Grain::Row) };
        let body = Body::Codes {
            codes: tensor,
            scale: 0,
            zero: (!middle).then_some(zero),
            spec,
            order: Order::Rows,
            repeat: 1,
        };
        let rows = rows as u64;
        let m = Matrix { body, rows, cols: cols as u64, first: 0, stored: rows };
        let mut axes = x.axes.clone();
        if let Some(last) = axes.last_mut() {
            *last = channels(rows, 1);
        }
        one(Real { t: self.terms.put(Term::Dot(t, Rc::new(m)), rows, Pos::New), axes })
    }

    pub(super) fn norm(&mut self, node: &Node, x: &Real, gain: Option<&Val>) -> Made {
        let rank = x.axes.len() as i64;
        let axis = node.int("axis").unwrap_or(-1);
        let (Some((run, 1)), true) = (x.last(), axis == -1 || axis == rank - 1) else {
            return Err("a norm along another axis than the last".into());
        };
        let eps = node.float("epsilon").unwrap_or(1e-5);
        let gain = match gain {
            Some(g) => self.beside(g, &x.axes)?,
            None => return Err("a norm without a gain".into()),
        };
        let gain = self.terms.vector(gain.t).filter(|g| g.n == run || g.n == 1);
        let gain = gain.ok_or("a gain of another length")?;
        one(Real { t: self.terms.norm(x.t, gain, eps, run), axes: x.axes.clone() })
    }

    pub(super) fn skip_norm(&mut self, node: &Node, ins: &[Option<Val>]) -> Made {
        let (Some(Some(a)), Some(Some(b))) = (ins.first(), ins.get(1)) else {
            return Err("an operand is missing".into());
        };
        if ins.get(3).is_some_and(Option::is_some) {
            return Err("a bias inside a norm".into());
        }
        let (a, b) = self.pair(a, b).ok_or("no activations")??;
        let sum = self.elementwise(Bin::Add, &a, &b)?;
        let mut out = self.norm(node, &sum, ins.get(2).and_then(Option::as_ref))?;
        // Mean and deviation stand between.
        if node.outputs.iter().skip(1).take(2).any(|name| !name.is_empty()) {
            return Err("mean and deviation of a norm as results".into());
        }
        out.extend(vec![Val::Real(sum); 3]);
        Ok(out)
    }

    /// Operators of onnxruntime.
    pub(super) fn contrib(&mut self, node: &Node, ins: &[Option<Val>]) -> Option<Made> {
        if node.domain != "com.microsoft" {
            return None;
        }
        Some(match node.op.as_str() {
            "MatMulNBits" => self.mat_mul_nbits(node, ins),
            "SkipSimplifiedLayerNormalization" => self.skip_norm(node, ins),
            "QuickGelu" if node.float("alpha") == Some(1.0) => match ins.first() {
                Some(Some(Val::Real(x))) => self.silu(x),
                _ => return None,
            },
            _ => return None,
        })
    }
}

pub(super) fn channels(n: u64, stride: u64) -> Axis {
    if n == 1 { vec![] } else { vec![Digit::chan(n as usize, stride)] }
}

/// The term of activations that are rows.
pub(super) fn term_of(e: &Eval, v: Option<&Val>) -> Result<T, String> {
    match v {
        Some(Val::Real(r)) => rows(&e.terms, r),
        _ => Err("an operand that is no activations".into()),
    }
}
