//! `y = x Wᵀ` on weights as they are stored.
#![allow(unsafe_code, reason = "several threads write disjoint columns of one output")]

use super::dot::{Layout, dot_floats, dot_rows, layout, split_pairs};
use super::gemm::{DOT_ROWS, FUSED_ROWS, MatRef, columns_at_once, matmul};
use super::pool::{Pool, Scratch, SharedMut};
use super::simd::Isa;
use super::weight::{Dequantize, WeightView};

/// Most rows of a stored weight that exist as floats at the same time.
const PANEL: usize = 1024;
/// Stored rows that are dequantised together where there is no fused kernel.
const AT_ONCE: usize = 4;
/// Floats in a cache line.
const LINE: usize = 16;

/// `out[m, n] = x[m, k] Wᵀ` for a weight `W[n, k]`, in `f32`.
///
/// Up to 32 rows of `x`, floats are widened in registers, and so are up to 4 those of packed weights; for more rows these are
/// de-quantized four at a time into the cache. Beyond 32, panels of at most 1024 rows go into `scratch`, to be multiplied as
/// matrices. Up to 32 rows, floats give a row the same bits at any number of rows.
///
/// # Panics
/// If a length does not fit the shape.
#[allow(clippy::too_many_arguments, reason = "three sizes and the operands of one matrix product")]
pub fn linear(
    pool: &Pool,
    isa: Isa,
    x: &[f32],
    (m, k): (usize, usize),
    w: &WeightView<'_>,
    n: usize,
    out: &mut [f32],
    scratch: &Scratch,
) {
    w.check(n, k);
    assert_eq!(x.len(), m * k, "input of a linear [{m}, {k}]");
    assert_eq!(out.len(), m * n, "output of a linear [{m}, {n}]");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        return out.fill(0.0);
    }
    if m <= DOT_ROWS {
        return fused(pool, isa, x, (m, k), w, n, out, scratch);
    }
    if let WeightView::F32(w) = w {
        return matmul(pool, isa, MatRef::new(x, m, k), MatRef::new(w, n, k).t(), out, n);
    }
    let mut panel = scratch.take(PANEL.min(n) * k);
    let rows = columns_at_once(4 * k, n);
    let stored = w.reader(k);
    for from in (0..n).step_by(PANEL) {
        let count = PANEL.min(n - from);
        let panel = &mut panel[..count * k];
        pool.for_chunks(panel, rows * k, |chunk, out| {
            for (i, out) in out.chunks_exact_mut(k).enumerate() {
                isa.run(Dequantize { row: stored.row(from + chunk * rows + i), out });
            }
        });
        matmul(pool, isa, MatRef::new(x, m, k), MatRef::new(panel, count, k).t(), &mut out[from..], n);
    }
}

