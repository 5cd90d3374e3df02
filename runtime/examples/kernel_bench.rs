//! Prints how fast the CPU kernels are here: `cargo run --release --example kernel_bench [threads] [filter] [isa]`.
//!
//! Each figure is the median of several rounds; the rounds of all cases of a group are interleaved, so that a busy
//! moment of the machine does not fall on one case alone.
#![allow(clippy::print_stdout, reason = "an example that reports on stdout")]

use std::hint::black_box;
use std::time::Instant;

use qrmc_runtime::cpu::*;

struct Case<'a> {
    name: String,
    /// Work of one call, in units of 1e9.
    work: f64,
    unit: &'static str,
    run: Box<dyn FnMut() + 'a>,
}

fn case<'a>(name: impl Into<String>, work: f64, unit: &'static str, run: impl FnMut() + 'a) -> Case<'a> {
    Case { name: name.into(), work: work / 1e9, unit, run: Box::new(run) }
}

fn report(pool: &Pool, title: &str, mut cases: Vec<Case<'_>>) {
    const ROUNDS: usize = 7;
    println!("{title} ({} threads)", pool.threads());
    let mut times = vec![Vec::new(); cases.len()];
    for round in 0..=ROUNDS {
        for (case, times) in cases.iter_mut().zip(&mut times) {
            // At least 30 ms a round; the first warms up.
            let (start, mut calls) = (Instant::now(), 0u32);
            while calls == 0 || start.elapsed().as_secs_f64() < 0.03 {
                (case.run)();
                calls += 1;
            }
            if round > 0 {
                times.push(start.elapsed().as_secs_f64() / f64::from(calls));
            }
        }
    }
    for (case, times) in cases.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let t = times[ROUNDS / 2];
        println!("  {:<44} {:>9.1} {:<8} {:>10.3} ms", case.name, case.work / t, case.unit, t * 1e3);
    }
}

