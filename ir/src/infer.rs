//! Type rules: the types of an operation's results from those of its operands.

use crate::diag::Diag;
use crate::module::Module;
use crate::op::{AttnAttr, Op};
use crate::types::{Dim, Elem, Shape, Sym, TensorType};

mod quant;
mod transform;

pub use quant::list_divisors;
use quant::{factors, grouping, range_factors, rule_fits, scale_shape, side_operands, side_types};
use transform::{hadamard, mode_mul};

type Types<'a> = &'a [&'a TensorType];

/// Result types of `op` on operands of these types.
///
/// # Errors
/// The first rule that the operands break, without a place.
pub fn infer(module: &Module, op: &Op, ins: Types<'_>) -> Result<Vec<TensorType>, Diag> {
    let word = op.text().0;
    if let Some(want) = arity(op).filter(|w| !w.contains(&ins.len())) {
        let want = if want.start() == want.end() {
            want.start().to_string()
        } else {
            format!("{} or {}", want.start(), want.end())
        };
        return Err(Diag::new("Q0102", format!("`{word}` takes {want} operands, not {}", ins.len())));
    }
    let fault = |why: String| Diag::new("Q0103", format!("`{word}`: {why}"));
    let quantized = ins.iter().position(|t| matches!(t.elem, Elem::Quant(_)));
    if let Some(i) = quantized.filter(|_| !matches!(op, Op::DCast | Op::Call(_))) {
        let d = Diag::new("Q0205", format!("`{word}` computes on codes: operand {} is {}", i + 1, ins[i]));
        return Err(d.hint("put a `dcast` with the scales before it"));
    }
    let one = |ty: TensorType| Ok(vec![ty]);
    match op {
        Op::Weight(id) => match module.weights().get(id.0 as usize) {
            Some(decl) => one(decl.ty.clone()),
            None => Err(Diag::new("Q0107", format!("weight number {} is not declared", id.0))),
        },
        Op::Call(id) => call(module, id.0 as usize, ins),
        Op::Const { shape, data } => {
            let n = shape.iter().try_fold(1u64, |a, &b| a.checked_mul(b));
            if n != Some(data.len() as u64) {
                return Err(fault(format!("{} numbers do not fill the shape {shape:?}", data.len())));
            }
            one(TensorType::new(Elem::F32, shape.iter().map(|&n| Dim::Fixed(n)).collect::<Vec<_>>()))
        }
        Op::Unary(_) | Op::Silu | Op::Softmax => one(float(ins[0], &fault)?),
        Op::Binary(_) => {
            let shape = ins[0].shape.broadcast(&ins[1].shape);
            let shape = shape.ok_or_else(|| fault(format!("{} and {} do not broadcast", ins[0], ins[1])))?;
            one(TensorType { elem: arith(ins, &fault)?, shape })
        }
        Op::Reduce(_, axis) => {
            let mut ty = float(ins[0], &fault)?;
            let at = usize::from(*axis);
            *ty.shape.0.get_mut(at).ok_or_else(|| fault(format!("{} has no axis {at}", ins[0])))? =
                Dim::Fixed(1);
            one(ty)
        }
        Op::MatMul { trans_b } => one(matmul(ins, *trans_b).map_err(fault)?),
        Op::Cast(elem) => match elem {
            Elem::Quant(_) => Err(fault("codes are made by `qcast`".into())),
            _ => one(TensorType { elem: *elem, shape: ins[0].shape.clone() }),
        },
        Op::Reshape(to) => {
            if element_count(&ins[0].shape) != element_count(to) {
                return Err(fault(format!("{} has not as many elements as {to}", ins[0])));
            }
            one(TensorType { elem: ins[0].elem, shape: to.clone() })
        }
        Op::Transpose(perm) => {
            let mut sorted: Vec<usize> = perm.iter().map(|&p| usize::from(p)).collect();
            sorted.sort_unstable();
            if sorted != (0..ins[0].shape.rank()).collect::<Vec<_>>() {
                return Err(fault(format!("{perm:?} is no permutation of the axes of {}", ins[0])));
            }
            let shape = perm.iter().map(|&p| ins[0].shape.0[usize::from(p)]).collect::<Vec<_>>();
            one(TensorType::new(ins[0].elem, shape))
        }
        Op::Slice { axis, start, len } => {
            let mut ty = ins[0].clone();
            let at = usize::from(*axis);
            let end = start.checked_add(*len);
            match ty.shape.0.get_mut(at) {
                Some(d @ Dim::Fixed(_)) if end.is_some_and(|e| Dim::Fixed(e) <= *d) => *d = Dim::Fixed(*len),
                _ => return Err(fault(format!("axis {at} of {} does not hold {start}..+{len}", ins[0]))),
            }
            one(ty)
        }
        Op::Concat(axis) => one(concat(ins, usize::from(*axis)).map_err(fault)?),
        Op::CacheAppend => {
            let ty = concat(ins, 1).map_err(fault)?;
            one(ty)
        }
        Op::Gather => {
            let (table, ids) = (ins[0], ins[1]);
            if ids.elem != Elem::I32 || table.shape.rank() != 2 {
                return Err(fault(format!("{table} is no table or {ids} are no indices (i32)")));
            }
            let mut shape = ids.shape.clone();
            shape.0.push(table.shape.0[1]);
            one(TensorType { elem: Elem::F32, shape })
        }
        Op::CausalMask { square } => {
            let keys = if *square { Sym::S } else { Sym::T };
            one(TensorType::new(Elem::F32, vec![Sym::S.into(), keys.into()]))
        }
        Op::RmsNorm(_) => {
            let gain = ins[1].shape.last().filter(|_| ins[1].shape.rank() == 1);
            if gain != ins[0].shape.last() && gain != Some(Dim::Fixed(1)) {
                return Err(fault(format!(
                    "the gain {} is no vector along the last axis of {}",
                    ins[1], ins[0]
                )));
            }
            one(TensorType { elem: arith(ins, &fault)?, shape: ins[0].shape.clone() })
        }
        Op::Rope(attr) => {
            let width = ins[0].shape.last().and_then(Dim::fixed).unwrap_or(0);
            let head = attr.head_dim as usize;
            if head == 0 || !head.is_multiple_of(2) || !width.is_multiple_of(head) || ins[0].shape.rank() != 3
            {
                return Err(fault(format!(
                    "{} is not [B, S, heads * {head}] with an even head size",
                    ins[0]
                )));
            }
            let seq = ins[1].shape.0.first().copied().filter(|_| ins[1].shape.rank() == 1);
            // One row stands at every position.
            let here = ins[0].shape.0[1];
            let Some(seq) = seq.filter(|s| (*s == here || here == 1.into()) && ins[1].elem == Elem::I32)
            else {
                return Err(fault(format!("positions {} do not match {}", ins[1], ins[0])));
            };
            let mut ty = float(ins[0], &fault)?;
            ty.shape.0[1] = seq;
            one(ty)
        }
        Op::Attention(attr) => one(attention(ins, attr).map_err(fault)?),
        Op::AttentionGrad(attr) => {
            let out = attention(&ins[..3], attr).map_err(&fault)?;
            if ins[3].shape != out.shape {
                return Err(fault(format!("the gradient {} is not of the type {out}", ins[3])));
            }
            ins[..3].iter().map(|t| float(t, &fault)).collect()
        }
        Op::BroadcastLike => {
            let elem = arith(ins, &fault)?;
            if ins[0].shape.broadcast(&ins[1].shape).as_ref() != Some(&ins[1].shape) {
                return Err(fault(format!("{} does not broadcast to {}", ins[0], ins[1])));
            }
            one(TensorType { elem, shape: ins[1].shape.clone() })
        }
        Op::Outer => {
            let elem = arith(ins, &fault)?;
            let (a, b) = (&ins[0].shape.0[..], &ins[1].shape.0[..]);
            match (a.split_last(), b.split_last()) {
                (Some((&m, la)), Some((&n, lb))) if la == lb && !la.is_empty() => {
                    one(TensorType::new(elem, vec![m, n]))
                }
                _ => Err(fault(format!("{} and {} are not rows over the same positions", ins[0], ins[1]))),
            }
        }
        Op::Inverse => match ins[0].shape.0[..] {
            [.., a, b] if a == b => one(float(ins[0], &fault)?),
            _ => Err(fault(format!("{} is no square matrix", ins[0]))),
        },
        Op::ModeMul { inner } => one(mode_mul(ins, *inner).map_err(fault)?),
        Op::Hadamard { block, .. } => one(hadamard(ins, *block)?),
        Op::ClipRange(spec) | Op::ClipRangeGrad(spec) => {
            grouping(spec, ins[0])?;
            let want = scale_shape(spec, &ins[0].shape)?;
            if let Some(t) = ins[1..3].iter().find(|t| t.shape != want) {
                return Err(fault(format!("factors {t} are not of the shape {want}")));
            }
            let elem = arith(ins, &fault)?;
            let w = TensorType { elem, shape: ins[0].shape.clone() };
            if matches!(op, Op::ClipRange(_)) {
                return one(w);
            }
            if ins[3].shape != ins[0].shape {
                return Err(fault(format!("the gradient {} is not of the type {}", ins[3], ins[0])));
            }
            let side = TensorType { elem, shape: want };
            Ok(vec![w, side.clone(), side])
        }
        Op::Clip(spec) => {
            grouping(spec, ins[0])?;
            let want = scale_shape(spec, &ins[0].shape)?;
            if ins[1].shape != want {
                return Err(fault(format!("bounds {} are not of the shape {want}", ins[1])));
            }
            one(TensorType { elem: arith(ins, &fault)?, shape: ins[0].shape.clone() })
        }
        Op::Edge => {
            range_factors(&ins[1..])?;
            one(float(ins[0], &fault)?)
        }
        Op::FakeQuant(spec, rule) => {
            grouping(spec, ins[0])?;
            rule_fits(spec, *rule)?;
            factors(spec, *rule, ins[0], &ins[1..])?;
            one(float(ins[0], &fault)?)
        }
        Op::FakeQuantGrad(spec, rule) => {
            grouping(spec, ins[0])?;
            rule_fits(spec, *rule)?;
            let (dy, given) = ins[1..].split_last().unwrap_or((&ins[0], &[]));
            factors(spec, *rule, ins[0], given)?;
            if dy.shape != ins[0].shape {
                return Err(fault(format!("the gradient {dy} is not of the type {}", ins[0])));
            }
            std::iter::once(&ins[0]).chain(given).map(|t| float(t, &fault)).collect()
        }
        Op::QParams(spec, rule) => {
            grouping(spec, ins[0])?;
            rule_fits(spec, *rule)?;
            factors(spec, *rule, ins[0], &ins[1..])?;
            Ok(side_types(spec, &ins[0].shape)?)
        }
        Op::QCast(spec) => {
            grouping(spec, ins[0])?;
            side_operands(spec, &ins[0].shape, &ins[1..])?;
            one(TensorType { elem: Elem::Quant(*spec), shape: ins[0].shape.clone() })
        }
        Op::DCast => {
            let Elem::Quant(spec) = ins[0].elem else {
                return Err(fault(format!("{} are no codes", ins[0])));
            };
            side_operands(&spec, &ins[0].shape, &ins[1..])?;
            one(TensorType { elem: Elem::F32, shape: ins[0].shape.clone() })
        }
    }
}

fn arity(op: &Op) -> Option<std::ops::RangeInclusive<usize>> {
    Some(match op {
        Op::Call(_) => return None,
        Op::Weight(_) | Op::Const { .. } | Op::CausalMask { .. } => 0..=0,
        Op::Unary(_)
        | Op::Reduce(..)
        | Op::Cast(_)
        | Op::Reshape(_)
        | Op::Transpose(_)
        | Op::Slice { .. }
        | Op::Silu
        | Op::Softmax
        | Op::Inverse => 1..=1,
        // With or without two factors; `factors` refuses one.
        Op::Edge | Op::FakeQuant(..) | Op::QParams(..) => 1..=3,
        Op::FakeQuantGrad(..) => 2..=4,
        Op::Binary(_)
        | Op::MatMul { .. }
        | Op::Concat(_)
        | Op::Gather
        | Op::RmsNorm(_)
        | Op::Rope(_)
        | Op::CacheAppend
        | Op::BroadcastLike
        | Op::Outer
        | Op::ModeMul { .. }
        | Op::Clip(_) => 2..=2,
        Op::Hadamard { .. } => 1..=2,
        Op::Attention(_) | Op::ClipRange(_) => 3..=3,
        Op::AttentionGrad(_) | Op::ClipRangeGrad(_) => 4..=4,
        Op::QCast(_) | Op::DCast => 2..=3,
    })
}

/// The type of arithmetic: `f32`, or `f64` where an operand is.
fn arith(ins: Types<'_>, fault: &impl Fn(String) -> Diag) -> Result<Elem, Diag> {
    match ins.iter().find(|t| !t.elem.is_float()) {
        Some(t) => Err(fault(format!("operand {t} is not of a float type"))),
        None if ins.iter().any(|t| t.elem == Elem::F64) => Ok(Elem::F64),
        None => Ok(Elem::F32),
    }
}

fn float(ty: &TensorType, fault: &impl Fn(String) -> Diag) -> Result<TensorType, Diag> {
    Ok(TensorType { elem: arith(&[ty], fault)?, shape: ty.shape.clone() })
}

fn matmul(ins: Types<'_>, trans_b: bool) -> Result<TensorType, String> {
    let (a, b) = (ins[0], ins[1]);
    let elem = arith(ins, &|m| Diag::new("Q0103", m)).map_err(|d| d.message)?;
    let (ra, rb) = (a.shape.rank(), b.shape.rank());
    if ra < 2 || rb < 2 {
        return Err(format!("{a} and {b} are not both matrices"));
    }
    let (m, k) = (a.shape.0[ra - 2], a.shape.0[ra - 1]);
    let (mut kb, mut n) = (b.shape.0[rb - 2], b.shape.0[rb - 1]);
    if trans_b {
        std::mem::swap(&mut kb, &mut n);
    }
    if k != kb {
        return Err(format!("inner sizes differ: {k} in {a}, {kb} in {b}"));
    }
    let lead_a = Shape(a.shape.0[..ra - 2].to_vec());
    let lead_b = Shape(b.shape.0[..rb - 2].to_vec());
    let mut shape =
        lead_a.broadcast(&lead_b).ok_or_else(|| format!("batches of {a} and {b} do not broadcast"))?;
    shape.0.extend([m, n]);
    Ok(TensorType { elem, shape })
}

fn concat(ins: Types<'_>, axis: usize) -> Result<TensorType, String> {
    let (a, b) = (ins[0], ins[1]);
    let alike = a.elem == b.elem
        && a.shape.rank() == b.shape.rank()
        && axis < a.shape.rank()
        && (0..a.shape.rank()).all(|i| i == axis || a.shape.0[i] == b.shape.0[i]);
    if !alike {
        return Err(format!("{a} and {b} do not join along axis {axis}"));
    }
    let mut ty = a.clone();
    ty.shape.0[axis] = match (a.shape.0[axis], b.shape.0[axis]) {
        (Dim::Fixed(x), Dim::Fixed(y)) => Dim::Fixed(x + y),
        (Dim::Sym(Sym::P), Dim::Sym(Sym::S)) => Dim::Sym(Sym::T),
        (x, y) => return Err(format!("sizes {x} and {y} do not add up to a known one")),
    };
    Ok(ty)
}

fn attention(ins: Types<'_>, attr: &AttnAttr) -> Result<TensorType, String> {
    let (q, k, v) = (ins[0], ins[1], ins[2]);
    let (h, g) = (attr.heads as usize, attr.kv_heads as usize);
    if h == 0 || g == 0 || h % g != 0 {
        return Err(format!("{h} query heads do not share {g} key heads evenly"));
    }
    let width = |t: &TensorType| t.shape.last().and_then(Dim::fixed).filter(|_| t.shape.rank() == 3);
    match (width(q), width(k), width(v)) {
        (Some(a), Some(b), Some(c)) if a % h == 0 && b == c && b % g == 0 && a / h == b / g => {}
        _ => return Err(format!("{q}, {k}, {v} are not {h} query heads and {g} key heads of one size")),
    }
    let total = |d: Dim| d == Dim::Sym(Sym::T) || d == q.shape.0[1];
    if [q, k, v].iter().any(|t| !t.elem.is_float()) || !total(k.shape.0[1]) {
        return Err(format!("{q}, {k}, {v} are not floats over S and T positions"));
    }
    if k.shape != v.shape || k.shape.0[0] != q.shape.0[0] {
        return Err(format!("keys {k} and values {v} do not match queries {q}"));
    }
    Ok(TensorType { elem: Elem::F32, shape: q.shape.clone() })
}

fn call(module: &Module, id: usize, ins: Types<'_>) -> Result<Vec<TensorType>, Diag> {
    let Some(f) = module.funcs.get(id) else {
        return Err(Diag::new("Q0302", "a call to a function that is not defined before it".to_owned()));
    };
    let want: Vec<&TensorType> = f.params.iter().map(|&p| f.ty(p)).collect();
    if want != ins {
        let show = |ts: &[&TensorType]| ts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let message = format!("@{} takes ({}), not ({})", f.name, show(&want), show(ins));
        return Err(Diag::new("Q0106", message));
    }
    Ok(f.results.iter().map(|&r| f.ty(r).clone()).collect())
}

/// Product of the known sizes, and how often each symbol occurs.
fn element_count(shape: &Shape) -> (Option<u64>, [usize; 4]) {
    let mut syms = [0; 4];
    let mut n = Some(1u64);
    for d in &shape.0 {
        match *d {
            Dim::Fixed(x) => n = n.and_then(|n| n.checked_mul(x)),
            Dim::Sym(s) => syms[s as usize] += 1,
        }
    }
    (n, syms)
}
