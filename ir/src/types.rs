//! Element types, symbolic dimensions and tensor types.

use std::fmt;

use crate::quant::QuantSpec;

/// What one element of a tensor is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Elem {
    /// Signed byte.
    I8,
    /// Unsigned byte.
    U8,
    /// Token ids and positions.
    I32,
    /// IEEE half precision; a storage type, arithmetic widens it to `f32`.
    F16,
    /// bfloat16; a storage type, arithmetic widens it to `f32`.
    BF16,
    /// The type of arithmetic.
    F32,
    /// Used where a test asks for more digits.
    F64,
    /// Integer codes under a quantization scheme; scales and zero points are operands of `dcast`.
    Quant(QuantSpec),
}

impl Elem {
    /// Whether this is one of the float types.
    pub fn is_float(self) -> bool {
        matches!(self, Elem::F16 | Elem::BF16 | Elem::F32 | Elem::F64)
    }

    /// Bits that one element takes in dense storage.
    pub fn bits(self) -> usize {
        match self {
            Elem::I8 | Elem::U8 => 8,
            Elem::F16 | Elem::BF16 => 16,
            Elem::I32 | Elem::F32 => 32,
            Elem::F64 => 64,
            Elem::Quant(q) => q.bits as usize,
        }
    }

    /// The first element of plain little-endian storage that is NaN or infinite.
    pub fn find_non_finite(self, bytes: &[u8]) -> Option<usize> {
        // Infinity and NaN have all exponent bits set.
        match self {
            Elem::F16 => find(bytes, |b| u16::from_le_bytes(*b) & 0x7C00 == 0x7C00),
            Elem::BF16 => find(bytes, |b| u16::from_le_bytes(*b) & 0x7F80 == 0x7F80),
            Elem::F32 => find(bytes, |b| u32::from_le_bytes(*b) & 0x7F80_0000 == 0x7F80_0000),
            Elem::F64 => find(bytes, |b| u64::from_le_bytes(*b) & (0x7FF << 52) == 0x7FF << 52),
            Elem::I8 | Elem::U8 | Elem::I32 | Elem::Quant(_) => None,
        }
    }

    /// Bytes of one row of `cols` elements in dense storage. Rows of quantized codes start on a byte.
    pub fn row_bytes(self, cols: usize) -> usize {
        (self.bits() * cols).div_ceil(8)
    }
}

/// The first element of `N` bytes that is bad. Blocks are looked through without a branch first.
fn find<const N: usize>(bytes: &[u8], bad: impl Fn(&[u8; N]) -> bool) -> Option<usize> {
    const BLOCK: usize = 1024;
    let all = bytes.as_chunks::<N>().0;
    let block = all.chunks(BLOCK).position(|block| block.iter().fold(false, |any, e| any | bad(e)))?;
    all[block * BLOCK..].iter().position(bad).map(|at| block * BLOCK + at)
}

impl fmt::Display for Elem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Elem::I8 => f.write_str("i8"),
            Elem::U8 => f.write_str("u8"),
            Elem::I32 => f.write_str("i32"),
            Elem::F16 => f.write_str("f16"),
            Elem::BF16 => f.write_str("bf16"),
            Elem::F32 => f.write_str("f32"),
            Elem::F64 => f.write_str("f64"),
            Elem::Quant(q) => q.fmt(f),
        }
    }
}

/// The sizes that are known only when a function runs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Sym {
    /// Sequences in the batch.
    B,
    /// New positions in each sequence.
    S,
    /// Positions already in the cache.
    P,
    /// `P + S`: positions that attention sees.
    T,
}

impl Sym {
    /// All symbols, in order.
    pub const ALL: [Sym; 4] = [Sym::B, Sym::S, Sym::P, Sym::T];

    /// The letter of the text form.
    pub fn letter(self) -> &'static str {
        match self {
            Sym::B => "B",
            Sym::S => "S",
            Sym::P => "P",
            Sym::T => "T",
        }
    }
}

/// One dimension of a shape.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Dim {
    /// Known while compiling.
    Fixed(u64),
    /// Known when the function runs.
    Sym(Sym),
}

