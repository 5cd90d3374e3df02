//! The laws. Each moves a diagonal one step; together they carry it to where it is computed once.
//!
//! To add a law, add a line to [`rules`]; it must hold for all values of its variables under its conditions.

use egg::{EGraph, Id, Rewrite, Subst, Var, rewrite};

use super::lang::{Facts, Lin};

type Law = Rewrite<Lin, Facts>;
type Graph = EGraph<Lin, Facts>;

fn var(name: &str) -> Var {
    match name.parse() {
        Ok(v) => v,
        Err(e) => unreachable!("a variable starts with a question mark: {e:?}"),
    }
}

/// `?s` is a vector computed from weights.
fn diagonal(name: &'static str) -> impl Fn(&mut Graph, Id, &Subst) -> bool {
    let v = var(name);
    move |g, _, s| {
        let known = &g[s[v]].data;
        known.weight && known.vector().is_some()
    }
}

fn weight(name: &'static str) -> impl Fn(&mut Graph, Id, &Subst) -> bool {
    let v = var(name);
    move |g, _, s| g[s[v]].data.weight
}

fn online(name: &'static str) -> impl Fn(&mut Graph, Id, &Subst) -> bool {
    let v = var(name);
    move |g, _, s| !g[s[v]].data.weight
}

/// Both have the same type, so that dividing one divides each element of the result once.
fn alike(a: &'static str, b: &'static str) -> impl Fn(&mut Graph, Id, &Subst) -> bool {
    let (a, b) = (var(a), var(b));
    move |g, _, s| {
        let shape = |v| g[s[v]].data.ty.as_ref().map(|t| t.shape.clone());
        shape(a).is_some() && shape(a) == shape(b)
    }
}

fn last_dim(g: &Graph, id: Id) -> Option<qrmc_ir::Dim> {
    g[id].data.ty.as_ref().and_then(|t| t.shape.last())
}

/// Keys and values have as many heads as queries: channel `c` of the output comes from channel `c` of the values.
fn ungrouped(q: &'static str, v: &'static str) -> impl Fn(&mut Graph, Id, &Subst) -> bool {
    let (q, v) = (var(q), var(v));
    move |g, _, s| {
        let (q, v) = (last_dim(g, s[q]), last_dim(g, s[v]));
        q.is_some() && q == v
    }
}

/// All laws.
pub(crate) fn rules() -> Vec<Law> {
    vec![
        // A diagonal after a norm is part of its gain.
        rewrite!("norm-gain"; "(div (norm ?a ?x ?g) ?s)" => "(norm ?a ?x (div ?g ?s))"
            if diagonal("?s") if diagonal("?g")),
        // A diagonal passes either factor of an elementwise product.
        rewrite!("product-left"; "(div (mul ?x ?y) ?s)" => "(mul (div ?x ?s) ?y)"
            if diagonal("?s") if alike("?x", "?y") if online("?x")),
        rewrite!("product-right"; "(div (mul ?x ?y) ?s)" => "(mul ?x (div ?y ?s))"
            if diagonal("?s") if alike("?x", "?y") if online("?y")),
        // A diagonal after a linear layer scales its rows, and its bias.
        rewrite!("linear-rows"; "(div (linear ?x ?w) ?s)" => "(linear ?x (div ?w (col ?s)))"
            if diagonal("?s") if weight("?w") if online("?x")),
        rewrite!("bias"; "(div (add ?x ?b) ?s)" => "(add (div ?x ?s) (div ?b ?s))"
            if diagonal("?s") if diagonal("?b")),
        // A diagonal passes attention from the output to the values where heads are not shared.
        rewrite!("attention-values"; "(div (attn ?a ?q ?k ?v) ?s)" => "(attn ?a ?q ?k (div ?v ?s))"
            if diagonal("?s") if ungrouped("?q", "?v")),
        // The cache is private to its layer: it may hold its rows in another basis, from its first row on.
        rewrite!("cache-basis"; "(div (append ?p ?n) ?s)" => "(append ?p (div ?n ?s))"
            if diagonal("?s")),
        // Two diagonals are one, and a diagonal undoes itself.
        rewrite!("merge"; "(div (div ?x ?s) ?t)" => "(div ?x (mul ?s ?t))"
            if diagonal("?s") if diagonal("?t") if online("?x")),
        rewrite!("cancel"; "(div (mul ?x ?s) ?s)" => "?x"
            if diagonal("?s") if online("?x")),
    ]
}
