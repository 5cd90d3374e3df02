//! What other runtimes load: their rules on schemes, shapes, modules that run as one, and ranks, replayed without them.

mod runtimes;

use std::collections::HashMap;

use qrmc_ir::Grain;

use super::{Entry, HEAD, Linear, View};

pub use runtimes::RUNTIMES;

/// A runtime of one version.
pub struct Runtime {
    /// Name on the command line.
    pub name: &'static str,
    /// The versions that the rules were read from.
    pub version: &'static str,
    /// Export formats that it loads.
    pub formats: &'static [&'static str],
    /// Files of a folder in which it looks for the settings of codes.
    pub settings: &'static [&'static str],
    check: fn(&Case<'_>) -> Vec<Fault>,
}

/// What a runtime would refuse.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fault {
    /// What was seen, and where.
    pub what: String,
    /// What to do.
    pub hint: String,
}

impl Fault {
    pub(super) fn new(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Fault { what: what.into(), hint: hint.into() }
    }
}

/// A checkpoint in a format, for a number of ranks.
struct Case<'a> {
    view: &'a View,
    format: &'a str,
    ranks: u64,
}

impl Runtime {
    /// That it does not load a format, if it does not.
    pub fn unread(&self, format: &str) -> Option<Fault> {
        let what = format!("{} {} does not load the format {format}", self.name, self.version);
        let fault = Fault::new(what, format!("it loads {}", self.formats.join(", ")));
        (!self.formats.contains(&format)).then_some(fault)
    }

    /// That it does not look into the file that says how a folder's weights are stored as codes, if it does not.
    pub fn unsaid(&self, file: &str) -> Option<Fault> {
        let what = format!(
            "the settings of its codes are in {file}, which it does not read; it takes the weights for floats"
        );
        let fault = Fault::new(what, "put them into config.json, as `quantization_config`");
        (!self.settings.contains(&file)).then_some(fault)
    }

    /// Everything that this runtime would refuse of a checkpoint in a format, for each number of ranks.
    pub fn faults(&self, view: &View, format: &str, ranks: &[u32]) -> Vec<Fault> {
        if let Some(fault) = self.unread(format) {
            return vec![fault];
        }
        let mut all: Vec<Fault> = Vec::new();
        for &ranks in if ranks.is_empty() { &[1] } else { ranks } {
            let found = (self.check)(&Case { view, format, ranks: u64::from(ranks.max(1)) });
            all.extend(found.into_iter().filter(|f| !all.contains(f)).collect::<Vec<_>>());
        }
        all
    }
}

/// Linear layers that run as one module.
const FUSED: [&[&str]; 2] =
    [&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], &["mlp.gate_proj", "mlp.up_proj"]];

/// The layers that run as one module and differ in what `of` says of them by name: of each module the first two.
pub(super) fn differing<T: PartialEq>(layers: u64, of: impl Fn(&str) -> T) -> impl Iterator<Item = String> {
    (0..layers).flat_map(|i| FUSED.map(|parts| (i, parts))).filter_map(move |(i, parts)| {
        let of = |part: &str| of(&format!("model.layers.{i}.{part}"));
        let first = of(parts[0]);
        let other = parts[1..].iter().find(|p| of(p) != first)?;
        Some(format!("model.layers.{i}: {} and {other}", parts[0]))
    })
}

/// Along which axis a linear layer is cut for ranks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Cut {
    /// Each rank has some of the outputs.
    Outputs,
    /// Each rank has some of the inputs.
    Inputs,
    /// Every rank has all of it.
    Whole,
}

fn cut(l: &Linear) -> Cut {
    match l.name.rsplit('.').next() {
        Some("q_proj" | "k_proj" | "v_proj" | "gate_proj" | "up_proj") => Cut::Outputs,
        Some("o_proj" | "down_proj") => Cut::Inputs,
        _ => Cut::Whole,
    }
}

