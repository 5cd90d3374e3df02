//! Dense products, in `f32` unless said otherwise: the `gemm` crate on fixed tiles, one thread each.
//!
//! The cut into tiles depends on the shape alone, and so do the bytes of the result.
#![allow(unsafe_code, reason = "the gemm crate takes pointers; tiles of one output go to several threads")]

use super::dot::dot_rows;
use super::pool::{Pool, SharedMut};
use super::simd::Isa;
use super::weight::Row;

/// Up to this many rows on the left, a product with a transposed right side is done as dot products, and a row has the same
/// bits at any number of rows; so it has beyond.
pub(crate) const DOT_ROWS: usize = 32;
/// Up to this many, each packed row is de-quantized in registers, for four rows of the left side at a time.
pub(crate) const FUSED_ROWS: usize = 4;

/// A matrix that is read: `rows x cols` elements of a slice, at any strides.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a, T = f32> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T: Copy> MatRef<'a, T> {
    /// A dense row-major matrix.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        MatRef::strided(data, rows, cols, cols, 1)
    }

    /// Element `(i, j)` is `data[i * row_stride + j * col_stride]`.
    ///
    /// # Panics
    /// If the last element lies outside `data`.
    pub fn strided(data: &'a [T], rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Self {
        let need =
            if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + (cols - 1) * col_stride + 1 };
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
    pub(crate) fn row(&self, i: usize) -> &'a [T] {
        &self.data[i * self.row_stride..i * self.row_stride + self.cols]
    }

    /// From a row to the next, and from a column to the next.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn strides(&self) -> (usize, usize) {
        (self.row_stride, self.col_stride)
    }

    /// Element `(0, 0)`.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn as_ptr(&self) -> *const T {
        self.data.as_ptr()
    }

    /// Element `(i, j)`.
    pub(crate) fn at(&self, i: usize, j: usize) -> T {
        self.data[i * self.row_stride + j * self.col_stride]
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
    unsafe { product_at(a, b, (0.0, scale), out.as_mut_ptr(), stride) }
}

/// As [`product`], added to what `out` holds.
///
/// # Panics
/// If the shapes do not fit.
pub(crate) fn product_add(a: MatRef<'_>, b: MatRef<'_>, scale: f32, out: &mut [f32], stride: usize) {
    check(a, b, out.len(), stride);
    // SAFETY: `out` is exclusive and large enough.
    unsafe { product_at(a, b, (1.0, scale), out.as_mut_ptr(), stride) }
}

fn check<T: Copy>(a: MatRef<'_, T>, b: MatRef<'_, T>, len: usize, stride: usize) {
    assert_eq!(a.cols, b.rows, "inner dimensions");
    assert!(stride >= b.cols || a.rows <= 1, "rows of {} elements are {stride} apart", b.cols);
    let need = if a.rows == 0 || b.cols == 0 { 0 } else { (a.rows - 1) * stride + b.cols };
    assert!(len >= need, "a [{}, {}] product needs {need} elements, not {len}", a.rows, b.cols);
}

