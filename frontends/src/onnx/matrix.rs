//! Matrices of a file: floats in either order, or codes with scales.

use std::sync::Arc;

use qrmc_ir::grid::{self, QParam};
use qrmc_ir::{Elem, Grain, QuantSpec, TensorType, pack};

use super::file::{Stored, Type};

/// How the codes of a matrix are stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) enum Order {
    /// An element each, a row after the other.
    Rows,
    /// An element each, a column after the other.
    Columns,
    /// `com.microsoft.MatMulNBits`: blocks of a row, dense bits, least significant first.
    Blobs,
}

/// What a matrix is made of: numbers of tensors of the file.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum Body {
    Floats {
        tensor: usize,
        order: Order,
    },
    Literal(Arc<[u32]>),
    Codes {
        codes: usize,
        scale: usize,
        zero: Option<usize>,
        spec: QuantSpec,
        order: Order,
        /// Neighbouring runs whose scales and zero points are stored again and again.
        repeat: usize,
    },
}

/// A matrix as linear layers store it, `[rows, cols]`, an output for each row: rows `first .. first + rows` of a stored one.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Matrix {
    pub(super) body: Body,
    pub(super) rows: u64,
    pub(super) cols: u64,
    pub(super) first: u64,
    /// Rows of the stored matrix.
    pub(super) stored: u64,
}

/// A part of a matrix that is handed out as a weight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    /// Floats as they are stored, or the values of codes.
    Values,
    Codes,
    Scale,
    Zero,
}

/// Most elements of a matrix that is compared with a Hadamard matrix.
const FEW: u64 = 1 << 16;

type Read<R> = Result<R, String>;

/// How scales and zero points are stored.
type Sides = (QuantSpec, Order, usize);

