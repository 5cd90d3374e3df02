//! Operations: one closed, flat enum.
//!
//! Primitives have a type rule, an evaluation and (where it exists) a gradient. Large operations stay whole so
//! that passes and targets can see them; each is *defined* by [`Op::expand`](crate::expand) into primitives.

use crate::attr::{Attr, AttrReader, Real};
use crate::module::{FuncId, WeightId};
use crate::quant::{QuantSpec, Rule};
use crate::rope::RopeAttr;
use crate::types::{Elem, Shape};

/// Elementwise functions of one operand. Arithmetic is `f32`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum UnaryOp {
    /// `-x`
    Neg,
    /// `|x|`
    Abs,
    /// `e^x`
    Exp,
    /// Natural logarithm.
    Log,
    /// Square root.
    Sqrt,
    /// `1 / sqrt(x)`
    Rsqrt,
    /// `1 / x`
    Recip,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// Cosine.
    Cos,
    /// Sine.
    Sin,
}

/// Elementwise functions of two operands, broadcast as numpy does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum BinaryOp {
    /// `a + b`
    Add,
    /// `a - b`
    Sub,
    /// `a * b`
    Mul,
    /// `a / b`
    Div,
    /// The larger one.
    Max,
    /// The smaller one.
    Min,
    /// 1 where `a >= b`, else 0. It has no gradient.
    Ge,
}

/// Reductions along one axis, which stays with size 1.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ReduceOp {
    /// Sum.
    Sum,
    /// Arithmetic mean.
    Mean,
    /// Largest element.
    Max,
}

/// Heads of an attention.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct AttnAttr {
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Factor on the scores before softmax.
    pub scale: Real,
}

