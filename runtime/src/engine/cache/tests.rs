use qrmc_ir::{QuantSpec, Real, RopeAttr, RopeScaling, grid};
use qrmc_lowering::CacheRead;

use super::super::turns::AllTurns;
use super::*;
use crate::cpu::testing::noise;
use crate::cpu::{Isa, Pool, Scratch};

const WIDTH: usize = 32;
const BATCH: usize = 2;

/// Codes, scales and zero points of `rows` rows of each sequence, and the values that they stand for.
pub(super) struct New {
    spec: QuantSpec,
    codes: Vec<i32>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

impl New {
    pub(super) fn of(spec: QuantSpec, batch: usize, rows: usize, seed: u64) -> Self {
        let (least, count) = (spec.qmin(), 1 << spec.bits);
        let code = |x: &f32| least + (((x + 1.0) / 2.0 * count as f32) as i32).min(count - 1);
        let codes = noise(batch * rows * WIDTH, seed).iter().map(code).collect();
        let sides = match spec.grain {
            Grain::Group(g) => batch * rows * WIDTH / g as usize,
            Grain::Channel => WIDTH,
            _ => batch * rows,
        };
        let zeros = if spec.zero { sides } else { 0 };
        New {
            spec,
            codes,
            scales: noise(sides, seed + 1).iter().map(|s| s.abs() + 0.01).collect(),
            zeros: noise(zeros, seed + 2).iter().map(|x| code(x) as u8).collect(),
        }
    }

