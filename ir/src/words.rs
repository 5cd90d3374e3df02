//! Codes in 32-bit words, as AutoAWQ, GPTQ and compressed-tensors checkpoints store them (methods.md §10.2 to §10.4).
//!
//! A line of codes is a dense stream of bits, least significant bit first, from the first word on; the unused bits of
//! the last word are 0. Codes of 3, 5, 6 and 7 bits cross words.

/// Words that `n` codes take.
pub fn word_count(n: usize, bits: u8) -> usize {
    (n * usize::from(bits)).div_ceil(32)
}

/// Packs each row of `codes[rows, cols]`: `[rows, word_count(cols)]`. Codes are below `2^bits`.
pub fn pack_rows(codes: &[u8], cols: usize, bits: u8) -> Vec<u32> {
    let mut out = Vec::with_capacity(codes.len() / cols.max(1) * word_count(cols, bits));
    for row in codes.chunks_exact(cols.max(1)) {
        let (mut word, mut have) = (0u64, 0u32);
        for &code in row {
            word |= u64::from(code) << have;
            have += u32::from(bits);
            if have >= 32 {
                out.push(word as u32);
                word >>= 32;
                have -= 32;
            }
        }
        if have > 0 {
            out.push(word as u32);
        }
    }
    out
}

/// Undoes [`pack_rows`]: `cols` codes of each row.
///
/// # Panics
/// If the words are not whole rows of `word_count(cols)`.
pub fn unpack_rows(words: &[u32], cols: usize, bits: u8) -> Vec<u8> {
    let each = word_count(cols, bits).max(1);
    assert_eq!(words.len() % each, 0, "whole rows");
    let mask = (1u64 << bits) - 1;
    let mut out = Vec::with_capacity(words.len() / each * cols);
    for row in words.chunks_exact(each) {
        let (mut word, mut have, mut next) = (0u64, 0u32, 0);
        for _ in 0..cols {
            if have < u32::from(bits) {
                word |= u64::from(row[next]) << have;
                next += 1;
                have += 32;
            }
            out.push((word & mask) as u8);
            word >>= bits;
            have -= u32::from(bits);
        }
    }
    out
}

/// `x[rows, cols]` with its axes exchanged: `[cols, rows]`.
pub fn transposed<T: Copy + Default>(x: &[T], rows: usize, cols: usize) -> Vec<T> {
    // A square of this side stays in the first cache.
    const SIDE: usize = 64;
    let mut out = vec![T::default(); x.len()];
    for r0 in (0..rows).step_by(SIDE) {
        for c0 in (0..cols).step_by(SIDE) {
            for c in c0..cols.min(c0 + SIDE) {
                for r in r0..rows.min(r0 + SIDE) {
                    out[c * rows + r] = x[r * cols + c];
                }
            }
        }
    }
    out
}

/// Which of eight neighbouring columns stands in each nibble of an AutoAWQ word, from the lowest.
const AWQ_ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Puts each eight neighbours into the order in which AutoAWQ's words hold them.
pub fn to_awq_order(codes: &mut [u8]) {
    for eight in codes.as_chunks_mut::<8>().0 {
        *eight = AWQ_ORDER.map(|column| eight[column]);
    }
}

/// Undoes [`to_awq_order`].
pub fn from_awq_order(codes: &mut [u8]) {
    for eight in codes.as_chunks_mut::<8>().0 {
        let stored = *eight;
        for (nibble, column) in AWQ_ORDER.into_iter().enumerate() {
            eight[column] = stored[nibble];
        }
    }
}

/// The zero points of GPTQ's first format: each word less the constant whose every field is 1, with wrap-around over
/// the whole word, so that a zero point of 0 borrows from its neighbour. Fields that cross words (3 bits) are lessened
/// each on its own, 0 to 7, as GPTQModel does.
pub fn less_one(words: &mut [u32], cols: usize, bits: u8) {
    shift_zeros(words, cols, bits, u32::wrapping_sub);
}

/// Undoes [`less_one`], exactly.
pub fn plus_one(words: &mut [u32], cols: usize, bits: u8) {
    shift_zeros(words, cols, bits, u32::wrapping_add);
}

