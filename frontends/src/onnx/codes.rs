//! Matrices of codes: `DequantizeLinear`, and the operators of onnxruntime that hold packed ones.

use std::rc::Rc;

use qrmc_ir::{Elem, Grain, QuantSpec, ScaleType};

use super::eval::{Eval, Made, Val, one};
use super::file::{Node, Type};
use super::fold;
use super::matrix::{Body, Matrix, Order};
use super::term::Bin;

impl Eval {
    /// The scales of codes that lie `[rows, cols]` in `order`.
    fn scales(&self, v: Option<&Val>) -> Result<(usize, ScaleType), String> {
        let Some(Val::Stored { tensor, swapped: false, .. }) = v else {
            return Err("scales that are not stored".into());
        };
        match self.stored(*tensor).ty.float() {
            Some(Elem::F32) => Ok((*tensor, ScaleType::F32)),
            Some(Elem::F16) => Ok((*tensor, ScaleType::F16)),
            Some(Elem::BF16) => Ok((*tensor, ScaleType::BF16)),
            _ => Err("scales that are no floats".into()),
        }
    }

    pub(super) fn dequantize_linear(&mut self, node: &Node, ins: &[Option<Val>]) -> Made {
        let Some(Some(Val::Stored { tensor, dims, swapped: false })) = ins.first() else {
            return Err("codes that are not stored".into());
        };
        let ([a, b], ty) = (&dims[..], self.stored(*tensor).ty) else {
            return Err(format!("codes of sizes {dims:?} are no matrix"));
        };
        let (scale, elem) = self.scales(ins.get(1).and_then(Option::as_ref))?;
        let have = self.stored(scale).dims.clone();
        let axis = fold::axis(node.int("axis").unwrap_or(1), 2)?;
        let block = node.int("block_size").unwrap_or(0).max(0) as u64;
        let (a, b) = (*a as u64, *b as u64);
        // Scales run along `axis` in blocks; that axis is the columns of the matrix.
        let (grain, columns) = match (&have[..], block) {
            ([] | [1], 0) => (Grain::Tensor, false),
            ([n], 0) if axis == 0 && *n == a => (Grain::Row, false),
            ([n], 0) if axis == 1 && *n == b => (Grain::Row, true),
            ([p, q], n) if n > 0 && axis == 1 && *p == a && q * n == b => (run(n, b), false),
            ([p, q], n) if n > 0 && axis == 0 && p * n == a && *q == b => (run(n, a), true),
            _ => return Err(format!("scales {have:?} with blocks of {block} along axis {axis} of {dims:?}")),
        };
        let (rows, cols) = if columns { (b, a) } else { (a, b) };
        let (bits, signed) = match ty {
            Type::U4 => (4, false),
            Type::I4 => (4, true),
            Type::U8 => (8, false),
            Type::I8 => (8, true),
            other => return Err(format!("codes of type {other:?}")),
        };
        let zero = self.zero_points(ins.get(2).and_then(Option::as_ref), ty, &have)?;
        let spec = match (signed, zero) {
            (true, None) => QuantSpec::sym(bits, grain),
            _ => QuantSpec::asym(bits, grain),
        };
        let order = if columns { Order::Columns } else { Order::Rows };
        let spec = QuantSpec { scale: elem, ..spec };
        let body = Body::Codes { codes: *tensor, scale, zero, spec, order, repeat: 1 };
        let m = Matrix { body, rows, cols, first: 0, stored: rows };
        Ok(vec![Val::Codes { m: Rc::new(m), swapped: columns }])
    }

    /// The tensor of zero points, unless all are what codes without any have.
    fn zero_points(&self, v: Option<&Val>, ty: Type, sizes: &[u64]) -> Result<Option<usize>, String> {
        let Some(v) = v else { return Ok(None) };
        let Val::Stored { tensor, .. } = v else { return Err("zero points that are not stored".into()) };
        let z = self.stored(*tensor);
        if z.ty != ty || z.dims != sizes {
            return Err(format!("zero points {:?} of type {:?} beside scales {sizes:?}", z.dims, z.ty));
        }
        let signed = matches!(ty, Type::I4 | Type::I8);
        Ok((!(signed && z.bytes.iter().all(|&b| b == 0))).then_some(*tensor))
    }

