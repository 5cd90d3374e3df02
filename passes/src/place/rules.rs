//! The laws. Each moves a transform one step; together they carry it to where it is computed once.
//!
//! To add a law, add a line to one of the lists; it must hold for all values of its variables under its conditions.

use egg::{EGraph, Id, Rewrite, Subst, Var, rewrite};

use super::lang::{Facts, Lin, number};

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

/// The gain of a norm is one number, so that the norm depends on its operand by its length alone.
fn scalar(name: &'static str) -> impl Fn(&mut Graph, Id, &Subst) -> bool {
    let v = var(name);
    move |g, _, s| g[s[v]].data.vector() == Some(1.into())
}

/// Keys and values have as many heads as queries: channel `c` of the output comes from channel `c` of the values.
fn ungrouped(q: &'static str, v: &'static str) -> impl Fn(&mut Graph, Id, &Subst) -> bool {
    let (q, v) = (var(q), var(v));
    move |g, _, s| {
        let (q, v) = (g[s[q]].data.width(), g[s[v]].data.width());
        q.is_some() && q == v
    }
}

/// Query heads that read one key head, which attention's attributes say by the widths of its operands; a transform of
/// blocks that lie within a head acts on values and output alike.
fn within_head(
    q: &'static str,
    v: &'static str,
    block: impl Fn(&Graph, &Subst) -> Option<u64>,
) -> impl Fn(&mut Graph, Id, &Subst) -> bool {
    let (q, v) = (var(q), var(v));
    move |g, _, s| {
        let (q, v) = (g[s[q]].data.width(), g[s[v]].data.width());
        // Heads of queries and of values are of one size, which divides both widths.
        match (q, v, block(g, s), head_dim(g)) {
            (Some(q), Some(v), Some(block), Some(head)) => {
                head.is_multiple_of(block) && q.is_multiple_of(head) && v.is_multiple_of(head)
            }
            _ => false,
        }
    }
}

/// The head size, which the skeleton of a layer states as a number of its own.
fn head_dim(g: &Graph) -> Option<u64> {
    Some(g.analysis.head_dim).filter(|d| *d > 0)
}

fn size_of(name: &'static str) -> impl Fn(&Graph, &Subst) -> Option<u64> {
    let v = var(name);
    move |g, s| number(g, s[v])
}

/// Size of the blocks that a shared matrix of a mode product mixes.
fn mode_size(inner: &'static str, m: &'static str) -> impl Fn(&Graph, &Subst) -> Option<u64> {
    let (inner, m) = (var(inner), var(m));
    move |g, s| match (number(g, s[inner]), g[s[m]].data.matrices()) {
        (Some(inner), Some((1, n))) => inner.checked_mul(n),
        _ => None,
    }
}

fn unsigned(name: &'static str) -> impl Fn(&mut Graph, Id, &Subst) -> bool {
    let v = var(name);
    move |g, _, s| number(g, s[v]) == Some(0)
}

/// Two mode products act on different axes, and each block of the one lies within one matrix of the other.
fn disjoint(
    (i, m): (&'static str, &'static str),
    (j, n): (&'static str, &'static str),
) -> impl Fn(&mut Graph, Id, &Subst) -> bool {
    let vars = [i, m, j, n].map(var);
    move |g, id, s| {
        let part = |inner: Var, m: Var| Some((number(g, s[inner])?, g[s[m]].data.matrices()?));
        let (Some((i, (t, l))), Some((j, (u, k)))) = (part(vars[0], vars[1]), part(vars[2], vars[3])) else {
            return false;
        };
        let Some(width) = g[id].data.width() else { return false };
        let fits = |(small, count, size): (u64, u64, u64), (big, span): (u64, u64)| {
            let whole = width / (big * span);
            big.is_multiple_of(small * size) && (count == 1 || whole.is_multiple_of(count))
        };
        fits((i, t, l), (j, k)) || fits((j, u, k), (i, l))
    }
}

