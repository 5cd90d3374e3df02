//! `qrmc export`.

mod gguf;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use qrmc_frontends::SideFile;
use qrmc_ir::{QuantSpec, WeightSource, verify};
use qrmc_lowering::artefact::{ArtefactWriter, Manifest, Output, SourceInfo};
use qrmc_lowering::export::rules::RUNTIMES;
use qrmc_lowering::export::{self, Entry, ExportError, FORMATS, Format, Linear, Part, Plan, View, onnx};
use serde_json::{Value, json};

use super::opt::faults;
use super::{card, check, emit, plan};
use crate::cli::{ExportArgs, OnnxForm};
use crate::fail::{FAILURE, Failure, ILLEGAL};
use crate::memory::{Watch, show_bytes};
use crate::model::{self, Model};
use crate::ui::Ui;

/// A way to write a model.
#[derive(Clone, Copy)]
enum Kind {
    Safetensors(&'static dyn Format),
    Gguf,
    Onnx,
}

impl Kind {
    fn all() -> impl Iterator<Item = Kind> {
        FORMATS.into_iter().map(Kind::Safetensors).chain([Kind::Gguf, Kind::Onnx])
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Safetensors(f) => f.name(),
            Kind::Gguf => export::gguf::NAME,
            Kind::Onnx => "onnx",
        }
    }

    fn summary(self) -> &'static str {
        match self {
            Kind::Safetensors(f) => f.summary(),
            Kind::Gguf => export::gguf::SUMMARY,
            Kind::Onnx => "the whole graph, with caches: onnxruntime",
        }
    }

    fn find(name: &str) -> Result<Kind, Failure> {
        let wanted = name.replace('_', "-");
        Kind::all().find(|k| k.name() == wanted).ok_or_else(|| {
            let known = Kind::all().map(Kind::name).collect::<Vec<_>>().join(", ");
            Failure::usage(format!("there is no format `{name}`")).hint(format!("formats: {known}"))
        })
    }
}

pub(crate) fn run(args: &ExportArgs, ui: &Ui) -> Result<(), Failure> {
    let (watch, start) = (Watch::start(), Instant::now());
    let kind = Kind::find(&args.format)?;
    if args.form.is_some() && !matches!(kind, Kind::Onnx) {
        return Err(Failure::usage("--form is for --format onnx").hint("leave it out"));
    }
    if !args.tp.is_empty() && !matches!(kind, Kind::Safetensors(_)) {
        return Err(
            Failure::usage(format!("--tp: {} files are not cut for ranks", kind.name())).hint("leave it out")
        );
    }
    let engine = super::engine(&args.machine)?;
    let model = model::open_to_pass(&args.model, &engine)?;
    model.tell(ui);
    let target =
        args.output.clone().unwrap_or_else(|| PathBuf::from(format!("{}-{}", model.name(), kind.name())));
    let card = card::Card::new(&model, (kind.name(), kind.summary()), &args.evaluation)?;
    let mut losses = Vec::new();
    let (output, manifest, notes);
    match kind {
        Kind::Safetensors(format) => {
            let mut view = View::through(&model.module, &model.outline()?, &|op| format.sees(op))?;
            if args.requantize {
                losses = requantize(&mut view, &*model.weights, |l, src| format.nearest(l, src))?;
            }
            ranks(&view, format.name(), &args.tp)?;
            let planned = format.plan(&view, &*model.weights)?;
            output = prepare(&target, planned.bytes())?;
            manifest = write(&model, &view, &planned, &card, &output, args.shard_size, ui)?;
            notes = planned.notes;
        }
        Kind::Gguf => {
            let mut view = View::of(&model.module, &model.outline()?)?;
            if args.requantize {
                losses = requantize(&mut view, &*model.weights, export::gguf::nearest)?;
            }
            let planned = gguf::plan(&model, &view)?;
            output = prepare(&target, planned.bytes())?;
            gguf::write(&model, &planned, &output.folder(), ui)?;
            manifest = taken(&output, &[gguf::FILE], &[], &model, &card, &planned.notes)?;
            notes = planned.notes;
        }
        Kind::Onnx => {
            let form = match args.form {
                None | Some(OnnxForm::Qdq) => onnx::Form::Qdq,
                Some(OnnxForm::Ort) => onnx::Form::Ort,
            };
            let verified = verify(&model.module).map_err(faults)?;
            output = prepare(&target, plan::module_bytes(&model.module))?;
            onnx::write(verified, &*model.weights, &output.folder(), &onnx::Options { form })?;
            let genai = model.module.lacks().is_none().then_some(onnx::GENAI);
            let written: Vec<&str> = [onnx::MODEL, onnx::DATA].into_iter().chain(genai).collect();
            manifest = taken(&output, &written, &model.files, &model, &card, &[])?;
            notes = Vec::new();
        }
    }
    output.publish()?;
    let coded = model.is_quantized();
    let done = Done { target, manifest, coded, losses, notes, peak: watch.peak() };
    if ui.json() {
        ui.object(&done.json(kind));
    } else {
        done.show(kind, start, ui);
    }
    Ok(())
}

