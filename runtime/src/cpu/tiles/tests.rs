use super::*;
use crate::cpu::Isa;
use crate::cpu::testing::{bits, noise, pools3};
use crate::cpu::weight::WeightView;

/// A weight and the elements it stands for.
struct Weight {
    n: usize,
    k: usize,
    bits: u8,
    signed: bool,
    group: usize,
    stream: Vec<u8>,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Option<Vec<u8>>,
}

impl Weight {
    fn new((n, k): (usize, usize), bits: u8, group: usize, kind: usize) -> Self {
        let top = (1u32 << bits) as f32;
        let any = |len, seed| -> Vec<u8> {
            noise(len, seed)
                .iter()
                .map(|x| (((x + 1.0) / 2.0 * top) as u32).min((1 << bits) - 1) as u8)
                .collect()
        };
        let codes = any(n * k, 1);
        let mut stream = Vec::new();
        codes.chunks(k).for_each(|r| qrmc_ir::pack::pack_row(r.iter().copied(), bits, &mut stream));
        let scales = noise(n * k / group, 2).iter().map(|s| 0.01 + s.abs()).collect();
        let zeros = (kind == 2).then(|| any(n * k / group, 3));
        Weight { n, k, bits, signed: kind == 1, group, stream, codes, scales, zeros }
    }

    fn tiles(&self) -> Tiles {
        let view = WeightView::Packed {
            bits: self.bits,
            signed: self.signed,
            codes: &self.stream,
            group: self.group,
            scales: &self.scales,
            zeros: self.zeros.as_deref(),
        };
        Tiles::new(&Pool::alone(), &view, self.n, self.k).unwrap()
    }

    /// Scale, and code less zero point.
    fn at(&self, r: usize, i: usize) -> (f64, i64) {
        let g = r * (self.k / self.group) + i / self.group;
        let zero = match &self.zeros {
            Some(z) => i64::from(z[g]),
            None => {
                if self.signed {
                    1 << (self.bits - 1)
                } else {
                    0
                }
            }
        };
        (f64::from(self.scales[g]), i64::from(self.codes[r * self.k + i]) - zero)
    }
}

/// Left sides of `[m, k]`, with their elements in f64.
enum Left {
    Floats(Vec<f32>),
    Unsigned(u8, Vec<u8>, Vec<f32>, Vec<u8>),
    Signed(Vec<i8>, Vec<f32>),
}

impl Left {
    fn all(m: usize, k: usize) -> Vec<Left> {
        let scales = || noise(m, 5).iter().map(|s| 0.01 + s.abs()).collect::<Vec<f32>>();
        let unsigned = |b: u8| {
            let top = f32::from(((1u16 << b) - 1) as u8);
            let code = |x: &f32| ((x + 1.0) / 2.0 * top).round() as u8;
            let codes = noise(m * k, 6).iter().map(code).collect();
            Left::Unsigned(b, codes, scales(), noise(m, 7).iter().map(code).collect())
        };
        let floats = noise(m * k, 4).iter().enumerate().map(|(i, x)| x * [1.0, 100.0, 1e-3][i % 3]).collect();
        let signed = noise(m * k, 8).iter().map(|x| (x * 127.9) as i8).collect();
        vec![
            Left::Floats(floats),
            unsigned(3),
            unsigned(4),
            unsigned(7),
            unsigned(8),
            Left::Signed(signed, scales()),
        ]
    }

    fn side(&self) -> Side<'_> {
        match self {
            Left::Floats(x) => Side::Floats(x),
            Left::Unsigned(bits, codes, scales, zeros) => {
                Side::Unsigned { codes, bits: *bits, scales, zeros }
            }
            Left::Signed(codes, scales) => Side::Signed { codes, scales },
        }
    }

    fn at(&self, r: usize, i: usize, k: usize) -> f64 {
        let at = r * k + i;
        match self {
            Left::Floats(x) => f64::from(x[at]),
            Left::Unsigned(_, codes, scales, zeros) => {
                f64::from(scales[r]) * f64::from(i32::from(codes[at]) - i32::from(zeros[r]))
            }
            Left::Signed(codes, scales) => f64::from(scales[r]) * f64::from(codes[at]),
        }
    }
}