/// Laws of diagonals: smoothing scales, AWQ's and FlatQuant's.
fn diagonals() -> Vec<Law> {
    vec![
        // A diagonal after a norm is part of its gain.
        rewrite!("norm-gain"; "(div (norm ?a ?x ?g) ?s)" => "(norm ?a ?x (div ?g ?s))"
            if diagonal("?s") if diagonal("?g")),
        rewrite!("norm-gain-mul"; "(mul (norm ?a ?x ?g) ?s)" => "(norm ?a ?x (mul ?g ?s))"
            if diagonal("?s") if diagonal("?g")),
        // A diagonal passes either factor of an elementwise product.
        rewrite!("product-left"; "(div (mul ?x ?y) ?s)" => "(mul (div ?x ?s) ?y)"
            if diagonal("?s") if alike("?x", "?y") if online("?x")),
        rewrite!("product-right"; "(div (mul ?x ?y) ?s)" => "(mul ?x (div ?y ?s))"
            if diagonal("?s") if alike("?x", "?y") if online("?y")),
        rewrite!("product-left-mul"; "(mul (mul ?x ?y) ?s)" => "(mul (mul ?x ?s) ?y)"
            if diagonal("?s") if alike("?x", "?y") if online("?x")),
        rewrite!("product-right-mul"; "(mul (mul ?x ?y) ?s)" => "(mul ?x (mul ?y ?s))"
            if diagonal("?s") if alike("?x", "?y") if online("?y")),
        // A diagonal after a linear layer scales its rows, and its bias.
        rewrite!("linear-rows"; "(div (linear ?x ?w) ?s)" => "(linear ?x (div ?w (col ?s)))"
            if diagonal("?s") if weight("?w") if online("?x")),
        rewrite!("linear-rows-mul"; "(mul (linear ?x ?w) ?s)" => "(linear ?x (mul ?w (col ?s)))"
            if diagonal("?s") if weight("?w") if online("?x")),
        rewrite!("bias"; "(div (add ?x ?b) ?s)" => "(add (div ?x ?s) (div ?b ?s))"
            if diagonal("?s") if diagonal("?b")),
        rewrite!("bias-mul"; "(mul (add ?x ?b) ?s)" => "(add (mul ?x ?s) (mul ?b ?s))"
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

/// Laws of a rotation `R`: what is orthogonal keeps lengths, so that a norm without a gain commutes with it.
/// `$t` and `$i` are the transform and its inverse, `$rt` and `$ri` the same on a weight's rows.
macro_rules! rotation {
    ($t:literal, $i:literal, $rt:literal, $ri:literal) => {
        vec![
            rewrite!(concat!($t, "-cancel"); {pattern!("(" $t " ?b (" $i " ?b ?x ?s) ?s)")} => "?x"),
            rewrite!(concat!($t, "-norm"); {pattern!("(norm ?a (" $t " ?b ?x ?s) ?g)")}
                => {pattern!("(" $t " ?b (norm ?a ?x ?g) ?s)")} if scalar("?g") if online("?x")),
            // The rotation of a linear layer's input is the inverse rotation of its weight's columns.
            rewrite!(concat!($t, "-columns"); {pattern!("(linear (" $t " ?b ?x ?s) ?w)")}
                => {pattern!("(linear ?x (" $i " ?b ?w ?s))")} if weight("?w") if online("?x")),
            // The rotation of its output is one of its rows, and of its bias.
            rewrite!(concat!($t, "-rows"); {pattern!("(" $t " ?b (linear ?x ?w) ?s)")}
                => {pattern!("(linear ?x (" $rt " ?b ?w ?s))")} if weight("?w") if online("?x")),
            rewrite!(concat!($t, "-bias"); {pattern!("(" $t " ?b (add ?x ?c) ?s)")}
                => {pattern!("(add (" $t " ?b ?x ?s) (" $t " ?b ?c ?s))")} if diagonal("?c") if online("?x")),
            rewrite!(concat!($rt, "-cancel"); {pattern!("(" $rt " ?b (" $ri " ?b ?w ?s) ?s)")} => "?w"),
            // It passes sums, and out of them.
            rewrite!(concat!($t, "-sum"); {pattern!("(" $t " ?b (add ?x ?y) ?s)")}
                => {pattern!("(add (" $t " ?b ?x ?s) (" $t " ?b ?y ?s))")} if alike("?x", "?y") if online("?x")),
            rewrite!(concat!($t, "-out-left"); {pattern!("(add (" $t " ?b ?x ?s) ?y)")}
                => {pattern!("(" $t " ?b (add ?x (" $i " ?b ?y ?s)) ?s)")} if alike("?x", "?y") if online("?y")),
            rewrite!(concat!($t, "-out-right"); {pattern!("(add ?y (" $t " ?b ?x ?s))")}
                => {pattern!("(" $t " ?b (add (" $i " ?b ?y ?s) ?x) ?s)")} if alike("?x", "?y") if online("?y")),
            // Rows of a table are rotated where the table is.
            rewrite!(concat!($t, "-table"); {pattern!("(" $t " ?b (gather ?w ?i) ?s)")}
                => {pattern!("(gather (" $t " ?b ?w ?s) ?i)")} if weight("?w")),
            // Within heads it passes attention from the output to the values, whatever heads share them, and back.
            rewrite!(concat!($t, "-values"); {pattern!("(" $t " ?b (attn ?a ?q ?k ?v) ?s)")}
                => {pattern!("(attn ?a ?q ?k (" $t " ?b ?v ?s))")}
                if unsigned("?s") if within_head("?q", "?v", size_of("?b"))),
            rewrite!(concat!($t, "-output"); {pattern!("(attn ?a ?q ?k (" $t " ?b ?v ?s))")}
                => {pattern!("(" $t " ?b (attn ?a ?q ?k ?v) ?s)")}
                if unsigned("?s") if within_head("?q", "?v", size_of("?b"))),
            rewrite!(concat!($t, "-cache"); {pattern!("(" $t " ?b (append ?p ?n) ?s)")}
                => {pattern!("(append ?p (" $t " ?b ?n ?s))")}),
            rewrite!(concat!($t, "-uncache"); {pattern!("(append ?p (" $t " ?b ?n ?s))")}
                => {pattern!("(" $t " ?b (append ?p ?n) ?s)")}),
        ]
    };
}

/// A pattern from parts of text.
macro_rules! pattern {
    ($($part:literal)+) => {
        match concat!($($part),+).parse::<egg::Pattern<Lin>>() {
            Ok(p) => p,
            Err(e) => unreachable!("a law is well-formed: {e}"),
        }
    };
}

/// Laws of mode products: Kronecker factors and matrices of heads.
fn modes() -> Vec<Law> {
    vec![
        rewrite!("mode-cancel"; "(mode ?i (mode ?i ?x ?m) (inv ?m))" => "?x"),
        rewrite!("mode-cancel-inv"; "(mode ?i (mode ?i ?x (inv ?m)) ?m)" => "?x"),
        rewrite!("mode-cancel-tr"; "(mode ?i (mode ?i ?x (tr ?m)) (tr (inv ?m)))" => "?x"),
        rewrite!("mode-cancel-inv-tr"; "(mode ?i (mode ?i ?x (tr (inv ?m))) (tr ?m))" => "?x"),
        rewrite!("rowmode-cancel"; "(rowmode ?i (rowmode ?i ?x ?m) (inv ?m))" => "?x"),
        rewrite!("rowmode-cancel-inv"; "(rowmode ?i (rowmode ?i ?x (inv ?m)) ?m)" => "?x"),
        rewrite!("mode-commute"; "(mode ?i (mode ?j ?x ?n) ?m)" => "(mode ?j (mode ?i ?x ?m) ?n)"
            if disjoint(("?i", "?m"), ("?j", "?n"))),
        rewrite!("mode-rows"; "(mode ?i (linear ?x ?w) ?m)" => "(linear ?x (rowmode ?i ?w ?m))"
            if weight("?w") if weight("?m") if online("?x")),
        rewrite!("mode-columns"; "(linear (mode ?i ?x ?m) ?w)" => "(linear ?x (mode ?i ?w (tr ?m)))"
            if weight("?w") if weight("?m") if online("?x")),
        rewrite!("mode-bias"; "(mode ?i (add ?x ?c) ?m)" => "(add (mode ?i ?x ?m) (mode ?i ?c ?m))"
            if diagonal("?c") if weight("?m") if online("?x")),
        rewrite!("mode-values"; "(mode ?i (attn ?a ?q ?k ?v) ?m)" => "(attn ?a ?q ?k (mode ?i ?v ?m))"
            if weight("?m") if within_head("?q", "?v", mode_size("?i", "?m"))),
        rewrite!("mode-output"; "(attn ?a ?q ?k (mode ?i ?v ?m))" => "(mode ?i (attn ?a ?q ?k ?v) ?m)"
            if weight("?m") if within_head("?q", "?v", mode_size("?i", "?m"))),
        rewrite!("mode-cache"; "(mode ?i (append ?p ?n) ?m)" => "(append ?p (mode ?i ?n ?m))"
            if weight("?m")),
        rewrite!("mode-uncache"; "(append ?p (mode ?i ?n ?m))" => "(mode ?i (append ?p ?n) ?m)"
            if weight("?m")),
    ]
}

/// All laws.
pub(crate) fn rules() -> Vec<Law> {
    let mut all = diagonals();
    all.extend(rotation!("had", "hadt", "rowhad", "rowhadt"));
    all.extend(rotation!("hadt", "had", "rowhadt", "rowhad"));
    all.extend(modes());
    all
}
