//! `qrmc compile`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use qrmc_ir::{Hash, Module, NoWeights, WeightSource, print, verify};
use qrmc_lowering::artefact::{ArtefactWriter, Output, SourceInfo, TensorPlan, is_artefact};
use qrmc_lowering::export::{self, Format, View};
use qrmc_lowering::materialize;
use qrmc_passes::{
    Calibration, Event, Gap, LayerLoss, Manager, PassCx, PassReport, PipelineError, Preserves, Report, Unit,
    compare_sourced, seeded_input,
};

use qrmc_runtime::engine::CpuEngine;
use qrmc_runtime::parity::{Extent, Parity};

use super::recipe::Settings;
use super::summary::Summary;
use super::{check, emit, plan};
use crate::calib;
use crate::cli::{CompileArgs, Emit};
use crate::fail::{FAILURE, Failure, GATE, ILLEGAL, INTERRUPTED};
use crate::memory::{Watch, private_bytes, show_bytes};
use crate::model::{self, Model};
use crate::store::DiskStore;
use crate::ui::Ui;

/// Tokens of the comparison of the artefact with the graph, and how far its logits may be: kernels for packed weights
/// add in another order.
const CHECK_TOKENS: usize = 32;
const WRITTEN_WITHIN: f64 = 1e-4;
/// Tokens at once of the comparison of kernels with the interpreter.
const PARITY_TOKENS: usize = 4;

/// Shows progress, keeps losses and events.
struct Reporter<'a> {
    ui: &'a Ui,
    stop: Arc<AtomicBool>,
    losses: Vec<(String, LayerLoss)>,
    events: Vec<(String, Event)>,
    flops: f64,
}

