//! Dense linear algebra of small matrices in `f64`, where a library's last bits may not be the same on every run.

/// A matrix of `f64` that is read: `rows x cols` elements of a slice, at any strides.
#[derive(Clone, Copy, Debug)]
pub struct MatView<'a> {
    /// Backing elements; element `(i, j)` is `data[i * strides.0 + j * strides.1]`.
    pub data: &'a [f64],
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Distances between rows and between columns.
    pub strides: (usize, usize),
}

impl<'a> MatView<'a> {
    /// A matrix whose rows are `stride` elements apart.
    ///
    /// # Panics
    /// If the last element lies outside `data`: a bug of the caller.
    pub fn new(data: &'a [f64], rows: usize, cols: usize, stride: usize) -> Self {
        let need = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols };
        assert!(data.len() >= need, "a [{rows}, {cols}] matrix needs {need} elements, not {}", data.len());
        MatView { data, rows, cols, strides: (stride, 1) }
    }

    /// The transpose, without moving anything.
    #[must_use]
    pub fn t(self) -> Self {
        let (r, c) = self.strides;
        MatView { data: self.data, rows: self.cols, cols: self.rows, strides: (c, r) }
    }
}

/// `out += factor * a b`; see [`crate::Engine::add_product`], whose plain form this is.
///
/// # Panics
/// If the shapes do not fit: a bug of the caller.
pub fn add_product(a: MatView<'_>, b: MatView<'_>, factor: f64, out: &mut [f64], stride: usize) {
    assert_eq!(a.cols, b.rows, "inner dimensions");
    for i in 0..a.rows {
        for p in 0..a.cols {
            let x = factor * a.data[i * a.strides.0 + p * a.strides.1];
            for j in 0..b.cols {
                out[i * stride + j] += x * b.data[p * b.strides.0 + j * b.strides.1];
            }
        }
    }
}

/// Replaces a row-major `n x n` matrix by its inverse (Gauss-Jordan, partial pivoting). A singular matrix becomes NaN,
/// which no later check can miss.
///
/// # Panics
/// If `m` does not hold `n * n` elements: a bug of the caller.
pub fn invert(m: &mut [f64], n: usize) {
    assert_eq!(m.len(), n * n, "a matrix fills its shape");
    let mut right = vec![0.0; n * n];
    (0..n).for_each(|i| right[i * n + i] = 1.0);
    for c in 0..n {
        let size = |r: &usize| m[r * n + c].abs();
        // The first of the largest: a tie is settled by the row.
        let pivot = (c..n).fold(c, |best, r| if size(&r) > size(&best) { r } else { best });
        if m[pivot * n + c].abs().partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater) {
            m.fill(f64::NAN);
            return;
        }
        if pivot != c {
            for j in 0..n {
                m.swap(pivot * n + j, c * n + j);
                right.swap(pivot * n + j, c * n + j);
            }
        }
        let d = 1.0 / m[c * n + c];
        for j in 0..n {
            m[c * n + j] *= d;
            right[c * n + j] *= d;
        }
        let (row_m, row_r) = (m[c * n..(c + 1) * n].to_vec(), right[c * n..(c + 1) * n].to_vec());
        for r in (0..n).filter(|r| *r != c) {
            let f = m[r * n + c];
            if f != 0.0 {
                m[r * n..(r + 1) * n].iter_mut().zip(&row_m).for_each(|(x, p)| *x -= f * p);
                right[r * n..(r + 1) * n].iter_mut().zip(&row_r).for_each(|(x, p)| *x -= f * p);
            }
        }
    }
    m.copy_from_slice(&right);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_add_to_what_is_there() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, -1.0, 2.0, 0.5]);
        let mut out = [10.0, 0.0, 9.0, 0.0, 0.0, 9.0];
        // [[1, 2], [4, 5]] times the transpose of [[1, -1], [2, 0.5]]
        add_product(MatView::new(&a, 2, 2, 3), MatView::new(&b, 2, 2, 2).t(), 2.0, &mut out, 3);
        assert_eq!(out, [8.0, 6.0, 9.0, -2.0, 21.0, 9.0]);
    }

    #[test]
    fn inverses() {
        let mut m = [0.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 3.0];
        let a = m;
        invert(&mut m, 3);
        for i in 0..3 {
            for j in 0..3 {
                let x: f64 = (0..3).map(|k| a[i * 3 + k] * m[k * 3 + j]).sum();
                assert!((x - f64::from(u8::from(i == j))).abs() < 1e-14);
            }
        }
        let mut singular = [1.0, 2.0, 2.0, 4.0];
        invert(&mut singular, 2);
        assert!(singular.iter().all(|x| x.is_nan()));
    }
}