/// An operation. Operands and results are listed with each variant as `operands -> results`.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Op {
    // Leaves and structure.
    /// `-> w`: a weight of the module, written inline as `@name`.
    Weight(WeightId),
    /// `-> c`: a small literal.
    Const {
        /// Sizes.
        shape: Vec<u64>,
        /// Row-major elements.
        data: Vec<Real>,
    },
    /// `args.. -> results..` of another function.
    Call(FuncId),

    // Primitives.
    /// `x -> y`, elementwise.
    Unary(UnaryOp),
    /// `a, b -> y`, elementwise with broadcasting.
    Binary(BinaryOp),
    /// `x -> y` with `axis` reduced to size 1.
    Reduce(ReduceOp, u8),
    /// `a [.., m, k], b [.., k, n] -> [.., m, n]`; with `trans_b`, `b [.., n, k]`. Leading dimensions broadcast.
    MatMul {
        /// Whether the right operand is stored transposed, as linear layers are.
        trans_b: bool,
    },
    /// `x -> y` in another plain element type.
    Cast(Elem),
    /// `x -> y` with the same elements in order.
    Reshape(Shape),
    /// `x -> y` with axes permuted: result axis `i` is operand axis `perm[i]`.
    Transpose(Vec<u8>),
    /// `x -> y`: `len` elements from `start` along `axis`.
    Slice {
        /// Axis, from the front.
        axis: u8,
        /// First index.
        start: u64,
        /// Number of indices.
        len: u64,
    },
    /// `a, b -> y`, one after the other along `axis`; `P` and `S` make `T`.
    Concat(u8),
    /// `table [v, n], ids [..] -> [.., n]`
    Gather,
    /// `-> mask [S, T]`: 0 where key `j <= P + i`, else minus infinity; `[S, S]` where there is no past.
    CausalMask {
        /// Whether there is no past.
        square: bool,
    },
    /// `x, like -> y`: `x` repeated to the shape of `like`, as numpy broadcasts.
    BroadcastLike,
    /// `a [.., m], b [.., n] -> [m, n]`: the sum over all leading positions of `aᵀ b`.
    Outer,
    /// `m [.., l, l] -> m⁻¹`, computed in `f64`.
    Inverse,

    // Large operations.
    /// `x -> x * sigmoid(x)`
    Silu,
    /// `x [.., n], gain [n] or [1] -> y`: `x / sqrt(mean(x²) + eps) * gain`.
    RmsNorm(Real),
    /// `x -> y` along the last axis.
    Softmax,
    /// `x [B, S, heads * head_dim], pos [S] -> y`: rotary embedding, halves rotated. One row, `[B, 1, ..]`, is repeated
    /// at every position.
    Rope(RopeAttr),
    /// `q [B, S, H * D], k [B, T, K * D], v [B, T, K * D] -> [B, S, H * D]`, causal, grouped queries.
    Attention(AttnAttr),
    /// `past [B, P, n], new [B, S, n] -> [B, T, n]`
    CacheAppend,
    /// `q, k, v, dy -> dq, dk, dv`: the gradient of [`Op::Attention`].
    AttentionGrad(AttnAttr),
    /// `x [.., n], m [l, l] or [t, l, l] -> y [.., n]`: the mode product `x (I ⊗ m ⊗ I_inner)`. The last axis is
    /// read as `[outer, l, inner]`; each of `t` matrices serves `outer / t` neighbours.
    ModeMul {
        /// Elements that a row of `m` steps over.
        inner: u64,
    },
    /// `x [.., n] [, signs [n]] -> y [.., n]`: each run of `block` channels times the normalized Hadamard matrix of
    /// [`crate::hadamard`], after `x * signs`. The inverse multiplies by the transpose, then by the signs.
    Hadamard {
        /// Channels that are mixed; divides `n`.
        block: u64,
        /// The inverse transform.
        inverse: bool,
    },
    /// `w, bound -> y`: `w` limited to `±bound`, one bound for each run of the grain's scales.
    Clip(QuantSpec),
    /// `w, hi, lo -> y`: `w` limited to `[lo * min, hi * max]` of each run of the grain's scales, the factors in the
    /// shape of the scales (FlatQuant's learned weight clip).
    ClipRange(QuantSpec),
    /// `w, hi, lo, dy -> dw, dhi, dlo`: the gradient of [`Op::ClipRange`].
    ClipRangeGrad(QuantSpec),

    // Quantization.
    /// `x [, hi, lo] -> x`: a value that may be quantized here, with factors on the ends of its range. No transform
    /// passes it.
    Edge,
    /// `x [, hi, lo] -> y`: *means* `dcast(qcast(x))` with scales from the data by the rule. `hi` and `lo` are factors
    /// `[k]` on the ends of the range; the runs along a row share them evenly.
    FakeQuant(QuantSpec, Rule),
    /// `x [, hi, lo], dy -> dx [, dhi, dlo]`: the gradient of [`Op::FakeQuant`], straight through the rounding.
    FakeQuantGrad(QuantSpec, Rule),
    /// `x [, hi, lo] -> scale` or `-> scale, zero`.
    QParams(QuantSpec, Rule),
    /// `x, scale [, zero] -> codes`
    QCast(QuantSpec),
    /// `codes, scale [, zero] -> x`
    DCast,
}

/// The text form of an operation: a mnemonic and attributes.
pub type OpText = (&'static str, Vec<(&'static str, Attr)>);