impl Report for Reporter<'_> {
    fn progress(&mut self, pass: &str, done: usize, total: usize, note: &str) {
        let loss = self.losses.last().filter(|(p, l)| p == pass && l.layer + 1 == done);
        let loss = loss
            .map(|(_, l)| format!("{} {:.2e} <- {:.2e}  ", l.what, l.after, l.before))
            .unwrap_or_default();
        self.ui.progress(pass, done, total, &format!("{loss}{note} {}", show_bytes(private_bytes())));
    }

    fn loss(&mut self, pass: &str, loss: LayerLoss) {
        self.losses.push((pass.to_owned(), loss));
    }

    fn event(&mut self, pass: &str, event: Event) {
        self.events.push((pass.to_owned(), event));
    }

    fn flops(&mut self, _pass: &str, flops: f64) {
        self.flops += flops;
    }

    fn interrupted(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

pub(crate) fn run(args: &CompileArgs, ui: &Ui) -> Result<(), Failure> {
    let (watch, start) = (Watch::start(), Instant::now());
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    // A second Ctrl-C ends the process at once; kept steps are whole files at any time.
    let _ = ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            #[allow(clippy::exit, reason = "the user asked twice")]
            std::process::exit(i32::from(INTERRUPTED));
        }
    });
    let engine = super::engine(&args.machine)?;
    let path = model::locate(args.model.as_deref())?;
    let model = model::open_as(&path, &engine, super::recipe::integers(args)?)?;
    if model.checkpoint.is_none() {
        return Err(Failure::usage(format!("{} is an artefact already", path.display()))
            .hint("compile starts from a Hugging Face folder or a GGUF file"));
    }
    model.tell(ui);
    if args.emit == Emit::Fake {
        model.whole(ILLEGAL)?;
    }
    let settings = Settings::decide(args, &model)?;
    let target = args.output.clone().unwrap_or_else(|| settings.default_output(&model));
    let needs = plan::estimate(&model, &settings, &engine)?;
    plan::within(&needs, args.mem)?;
    let ours: fn(&Path) -> bool = if args.emit == Emit::Fake { emit::is_export } else { is_artefact };
    let output = Output::prepare(&target, ours)?;
    plan::check_disk(&output.folder(), needs.disk)?;
    let source = model.examine(&engine)?;
    let (calibration, text) = match &settings.calib {
        None => (None, None),
        Some(c) => {
            let (calibration, text) = calib::load(c, &model.tokenizer()?)?;
            ui.note(&text.text());
            (Some(calibration), Some(text))
        }
    };
    let store = Arc::new(DiskStore::new(args.cache.clone().unwrap_or_else(|| output.steps())));
    let mut report = Reporter { ui, stop: stop.clone(), losses: Vec::new(), events: Vec::new(), flops: 0.0 };
    let mut unit = Unit::new(model.module.clone(), model.weights.clone());
    let calibrating = Instant::now();
    let reports = {
        let mut cx = PassCx {
            engine: &engine,
            calibration: calibration.as_ref(),
            store,
            source_key: format!("{} {}", env!("CARGO_PKG_VERSION"), source.hash),
            report: &mut report,
        };
        let mut after =
            |pass: &str, module: &Module| print_after(ui, args.print_after.as_deref(), pass, module);
        let mut manager = Manager { check: settings.check, seed: settings.seed, after: &mut after };
        manager.run(&mut unit, &settings.pipeline, &mut cx).map_err(|e| with_reproducer(e, &target, ui))?
    };
    let calibration_time = calibrating.elapsed();
    ui.clear();
    let verified = verify(&unit.module).map_err(|mut f| Failure::from(f.remove(0)))?;
    let plan = materialize::plan(verified)?;
    let tensors = plan.tensors();
    let recipe = settings.recipe(&source, calibration.as_ref().map(|c: &Calibration| c.hash().hex()));
    let recipe = serde_yaml_ng::to_string(&recipe).map_err(|e| Failure::new(FAILURE, e.to_string()))?;
    let mut summary = Summary {
        output: target.display().to_string().trim_end_matches('/').to_owned(),
        model: path.display().to_string(),
        source_bytes: source_bytes(&model),
        reports,
        losses: report.losses,
        events: report.events,
        rounding: Vec::new(),
        flops: report.flops,
        time: start.elapsed(),
        calibration_time,
        peak: 0,
        planned: needs.memory,
        text,
        fake: args.emit == Emit::Fake,
        block: model.module.lacks().is_some(),
        written: None,
        parity: None,
    };
    let view = match args.emit {
        Emit::Packed => None,
        Emit::Fake => Some(View::of(&plan.module, &model.outline()?)?),
    };
    let mut fake = match &view {
        Some(view) => Some(emit::Fake::new(export::Fake.plan(view, &NoWeights)?)),
        None => None,
    };
    let mut writer = match &fake {
        Some(fake) => ArtefactWriter::stored(&output, "model", fake.tensors(), args.shard_size),
        None => ArtefactWriter::new(&output, tensors.clone(), args.shard_size),
    };
    let mut done = 0;
    let mut put = |t: &TensorPlan, bytes: &[u8]| {
        done += 1;
        ui.progress("write", done, tensors.len(), &t.name);
        match &mut fake {
            None => writer.tensor(&t.name, bytes),
            Some(fake) => fake.take(t, bytes, &mut writer).map_err(|e| e.at(&target)),
        }
    };
    summary.rounding = plan.run(&engine, &unit.weights, &mut put)?;
    ui.clear();
    if stop.load(Ordering::Relaxed) {
        return Err(Failure::new(INTERRUPTED, "interrupted; run the same command again to go on"));
    }
    let untied = view.as_ref().is_some_and(|v| v.untied);
    write_files(&mut writer, fake.as_ref().map(|f| (f, untied)), &model, &plan.module, &recipe)?;
    let pipeline = unit.module.history.clone();
    let manifest = finish(writer, args.emit, source, pipeline)?;
    if args.emit == Emit::Packed && settings.check {
        let artefact = model::open(&output.folder(), &engine)?;
        summary.written = written_gap(&artefact, &unit, &engine, &settings, &summary.reports)?;
        let parity = Parity::of_model(
            &engine,
            &artefact.module,
            &*artefact.weights,
            PARITY_TOKENS,
            settings.seed,
            Extent::quick(&artefact.module),
        )?;
        if !parity.holds() {
            return Err(check::broken(&parity));
        }
        summary.parity = Some(parity);
    }
    output.publish()?;
    summary.time = start.elapsed();
    summary.peak = watch.peak();
    if ui.json() {
        ui.object(&summary.json(&manifest));
    } else {
        summary.show(ui, &manifest);
    }
    Ok(())
}

