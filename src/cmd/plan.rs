//! `qrmc plan`: what a compile will need.

use std::time::Instant;

use qrmc_ir::{Elem, Module, Tensor};
use qrmc_lowering::materialize;
use qrmc_passes::{Pipeline, Preserves, find};
use qrmc_runtime::cpu::{MatRef, matmul};
use qrmc_runtime::engine::CpuEngine;
use qrmc_runtime::parity::{Extent, REFERENCE_BYTES};

use super::check;
use super::recipe::Settings;
use crate::cli::CompileArgs;
use crate::fail::{FAILURE, Failure, OVER_BUDGET};
use crate::memory::{private_bytes, show_bytes};
use crate::model::{self, Model};
use crate::ui::Ui;

/// Tokens that run through a layer at a time; see `qrmc_passes`.
const BATCH_TOKENS: u64 = 1024;

/// What a compile will need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Needs {
    /// Private memory at the worst moment, in bytes; mapped files do not count.
    pub(crate) memory: u64,
    /// Bytes written beside the output before it takes its place.
    pub(crate) disk: u64,
    /// Floating-point operations in products.
    pub(crate) flops: f64,
    /// Seconds, roughly.
    pub(crate) seconds: f64,
}

pub(crate) fn run(args: &CompileArgs, ui: &Ui) -> Result<(), Failure> {
    let engine = super::engine(&args.machine)?;
    let path = model::locate(args.model.as_deref())?;
    let model = model::open_as(&path, &engine, super::recipe::integers(args)?)?;
    model.tell(ui);
    let settings = Settings::decide(args, &model)?;
    let needs = estimate(&model, &settings, &engine)?;
    if ui.json() {
        ui.object(&serde_json::json!({
            "pass": settings.pipeline.to_string(),
            "memory_bytes": needs.memory,
            "disk_bytes": needs.disk,
            "flops": needs.flops,
            "seconds": needs.seconds,
        }));
    } else {
        ui.out(&format!("passes   {}", settings.pipeline));
        if let Some(c) = &settings.calib {
            ui.out(&format!(
                "text     {} windows of {} tokens from {}",
                c.nsamples,
                c.seqlen,
                c.path.display()
            ));
        }
        ui.out(&format!(
            "memory   {} private at most; the source is mapped beside it",
            show_bytes(needs.memory)
        ));
        ui.out(&format!("disk     {}", show_bytes(needs.disk)));
        ui.out(&format!("products {:.1} TFLOP", needs.flops / 1e12));
        ui.out(&format!("time     about {}", super::summary::show_time(needs.seconds)));
    }
    within(&needs, args.mem)
}

/// Refuses what does not fit the granted memory.
pub(crate) fn within(needs: &Needs, granted: Option<u64>) -> Result<(), Failure> {
    match granted {
        Some(mem) if needs.memory > mem => Err(Failure::new(
            OVER_BUDGET,
            format!("this needs {} of memory; --mem grants {}", show_bytes(needs.memory), show_bytes(mem)),
        )
        .hint("fewer calibration windows (--nsamples) or shorter ones (--seqlen) need less")),
        _ => Ok(()),
    }
}

/// The graph after the passes, without running any: only its types are looked at.
fn shape_after(model: &Model, pipeline: &Pipeline) -> Result<Module, Failure> {
    let mut unit = qrmc_passes::Unit::new(model.module.clone(), model.weights.clone());
    let mut silent = super::opt::Silent;
    let engine = CpuEngine::new(1)?;
    let mut cx = qrmc_passes::PassCx {
        engine: &engine,
        calibration: None,
        store: std::sync::Arc::new(qrmc_passes::NoStore),
        source_key: String::new(),
        report: &mut silent,
    };
    for c in &pipeline.0 {
        let shape = match c.name.as_str() {
            "fuse-norm" | "annotate" | "rtn" => c.clone(),
            // Codes have the same types however they are chosen.
            "gptq" => qrmc_passes::Call { name: "rtn".into(), options: Vec::new() },
            _ => {
                let pass = qrmc_passes::build(c).map_err(qrmc_passes::PipelineError::from)?;
                pass.outline(&mut unit)?;
                continue;
            }
        };
        let mut manager = qrmc_passes::Manager { check: false, seed: 0, after: &mut |_, _| {} };
        manager.run(&mut unit, &Pipeline(vec![shape]), &mut cx).map_err(|e| match e {
            // Which of these passes it was says nothing about the pipeline that was asked for.
            qrmc_passes::PipelineError::Pass { error, .. } => error.into(),
            other => Failure::from(other),
        })?;
    }
    Ok(unit.module)
}

