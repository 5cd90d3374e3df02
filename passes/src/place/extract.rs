//! Extraction: of all equal forms, the one with the fewest online operations; a shared value is paid once.

use std::collections::HashMap;

use egg::{EGraph, Id, Language};
use qrmc_ir::{Diag, Dim, TensorType};

use super::lang::{Facts, Lin};

/// Cost of a form: online floating-point operations a position, then the number of nodes.
#[derive(Clone, Copy, PartialEq, PartialOrd, Default, Debug)]
pub(crate) struct Cost {
    flops: f64,
    nodes: u32,
}

impl Cost {
    fn plus(self, other: Cost) -> Cost {
        Cost { flops: self.flops + other.flops, nodes: self.nodes + other.nodes }
    }
}

/// Elements, with every symbolic size counted as one position.
fn elements(ty: Option<&TensorType>) -> f64 {
    ty.map_or(0.0, |t| t.shape.0.iter().map(|d| d.fixed().unwrap_or(1) as f64).product())
}

/// What the node itself costs.
fn own_cost(g: &EGraph<Lin, Facts>, id: Id, node: &Lin) -> Cost {
    let out = &g[id].data;
    let flops = if out.weight {
        0.0
    } else {
        match node {
            Lin::Linear([x, _]) => {
                let inner =
                    g[*x].data.ty.as_ref().and_then(|t| t.shape.last()).and_then(Dim::fixed).unwrap_or(1);
                2.0 * elements(out.ty.as_ref()) * inner as f64
            }
            Lin::Add(_) | Lin::Sub(_) | Lin::Mul(_) | Lin::Div(_) => elements(out.ty.as_ref()),
            Lin::Norm(_) => 4.0 * elements(out.ty.as_ref()),
            // The same in every form of a class.
            Lin::Attn(_) | Lin::Append(_) | Lin::Col(_) | Lin::Leaf(_) | Lin::Other(..) => 0.0,
        }
    };
    Cost { flops, nodes: 1 }
}

/// The chosen node of each class that the results need.
pub(crate) type Chosen = HashMap<Id, Lin>;

/// A form of a class: its node, and the classes below it with their own costs.
#[derive(Clone)]
struct Form {
    node: Lin,
    below: HashMap<Id, Cost>,
    total: Cost,
}

/// Chooses a node for every class, bottom up until nothing gets cheaper. A form carries the set of classes that it
/// needs, so that what is shared inside it is counted once.
pub(crate) fn cheapest(g: &EGraph<Lin, Facts>, results: &[Id]) -> Result<Chosen, Diag> {
    let mut ids: Vec<Id> = g.classes().map(|c| c.id).collect();
    ids.sort_unstable();
    let mut best: HashMap<Id, Form> = HashMap::new();
    loop {
        let mut changed = false;
        for &id in &ids {
            for node in &g[id].nodes {
                let Some(form) = form(g, id, node, &best) else { continue };
                let better = match best.get(&id) {
                    None => true,
                    // Equal costs are settled by the node, so that no order of visits shows.
                    Some(old) => (form.total, &form.node) < (old.total, &old.node),
                };
                if better {
                    best.insert(id, form);
                    changed = true;
                }
            }
        }
        if !changed {
            break;
        }
    }
    let mut chosen = Chosen::new();
    let mut todo: Vec<Id> = results.iter().map(|r| g.find(*r)).collect();
    while let Some(id) = todo.pop() {
        if chosen.contains_key(&id) {
            continue;
        }
        let Some(form) = best.get(&id) else {
            return Err(Diag::new("Q0604", "a value of the skeleton has no finite form"));
        };
        todo.extend(form.node.children().iter().map(|c| g.find(*c)));
        chosen.insert(id, form.node.clone());
    }
    Ok(chosen)
}

fn form(g: &EGraph<Lin, Facts>, id: Id, node: &Lin, best: &HashMap<Id, Form>) -> Option<Form> {
    let own = own_cost(g, id, node);
    let mut below = HashMap::new();
    for child in node.children() {
        let child = g.find(*child);
        if child == id {
            return None;
        }
        let form = best.get(&child)?;
        below.extend(form.below.iter().map(|(k, v)| (*k, *v)));
    }
    // A form that needs itself is none.
    if below.contains_key(&id) {
        return None;
    }
    below.insert(id, own);
    let mut all: Vec<(&Id, &Cost)> = below.iter().collect();
    // Sums of floats depend on their order; this one is fixed.
    all.sort_unstable_by_key(|(id, _)| **id);
    let total = all.iter().fold(Cost::default(), |a, (_, c)| a.plus(**c));
    Some(Form { node: node.clone(), below, total })
}
