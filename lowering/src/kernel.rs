//! Kernels of a lowered function.

use std::fmt;

use qrmc_ir::{Dim, Op, QuantSpec, RopeAttr, Rule, Shape, TensorType};

/// One of the products of a [`Kernel::Linear`], as numbers of operands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinearPart {
    /// `[n, k]`
    pub weight: usize,
    /// `[n]`
    pub bias: Option<usize>,
    /// Added at the end, as large as the product.
    pub add: Option<usize>,
}

/// One kernel of a [`Kernel::Rows`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RowStep {
    /// What is run.
    pub kernel: Kernel,
    /// Numbers of the values that it reads, and the types in which it reads them.
    pub ins: Vec<(usize, TensorType)>,
    /// Types of its results.
    pub outs: Vec<TensorType>,
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
    /// `x, w [, bias] [, add], .. -> x wᵀ [+ bias] [+ add], ..` for one `x` and some constant `w`, dense or packed. A quantized `x` is
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
    /// Kernels that compute each row `[b, s]` of their results from the same row of their operands, one after another for a
    /// few rows, then for the next. Values are numbered: the operands, then the results of the steps in order.
    Rows {
        /// How many operands there are.
        ins: usize,
        /// The kernels.
        steps: Vec<RowStep>,
        /// The values that are results; the others are gone with their rows.
        outs: Vec<usize>,
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
            Kernel::Linear(parts) if parts.iter().any(|p| p.add.is_some()) => f.write_str("linear_add"),
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
            Kernel::Rows { ins, steps, .. } => {
                f.write_str("rows {")?;
                let (mut end, mut next) = ("", *ins);
                for s in steps {
                    let outs: Vec<String> = (next..next + s.outs.len()).map(|v| format!("%{v}")).collect();
                    let args: Vec<String> = s.ins.iter().map(|(v, _)| format!("%{v}")).collect();
                    write!(f, "{end}{} = {} {}", outs.join(", "), s.kernel, args.join(", "))?;
                    (end, next) = ("; ", next + s.outs.len());
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
