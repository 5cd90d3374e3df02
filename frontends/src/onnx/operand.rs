//! What operators read: stored matrices, and numbers, vectors and tables beside activations.

use std::rc::Rc;

use super::eval::{Eval, Made, Val, one};
use super::file::{Node, Type};
use super::fold;
use super::matrix::{Body, Matrix, Order};
use super::term::{Pos, Term, Vector};
use super::view::{Axis, Digit, Kind, Real, size};

impl Eval {
    pub(super) fn describe(&self, v: &Option<Val>) -> String {
        match v {
            None => "nothing".into(),
            Some(v) => {
                let what = match v {
                    Val::Known(_) => "known numbers",
                    Val::Stored { .. } => "a stored tensor",
                    Val::Codes { .. } => "a matrix of codes",
                    Val::Ids => "tokens",
                    Val::Real(_) => "activations",
                    Val::Scores(_) | Val::Lost(_) => "attention scores",
                };
                match v {
                    Val::Real(r) => format!("{what} [{}]", self.symbols(r)),
                    _ => format!("{what} {:?}", self.dims(v)),
                }
            }
        }
    }

    /// Sizes of activations, with the names that the IR has for what depends on the input.
    fn symbols(&self, r: &Real) -> String {
        let name = |d: &Digit| match d.kind {
            Kind::Batch => "B".to_owned(),
            Kind::Pos if d.size == self.probe.new => "S".to_owned(),
            Kind::Pos if d.size == self.probe.past => "P".to_owned(),
            Kind::Pos => "T".to_owned(),
            Kind::Chan | Kind::Rep => d.size.to_string(),
        };
        let axis = |a: &Axis| {
            if a.is_empty() { "1".to_owned() } else { a.iter().map(name).collect::<Vec<_>>().join("*") }
        };
        r.axes.iter().map(axis).collect::<Vec<_>>().join(", ")
    }

    /// Operators on stored tensors.
    pub(super) fn weights(&mut self, node: &Node, ins: &[Option<Val>]) -> Option<Made> {
        let first = ins.first()?.as_ref()?;
        let op = node.op.as_str();
        match first {
            Val::Stored { tensor, dims, swapped } => {
                let float = self.stored(*tensor).ty.float().is_some();
                let codes = matches!(self.stored(*tensor).ty, Type::U8 | Type::I8 | Type::U4 | Type::I4);
                let large = dims.iter().product::<usize>() > 1 << 16 || dims.len() == 2 || codes;
                let again = |dims: Vec<usize>, swapped| {
                    Some(Ok(vec![Val::Stored { tensor: *tensor, dims, swapped }]))
                };
                match op {
                    "Identity" => again(dims.clone(), *swapped),
                    // Every value of a float type is kept; where numbers are computed, they are computed in f32.
                    "Cast" if float && !dims.is_empty() && to_float(node) => again(dims.clone(), *swapped),
                    "Transpose" if dims.len() == 2 && fold::permutation(node, 2) == [1, 0] => {
                        again(vec![dims[1], dims[0]], !swapped)
                    }
                    "Reshape" if large && !swapped => {
                        let to = self.known(ins.get(1)?.as_ref()?)?;
                        let to = fold::reshape(dims, to.as_ints()?, node.int("allowzero") == Some(1));
                        match to {
                            Ok(dims) => again(dims, false),
                            Err(e) => Some(Err(e)),
                        }
                    }
                    "DequantizeLinear" => Some(self.dequantize_linear(node, ins)),
                    "Gather" if matches!(ins.get(1), Some(Some(Val::Ids))) => Some(self.embed(first)),
                    "GatherBlockQuantized" => Some(self.gather_blocks(node, ins)),
                    _ => None,
                }
            }
            Val::Codes { m, swapped } => match op {
                "Identity" | "Cast" => Some(Ok(vec![first.clone()])),
                "Transpose" => Some(Ok(vec![Val::Codes { m: m.clone(), swapped: !swapped }])),
                "Gather" if matches!(ins.get(1), Some(Some(Val::Ids))) => Some(self.embed(first)),
                _ => None,
            },
            Val::Ids if matches!(op, "Identity" | "Cast") => Some(Ok(vec![Val::Ids])),
            _ => None,
        }
    }

    /// Rows of a table.
    pub(super) fn embed(&mut self, table: &Val) -> Made {
        // A table has a row for each token: its matrix is not transposed.
        let m = self.matrix(table, false)?;
        self.embedding(m)
    }

    pub(super) fn embedding(&mut self, m: Matrix) -> Made {
        let n = m.cols;
        if n == 0 {
            return Err("a table without columns".into());
        }
        let t = self.terms.put(Term::Embed(Rc::new(m)), n, Pos::New);
        one(Real::rows(t, self.probe.batch, self.probe.new, n as usize))
    }