/// Refuses what cannot be cut for some numbers of ranks, by the rules of the runtime that cuts this format.
fn ranks(view: &View, format: &str, tp: &[u32]) -> Result<(), Failure> {
    let cuts = RUNTIMES.into_iter().find(|r| r.formats.contains(&format));
    match cuts.filter(|_| !tp.is_empty()) {
        Some(runtime) => check::refuse(runtime, runtime.faults(view, format, tp)),
        None => Ok(()),
    }
}

/// The manifest of an export whose tensors are in files of their own; `files` travel with them.
fn taken(
    output: &Output,
    written: &[&str],
    files: &[SideFile],
    model: &Model,
    card: &card::Card,
    notes: &[String],
) -> Result<Manifest, Failure> {
    let mut writer = ArtefactWriter::stored(output, "model", Vec::new(), u64::MAX);
    written.iter().try_for_each(|name| writer.written(name))?;
    files.iter().try_for_each(|f| writer.file(&f.name, &f.bytes))?;
    finish(writer, model, card, notes)
}

/// The output folder, where the disk has room for it.
fn prepare(target: &Path, bytes: u64) -> Result<Output, Failure> {
    let output = Output::prepare(target, emit::is_export)?;
    plan::check_disk(&output.folder(), bytes)?;
    Ok(output)
}

/// Rounds what does not fit to the scheme that is `nearest`; gives the loss of each matrix that was touched.
fn requantize(
    view: &mut View,
    src: &dyn WeightSource,
    nearest: impl Fn(&Linear, &dyn WeightSource) -> Result<Option<QuantSpec>, ExportError>,
) -> Result<Vec<(String, f64)>, Failure> {
    let mut losses = Vec::new();
    for e in &mut view.entries {
        let Entry::Linear(l) = e else { continue };
        if let Some(spec) = nearest(l, src)? {
            l.target = Some(spec);
            losses.push((l.name.clone(), l.loss(src)?));
            src.release(&l.codes.codes);
        }
    }
    Ok(losses)
}

fn release<'a>(src: &dyn WeightSource, names: impl IntoIterator<Item = &'a str>) {
    names.into_iter().for_each(|n| src.release(n));
}

