//! What the terms of a decoder are: where its layers begin, and the names of their values and weights.

use std::collections::HashMap;

use super::term::{Bin, T, Term, Terms};

/// A decoder layer.
pub(super) struct Layer {
    /// The residual stream before it and behind it.
    pub(super) x: T,
    pub(super) y: T,
    pub(super) attention: T,
}

/// The structure of a graph.
pub(super) struct Roles {
    pub(super) layers: Vec<Layer>,
    /// Names of values inside their function.
    pub(super) values: HashMap<T, String>,
    /// Names of the weights that linear layers, norms and sums read.
    pub(super) weights: HashMap<T, String>,
    /// Whether something stands before the first layer, and behind the last one.
    pub(super) embeds: bool,
    pub(super) heads: bool,
}

/// The operands of a term.
pub(super) fn operands(term: &Term) -> Vec<T> {
    match *term {
        Term::Embed(_)
        | Term::Given
        | Term::Past(_)
        | Term::Scalar(..)
        | Term::Vector(_)
        | Term::Table(_) => vec![],
        Term::Un(_, x)
        | Term::Limit(x, ..)
        | Term::Reduce(_, x, _)
        | Term::Part { x, .. }
        | Term::Dot(x, _)
        | Term::Linear(x, _)
        | Term::Norm { x, .. }
        | Term::Silu(x)
        | Term::Rope(x, _)
        | Term::Static { x, .. }
        | Term::Mode { x, .. }
        | Term::Hadamard { x, .. } => vec![x],
        Term::Quant { x, factors, .. } => {
            std::iter::once(x).chain(factors.into_iter().flat_map(|(a, b)| [a, b])).collect()
        }
        Term::Bin(_, a, b, _) | Term::Join(a, b, ..) | Term::Append(a, b) => vec![a, b],
        Term::Select(a, b, c) | Term::Attention(a, b, c, _) => vec![a, b, c],
    }
}

/// The terms that a result needs, in the order of their making, where each needs what `of` says.
pub(super) fn needed(root: T, of: impl Fn(T) -> Vec<T>) -> Vec<T> {
    let mut seen = vec![false; root as usize + 1];
    seen[root as usize] = true;
    for t in (0..=root).rev() {
        if seen[t as usize] {
            of(t).into_iter().for_each(|o| seen[o as usize] = true);
        }
    }
    (0..=root).filter(|&t| seen[t as usize]).collect()
}

/// The terms that everything behind them is computed from alone, but for constants and caches.
fn cuts(terms: &Terms, all: &[T]) -> Vec<T> {
    let stream =
        |t: T| !matches!(terms.get(t), Term::Scalar(..) | Term::Vector(_) | Term::Table(_) | Term::Past(_));
    let mut last: HashMap<T, T> = HashMap::new();
    for &t in all {
        operands(terms.get(t)).into_iter().for_each(|o| {
            last.insert(o, t);
        });
    }
    let mut open = 0;
    let mut out = Vec::new();
    for &t in all.iter().filter(|t| stream(**t)) {
        if open <= t {
            out.push(t);
        }
        open = open.max(last.get(&t).copied().unwrap_or(t));
    }
    out
}

