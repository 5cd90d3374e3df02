//! A lowered function: a printable list of kernel calls over planned buffers.

use std::fmt;

use qrmc_ir::{BinaryOp, Dim, DimEnv, Elem, Op, Shape, Sym, TensorType};

use crate::kernel::{CacheForm, Kernel};

/// Where a kernel finds an operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Arg {
    /// The n-th argument of the function.
    Param(u32),
    /// The n-th constant, ready before the first run.
    Const(u32),
    /// A planned buffer.
    Buffer(u32),
}

/// A constant of a program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Const {
    /// The n-th weight of the function, as stored.
    Weight(u32),
    /// Codes with scales and zero points, all weights; they stay packed.
    Packed {
        /// How they lie in memory.
        layout: Layout,
        /// Index of the codes among the weights.
        codes: u32,
        /// Index of the scales.
        scale: u32,
        /// Index of the zero points.
        zero: Option<u32>,
    },
    /// The n-th result of the program's initialiser, which computes what is weight-derived.
    Derived(u32),
}

/// How packed codes lie in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// Row after row, as they are stored.
    Rows,
    /// Sixteen rows side by side: for products, which read all of them.
    Tiles,
}

/// One kernel call.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// What is run.
    pub kernel: Kernel,
    /// Operands and their types.
    pub ins: Vec<(Arg, TensorType)>,
    /// Results: buffers and their types.
    pub outs: Vec<(u32, TensorType)>,
}

/// A number of elements: a factor times powers of the symbols.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Size {
    factor: u64,
    powers: [u8; 4],
}

impl Size {
    /// Elements of a shape.
    pub fn of(shape: &Shape) -> Self {
        let mut s = Size { factor: 1, powers: [0; 4] };
        for d in &shape.0 {
            match *d {
                Dim::Fixed(n) => s.factor = s.factor.saturating_mul(n),
                Dim::Sym(sym) => s.powers[sym as usize] += 1,
            }
        }
        s
    }

    /// The number under given values of the symbols.
    pub fn at(self, dims: &DimEnv) -> usize {
        let mut n = self.factor as usize;
        for s in Sym::ALL {
            for _ in 0..self.powers[s as usize] {
                n = n.saturating_mul(dims.size(Dim::Sym(s)));
            }
        }
        n
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.factor)?;
        for s in Sym::ALL {
            for _ in 0..self.powers[s as usize] {
                write!(f, "*{}", s.letter())?;
            }
        }
        Ok(())
    }
}

/// A buffer: as large as the largest value that it ever holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Buffer {
    /// Host element type.
    pub elem: Elem,
    /// Sizes of the values that share it.
    pub sizes: Vec<Size>,
}

impl Buffer {
    /// Elements needed under given values of the symbols.
    pub fn len(&self, dims: &DimEnv) -> usize {
        self.sizes.iter().map(|s| s.at(dims)).max().unwrap_or(0)
    }
}

/// A lowered function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Program {
    /// Name of the function.
    pub name: String,
    /// Types of the parameters.
    pub params: Vec<TensorType>,
    /// Types of the weights, in order of first use; a program is shared by functions that differ only in their names.
    pub weights: Vec<TensorType>,
    /// Computes the derived constants from the weights.
    pub init: Option<Box<Program>>,
    /// Constants, by index.
    pub consts: Vec<(Const, TensorType)>,
    /// Planned buffers.
    pub buffers: Vec<Buffer>,
    /// Kernel calls in order.
    pub steps: Vec<Step>,
    /// Results and their types.
    pub results: Vec<(Arg, TensorType)>,
}

impl Program {
    /// Bytes of all buffers under given values of the symbols.
    pub fn buffer_bytes(&self, dims: &DimEnv) -> usize {
        self.buffers.iter().map(|b| b.len(dims).saturating_mul(b.elem.bits().div_ceil(8))).sum()
    }

    /// Whether this parameter is a cache, which may be appended to in place, and how it keeps its rows: `Some(None)` as
    /// floats.
    pub fn cache(&self, param: u32) -> Option<Option<&CacheForm>> {
        self.steps.iter().find_map(|s| {
            let form = match &s.kernel {
                Kernel::Op(Op::CacheAppend) => None,
                Kernel::CacheAppend(form) => Some(form),
                _ => return None,
            };
            s.ins.first().is_some_and(|(a, _)| *a == Arg::Param(param)).then_some(form)
        })
    }
}

impl fmt::Display for Arg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Arg::Param(i) => write!(f, "p{i}"),
            Arg::Const(i) => write!(f, "c{i}"),
            Arg::Buffer(i) => write!(f, "b{i}"),
        }
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "program {} {{", self.name)?;
        for (i, ty) in self.params.iter().enumerate() {
            writeln!(f, "  p{i} : {ty}")?;
        }
        for (i, (c, ty)) in self.consts.iter().enumerate() {
            let from = match c {
                Const::Weight(w) => format!("weight {w}"),
                Const::Packed { layout, codes, scale, zero } => {
                    let word = if *layout == Layout::Tiles { "tiles" } else { "packed" };
                    let zero = zero.map(|z| format!(", zero {z}")).unwrap_or_default();
                    format!("{word} {codes}, scale {scale}{zero}")
                }
                Const::Derived(n) => format!("derived {n}"),
            };
            writeln!(f, "  c{i} : {ty} = {from}")?;
        }
        for (i, b) in self.buffers.iter().enumerate() {
            let sizes = b.sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            writeln!(f, "  b{i} : {} max({sizes})", b.elem)?;
        }
        for s in &self.steps {
            let outs = s.outs.iter().map(|(b, ty)| format!("b{b}: {ty}")).collect::<Vec<_>>().join(", ");
            let ins = s.ins.iter().map(|(a, _)| a.to_string()).collect::<Vec<_>>().join(", ");
            writeln!(f, "  {outs} = {} {ins}", s.kernel)?;
        }
        let results = self.results.iter().map(|(a, _)| a.to_string()).collect::<Vec<_>>().join(", ");
        writeln!(f, "  return {results}\n}}")
    }
}

/// Which elementwise step may take a bias: an addition of a vector along the last axis.
pub(crate) fn is_bias_add(op: &Op, bias: &TensorType, product: &TensorType) -> bool {
    *op == Op::Binary(BinaryOp::Add) && bias.shape.rank() == 1 && bias.shape.last() == product.shape.last()
}
