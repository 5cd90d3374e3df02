use qrmc_ir::{QuantSpec, Real, RopeAttr, RopeScaling, grid};
use qrmc_lowering::CacheRead;

use super::super::turns::AllTurns;
use super::*;
use crate::cpu::testing::noise;

const WIDTH: usize = 32;
const BATCH: usize = 2;

/// Codes, scales and zero points of `rows` rows of each sequence, and the values that they stand for.
struct New {
    spec: QuantSpec,
    codes: Vec<i32>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

impl New {
    fn of(spec: QuantSpec, rows: usize, seed: u64) -> Self {
        let (least, count) = (spec.qmin(), 1 << spec.bits);
        let code = |x: &f32| least + (((x + 1.0) / 2.0 * count as f32) as i32).min(count - 1);
        let codes = noise(BATCH * rows * WIDTH, seed).iter().map(code).collect();
        let sides = match spec.grain {
            Grain::Group(g) => BATCH * rows * WIDTH / g as usize,
            Grain::Channel => WIDTH,
            _ => BATCH * rows,
        };
        let zeros = if spec.zero { sides } else { 0 };
        New {
            spec,
            codes,
            scales: noise(sides, seed + 1).iter().map(|s| s.abs() + 0.01).collect(),
            zeros: noise(zeros, seed + 2).iter().map(|x| code(x) as u8).collect(),
        }
    }

    fn append(&self, cache: &mut KvCache, positions: &[i32]) {
        let seq = self.codes.len() / (BATCH * WIDTH);
        if self.spec.signed {
            let codes: Vec<i8> = self.codes.iter().map(|&c| c as i8).collect();
            cache.append(&NewRows::Signed(&codes, &self.scales), positions, seq).unwrap();
        } else {
            let codes: Vec<u8> = self.codes.iter().map(|&c| c as u8).collect();
            cache.append(&NewRows::Unsigned(&codes, &self.scales, &self.zeros), positions, seq).unwrap();
        }
    }

    fn value(&self, b: usize, t: usize, d: usize) -> f32 {
        let rows = self.codes.len() / (BATCH * WIDTH);
        let at = (b * rows + t) * WIDTH + d;
        let side = match self.spec.grain {
            Grain::Group(g) => at / g as usize,
            Grain::Channel => d,
            _ => at / WIDTH,
        };
        let zero = self.zeros.get(side).map_or(0, |&z| i32::from(z));
        grid::dequantize(self.codes[at], grid::QParam { scale: self.scales[side], zero })
    }
}

fn reader<'a>(cache: &'a KvCache, new: &'a New, head_dim: usize, scratch: &'a Scratch) -> Reader<'a> {
    let channels = matches!(new.spec.grain, Grain::Channel);
    Reader {
        cache,
        isa: Isa::detect(),
        channels: channels.then(|| ((&new.scales[..]).into(), &new.zeros[..])),
        reads: Vec::new(),
        head_dim,
        alone: Pool::alone(),
        scratch,
    }
}

