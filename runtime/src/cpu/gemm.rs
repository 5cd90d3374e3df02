//! Dense products in `f32`: the `gemm` crate on fixed tiles, one thread each.
//!
//! The cut into tiles depends on the shape alone, and so do the bytes of the result.
#![allow(unsafe_code, reason = "the gemm crate takes pointers; tiles of one output go to several threads")]

use super::dot::dot;
use super::pool::{Pool, SharedMut};
use super::simd::Isa;
use super::weight::Row;

/// Up to this many rows on the left, a product with a transposed right side is done as dot products.
pub(crate) const DOT_ROWS: usize = 8;

/// A matrix that is read: `rows x cols` elements of a slice, at any strides.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A dense row-major matrix.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        MatRef::strided(data, rows, cols, cols, 1)
    }

    /// Element `(i, j)` is `data[i * row_stride + j * col_stride]`.
    ///
    /// # Panics
    /// If the last element lies outside `data`.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Self {
        let need = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + (cols - 1) * col_stride + 1 };
        assert!(data.len() >= need, "a [{rows}, {cols}] matrix needs {need} elements, not {}", data.len());
        MatRef { data, rows, cols, row_stride, col_stride }
    }

    /// The transpose, without moving anything.
    #[must_use]
    pub fn t(self) -> Self {
        MatRef {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i`, whose elements must be neighbours.
    fn row(&self, i: usize) -> &'a [f32] {
        &self.data[i * self.row_stride..i * self.row_stride + self.cols]
    }

    /// The part of `rows x cols` at `(i, j)`.
    pub(crate) fn part(&self, i: usize, j: usize, rows: usize, cols: usize) -> Self {
        assert!(i + rows <= self.rows && j + cols <= self.cols, "part outside a matrix");
        let at = (i * self.row_stride + j * self.col_stride).min(self.data.len());
        MatRef { data: &self.data[at..], rows, cols, ..*self }
    }
}

/// `out = scale * a b` on this thread. `out` is row-major with rows `stride` apart.
///
/// # Panics
/// If the shapes do not fit.
pub(crate) fn product(a: MatRef<'_>, b: MatRef<'_>, scale: f32, out: &mut [f32], stride: usize) {
    check(a, b, out.len(), stride);
    // SAFETY: `out` is exclusive and large enough.
    unsafe { product_at(a, b, scale, out.as_mut_ptr(), stride) }
}

fn check(a: MatRef<'_>, b: MatRef<'_>, len: usize, stride: usize) {
    assert_eq!(a.cols, b.rows, "inner dimensions");
    assert!(stride >= b.cols || a.rows <= 1, "rows of {} elements are {stride} apart", b.cols);
    let need = if a.rows == 0 || b.cols == 0 { 0 } else { (a.rows - 1) * stride + b.cols };
    assert!(len >= need, "a [{}, {}] product needs {need} elements, not {len}", a.rows, b.cols);
}

/// # Safety
/// The `a.rows x b.cols` elements at `out` with rows `stride` apart are valid and written by nobody else; `a` and
/// `b` have equal inner dimensions.
unsafe fn product_at(a: MatRef<'_>, b: MatRef<'_>, scale: f32, out: *mut f32, stride: usize) {
    debug_assert_eq!(a.cols, b.rows);
    // SAFETY: `MatRef` keeps all elements of `a` and `b` inside their slices; `out` by the caller's promise.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out,
            1,
            stride as isize,
            false,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            0.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Rows and columns of a tile of a product `[m, k] x [k, n]`.
fn tile(m: usize, n: usize, _k: usize) -> (usize, usize) {
    let (mut tm, mut tn) = (m.max(1), n.clamp(1, 1024));
    // Each tile packs its columns of the right side, so cut columns first, then rows; cut until a
    // handful of threads has work, but not below what the packing is worth.
    while m.div_ceil(tm) * n.div_ceil(tn) < 8 {
        if tn >= 384 {
            tn = tn.div_ceil(2).next_multiple_of(64);
        } else if tm >= 512 {
            tm = tm.div_ceil(2).next_multiple_of(8);
        } else {
            break;
        }
    }
    (tm, tn)
}

/// `out[m, n] = a[m, k] b[k, n]`; rows of `out` are `stride` elements apart, what lies between them is kept.
///
/// For a linear layer `y = x Wᵀ` give `MatRef::new(w, n, k).t()` as `b`.
///
/// # Panics
/// If the shapes do not fit.
pub fn matmul(pool: &Pool, isa: Isa, a: MatRef<'_>, b: MatRef<'_>, out: &mut [f32], stride: usize) {
    matmul_batched(pool, isa, 1, (a, 0), (b, 0), out, (stride, 0));
}

/// `batch` products. Each operand comes with the distance between neighbours in the batch (0 repeats it), `out`
/// with the distances between rows and between products.
///
/// # Panics
/// If the shapes do not fit or products overlap in `out`.
pub fn matmul_batched(
    pool: &Pool,
    isa: Isa,
    batch: usize,
    (a, a_batch): (MatRef<'_>, usize),
    (b, b_batch): (MatRef<'_>, usize),
    out: &mut [f32],
    (stride, out_batch): (usize, usize),
) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    if batch == 0 || m == 0 || n == 0 {
        return;
    }
    let last = batch - 1;
    let each = (m - 1) * stride + n;
    assert!(batch == 1 || out_batch >= each, "products overlap");
    assert!(out.len() >= last * out_batch, "output of a batch");
    check(a, b, out.len() - last * out_batch, stride);
    // The last operands of the batch must fit: the others then do.
    let (_, _) = (nth(a, a_batch, last), nth(b, b_batch, last));
    if m <= DOT_ROWS && b.row_stride == 1 && a.col_stride == 1 && k > 0 {
        return dots(pool, isa, batch, (a, a_batch), (b, b_batch), out, (stride, out_batch));
    }
    let (tm, tn) = tile(m, n, k);
    let (across, down) = (n.div_ceil(tn), m.div_ceil(tm));
    let out = SharedMut::new(out);
    pool.for_each(batch * across * down, |task| {
        let (i, task) = (task / (across * down), task % (across * down));
        let (row, col) = (task / across * tm, task % across * tn);
        let (rows, cols) = (tm.min(m - row), tn.min(n - col));
        let a = nth(a, a_batch, i).part(row, 0, rows, k);
        let b = nth(b, b_batch, i).part(0, col, k, cols);
        // SAFETY: inside `out` by the checks above; each task has a tile of its own.
        unsafe { product_at(a, b, 1.0, out.ptr_at(i * out_batch + row * stride + col), stride) };
    });
}

/// Operand `i` of a batch.
fn nth(x: MatRef<'_>, step: usize, i: usize) -> MatRef<'_> {
    MatRef::strided(&x.data[(i * step).min(x.data.len())..], x.rows, x.cols, x.row_stride, x.col_stride)
}

/// Few rows on the left, the right side transposed: dot products over runs of its columns.
fn dots(
    pool: &Pool,
    isa: Isa,
    batch: usize,
    (a, a_batch): (MatRef<'_>, usize),
    (b, b_batch): (MatRef<'_>, usize),
    out: &mut [f32],
    (stride, out_batch): (usize, usize),
) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    let run = columns_at_once(4 * k, n);
    let runs = n.div_ceil(run);
    let out = SharedMut::new(out);
    pool.for_each(batch * runs, |task| {
        let (i, col) = (task / runs, task % runs * run);
        let cols = run.min(n - col);
        let (a, w) = (nth(a, a_batch, i), nth(b, b_batch, i).t());
        // SAFETY: each task writes its own columns of its own product.
        let mut outs: Vec<&mut [f32]> =
            (0..m).map(|r| unsafe { out.part(i * out_batch + r * stride + col, cols) }).collect();
        for j in 0..cols {
            dot_block(isa, Row::F32(w.row(col + j)), |r| a.row(r), j, &mut outs);
        }
    });
}

/// How many stored rows of `bytes` one task takes: about 64 KiB of them, by shape only.
pub(crate) fn columns_at_once(bytes: usize, n: usize) -> usize {
    (64 * 1024usize).div_ceil(bytes.max(1)).clamp(1, n.max(1))
}

/// One stored row against all rows of `x`; the products become element `j` of each of `outs`.
#[inline]
pub(crate) fn dot_block<'x>(
    isa: Isa,
    row: Row<'_>,
    x: impl Fn(usize) -> &'x [f32],
    j: usize,
    outs: &mut [&mut [f32]],
) {
    let m = outs.len();
    let mut r = 0;
    while m - r >= 4 {
        let y = dot(isa, row, [x(r), x(r + 1), x(r + 2), x(r + 3)]);
        y.into_iter().zip(&mut outs[r..]).for_each(|(y, out)| out[j] = y);
        r += 4;
    }
    if m - r >= 2 {
        let y = dot(isa, row, [x(r), x(r + 1)]);
        y.into_iter().zip(&mut outs[r..]).for_each(|(y, out)| out[j] = y);
        r += 2;
    }
    if m > r {
        outs[r][j] = dot(isa, row, [x(r)])[0];
    }
}