/// Writes everything, a tensor at a time.
fn write(
    model: &Model,
    view: &View,
    planned: &Plan<'_>,
    card: &card::Card,
    output: &Output,
    shard_size: u64,
    ui: &Ui,
) -> Result<Manifest, Failure> {
    let src = &*model.weights;
    let tensors = planned.parts.iter().map(|p| p.tensor.clone()).collect();
    let mut writer = ArtefactWriter::stored(output, planned.stem, tensors, shard_size);
    for (i, part) in planned.parts.iter().enumerate() {
        ui.progress("export", i + 1, planned.parts.len(), &part.tensor.name);
        writer.begin(&part.tensor.name)?;
        part.write(src, &mut |bytes| writer.put(bytes))?;
        writer.end()?;
        let next: BTreeSet<&str> =
            planned.parts.get(i + 1).map(|p: &Part<'_>| p.from.iter().copied().collect()).unwrap_or_default();
        release(src, part.from.iter().copied().filter(|n| !next.contains(n)));
    }
    ui.clear();
    for f in &model.files {
        if f.name == "config.json" {
            writer.file(&f.name, &planned.config(&f.bytes, view.untied)?)?;
        } else {
            writer.file(&f.name, &f.bytes)?;
        }
    }
    for (name, bytes) in &planned.files {
        writer.file(name, bytes)?;
    }
    writer.index()?;
    finish(writer, model, card, &planned.notes)
}

/// What every export has: recipe, model card and manifest.
fn finish(
    mut writer: ArtefactWriter<'_>,
    model: &Model,
    card: &card::Card,
    notes: &[String],
) -> Result<Manifest, Failure> {
    if let Ok(recipe) = std::fs::read(model.path.join("recipe.yaml")) {
        writer.file("recipe.yaml", &recipe)?;
    }
    writer.file("README.md", card.text(notes).as_bytes())?;
    let (source, pipeline) = match &model.manifest {
        Some(m) => (m.source.clone(), m.pipeline.clone()),
        None => {
            let hash = String::new();
            (SourceInfo { name: model.name(), format: model.format.clone(), hash }, Vec::new())
        }
    };
    Ok(writer.finish(env!("CARGO_PKG_VERSION"), source, pipeline)?)
}

/// What was written.
struct Done {
    target: PathBuf,
    manifest: Manifest,
    /// Whether some matrices have codes.
    coded: bool,
    losses: Vec<(String, f64)>,
    notes: Vec<String>,
    peak: u64,
}

impl Done {
    /// Bytes of everything.
    fn bytes(&self) -> u64 {
        let len = |name: &str| std::fs::metadata(self.target.join(name)).map_or(0, |m| m.len());
        let files: BTreeSet<&str> = self.manifest.tensors.values().map(|t| t.file.as_str()).collect();
        files.into_iter().chain(self.manifest.files.keys().map(String::as_str)).map(len).sum()
    }

    fn worst(&self) -> Option<&(String, f64)> {
        self.losses.iter().max_by(|a, b| a.1.total_cmp(&b.1))
    }

    fn json(&self, kind: Kind) -> Value {
        let losses: Vec<Value> =
            self.losses.iter().map(|(name, loss)| json!({ "tensor": name, "relative": loss })).collect();
        json!({
            "output": self.target.display().to_string(),
            "format": kind.name(),
            "bytes": self.bytes(),
            "private_bytes": self.peak,
            "requantized": losses,
            "notes": self.notes,
        })
    }

    fn show(&self, kind: Kind, start: Instant, ui: &Ui) {
        ui.out(&format!(
            "{}/: {}, {}, in {:.1} s",
            self.target.display().to_string().trim_end_matches('/'),
            kind.name(),
            show_bytes(self.bytes()),
            start.elapsed().as_secs_f64()
        ));
        match self.worst() {
            None if self.coded => ui.out("  codes, scales and zero points are the artefact's"),
            None => {}
            Some((name, loss)) => ui.out(&format!(
                "  {} matrices were rounded again: relative error {loss:.1e} at most, in {name}",
                self.losses.len()
            )),
        }
        for note in &self.notes {
            ui.out(&format!("  {note}"));
        }
    }
}

impl Model {
    /// The float model that the configuration describes.
    pub(crate) fn outline(&self) -> Result<qrmc_ir::Module, Failure> {
        self.whole(ILLEGAL)?;
        let Some(config) = self.file("config.json") else {
            return Err(Failure::new(FAILURE, format!("{}: there is no config.json", self.path.display()))
                .hint("copy the source's config.json into the folder"));
        };
        let config: Value = serde_json::from_slice(config)
            .map_err(|e| Failure::new(FAILURE, format!("{}: config.json: {e}", self.path.display())))?;
        Ok(qrmc_frontends::outline(&self.path, &config)?)
    }
}