fn noise(n: usize) -> Vec<f32> {
    let mut s = 0x9e37_79b9u32;
    (0..n)
        .map(|_| {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn matrices(pool: &Pool, isa: Isa) {
    let shapes = [
        (2048, 2048, 2048),
        (512, 1536, 8960),
        (8192, 576, 576),
        (8192, 1536, 576),
        (2048, 49152, 576),
        (256, 2048, 2048),
        (64, 1536, 1536),
        (16, 4096, 4096),
        (512, 192, 576),
    ];
    let cases = shapes.map(|(m, n, k)| {
        let (x, w, mut y) = (noise(m * k), noise(n * k), vec![0.0; m * n]);
        case(format!("y = x Wᵀ, {m} x {n} x {k}"), 2.0 * (m * n * k) as f64, "GFLOP/s", move || {
            matmul(pool, isa, MatRef::new(&x, m, k), MatRef::new(&w, n, k).t(), &mut y, n);
        })
    });
    report(pool, "matmul, f32", cases.into());
}

/// A weight of about `bytes` bytes with rows of `k`.
struct Stored {
    bytes: Vec<u8>,
    floats: Vec<f32>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
    n: usize,
}

const KINDS: [&str; 6] = ["f32", "bf16", "f16", "8-bit g128", "4-bit g64", "3-bit g128"];

impl Stored {
    fn new(kind: &str, k: usize, bytes: usize) -> Self {
        let bits = match kind {
            "f32" => 32,
            "bf16" | "f16" => 16,
            _ => usize::from(kind.as_bytes()[0] - b'0'),
        };
        let n = bytes * 8 / (bits * k);
        let f32s = if bits == 32 { n * k } else { 0 };
        let groups = if bits < 16 { n * k / 64 } else { 0 };
        Stored {
            // Normal floats if read as such: subnormal ones would slow the multiplications down.
            bytes: if bits == 32 {
                vec![]
            } else {
                (0..n * k * bits / 8).map(|i| (i * 37 % 56) as u8 | 8).collect()
            },
            floats: noise(f32s),
            scales: noise(groups),
            zeros: vec![5; groups],
            n,
        }
    }

    fn view(&self, kind: &str, k: usize) -> WeightView<'_> {
        let packed = |bits, group| WeightView::Packed {
            bits,
            signed: false,
            codes: &self.bytes,
            group,
            scales: &self.scales[..self.n * k / group],
            zeros: Some(&self.zeros[..self.n * k / group]),
        };
        match kind {
            "f32" => WeightView::F32(&self.floats),
            "bf16" => WeightView::BF16(&self.bytes),
            "f16" => WeightView::F16(&self.bytes),
            "8-bit g128" => packed(8, 128),
            "4-bit g64" => packed(4, 64),
            _ => packed(3, 128),
        }
    }
}

fn few_rows(pool: &Pool, isa: Isa) {
    let k = 2048;
    let scratch = Scratch::new();
    let stored = KINDS.map(|kind| (kind, Stored::new(kind, k, 384 << 20)));
    let mut cases = vec![case("plain read, 384 MiB", f64::from(384 << 20), "GB/s", || {
        let x = &stored[1].1.bytes;
        black_box(pool.map(x.len() >> 20, |i| {
            let (words, _) = x[i << 20..(i + 1) << 20].as_chunks::<8>();
            words.iter().fold(0u64, |a, w| a.wrapping_add(u64::from_le_bytes(*w)))
        }));
    })];
    for m in [1, 2, 4, 8] {
        for (kind, w) in &stored {
            let (x, mut y) = (noise(m * k), vec![0.0; m * w.n]);
            let bytes = (w.view(kind, k).row_bytes(k) * w.n) as f64;
            let scratch = &scratch;
            cases.push(case(format!("linear, {kind}, m = {m}"), bytes, "GB/s", move || {
                linear(pool, isa, &x, (m, k), &w.view(kind, k), w.n, &mut y, scratch);
            }));
        }
    }
    report(pool, "linear with few rows, GB/s of stored codes (beyond the caches)", cases);
}

fn cached_rows(pool: &Pool, isa: Isa) {
    let scratch = Scratch::new();
    let mut cases = Vec::new();
    for (n, k) in [(576, 576), (1536, 576), (576, 1536), (4096, 4096)] {
        for kind in ["f32", "bf16", "4-bit g64"] {
            let (mut w, m) = (Stored::new(kind, k, 0), 1);
            let bits = [32, 16, 4][["f32", "bf16", "4-bit g64"].iter().position(|&s| s == kind).unwrap_or(0)];
            w = Stored { n, ..Stored::new(kind, k, n * k * bits / 8 + w.n) };
            let (x, mut y) = (noise(m * k), vec![0.0; m * n]);
            let scratch = &scratch;
            cases.push(case(
                format!("linear, {kind}, 1 x {n} x {k}"),
                (n * k * bits / 8) as f64,
                "GB/s",
                move || {
                    linear(pool, isa, &x, (m, k), &w.view(kind, k), n, &mut y, scratch);
                },
            ));
        }
    }
    pool.install(|| ());
    report(pool, "linear with one row, in the caches", cases);
}

fn many_rows(pool: &Pool, isa: Isa) {
    let scratch = Scratch::new();
    let k = 1536;
    let mut cases = Vec::new();
    for m in [9, 16, 32, 512] {
        for kind in KINDS {
            let w = Stored::new(
                kind,
                k,
                match kind {
                    "f32" => 4 * k * 8960,
                    "bf16" | "f16" => 2 * k * 8960,
                    "8-bit g128" => k * 8960,
                    "4-bit g64" => k * 8960 / 2,
                    _ => k * 8960 * 3 / 8,
                },
            );
            let (x, mut y) = (noise(m * k), vec![0.0; m * w.n]);
            let scratch = &scratch;
            cases.push(case(
                format!("linear, {kind}, {m} x 8960 x {k}"),
                2.0 * (m * w.n * k) as f64,
                "GFLOP/s",
                move || {
                    linear(pool, isa, &x, (m, k), &w.view(kind, k), w.n, &mut y, scratch);
                },
            ));
        }
    }
    report(pool, "linear with many rows", cases);
}

fn attentions(pool: &Pool, isa: Isa) {
    let scratch = &Scratch::new();
    let mut cases = Vec::new();
    for (batch, seq, past, heads, kv_heads, head_dim) in [
        (1, 512, 0, 9, 3, 64),
        (1, 2048, 0, 9, 3, 64),
        (4, 512, 0, 32, 8, 128),
        (1, 128, 4096, 9, 3, 64),
        (1, 1, 2047, 9, 3, 64),
        (8, 1, 8191, 9, 3, 64),
        (1, 1, 32767, 32, 8, 128),
    ] {
        let s = AttnShape { batch, seq, past, heads, kv_heads, head_dim };
        let keys = past + seq;
        let (q, kv) = (noise(batch * seq * heads * head_dim), noise(batch * keys * kv_heads * head_dim));
        let v = noise(kv.len());
        let mut out = vec![0.0; q.len()];
        let seen = (seq * past + seq * (seq + 1) / 2) as f64;
        let (work, unit) = if seq == 1 {
            (8.0 * kv.len() as f64, "GB/s")
        } else {
            (4.0 * seen * (batch * heads * head_dim) as f64, "GFLOP/s")
        };
        cases.push(case(
            format!("B{batch} S{seq} P{past} H{heads}/{kv_heads} D{head_dim}"),
            work,
            unit,
            move || {
                let rows = |data| Rows::dense(data, keys, kv_heads, head_dim);
                attention(pool, isa, &s, 0.125, &q, rows(&kv), rows(&v), &mut out, scratch);
            },
        ));
    }
    report(pool, "attention (useful work only: hidden keys are not counted)", cases);
}

fn rows_and_elements(pool: &Pool, isa: Isa) {
    let (rows, n) = (8192, 576);
    let (a, b, g) = (noise(rows * n), noise(rows * n), noise(n));
    let table = noise(rows * 32);
    let (a, b, g, table) = (&a, &b, &g, &table);
    let len = (rows * n) as f64;
    let buf = || vec![0f32; rows * n];
    let mut o = [buf(), buf(), buf(), buf(), buf(), buf(), buf(), buf()];
    let [o1, o2, o3, o4, o5, o6, o7, o8] = &mut o;
    let cases = vec![
        case("add, same shape", 12.0 * len, "GB/s", || {
            binary(pool, isa, BinaryOp::Add, (a, &[rows, n]), (b, &[rows, n]), o1);
        }),
        case("mul by a vector", 8.0 * len, "GB/s", || {
            binary(pool, isa, BinaryOp::Mul, (a, &[rows, n]), (g, &[n]), o2);
        }),
        case("exp", 8.0 * len, "GB/s", || unary(pool, isa, UnaryOp::Exp, a, o3)),
        case("silu_mul", 12.0 * len, "GB/s", || silu_mul(pool, isa, a, b, o4)),
        case("rms_norm", 8.0 * len, "GB/s", || rms_norm(pool, isa, a, n, Some(g), 1e-5, o5)),
        case("rms_norm per head of 64", 8.0 * len, "GB/s", || rms_norm(pool, isa, a, 64, None, 1e-5, o6)),
        case("rope, 9 heads of 64", 8.0 * len, "GB/s", || rope(pool, isa, a, 9, 64, table, table, o7)),
        case("softmax, rows of 576", 8.0 * len, "GB/s", || reduce::softmax_rows(pool, isa, a, n, o8)),
        case("log_softmax_stats, rows of 49152", 4.0 * len, "GB/s", || {
            black_box(
                pool.map(rows * n / 49152, |i| reduce::log_softmax_stats(isa, &a[i * 49152..][..49152])),
            );
        }),
        case("sum", 4.0 * len, "GB/s", || {
            black_box(reduce::sum(pool, isa, a));
        }),
        case("argmax, rows of 49152", 4.0 * len, "GB/s", || {
            black_box(pool.map(rows * n / 49152, |i| reduce::argmax(isa, &a[i * 49152..][..49152])));
        }),
    ];
    report(pool, "rows and elements, 8192 x 576 (read and written bytes)", cases);
}

fn main() -> Result<(), PoolError> {
    let mut args = std::env::args().skip(1);
    let threads = args.next().and_then(|a| a.parse().ok()).unwrap_or(2);
    let filter = args.next().unwrap_or_default();
    let (pool, best) = (Pool::new(threads)?, Isa::detect());
    let wanted = args.next();
    let isa = Isa::available().into_iter().find(|i| wanted.as_deref() == Some(i.name())).unwrap_or(best);
    println!("instructions: {}", isa.name());
    type Group = (&'static str, fn(&Pool, Isa));
    let groups: [Group; 6] = [
        ("matmul", matrices),
        ("few", few_rows),
        ("cached", cached_rows),
        ("many", many_rows),
        ("attention", attentions),
        ("elements", rows_and_elements),
    ];
    for (name, run) in groups {
        if name.contains(&filter) {
            run(&pool, isa);
        }
    }
    Ok(())
}