fn shift_zeros(words: &mut [u32], cols: usize, bits: u8, f: fn(u32, u32) -> u32) {
    if !32u8.is_multiple_of(bits) {
        let mask = (1u32 << bits) - 1;
        let shifted: Vec<u8> =
            unpack_rows(words, cols, bits).into_iter().map(|z| (f(u32::from(z), 1) & mask) as u8).collect();
        words.copy_from_slice(&pack_rows(&shifted, cols, bits));
        return;
    }
    // What lies behind the last code stays 0.
    let ones = pack_rows(&vec![1; cols], cols, bits);
    for row in words.chunks_exact_mut(ones.len().max(1)) {
        for (word, &one) in row.iter_mut().zip(&ones) {
            *word = f(*word, one);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn autoawq_words() {
        // methods.md §10.2.
        let pack = |mut codes: [u8; 8]| {
            to_awq_order(&mut codes);
            pack_rows(&codes, 8, 4)
        };
        assert_eq!(pack([0, 1, 2, 3, 4, 5, 6, 7]), [0x7531_6420]);
        assert_eq!(pack([15, 14, 13, 12, 11, 10, 9, 8]), [0x8ACE_9BDF]);
        assert_eq!(pack([8; 8]), [0x8888_8888]);
        assert_eq!(pack([7, 8, 7, 8, 7, 8, 7, 8]), [0x8888_7777]);
        let mut codes = unpack_rows(&[0x8ACE_9BDF], 8, 4);
        from_awq_order(&mut codes);
        assert_eq!(codes, [15, 14, 13, 12, 11, 10, 9, 8]);
    }

    #[test]
    fn gptq_words() {
        // methods.md §10.3.
        assert_eq!(pack_rows(&[0, 1, 2, 3, 4, 5, 6, 7], 8, 4), [0x7654_3210]);
        assert_eq!(pack_rows(&[15, 14, 13, 12, 11, 10, 9, 8], 8, 4), [0x89AB_CDEF]);
        let three: Vec<u8> = (0..32).map(|i| ((5 * i + 3) % 8) as u8).collect();
        assert_eq!(pack_rows(&three, 32, 3), [0x43C6_7543, 0x7543_C675, 0xC675_43C6]);
    }

    #[test]
    fn zero_points_less_one_borrow_from_their_neighbour() {
        // methods.md §10.3.
        for (zeros, stored, less) in
            [([8; 8], 0x8888_8888, 0x7777_7777), ([7, 0, 3, 8, 15, 1, 9, 2], 0x291F_8307, 0x180E_71F6)]
        {
            let mut words = pack_rows(&zeros, 8, 4);
            assert_eq!(words, [stored]);
            less_one(&mut words, 8, 4);
            assert_eq!(words, [less]);
            plus_one(&mut words, 8, 4);
            assert_eq!(words, [stored]);
        }
    }

    #[test]
    fn zero_points_that_cross_words_are_lessened_alone() {
        let zeros: Vec<u8> = (0..32).map(|i| (i * 7 % 8) as u8).collect();
        let mut words = pack_rows(&zeros, 32, 3);
        less_one(&mut words, 32, 3);
        let want: Vec<u8> = zeros.iter().map(|z| z.wrapping_sub(1) & 7).collect();
        assert_eq!(unpack_rows(&words, 32, 3), want);
        plus_one(&mut words, 32, 3);
        assert_eq!(unpack_rows(&words, 32, 3), zeros);
    }

    #[test]
    fn compressed_tensors_words() {
        // methods.md §10.4: codes plus 2^(b-1).
        assert_eq!(pack_rows(&[0, 1, 7, 8, 9, 10, 14, 15], 8, 4), [0xFEA9_8710]);
        assert_eq!(pack_rows(&[0, 1, 2, 3, 4, 5, 6, 7], 8, 3), [0x00FA_C688]);
    }

    #[test]
    fn every_width_and_length_comes_back() {
        for bits in 2..=8u8 {
            for cols in [1usize, 8, 31, 32, 33, 64] {
                let codes: Vec<u8> = (0..3 * cols).map(|i| (i * 37 % (1 << bits)) as u8).collect();
                let words = pack_rows(&codes, cols, bits);
                assert_eq!(words.len(), 3 * word_count(cols, bits));
                assert_eq!(unpack_rows(&words, cols, bits), codes);
            }
        }
    }

    #[test]
    fn transposing_twice_changes_nothing() {
        let x: Vec<u16> = (0..70 * 130).collect();
        let y = transposed(&x, 70, 130);
        assert_eq!((y[0], y[1], y[70]), (0, 130, 1));
        assert_eq!(transposed(&y, 130, 70), x);
    }
}
