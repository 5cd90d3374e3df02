//! The language of the skeleton, and what is known of each class.

use egg::{DidMerge, EGraph, Id, Language, define_language};
use qrmc_ir::{Shape, TensorType};

/// Facts of a leaf or of an operation that stays as it is.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub(crate) struct Key {
    /// Number in the function: of the value for a leaf, of the node for an operation.
    pub(crate) index: u32,
    /// Which result of the operation.
    pub(crate) result: u32,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "#{}.{}", self.index, self.result)
    }
}

impl std::str::FromStr for Key {
    type Err = ();
    /// Keys are never written in rules.
    fn from_str(_: &str) -> Result<Self, ()> {
        Err(())
    }
}

define_language! {
    pub(crate) enum Lin {
        "add" = Add([Id; 2]),
        "sub" = Sub([Id; 2]),
        "mul" = Mul([Id; 2]),
        "div" = Div([Id; 2]),
        // x wᵀ
        "linear" = Linear([Id; 2]),
        // attributes, x, gain
        "norm" = Norm([Id; 3]),
        // attributes, q, k, v
        "attn" = Attn([Id; 4]),
        // past, new
        "append" = Append([Id; 2]),
        // a vector [n] as a column [n, 1]
        "col" = Col([Id; 1]),
        // rows of a table, indices
        "gather" = Gather([Id; 2]),
        // block, x, signs or 0
        "had" = Had([Id; 3]),
        "hadt" = HadT([Id; 3]),
        // inner, x, matrix
        "mode" = Mode([Id; 3]),
        // The same on the rows of a weight: what a transform of the output of a linear layer is to its weight.
        "rowhad" = RowHad([Id; 3]),
        "rowhadt" = RowHadT([Id; 3]),
        "rowmode" = RowMode([Id; 3]),
        "inv" = Inv([Id; 1]),
        // last two axes swapped
        "tr" = Tr([Id; 1]),
        Num(u64),
        Leaf(Key),
        Other(Key, Vec<Id>),
    }
}

/// What is known of a class.
#[derive(Clone, PartialEq, Debug)]
pub(crate) struct Known {
    /// Type of the value; `None` for attributes.
    pub(crate) ty: Option<TensorType>,
    /// Whether it is computed from weights alone.
    pub(crate) weight: bool,
}

/// The analysis: types and weight-derivedness, up through every operation of the language.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts {
    /// Size of an attention head; 0 if the function has no attention.
    pub(crate) head_dim: u64,
}

impl Known {
    /// Length of a vector, if it is one.
    pub(crate) fn vector(&self) -> Option<qrmc_ir::Dim> {
        let shape = &self.ty.as_ref()?.shape;
        if shape.rank() == 1 { shape.last() } else { None }
    }

    /// Length of the last axis.
    pub(crate) fn width(&self) -> Option<u64> {
        self.ty.as_ref()?.shape.last()?.fixed().map(|n| n as u64)
    }

    /// Number and size of square matrices.
    pub(crate) fn matrices(&self) -> Option<(u64, u64)> {
        match self.ty.as_ref()?.shape.as_fixed()?[..] {
            [a, b] if a == b => Some((1, a as u64)),
            [t, a, b] if a == b => Some((t as u64, a as u64)),
            _ => None,
        }
    }
}

/// The number that a class is.
pub(crate) fn number(g: &EGraph<Lin, Facts>, id: Id) -> Option<u64> {
    g[id].nodes.iter().find_map(|n| if let Lin::Num(x) = n { Some(*x) } else { None })
}

fn arith(shape: Shape) -> Option<TensorType> {
    Some(TensorType { elem: qrmc_ir::Elem::F32, shape })
}

impl egg::Analysis<Lin> for Facts {
    type Data = Known;

    fn make(egraph: &mut EGraph<Lin, Self>, node: &Lin, _id: Id) -> Known {
        let known = |id: &Id| &egraph[*id].data;
        let shape = |id: &Id| known(id).ty.as_ref().map(|t| t.shape.clone());
        let weight = !node.children().is_empty()
            && node.children().iter().all(|c| known(c).weight || known(c).ty.is_none());
        let ty = match node {
            Lin::Add([a, b]) | Lin::Sub([a, b]) | Lin::Mul([a, b]) | Lin::Div([a, b]) => {
                shape(a).zip(shape(b)).and_then(|(a, b)| a.broadcast(&b)).and_then(arith)
            }
            Lin::Linear([x, w]) => shape(x).zip(shape(w)).and_then(|(mut x, w)| {
                *x.0.last_mut()? = *w.0.first()?;
                arith(x)
            }),
            Lin::Norm([_, x, _])
            | Lin::Attn([_, x, _, _])
            | Lin::Had([_, x, _])
            | Lin::HadT([_, x, _])
            | Lin::Mode([_, x, _])
            | Lin::RowHad([_, x, _])
            | Lin::RowHadT([_, x, _])
            | Lin::RowMode([_, x, _])
            | Lin::Inv([x])
            | Lin::Tr([x]) => shape(x).and_then(arith),
            Lin::Gather([table, ids]) => shape(table).zip(shape(ids)).and_then(|(table, mut ids)| {
                ids.0.push(table.last()?);
                arith(ids)
            }),
            // The appended length is that of the recorded value; every form of the class has it.
            Lin::Append(_) => None,
            Lin::Col([v]) => shape(v).and_then(|v| arith(Shape(vec![v.last()?, 1.into()]))),
            Lin::Num(_) | Lin::Leaf(_) | Lin::Other(..) => None,
        };
        Known { ty, weight: weight && !matches!(node, Lin::Leaf(_) | Lin::Other(..)) }
    }

    fn merge(&mut self, to: &mut Known, from: Known) -> DidMerge {
        let before = to.clone();
        to.ty = to.ty.take().or(from.ty.clone());
        to.weight |= from.weight;
        DidMerge(*to != before, *to != from)
    }
}
