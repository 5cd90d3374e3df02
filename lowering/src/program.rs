//! A lowered function: a printable list of kernel calls over planned buffers.

use std::fmt;

use qrmc_ir::{BinaryOp, Dim, DimEnv, Elem, Op, QuantSpec, RopeAttr, Rule, Shape, Sym, TensorType};

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

/// One of the products of a [`Kernel::Linear`], as numbers of operands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinearPart {
    /// `[n, k]`
    pub weight: usize,
    /// `[n]`
    pub bias: Option<usize>,
}

/// How a cache keeps its rows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CacheForm {
    /// The codes that are kept, with scales and zero points for each group, or for each channel of all rows.
    pub spec: QuantSpec,
    /// What happens to a row between its codes and the readers, in order.
    pub reads: Vec<CacheRead>,
}

/// Something that is done to a row of a cache when it is read. Operands are those of the step that appends.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CacheRead {
    /// A vector is added.
    Add {
        /// `[width]`
        operand: usize,
    },
    /// Each head is turned by the row's position.
    Rope {
        /// The rotation.
        attr: RopeAttr,
        /// Positions of the new rows, `[S]`.
        operand: usize,
    },
    /// A vector whose heads are turned by the row's position, and mixed, is added.
    AddTurned {
        /// `[width]`
        operand: usize,
        /// The rotation.
        attr: RopeAttr,
        /// Positions of the new rows, `[S]`.
        positions: usize,
        /// Channels that a Hadamard matrix mixes afterwards, if one does.
        block: Option<u64>,
    },
}

impl CacheForm {
    /// The operand that holds the positions of new rows, where reading depends on them.
    pub fn positions(&self) -> Option<usize> {
        self.reads.iter().find_map(|r| match r {
            CacheRead::Add { .. } => None,
            CacheRead::Rope { operand, .. } => Some(*operand),
            CacheRead::AddTurned { positions, .. } => Some(*positions),
        })
    }
}

impl fmt::Display for CacheForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.spec)?;
        for r in &self.reads {
            match r {
                CacheRead::Add { .. } => f.write_str(", add")?,
                CacheRead::Rope { .. } => f.write_str(", rope")?,
                CacheRead::AddTurned { block: None, .. } => f.write_str(", add rope")?,
                CacheRead::AddTurned { block: Some(n), .. } => write!(f, ", add hadamard:{n} rope")?,
            }
        }
        Ok(())
    }
}

/// How an operand of an elementwise operation lies over the result, `[rows, n]` with all leading axes as one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spread {
    /// It has the shape of the result.
    All,
    /// `[n]`, the same for each row.
    Vector,
    /// `[rows, 1]`, one number for each row.
    Rows,
    /// One number.
    One,
}

impl Spread {
    /// How a tensor of shape `x` lies over one of shape `whole`, if it is one of these.
    pub(crate) fn of(x: &Shape, whole: &Shape) -> Option<Self> {
        let one = Dim::Fixed(1);
        if x == whole {
            return Some(Spread::All);
        }
        if x.0.iter().all(|d| *d == one) {
            return Some(Spread::One);
        }
        let ((x_last, x_lead), (last, lead)) = (x.0.split_last()?, whole.0.split_last()?);
        if x_last == last && x_lead.iter().all(|d| *d == one) {
            return Some(Spread::Vector);
        }
        (*x_last == one && x_lead == lead).then_some(Spread::Rows)
    }

    fn name(self) -> &'static str {
        match self {
            Spread::All => "all",
            Spread::Vector => "vector",
            Spread::Rows => "rows",
            Spread::One => "one",
        }
    }
}

/// One kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kernel {
    /// `x, w [, bias], .. -> x wᵀ [+ bias], ..` for one `x` and some constant `w`, dense or packed. A quantized `x` is
    /// `codes, scale [, zero]`: then the product is one of codes, which is a whole number, and scales come after.
    Linear(Vec<LinearPart>),
    /// `x [, hi, lo] -> scale [, zero], codes`: `qparams` and the `qcast` that goes with it.
    Quantize(QuantSpec, Rule),
    /// `cache, codes, scale [, zero], operands -> longer cache`: appends rows as codes. What a row is for those who read the
    /// cache, its reads say.
    CacheAppend(CacheForm),
    /// Elementwise operations in one pass over memory. Values are numbered: the operands, then the results of the
    /// operations in order; the last of these is the result.
    Map {
        /// How each operand lies over the result.
        ins: Vec<Spread>,
        /// The operations, each with the values that it reads.
        steps: Vec<(Op, Vec<usize>)>,
    },
    /// `a[.., m, c], b[.., n, c] -> [m, n]`: `outer` of two operands whose last axes are swapped first.
    OuterMiddle,
    /// `x wᵀ` of two matrices whose rows are whole numbers times a scale, as a product of these numbers. Operands are the
    /// two, then for each the operands of the `fake_quant` that it is the result of.
    OnGrid {
        /// The two operations.
        casts: Box<[Op; 2]>,
        /// How many operands the first has.
        split: usize,
    },
    /// A product, `matmul` or `outer`, of factors that are rounded to bfloat16 first.
    Bf16(Op),
    /// Any operation as it stands in the IR.
    Op(Op),
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kernel::Linear(_) => f.write_str("linear"),
            Kernel::Quantize(spec, rule) => write!(f, "quantize {{q = {spec}, rule = {rule}}}"),
            Kernel::CacheAppend(form) => write!(f, "cache_append {{{form}}}"),
            Kernel::Map { ins, steps } => {
                let spread: Vec<&str> = ins.iter().map(|s| s.name()).collect();
                write!(f, "map ({}) {{", spread.join(", "))?;
                for (i, (op, args)) in steps.iter().enumerate() {
                    let args: Vec<String> = args.iter().map(|v| format!("%{v}")).collect();
                    let (end, word) = (if i == 0 { "" } else { "; " }, op.text().0);
                    write!(f, "{end}%{} = {word} {}", ins.len() + i, args.join(", "))?;
                }
                f.write_str("}")
            }
            Kernel::OuterMiddle => f.write_str("outer_middle"),
            Kernel::OnGrid { .. } => f.write_str("matmul.t on grids"),
            Kernel::Bf16(op) | Kernel::Op(op) => {
                if matches!(self, Kernel::Bf16(_)) {
                    f.write_str("bf16 ")?;
                }
                let (word, attrs) = op.text();
                f.write_str(word)?;
                if !attrs.is_empty() {
                    let attrs =
                        attrs.iter().map(|(k, v)| format!("{k} = {v}")).collect::<Vec<_>>().join(", ");
                    write!(f, " {{{attrs}}}")?;
                }
                Ok(())
            }
        }
    }
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
