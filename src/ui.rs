//! Who may print what: data on stdout, progress and notes on stderr, and nothing but data for `--json`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the one file that prints")]

use std::cell::RefCell;
use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use crate::fail::Failure;
use crate::settings;

/// The way out.
pub(crate) struct Ui {
    json: bool,
    color: bool,
    bar: RefCell<Option<ProgressBar>>,
    /// The last object, which an error may still join.
    last: RefCell<Option<Value>>,
}

impl Ui {
    pub(crate) fn new(json: bool) -> Self {
        let color = std::io::stderr().is_terminal() && !settings::no_color();
        Ui { json, color, bar: RefCell::new(None), last: RefCell::new(None) }
    }

    /// Whether the output is for machines.
    pub(crate) fn json(&self) -> bool {
        self.json
    }

    /// A line of data. A closed pipe ends the output quietly.
    pub(crate) fn out(&self, text: &str) {
        self.finish();
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    /// Data without a line end, shown at once.
    pub(crate) fn stream(&self, text: &str) {
        let mut out = std::io::stdout();
        let _ = write!(out, "{text}").and_then(|()| out.flush());
    }

    /// One JSON object. It is shown before what comes next, and at the end.
    pub(crate) fn object(&self, value: &Value) {
        self.finish();
        *self.last.borrow_mut() = Some(value.clone());
    }

    /// Shows what has not been shown yet.
    pub(crate) fn finish(&self) {
        self.clear();
        if let Some(value) = self.last.borrow_mut().take() {
            let _ = writeln!(std::io::stdout(), "{value:#}");
        }
    }

    /// A note for people.
    pub(crate) fn note(&self, text: &str) {
        self.clear();
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    /// Shows how far a long step is; gone when it is done, absent where there is no terminal.
    pub(crate) fn progress(&self, what: &str, done: usize, total: usize, note: &str) {
        let mut slot = self.bar.borrow_mut();
        let bar = slot.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
            let template = "{prefix} [{bar:24}] {pos}/{len}  {msg}  {elapsed} gone, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        if bar.prefix() != what || bar.length() != Some(total as u64) {
            bar.reset();
            bar.set_prefix(what.to_owned());
            bar.set_length(total as u64);
        }
        bar.set_message(note.to_owned());
        bar.set_position(done as u64);
        if done >= total {
            drop(slot);
            self.clear();
        }
    }

    /// Takes the progress line away.
    pub(crate) fn clear(&self) {
        if let Some(bar) = self.bar.borrow_mut().take() {
            bar.finish_and_clear();
        }
    }

    /// Reports a failure; for machines in the object of the results, if there is one.
    pub(crate) fn fail(&self, f: &Failure) {
        if self.json {
            let error = json!({ "exit": f.code, "code": f.id, "message": f.message, "hint": f.hint });
            let value = match self.last.take() {
                Some(Value::Object(mut results)) => {
                    results.insert("error".into(), error);
                    Value::Object(results)
                }
                other => {
                    self.last.replace(other);
                    json!({ "error": error })
                }
            };
            self.object(&value);
        }
        self.finish();
        let (red, cyan, off) =
            if self.color { ("\x1b[31;1m", "\x1b[36;1m", "\x1b[0m") } else { ("", "", "") };
        let code = f.id.map(|c| format!("[{c}]")).unwrap_or_default();
        let mut text = format!("{red}error{code}{off}: {}\n", f.message);
        if let Some(hint) = &f.hint {
            text += &format!("{cyan}hint{off}: {hint}\n");
        }
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
}

/// A table with aligned columns; numbers to the right.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (w, cell) in widths.iter_mut().zip(row) {
            *w = (*w).max(cell.chars().count());
        }
    }
    let numeric: Vec<bool> = (0..head.len())
        .map(|c| {
            let cells = rows.iter().filter_map(|r| r.get(c)).filter(|s| !s.is_empty());
            cells.clone().count() > 0
                && cells.clone().all(|s| s.starts_with(|c: char| c.is_ascii_digit() || c == '-'))
        })
        .collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut out = String::new();
        for (i, cell) in cells.enumerate() {
            let pad = " ".repeat(widths[i].saturating_sub(cell.chars().count()));
            let (before, after) = if numeric[i] { (pad.as_str(), "") } else { ("", pad.as_str()) };
            out += &format!("{}{before}{cell}{after}", if i > 0 { "  " } else { "" });
        }
        out.trim_end().to_owned()
    };
    let mut out = vec![line(&mut head.iter().copied())];
    out.extend(rows.iter().map(|r| line(&mut r.iter().map(String::as_str))));
    out.join("\n")
}