impl Case<'_> {
    /// The first linear layer of a block that stays in floats.
    fn float_layer(&self) -> Option<String> {
        let parts = FUSED.into_iter().flatten().copied().chain(["self_attn.o_proj", "mlp.down_proj"]);
        let ends: Vec<String> = parts.map(|p| format!(".{p}.weight")).collect();
        self.view.entries.iter().find_map(|e| match e {
            Entry::Plain { plan, .. } if ends.iter().any(|end| plan.name.ends_with(end)) => {
                Some(plan.name.strip_suffix(".weight").unwrap_or(&plan.name).to_owned())
            }
            _ => None,
        })
    }

    fn fault(&self, what: String, hint: impl Into<String>) -> Fault {
        let ranks = if self.ranks == 1 { String::new() } else { format!(" at {} ranks", self.ranks) };
        Fault::new(format!("{what}{ranks}"), hint)
    }

    /// Outputs and inputs of a layer on one rank; `None` where ranks do not divide them.
    fn shard(&self, l: &Linear) -> Option<(usize, usize)> {
        let f = &self.view.facts;
        let ranks = match l.name.rsplit('.').next() {
            // Where there are more ranks than key heads, ranks share one.
            Some("k_proj" | "v_proj") => self.ranks.min(f.kv_heads),
            _ => self.ranks,
        } as usize;
        match cut(l) {
            Cut::Outputs => l.rows.is_multiple_of(ranks).then(|| (l.rows / ranks, l.cols)),
            Cut::Inputs => l.cols.is_multiple_of(ranks).then(|| (l.rows, l.cols / ranks)),
            Cut::Whole => Some((l.rows, l.cols)),
        }
    }

    /// Heads and sizes that ranks do not divide.
    fn heads(&self) -> Vec<Fault> {
        let (f, n) = (&self.view.facts, self.ranks);
        let mut out = Vec::new();
        if !f.heads.is_multiple_of(n) {
            out.push(
                self.fault(
                    format!("{} query heads are not divided", f.heads),
                    "choose ranks that divide them",
                ),
            );
        }
        if !f.kv_heads.is_multiple_of(n) && !n.is_multiple_of(f.kv_heads) {
            let what = format!("{} key heads are neither divided nor shared", f.kv_heads);
            out.push(self.fault(what, "choose ranks that divide them, or a multiple of them"));
        }
        if !f.intermediate.is_multiple_of(n) {
            let what = format!("the intermediate size {} is not divided", f.intermediate);
            out.push(self.fault(what, "choose ranks that divide it"));
        }
        out
    }

    /// Parts of one module with different schemes.
    fn fused(&self) -> Vec<Fault> {
        let schemes: HashMap<&str, _> =
            self.view.linears().map(|l| (l.name.as_str(), (l.spec(), l.input.spec))).collect();
        let apart = differing(self.view.facts.layers, |name| schemes.get(name));
        let fault = |parts| {
            let what = format!("{parts} run as one module and have different schemes");
            Fault::new(what, "give q, k and v, and gate and up, the same scheme")
        };
        apart.map(fault).collect()
    }

    /// Groups that do not divide the inputs of a rank.
    fn groups(&self) -> Vec<Fault> {
        let mut out = Vec::new();
        for l in self.view.linears().filter(|l| matches!(l.spec().grain, Grain::Group(_))) {
            match self.shard(l) {
                Some((_, cols)) if cols.is_multiple_of(l.group()) => {}
                Some((_, cols)) => {
                    let what = format!(
                        "{}: groups of {} do not divide the {cols} inputs of a rank",
                        l.name,
                        l.group()
                    );
                    let fits = [128, 64, 32].into_iter().find(|g| *g < l.group() && cols.is_multiple_of(*g));
                    let hint = match fits {
                        Some(g) => format!("compile with group={g}, or for other ranks"),
                        None => "compile with group=row, or for other ranks".to_owned(),
                    };
                    out.push(self.fault(what, hint));
                }
                None => {
                    out.push(self.fault(
                        format!("{}: {} inputs are not divided", l.name, l.cols),
                        "choose other ranks",
                    ))
                }
            }
        }
        out
    }

    /// Outputs of a rank that do not fill words along the outputs, inputs those along the inputs.
    fn words(&self, outputs: usize, inputs: usize) -> Vec<Fault> {
        let mut out = Vec::new();
        for l in self.view.linears() {
            let Some((rows, cols)) = self.shard(l) else { continue };
            for (n, per, what) in [(rows, outputs, "outputs"), (cols, inputs, "inputs")] {
                if !n.is_multiple_of(per.max(1)) {
                    let what = format!(
                        "{}: {n} {what} of a rank; {} asks for multiples of {per}",
                        l.name, self.format
                    );
                    out.push(self.fault(what, "choose other ranks, or another format"));
                }
            }
        }
        out
    }

    /// Linear layers that `bad` says something of.
    fn each(&self, bad: impl Fn(&Linear) -> Option<(String, &'static str)>) -> Vec<Fault> {
        let fault = |l: &Linear| bad(l).map(|(what, hint)| Fault::new(format!("{}: {what}", l.name), hint));
        self.view.linears().filter_map(fault).collect()
    }

    /// A head with codes.
    fn head(&self) -> Vec<Fault> {
        self.each(|l| {
            (l.name == HEAD)
                .then(|| ("the head has codes, which it takes for floats".into(), "compile with head=16"))
        })
    }
}
