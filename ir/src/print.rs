//! The text form, out. `parse(print(m)) == m`.

use std::collections::HashMap;
use std::fmt::Write;

use crate::module::{Func, ModelFacts, Module, ValueId};
use crate::op::Op;

/// Version of the text form.
pub const VERSION: u32 = 1;

/// The text form of a module in normal form.
pub fn print(module: &Module) -> String {
    let mut s = format!("qir {VERSION}\n");
    facts(&mut s, &module.facts);
    for h in &module.history {
        let _ = writeln!(s, "applied \"{}\"", escape(h));
    }
    for w in module.weights() {
        let _ = writeln!(s, "weight @{} : {}", w.name, w.ty);
    }
    for f in &module.funcs {
        s.push('\n');
        func_into(&mut s, module, f, &mut |_, _| {});
    }
    s
}

/// The text form of one function.
pub fn print_func(module: &Module, func: &Func) -> String {
    let mut s = String::new();
    func_into(&mut s, module, func, &mut |_, _| {});
    s
}

/// For each function and node, the line of [`print()`]'s text that holds it, from 1.
pub fn node_lines(module: &Module) -> Vec<Vec<usize>> {
    let mut s = format!("qir {VERSION}\n");
    facts(&mut s, &module.facts);
    let mut line = s.lines().count() + module.history.len() + module.weights().len();
    module
        .funcs
        .iter()
        .map(|f| {
            let mut lines = vec![0; f.nodes.len()];
            let mut text = String::new();
            func_into(&mut text, module, f, &mut |node, at| lines[node] = at);
            // A blank line stands before each function; `at` counts from the line of `func`.
            lines.iter_mut().for_each(|l| *l += line + 2);
            line += 1 + text.lines().count();
            lines
        })
        .collect()
}

fn escape(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            '\r' => out.push_str("\\r"),
            c => out.push(c),
        }
    }
    out
}

fn facts(s: &mut String, f: &ModelFacts) {
    if *f == ModelFacts::default() {
        return;
    }
    if !f.arch.is_empty() {
        let _ = writeln!(s, "fact arch = {}", f.arch);
    }
    for (key, n) in [
        ("hidden", f.hidden),
        ("intermediate", f.intermediate),
        ("layers", f.layers),
        ("heads", f.heads),
        ("kv_heads", f.kv_heads),
        ("head_dim", f.head_dim),
        ("vocab", f.vocab),
        ("context", f.context),
    ] {
        let _ = writeln!(s, "fact {key} = {n}");
    }
    if let Some(bos) = f.bos {
        let _ = writeln!(s, "fact bos = {bos}");
    }
    let _ = writeln!(s, "fact eos = {:?}", f.eos);
}

fn func_into(s: &mut String, module: &Module, f: &Func, on_node: &mut dyn FnMut(usize, usize)) {
    let mut names: HashMap<ValueId, String> = HashMap::new();
    let mut next = 0usize;
    for v in f.value_ids() {
        let text = match (f.as_weight(v), &f.value(v).name) {
            (Some(w), None) => format!("@{}", module.weight(w).name),
            (_, Some(name)) => format!("%{name}"),
            (None, None) => {
                next += 1;
                format!("%{}", next - 1)
            }
        };
        names.insert(v, text);
    }
    let list = |vs: &[ValueId]| vs.iter().map(|v| names[v].as_str()).collect::<Vec<_>>().join(", ");
    let params =
        f.params.iter().map(|p| format!("{}: {}", names[p], f.ty(*p))).collect::<Vec<_>>().join(", ");
    let results = f.results.iter().map(|r| f.ty(*r).to_string()).collect::<Vec<_>>().join(", ");
    let _ = writeln!(s, "func @{}({params}) -> ({results}) {{", f.name);
    let mut line = 0;
    for (n, node) in f.nodes.iter().enumerate() {
        let (word, attrs) = node.op.text();
        let head = match &node.op {
            // Written where it is used, unless the value has a name of its own.
            Op::Weight(w) => {
                if f.value(node.outs[0]).name.is_none() {
                    on_node(n, line + 1);
                    continue;
                }
                format!("weight @{}", module.weight(*w).name)
            }
            Op::Call(c) => format!("call @{}", module.func(*c).name),
            _ => word.to_owned(),
        };
        line += 1;
        on_node(n, line);
        let _ = write!(s, "  {} = {head}", list(&node.outs));
        if !node.ins.is_empty() {
            let _ = write!(s, " {}", list(&node.ins));
        }
        if !attrs.is_empty() {
            let attrs = attrs.iter().map(|(k, v)| format!("{k} = {v}")).collect::<Vec<_>>().join(", ");
            let _ = write!(s, " {{{attrs}}}");
        }
        s.push('\n');
    }
    let _ = writeln!(s, "  return {}\n}}", list(&f.results));
}
