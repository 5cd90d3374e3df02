//! `qrmc check --target`: what another runtime would refuse, before it is asked.

use std::collections::BTreeMap;
use std::path::PathBuf;

use qrmc_ir::{Module, Op, ScaleType};
use qrmc_lowering::export::rules::{Fault, RUNTIMES, Runtime};
use qrmc_lowering::export::{View, ascend, rounds};
use serde_json::{Value, json};

use crate::cli::CheckArgs;
use crate::fail::{FAILURE, Failure, ILLEGAL};
use crate::model::{self, Model};
use crate::ui::Ui;

/// The file that tells a folder for vllm-ascend.
const DESCRIPTION: &str = "quant_model_description.json";

/// The runtime of a name. `ascend` is the one that serves on Ascend.
pub(crate) fn runtime(name: &str) -> Option<&'static Runtime> {
    let name = if name == "ascend" { "vllm-ascend" } else { name };
    RUNTIMES.into_iter().find(|r| r.name == name)
}

pub(super) fn find(name: &str) -> Result<&'static Runtime, Failure> {
    runtime(name).ok_or_else(|| {
        let known = RUNTIMES.map(|r| r.name).join(", ");
        Failure::usage(format!("there is no runtime `{name}`")).hint(format!("runtimes: {known}"))
    })
}

pub(super) fn run(args: &CheckArgs, runtime: &Runtime, ui: &Ui) -> Result<(), Failure> {
    let (format, faults) = if args.model.join(DESCRIPTION).is_file() {
        ("ascend", described(runtime, args)?)
    } else if let Some(graph) = qrmc_frontends::onnx_path(&args.model) {
        let faults = match runtime.unread("onnx") {
            Some(fault) => vec![fault],
            None => super::onnx::faults(&graph)?,
        };
        ("onnx", faults)
    } else {
        let engine = super::super::engine(&args.machine)?;
        let model = model::open_schemes(&args.model, &engine)?;
        let format = format(&model)?;
        let view = view(&model.module, &model.outline()?)?;
        let said = model.quantization.iter().filter_map(|q| runtime.unsaid(&q.file));
        (format, said.chain(runtime.faults(&view, format, &args.tp)).collect())
    };
    let ranks: Vec<String> =
        if args.tp.is_empty() { vec!["1".into()] } else { args.tp.iter().map(u32::to_string).collect() };
    if ui.json() {
        let list: Vec<Value> = faults.iter().map(|f| json!({ "what": f.what, "hint": f.hint })).collect();
        ui.object(&json!({
            "target": runtime.name, "version": runtime.version, "format": format, "tp": args.tp,
            "loads": faults.is_empty(), "faults": list,
        }));
    } else if faults.is_empty() {
        ui.out(&format!(
            "{} {} loads it as {format}, for tp {}",
            runtime.name,
            runtime.version,
            ranks.join(", ")
        ));
    }
    refuse(runtime, faults)
}

/// What a folder with a description holds, by its files' headers alone.
fn described(runtime: &Runtime, args: &CheckArgs) -> Result<Vec<Fault>, Failure> {
    let folder = &args.model;
    if let Some(fault) = runtime.unread("ascend") {
        return Ok(vec![fault]);
    }
    let fail = |name: &str, e: &dyn std::fmt::Display| {
        Failure::new(FAILURE, format!("{}: {e}", folder.join(name).display()))
            .hint("write the folder again: `qrmc export --format ascend`")
    };
    let json = |name: &str| -> Result<Value, Failure> {
        let bytes = std::fs::read(folder.join(name)).map_err(|e| fail(name, &e))?;
        serde_json::from_slice(&bytes).map_err(|e| fail(name, &e))
    };
    let description = json(DESCRIPTION)?;
    let description = description.as_object().ok_or_else(|| fail(DESCRIPTION, &"is no JSON object"))?;
    let config = json("config.json")?;
    let source = qrmc_frontends::outline(folder, &config)?;
    let mut faults = Vec::new();
    if config.get("quantization_config").is_some() {
        let what = "config.json has a quantization_config, which this loader does not read".to_owned();
        faults.push(Fault { what, hint: "remove it: the description says everything".to_owned() });
    }
    let mut tensors = BTreeMap::new();
    let entries = std::fs::read_dir(folder).map_err(|e| fail("", &e))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    files.retain(|p| p.extension().is_some_and(|e| e == "safetensors"));
    files.sort();
    for file in files {
        // The loader takes every file of tensors in the folder.
        let headers = qrmc_frontends::hf::headers(&file)?;
        tensors.extend(headers.into_iter().map(|(name, dtype, shape)| (name, (dtype, shape))));
    }
    let compute = match config.get("torch_dtype").or_else(|| config.get("dtype")).and_then(Value::as_str) {
        Some("float16") => ScaleType::F16,
        _ => ScaleType::BF16,
    };
    faults.extend(ascend::faults(description, &tensors, (&source, compute), &args.tp));
    Ok(faults)
}

/// The first fault, and how many there are.
pub(crate) fn refuse(runtime: &Runtime, faults: Vec<Fault>) -> Result<(), Failure> {
    let Some(first) = faults.first() else { return Ok(()) };
    let more = if faults.len() > 1 { format!(" (and {} more)", faults.len() - 1) } else { String::new() };
    let what = format!("{} {} would refuse it: {}{more}", runtime.name, runtime.version, first.what);
    Err(Failure::new(ILLEGAL, what).hint(first.hint.clone()))
}

/// The export format of an opened checkpoint.
fn format(model: &Model) -> Result<&'static str, Failure> {
    if model.manifest.is_some() {
        return Err(Failure::usage(format!(
            "{} is an artefact, which no other runtime loads",
            model.path.display()
        ))
        .hint("export it first: `qrmc export --format NAME`"));
    }
    if model.path.is_file() {
        return Ok("gguf");
    }
    Ok(model.quantization.as_ref().map_or("fake", |q| q.format))
}

fn view(packed: &Module, source: &Module) -> Result<View, Failure> {
    Ok(View::through(packed, source, &|op| rounds(op) || matches!(op, Op::ModeMul { .. }))?)
}

/// Refuses a compile for a runtime that would load its result in no format. `packed` is the materialised module as it
/// will be, `source` the float one.
pub(crate) fn preflight(
    runtime: &Runtime,
    packed: &Module,
    source: &Module,
    ranks: &[u32],
) -> Result<(), Failure> {
    let view = view(packed, source)?;
    let quantized = view.linears().next().is_some();
    let formats = runtime.formats.iter().filter(|f| quantized != (**f == "fake"));
    match formats.map(|f| runtime.faults(&view, f, ranks)).min_by_key(Vec::len) {
        Some(faults) => refuse(runtime, faults),
        None => Ok(()),
    }
}