    pub(super) fn append(&self, store: &mut KvStore, segments: &Segments<'_>) -> Result<(), EngineError> {
        if self.spec.signed {
            let codes: Vec<i8> = self.codes.iter().map(|&c| c as i8).collect();
            store.append(&NewRows::Signed(&codes, &self.scales), segments)
        } else {
            let codes: Vec<u8> = self.codes.iter().map(|&c| c as u8).collect();
            store.append(&NewRows::Unsigned(&codes, &self.scales, &self.zeros), segments)
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

/// `rows` new rows of each sequence behind `past` others; sequence `b` lies in the pages of `tables[b]`.
fn segments<'a>(tables: &'a [Vec<u32>], past: usize, rows: usize, positions: &'a [i32]) -> Segments<'a> {
    let one = |(b, pages): (usize, &'a Vec<u32>)| Segment { first: b * rows, rows, past, pages, positions };
    Segments::new(tables.iter().enumerate().map(one).collect())
}

fn reader<'a>(
    store: &'a KvStore,
    segments: &'a Segments<'a>,
    new: &'a New,
    head_dim: usize,
    scratch: &'a Scratch,
) -> Reader<'a> {
    let channels = matches!(new.spec.grain, Grain::Channel);
    Reader {
        store,
        segments,
        isa: Isa::detect(),
        channels: channels.then(|| ((&new.scales[..]).into(), new.spec.zero.then_some(&new.zeros[..]))),
        reads: Vec::new(),
        head_dim,
        alone: Pool::alone(),
        scratch,
    }
}

#[test]
fn rows_come_back_as_their_codes_say() {
    let scratch = Scratch::new();
    // Pages in any order; the second part goes from the first page of a sequence to its second.
    let (tables, first, second) = ([vec![3, 1], vec![0, 2]], PAGE - 2, 5);
    let positions: Vec<i32> = (0..(first + second) as i32).collect();
    for bits in 2..=8 {
        for grain in [Grain::Group(8), Grain::Group(16), Grain::Token, Grain::Channel] {
            for spec in [QuantSpec::asym(bits, grain), QuantSpec::sym(bits, grain)] {
                let form = CacheForm { spec, reads: Vec::new() };
                let mut store = KvStore::new((WIDTH, 8), Order::Channels, Some(&form));
                store.grow(4);
                assert_eq!(store.bytes(), 4 * store.page_bytes());
                let mut parts = [New::of(spec, BATCH, first, 1), New::of(spec, BATCH, second, 7)];
                if grain == Grain::Channel {
                    parts[1].scales = parts[0].scales.clone();
                    parts[1].zeros = parts[0].zeros.clone();
                }
                parts[0].append(&mut store, &segments(&tables, 0, first, &positions[..first])).unwrap();
                let segments = segments(&tables, first, second, &positions);
                parts[1].append(&mut store, &segments).unwrap();
                for head_dim in [4, 8, 16, 32] {
                    let reader = reader(&store, &segments, &parts[0], head_dim, &scratch);
                    let last = first + second;
                    for (b, h, from, count) in
                        [(0, 0, 0, PAGE), (1, WIDTH / head_dim - 1, 1, 3), (1, 0, PAGE, last - PAGE)]
                    {
                        assert!(count <= reader.together(b, from));
                        let mut out = vec![f32::NAN; count * head_dim];
                        reader.piece(b, h, from, count, &mut out);
                        for (i, &x) in out.iter().enumerate() {
                            let (t, d) = (from + i / head_dim, h * head_dim + i % head_dim);
                            let want = match t.checked_sub(first) {
                                None => parts[0].value(b, t, d),
                                Some(t) => parts[1].value(b, t, d),
                            };
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
fn a_copied_page_is_a_page_of_its_own() {
    let spec = QuantSpec::asym(3, Grain::Group(8));
    let form = CacheForm { spec, reads: Vec::new() };
    let (a, b) = (New::of(spec, BATCH, 4, 1), New::of(spec, BATCH, 2, 5));
    let mut store = KvStore::new((WIDTH, 8), Order::Channels, Some(&form));
    store.grow(2);
    let (whole, copies, positions) = ([vec![0], vec![1]], [vec![2], vec![3]], [0, 1, 2, 3]);
    a.append(&mut store, &segments(&whole, 0, 4, &positions)).unwrap();
    store.grow(4);
    store.copy(0, 2);
    store.copy(1, 3);
    // The copies go on behind two rows.
    b.append(&mut store, &segments(&copies, 2, 2, &positions)).unwrap();
    let scratch = Scratch::new();
    for (tables, same) in [(&whole, 4), (&copies, 2)] {
        let segments = segments(tables, 0, 4, &positions);
        let reader = reader(&store, &segments, &a, 8, &scratch);
        for s in 0..BATCH {
            for (i, x) in reader.dense(s, 0, 4).into_iter().enumerate() {
                let (t, d) = (i / WIDTH, i % WIDTH);
                assert_eq!(x, if t < same { a.value(s, t, d) } else { b.value(s, t - 2, d) });
            }
        }
    }
    let fault = |new: &NewRows<'_>, s: &Segments<'_>, store: &mut KvStore| {
        store.append(new, s).unwrap_err().to_string()
    };
    let one = segments(&whole, 3, 1, &positions);
    assert!(
        fault(&NewRows::Floats(&[0.0; 2 * WIDTH]), &one, &mut store).contains("not what their cache keeps")
    );
    assert!(fault(&NewRows::Floats(&[0.0; WIDTH]), &one, &mut store).contains("32 elements"));
    let many: Vec<i32> = (0..PAGE as i32 + 1).collect();
    let full = New::of(spec, BATCH, PAGE + 1, 9);
    let fault = full.append(&mut store, &segments(&whole, 0, PAGE + 1, &many)).unwrap_err();
    assert!(fault.to_string().contains("65 positions do not fit 1 pages"), "{fault}");
}

#[test]
fn rows_are_turned_by_their_position_when_they_are_read() {
    let spec = QuantSpec::asym(4, Grain::Channel);
    let attr = RopeAttr { head_dim: 8, theta: Real(10000.0), scaling: RopeScaling::None };
    let form = CacheForm { spec, reads: vec![CacheRead::Rope { attr, operand: 4 }] };
    let new = New::of(spec, BATCH, 3, 1);
    let mut store = KvStore::new((WIDTH, 8), Order::Channels, Some(&form));
    store.grow(2);
    let (tables, positions) = ([vec![1], vec![0]], [5, 6, 9]);
    let segments = segments(&tables, 0, 3, &positions);
    new.append(&mut store, &segments).unwrap();
    let scratch = Scratch::new();
    let mut reader = reader(&store, &segments, &new, 8, &scratch);
    let all = |reader: &Reader<'_>| [reader.dense(0, 0, 3), reader.dense(1, 0, 3)].concat();
    let plain = all(&reader);
    reader.reads = vec![Read::Rope(AllTurns::default().of(&attr, &[segments.furthest()]).unwrap())];
    let turned = all(&reader);
    let freq = attr.inv_freq();
    for (i, &y) in turned.iter().enumerate() {
        let (row, j) = (i / 8 * 8, i % 8);
        let angle = f64::from(positions[i / WIDTH % 3]) * freq[j % 4];
        let (a, b) = (f64::from(plain[row + j % 4]), f64::from(plain[row + j % 4 + 4]));
        let want = if j < 4 { a * angle.cos() - b * angle.sin() } else { b * angle.cos() + a * angle.sin() };
        assert!((f64::from(y) - want).abs() < 1e-5 * (1.0 + want.abs()), "{i}: {y}, not {want}");
    }
}
