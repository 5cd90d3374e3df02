//! From packed rows to tiles.

use super::form::{Form, planes, stored_lines};
use super::layout::{Tiles, Zeros};
use super::{LANES, LINE, PIECE};
use crate::cpu::pool::Pool;
use crate::cpu::weight::WeightView;

/// The parts of sixteen rows.
struct Block<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [f32],
    /// Empty if there is one zero point for all.
    zeros: &'a mut [u8],
    weighted: &'a mut [f32],
}

impl Tiles {
    /// Puts packed codes into this order, with the same bytes at any number of threads; `None` if `w` holds floats.
    ///
    /// # Panics
    /// If a length does not fit the shape.
    pub fn new(pool: &Pool, w: &WeightView<'_>, n: usize, k: usize) -> Option<Self> {
        w.check(n, k);
        let WeightView::Packed { bits, signed, codes: rows, group, scales: given, zeros: points } = *w else {
            return None;
        };
        let zero = points.is_none().then_some(if signed { 1 << (bits - 1) } else { 0 });
        let form = Form { n, k, bits, group, zero };
        let groups = form.groups();
        let row_bytes = w.row_bytes(k);
        let [codes, scales, zeros, weighted] = form.lengths();
        let (mut codes, mut zeros) = (vec![0; codes], vec![0; zeros]);
        let (mut scales, mut weighted) = (vec![0.0; scales / 4], vec![0.0; weighted / 4]);
        let mut zeros_of = zeros.chunks_mut(groups * LANES);
        let mut blocks: Vec<Block<'_>> = codes
            .chunks_mut(form.block_bytes())
            .zip(scales.chunks_mut(groups * LANES))
            .zip(weighted.chunks_mut(LANES))
            .map(|((codes, scales), weighted)| {
                let zeros = zeros_of.next().unwrap_or_default();
                Block { codes, scales, zeros, weighted }
            })
            .collect();
        pool.for_chunks(&mut blocks, 1, |b, block| {
            let block = &mut block[0];
            let mut row = Vec::with_capacity(k);
            for lane in 0..LANES.min(n - b * LANES) {
                let r = b * LANES + lane;
                row.clear();
                let stored = &rows[r * row_bytes..(r + 1) * row_bytes];
                qrmc_ir::pack::unpack_row(stored, bits, k, |c| row.push(c));
                let mut sum = 0.0f64;
                for (g, codes) in row.chunks_exact(group).enumerate() {
                    let (from, to) = (r * groups + g, g * LANES + lane);
                    block.scales[to] = given[from];
                    let zero = match points {
                        None => zero.unwrap_or(0),
                        Some(points) => {
                            block.zeros[to] = points[from];
                            points[from]
                        }
                    };
                    let whole: i64 = codes.iter().map(|&c| i64::from(c) - i64::from(zero)).sum();
                    sum += f64::from(given[from]) * whole as f64;
                    let each = form.group_bytes();
                    put(&mut block.codes[g * each..(g + 1) * each], bits, lane, codes);
                }
                block.weighted[lane] = sum as f32;
            }
        });
        drop(blocks);
        let zeros = zero.map_or_else(|| Zeros::Each(zeros.into()), Zeros::All);
        Some(Tiles::of(form, codes.into(), scales.into(), zeros, weighted.into()))
    }
}

/// Writes the codes of one group of one row.
fn put(stored: &mut [u8], bits: u8, lane: usize, codes: &[u8]) {
    let mut at = 0;
    for codes in codes.chunks(PIECE) {
        let mut base = 0;
        for p in planes(bits) {
            let kept = stored_lines(codes.len().div_ceil(4), p);
            let mask = ((1u16 << p) - 1) as u8;
            for (line, four) in codes.chunks(4).enumerate() {
                let to = at + line % kept * LINE + 4 * lane;
                let shift = line / kept * usize::from(p);
                let out = &mut stored[to..to + four.len()];
                out.iter_mut().zip(four).for_each(|(o, &c)| *o |= (c >> base & mask) << shift);
            }
            at += kept * LINE;
            base += p;
        }
    }
}
