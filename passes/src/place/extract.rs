//! Extraction: of all equal forms, the one with the fewest online operations; a shared value is paid once.

use std::collections::HashMap;

use egg::{EGraph, Id, Language};
use qrmc_ir::{Diag, TensorType};

use super::lang::{Facts, Lin, number};

/// Cost of a form: online floating-point operations a position, then the number of nodes.
#[derive(Clone, Copy, PartialEq, PartialOrd, Default, Debug)]
struct Cost {
    flops: f64,
    nodes: u32,
}

/// Elements, with every symbolic size counted as one position.
fn elements(ty: Option<&TensorType>) -> f64 {
    ty.map_or(0.0, |t| t.shape.0.iter().map(|d| d.fixed().unwrap_or(1) as f64).product())
}

/// What the node itself costs.
fn own_cost(g: &EGraph<Lin, Facts>, id: Id, node: &Lin) -> Cost {
    let out = &g[id].data;
    let size = elements(out.ty.as_ref());
    let flops = if out.weight {
        0.0
    } else {
        match node {
            Lin::Linear([x, _]) => 2.0 * size * g[*x].data.width().unwrap_or(1) as f64,
            Lin::Add(_) | Lin::Sub(_) | Lin::Mul(_) | Lin::Div(_) => size,
            Lin::Norm(_) => 4.0 * size,
            // Additions of the fast transform, then those of the core.
            Lin::Had([block, ..]) | Lin::HadT([block, ..]) => {
                let n = number(g, *block).unwrap_or(1);
                let core = qrmc_ir::hadamard::core_order(n).unwrap_or(n);
                size * (f64::from((n / core).max(1).ilog2()) + if core > 1 { core as f64 } else { 0.0 } + 1.0)
            }
            Lin::Mode([_, _, m]) => 2.0 * size * g[*m].data.matrices().map_or(1, |(_, n)| n) as f64,
            // The same in every form of a class, or weight-side.
            _ => 0.0,
        }
    };
    Cost { flops, nodes: 1 }
}

/// The chosen node of each class that the results need.
pub(crate) type Chosen = HashMap<Id, Lin>;

/// A form of a class: its node, and which classes it needs, as a set of their numbers.
#[derive(Clone)]
struct Form {
    node: Lin,
    below: Vec<u64>,
    total: Cost,
}

struct Search<'a> {
    g: &'a EGraph<Lin, Facts>,
    /// Number of each class.
    number: HashMap<Id, usize>,
    ids: Vec<Id>,
    best: Vec<Option<Form>>,
    /// What the chosen node of each class costs by itself.
    own: Vec<Cost>,
}

/// Chooses a node for every class, bottom up until nothing gets cheaper. A form carries the set of classes that it
/// needs, so that what is shared inside it is counted once.
pub(crate) fn cheapest(g: &EGraph<Lin, Facts>, results: &[Id]) -> Result<Chosen, Diag> {
    let mut ids: Vec<Id> = g.classes().map(|c| c.id).collect();
    ids.sort_unstable();
    let number = ids.iter().enumerate().map(|(n, id)| (*id, n)).collect();
    let count = ids.len();
    let mut s = Search { g, number, ids, best: vec![None; count], own: vec![Cost::default(); count] };
    while s.round() {}
    let mut chosen = Chosen::new();
    let mut todo: Vec<Id> = results.iter().map(|r| g.find(*r)).collect();
    while let Some(id) = todo.pop() {
        if chosen.contains_key(&id) {
            continue;
        }
        let Some(form) = &s.best[s.number[&id]] else {
            return Err(Diag::new("Q0604", "a value of the skeleton has no finite form"));
        };
        todo.extend(form.node.children().iter().map(|c| g.find(*c)).filter(|c| !is_number(g, *c)));
        chosen.insert(id, form.node.clone());
    }
    Ok(chosen)
}

fn is_number(g: &EGraph<Lin, Facts>, id: Id) -> bool {
    number(g, id).is_some()
}

impl Search<'_> {
    /// Looks at every node once; whether anything got cheaper.
    fn round(&mut self) -> bool {
        let mut changed = false;
        for at in 0..self.ids.len() {
            for node in &self.g[self.ids[at]].nodes {
                let Some((form, own)) = self.form(at, node) else { continue };
                let better = match &self.best[at] {
                    None => true,
                    // Equal costs are settled by the node, so that no order of visits shows.
                    Some(old) => (form.total, &form.node) < (old.total, &old.node),
                };
                if better {
                    self.own[at] = own;
                    self.best[at] = Some(form);
                    changed = true;
                }
            }
        }
        changed
    }

    fn form(&self, at: usize, node: &Lin) -> Option<(Form, Cost)> {
        let own = own_cost(self.g, self.ids[at], node);
        let mut below = vec![0u64; self.ids.len().div_ceil(64)];
        for child in node.children() {
            let form = self.best[self.number[&self.g.find(*child)]].as_ref()?;
            below.iter_mut().zip(&form.below).for_each(|(a, b)| *a |= b);
        }
        // A form that needs itself is none.
        if below[at / 64] >> (at % 64) & 1 == 1 {
            return None;
        }
        let mut total = own;
        for (word, bits) in below.iter().enumerate() {
            let mut bits = *bits;
            while bits != 0 {
                let own = self.own[word * 64 + bits.trailing_zeros() as usize];
                total = Cost { flops: total.flops + own.flops, nodes: total.nodes + own.nodes };
                bits &= bits - 1;
            }
        }
        below[at / 64] |= 1 << (at % 64);
        Some((Form { node: node.clone(), below, total }, own))
    }
}