fn paths() -> Vec<IntPath> {
    #[cfg(target_arch = "x86_64")]
    return IntPath::available(crate::cpu::split::Amx::request());
    #[cfg(not(target_arch = "x86_64"))]
    IntPath::available()
}

#[test]
fn every_path_gives_the_same_bits_and_the_sums_are_exact() {
    let shapes = [
        (1, 1, 1),
        (16, 64, 64),
        (5, 96, 32),
        (33, 192, 96),
        (40, 70, 70),
        (70, 600, 600),
        (17, 36, 6),
        (64, 256, 128),
    ];
    for (n, k, group) in shapes {
        for b in 2..=8 {
            for kind in 0..3 {
                let weight = Weight::new((n, k), b, group, kind);
                let tiles = weight.tiles();
                let bias = noise(n, 11);
                for m in [1, 3, 5, 9, 33] {
                    let add = noise(m * n, 12);
                    for left in Left::all(m, k) {
                        let mut first: Option<Vec<u32>> = None;
                        for path in paths() {
                            for pool in &pools3()[..2] {
                                let mut digits = Digits::default();
                                digits.cut(pool, Isa::detect(), left.side(), (m, k), group);
                                let mut out = vec![f32::NAN; m * n];
                                let (bias, add) = (Some(&bias[..]), Some(&add[..]));
                                let mut parts = [Part { w: &tiles, bias, add, out: &mut out }];
                                product(pool, path, &digits, &mut parts, &Scratch::new());
                                let what = format!(
                                    "[{m}, {k}] x {n}, {b} bits by {group}, kind {kind}, {}",
                                    path.name()
                                );
                                match &first {
                                    None => first = Some(bits(&out)),
                                    Some(f) => assert_eq!(*f, bits(&out), "{what}"),
                                }
                            }
                        }
                        let out: Vec<f32> = first.unwrap().into_iter().map(f32::from_bits).collect();
                        for (at, y) in out.iter().enumerate() {
                            let (r, c) = (at / n, at % n);
                            let (mut want, mut size) = (0.0f64, 0.0f64);
                            for also in [bias[c], add[at]].map(f64::from) {
                                want += also;
                                size += also.abs();
                            }
                            for i in 0..k {
                                let (s, q) = weight.at(c, i);
                                let term = left.at(r, i, k) * s * q as f64;
                                want += term;
                                size += term.abs();
                            }
                            // Floats are cut 2^-22 below the largest of their block.
                            let most = if matches!(left, Left::Floats(_)) {
                                let max = (0..k).map(|i| left.at(r, i, k).abs()).fold(0.0, f64::max);
                                (0..k)
                                    .map(|i| weight.at(c, i))
                                    .map(|(s, q)| s * (q as f64).abs() * max)
                                    .sum::<f64>()
                            } else {
                                (0..k)
                                    .map(|i| weight.at(c, i))
                                    .map(|(s, q)| s * (q as f64).abs() * 128.0)
                                    .sum::<f64>()
                                    * f64::from(match &left {
                                        Left::Unsigned(_, _, s, _) | Left::Signed(_, s) => s[r],
                                        Left::Floats(_) => 0.0,
                                    })
                            };
                            let bound = 4.0 * f64::from(f32::EPSILON) * (size + most * 0.25);
                            let gap = (f64::from(*y) - want).abs();
                            assert!(
                                gap <= bound,
                                "[{m}, {k}] x {n}, {b} bits by {group}, kind {kind}: {r}, {c} is {y}, not {want}: {gap:e} > {bound:e}"
                            );
                        }
                    }
                }
            }
        }
    }
}