impl Dim {
    /// The size, if it is known while compiling.
    pub fn fixed(self) -> Option<usize> {
        match self {
            Dim::Fixed(n) => usize::try_from(n).ok(),
            Dim::Sym(_) => None,
        }
    }
}

impl From<usize> for Dim {
    fn from(n: usize) -> Self {
        Dim::Fixed(n as u64)
    }
}

impl From<Sym> for Dim {
    fn from(s: Sym) -> Self {
        Dim::Sym(s)
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dim::Fixed(n) => write!(f, "{n}"),
            Dim::Sym(s) => f.write_str(s.letter()),
        }
    }
}

/// A shape, outermost dimension first; empty for a scalar.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Shape(pub Vec<Dim>);

impl Shape {
    /// A shape of known sizes.
    pub fn fixed(dims: &[usize]) -> Self {
        Shape(dims.iter().map(|&n| Dim::from(n)).collect())
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.0.len()
    }

    /// The last dimension.
    pub fn last(&self) -> Option<Dim> {
        self.0.last().copied()
    }

    /// All sizes, if all are known while compiling.
    pub fn as_fixed(&self) -> Option<Vec<usize>> {
        self.0.iter().map(|d| d.fixed()).collect()
    }

    /// Sizes under the given values of the symbols.
    pub fn resolve(&self, dims: &DimEnv) -> Vec<usize> {
        self.0.iter().map(|&d| dims.size(d)).collect()
    }

    /// The shape that two operands take together, aligned at the last dimension as numpy does.
    /// `None` where sizes differ and neither is 1.
    pub fn broadcast(&self, other: &Shape) -> Option<Shape> {
        let rank = self.rank().max(other.rank());
        let at = |s: &Shape, i: usize| {
            let skip = rank - s.rank();
            if i < skip { Dim::Fixed(1) } else { s.0[i - skip] }
        };
        (0..rank)
            .map(|i| match (at(self, i), at(other, i)) {
                (a, b) if a == b => Some(a),
                (Dim::Fixed(1), b) => Some(b),
                (a, Dim::Fixed(1)) => Some(a),
                _ => None,
            })
            .collect::<Option<Vec<_>>>()
            .map(Shape)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, d) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(", ")?;
            }
            d.fmt(f)?;
        }
        f.write_str("]")
    }
}

/// Values of the symbolic dimensions in one call. `T` is always `past + seq`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DimEnv {
    /// `B`
    pub batch: usize,
    /// `S`
    pub seq: usize,
    /// `P`
    pub past: usize,
}

impl DimEnv {
    /// The size of one dimension.
    pub fn size(&self, d: Dim) -> usize {
        match d {
            Dim::Fixed(n) => n as usize,
            Dim::Sym(Sym::B) => self.batch,
            Dim::Sym(Sym::S) => self.seq,
            Dim::Sym(Sym::P) => self.past,
            Dim::Sym(Sym::T) => self.past + self.seq,
        }
    }
}

/// Element type and shape of a value.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TensorType {
    /// What an element is.
    pub elem: Elem,
    /// Outermost dimension first.
    pub shape: Shape,
}

impl TensorType {
    /// A type from its parts.
    pub fn new(elem: Elem, shape: impl Into<Shape>) -> Self {
        TensorType { elem, shape: shape.into() }
    }

    /// Bytes in dense storage, if the shape is known.
    pub fn bytes(&self) -> Option<usize> {
        let dims = self.shape.as_fixed()?;
        let Some((&cols, rows)) = dims.split_last() else { return Some(self.elem.row_bytes(1)) };
        Some(rows.iter().product::<usize>() * self.elem.row_bytes(cols))
    }
}

impl From<Vec<Dim>> for Shape {
    fn from(dims: Vec<Dim>) -> Self {
        Shape(dims)
    }
}

impl From<&[usize]> for Shape {
    fn from(dims: &[usize]) -> Self {
        Shape::fixed(dims)
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(dims: [usize; N]) -> Self {
        Shape::fixed(&dims)
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.elem, self.shape)
    }
}
