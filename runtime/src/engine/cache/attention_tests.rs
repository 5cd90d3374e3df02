//! Attention over sequences in pages against the definition, and against itself in other company.

use qrmc_ir::{QuantSpec, Real, RopeAttr, RopeScaling};

use super::tests::New;
use super::*;
use crate::cpu::testing::{bits, close, noise, pools};
use crate::cpu::{Heads, Isa, Pool, Queries, Scratch, attention};
use crate::engine::turns::AllTurns;

const HEADS: Heads = Heads { heads: 6, kv_heads: 2, head_dim: 16 };
const WIDTH: usize = 32;
/// New rows and positions before them: decode steps and prompts, across runs and pages.
const TEXTS: [(usize, usize); 6] = [(1, 0), (1, 300), (7, 511), (130, 0), (40, 250), (1, 64)];

/// Page tables of [`TEXTS`], in no order.
fn tables() -> (Vec<Vec<u32>>, usize) {
    let need = TEXTS.map(|(rows, past)| (rows + past).div_ceil(PAGE));
    let all: usize = need.iter().sum();
    let mut next = (0..all as u32).map(|i| (i * 7 + 3) % all as u32);
    (need.iter().map(|&n| next.by_ref().take(n).collect()).collect(), all)
}

/// Fills the rows of all sequences, and sees them with the last of each as new.
fn filled<'a>(
    tables: &'a [Vec<u32>],
    positions: &'a [i32],
    mut append: impl FnMut(usize, &Segments<'_>),
) -> Segments<'a> {
    let mut list = Vec::new();
    let mut first = 0;
    for (i, (&(rows, past), pages)) in TEXTS.iter().zip(tables).enumerate() {
        let positions = &positions[..rows + past];
        append(i, &Segments::new(vec![Segment { first: 0, rows: rows + past, past: 0, pages, positions }]));
        list.push(Segment { first, rows, past, pages, positions });
        first += rows;
    }
    Segments::new(list)
}

/// Compares an attention of all sequences with the definition, of each alone, and row by row.
fn compare(segments: &Segments<'_>, k: &dyn KvRows, v: &dyn KvRows, all: &[[Vec<f32>; 2]], what: &str) {
    // Scores of a few units, whatever the codes stand for.
    let largest = all.iter().flat_map(|[k, _]| k).fold(0f32, |m, x| m.max(x.abs()));
    let scale = 1.0 / largest;
    let width = HEADS.heads * HEADS.head_dim;
    let queries: Vec<Queries> =
        segments.list().iter().map(|s| Queries { first: s.first, rows: s.rows, past: s.past }).collect();
    let q: Vec<f32> = noise(segments.rows() * width, 3).iter().map(|x| 2.0 * x).collect();
    let run = |pool: &Pool, isa: Isa, queries: &[Queries]| {
        let mut out = vec![f32::NAN; q.len()];
        attention(pool, isa, &HEADS, queries, scale, &q, k, v, &mut out, &Scratch::new());
        out
    };
    for isa in Isa::available() {
        let [one, two] = &pools();
        let have = run(two, isa, &queries);
        assert_eq!(bits(&run(one, isa, &queries)), bits(&have), "{what}: threads");
        for (i, s) in queries.iter().enumerate() {
            let rows = s.first * width..(s.first + s.rows) * width;
            // Sums cancel: errors are relative to the values that are added.
            let size = all[i][1].iter().fold(1f32, |m, x| m.max(x.abs()));
            let want: Vec<f64> = (0..s.rows)
                .flat_map(|r| naive(&q[(s.first + r) * width..], scale, s.past + r + 1, &all[i]))
                .map(|x| x / f64::from(size))
                .collect();
            let mine: Vec<f32> = have[rows].iter().map(|x| x / size).collect();
            close(&mine, &want, 3e-6, &format!("{what}: text {i}, {}", isa.name()));
        }
        // A slot of the list names the store's sequence, so others are left without rows.
        for i in 0..queries.len() {
            for step in [1, 3, 50, 200] {
                let mut out = vec![f32::NAN; q.len()];
                for from in (0..queries[i].rows).step_by(step) {
                    let mut part = queries.clone();
                    part.iter_mut().for_each(|s| s.rows = 0);
                    let rows = step.min(queries[i].rows - from);
                    part[i] = Queries { first: queries[i].first + from, rows, past: queries[i].past + from };
                    let some = run(two, isa, &part);
                    let at = part[i].first * width..(part[i].first + rows) * width;
                    out[at.clone()].copy_from_slice(&some[at]);
                }
                let at = queries[i].first * width..(queries[i].first + queries[i].rows) * width;
                assert_eq!(bits(&out[at.clone()]), bits(&have[at]), "{what}: text {i} by {step} rows");
            }
        }
    }
}