/// `out = keep * out + scale * a b`; what was there is not read where `keep` is 0.
///
/// # Safety
/// The `a.rows x b.cols` elements at `out` with rows `stride` apart are valid and written by nobody else; `a` and
/// `b` have equal inner dimensions.
unsafe fn product_at<T: Copy + PartialEq + From<u8> + 'static>(
    a: MatRef<'_, T>,
    b: MatRef<'_, T>,
    (keep, scale): (T, T),
    out: *mut T,
    stride: usize,
) {
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
            keep != T::from(0),
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            keep,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Rows and columns of a tile of a product `[m, n]`.
///
/// Each tile packs its columns of the right side, so a tile is as high as it can be; with 512 columns the packed
/// part stays in the second-level cache. Both were measured: 256 columns cost up to 9 %, 256 rows up to 15 %.
fn tile(m: usize, n: usize) -> (usize, usize) {
    let even =
        |len: usize, most: usize, to: usize| len.div_ceil(len.div_ceil(most).max(1)).next_multiple_of(to);
    let (mut tm, mut tn) = (even(m, 2048, 8), if n <= 640 { n } else { even(n, 512, 64) });
    // A handful of threads should find work.
    while m.div_ceil(tm) * n.div_ceil(tn) < 4 {
        if tm >= 1024 || tm >= 256 && tn < 192 {
            tm = even(tm, tm.div_ceil(2), 8);
        } else if tn >= 192 {
            tn = even(tn, tn.div_ceil(2), 32);
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
    let (tm, tn) = tile(m, n);
    let (across, down) = (n.div_ceil(tn), m.div_ceil(tm));
    let out = SharedMut::new(out);
    pool.for_each(batch * across * down, |task| {
        let (i, task) = (task / (across * down), task % (across * down));
        let (row, col) = (task / across * tm, task % across * tn);
        let (rows, cols) = (tm.min(m - row), tn.min(n - col));
        let a = nth(a, a_batch, i).part(row, 0, rows, k);
        let b = nth(b, b_batch, i).part(0, col, k, cols);
        // SAFETY: inside `out` by the checks above; each task has a tile of its own.
        unsafe { product_at(a, b, (0.0, 1.0), out.ptr_at(i * out_batch + row * stride + col), stride) };
    });
}

/// `out[n, n] = xᵀ x`: tiles on and below the diagonal are computed, the others are their mirror images.
///
/// # Panics
/// If the shapes do not fit.
pub fn gram(pool: &Pool, x: MatRef<'_>, out: &mut [f32]) {
    const SIDE: usize = 256;
    let n = x.cols;
    assert_eq!(out.len(), n * n, "a [{n}, {n}] product");
    let side = n.div_ceil(SIDE);
    let tiles: Vec<(usize, usize)> = (0..side).flat_map(|i| (0..=i).map(move |j| (i, j))).collect();
    let out = SharedMut::new(out);
    pool.for_each(tiles.len(), |task| {
        let (row, col) = (tiles[task].0 * SIDE, tiles[task].1 * SIDE);
        let (rows, cols) = (SIDE.min(n - row), SIDE.min(n - col));
        let (a, b) = (x.part(0, row, x.rows, rows).t(), x.part(0, col, x.rows, cols));
        // SAFETY: inside `out`; each task has a tile of its own.
        unsafe { product_at(a, b, (0.0, 1.0), out.ptr_at(row * n + col), n) };
        for i in (0..rows).filter(|_| row != col) {
            // SAFETY: a row of this task's tile, which is written no more.
            let from = unsafe { out.part((row + i) * n + col, cols) };
            for (j, x) in from.iter().enumerate() {
                // SAFETY: an element of the mirror image of this task's tile.
                let image = unsafe { out.part((col + j) * n + row + i, 1) };
                image[0] = *x;
            }
        }
    });
}

/// `out += scale * a b` in double precision; rows of `out` are `stride` elements apart, what lies between them is kept.
///
/// # Panics
/// If the shapes do not fit.
pub fn add_product(
    pool: &Pool,
    a: MatRef<'_, f64>,
    b: MatRef<'_, f64>,
    scale: f64,
    out: &mut [f64],
    stride: usize,
) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    check(a, b, out.len(), stride);
    let (tm, tn) = tile(m, n);
    let (across, down) = (n.div_ceil(tn), m.div_ceil(tm));
    let out = SharedMut::new(out);
    pool.for_each(across * down, |task| {
        let (row, col) = (task / across * tm, task % across * tn);
        let (rows, cols) = (tm.min(m - row), tn.min(n - col));
        let (a, b) = (a.part(row, 0, rows, k), b.part(0, col, k, cols));
        // SAFETY: inside `out` by the check above; each task has a tile of its own.
        unsafe { product_at(a, b, (1.0, scale), out.ptr_at(row * stride + col), stride) };
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
        let row = |j: usize| w.row(col + j);
        dot_rows(isa, cols, |j| Row::F32(row(j)), |r| a.row(r), &mut outs, 0);
    });
}

/// How many stored rows of `bytes` one task takes: about 64 KiB of them, by shape only.
pub(crate) fn columns_at_once(bytes: usize, n: usize) -> usize {
    (64 * 1024usize).div_ceil(bytes.max(1)).clamp(1, n.max(1))
}

#[cfg(test)]
mod tests;
