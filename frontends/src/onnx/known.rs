//! Small tensors whose elements are known: sizes, masks, positions, tables of angles. What a graph computes of these alone is
//! computed while it is read.

use super::file::{Stored, Type};

/// Most elements of a tensor that is computed while a graph is read.
pub(super) const MOST: usize = 1 << 20;
/// Most elements of a tensor of the file that is looked at as a whole, such as a table of angles.
const STORED: u64 = 1 << 26;

/// The elements; all integers are 64 bits wide, all floats 32.
#[derive(Clone, PartialEq, Debug)]
pub(super) enum Data {
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Bools(Vec<bool>),
}

/// A tensor in row-major order.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Known {
    pub(super) dims: Vec<usize>,
    pub(super) data: Data,
    /// The tensor of the file whose elements these are, for its name.
    pub(super) origin: Option<usize>,
}

/// Applies the same expression to the elements of each type.
macro_rules! each {
    ($data:expr, $v:ident => $e:expr) => {
        match $data {
            Data::Ints($v) => Data::Ints($e),
            Data::Floats($v) => Data::Floats($e),
            Data::Bools($v) => Data::Bools($e),
        }
    };
}
pub(super) use each;

type Made = Result<Known, String>;

pub(super) fn product(dims: &[usize]) -> Result<usize, String> {
    let all = dims.iter().try_fold(1usize, |a, &d| a.checked_mul(d)).filter(|&n| n <= MOST);
    all.ok_or_else(|| format!("a computed tensor of sizes {dims:?} has more than {MOST} elements"))
}

fn take<T: Copy>(v: &[T], at: &[usize]) -> Vec<T> {
    at.iter().map(|&i| v[i]).collect()
}

impl Known {
    pub(super) fn ints(dims: Vec<usize>, data: Vec<i64>) -> Self {
        Known { dims, data: Data::Ints(data), origin: None }
    }

    pub(super) fn floats(dims: Vec<usize>, data: Vec<f32>) -> Self {
        Known { dims, data: Data::Floats(data), origin: None }
    }

    fn bools(dims: Vec<usize>, data: Vec<bool>) -> Self {
        Known { dims, data: Data::Bools(data), origin: None }
    }

    /// The elements of a small tensor of the file; `None` if it is large.
    pub(super) fn stored(t: &Stored, origin: usize) -> Option<Self> {
        if t.count() > STORED {
            return None;
        }
        let b = &t.bytes[..];
        let fields = |middle: i64| (0..t.count() as usize).map(|i| i64::from(t.field(i)) - middle).collect();
        let data = match t.ty {
            Type::F32 | Type::F16 | Type::BF16 => Data::Floats(t.floats()?),
            Type::F64 => {
                Data::Floats(b.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect())
            }
            Type::I64 => Data::Ints(b.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect()),
            Type::I32 => {
                Data::Ints(b.as_chunks::<4>().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect())
            }
            Type::Bool => Data::Bools(b.iter().map(|&x| x != 0).collect()),
            Type::U8 | Type::U4 => Data::Ints(fields(0)),
            Type::I8 => Data::Ints(fields(128)),
            Type::I4 => Data::Ints(fields(8)),
        };
        Some(Known { dims: t.dims.iter().map(|&d| d as usize).collect(), data, origin: Some(origin) })
    }

    pub(super) fn count(&self) -> usize {
        self.dims.iter().product()
    }

    /// The one float, if there is one element and it is a float.
    pub(super) fn scalar(&self) -> Option<f32> {
        match &self.data {
            Data::Floats(v) if v.len() == 1 => Some(v[0]),
            _ => None,
        }
    }

    pub(super) fn as_ints(&self) -> Option<&[i64]> {
        match &self.data {
            Data::Ints(v) => Some(v),
            _ => None,
        }
    }

    pub(super) fn as_floats(&self) -> Option<&[f32]> {
        match &self.data {
            Data::Floats(v) => Some(v),
            _ => None,
        }
    }