impl Roles {
    /// Finds the layers of a decoder behind its result: logits, or the residual stream behind the last layer.
    ///
    /// # Errors
    /// What is missing, in a sentence.
    pub(super) fn find(terms: &Terms, result: T) -> Result<Self, String> {
        let all = needed(result, |t| operands(terms.get(t)));
        let attention: Vec<T> =
            all.iter().copied().filter(|&t| matches!(terms.get(t), Term::Attention(..))).collect();
        if attention.is_empty() {
            return Err("there is no attention in it".into());
        }
        let cuts = cuts(terms, &all);
        let before = |end: T| cuts.iter().rev().copied().find(|&c| c < end);
        let biases = |a: &T| matches!(terms.get(*a), Term::Vector(_));
        // The head may end in a sum with its bias.
        let sum = |t: &T| match terms.get(*t) {
            Term::Bin(Bin::Add, a, b, _) => *t < result || !biases(a) && !biases(b),
            _ => false,
        };
        let end = cuts.iter().rev().copied().find(sum);
        let mut starts = Vec::new();
        for &a in &attention {
            starts.push(before(a).ok_or("its layers do not hang together by one residual stream")?);
        }
        starts.push(end.ok_or("no sum ends its last layer")?);
        if starts.windows(2).any(|w| w[0] >= w[1]) || attention.iter().zip(&starts[1..]).any(|(a, y)| a >= y)
        {
            return Err("its layers do not follow one another".into());
        }
        let layers: Vec<Layer> = attention
            .iter()
            .zip(starts.windows(2))
            .map(|(&attention, w)| Layer { x: w[0], y: w[1], attention })
            .collect();
        let (first, last) = (layers[0].x, layers[layers.len() - 1].y);
        let embeds = *terms.get(first) != Term::Given;
        let heads = last != result;
        let mut roles = Roles { layers, values: HashMap::new(), weights: HashMap::new(), embeds, heads };
        for i in 0..roles.layers.len() {
            let (x, y, a) = (roles.layers[i].x, roles.layers[i].y, roles.layers[i].attention);
            let inside: Vec<T> = all.iter().copied().filter(|&t| t > x && t <= y).collect();
            Namer { terms, roles: &mut roles, inside, prefix: format!("model.layers.{i}") }.layer(x, y, a);
        }
        if heads {
            let inside = all.iter().copied().filter(|&t| t > last).collect();
            Namer { terms, roles: &mut roles, inside, prefix: String::new() }.head(result);
        }
        Ok(roles)
    }
}

struct Namer<'a> {
    terms: &'a Terms,
    roles: &'a mut Roles,
    /// Terms of this function.
    inside: Vec<T>,
    prefix: String,
}