/// One row of queries on the first `seen` keys and values, `[positions, WIDTH]`.
fn naive(q: &[f32], scale: f32, seen: usize, [k, v]: &[Vec<f32>; 2]) -> Vec<f64> {
    let Heads { heads, kv_heads, head_dim: d } = HEADS;
    let mut out = Vec::new();
    for h in 0..heads {
        let at = h / (heads / kv_heads) * d;
        let score = |t: usize| {
            f64::from(scale)
                * (0..d).map(|i| f64::from(q[h * d + i]) * f64::from(k[t * WIDTH + at + i])).sum::<f64>()
        };
        let scores: Vec<f64> = (0..seen).map(score).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - top).exp()).sum();
        out.extend((0..d).map(|i| {
            let of = |(t, s): (usize, &f64)| (s - top).exp() / sum * f64::from(v[t * WIDTH + at + i]);
            scores.iter().enumerate().map(of).sum::<f64>()
        }));
    }
    out
}

#[test]
fn floats_in_pages() {
    let (tables, all) = tables();
    let positions: Vec<i32> = (0..600).collect();
    let rows = |i: usize, seed: u64| noise((TEXTS[i].0 + TEXTS[i].1) * WIDTH, seed + 10 * i as u64);
    let stores = [(Order::Channels, 1), (Order::Positions, 2)].map(|(order, seed)| {
        let mut store = KvStore::new((WIDTH, HEADS.head_dim), order, None);
        store.grow(all);
        filled(&tables, &positions, |i, s| {
            store.append(&NewRows::Floats(&rows(i, seed)), s).unwrap();
            let len = s.list()[0].rows;
            assert_eq!(store.dense(&s.list()[0], 0, len).unwrap(), rows(i, seed));
        });
        store
    });
    let segments = filled(&tables, &positions, |_, _| {});
    let [k, v] = &stores;
    let [keys, values] = [k, v].map(|store| FloatRows { store, segments: &segments });
    let data: Vec<[Vec<f32>; 2]> = (0..TEXTS.len()).map(|i| [rows(i, 1), rows(i, 2)]).collect();
    compare(&segments, &keys, &values, &data, "floats");
    // Stores of the other order give the same.
    let data: Vec<[Vec<f32>; 2]> = (0..TEXTS.len()).map(|i| [rows(i, 2), rows(i, 1)]).collect();
    compare(&segments, &values, &keys, &data, "floats the other way round");
}

#[test]
fn codes_in_pages() {
    let (tables, all) = tables();
    let positions: Vec<i32> = (0..600).collect();
    let attr = RopeAttr { head_dim: 16, theta: Real(10000.0), scaling: RopeScaling::None };
    let turns = AllTurns::default();
    for bits in 2..=8 {
        let specs = [QuantSpec::asym(bits, Grain::Group(16)), QuantSpec::sym(bits, Grain::Token)];
        let scratch = Scratch::new();
        let stores: Vec<KvStore> = specs
            .iter()
            .map(|&spec| {
                let form = CacheForm { spec, reads: Vec::new() };
                let mut store = KvStore::new((WIDTH, HEADS.head_dim), Order::Positions, Some(&form));
                store.grow(all);
                filled(&tables, &positions, |i, s| {
                    New::of(spec, 1, s.rows(), 1 + i as u64).append(&mut store, s).unwrap();
                });
                store
            })
            .collect();
        let segments = filled(&tables, &positions, |_, _| {});
        let reader = |store, rope: bool| Reader {
            store,
            segments: &segments,
            isa: Isa::detect(),
            channels: None,
            reads: if rope { vec![Read::Rope(turns.of(&attr, &[600]).unwrap())] } else { Vec::new() },
            head_dim: HEADS.head_dim,
            alone: Pool::alone(),
            scratch: &scratch,
        };
        for rope in [false, true] {
            let (k, v) = (reader(&stores[0], rope), reader(&stores[1], false));
            let data: Vec<[Vec<f32>; 2]> = TEXTS
                .iter()
                .enumerate()
                .map(|(i, (rows, past))| [&k, &v].map(|r| r.dense(i, 0, rows + past)))
                .collect();
            compare(&segments, &k, &v, &data, &format!("{bits} bits, keys turned when read: {rope}"));
        }
    }
}
