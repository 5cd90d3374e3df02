//! Times cases in interleaved rounds.

use std::time::Instant;

use qrmc_runtime::cpu::Pool;

pub(crate) struct Case<'a> {
    name: String,
    /// Work of one call, in units of 1e9.
    work: f64,
    unit: &'static str,
    run: Box<dyn FnMut() + 'a>,
}

pub(crate) fn case<'a>(
    name: impl Into<String>,
    work: f64,
    unit: &'static str,
    run: impl FnMut() + 'a,
) -> Case<'a> {
    Case { name: name.into(), work: work / 1e9, unit, run: Box::new(run) }
}

pub(crate) fn report(pool: &Pool, title: &str, mut cases: Vec<Case<'_>>) {
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

pub(crate) fn noise(n: usize) -> Vec<f32> {
    let mut s = 0x9e37_79b9u32;
    (0..n)
        .map(|_| {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}
