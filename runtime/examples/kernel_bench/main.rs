//! Prints how fast the CPU kernels are here: `cargo run --release --example kernel_bench [threads] [filter] [isa]`.
//!
//! Each figure is the median of several rounds; the rounds of all cases of a group are interleaved, so that a busy
//! moment of the machine does not fall on one case alone.
#![allow(clippy::print_stdout, reason = "an example that reports on stdout")]

mod rounds;

use std::hint::black_box;

use qrmc_runtime::cpu::*;
use rounds::{case, noise, report};

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
                let (heads, queries) = (s.of_heads(), s.queries());
                attention(pool, isa, &heads, &queries, 0.125, &q, &rows(&kv), &rows(&v), &mut out, scratch);
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
        case("silu and a product, one pass", 12.0 * len, "GB/s", || {
            let steps = [
                MapStep { op: MapOp::Unary(UnaryOp::Silu), args: [0, 0] },
                MapStep { op: MapOp::Binary(BinaryOp::Mul), args: [2, 1] },
            ];
            map(pool, isa, &[MapIn::All(a), MapIn::All(b)], &steps, n, o4);
        }),
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

/// What the training of a layer runs: [4, 512] positions of a model of width 576.
fn training(pool: &Pool, isa: Isa) {
    let scratch = &Scratch::new();
    let (rows, n) = (2048, 576);
    let mut cases = Vec::new();
    for (shape, perm) in
        [(vec![rows, n], vec![1, 0]), (vec![rows, 1536], vec![1, 0]), (vec![4, 512, 9, 64], vec![0, 2, 1, 3])]
    {
        let x = noise(shape.iter().product());
        let mut y = vec![0.0; x.len()];
        cases.push(case(format!("transpose {shape:?} {perm:?}"), 8.0 * x.len() as f64, "GB/s", move || {
            transpose(pool, isa, &x, &shape, &perm, &mut y);
        }));
    }
    for (l, inner) in [(24, 24), (32, 48), (64, 64), (80, 112), (9, 64), (64, 1)] {
        let width = l * inner;
        let (x, m) = (noise(rows * n / width * width), noise(l * l));
        let mut y = vec![0.0; x.len()];
        let work = 2.0 * (x.len() * l) as f64;
        cases.push(case(format!("mode product {l} x {inner}"), work, "GFLOP/s", move || {
            mode_mul(pool, isa, &x, width, (&m, l, inner), &mut y);
        }));
    }
    for n in [512, 576, 1536] {
        let (x, mut y) = (noise(rows * n), vec![0.0; rows * n]);
        cases.push(case(format!("Hadamard, rows of {n}"), 8.0 * x.len() as f64, "GB/s", move || {
            hadamard(pool, isa, &x, n, (n, false), None, &mut y, scratch);
        }));
    }
    let s = AttnShape { batch: 4, seq: 512, past: 0, heads: 9, kv_heads: 3, head_dim: 64 };
    let (q, k, v, dy) = (noise(rows * n), noise(rows * 192), noise(rows * 192), noise(rows * n));
    let mut outs = [q.clone(), k.clone(), v.clone()];
    let work = 10.0 * 64.0 * (4 * 9 * 512 * 513 / 2) as f64;
    cases.push(case("gradient of attention, 4 x 512, 9/3 heads", work, "GFLOP/s", move || {
        let [dq, dk, dv] = &mut outs;
        attention_grad(pool, isa, &s, 0.125, [&q, &k, &v, &dy], [dq, dk, dv], scratch);
    }));
    let (x, mut y) = (noise(rows * n), vec![0.0; n]);
    cases.push(case("sum over 2048 positions of 576", 4.0 * x.len() as f64, "GB/s", move || {
        reduce_middle(pool, isa, reduce::ReduceOp::Sum, &x, (rows, n), &mut y);
    }));
    report(pool, "training of a layer", cases);
}

/// Products of a gradient, exact and in split products.
fn gradients(pool: &Pool, isa: Isa) {
    #[cfg(target_arch = "x86_64")]
    let amx = split::Amx::request();
    let scratch = &Scratch::new();
    let mut cases = Vec::new();
    for (m, k, n, what) in [
        (2048, 576, 1536, "dX = dY W"),
        (2048, 1536, 576, "dX = dY W"),
        (1536, 2048, 576, "dW = dYᵀ X"),
        (576, 2048, 576, "Gram"),
        (1536, 2048, 1536, "Gram"),
    ] {
        let (a, b) = (noise(m * k), noise(n * k));
        let work = 2.0 * (m * k * n) as f64;
        let tokens = what.starts_with("dX");
        let (x, w, mut y) = (a.clone(), b.clone(), vec![0.0; m * n]);
        cases.push(case(format!("{what}, {m} x {n} x {k}, f32"), work, "GFLOP/s", move || {
            let left = if tokens { MatRef::new(&x, m, k) } else { MatRef::new(&x, k, m).t() };
            match what {
                "Gram" => gram(pool, MatRef::new(&x, k, m), &mut y),
                _ => matmul(pool, isa, left, MatRef::new(&w, k, n), &mut y, n),
            }
        }));
        #[cfg(target_arch = "x86_64")]
        if let Some(amx) = amx {
            use split::{Operand, Parts};
            for (parts, name) in [(Parts::Both, "split"), (Parts::High, "bf16")] {
                let (a, b, mut y) = (a.clone(), b.clone(), vec![0.0; m * n]);
                cases.push(case(format!("{what}, {m} x {n} x {k}, {name}"), work, "GFLOP/s", move || {
                    let left = if tokens { Operand::Rows(&a) } else { Operand::Columns(&a) };
                    let right = if what == "Gram" { left } else { Operand::Columns(&b) };
                    amx.product(pool, parts, left, right, (m, k, n), &mut y, scratch);
                }));
            }
        }
    }
    report(pool, "products of gradients", cases);
}

fn main() -> Result<(), PoolError> {
    let mut args = std::env::args().skip(1);
    let threads = args.next().and_then(|a| a.parse().ok()).unwrap_or(2);
    let filter = args.next().unwrap_or_default();
    // The matrix unit is asked for before there are threads.
    #[cfg(target_arch = "x86_64")]
    let _ = split::Amx::request();
    let (pool, best) = (Pool::new(threads)?, Isa::detect());
    let wanted = args.next();
    let isa = Isa::available().into_iter().find(|i| wanted.as_deref() == Some(i.name())).unwrap_or(best);
    println!("instructions: {}", isa.name());
    type Group = (&'static str, fn(&Pool, Isa));
    let groups: [Group; 8] = [
        ("matmul", matrices),
        ("few", few_rows),
        ("cached", cached_rows),
        ("many", many_rows),
        ("attention", attentions),
        ("elements", rows_and_elements),
        ("training", training),
        ("gradients", gradients),
    ];
    for (name, run) in groups {
        if name.contains(&filter) {
            run(&pool, isa);
        }
    }
    Ok(())
}
