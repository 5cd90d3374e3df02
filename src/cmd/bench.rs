//! `qrmc bench`.

use std::time::Instant;

use qrmc_runtime::bench::{Speed, read_bandwidth, speed};
use qrmc_runtime::caches::pages;
use qrmc_runtime::session::CHUNK;
use serde_json::json;

use crate::cli::BenchArgs;
use crate::fail::{FAILURE, Failure};
use crate::memory::{available_bytes, mapped_bytes, private_bytes, show_bytes};
use crate::model;
use crate::ui::Ui;

pub(crate) fn run(args: &BenchArgs, ui: &Ui) -> Result<(), Failure> {
    let engine = super::engine(&args.machine)?;
    let start = Instant::now();
    let model = model::open_to_run(&args.model, &engine)?;
    model.tell(ui);
    let session = model.session(&engine, ui)?;
    let load = start.elapsed().as_secs_f64();
    let (private, mapped) = (private_bytes(), mapped_bytes());
    let context = model.module.facts.context as usize;
    if args.prompt.max(args.new) > context {
        let m = format!("{} tokens do not fit the model's context of {context}", args.prompt.max(args.new));
        return Err(Failure::usage(m).hint("give smaller -p and -n"));
    }
    for &batch in &args.batch {
        let capacity = args.prompt.max(args.new);
        let buffers = session.buffer_bytes(args.prompt.clamp(1, CHUNK).max(batch));
        let caches = (batch as u64).saturating_mul(pages(capacity) as u64);
        let need = caches.saturating_mul(session.page_bytes()).saturating_add(buffers);
        if let Some(have) = available_bytes().filter(|have| need > *have) {
            let (need, have) = (show_bytes(need), show_bytes(have));
            let m = format!("{batch} sequences of {capacity} tokens need {need}, and {have} are free");
            return Err(Failure::new(FAILURE, m).hint("give a smaller --batch, -p or -n"));
        }
    }
    let bandwidth = read_bandwidth(&engine);
    let mut rows = Vec::new();
    for &batch in &args.batch {
        // What is measured first would pay for memory that is touched for the first time.
        speed(&session, batch, args.prompt.min(32), args.new.min(4))?;
        let mut runs = Vec::new();
        for _ in 0..args.repeats {
            runs.push(speed(&session, batch, args.prompt, args.new)?);
        }
        let median = |of: fn(&Speed) -> Option<f64>| {
            let mut all: Vec<f64> = runs.iter().filter_map(of).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() / 2).copied()
        };
        let bytes = runs.first().map_or(0, |r| r.step_bytes);
        rows.push((batch, median(|s| s.prefill), median(|s| s.decode), bytes));
    }
    let read =
        |batch: usize, decode: Option<f64>, bytes: u64| decode.map(|d| d / batch as f64 * bytes as f64);
    if ui.json() {
        let rows: Vec<_> = rows
            .iter()
            .map(|&(batch, prefill, decode, bytes)| {
                json!({
                    "batch": batch, "prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode,
                    "step_bytes": bytes, "read_bytes_per_second": read(batch, decode, bytes),
                    "share_of_bandwidth": read(batch, decode, bytes).map(|r| r / bandwidth),
                })
            })
            .collect();
        ui.object(&json!({
            "threads": engine.threads(), "isa": engine.isa(), "integer_products": engine.int_path(),
            "read_bandwidth_bytes_per_second": bandwidth, "prompt": args.prompt, "new": args.new,
            "repeats": args.repeats, "weights_bytes": session.bytes(), "load_seconds": load,
            "private_bytes": private, "mapped_bytes": mapped, "rows": rows,
        }));
        return Ok(());
    }
    ui.out(&format!(
        "{} threads, {}, products of codes: {}; memory reads {:.1} GB/s",
        engine.threads(),
        engine.isa(),
        engine.int_path(),
        bandwidth / 1e9
    ));
    ui.out(&format!(
        "loaded in {load:.2} s; in memory: {} private, {} of mapped files",
        show_bytes(private),
        show_bytes(mapped)
    ));
    ui.out("batch   prefill tokens/s   decode tokens/s   reads GB/s   of bandwidth");
    for (batch, prefill, decode, bytes) in rows {
        let show = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.1}"));
        let read = read(batch, decode, bytes);
        let share = read.map_or("-".into(), |r| format!("{:.0} %", 100.0 * r / bandwidth));
        ui.out(&format!(
            "{batch:>5} {:>18} {:>17} {:>12} {share:>14}",
            show(prefill),
            show(decode),
            show(read.map(|r| r / 1e9))
        ));
    }
    Ok(())
}