impl Matrix {
    /// The numbers of a small matrix of floats.
    pub(super) fn few(&self, tensors: &[Stored]) -> Option<Arc<[u32]>> {
        match &self.body {
            Body::Literal(v) => Some(v.clone()),
            Body::Floats { tensor, .. }
                if tensors[*tensor].ty == Type::F32 && self.rows * self.cols <= FEW =>
            {
                let bytes = self.read(Part::Values, tensors).ok()?;
                Some(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
            }
            _ => None,
        }
    }

    /// The tensor that gives it a name.
    pub(super) fn tensor(&self) -> Option<usize> {
        match self.body {
            Body::Floats { tensor, .. } => Some(tensor),
            Body::Codes { codes, .. } => Some(codes),
            Body::Literal(_) => None,
        }
    }

    pub(super) fn spec(&self) -> Option<QuantSpec> {
        match self.body {
            Body::Codes { spec, .. } => Some(spec),
            _ => None,
        }
    }

    /// The type of a part.
    pub(super) fn ty(&self, part: Part, tensors: &[Stored]) -> TensorType {
        let [rows, cols] = [self.rows, self.cols].map(|n| n as usize);
        let elem = match (&self.body, part) {
            (Body::Floats { tensor, .. }, _) => tensors[*tensor].ty.float().unwrap_or(Elem::F32),
            (Body::Codes { spec, .. }, Part::Codes) => Elem::Quant(*spec),
            (Body::Codes { spec, .. }, Part::Scale) => spec.scale.elem(),
            (Body::Codes { .. }, Part::Zero) => Elem::U8,
            _ => Elem::F32,
        };
        match (part, self.spec()) {
            (Part::Scale | Part::Zero, Some(spec)) => TensorType::new(elem, &self.sides(spec)[..]),
            _ => TensorType::new(elem, [rows, cols].as_slice()),
        }
    }

    /// The sizes of scales and zero points.
    fn sides(&self, spec: QuantSpec) -> Vec<usize> {
        let [rows, cols] = [self.rows, self.cols].map(|n| n as usize);
        match spec.grain {
            Grain::Tensor => vec![1],
            Grain::Channel => vec![cols],
            Grain::Group(g) => vec![rows, cols / g.max(1) as usize],
            Grain::Row | Grain::Token => vec![rows, 1],
        }
    }

    /// The same matrix with one scale where neighbouring runs store equal ones.
    ///
    /// # Errors
    /// As [`Matrix::read`].
    pub(super) fn gathered(self, tensors: &[Stored]) -> Read<Self> {
        let Body::Codes { spec, repeat: 1, .. } = self.body else { return Ok(self) };
        let Grain::Group(g) = spec.grain else { return Ok(self) };
        let (runs, width) = (self.cols as usize / g as usize, spec.scale.elem().bits() / 8);
        let scales = self.read(Part::Scale, tensors)?;
        let zeros = if spec.zero { self.read(Part::Zero, tensors)? } else { Vec::new() };
        let same = |bytes: &[u8], width: usize, r: usize| {
            bytes.chunks(r * width).all(|run| run.chunks(width).all(|x| x == &run[..width]))
        };
        let fits = |r: &usize| runs.is_multiple_of(*r) && same(&scales, width, *r) && same(&zeros, 1, *r);
        let Some(r) = (2..=runs).rev().find(fits) else { return Ok(self) };
        let grain = if r == runs { Grain::Row } else { Grain::Group(g * r as u32) };
        let mut out = self;
        if let Body::Codes { spec, repeat, .. } = &mut out.body {
            (spec.grain, *repeat) = (grain, r);
        }
        Ok(out)
    }

    /// The bytes of a part, as [`qrmc_ir::RawWeight`] says.
    ///
    /// # Errors
    /// What is wrong with the stored elements, in a sentence.
    pub(super) fn read(&self, part: Part, tensors: &[Stored]) -> Read<Vec<u8>> {
        match (&self.body, part) {
            (Body::Literal(v), _) => Ok(v.iter().flat_map(|b| b.to_le_bytes()).collect()),
            (Body::Floats { tensor, order }, _) => Ok(self.floats(&tensors[*tensor], *order)),
            (Body::Codes { .. }, Part::Values) => self.values(tensors),
            (Body::Codes { codes, spec, order, .. }, Part::Codes) => {
                self.codes(&tensors[*codes], *spec, *order)
            }
            (Body::Codes { scale, spec, order, repeat, .. }, Part::Scale) => {
                let s = &tensors[*scale];
                let width = spec.scale.elem().bits() / 8;
                let bytes = self.side(&s.bytes, (*spec, *order, *repeat), width);
                match spec.scale.elem().find_non_finite(&bytes) {
                    None => Ok(bytes),
                    Some(at) => Err(format!("scale {at} of `{}` is NaN or infinite", s.name)),
                }
            }
            (Body::Codes { zero, spec, order, repeat, .. }, Part::Zero) => {
                self.zeros(zero.map(|z| &tensors[z]), (*spec, *order, *repeat))
            }
        }
    }

    /// Elements of `width` bytes, put in the order of rows.
    fn floats(&self, t: &Stored, order: Order) -> Vec<u8> {
        let width = t.ty.float().unwrap_or(Elem::F32).bits() / 8;
        let [rows, cols, first, all] = [self.rows, self.cols, self.first, self.stored].map(|n| n as usize);
        if order != Order::Columns {
            return t.bytes[first * cols * width..(first + rows) * cols * width].to_vec();
        }
        let mut out = Vec::with_capacity(rows * cols * width);
        for row in first..first + rows {
            for col in 0..cols {
                let at = (col * all + row) * width;
                out.extend_from_slice(&t.bytes[at..at + width]);
            }
        }
        out
    }

    /// The code of each element of a row, unsigned.
    fn row(&self, t: &Stored, spec: QuantSpec, order: Order, row: usize, mut put: impl FnMut(u8)) {
        let (cols, all) = (self.cols as usize, self.stored as usize);
        let row = row + self.first as usize;
        match order {
            Order::Rows => (0..cols).for_each(|c| put(t.field(row * cols + c))),
            Order::Columns => (0..cols).for_each(|c| put(t.field(c * all + row))),
            Order::Blobs => {
                let len = Elem::Quant(spec).row_bytes(cols);
                pack::unpack_row(&t.bytes[row * len..(row + 1) * len], spec.bits, cols, put);
            }
        }
    }

    fn codes(&self, t: &Stored, spec: QuantSpec, order: Order) -> Read<Vec<u8>> {
        let cols = self.cols as usize;
        let mut out = Vec::with_capacity(self.rows as usize * Elem::Quant(spec).row_bytes(cols));
        let mut one = Vec::with_capacity(cols);
        for row in 0..self.rows as usize {
            one.clear();
            self.row(t, spec, order, row, |c| one.push(c));
            pack::pack_row(one.iter().copied(), spec.bits, &mut out);
        }
        Ok(out)
    }

    /// Scales or zero points of `width` bytes in the order of rows.
    fn side(&self, bytes: &[u8], (spec, order, repeat): Sides, width: usize) -> Vec<u8> {
        let sizes = self.sides(spec);
        let [rows, runs] = sizes[..] else { return bytes.to_vec() };
        let (first, all) = (self.first as usize, self.stored as usize);
        let at = |row: usize, run: usize| match order {
            Order::Columns => run * repeat * all + first + row,
            Order::Rows | Order::Blobs => ((first + row) * runs + run) * repeat,
        };
        let places = (0..rows).flat_map(|row| (0..runs).map(move |run| at(row, run)));
        places.flat_map(|i| bytes[i * width..(i + 1) * width].iter().copied()).collect()
    }

    fn zeros(&self, t: Option<&Stored>, (spec, order, repeat): Sides) -> Read<Vec<u8>> {
        let count: usize = self.sides(spec).iter().product();
        let Some(t) = t else { return Ok(vec![0; count]) };
        let bytes: Vec<u8> = match order {
            // A row of them fills whole bytes.
            Order::Blobs => {
                let runs = count / (self.rows as usize).max(1) * repeat;
                let len = (runs * usize::from(spec.bits)).div_ceil(8);
                let mut out = Vec::with_capacity(count);
                for row in t.bytes.chunks(len.max(1)) {
                    pack::unpack_row(row, spec.bits, runs, |z| out.push(z));
                }
                out
            }
            _ => (0..t.count() as usize).map(|i| t.field(i)).collect(),
        };
        Ok(self.side(&bytes, (spec, order, repeat), 1))
    }

    /// `scale * (code - zero)`, rounded once.
    fn values(&self, tensors: &[Stored]) -> Read<Vec<u8>> {
        let Body::Codes { codes, spec, order, .. } = &self.body else { return Ok(Vec::new()) };
        let raw = self.read(Part::Scale, tensors)?;
        let sizes = self.sides(*spec);
        let count: usize = sizes.iter().product();
        let scales = qrmc_ir::Tensor::from_le_bytes(spec.scale.elem(), &[count], &raw)?;
        let scales = scales.as_f32().unwrap_or_default();
        let zeros = match spec.zero {
            true => self.read(Part::Zero, tensors)?,
            false => vec![0; count],
        };
        let cols = self.cols as usize;
        let middle = i32::from(spec.signed) << (spec.bits - 1);
        let runs = if sizes.len() == 2 { sizes[1] } else { 1 };
        let mut out = Vec::with_capacity(self.rows as usize * cols * 4);
        for row in 0..self.rows as usize {
            let mut col = 0;
            self.row(&tensors[*codes], *spec, *order, row, |c| {
                let at = match spec.grain {
                    Grain::Tensor => 0,
                    Grain::Channel => col,
                    _ => row * runs + col / (cols / runs.max(1)).max(1),
                };
                let q = QParam { scale: scales[at], zero: i32::from(zeros[at]) };
                out.extend_from_slice(&grid::dequantize(i32::from(c) - middle, q).to_le_bytes());
                col += 1;
            });
        }
        Ok(out)
    }
}

impl Matrix {
    /// The bytes of a part that is stored as it is handed out.
    pub(super) fn lent<'a>(&self, part: Part, tensors: &'a [Stored]) -> Option<&'a [u8]> {
        let Body::Floats { tensor, order: Order::Rows } = self.body else { return None };
        let t = &tensors[tensor];
        let row = self.cols as usize * t.ty.float()?.bits() / 8;
        let (first, rows) = (self.first as usize, self.rows as usize);
        (part == Part::Values).then(|| t.bytes.get(first * row..(first + rows) * row)).flatten()
    }
}