impl UnaryOp {
    const TABLE: [(&'static str, UnaryOp); 10] = [
        ("neg", UnaryOp::Neg),
        ("abs", UnaryOp::Abs),
        ("exp", UnaryOp::Exp),
        ("log", UnaryOp::Log),
        ("sqrt", UnaryOp::Sqrt),
        ("rsqrt", UnaryOp::Rsqrt),
        ("recip", UnaryOp::Recip),
        ("sigmoid", UnaryOp::Sigmoid),
        ("cos", UnaryOp::Cos),
        ("sin", UnaryOp::Sin),
    ];
}

impl BinaryOp {
    const TABLE: [(&'static str, BinaryOp); 7] = [
        ("add", BinaryOp::Add),
        ("sub", BinaryOp::Sub),
        ("mul", BinaryOp::Mul),
        ("div", BinaryOp::Div),
        ("max", BinaryOp::Max),
        ("min", BinaryOp::Min),
        ("ge", BinaryOp::Ge),
    ];
}

impl ReduceOp {
    const TABLE: [(&'static str, ReduceOp); 3] =
        [("reduce.sum", ReduceOp::Sum), ("reduce.mean", ReduceOp::Mean), ("reduce.max", ReduceOp::Max)];
}

impl AttnAttr {
    fn attrs(&self) -> Vec<(&'static str, Attr)> {
        vec![
            ("heads", Attr::Int(i64::from(self.heads))),
            ("kv_heads", Attr::Int(i64::from(self.kv_heads))),
            ("scale", Attr::Real(self.scale)),
        ]
    }

    fn from_attrs(a: &mut AttrReader<'_>) -> Result<Self, String> {
        Ok(AttnAttr {
            heads: a.int("heads")? as u32,
            kv_heads: a.int("kv_heads")? as u32,
            scale: a.real("scale")?,
        })
    }
}

fn word_of<T: PartialEq + Copy>(table: &[(&'static str, T)], op: T) -> &'static str {
    table.iter().find(|(_, o)| *o == op).map_or("?", |(w, _)| w)
}

fn op_of<T: Copy>(table: &[(&'static str, T)], word: &str) -> Option<T> {
    table.iter().find(|(w, _)| *w == word).map(|(_, o)| *o)
}

impl Op {
    /// Mnemonic and attributes. `Weight` and `Call` are written by the printer, since they name other entities.
    pub fn text(&self) -> OpText {
        let quant = |spec: &QuantSpec, rule: &Rule| {
            vec![("q", Attr::Spec(*spec)), ("rule", Attr::Word(rule.to_string()))]
        };
        match self {
            Op::Weight(_) => ("weight", vec![]),
            Op::Call(_) => ("call", vec![]),
            Op::Const { shape, data } => (
                "const",
                vec![
                    ("shape", Attr::Ints(shape.iter().map(|&n| n as i64).collect())),
                    ("data", Attr::Reals(data.clone())),
                ],
            ),
            Op::Unary(u) => (word_of(&UnaryOp::TABLE, *u), vec![]),
            Op::Binary(b) => (word_of(&BinaryOp::TABLE, *b), vec![]),
            Op::Reduce(r, axis) => {
                (word_of(&ReduceOp::TABLE, *r), vec![("axis", Attr::Int(i64::from(*axis)))])
            }
            Op::MatMul { trans_b } => (if *trans_b { "matmul.t" } else { "matmul" }, vec![]),
            Op::Cast(e) => ("cast", vec![("to", Attr::Elem(*e))]),
            Op::Reshape(s) => ("reshape", vec![("to", Attr::Shape(s.clone()))]),
            Op::Transpose(p) => {
                ("transpose", vec![("perm", Attr::Ints(p.iter().map(|&x| i64::from(x)).collect()))])
            }
            Op::Slice { axis, start, len } => (
                "slice",
                vec![
                    ("axis", Attr::Int(i64::from(*axis))),
                    ("start", Attr::Int(*start as i64)),
                    ("len", Attr::Int(*len as i64)),
                ],
            ),
            Op::Concat(axis) => ("concat", vec![("axis", Attr::Int(i64::from(*axis)))]),
            Op::Gather => ("gather", vec![]),
            Op::CausalMask { square } => (if *square { "causal_mask.square" } else { "causal_mask" }, vec![]),
            Op::Silu => ("silu", vec![]),
            Op::RmsNorm(eps) => ("rms_norm", vec![("eps", Attr::Real(*eps))]),
            Op::Softmax => ("softmax", vec![]),
            Op::Rope(r) => ("rope", r.attrs()),
            Op::Attention(a) => ("attention", a.attrs()),
            Op::AttentionGrad(a) => ("attention.grad", a.attrs()),
            Op::BroadcastLike => ("broadcast_like", vec![]),
            Op::Outer => ("outer", vec![]),
            Op::Inverse => ("inverse", vec![]),
            Op::ModeMul { inner } => ("mode_mul", vec![("inner", Attr::Int(*inner as i64))]),
            Op::Hadamard { block, inverse } => (
                if *inverse { "hadamard.inverse" } else { "hadamard" },
                vec![("block", Attr::Int(*block as i64))],
            ),
            Op::CacheAppend => ("cache_append", vec![]),
            Op::Edge => ("edge", vec![]),
            Op::Clip(q) => ("clip", vec![("q", Attr::Spec(*q))]),
            Op::ClipRange(q) => ("clip_range", vec![("q", Attr::Spec(*q))]),
            Op::ClipRangeGrad(q) => ("clip_range.grad", vec![("q", Attr::Spec(*q))]),
            Op::FakeQuant(q, r) => ("fake_quant", quant(q, r)),
            Op::FakeQuantGrad(q, r) => ("fake_quant.grad", quant(q, r)),
            Op::QParams(q, r) => ("qparams", quant(q, r)),
            Op::QCast(q) => ("qcast", vec![("q", Attr::Spec(*q))]),
            Op::DCast => ("dcast", vec![]),
        }
    }

    /// The operation that a mnemonic and attributes stand for.
    ///
    /// # Errors
    /// An unknown mnemonic, or a missing, unknown or ill-typed attribute, in a sentence.
    pub fn from_text(word: &str, attrs: Vec<(String, Attr)>) -> Result<Op, String> {
        let mut a = AttrReader::new(word, attrs);
        let op = match word {
            "const" => Op::Const {
                shape: a.ints("shape")?.into_iter().map(|n| n as u64).collect(),
                data: a.reals("data")?,
            },
            "matmul" => Op::MatMul { trans_b: false },
            "matmul.t" => Op::MatMul { trans_b: true },
            "cast" => Op::Cast(a.elem("to")?),
            "reshape" => Op::Reshape(a.shape("to")?),
            "transpose" => Op::Transpose(a.ints("perm")?.into_iter().map(|x| x as u8).collect()),
            "slice" => {
                Op::Slice { axis: a.small("axis")?, start: a.int("start")? as u64, len: a.int("len")? as u64 }
            }
            "concat" => Op::Concat(a.small("axis")?),
            "gather" => Op::Gather,
            "causal_mask" => Op::CausalMask { square: false },
            "causal_mask.square" => Op::CausalMask { square: true },
            "silu" => Op::Silu,
            "rms_norm" => Op::RmsNorm(a.real("eps")?),
            "softmax" => Op::Softmax,
            "rope" => Op::Rope(RopeAttr::from_attrs(&mut a)?),
            "attention" => Op::Attention(AttnAttr::from_attrs(&mut a)?),
            "attention.grad" => Op::AttentionGrad(AttnAttr::from_attrs(&mut a)?),
            "broadcast_like" => Op::BroadcastLike,
            "outer" => Op::Outer,
            "inverse" => Op::Inverse,
            "mode_mul" => Op::ModeMul { inner: a.int("inner")? as u64 },
            "hadamard" => Op::Hadamard { block: a.int("block")? as u64, inverse: false },
            "hadamard.inverse" => Op::Hadamard { block: a.int("block")? as u64, inverse: true },
            "cache_append" => Op::CacheAppend,
            "edge" => Op::Edge,
            "clip" => Op::Clip(a.spec("q")?),
            "clip_range" => Op::ClipRange(a.spec("q")?),
            "clip_range.grad" => Op::ClipRangeGrad(a.spec("q")?),
            "fake_quant" => Op::FakeQuant(a.spec("q")?, a.rule()?),
            "fake_quant.grad" => Op::FakeQuantGrad(a.spec("q")?, a.rule()?),
            "qparams" => Op::QParams(a.spec("q")?, a.rule()?),
            "qcast" => Op::QCast(a.spec("q")?),
            "dcast" => Op::DCast,
            _ => {
                if let Some(u) = op_of(&UnaryOp::TABLE, word) {
                    Op::Unary(u)
                } else if let Some(b) = op_of(&BinaryOp::TABLE, word) {
                    Op::Binary(b)
                } else if let Some(r) = op_of(&ReduceOp::TABLE, word) {
                    Op::Reduce(r, a.small("axis")?)
                } else {
                    return Err(format!("unknown operation `{word}`"));
                }
            }
        };
        a.finish()?;
        Ok(op)
    }
}
