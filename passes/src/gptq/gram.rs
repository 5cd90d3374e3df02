//! The Gram matrix of a linear layer's inputs, `H = (2 / n) Σ xᵀ x`, and its factors, in one square of memory.
//!
//! `H` stands above the diagonal. Below it the factors are worked out, so that a try that fails costs nothing of `H`.
//! A matrix `m` with `H + damping = mᵀ m` and zeros above its diagonal is found from the last row on; its inverse
//! `m⁻¹` is then the transpose of the upper factor `U` with `(H + damping)⁻¹ = Uᵀ U` (methods.md §4.1 step 5), without
//! forming `H⁻¹`.

use std::sync::Mutex;

use qrmc_ir::Engine;
use qrmc_ir::linalg::MatView;

/// Rows that are factored at a time.
const BLOCK: usize = 128;
/// Rows and columns of the strips that updates are cut into.
const STRIP: usize = 256;

/// A Gram matrix `[n, n]` and its factors.
pub(super) struct Gram {
    n: usize,
    /// Row-major. Above the diagonal `H` in the order of the inputs, on and below it the factors in the order of
    /// rounding.
    a: Vec<f64>,
    /// The diagonal of `H`.
    diag: Vec<f64>,
}

/// Rows `from..` of a product of inputs with themselves: `[rows, n - from]`, from column `from` on.
pub(super) struct Panel<'a> {
    pub(super) from: usize,
    pub(super) data: &'a [f32],
}

impl Gram {
    /// All zero.
    pub(super) fn new(n: usize) -> Self {
        Gram { n, a: vec![0.0; n * n], diag: vec![0.0; n] }
    }

    /// Adds rows of a product, times `factor`.
    pub(super) fn add(&mut self, engine: &dyn Engine, panel: &Panel<'_>, factor: f64) {
        let (n, width) = (self.n, self.n - panel.from);
        let rows = panel.data.len() / width.max(1);
        let diag = &mut self.diag[panel.from..panel.from + rows];
        for (r, d) in diag.iter_mut().enumerate() {
            *d += factor * f64::from(panel.data[r * width + r]);
        }
        let square = &mut self.a[panel.from * n..(panel.from + rows) * n];
        chunks(engine, square, 16 * n, &|at, square| {
            for (r, row) in square.chunks_mut(n).enumerate() {
                let r = at * 16 + r;
                let new = &panel.data[r * width + r..(r + 1) * width];
                row[panel.from + r..].iter_mut().zip(new).for_each(|(h, &x)| *h += factor * f64::from(x));
            }
        });
    }

    /// Whether every element is finite. The squares of a row bound the products with others.
    pub(super) fn is_finite(&self) -> bool {
        self.diag.iter().all(|d| d.is_finite())
    }

    /// The diagonal.
    pub(super) fn diag(&self) -> &[f64] {
        &self.diag
    }

    /// Inputs that are 0 on every token. Their squares become 1 (methods.md §4.1 step 1).
    pub(super) fn take_dead(&mut self) -> Vec<usize> {
        let dead: Vec<usize> = (0..self.n).filter(|&j| self.diag[j] == 0.0).collect();
        dead.iter().for_each(|&j| self.diag[j] = 1.0);
        dead
    }

    /// Works out `U` for `H` with its inputs in this order and `damping` added to its squares. `false` if that is not
    /// positive definite.
    pub(super) fn factor(&mut self, engine: &dyn Engine, order: &[usize], damping: f64) -> bool {
        let squares = self.load(order, damping);
        let n = self.n;
        let mut at = n.div_ceil(BLOCK) * BLOCK;
        while at > 0 {
            at -= BLOCK;
            if !self.factor_block(engine, at, (at + BLOCK).min(n), &squares) {
                return false;
            }
        }
        let mut at = n.div_ceil(BLOCK) * BLOCK;
        while at > 0 {
            at -= BLOCK;
            self.invert_block(engine, at, (at + BLOCK).min(n));
        }
        (0..n).all(|i| self.a[i * n + i].is_finite())
    }