/// Estimates memory, disk and time.
pub(crate) fn estimate(model: &Model, s: &Settings, engine: &CpuEngine) -> Result<Needs, Failure> {
    let module = shape_after(model, &s.pipeline)?;
    let verified = qrmc_ir::verify(&module).map_err(|mut f| Failure::from(f.remove(0)))?;
    let plan = materialize::plan(verified)?;
    if let Some(runtime) = check::runtime(&s.target) {
        check::preflight(runtime, &plan.module, &model.outline()?, &s.tp)?;
    }
    let f = &module.facts;
    let weights: u64 = f.layers * layer_weights(&module);
    let rate = measure_rate(engine);
    let owned = model.checkpoint.as_ref().is_some_and(|c| c.converts());
    let mut memory = plan.peak_bytes(owned);
    let mut flops = 0.0;
    if let Some(c) = &s.calib {
        memory = memory.max(crate::calib::load_bytes(c)?);
        let tokens = (c.nsamples * c.seqlen) as u64;
        if s.pipeline.0.iter().any(|c| c.name == "gptq") {
            memory = memory.max(gptq_bytes(&module, tokens));
        }
        let any = |names: &[&str]| s.pipeline.0.iter().any(|c| names.contains(&c.name.as_str()));
        if any(&["scale", "clip-search", "smooth", "static-inputs", "static-keys", "static-caches"]) {
            memory = memory.max(calibration_bytes(&module, tokens));
        }
        if let Some(c2) = s.pipeline.0.iter().find(|c| c.name == "affine") {
            let windows = option(c2, "batch").min(c.nsamples as f64);
            memory = memory.max(training_bytes(&module, tokens, c.seqlen as u64, windows as u64));
        }
        flops += calibration_flops(&module, &s.pipeline, tokens, c.seqlen as u64);
    }
    if s.check {
        memory = memory.max(parity_bytes(&plan.module));
    }
    if s.check
        && s.pipeline.0.iter().any(|c| find(&c.name).is_some_and(|p| p.info().preserves != Preserves::Lossy))
    {
        // One layer or the head at a time; a copy of what the source had to convert stands beside it.
        let stored = if owned { 8 } else { 2 };
        memory =
            memory.max(layer_weights(&module).max(f.vocab * f.hidden) * stored + layer_weights(&module) * 4);
        flops += 4.0 * 2.0 * 32.0 * weights as f64;
    }
    let disk: u64 = plan.tensors().iter().map(qrmc_lowering::artefact::TensorPlan::bytes).sum();
    // Rounding runs at about this many weights a second and thread; reading the source twice at about 2 GB/s.
    let rounding = weights as f64 / (1.2e8 * engine.threads() as f64);
    let source: u64 = module_bytes(&model.module);
    let seconds = flops / rate + rounding + 2.0 * source as f64 / 2e9;
    Ok(Needs {
        memory: memory + private_bytes() + (16 << 20),
        disk: disk + side_bytes(model),
        flops,
        seconds,
    })
}

/// Checks that the disk of the output has room.
pub(crate) fn check_disk(path: &std::path::Path, need: u64) -> Result<(), Failure> {
    let Some(free) = free_bytes(path) else { return Ok(()) };
    if free < need {
        return Err(Failure::new(
            FAILURE,
            format!(
                "{} has {} free, the output needs {}",
                path.display(),
                show_bytes(free),
                show_bytes(need)
            ),
        )
        .hint("choose an output on another disk with -o"));
    }
    Ok(())
}

fn free_bytes(path: &std::path::Path) -> Option<u64> {
    // `df` is everywhere that the commands of this file's users are; without it the check is left to the writer.
    let out = std::process::Command::new("df").args(["-Pk"]).arg(path).output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    text.lines().nth(1)?.split_whitespace().nth(3)?.parse::<u64>().ok().map(|k| k * 1024)
}

/// Comparing kernels with the reference: the private tensors of one function, and in the reference the operands of one
/// step.
fn parity_bytes(m: &Module) -> u64 {
    let most = Extent::quick(m).elements;
    let all = || {
        m.weights().iter().map(|w| {
            let elements = w.ty.shape.as_fixed().map_or(0, |s| s.iter().product::<usize>()) as u64;
            (w.ty.elem, elements)
        })
    };
    let held = all().filter(|(e, _)| *e == Elem::F32).map(|(_, n)| 4 * n).max().unwrap_or(0);
    let step = all().map(|(_, n)| n).filter(|n| *n <= most).max().unwrap_or(0);
    held + REFERENCE_BYTES * step
}

pub(crate) fn module_bytes(m: &Module) -> u64 {
    m.weights().iter().filter_map(|w| w.ty.bytes()).map(|b| b as u64).sum()
}

fn side_bytes(model: &Model) -> u64 {
    model.files.iter().map(|f| f.bytes.len() as u64).sum::<u64>() + (1 << 20)
}

/// Elements of the linear layers of a block.
fn layer_weights(m: &Module) -> u64 {
    let f = &m.facts;
    let (q, kv) = (f.heads * f.head_dim, f.kv_heads * f.head_dim);
    f.hidden * (2 * q + 2 * kv + 3 * f.intermediate)
}

fn calibration_bytes(m: &Module, tokens: u64) -> u64 {
    let f = &m.facts;
    let (h, i) = (f.hidden, f.intermediate);
    let batch = tokens.min(BATCH_TOKENS);
    // The stream before and behind the layer, what feeds its linear layers, and the three outputs that are compared.
    let activations = tokens * (2 * h + 2 * h + f.heads * f.head_dim + i + 3 * h) * 4;
    let buffers = batch * (2 * h + 4 * i) * 4;
    // Gram matrix of the widest input: product, sum in double precision, result.
    let gram = i * i * (4 + 8 + 4);
    let weights = layer_weights(m) * 4 * 3;
    activations + buffers.max(gram) + weights
}