/// How far what was written is from what was compiled, where a transform made it more than a copy of its parts.
fn written_gap(
    written: &Model,
    unit: &Unit,
    engine: &CpuEngine,
    settings: &Settings,
    reports: &[PassReport],
) -> Result<Option<Gap>, Failure> {
    if !reports.iter().any(|r| matches!(r.preserves, Preserves::Within(_))) {
        return Ok(None);
    }
    let input = seeded_input(settings.seed, CHECK_TOKENS, &unit.module);
    let compiled = (&unit.module, &unit.weights as &dyn WeightSource);
    let gap = compare_sourced(engine, compiled, (&written.module, &*written.weights), &input)?;
    if gap.relative > WRITTEN_WITHIN {
        return Err(Failure::new(
            GATE,
            format!("the artefact's logits are {:.2e} from those of the compiled graph", gap.relative),
        )
        .hint("this is a fault of qrmc; nothing was published. Please report it with the recipe"));
    }
    Ok(Some(gap))
}

fn source_bytes(model: &Model) -> u64 {
    match &model.checkpoint {
        Some(c) => c.weight_files().iter().filter_map(|f| std::fs::metadata(f).ok()).map(|m| m.len()).sum(),
        None => 0,
    }
}

fn write_files(
    writer: &mut ArtefactWriter<'_>,
    fake: Option<(&emit::Fake<'_>, bool)>,
    model: &Model,
    module: &Module,
    recipe: &str,
) -> Result<(), Failure> {
    if fake.is_none() {
        writer.file("model.qir", print(module).as_bytes())?;
    }
    writer.file("recipe.yaml", recipe.as_bytes())?;
    for f in &model.files {
        match fake.filter(|_| f.name == "config.json") {
            Some((fake, untied)) => writer.file(&f.name, &fake.config(&f.bytes, untied)?)?,
            None => writer.file(&f.name, &f.bytes)?,
        }
    }
    Ok(())
}

fn finish(
    mut writer: ArtefactWriter<'_>,
    emit: Emit,
    source: SourceInfo,
    pipeline: Vec<String>,
) -> Result<qrmc_lowering::artefact::Manifest, Failure> {
    if emit == Emit::Fake {
        writer.index()?;
    }
    Ok(writer.finish(env!("CARGO_PKG_VERSION"), source, pipeline)?)
}

/// Prints the module after a pass that was asked for.
pub(crate) fn print_after(ui: &Ui, wanted: Option<&str>, pass: &str, module: &Module) {
    let name = pass.split('{').next().unwrap_or(pass);
    if wanted.is_some_and(|w| name.contains(w)) {
        ui.note(&format!("// after {pass}\n{}", print(module)));
    }
}

/// Turns a failed pipeline into a failure; a fault of qrmc leaves a reproducer.
fn with_reproducer(e: PipelineError, target: &Path, ui: &Ui) -> Failure {
    if let PipelineError::Verify { reproducer, .. } = &e {
        let name = format!("qrmc-reproducer-{}.qir", &Hash::of([reproducer.as_bytes()]).hex()[..12]);
        let path = target.with_file_name(name);
        if std::fs::write(&path, reproducer).is_ok() {
            ui.note(&format!("the module before the failing pass is in {}", path.display()));
        }
    }
    e.into()
}
