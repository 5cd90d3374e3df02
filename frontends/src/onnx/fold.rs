//! What is computed of known tensors: the operators on sizes, masks and positions.

use super::assemble::{
    concat, cumulated, gather, gather_nd, product_of_matrices, reduce, select, tile, triangle,
};
use super::file::{Attr, Node, Type};
use super::known::{Data, Known, product};

type Made = Result<Known, String>;

/// An axis that may be counted from the end.
pub(super) fn axis(a: i64, rank: usize) -> Result<usize, String> {
    let n = if a < 0 { a + rank as i64 } else { a };
    usize::try_from(n).ok().filter(|&n| n < rank).ok_or_else(|| format!("axis {a} of {rank}"))
}

/// The sizes that `Reshape` asks for, of a tensor with these.
pub(super) fn reshape(from: &[usize], to: &[i64], zeros: bool) -> Result<Vec<usize>, String> {
    let bad = || format!("sizes {from:?} cannot become {to:?}");
    let mut dims = Vec::new();
    let mut open = None;
    for (i, &d) in to.iter().enumerate() {
        dims.push(match d {
            0 if !zeros => *from.get(i).ok_or_else(bad)?,
            -1 if open.is_none() => {
                open = Some(i);
                1
            }
            d => usize::try_from(d).map_err(|_| bad())?,
        });
    }
    let (all, known) =
        (product_of(from), dims.iter().try_fold(1usize, |a, &d| a.checked_mul(d)).ok_or_else(bad)?);
    if let Some(i) = open {
        if known == 0 || all % known != 0 {
            return Err(bad());
        }
        dims[i] = all / known;
        return Ok(dims);
    }
    if all == known { Ok(dims) } else { Err(bad()) }
}

fn product_of(dims: &[usize]) -> usize {
    dims.iter().product()
}

/// The sizes that broadcast from two.
pub(super) fn broadcast(a: &[usize], b: &[usize]) -> Result<Vec<usize>, String> {
    let rank = a.len().max(b.len());
    let at = |d: &[usize], i: usize| (i + d.len()).checked_sub(rank).map_or(1, |i| d[i]);
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Ok(x),
            (1, x) | (x, 1) => Ok(x),
            _ => Err(format!("sizes {a:?} and {b:?} do not broadcast")),
        })
        .collect()
}

/// The result of a node all of whose operands are known; `None` if the operator is not among those that are computed here.
///
/// # Errors
/// If operands do not fit, or the result would be large.
pub(super) fn evaluate(node: &Node, ins: &[Option<&Known>]) -> Option<Result<Vec<Known>, String>> {
    if !node.domain.is_empty() {
        return None;
    }
    let x = ins.first().copied().flatten();
    let one = |made: Made| Some(made.map(|k| vec![k]));
    match (node.op.as_str(), x) {
        ("Constant", _) => one(constant(node)),
        (_, Some(x)) => one(of_first(node, x, ins)?),
        _ => None,
    }
}

fn constant(node: &Node) -> Made {
    let value = node.attrs.first().map(|(_, a)| a);
    match value {
        Some(Attr::Tensor(t)) => Known::stored(t, 0)
            .map(|k| Known { origin: None, ..k })
            .ok_or_else(|| format!("a constant of {} elements", t.count())),
        Some(Attr::Int(n)) => Ok(Known::ints(vec![], vec![*n])),
        Some(Attr::Float(x)) => Ok(Known::floats(vec![], vec![*x])),
        Some(Attr::Ints(v)) => Ok(Known::ints(vec![v.len()], v.clone())),
        Some(Attr::Floats(v)) => Ok(Known::floats(vec![v.len()], v.clone())),
        _ => Err("a constant of another kind".into()),
    }
}

/// The integers of an operand, or of the attribute that older versions have in its place.
pub(super) fn list(node: &Node, ins: &[Option<&Known>], at: usize, name: &str) -> Option<Vec<i64>> {
    let given = ins.get(at).copied().flatten().and_then(Known::as_ints).map(<[i64]>::to_vec);
    given.or_else(|| node.ints(name).map(<[i64]>::to_vec))
}

