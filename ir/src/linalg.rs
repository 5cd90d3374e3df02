//! Dense linear algebra of small matrices in `f64`, where a library's last bits may not be the same on every run.

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
        if !(m[pivot * n + c].abs() > 0.0) {
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