/// A numeric option of a pass in normal form.
fn option(c: &qrmc_passes::Call, name: &str) -> f64 {
    c.options.iter().find(|(k, _)| k == name).and_then(|(_, v)| v.to_string().parse().ok()).unwrap_or(0.0)
}

/// Training of one layer: the float stream before and behind it in both cuts into windows, what the steps of a
/// gradient keep of one step, and the layer's weights, transformed and with their gradients.
fn training_bytes(m: &Module, tokens: u64, seqlen: u64, windows: u64) -> u64 {
    let f = &m.facts;
    let step = seqlen * windows;
    let streams = tokens * f.hidden * 4 * 4 + tokens * (2 * f.hidden + f.intermediate) * 4;
    let kept = step * (30 * f.hidden + 16 * f.intermediate) * 4;
    streams.max(tokens * f.hidden * 4 * 4 + kept + layer_weights(m) * 4 * 7)
}

fn gptq_bytes(m: &Module, tokens: u64) -> u64 {
    let f = &m.facts;
    let (h, i) = (f.hidden, f.intermediate);
    // The stream before and behind the layer, and the kept inputs of its linear layers.
    let wide = if tokens * i * 4 <= 1 << 30 { i } else { 0 };
    let activations = tokens * (2 * h + 2 * h + f.heads * f.head_dim + wide) * 4;
    // Gram matrix and factors in one square, a panel of the product of a batch, and the slices that it is made of.
    let square =
        |n: u64| n * n * 8 + n.min((n / 4).clamp(256, 2048)) * n * 4 + 2 * n * tokens.min(BATCH_TOKENS) * 4;
    // A weight as it was, with moved errors, its codes; errors of a block and a part of the losses are small.
    let weight = |rows: u64, n: u64| rows * n * (4 + 8 + 2) + 512 * n * 16;
    let wide = square(i) + weight(h, i);
    let narrow = square(h) + weight(i.max(h), h);
    // Weights of the layer: those that are not rounded yet as the source stores them.
    activations + wide.max(narrow) + layer_weights(m) * 2
}

fn calibration_flops(m: &Module, pipeline: &Pipeline, tokens: u64, seqlen: u64) -> f64 {
    let f = &m.facts;
    let (h, i, t) = (f.hidden as f64, f.intermediate as f64, tokens as f64);
    let (q, kv) = ((f.heads * f.head_dim) as f64, (f.kv_heads * f.head_dim) as f64);
    let attention = 2.0 * t * seqlen as f64 * q;
    let forward = 2.0 * t * layer_weights(m) as f64 + attention;
    let mut total = 0.0;
    for c in &pipeline.0 {
        let per_layer = match c.name.as_str() {
            "scale" => {
                let grid = option(c, "grid");
                let attn = 2.0 * t * h * (2.0 * q + 2.0 * kv) + attention;
                let mlp = 2.0 * t * 3.0 * h * i;
                2.0 * forward + (grid + 1.0) * (attn + mlp) + 2.0 * t * i * i + grid * 2.0 * h * i * i
            }
            "gptq" => {
                // Gram matrices above the diagonal, factors, moved errors and the two losses of each weight.
                let attn = h * h * (t + 2.0 / 3.0 * h + 3.0 * (q + 2.0 * kv));
                let out = q * q * (t + 2.0 / 3.0 * q + 3.0 * h);
                let mlp = h * h * (t + 2.0 / 3.0 * h + 3.0 * 2.0 * i) + i * i * (t + 2.0 / 3.0 * i + 3.0 * h);
                forward + attn + out + mlp
            }
            "smooth" | "static-inputs" | "static-keys" | "static-caches" => forward,
            // Forward and backward of every step, and two runs for the losses.
            "affine" => forward * (3.0 * option(c, "epochs") + 4.0),
            "clip-search" => 2.0 * forward + 10.0 * 2.0 * layer_weights(m) as f64 * 128.0,
            _ => 0.0,
        };
        total += per_layer * f.layers as f64;
    }
    total
}

/// Products a second that this machine reaches now, on a shape of the size of a layer.
fn measure_rate(engine: &CpuEngine) -> f64 {
    let n = 512usize;
    let a = Tensor::f32([n, n], vec![0.5; n * n]);
    let mut out = vec![0.0f32; n * n];
    let x = a.as_f32().unwrap_or(&[]).to_vec();
    engine.with_machine(|pool, isa| {
        let mut run = || matmul(pool, isa, MatRef::new(&x, n, n), MatRef::new(&x, n, n).t(), &mut out, n);
        run();
        let start = Instant::now();
        for _ in 0..4 {
            run();
        }
        4.0 * 2.0 * (n * n * n) as f64 / start.elapsed().as_secs_f64().max(1e-9)
    })
}
