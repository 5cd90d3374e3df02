//! `qrmc check`.

mod onnx;
mod target;

pub(crate) use target::{preflight, refuse, runtime};

use qrmc_runtime::parity::{BOUND, Extent, KindParity, Parity};
use serde_json::{Value, json};

use crate::cli::CheckArgs;
use crate::fail::{Failure, GATE};
use crate::model;
use crate::ui::Ui;

pub(crate) fn run(args: &CheckArgs, ui: &Ui) -> Result<(), Failure> {
    if let Some(name) = &args.target {
        if args.parity {
            return Err(
                Failure::usage("--parity and --target check different things").hint("give one of them")
            );
        }
        return target::run(args, target::find(name)?, ui);
    }
    if !args.parity {
        return Err(Failure::usage("nothing to check was named").hint("give --parity or --target"));
    }
    let engine = super::engine(&args.machine)?;
    let model = model::open(&args.model, &engine)?;
    model.tell(ui);
    let parity =
        Parity::of_model(&engine, &model.module, &*model.weights, args.tokens, args.seed, Extent::ALL)?;
    if ui.json() {
        ui.object(&parity_json(&parity));
    } else {
        ui.out("kernel            steps     integers  unequal  largest float gap");
        for k in &parity.kinds {
            ui.out(&format!(
                "{:<16} {:>6} {:>12} {:>8}  {:.1e}",
                k.kernel, k.steps, k.integers, k.unequal, k.gap
            ));
        }
    }
    if parity.holds() {
        return Ok(());
    }
    Err(broken(&parity))
}

/// What `--json` says of a comparison.
pub(crate) fn parity_json(parity: &Parity) -> Value {
    let kind = |k: &KindParity| {
        json!({
            "kernel": k.kernel, "steps": k.steps, "integers": k.integers, "unequal": k.unequal, "gap": k.gap,
        })
    };
    let kinds: Vec<Value> = parity.kinds.iter().map(kind).collect();
    json!({ "holds": parity.holds(), "bound": BOUND, "left_out": parity.left_out, "kernels": kinds })
}

/// That kernels differ from the reference.
pub(crate) fn broken(parity: &Parity) -> Failure {
    let kernels = parity.broken().join(", ");
    Failure::new(GATE, format!("kernels differ from the reference interpreter: {kernels}")).hint(
        "this is a bug of qrmc on this machine: report it with the output of `qrmc check --parity --json`",
    )
}
