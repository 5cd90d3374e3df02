//! `qrmc opt`: passes on a graph, printed.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use qrmc_frontends::Integers;
use qrmc_ir::{
    Elem, Module, RawWeight, Tensor, TensorType, WeightError, WeightSource, parse, print, print_func, verify,
};
use qrmc_passes::{LayerLoss, Manager, NoStore, PassCx, Report, Unit};

use super::compile::print_after;
use super::recipe;
use crate::cli::OptArgs;
use crate::fail::{FAILURE, Failure};
use crate::model;
use crate::ui::Ui;

/// Reports nothing.
pub(crate) struct Silent;

impl Report for Silent {
    fn progress(&mut self, _: &str, _: usize, _: usize, _: &str) {}
    fn loss(&mut self, _: &str, _: LayerLoss) {}
    fn flops(&mut self, _: &str, _: f64) {}
}

/// Weights made from a seed and their names, for graphs that come without any.
pub(crate) struct Seeded {
    types: std::collections::HashMap<String, TensorType>,
    seed: u64,
}

impl Seeded {
    pub(crate) fn new(module: &Module, seed: u64) -> Self {
        Seeded { types: module.weights().iter().map(|w| (w.name.clone(), w.ty.clone())).collect(), seed }
    }
}

impl WeightSource for Seeded {
    fn raw(&self, name: &str) -> Result<RawWeight<'_>, WeightError> {
        let Some(ty) = self.types.get(name) else { return Err(WeightError::new(name, "is not declared")) };
        let Some(shape) = ty.shape.as_fixed() else {
            return Err(WeightError::new(name, "its shape is not fixed"));
        };
        let n: usize = shape.iter().product();
        let hash = qrmc_ir::Hash::of([name.as_bytes(), &self.seed.to_le_bytes()]);
        let seed = hash.0.iter().take(8).fold(0u64, |a, &b| a << 8 | u64::from(b));
        let fan_in = shape.last().copied().unwrap_or(1).max(1) as f32;
        // Vectors stay away from zero: they may be divisors.
        let value = |r: i32| {
            let unit = r as f32 / 32768.0 - 1.0;
            if shape.len() == 1 { 1.0 + 0.5 * unit } else { unit * (3.0 / fan_in).sqrt() }
        };
        let draws = qrmc_passes::seeded_tokens(seed, n, 65536);
        let draws = draws.as_i32().unwrap_or(&[]);
        let bytes = match ty.elem {
            Elem::Quant(_) | Elem::U8 | Elem::I8 => {
                let bytes = ty.bytes().unwrap_or(0);
                (0..bytes).map(|i| draws[i % draws.len().max(1)] as u8).collect()
            }
            elem => Tensor::f32(shape.clone(), draws.iter().map(|&r| value(r)).collect())
                .to_le_bytes(elem)
                .map_err(|e| WeightError::new(name, e))?,
        };
        Ok(RawWeight { ty: ty.clone(), bytes: bytes.into() })
    }
}

/// Reads a graph: a `.qir` file, standard input, or the graph of a model.
pub(crate) fn read_graph(
    path: &Path,
    integers: Integers,
) -> Result<(Module, Option<Arc<dyn WeightSource>>), Failure> {
    let io = |e: std::io::Error| Failure::new(FAILURE, format!("{}: cannot read: {e}", path.display()));
    let text = if path.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(io)?;
        text
    } else if path.extension().is_some_and(|e| e == "qir") {
        std::fs::read_to_string(path).map_err(io)?
    } else {
        let model = model::open_as(path, &qrmc_runtime::engine::CpuEngine::new(1)?, integers)?;
        return Ok((model.module, Some(model.weights)));
    };
    let module = parse(&text).map_err(|d| {
        let mut f = Failure::from(d);
        f.message = format!("{}: {}", path.display(), f.message);
        f
    })?;
    Ok((module, None))
}

/// All faults of a module as one failure.
pub(crate) fn faults(faults: Vec<qrmc_ir::Diag>) -> Failure {
    let n = faults.len();
    let mut it = faults.into_iter();
    let mut first = it.next().map_or_else(|| Failure::new(FAILURE, "no fault"), Failure::from);
    for d in it {
        first.message += &format!("\nerror[{}]: {}\n  --> {}", d.code, d.message, d.place);
    }
    if n > 1 {
        first.message += &format!("\n{n} faults");
    }
    first
}

pub(crate) fn run(args: &OptArgs, ui: &Ui) -> Result<(), Failure> {
    let integers = if args.pass.is_empty() { Integers::Keep } else { Integers::Dequantize };
    let (module, weights) = read_graph(&args.input, integers)?;
    verify(&module).map_err(faults)?;
    let pipeline = if args.pass.is_empty() {
        qrmc_passes::Pipeline::default()
    } else {
        recipe::pipeline(&args.pass, &args.tp)?
    };
    let weights = weights.unwrap_or_else(|| Arc::new(Seeded::new(&module, args.seed)));
    let engine = super::engine(&args.machine)?;
    let mut unit = Unit::new(module, weights);
    let mut silent = Silent;
    let mut cx = PassCx {
        engine: &engine,
        calibration: None,
        store: Arc::new(NoStore),
        source_key: String::new(),
        report: &mut silent,
    };
    let mut after = |pass: &str, module: &Module| print_after(ui, args.print_after.as_deref(), pass, module);
    let mut manager = Manager { check: args.check, seed: args.seed, after: &mut after };
    let reports = manager.run(&mut unit, &pipeline, &mut cx)?;
    let results = if unit.module.lacks().is_some() { "results" } else { "logits" };
    for r in &reports {
        if let Some(g) = r.gap {
            ui.note(&format!("{}: {results} within {:.2e}", r.pass, g.relative));
        }
    }
    let text = match &args.func {
        None => print(&unit.module),
        Some(name) => match unit.module.find_func(name) {
            Some(f) => print_func(&unit.module, unit.module.func(f)),
            None => return Err(Failure::usage(format!("there is no function @{name}"))),
        },
    };
    if ui.json() {
        ui.object(&serde_json::json!({ "ir": text }));
    } else {
        ui.out(text.trim_end());
    }
    Ok(())
}