    /// The matrix of `MatMulNBits` and of its kin.
    fn blobs(
        &self,
        ins: [Option<&Val>; 3],
        bits: i64,
        block: u64,
        rows: u64,
        cols: u64,
    ) -> Result<Matrix, String> {
        let [Some(Val::Stored { tensor, swapped: false, .. }), scale, zero] = ins else {
            return Err("codes that are not stored".into());
        };
        let bits = match bits {
            4 => 4,
            8 => 8,
            _ => return Err(format!("codes of {bits} bits; 4 and 8 are read")),
        };
        let (codes, (scale, elem)) = (self.stored(*tensor), self.scales(scale)?);
        let whole = block > 0 && cols.is_multiple_of(block) && (cols * u64::from(bits)).is_multiple_of(8);
        if codes.ty != Type::U8 || !whole || codes.count() != rows * cols * u64::from(bits) / 8 {
            return Err(format!("codes {:?} for {rows} rows of {cols} in blocks of {block}", codes.dims));
        }
        let runs = cols / block;
        if self.stored(scale).count() != rows * runs {
            return Err(format!("scales {:?} for {rows} rows of {runs} blocks", self.stored(scale).dims));
        }
        let zero = match zero {
            None => None,
            Some(Val::Stored { tensor, .. }) => {
                let z = self.stored(*tensor);
                if z.ty != Type::U8 || z.count() != rows * (runs * u64::from(bits)).div_ceil(8) {
                    return Err(format!(
                        "zero points {:?} of type {:?}; packed bytes are read",
                        z.dims, z.ty
                    ));
                }
                Some(*tensor)
            }
            Some(_) => return Err("zero points that are not stored".into()),
        };
        let grain = run(block, cols);
        let spec = if zero.is_some() { QuantSpec::asym(bits, grain) } else { QuantSpec::sym(bits, grain) };
        let spec = QuantSpec { scale: elem, ..spec };
        let body = Body::Codes { codes: *tensor, scale, zero, spec, order: Order::Blobs, repeat: 1 };
        Matrix { body, rows, cols, first: 0, stored: rows }.gathered(&self.model.tensors)
    }

    pub(super) fn mat_mul_nbits(&mut self, node: &Node, ins: &[Option<Val>]) -> Made {
        let Some(Some(Val::Real(x))) = ins.first() else { return Err("a product of no activations".into()) };
        let size = |name: &str| node.int(name).and_then(|n| u64::try_from(n).ok()).unwrap_or(0);
        let get = |i: usize| ins.get(i).and_then(Option::as_ref);
        if let Some(n) = node.int("weight_prepacked").filter(|n| *n != 0) {
            return Err(format!("codes packed for one kind of GPU (weight_prepacked {n})"));
        }
        if get(4).is_some() {
            return Err("an order of columns (g_idx)".into());
        }
        let m = self.blobs(
            [get(1), get(2), get(3)],
            node.int("bits").unwrap_or(4),
            size("block_size"),
            size("N"),
            size("K"),
        )?;
        let y = self.linear(x, m)?;
        match get(5) {
            None => one(y),
            Some(bias) => {
                let bias = self.beside(bias, &y.axes)?;
                one(self.elementwise(Bin::Add, &y, &bias)?)
            }
        }
    }

    pub(super) fn gather_blocks(&mut self, node: &Node, ins: &[Option<Val>]) -> Made {
        let get = |i: usize| ins.get(i).and_then(Option::as_ref);
        let int = |name, otherwise| node.int(name).unwrap_or(otherwise);
        let (Some(Val::Stored { dims, .. }), Some(Val::Ids)) = (get(0), get(1)) else {
            return Err("rows of codes by other indices than tokens".into());
        };
        let [rows, bytes] = dims[..] else { return Err(format!("a table of sizes {dims:?}")) };
        if int("gather_axis", 0) != 0 || int("quantize_axis", 1) != 1 {
            return Err("a table that is cut along its rows".into());
        }
        let bits = int("bits", 4);
        let cols = bytes as u64 * 8 / bits.clamp(1, 8) as u64;
        let block = int("block_size", 128).max(0) as u64;
        let m = self.blobs([get(0), get(2), get(3)], bits, block, rows as u64, cols)?;
        self.embedding(m)
    }
}

/// Scales of whole rows are not called groups.
fn run(block: u64, cols: u64) -> Grain {
    if block == cols { Grain::Row } else { Grain::Group(block as u32) }
}
