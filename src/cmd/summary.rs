//! What `compile` says at the end.

use std::time::Duration;

use qrmc_lowering::artefact::Manifest;
use qrmc_lowering::materialize::TensorLoss;
use qrmc_passes::{Event, Gap, LayerLoss, PassReport, Preserves};
use qrmc_runtime::parity::Parity;
use serde_json::{Value, json};

use super::check;
use crate::calib;
use crate::memory::show_bytes;
use crate::ui::{Ui, table};

/// Everything that was measured.
pub(crate) struct Summary {
    pub(crate) output: String,
    pub(crate) model: String,
    pub(crate) source_bytes: u64,
    pub(crate) reports: Vec<PassReport>,
    /// Losses by pass.
    pub(crate) losses: Vec<(String, LayerLoss)>,
    /// What passes met besides, by pass.
    pub(crate) events: Vec<(String, Event)>,
    pub(crate) rounding: Vec<TensorLoss>,
    pub(crate) flops: f64,
    pub(crate) time: Duration,
    pub(crate) calibration_time: Duration,
    pub(crate) peak: u64,
    pub(crate) planned: u64,
    pub(crate) text: Option<calib::Report>,
    pub(crate) fake: bool,
    /// Whether it is a block of a decoder, which gives no logits for tokens.
    pub(crate) block: bool,
    /// How far the artefact is from the compiled graph, if that was measured.
    pub(crate) written: Option<Gap>,
    /// Kernels against the reference, if they were compared.
    pub(crate) parity: Option<Parity>,
}

/// Stored bits of the quantized weights, and how many weights that are.
fn quantized_bits(m: &Manifest) -> (f64, f64) {
    let (mut bits, mut weights) = (0.0, 0.0);
    for (name, t) in &m.tensors {
        let Some(base) = name.strip_suffix(".codes") else { continue };
        let Ok(ty) = qrmc_ir::parse_type(&t.ty) else { continue };
        weights += ty.shape.as_fixed().map_or(0, |s| s.iter().product::<usize>()) as f64;
        bits += 8.0 * t.bytes as f64;
        for side in [".scale", ".zero"] {
            bits += m.tensors.get(&format!("{base}{side}")).map_or(0.0, |t| 8.0 * t.bytes as f64);
        }
    }
    (bits, weights)
}

/// `3.2 s`, `4 min 10 s`
pub(crate) fn show_time(seconds: f64) -> String {
    if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else if seconds < 3600.0 {
        format!("{} min {:02} s", (seconds / 60.0) as u64, seconds as u64 % 60)
    } else {
        format!("{} h {:02} min", (seconds / 3600.0) as u64, (seconds / 60.0) as u64 % 60)
    }
}

impl Summary {
    fn rate(&self) -> Option<f64> {
        let s = self.calibration_time.as_secs_f64();
        (self.flops > 0.0 && s > 0.0).then(|| self.flops / s / 1e9)
    }

    pub(crate) fn json(&self, m: &Manifest) -> Value {
        let (bits, weights) = quantized_bits(m);
        let stored: u64 = m.tensors.values().map(|t| t.bytes).sum();
        json!({
            "output": self.output,
            "source": m.source,
            "bits_per_weight": if weights > 0.0 { Some(bits / weights) } else { None },
            "quantized_weights": weights,
            "bytes": stored,
            "source_bytes": self.source_bytes,
            "passes": self.reports.iter().map(|r| json!({
                "pass": r.pass,
                "gap": r.gap.map(|g| g.relative),
                "seconds": r.time.as_secs_f64(),
            })).collect::<Vec<_>>(),
            "losses": self.losses.iter().map(|(pass, l)| json!({
                "pass": pass, "layer": l.layer, "what": l.what, "before": l.before, "after": l.after,
            })).collect::<Vec<_>>(),
            "events": self.events.iter().map(|(pass, e)| json!({
                "pass": pass, "layer": e.layer, "what": e.what, "text": e.text,
            })).collect::<Vec<_>>(),
            "rounding": self.rounding.iter().map(|l| json!({ "tensor": l.name, "relative": l.relative }))
                .collect::<Vec<_>>(),
            "calibration": self.text.as_ref().map(calib::Report::json),
            "artefact_gap": self.written.map(|g| g.relative),
            "parity": self.parity.as_ref().map(check::parity_json),
            "gflops": self.rate(),
            "seconds": self.time.as_secs_f64(),
            "peak_bytes": self.peak,
            "planned_bytes": self.planned,
        })
    }