    /// Copies what will be factored below the diagonal; gives its diagonal.
    fn load(&mut self, order: &[usize], damping: f64) -> Vec<f64> {
        let n = self.n;
        for (i, &p) in order.iter().enumerate() {
            for (j, &q) in order[..i].iter().enumerate() {
                self.a[i * n + j] = self.a[p.min(q) * n + p.max(q)];
            }
            self.a[i * n + i] = self.diag[p] + damping;
        }
        order.iter().map(|&p| self.diag[p] + damping).collect()
    }

    /// Rows `k0..k1` of `m`, and what they leave of the rows above.
    fn factor_block(&mut self, engine: &dyn Engine, k0: usize, k1: usize, squares: &[f64]) -> bool {
        let (n, m) = (self.n, k1 - k0);
        let mut block = self.square(k0, k1);
        for j in (0..m).rev() {
            let pivot = block[j * m + j];
            // Less than this is rounding alone.
            if pivot.is_nan() || pivot <= f64::EPSILON * squares[k0 + j] {
                return false;
            }
            let root = pivot.sqrt();
            block[j * m..=j * m + j].iter_mut().for_each(|x| *x /= root);
            let (above, row) = block.split_at_mut(j * m);
            for r in 0..j {
                let f = row[r];
                above[r * m..=r * m + r].iter_mut().zip(&*row).for_each(|(x, y)| *x -= f * y);
            }
        }
        self.put_square(k0, &block, m);
        if k0 == 0 {
            return true;
        }
        // What stands left of the block: `block⁻ᵀ` times what `H` has there.
        let inverse = inverse_lower(&block, m);
        let mut left = vec![0.0; m * k0];
        let old = MatView::new(&self.a[k0 * n..], m, k0, n);
        engine.add_product(MatView::new(&inverse, m, m, m).t(), old, 1.0, &mut left, k0);
        for (r, row) in left.chunks(k0).enumerate() {
            self.a[(k0 + r) * n..][..k0].copy_from_slice(row);
        }
        for r0 in (0..k0).step_by(STRIP) {
            let r1 = (r0 + STRIP).min(k0);
            let rows = MatView::new(&left[r0..], m, r1 - r0, k0).t();
            if r0 > 0 {
                let before = MatView::new(&left, m, r0, k0);
                engine.add_product(rows, before, -1.0, &mut self.a[r0 * n..], n);
            }
            let mut corner = self.square(r0, r1);
            let own = MatView::new(&left[r0..], m, r1 - r0, k0);
            engine.add_product(rows, own, -1.0, &mut corner, r1 - r0);
            self.put_square(r0, &corner, r1 - r0);
        }
        true
    }

    /// Columns `k0..k1` of `m⁻¹`; those behind are there already.
    fn invert_block(&mut self, engine: &dyn Engine, k0: usize, k1: usize) {
        let (n, m) = (self.n, k1 - k0);
        let inverse = inverse_lower(&self.square(k0, k1), m);
        self.put_square(k0, &inverse, m);
        let below = n - k1;
        if below == 0 {
            return;
        }
        let mut t = vec![0.0; below * m];
        let old = MatView::new(&self.a[k1 * n + k0..], below, m, n);
        engine.add_product(old, MatView::new(&inverse, m, m, m), -1.0, &mut t, m);
        let mut new = vec![0.0; below * m];
        for r0 in (k1..n).step_by(STRIP) {
            let r1 = (r0 + STRIP).min(n);
            let out = &mut new[(r0 - k1) * m..(r1 - k1) * m];
            let before = MatView::new(&self.a[r0 * n + k1..], r1 - r0, r0 - k1, n);
            engine.add_product(before, MatView::new(&t, r0 - k1, m, m), 1.0, out, m);
            let corner = self.square(r0, r1);
            let corner = MatView::new(&corner, r1 - r0, r1 - r0, r1 - r0);
            let own = MatView::new(&t[(r0 - k1) * m..], r1 - r0, m, m);
            engine.add_product(corner, own, 1.0, out, m);
        }
        for (r, row) in new.chunks(m).enumerate() {
            self.a[(k1 + r) * n + k0..][..m].copy_from_slice(row);
        }
    }

