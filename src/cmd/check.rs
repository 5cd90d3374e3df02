//! `qrmc check`.

use qrmc_ir::{EngineError, Tensor};
use qrmc_runtime::parity::{BOUND, Parity};
use qrmc_runtime::session::Session;
use serde_json::json;

use crate::cli::CheckArgs;
use crate::fail::{Failure, GATE};
use crate::model::{self, Model};
use crate::ui::Ui;

pub(crate) fn run(args: &CheckArgs, ui: &Ui) -> Result<(), Failure> {
    let engine = super::engine(&args.machine)?;
    let model = model::open(&args.model, &engine)?;
    if !args.parity {
        return Err(Failure::usage("nothing to check was named").hint("give --parity"));
    }
    let session = Session::load(&engine, &model.module, &*model.weights)?;
    let parity = parity(&model, &session, args.tokens, args.seed)?;
    if ui.json() {
        let kinds: Vec<_> = parity
            .0
            .iter()
            .map(|k| {
                json!({
                    "kernel": k.kernel, "steps": k.steps, "integers": k.integers, "unequal": k.unequal,
                    "gap": k.gap,
                })
            })
            .collect();
        ui.object(&json!({ "holds": parity.holds(), "bound": BOUND, "kernels": kinds }));
    } else {
        ui.out("kernel            steps     integers  unequal  largest float gap");
        for k in &parity.0 {
            ui.out(&format!(
                "{:<16} {:>6} {:>12} {:>8}  {:.1e}",
                k.kernel, k.steps, k.integers, k.unequal, k.gap
            ));
        }
    }
    if parity.holds() {
        return Ok(());
    }
    let bad: Vec<&str> = parity
        .0
        .iter()
        .filter(|k| k.unequal > 0 || k.gap.is_nan() || k.gap > BOUND)
        .map(|k| k.kernel.as_str())
        .collect();
    Err(Failure::new(GATE, format!("kernels differ from the reference interpreter: {}", bad.join(", "))))
}

/// Runs a few seeded tokens and then two more, each alone, and compares every step.
pub(crate) fn parity(model: &Model, session: &Session, tokens: usize, seed: u64) -> Result<Parity, Failure> {
    let vocab = model.module.facts.vocab.max(1);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut ids = |n: usize| {
        let mut id = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % vocab) as i32
        };
        Tensor::i32([1, n], (0..n).map(|_| id()).collect())
    };
    let mut parity = Parity::default();
    let mut caches = session.caches(1, tokens + 2);
    for n in [tokens, 1, 1] {
        let mut watch =
            |step: &qrmc_lowering::Step, ins: &[Tensor], outs: &[Tensor]| -> Result<(), EngineError> {
                parity.compare(&model.module, step, ins, outs)
            };
        session.watched(&ids(n), &mut caches, &mut watch)?;
    }
    Ok(parity)
}
