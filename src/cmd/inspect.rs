//! `qrmc inspect`.

use std::path::Path;

use qrmc_frontends::Integers;
use qrmc_ir::{Module, TensorType, print_func, verify};
use qrmc_lowering::lower_func;
use serde_json::json;

use super::opt::{faults, read_graph};
use crate::cli::InspectArgs;
use crate::fail::Failure;
use crate::memory::show_bytes;
use crate::model;
use crate::ui::{Ui, table};

pub(crate) fn run(args: &InspectArgs, ui: &Ui) -> Result<(), Failure> {
    let graph_only = args.model.extension().is_some_and(|e| e == "qir") || args.model.as_os_str() == "-";
    let (module, format, about) = if graph_only {
        (read_graph(&args.model, Integers::Keep)?.0, "graph".to_owned(), Vec::new())
    } else {
        let engine = qrmc_runtime::engine::CpuEngine::new(crate::settings::default_threads())?;
        let m = model::open(&args.model, &engine)?;
        m.tell(ui);
        let mut about: Vec<(&str, String)> = Vec::new();
        if let Some(man) = &m.manifest {
            about.push(("source", format!("{} ({})", man.source.name, man.source.format)));
            about.push(("source hash", man.source.hash.clone()));
            about.push(("written by", format!("qrmc {}", man.qrmc)));
        }
        about.push(("tokenizer", describe_tokenizer(&m)));
        (m.module, m.format, about)
    };
    verify(&module).map_err(faults)?;
    if let Some(name) = &args.ir {
        return show_funcs(&module, name, ui, &|f| Ok(print_func(&module, f)));
    }
    if let Some(name) = &args.program {
        return show_funcs(&module, name, ui, &|f| {
            Ok(lower_func(&module, f, &qrmc_lowering::Cpu)?.to_string())
        });
    }
    if ui.json() {
        return json_report(&module, &format, &about, ui);
    }
    let f = &module.facts;
    let what = if module.lacks().is_some() { "block of a " } else { "" };
    ui.out(&format!("{}: {format}, {what}{} decoder", show(&args.model), f.arch));
    let total: usize = module.weights().iter().map(|w| elements(&w.ty)).sum();
    let bytes: usize = module.weights().iter().filter_map(|w| w.ty.bytes()).sum();
    let vocab = if f.vocab == 0 { "none".to_owned() } else { f.vocab.to_string() };
    let mut rows = vec![
        ("layers", f.layers.to_string()),
        ("hidden, intermediate", format!("{}, {}", f.hidden, f.intermediate)),
        ("heads", format!("{} queries, {} keys and values, of {}", f.heads, f.kv_heads, f.head_dim)),
        ("vocabulary, context", format!("{vocab}, {}", f.context)),
        (
            "tensors",
            format!(
                "{} with {:.2} M elements in {}",
                module.weights().len(),
                total as f64 / 1e6,
                show_bytes(bytes as u64)
            ),
        ),
    ];
    for (ty, n, bytes) in by_type(&module) {
        rows.push(("", format!("{ty}: {n} tensors, {}", show_bytes(bytes as u64))));
    }
    rows.extend(about);
    for h in &module.history {
        rows.push(("pass", h.clone()));
    }
    for (key, value) in rows {
        ui.out(&format!("  {key:<22}{value}"));
    }
    if f.layers > 0 {
        let divides: Vec<String> = [128u64, 64, 32]
            .iter()
            .filter(|g| [f.hidden, f.heads * f.head_dim, f.intermediate].iter().all(|n| n % **g == 0))
            .map(ToString::to_string)
            .collect();
        let list =
            if divides.is_empty() { "none of 128, 64, 32; use group=row".into() } else { divides.join(", ") };
        ui.out(&format!("  {:<22}{list}", "groups that divide"));
    }
    if args.tensors {
        let rows: Vec<Vec<String>> =
            module.weights().iter().map(|w| vec![w.name.clone(), w.ty.to_string()]).collect();
        ui.out("");
        ui.out(&table(&["tensor", "type"], &rows));
    }
    Ok(())
}

fn describe_tokenizer(m: &model::Model) -> String {
    match m.tokenizer() {
        Ok(t) => {
            let chat = if t.chat().is_some() { "with a chat template" } else { "no chat template" };
            let bos = if t.adds_bos() { ", adds BOS" } else { "" };
            format!("{} tokens, {chat}{bos}", t.vocab_size())
        }
        Err(e) => format!("none: {}", e.message),
    }
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

fn elements(ty: &TensorType) -> usize {
    ty.shape.as_fixed().map_or(0, |s| s.iter().product())
}

fn by_type(module: &Module) -> Vec<(String, usize, usize)> {
    let mut out: Vec<(String, usize, usize)> = Vec::new();
    for w in module.weights() {
        let (ty, bytes) = (w.ty.elem.to_string(), w.ty.bytes().unwrap_or(0));
        match out.iter_mut().find(|(t, ..)| *t == ty) {
            Some(e) => {
                e.1 += 1;
                e.2 += bytes;
            }
            None => out.push((ty, 1, bytes)),
        }
    }
    out
}

fn show_funcs(
    module: &Module,
    name: &str,
    ui: &Ui,
    text: &dyn Fn(&qrmc_ir::Func) -> Result<String, Failure>,
) -> Result<(), Failure> {
    let mut found = false;
    for f in module.funcs.iter().filter(|f| name.is_empty() || f.name == name) {
        let text = text(f)?;
        if ui.json() {
            ui.object(&json!({ "func": f.name, "text": text }));
        } else {
            ui.out(text.trim_end());
        }
        found = true;
    }
    if found {
        return Ok(());
    }
    let known = module.funcs.iter().map(|f| f.name.as_str()).collect::<Vec<_>>().join(", ");
    Err(Failure::usage(format!("there is no function @{name}")).hint(format!("functions: {known}")))
}

fn json_report(module: &Module, format: &str, about: &[(&str, String)], ui: &Ui) -> Result<(), Failure> {
    let f = &module.facts;
    ui.object(&json!({
        "format": format,
        "arch": f.arch,
        "layers": f.layers, "hidden": f.hidden, "intermediate": f.intermediate,
        "heads": f.heads, "kv_heads": f.kv_heads, "head_dim": f.head_dim,
        "vocab": f.vocab, "context": f.context, "bos": f.bos, "eos": f.eos,
        "about": about.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect::<serde_json::Map<_, _>>(),
        "passes": module.history,
        "tensors": module.weights().iter().map(|w| json!({
            "name": w.name, "type": w.ty.to_string(), "bytes": w.ty.bytes(),
        })).collect::<Vec<_>>(),
    }));
    Ok(())
}
