//! Which values of a layer get transforms, and which of these have learned clips.

use qrmc_ir::{Diag, Func, FuncId, Module, Place, ValueId, fermat};

use super::AffineOptions;
use super::init::ranked;
use super::insert::edges;
use crate::edges::{linears, role, width};
use crate::options::{OptionType, OptionValue, word_option};

/// Which edges of a layer get a transform.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Edges {
    /// Every one.
    All,
    /// Those whose transform is a Kronecker pair: the inputs that norms and the feed-forward product give.
    Pairs,
    /// The inputs that norms give.
    Norms,
}

impl std::fmt::Display for Edges {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Edges::All => "all",
            Edges::Pairs => "pairs",
            Edges::Norms => "norms",
        })
    }
}

word_option!(
    Edges,
    "all, pairs or norms",
    "all" => Edges::All,
    "pairs" => Edges::Pairs,
    "norms" => Edges::Norms
);

/// How many clips of the range of an activation are learned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Clips {
    /// One for each end.
    Two,
    /// One for both ends.
    One,
}

impl std::fmt::Display for Clips {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Clips::Two { "two" } else { "one" })
    }
}

word_option!(Clips, "two or one", "two" => Clips::Two, "one" => Clips::One);

/// The values of one layer that get a transform.
pub(super) struct Scope {
    names: Vec<&'static str>,
    /// Those of them that linear layers read, as values of the layer before the transforms.
    inputs: Vec<ValueId>,
    clips: Clips,
    /// Whether inputs of linear layers are quantized, and caches.
    quantized: (bool, bool),
}

impl Scope {
    /// The scope that options give a layer. An edge that a wide linear layer reads is left out.
    ///
    /// # Errors
    /// If the layer has not the form of a decoder's.
    pub(super) fn of(module: &Module, func: FuncId, o: &AffineOptions) -> Result<Self, Diag> {
        let f = module.func(func);
        let index = module.layers().iter().position(|l| *l == func).unwrap_or(0);
        let wide = o.wide.resolve(module);
        let (mut names, mut inputs) = (Vec::new(), Vec::new());
        for (name, x, _) in edges(f)? {
            let chosen = match o.edges {
                Edges::All => true,
                Edges::Pairs => name != "o_in",
                Edges::Norms => matches!(name, "attn_in" | "mlp_in"),
            };
            let mut readers = linears(f).into_iter().filter(|l| l.x == x);
            if chosen && !readers.any(|l| wide.linear(index, &role(module, f, &l))) {
                names.push(name);
                inputs.push(x);
            }
        }
        let quantized = (o.a.quantized().is_some(), o.kv.quantized().is_some());
        if o.edges == Edges::All {
            names.extend(quantized.1.then_some("keys"));
            // The transform of the values is that of the attention's output within a head, too.
            names.extend((quantized.1 || names.contains(&"o_in")).then_some("values"));
        }
        Ok(Scope { names, inputs, clips: o.clips, quantized })
    }

    /// Whether nothing is transformed.
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Whether an edge, or the one that a parameter belongs to, is transformed.
    pub(super) fn has(&self, name: &str) -> bool {
        self.names.contains(&name.split('.').next().unwrap_or(name))
    }

    /// Whether linear layers that read this value absorb a transform.
    pub(super) fn input(&self, x: ValueId) -> bool {
        self.inputs.contains(&x)
    }

    /// What the learned clips of an edge are called, relative to it: none where it is not quantized.
    pub(super) fn clips(&self, edge: &str) -> &'static [&'static str] {
        let cache = matches!(edge, "keys" | "values");
        match (if cache { self.quantized.1 } else { self.quantized.0 }, self.clips) {
            (false, _) => &[],
            (true, Clips::Two) => &["hi", "lo"],
            (true, Clips::One) => &["clip"],
        }
    }
}

/// A Kronecker pair that training makes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KroneckerPair {
    /// Name of the layer's function.
    pub layer: String,
    /// What it transforms: `attn_in`, `mlp_in` or `down_in`.
    pub edge: &'static str,
    /// Ranks of tensor parallelism, each with a pair of its own.
    pub ranks: u64,
    /// Size of the matrix that mixes runs of neighbours.
    pub left: u64,
    /// Size of the matrix that mixes neighbours.
    pub right: u64,
}

/// The error of an edge whose channels make no Kronecker pair.
pub(super) fn no_pair(f: &Func, edge: &str, n: u64) -> Diag {
    let place = Place { func: Some(f.name.clone()), ..Place::default() };
    let what = format!("`affine`: the {n} channels of {edge} make no Kronecker pair");
    Diag::new("Q0602", what)
        .at(place)
        .hint("a pair has two even sides or two odd ones: name the linear layers that read it in wide, or use quarot")
}

/// The Kronecker pairs of all layers that are not skipped.
///
/// # Errors
/// If a width makes no pair, nothing is left to transform, or a layer has not the form of a decoder's.
pub(super) fn pairs(module: &Module, o: &AffineOptions) -> Result<Vec<KroneckerPair>, Diag> {
    let skip = o.skip.on(module)?;
    let (mut out, mut any) = (Vec::new(), false);
    for (_, func) in module.layers().into_iter().enumerate().filter(|(i, _)| !skip.layer(*i)) {
        let (f, scope) = (module.func(func), Scope::of(module, func, o)?);
        any |= !scope.is_empty();
        for (edge, x, _) in edges(f)?.into_iter().filter(|(name, ..)| *name != "o_in" && scope.has(name)) {
            let ranks = if ranked(&format!("{edge}.")) { u64::from(o.tp) } else { 1 };
            let n = width(f, x) / ranks;
            let (left, right) = fermat(n).ok_or_else(|| no_pair(f, edge, n))?;
            out.push(KroneckerPair { layer: f.name.clone(), edge, ranks, left, right });
        }
    }
    if !any && !module.layers().is_empty() {
        let what = "`affine`: no edge is left to transform";
        return Err(Diag::new("Q0602", what).hint("name fewer linear layers in wide, or leave the pass out"));
    }
    Ok(out)
}