    /// The factors' part of a square on the diagonal, zeros above it.
    fn square(&self, from: usize, to: usize) -> Vec<f64> {
        let m = to - from;
        let mut s = vec![0.0; m * m];
        for r in 0..m {
            s[r * m..=r * m + r].copy_from_slice(&self.a[(from + r) * self.n + from..][..=r]);
        }
        s
    }

    fn put_square(&mut self, from: usize, s: &[f64], m: usize) {
        for r in 0..m {
            self.a[(from + r) * self.n + from..][..=r].copy_from_slice(&s[r * m..=r * m + r]);
        }
    }

    /// `U` of rows and columns `from..to`, row-major, zeros below the diagonal.
    pub(super) fn upper(&self, from: usize, to: usize) -> Vec<f64> {
        let m = to - from;
        let mut u = vec![0.0; m * m];
        for i in 0..m {
            for j in i..m {
                u[i * m + j] = self.a[(from + j) * self.n + from + i];
            }
        }
        u
    }

    /// `U` of rows `from..to` and the columns behind them.
    pub(super) fn beyond(&self, from: usize, to: usize) -> MatView<'_> {
        let n = self.n;
        MatView {
            data: &self.a[(to * n + from).min(n * n)..],
            rows: to - from,
            cols: n - to,
            strides: (1, n),
        }
    }

    /// `tr(d H dᵀ)` for rows `d [rows, n]` in the order of the inputs.
    pub(super) fn quadratic(&self, engine: &dyn Engine, d: &[f64]) -> f64 {
        let n = self.n;
        let rows = d.len() / n.max(1);
        let mut total = 0.0;
        let mut t = Vec::new();
        // Twice the part above the diagonal, with half of the diagonal.
        for c0 in (0..n).step_by(STRIP) {
            let width = (c0 + STRIP).min(n) - c0;
            let mut corner = vec![0.0; width * width];
            for r in 0..width {
                corner[r * width + r] = 0.5 * self.diag[c0 + r];
                let from = (c0 + r) * n + c0;
                corner[r * width + r + 1..(r + 1) * width]
                    .copy_from_slice(&self.a[from + r + 1..from + width]);
            }
            t.clear();
            t.resize(rows * width, 0.0);
            if c0 > 0 {
                let above = MatView::new(&self.a[c0..], c0, width, n);
                engine.add_product(MatView::new(d, rows, c0, n), above, 1.0, &mut t, width);
            }
            let own = MatView::new(&d[c0..], rows, width, n);
            engine.add_product(own, MatView::new(&corner, width, width, width), 1.0, &mut t, width);
            for (t, d) in t.chunks(width).zip(d.chunks(n)) {
                total += t.iter().zip(&d[c0..]).map(|(x, y)| x * y).sum::<f64>();
            }
        }
        2.0 * total
    }
}

/// Inverse of a lower triangular `m x m` matrix.
fn inverse_lower(l: &[f64], m: usize) -> Vec<f64> {
    let mut x = vec![0.0; m * m];
    for i in 0..m {
        let (done, row) = x.split_at_mut(i * m);
        let d = 1.0 / l[i * m + i];
        for p in 0..i {
            let f = l[i * m + p] * d;
            row[..=p].iter_mut().zip(&done[p * m..]).for_each(|(x, y)| *x -= f * y);
        }
        row[i] = d;
    }
    x
}

/// Calls `f(index, chunk)` for each run of `len` elements of `data` (the last may be shorter), on all threads.
pub(super) fn chunks<T: Send>(
    engine: &dyn Engine,
    data: &mut [T],
    len: usize,
    f: &(dyn Fn(usize, &mut [T]) + Sync),
) {
    let parts: Vec<Mutex<&mut [T]>> = data.chunks_mut(len.max(1)).map(Mutex::new).collect();
    engine.parallel(parts.len(), &|i| {
        let mut part = parts[i].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        f(i, &mut part);
    });
}
