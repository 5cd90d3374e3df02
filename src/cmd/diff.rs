//! `qrmc diff`: how two graphs differ.

use qrmc_frontends::Integers;
use qrmc_ir::{Module, print_func};
use serde_json::json;
use similar::{ChangeTag, TextDiff};

use super::opt::read_graph;
use crate::cli::DiffArgs;
use crate::fail::Failure;
use crate::ui::Ui;

/// What differs.
struct Difference {
    /// Lines with `+`, `-` or a blank in front.
    lines: Vec<String>,
    added: usize,
    removed: usize,
}

pub(crate) fn run(args: &DiffArgs, ui: &Ui) -> Result<(), Failure> {
    let (a, b) = (read_graph(&args.before, Integers::Keep)?.0, read_graph(&args.after, Integers::Keep)?.0);
    let mut out = Vec::new();
    out.push(("history", compare(&a.history.join("\n"), &b.history.join("\n"))));
    out.push(("weights", compare(&weights(&a), &weights(&b))));
    let mut names: Vec<&str> = a.funcs.iter().map(|f| f.name.as_str()).collect();
    names.extend(b.funcs.iter().map(|f| f.name.as_str()).filter(|n| a.find_func(n).is_none()));
    let text =
        |m: &Module, name: &str| m.find_func(name).map(|f| print_func(m, m.func(f))).unwrap_or_default();
    for name in names {
        out.push((name, compare(&text(&a, name), &text(&b, name))));
    }
    out.retain(|(_, d)| d.added + d.removed > 0);
    if ui.json() {
        let parts: Vec<_> = out
            .iter()
            .map(
                |(name, d)| json!({ "part": name, "added": d.added, "removed": d.removed, "lines": d.lines }),
            )
            .collect();
        ui.object(&json!({ "equal": out.is_empty(), "differences": parts }));
        return Ok(());
    }
    for (name, d) in &out {
        ui.out(&format!("{name}: {} lines added, {} removed", d.added, d.removed));
        ui.out(&d.lines.join("\n"));
        ui.out("");
    }
    if out.is_empty() {
        ui.out("the graphs are equal");
    }
    Ok(())
}

fn weights(m: &Module) -> String {
    m.weights().iter().map(|w| format!("@{} : {}\n", w.name, w.ty)).collect()
}

fn compare(a: &str, b: &str) -> Difference {
    let diff = TextDiff::from_lines(a, b);
    let mut d = Difference { lines: Vec::new(), added: 0, removed: 0 };
    for group in diff.grouped_ops(1) {
        for change in group.iter().flat_map(|op| diff.iter_changes(op)) {
            let sign = match change.tag() {
                ChangeTag::Insert => {
                    d.added += 1;
                    '+'
                }
                ChangeTag::Delete => {
                    d.removed += 1;
                    '-'
                }
                ChangeTag::Equal => ' ',
            };
            d.lines.push(format!("{sign} {}", change.value().trim_end_matches('\n')));
        }
    }
    d
}