#[test]
fn rows_come_back_as_their_codes_say() {
    let scratch = Scratch::new();
    for bits in 2..=8 {
        for grain in [Grain::Group(8), Grain::Group(16), Grain::Token, Grain::Channel] {
            for spec in [QuantSpec::asym(bits, grain), QuantSpec::sym(bits, grain)] {
                if grain == Grain::Channel && spec.signed {
                    continue;
                }
                let form = CacheForm { spec, reads: Vec::new() };
                let mut cache = KvCache::new(BATCH, 6, WIDTH, Some(&form));
                assert_eq!(cache.bytes() as u64, KvCache::bytes_for(BATCH, 6, WIDTH, Some(&form)));
                let mut parts = [New::of(spec, 3, 1), New::of(spec, 2, 7)];
                if grain == Grain::Channel {
                    parts[1].scales = parts[0].scales.clone();
                    parts[1].zeros = parts[0].zeros.clone();
                }
                parts.iter().for_each(|p| p.append(&mut cache, &[]));
                assert_eq!(cache.shape(), [BATCH, 5, WIDTH]);
                for head_dim in [4, 8, 16, 32] {
                    let reader = reader(&cache, &parts[0], head_dim, &scratch);
                    for (b, h, from, count) in [(0, 0, 0, 5), (1, WIDTH / head_dim - 1, 1, 3), (1, 0, 4, 1)] {
                        let mut out = vec![f32::NAN; count * head_dim];
                        reader.read(b, h, from, count, &mut out);
                        for (i, &x) in out.iter().enumerate() {
                            let (t, d) = (from + i / head_dim, h * head_dim + i % head_dim);
                            let want =
                                if t < 3 { parts[0].value(b, t, d) } else { parts[1].value(b, t - 3, d) };
                            assert_eq!(
                                x.to_bits(),
                                want.to_bits(),
                                "{spec}, head of {head_dim}: {b}, {t}, {d}"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn sequences_join_leave_and_are_cut() {
    let spec = QuantSpec::asym(3, Grain::Group(8));
    let form = CacheForm { spec, reads: Vec::new() };
    let (a, b) = (New::of(spec, 4, 1), New::of(spec, 4, 5));
    let [mut x, mut y] = [4, 9].map(|room| KvCache::new(BATCH, room, WIDTH, Some(&form)));
    a.append(&mut x, &[]);
    b.append(&mut y, &[]);
    assert!(KvCache::join(&[&x, &y], 3).is_err());
    let mut both = KvCache::join(&[&x, &y], 7).unwrap();
    both.retain(|s| s == 1 || s == 2);
    both.truncate(2);
    assert_eq!(both.shape(), [2, 2, WIDTH]);
    let scratch = Scratch::new();
    let all = reader(&both, &a, 8, &scratch).all();
    for (i, x) in all.iter().enumerate() {
        let (s, t, d) = (i / (2 * WIDTH), i / WIDTH % 2, i % WIDTH);
        let want = if s == 0 { a.value(1, t, d) } else { b.value(0, t, d) };
        assert_eq!(*x, want);
    }
    assert!(both.append(&NewRows::Floats(&[0.0; 2 * WIDTH]), &[], 1).is_err(), "floats into codes");
    let full = New::of(spec, 6, 9);
    let codes: Vec<u8> = full.codes.iter().map(|&c| c as u8).collect();
    let new = NewRows::Unsigned(&codes, &full.scales, &full.zeros);
    assert!(both.append(&new, &[], 6).unwrap_err().to_string().contains("do not fit a cache of 7"));
}

#[test]
fn rows_are_turned_by_their_position_when_they_are_read() {
    let spec = QuantSpec::asym(4, Grain::Channel);
    let attr = RopeAttr { head_dim: 8, theta: Real(10000.0), scaling: RopeScaling::None };
    let form = CacheForm { spec, reads: vec![CacheRead::Rope { attr, operand: 4 }] };
    let new = New::of(spec, 3, 1);
    let mut cache = KvCache::new(BATCH, 3, WIDTH, Some(&form));
    new.append(&mut cache, &[5, 6, 9]);
    let scratch = Scratch::new();
    let mut reader = reader(&cache, &new, 8, &scratch);
    let plain = reader.all();
    reader.reads = vec![Read::Rope(AllTurns::default().of(&attr, cache.positions()).unwrap())];
    let turned = reader.all();
    let freq = attr.inv_freq();
    for (i, &y) in turned.iter().enumerate() {
        let (row, j) = (i / 8 * 8, i % 8);
        let angle = f64::from([5, 6, 9][i / WIDTH % 3]) * freq[j % 4];
        let (a, b) = (f64::from(plain[row + j % 4]), f64::from(plain[row + j % 4 + 4]));
        let want = if j < 4 { a * angle.cos() - b * angle.sin() } else { b * angle.cos() + a * angle.sin() };
        assert!((f64::from(y) - want).abs() < 1e-5 * (1.0 + want.abs()), "{i}: {y}, not {want}");
    }
}