    /// The elements at these places, in other sizes.
    pub(super) fn picked(&self, dims: Vec<usize>, at: &[usize]) -> Self {
        Known { dims, data: each!(&self.data, v => take(v, at)), origin: None }
    }

    pub(super) fn reshaped(&self, dims: Vec<usize>) -> Self {
        Known { dims, ..self.clone() }
    }

    /// The places of the elements of this tensor when it is repeated to `dims`.
    fn places(&self, dims: &[usize]) -> Result<Vec<usize>, String> {
        let n = product(dims)?;
        let lead = dims.len().checked_sub(self.dims.len());
        let fits = lead.is_some_and(|l| self.dims.iter().zip(&dims[l..]).all(|(&a, &b)| a == b || a == 1));
        if !fits {
            return Err(format!("sizes {:?} do not broadcast to {dims:?}", self.dims));
        }
        let (mut steps, mut step) = (vec![0; dims.len()], 1);
        for (axis, &d) in self.dims.iter().enumerate().rev() {
            steps[lead.unwrap_or(0) + axis] = if d == 1 { 0 } else { step };
            step *= d;
        }
        let mut out = Vec::with_capacity(n);
        for i in 0..n {
            let (mut rest, mut at) = (i, 0);
            for (axis, &d) in dims.iter().enumerate().rev() {
                at += rest % d * steps[axis];
                rest /= d;
            }
            out.push(at);
        }
        Ok(out)
    }

    /// This tensor repeated as numpy broadcasts.
    pub(super) fn expanded(&self, dims: &[usize]) -> Made {
        if self.dims == dims {
            return Ok(self.clone());
        }
        let at = self.places(dims)?;
        Ok(Known { origin: self.origin, ..self.picked(dims.to_vec(), &at) })
    }

    pub(super) fn transposed(&self, perm: &[usize]) -> Made {
        let rank = self.dims.len();
        let mut seen = vec![false; rank];
        let whole =
            perm.len() == rank && perm.iter().all(|&p| p < rank && !std::mem::replace(&mut seen[p], true));
        if !whole {
            return Err(format!("`perm` {perm:?} does not permute {rank} axes"));
        }
        let dims: Vec<usize> = perm.iter().map(|&p| self.dims[p]).collect();
        let mut steps = vec![1; rank];
        for axis in (1..rank).rev() {
            steps[axis - 1] = steps[axis] * self.dims[axis];
        }
        let n = product(&dims)?;
        let at: Vec<usize> = (0..n)
            .map(|i| {
                let (mut rest, mut at) = (i, 0);
                for (axis, &d) in dims.iter().enumerate().rev() {
                    at += rest % d * steps[perm[axis]];
                    rest /= d;
                }
                at
            })
            .collect();
        Ok(self.picked(dims, &at))
    }

    /// `[outer, axis, inner]` of this tensor's sizes.
    pub(super) fn around(&self, axis: usize) -> [usize; 3] {
        [self.dims[..axis].iter().product(), self.dims[axis], self.dims[axis + 1..].iter().product()]
    }

    /// The rows `rows` along an axis, which are taken in this order.
    pub(super) fn along(&self, axis: usize, rows: &[usize], sizes: &[usize]) -> Made {
        let [outer, n, inner] = self.around(axis);
        let mut dims = self.dims.clone();
        dims.splice(axis..=axis, sizes.iter().copied());
        product(&dims)?;
        let at: Vec<usize> = (0..outer)
            .flat_map(|o| rows.iter().flat_map(move |r| (0..inner).map(move |i| (o * n + r) * inner + i)))
            .collect();
        Ok(self.picked(dims, &at))
    }
}

impl Known {
    /// The same elements in these sizes, but 1 along an axis.
    pub(super) fn with_axis(mut self, dims: &[usize], axis: usize) -> Self {
        self.dims = dims.to_vec();
        self.dims[axis] = 1;
        self
    }
}

/// Truth values in the sizes of a tensor.
pub(super) fn truths(like: &Known, data: Vec<bool>) -> Known {
    Known::bools(like.dims.clone(), data)
}
