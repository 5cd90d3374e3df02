//! The model card of an export: what it is, how it was made, and how it is loaded.

use std::path::PathBuf;

use qrmc_ir::Elem;
use serde_json::Value;

use crate::fail::{FAILURE, Failure};
use crate::model::Model;

/// What stands in the card.
pub(crate) struct Card {
    name: String,
    source: String,
    format: &'static str,
    summary: &'static str,
    schemes: Vec<(String, usize)>,
    pipeline: Vec<String>,
    recipe: Option<String>,
    evaluation: Vec<Value>,
}

impl Card {
    /// Gathers what is known of a model. `evaluation` are files that `qrmc eval --json` has printed.
    pub(crate) fn new(
        model: &Model,
        (format, summary): (&'static str, &'static str),
        evaluation: &[PathBuf],
    ) -> Result<Self, Failure> {
        let mut schemes: Vec<(String, usize)> = Vec::new();
        for w in model.module.weights() {
            let Elem::Quant(spec) = w.ty.elem else { continue };
            let scheme = spec.to_string();
            match schemes.iter_mut().find(|(s, _)| *s == scheme) {
                Some((_, n)) => *n += 1,
                None => schemes.push((scheme, 1)),
            }
        }
        let read = |path: &PathBuf| -> Result<Value, Failure> {
            let fail = |e: &dyn std::fmt::Display| {
                Failure::new(FAILURE, format!("{}: {e}", path.display()))
                    .hint("--evaluation takes what `qrmc eval --json` has printed")
            };
            serde_json::from_slice(&std::fs::read(path).map_err(|e| fail(&e))?).map_err(|e| fail(&e))
        };
        Ok(Card {
            name: model.name(),
            source: match &model.manifest {
                Some(m) => format!("{} ({}, BLAKE3 `{}`)", m.source.name, m.source.format, m.source.hash),
                None => format!("{} ({})", model.name(), model.format),
            },
            format,
            summary,
            schemes,
            pipeline: model.manifest.as_ref().map(|m| m.pipeline.clone()).unwrap_or_default(),
            recipe: std::fs::read_to_string(model.path.join("recipe.yaml")).ok(),
            evaluation: evaluation.iter().map(read).collect::<Result<_, _>>()?,
        })
    }

    /// The card in Markdown.
    pub(crate) fn text(&self, notes: &[String]) -> String {
        let mut t = String::new();
        let mut line = |s: &str| {
            t.push_str(s);
            t.push('\n');
        };
        line("---");
        line("tags:\n- quantized\n- qrmc");
        line("---");
        line(&format!("\n# {}, {}\n", self.name, self.format));
        line(&format!("Written by qrmc {} from {}.\n", env!("CARGO_PKG_VERSION"), self.source));
        line(&format!("Format: {} ({}).\n", self.format, self.summary));
        line("| matrices | scheme |\n|---|---|");
        for (scheme, n) in &self.schemes {
            line(&format!("| {n} | `{scheme}` |"));
        }
        for note in notes {
            line(&format!("\n{note}."));
        }
        if !self.pipeline.is_empty() {
            line("\n## Passes\n");
            for p in &self.pipeline {
                line(&format!("- `{p}`"));
            }
        }
        if let Some(recipe) = &self.recipe {
            line(&format!("\n## Recipe\n\n```yaml\n{}\n```", recipe.trim_end()));
        }
        if !self.evaluation.is_empty() {
            line("\n## Evaluation\n");
            for e in &self.evaluation {
                line(&format!("```json\n{e:#}\n```"));
            }
        }
        line("\nHashes of all tensors and files are in `manifest.json`.");
        t
    }
}