fn of_first(node: &Node, x: &Known, ins: &[Option<&Known>]) -> Option<Made> {
    let rank = x.dims.len();
    let get = |i: usize| ins.get(i).copied().flatten();
    let ints = |i: usize| get(i).and_then(Known::as_ints);
    let axes = |at: usize| list(node, ins, at, "axes");
    let made = match node.op.as_str() {
        "Identity" => Ok(x.clone()),
        "Cast" => cast(x, node.int("to").unwrap_or(0)),
        "ConstantOfShape" => x.as_ints().ok_or_else(|| "no sizes".to_owned()).and_then(|sizes| {
            let dims: Vec<usize> = sizes.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect();
            let one = match node.attr("value") {
                Some(Attr::Tensor(t)) => {
                    Known::stored(t, 0).unwrap_or_else(|| Known::floats(vec![1], vec![0.0]))
                }
                _ => Known::floats(vec![1], vec![0.0]),
            };
            if one.count() != 1 {
                return Err("a fill of several elements".into());
            }
            let n = product(&dims)?;
            Ok(one.picked(dims, &vec![0; n]))
        }),
        "Range" => range(x, get(1)?, get(2)?),
        "Shape" => Ok(shape(node, &x.dims)),
        "Size" => Ok(Known::ints(vec![], vec![x.count() as i64])),
        "Unsqueeze" => unsqueezed(rank, &axes(1)?).map(|at| x.reshaped(insert(&x.dims, &at))),
        "Squeeze" => squeezed(&x.dims, axes(1).as_deref()).map(|d| x.reshaped(d)),
        "Reshape" => {
            reshape(&x.dims, ints(1)?, node.int("allowzero") == Some(1)).map(|dims| x.reshaped(dims))
        }
        "Flatten" => {
            let a = node.int("axis").unwrap_or(1);
            let at = usize::try_from(if a < 0 { a + rank as i64 } else { a }).unwrap_or(0).min(rank);
            Ok(x.reshaped(vec![product_of(&x.dims[..at]), product_of(&x.dims[at..])]))
        }
        "Transpose" => x.transposed(&permutation(node, rank)),
        "Expand" => {
            let to: Vec<usize> = ints(1)?.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect();
            broadcast(&x.dims, &to).and_then(|dims| x.expanded(&dims))
        }
        "Tile" => tile(x, ints(1)?),
        "Concat" => concat(ins, node.int("axis").unwrap_or(0)),
        "Slice" => slices(node, ins, &x.dims).and_then(|all| {
            all.into_iter().try_fold(x.clone(), |k, (axis, rows)| k.along(axis, &rows, &[rows.len()]))
        }),
        "Gather" => gather(x, get(1)?, node.int("axis").unwrap_or(0)),
        "GatherND" if node.int("batch_dims").unwrap_or(0) == 0 => gather_nd(x, get(1)?),
        "Where" => select(x, get(1)?, get(2)?),
        "CumSum" => cumulated(x, get(1)?.as_ints()?.first().copied()?),
        "Trilu" => {
            triangle(x, ints(1).and_then(|v| v.first().copied()).unwrap_or(0), node.int("upper") != Some(0))
        }
        "MatMul" => product_of_matrices(x, get(1)?),
        "ReduceSum" | "ReduceMean" | "ReduceMax" | "ReduceMin" | "ReduceProd" => reduce(node, x, axes(1)),
        op => match get(1) {
            Some(y) => super::arith::binary(op, x, ins, y)?,
            None => super::arith::unary(op, x)?,
        },
    };
    Some(made)
}

/// Two tensors repeated to the same sizes.
pub(super) fn aligned(a: &Known, b: &Known) -> Result<(Known, Known), String> {
    let dims = broadcast(&a.dims, &b.dims)?;
    Ok((a.expanded(&dims)?, b.expanded(&dims)?))
}

/// The sizes as `Shape` gives them.
pub(super) fn shape(node: &Node, dims: &[usize]) -> Known {
    let rank = dims.len() as i64;
    let at = |n: i64| (if n < 0 { n + rank } else { n }).clamp(0, rank) as usize;
    let (start, end) = (at(node.int("start").unwrap_or(0)), at(node.int("end").unwrap_or(rank)));
    let part: Vec<i64> = dims.get(start..end).unwrap_or(&[]).iter().map(|&d| d as i64).collect();
    Known::ints(vec![part.len()], part)
}

pub(super) fn permutation(node: &Node, rank: usize) -> Vec<usize> {
    match node.ints("perm") {
        Some(p) => p.iter().map(|&a| usize::try_from(a).unwrap_or(usize::MAX)).collect(),
        None => (0..rank).rev().collect(),
    }
}

/// The places, in the result, of axes of size 1 that are added.
pub(super) fn unsqueezed(rank: usize, axes: &[i64]) -> Result<Vec<usize>, String> {
    let rank = rank + axes.len();
    let mut at = axes.iter().map(|&a| axis(a, rank)).collect::<Result<Vec<_>, _>>()?;
    at.sort_unstable();
    at.dedup();
    if at.len() == axes.len() { Ok(at) } else { Err(format!("axes {axes:?} come twice")) }
}

fn insert(dims: &[usize], at: &[usize]) -> Vec<usize> {
    let mut out = dims.to_vec();
    at.iter().for_each(|&a| out.insert(a, 1));
    out
}