    pub(crate) fn show(&self, ui: &Ui, m: &Manifest) {
        let (bits, weights) = quantized_bits(m);
        let stored: u64 = m.tensors.values().map(|t| t.bytes).sum();
        ui.out(&format!("{} -> {}/", self.model, self.output));
        if weights > 0.0 {
            ui.out(&format!(
                "  bits per weight  {:.3} over {:.1} M quantized weights",
                bits / weights,
                weights / 1e6
            ));
        }
        let share = 100.0 * stored as f64 / self.source_bytes.max(1) as f64;
        ui.out(&format!(
            "  size             {} ({share:.0} % of the source's {})",
            show_bytes(stored),
            show_bytes(self.source_bytes)
        ));
        if let Some(text) = &self.text {
            ui.out(&format!("  calibration      {}", text.description));
        }
        let rate = self.rate().map(|r| format!(", {r:.0} GFLOP/s in calibration")).unwrap_or_default();
        ui.out(&format!(
            "  time and memory  {}{rate}; {} private at most, {} planned",
            show_time(self.time.as_secs_f64()),
            show_bytes(self.peak),
            show_bytes(self.planned)
        ));
        ui.out("");
        self.show_passes(ui);
        self.show_losses(ui);
        self.show_events(ui);
        ui.out("next:");
        if self.fake {
            ui.out(&format!(
                "  load {}/ with transformers: it is an ordinary checkpoint in bf16",
                self.output
            ));
            return;
        }
        if self.block {
            ui.out(&format!("  qrmc export {} --format onnx", self.output));
            ui.out(&format!("  qrmc inspect {}", self.output));
            return;
        }
        ui.out(&format!("  qrmc eval {} --task wikitext2 --against {}", self.output, self.model));
        ui.out(&format!("  qrmc generate {} --prompt 'What is 12 + 30?'", self.output));
        ui.out(&format!("  qrmc inspect {}", self.output));
    }

    fn show_passes(&self, ui: &Ui) {
        let results = if self.block { "results" } else { "logits" };
        let mut rows: Vec<Vec<String>> = self
            .reports
            .iter()
            .map(|r| {
                let kept = match (r.gap, r.preserves) {
                    (Some(g), _) if g.absolute == 0.0 => "same graph without quantizers".into(),
                    (Some(g), _) => format!("{results} within {:.1e}", g.relative),
                    (None, Preserves::Lossy) => "rounds".into(),
                    (None, _) => "not checked".into(),
                };
                vec![r.pass.split('{').next().unwrap_or("").to_owned(), show_time(r.time.as_secs_f64()), kept]
            })
            .collect();
        if let Some(g) = self.written {
            rows.push(vec![
                "artefact".into(),
                String::new(),
                format!("{results} within {:.1e} of the graph", g.relative),
            ]);
        }
        if let Some(p) = &self.parity {
            let steps: u64 = p.kinds.iter().map(|k| k.steps).sum();
            let gap = p.kinds.iter().map(|k| k.gap).fold(0.0, f64::max);
            let rest = match p.left_out {
                0 => String::new(),
                n => format!("; {n} large ones not compared, see `qrmc check --parity`"),
            };
            let text =
                format!("{steps} steps: equal integers, floats within {gap:.1e} of the interpreter{rest}");
            rows.push(vec!["kernels".into(), String::new(), text]);
        }
        ui.out(&table(&["pass", "time", "kept"], &rows));
        ui.out("");
    }

    /// What passes met, the first lines of it.
    fn show_events(&self, ui: &Ui) {
        const SHOWN: usize = 12;
        if self.events.is_empty() {
            return;
        }
        ui.out(&format!("events: {}", self.events.len()));
        for (pass, e) in self.events.iter().take(SHOWN) {
            ui.out(&format!("  {pass}, layer {}, {}: {}", e.layer, e.what, e.text));
        }
        if self.events.len() > SHOWN {
            ui.out(&format!("  and {} more; --json lists all", self.events.len() - SHOWN));
        }
        ui.out("");
    }

    /// For each layer, what is left of each loss.
    fn show_losses(&self, ui: &Ui) {
        let output = "squared error of the output";
        let rounding = "rounding to nearest alone";
        for (pass, what, before) in [
            ("scale", output, rounding),
            (
                "affine",
                "squared error of the layer over the square of its output",
                "the transforms before training",
            ),
            ("clip-search", output, rounding),
            ("gptq", "squared error of the output over the square of the output", rounding),
        ] {
            let of: Vec<&LayerLoss> = self.losses.iter().filter(|(p, _)| p == pass).map(|(_, l)| l).collect();
            let mut whats: Vec<&str> = Vec::new();
            for l in &of {
                if !whats.contains(&l.what.as_str()) {
                    whats.push(&l.what);
                }
            }
            let layers = of.iter().map(|l| l.layer + 1).max().unwrap_or(0);
            let rows: Vec<Vec<String>> = (0..layers)
                .map(|i| {
                    let cell = |what: &&str| {
                        let l = of.iter().find(|l| l.layer == i && l.what == **what);
                        l.map_or(String::new(), |l| {
                            // Inputs that are all 0 leave no error to compare with.
                            let share = if l.before > 0.0 { 100.0 * l.after / l.before } else { 100.0 };
                            let from = if whats.len() == 1 {
                                format!("{:.3e} -> ", l.before)
                            } else {
                                String::new()
                            };
                            format!("{from}{:.3e} ({share:.0} %)", l.after)
                        })
                    };
                    std::iter::once(i.to_string()).chain(whats.iter().map(cell)).collect()
                })
                .collect();
            if rows.is_empty() {
                continue;
            }
            ui.out(&format!("{pass}: {what}, and its share of that of {before}"));
            let mut head = vec!["layer"];
            head.extend(&whats);
            ui.out(&table(&head, &rows));
            ui.out("");
        }
        if self.losses.is_empty() && !self.rounding.is_empty() {
            let worst = self.rounding.iter().max_by(|a, b| a.relative.total_cmp(&b.relative));
            let mean = self.rounding.iter().map(|l| l.relative).sum::<f64>() / self.rounding.len() as f64;
            if let Some(w) = worst {
                ui.out(&format!(
                    "rounding error relative to the weights: {:.4} on average, {:.4} at most in {}",
                    mean, w.relative, w.name
                ));
                ui.out("");
            }
        }
    }
}