    /// A stored matrix, `[rows, cols]` as linear layers store it; the tensor's axes are `[cols, rows]` if `columns`.
    pub(super) fn matrix(&self, v: &Val, columns: bool) -> Result<Matrix, String> {
        match v {
            Val::Codes { m, swapped } if *swapped == columns => Ok((**m).clone()),
            Val::Codes { .. } => Err("a matrix of codes whose scales run along the other axis".into()),
            Val::Stored { tensor, dims, swapped } => {
                let [a, b] = dims[..] else { return Err(format!("a tensor of sizes {dims:?} is no matrix")) };
                let (rows, cols) = if columns { (b, a) } else { (a, b) };
                let order = if *swapped == columns { Order::Rows } else { Order::Columns };
                if self.stored(*tensor).ty.float().is_none() {
                    return Err(format!("tensor `{}` holds no floats", self.stored(*tensor).name));
                }
                let body = Body::Floats { tensor: *tensor, order };
                Ok(Matrix { body, rows: rows as u64, cols: cols as u64, first: 0, stored: rows as u64 })
            }
            Val::Known(k) => {
                let [a, b] = k.dims[..] else {
                    return Err(format!("numbers of sizes {:?} are no matrix", k.dims));
                };
                let k = if columns { k.transposed(&[1, 0])? } else { (**k).clone() };
                let (rows, cols) = if columns { (b, a) } else { (a, b) };
                let v = k.as_floats().ok_or("a matrix of integers")?;
                let body = Body::Literal(v.iter().map(|x| x.to_bits()).collect());
                Ok(Matrix { body, rows: rows as u64, cols: cols as u64, first: 0, stored: rows as u64 })
            }
            _ => Err(format!("{} where a matrix is", self.describe(&Some(v.clone())))),
        }
    }

    /// A number, vector or table beside activations with these axes, as a term with axes.
    pub(super) fn beside(&mut self, v: &Val, axes: &[Axis]) -> Result<Real, String> {
        let dims = self.dims(v);
        let count: usize = dims.iter().product();
        let k = self.known(v);
        if count == 1
            && let Some(k) = &k
            && let Some(x) = k.scalar()
        {
            let origin = k.origin.filter(|_| !dims.is_empty());
            let t = self.terms.put(Term::Scalar(x.to_bits(), origin), 1, Pos::Any);
            return Ok(Real { t, axes: vec![vec![]; dims.len()] });
        }
        let lead = axes.len().checked_sub(dims.len()).ok_or("an operand of more axes")?;
        let mut own: Vec<Axis> = Vec::new();
        let mut stride: u64 = 1;
        for (axis, &d) in axes[lead..].iter().zip(&dims).rev() {
            own.insert(
                0,
                match &axis[..] {
                    _ if d == 1 => vec![],
                    // One number beside each of many.
                    [] => {
                        stride *= d as u64;
                        vec![Digit::chan(d, stride / d as u64)]
                    }
                    [one] if one.size == d && one.kind == Kind::Chan => {
                        stride *= d as u64;
                        vec![Digit::chan(d, stride / d as u64)]
                    }
                    [one] if one.size == d && matches!(one.kind, Kind::Pos | Kind::Batch) => vec![*one],
                    _ => {
                        return Err(format!(
                            "{} beside an axis of {}",
                            self.describe(&Some(v.clone())),
                            size(axis)
                        ));
                    }
                },
            );
        }
        let kinds: Vec<Kind> = own.iter().flatten().map(|d| d.kind).collect();
        if !kinds.iter().any(|k| *k != Kind::Chan) {
            let tensor = match v {
                Val::Stored { tensor, swapped: false, .. } => Some(*tensor),
                _ => None,
            };
            let literal = match (&tensor, &k) {
                (None, Some(k)) => {
                    let v = k.as_floats().ok_or("integers beside activations")?;
                    Some(v.iter().map(|x| x.to_bits()).collect())
                }
                _ => None,
            };
            let origin = tensor.or_else(|| k.as_ref().and_then(|k| k.origin));
            let vector = Vector { literal, tensor: origin, first: 0, n: stride };
            let t = self.terms.put(Term::Vector(vector), stride, Pos::Any);
            return Ok(Real { t, axes: own });
        }
        let k = k.ok_or("a large table of positions")?;
        let v = k.as_floats().ok_or("integers beside activations")?;
        let row = self.probe.new * stride as usize;
        let ordered = matches!(
            kinds[..],
            [Kind::Pos]
                | [Kind::Pos, Kind::Chan]
                | [Kind::Batch, Kind::Pos]
                | [Kind::Batch, Kind::Pos, Kind::Chan]
        );
        let (first, rest) = v.split_at(row.min(v.len()));
        if !ordered || rest.chunks(row.max(1)).any(|r| r != first) {
            return Err("a table that differs from sequence to sequence, or lies in another order".into());
        }
        own.iter_mut().for_each(|a| a.retain(|d| d.kind != Kind::Batch));
        let t = self.terms.put(Term::Table(first.iter().map(|x| x.to_bits()).collect()), stride, Pos::New);
        Ok(Real { t, axes: own })
    }

    /// Both operands of an elementwise operator as activations.
    pub(super) fn pair(&mut self, a: &Val, b: &Val) -> Option<Result<(Real, Real), String>> {
        Some(match (a, b) {
            (Val::Real(a), Val::Real(b)) => Ok((a.clone(), b.clone())),
            (Val::Real(a), b) => self.beside(b, &a.axes).map(|b| (a.clone(), b)),
            (a, Val::Real(b)) => self.beside(a, &b.axes).map(|a| (a, b.clone())),
            _ => return None,
        })
    }
}

fn to_float(node: &Node) -> bool {
    node.int("to").and_then(Type::of).is_some_and(|t| t.float().is_some())
}