/// A few rows of `x` against each stored row in turn.
#[allow(clippy::too_many_arguments, reason = "as `linear`")]
fn fused(
    pool: &Pool,
    isa: Isa,
    x: &[f32],
    (m, k): (usize, usize),
    w: &WeightView<'_>,
    n: usize,
    out: &mut [f32],
    scratch: &Scratch,
) {
    let stored = w.reader(k);
    let packed = matches!(w, WeightView::Packed { .. });
    let layout = if m <= FUSED_ROWS || !packed { layout(isa, &stored.row(0), k) } else { Layout::Unfused };
    // A copy on a cache line of its own: every stored row reads all of it.
    let mut copy = scratch.take(m * k + LINE);
    let skip = copy.as_ptr().align_offset(4 * LINE).min(LINE);
    let copy = &mut copy[skip..skip + m * k];
    match layout {
        Layout::SplitPairs => split_pairs(x, k, copy),
        Layout::Natural | Layout::Unfused => copy.copy_from_slice(x),
    }
    let x = &*copy;
    let run = columns_at_once(w.row_bytes(k), n);
    let out = SharedMut::new(out);
    pool.for_each(n.div_ceil(run), |task| {
        let from = task * run;
        let count = run.min(n - from);
        // SAFETY: each task writes its own columns.
        let mut outs: Vec<&mut [f32]> = (0..m).map(|r| unsafe { out.part(r * n + from, count) }).collect();
        let x = |r: usize| &x[r * k..(r + 1) * k];
        match layout {
            Layout::Unfused => {
                let mut buf = scratch.take(AT_ONCE * k);
                for at in (0..count).step_by(AT_ONCE) {
                    let rows = AT_ONCE.min(count - at);
                    for (j, out) in buf.chunks_exact_mut(k).take(rows).enumerate() {
                        isa.run(Dequantize { row: stored.row(from + at + j), out });
                    }
                    dot_floats(isa, rows, |j| &buf[j * k..(j + 1) * k], x, &mut outs, at);
                }
            }
            _ => dot_rows(isa, count, |j| stored.row(from + j), x, &mut outs, 0),
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::{bits, close, noise, pools};
    use super::super::weight::dequantize_row;
    use super::*;

    /// Bytes of each way to store `n * k` weights, to be viewed by `views`.
    struct Stored {
        f32s: Vec<f32>,
        f16s: Vec<u8>,
        bf16s: Vec<u8>,
        packed: Vec<(u8, Vec<u8>)>,
        scales: Vec<f32>,
        zeros: Vec<u8>,
    }

    impl Stored {
        fn new(n: usize, k: usize, group: usize) -> Self {
            let f32s = noise(n * k, 11);
            let codes = |b: u8| {
                let (mut bytes, top) = (Vec::new(), ((1u16 << b) - 1) as f32);
                for row in f32s.chunks(k) {
                    let codes = row.iter().map(|x| ((x + 1.0) * 0.5 * top).round() as u8);
                    qrmc_ir::pack::pack_row(codes, b, &mut bytes);
                }
                bytes
            };
            Stored {
                f16s: f32s.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
                bf16s: f32s.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
                packed: [2u8, 3, 4, 5, 8].map(|b| (b, codes(b))).to_vec(),
                scales: noise(n * k / group, 12).iter().map(|x| 0.001 + 0.005 * x.abs()).collect(),
                zeros: (0..n * k / group).map(|i| (i % 4) as u8).collect(),
                f32s,
            }
        }

        fn views(&self, group: usize) -> Vec<(String, WeightView<'_>)> {
            let mut all = vec![
                ("f32".to_string(), WeightView::F32(&self.f32s)),
                ("f16".to_string(), WeightView::F16(&self.f16s)),
                ("bf16".to_string(), WeightView::BF16(&self.bf16s)),
            ];
            for (bits, codes) in &self.packed {
                for (signed, zeros) in [(true, None), (false, None), (false, Some(&self.zeros[..]))] {
                    let view =
                        WeightView::Packed { bits: *bits, signed, codes, group, scales: &self.scales, zeros };
                    all.push((format!("{bits} bits, signed {signed}, zeros {}", zeros.is_some()), view));
                }
            }
            all
        }
    }

    #[test]
    fn every_storage_matches_f64_at_every_height() {
        for (n, k, group) in [(1, 1, 1), (5, 96, 32), (67, 33, 33), (40, 70, 10), (300, 256, 64), (9, 48, 16)]
        {
            let stored = Stored::new(n, k, group);
            for (name, view) in stored.views(group) {
                let mut w = vec![0.0; n * k];
                w.chunks_mut(k).enumerate().for_each(|(r, out)| dequantize_row(Isa::PORTABLE, &view, r, out));
                for m in [0, 1, 2, 3, 5, 8, 33] {
                    let x = noise(m * k, 13);
                    let want: Vec<f64> = (0..m * n)
                        .map(|o| {
                            let (x, w) = (&x[o / n * k..][..k], &w[o % n * k..][..k]);
                            x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
                        })
                        .collect();
                    for isa in Isa::available() {
                        let mut first = None;
                        for pool in &pools() {
                            let mut out = vec![f32::NAN; m * n];
                            linear(pool, isa, &x, (m, k), &view, n, &mut out, &Scratch::new());
                            close(&out, &want, 2e-5, &format!("{name}, [{m}, {k}] x {n}, {}", isa.name()));
                            assert_eq!(*first.get_or_insert_with(|| bits(&out)), bits(&out));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_of_floats_is_the_same_among_few() {
        let (n, k, group) = (301, 96, 32);
        let (stored, scratch) = (Stored::new(n, k, group), Scratch::new());
        let x = noise(DOT_ROWS * k, 15);
        let dense = |(_, view): &(String, WeightView<'_>)| !matches!(view, WeightView::Packed { .. });
        for (name, view) in stored.views(group).into_iter().filter(dense) {
            for (isa, pool) in Isa::available().into_iter().zip(pools().iter().cycle()) {
                let run = |m: usize| {
                    let mut out = vec![0.0; m * n];
                    linear(pool, isa, &x[..m * k], (m, k), &view, n, &mut out, &scratch);
                    bits(&out)
                };
                let all = run(DOT_ROWS);
                for m in 1..DOT_ROWS {
                    assert!(all.starts_with(&run(m)), "{name}, {m} rows, {}", isa.name());
                }
            }
        }
    }

    #[test]
    fn panels_join_and_rows_do_not_depend_on_their_neighbours() {
        let (m, n, k, group) = (35, 2500, 64, 32);
        let (stored, scratch, pool) = (Stored::new(n, k, group), Scratch::new(), &pools()[1]);
        let x = noise(m * k, 14);
        for (name, view) in stored.views(group) {
            for isa in Isa::available() {
                let mut all = vec![0.0; m * n];
                linear(pool, isa, &x, (m, k), &view, n, &mut all, &scratch);
                let mut three = vec![0.0; 3 * n];
                linear(pool, isa, &x[..3 * k], (3, k), &view, n, &mut three, &scratch);
                let mut one = vec![0.0; n];
                linear(pool, isa, &x[2 * k..3 * k], (1, k), &view, n, &mut one, &scratch);
                assert_eq!(bits(&one), bits(&three[2 * n..]), "{name}");
                let want: Vec<f64> = one.iter().map(|&v| f64::from(v)).collect();
                close(&all[2 * n..3 * n], &want, 1e-5, &name);
            }
        }
        assert!(scratch.bytes() <= 4 * (PANEL * k + 3 * k * 4), "{} bytes", scratch.bytes());
    }
}