impl Namer<'_> {
    fn value(&mut self, t: T, name: &str) {
        self.roles.values.entry(t).or_insert_with(|| name.to_owned());
    }

    fn weight(&mut self, t: T, name: &str) {
        let dot = if self.prefix.is_empty() { "" } else { "." };
        let name = format!("{}{dot}{name}", self.prefix);
        self.roles.weights.entry(t).or_insert(name);
    }

    /// The value behind transforms and quantizers.
    fn behind(&self, mut t: T) -> T {
        loop {
            t = match *self.terms.get(t) {
                Term::Quant { x, .. }
                | Term::Static { x, .. }
                | Term::Mode { x, .. }
                | Term::Hadamard { x, .. } => x,
                // A square matrix whose product is not what is asked for.
                Term::Bin(Bin::Mul | Bin::Div, x, v, _) if matches!(self.terms.get(v), Term::Vector(_)) => x,
                _ => return t,
            };
        }
    }

    /// What has the name of `at`: `t`, if nothing but quantizers stands between.
    fn outermost(&self, t: T, at: T) -> T {
        let mut x = t;
        while let Term::Quant { x: inside, .. } | Term::Static { x: inside, .. } = *self.terms.get(x) {
            x = inside;
        }
        if x == at { t } else { at }
    }

    /// A linear layer with its bias: the product is called `name` and the sum `biased`.
    fn linear(&mut self, t: T, module: &str, name: &str, biased: &str) -> Option<T> {
        let mut at = self.behind(t);
        let mut outer = t;
        if let Term::Bin(Bin::Add, a, b, _) = *self.terms.get(at) {
            let (x, v) = if matches!(self.terms.get(b), Term::Vector(_)) { (a, b) } else { (b, a) };
            if matches!(self.terms.get(v), Term::Vector(_)) {
                self.value(self.outermost(t, at), biased);
                self.weight(v, &format!("{module}.bias"));
                (at, outer) = (self.behind(x), x);
            }
        }
        let Term::Linear(x, _) = *self.terms.get(at) else { return None };
        self.value(self.outermost(outer, at), name);
        self.weight(at, &format!("{module}.weight"));
        Some(x)
    }

    /// The linear layer whose input is `from`, behind transforms and quantizers, with what is added to it.
    fn reader(&self, from: T) -> Option<T> {
        let reads = |t: &&T| matches!(*self.terms.get(**t), Term::Linear(x, _) if self.behind(x) == from);
        let l = *self.inside.iter().find(reads)?;
        let biased = self.inside.iter().copied().find(|&t| match *self.terms.get(t) {
            Term::Bin(Bin::Add, a, b, _) => {
                (a == l && matches!(self.terms.get(b), Term::Vector(_)))
                    || (b == l && matches!(self.terms.get(a), Term::Vector(_)))
            }
            _ => false,
        });
        Some(biased.unwrap_or(l))
    }

    fn norm(&mut self, t: T, weight: &str, name: &str) -> Option<T> {
        let at = self.behind(t);
        let Term::Norm { x, .. } = *self.terms.get(at) else { return None };
        self.value(at, name);
        self.weight(at, &format!("{weight}.weight"));
        Some(x)
    }

    /// Queries or keys: positions, norms of heads, the linear layer.
    fn heads(&mut self, t: T, letter: char) -> Option<T> {
        let t = self.without_bias(t, letter);
        let mut at = t;
        let turned = self.behind(t);
        if let Term::Rope(x, _) = *self.terms.get(turned) {
            self.value(self.outermost(t, turned), &format!("{letter}_rope"));
            at = x;
        }
        if let Some(x) = self.norm(at, &format!("self_attn.{letter}_norm"), &format!("{letter}_normed")) {
            at = x;
        }
        self.linear(at, &format!("self_attn.{letter}_proj"), &format!("{letter}_proj"), &letter.to_string())
    }

    /// What stands before a bias that is added with its positions in it.
    fn without_bias(&mut self, t: T, letter: char) -> T {
        let Term::Bin(Bin::Add, a, b, _) = *self.terms.get(t) else { return t };
        let Some(bias) = self.terms.placed_vector(b) else { return t };
        self.weight(bias, &format!("self_attn.{letter}_proj.bias"));
        a
    }

    /// What is appended to a cache.
    fn cached(&mut self, t: T, name: &str) -> T {
        match *self.terms.get(self.behind(t)) {
            Term::Append(_, new) => {
                self.value(self.behind(t), name);
                new
            }
            _ => t,
        }
    }

    fn layer(&mut self, x: T, y: T, attention: T) {
        self.value(y, "y");
        self.value(attention, "o_in");
        if let Term::Attention(q, k, v, _) = *self.terms.get(attention) {
            let (k, v) = (self.cached(k, "k_all"), self.cached(v, "v_all"));
            let input = self.heads(q, 'q');
            self.heads(k, 'k');
            self.linear(v, "self_attn.v_proj", "v_proj", "v");
            if let Some(input) = input {
                self.norm(input, "input_layernorm", "attn_in");
            }
        }
        if let Some(o) = self.reader(attention) {
            let plain = matches!(self.terms.get(o), Term::Linear(..));
            self.linear(o, "self_attn.o_proj", if plain { "attn_out" } else { "o_proj" }, "attn_out");
            let sum = |t: &&T| matches!(*self.terms.get(**t), Term::Bin(Bin::Add, a, b, _) if (a, b) == (x, o) || (a, b) == (o, x));
            if let Some(&mid) = self.inside.iter().find(sum) {
                self.value(mid, "x_mid");
            }
        }
        let gated = self.inside.iter().copied().find_map(|t| match *self.terms.get(t) {
            Term::Bin(Bin::Mul, a, b, _) => match (self.terms.get(a), self.terms.get(b)) {
                (Term::Silu(gate), _) => Some((t, *gate, b)),
                (_, Term::Silu(gate)) => Some((t, *gate, a)),
                _ => None,
            },
            _ => None,
        });
        if let Some((product, gate, up)) = gated {
            self.value(product, "down_in");
            let input = self.linear(gate, "mlp.gate_proj", "gate_proj", "gate");
            self.linear(up, "mlp.up_proj", "up_proj", "up");
            if let Some(input) = input {
                self.norm(input, "post_attention_layernorm", "mlp_in");
            }
            if let Some(down) = self.reader(product) {
                let plain = matches!(self.terms.get(down), Term::Linear(..));
                self.linear(down, "mlp.down_proj", if plain { "mlp_out" } else { "down_proj" }, "mlp_out");
            }
        }
    }

    fn head(&mut self, result: T) {
        let input = self.linear(result, "lm_head", "logits", "logits");
        self.norm(input.unwrap_or(result), "model.norm", "head_in");
    }
}