fn squeezed(dims: &[usize], axes: Option<&[i64]>) -> Result<Vec<usize>, String> {
    let gone = match axes {
        None => (0..dims.len()).filter(|&i| dims[i] == 1).collect(),
        Some(axes) => axes.iter().map(|&a| axis(a, dims.len())).collect::<Result<Vec<_>, _>>()?,
    };
    match gone.iter().find(|&&a| dims[a] != 1) {
        Some(a) => Err(format!("axis {a} of {dims:?} is not 1")),
        None => Ok((0..dims.len()).filter(|i| !gone.contains(i)).map(|i| dims[i]).collect()),
    }
}

/// For each axis that is sliced, the places that are taken.
pub(super) fn slices(
    node: &Node,
    ins: &[Option<&Known>],
    dims: &[usize],
) -> Result<Vec<(usize, Vec<usize>)>, String> {
    let (starts, ends) = (list(node, ins, 1, "starts"), list(node, ins, 2, "ends"));
    let (Some(starts), Some(ends)) = (starts, ends) else { return Err("places that are not known".into()) };
    let axes = list(node, ins, 3, "axes").unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = list(node, ins, 4, "steps").unwrap_or_else(|| vec![1; starts.len()]);
    if [ends.len(), axes.len(), steps.len()].iter().any(|&n| n != starts.len()) {
        return Err("numbers of starts, ends, axes and steps differ".into());
    }
    let mut out = Vec::new();
    for i in 0..starts.len() {
        let a = axis(axes[i], dims.len())?;
        let n = dims[a] as i64;
        let step = steps[i];
        let at = |p: i64, low: i64, high: i64| (if p < 0 { p.saturating_add(n) } else { p }).clamp(low, high);
        let rows: Vec<usize> = match step {
            0 => return Err("a step of 0".into()),
            1.. => {
                (at(starts[i], 0, n)..at(ends[i], 0, n)).step_by(step as usize).map(|r| r as usize).collect()
            }
            _ => {
                let (from, to) = (at(starts[i], -1, n - 1), at(ends[i], -1, n - 1));
                (0..)
                    .map(|k: i64| i128::from(from) + i128::from(k) * i128::from(step))
                    .take_while(|&r| r > i128::from(to))
                    .map(|r| r as usize)
                    .collect()
            }
        };
        out.push((a, rows));
    }
    Ok(out)
}

pub(super) fn cast(x: &Known, to: i64) -> Made {
    let float = |v: &[f32]| v.to_vec();
    let data = match (Type::of(to), &x.data) {
        (Some(Type::F32 | Type::F64 | Type::F16 | Type::BF16), Data::Ints(v)) => {
            Data::Floats(v.iter().map(|&n| n as f32).collect())
        }
        (Some(Type::F32 | Type::F64 | Type::F16 | Type::BF16), Data::Bools(v)) => {
            Data::Floats(v.iter().map(|&b| f32::from(u8::from(b))).collect())
        }
        (Some(Type::F32 | Type::F64 | Type::F16 | Type::BF16), Data::Floats(v)) => Data::Floats(float(v)),
        (Some(Type::Bool), Data::Ints(v)) => Data::Bools(v.iter().map(|&n| n != 0).collect()),
        (Some(Type::Bool), Data::Floats(v)) => Data::Bools(v.iter().map(|&x| x != 0.0).collect()),
        (Some(Type::Bool), Data::Bools(v)) => Data::Bools(v.clone()),
        (Some(_), Data::Ints(v)) => Data::Ints(v.clone()),
        (Some(_), Data::Bools(v)) => Data::Ints(v.iter().map(|&b| i64::from(b)).collect()),
        (Some(_), Data::Floats(v)) => Data::Ints(v.iter().map(|&x| x as i64).collect()),
        (None, _) => return Err(format!("a cast to type {to}, which is not read")),
    };
    Ok(Known { data, ..x.clone() })
}

fn range(start: &Known, limit: &Known, step: &Known) -> Made {
    if let (Some([a]), Some([b]), Some([s])) = (start.as_ints(), limit.as_ints(), step.as_ints()) {
        let count = if *s == 0 {
            0
        } else {
            (i128::from(*b) - i128::from(*a) + i128::from(*s) - i128::from(s.signum())) / i128::from(*s)
        };
        let count = product(&[usize::try_from(count.max(0)).unwrap_or(usize::MAX)])?;
        return Ok(Known::ints(
            vec![count],
            (0..count as i64).map(|i| a.wrapping_add(i.wrapping_mul(*s))).collect(),
        ));
    }
    match (start.scalar(), limit.scalar(), step.scalar()) {
        (Some(a), Some(b), Some(s)) if s != 0.0 => {
            let count = product(&[((b - a) / s).ceil().max(0.0) as usize])?;
            Ok(Known::floats(vec![count], (0..count).map(|i| a + i as f32 * s).collect()))
        }
        _ => Err("a range of other types".into()),
    }
}
