//! Elementwise functions and reductions of known tensors.

use super::fold::aligned;
use super::known::{Data, Known, truths};

type Made = Result<Known, String>;

fn with(like: &Known, data: Data) -> Known {
    Known { data, origin: None, ..like.clone() }
}

/// A function of one tensor; `None` if the operator is unknown.
pub(super) fn unary(op: &str, x: &Known) -> Option<Made> {
    let floats = |f: fn(f32) -> f32| match &x.data {
        Data::Floats(v) => Ok(with(x, Data::Floats(v.iter().map(|&x| f(x)).collect()))),
        _ => Err(format!("{op} of no floats")),
    };
    Some(match (op, &x.data) {
        ("Neg", Data::Ints(v)) => Ok(with(x, Data::Ints(v.iter().map(|n| n.wrapping_neg()).collect()))),
        ("Abs", Data::Ints(v)) => Ok(with(x, Data::Ints(v.iter().map(|n| n.wrapping_abs()).collect()))),
        ("Not", Data::Bools(v)) => Ok(truths(x, v.iter().map(|b| !b).collect())),
        ("IsNaN", Data::Floats(v)) => Ok(truths(x, v.iter().map(|x| x.is_nan()).collect())),
        ("Neg", _) => floats(|x| -x),
        ("Abs", _) => floats(f32::abs),
        ("Sqrt", _) => floats(f32::sqrt),
        ("Exp", _) => floats(f32::exp),
        ("Log", _) => floats(f32::ln),
        ("Reciprocal", _) => floats(|x| 1.0 / x),
        // In f64, as the tables that are compared with it.
        ("Cos", _) => floats(|x| f64::from(x).cos() as f32),
        ("Sin", _) => floats(|x| f64::from(x).sin() as f32),
        ("Floor", _) => floats(f32::floor),
        ("Ceil", _) => floats(f32::ceil),
        ("Round", _) => floats(f32::round_ties_even),
        _ => return None,
    })
}

fn zip<T: Copy, U>(a: &[T], b: &[T], f: impl Fn(T, T) -> U) -> Vec<U> {
    a.iter().zip(b).map(|(&a, &b)| f(a, b)).collect()
}

/// A function of two tensors, or of more from the left; `None` if the operator is unknown.
pub(super) fn binary(op: &str, x: &Known, ins: &[Option<&Known>], y: &Known) -> Option<Made> {
    if matches!(op, "Max" | "Min") && ins.len() > 2 {
        let rest = ins[1..].iter().copied().collect::<Option<Vec<_>>>()?;
        return rest.iter().try_fold(Ok(x.clone()), |all: Made, k| match all {
            Ok(all) => binary(op, &all, &ins[..2], k),
            Err(e) => Some(Err(e)),
        });
    }
    let (a, b) = match aligned(x, y) {
        Ok(both) => both,
        Err(e) => return Some(Err(e)),
    };
    Some(match (&a.data, &b.data) {
        (Data::Ints(u), Data::Ints(v)) => ints(op, &a, u, v)?,
        (Data::Floats(u), Data::Floats(v)) => floats(op, &a, u, v)?,
        (Data::Bools(u), Data::Bools(v)) => Ok(truths(
            &a,
            match op {
                "And" => zip(u, v, |a, b| a & b),
                "Or" => zip(u, v, |a, b| a | b),
                "Xor" => zip(u, v, |a, b| a ^ b),
                "Equal" => zip(u, v, |a, b| a == b),
                _ => return None,
            },
        )),
        // The exponent may be of another type.
        (Data::Floats(u), Data::Ints(v)) if op == "Pow" => {
            let v: Vec<f32> = v.iter().map(|&n| n as f32).collect();
            floats(op, &a, u, &v)?
        }
        _ => Err(format!("{op} of two types")),
    })
}

fn ints(op: &str, like: &Known, u: &[i64], v: &[i64]) -> Option<Made> {
    if matches!(op, "Div" | "Mod") && v.contains(&0) {
        return Some(Err(format!("{op} by 0")));
    }
    let compared = |f: fn(&i64, &i64) -> bool| Some(Ok(truths(like, zip(u, v, |a, b| f(&a, &b)))));
    let f: fn(i64, i64) -> i64 = match op {
        "Add" => i64::wrapping_add,
        "Sub" => i64::wrapping_sub,
        "Mul" => i64::wrapping_mul,
        "Div" => i64::wrapping_div,
        "Mod" => i64::wrapping_rem_euclid,
        "Max" => i64::max,
        "Min" => i64::min,
        "Pow" => |a, b| u32::try_from(b).map_or(0, |b| a.wrapping_pow(b)),
        "Equal" => return compared(i64::eq),
        "Less" => return compared(i64::lt),
        "LessOrEqual" => return compared(i64::le),
        "Greater" => return compared(i64::gt),
        "GreaterOrEqual" => return compared(i64::ge),
        _ => return None,
    };
    Some(Ok(with(like, Data::Ints(zip(u, v, f)))))
}

fn floats(op: &str, like: &Known, u: &[f32], v: &[f32]) -> Option<Made> {
    let compared = |f: fn(&f32, &f32) -> bool| Some(Ok(truths(like, zip(u, v, |a, b| f(&a, &b)))));
    let f: fn(f32, f32) -> f32 = match op {
        "Add" => |a, b| a + b,
        "Sub" => |a, b| a - b,
        "Mul" => |a, b| a * b,
        "Div" => |a, b| a / b,
        "Max" => f32::max,
        "Min" => f32::min,
        "Pow" => f32::powf,
        "Equal" => return compared(f32::eq),
        "Less" => return compared(f32::lt),
        "LessOrEqual" => return compared(f32::le),
        "Greater" => return compared(f32::gt),
        "GreaterOrEqual" => return compared(f32::ge),
        _ => return None,
    };
    Some(Ok(with(like, Data::Floats(zip(u, v, f)))))
}

/// A reduction along the middle of `[outer, n, inner]`.
pub(super) fn reduced(op: &str, x: &Known, [outer, n, inner]: [usize; 3]) -> Made {
    let along = |o: usize, i: usize| (0..n).map(move |k| (o * n + k) * inner + i);
    let places = || (0..outer).flat_map(|o| (0..inner).map(move |i| (o, i)));
    if n == 0 {
        return Err(format!("{op} of nothing"));
    }
    let data = match &x.data {
        Data::Ints(v) => {
            let f: fn(i64, i64) -> i64 = match op {
                "ReduceSum" => i64::wrapping_add,
                "ReduceProd" => i64::wrapping_mul,
                "ReduceMax" => i64::max,
                "ReduceMin" => i64::min,
                _ => return Err(format!("{op} of integers")),
            };
            Data::Ints(places().filter_map(|(o, i)| along(o, i).map(|at| v[at]).reduce(f)).collect())
        }
        Data::Floats(v) => {
            let f: fn(f32, f32) -> f32 = match op {
                "ReduceSum" | "ReduceMean" => |a, b| a + b,
                "ReduceProd" => |a, b| a * b,
                "ReduceMax" => f32::max,
                _ => f32::min,
            };
            let by = if op == "ReduceMean" { n as f32 } else { 1.0 };
            Data::Floats(
                places().filter_map(|(o, i)| Some(along(o, i).map(|at| v[at]).reduce(f)? / by)).collect(),
            )
        }
        Data::Bools(_) => return Err(format!("{op} of truth values")),
    };
    Ok(with(x, data))
}
