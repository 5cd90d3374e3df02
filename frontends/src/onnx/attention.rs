//! Attention: written out, or as one operator.

use std::rc::Rc;

use qrmc_ir::{AttnAttr, Real as Number};

use super::eval::{Eval, Made, Val, one};
use super::file::Node;
use super::known::{Data, Known};
use super::product::{channels, term_of};
use super::term::{Bin, Pos, T, Term};
use super::view::{Axis, Digit, Kind, Real, flat, size};

/// Products of queries and keys.
#[derive(Clone, Debug)]
pub(super) struct Scores {
    q: T,
    k: T,
    /// Sequences and heads, as the graph lays them out.
    lead: Vec<Axis>,
    /// Key and value heads, and channels of a head.
    kv: u64,
    d: u64,
    scale: f64,
    masked: bool,
    /// Whether softmax was taken.
    shares: bool,
    new: usize,
    all: usize,
}

/// What a mask is at most where a key is not seen.
const HIDDEN: f32 = -1e4;

impl Scores {
    pub(super) fn dims(&self) -> Vec<usize> {
        self.lead.iter().map(size).chain([self.new, self.all]).collect()
    }

    /// The shares that these, which are masked, give to keys, with one more factor.
    pub(super) fn shares(&self, scale: f64) -> Self {
        Scores { scale: self.scale * scale, masked: true, shares: true, ..self.clone() }
    }

    /// Whether a mask hides exactly the keys after each query, in every sequence and head.
    pub(super) fn is_causal(&self, mask: &Known) -> bool {
        let s = self;
        let dims = s.dims();
        let [lead @ .., new, all] = &mask.dims[..] else { return false };
        let fits = mask.dims.len() <= dims.len()
            && (*new, *all) == (s.new, s.all)
            && lead.iter().rev().zip(dims.iter().rev().skip(2)).all(|(&m, &d)| m == 1 || m == d);
        let past = s.all - s.new.min(s.all);
        let seen = |i: usize| i % all <= past + i / all % new;
        fits && match &mask.data {
            Data::Floats(v) => {
                v.iter().enumerate().all(|(i, &x)| if seen(i) { x == 0.0 } else { x <= HIDDEN })
            }
            Data::Bools(v) => v.iter().enumerate().all(|(i, &x)| x == seen(i)),
            Data::Ints(_) => false,
        }
    }
}

/// Positions of the second axis from the end, channels of the last.
fn position_channels(r: &Real) -> Option<(usize, u64)> {
    let [.., p, c] = &r.axes[..] else { return None };
    match (&p[..], &c[..]) {
        ([p], [c]) if p.kind == Kind::Pos && c.kind == Kind::Chan && c.stride == 1 => {
            Some((p.size, c.size as u64))
        }
        _ => None,
    }
}

/// The heads of keys or values: how many, if each is repeated for neighbouring query heads.
fn shared(lead: &[Axis], queries: &[Axis], d: u64, heads: u64) -> Option<u64> {
    let rank = queries.len();
    if lead.len() > rank {
        return None;
    }
    let mut all: Vec<Axis> = vec![Vec::new(); rank - lead.len()];
    all.extend(lead.iter().cloned());
    // An axis of size 1 beside heads repeats.
    for (a, q) in all.iter_mut().zip(queries) {
        if a.is_empty() && !q.is_empty() {
            a.push(Digit { kind: Kind::Rep, size: size(q), stride: 0 });
        }
    }
    let digits = flat(&all);
    let mut digits = digits.iter().filter(|d| d.kind != Kind::Batch).peekable();
    let kv = match digits.next_if(|c| c.kind == Kind::Chan && c.stride == d) {
        Some(c) => c.size as u64,
        None => 1,
    };
    let repeats: u64 = digits.map(|r| if r.kind == Kind::Rep { r.size as u64 } else { 0 }).product();
    (kv * repeats == heads).then_some(kv)
}

impl Eval {
    /// A product of two values: of queries and keys.
    pub(super) fn scores(&mut self, q: &Real, k: &Real) -> Result<Val, String> {
        let rank = k.axes.len();
        let mut swap: Vec<usize> = (0..rank).collect();
        swap.swap(rank.saturating_sub(1), rank.saturating_sub(2));
        let keys = k.transposed(&swap)?;
        let (Some((new, d)), Some((all, e))) = (position_channels(q), position_channels(&keys)) else {
            return Err("a product of two values that are no queries and keys".into());
        };
        let (lead, of_keys) = (q.axes[..q.axes.len() - 2].to_vec(), &keys.axes[..rank - 2]);
        let heads = self.terms.n(q.t) / d;
        let in_order = flat(&lead).iter().filter(|d| d.kind != Kind::Batch).copied().eq(channels(heads, d));
        let kv = shared(of_keys, &lead, d, heads).filter(|kv| d == e && kv * d == self.terms.n(k.t));
        let (Some(kv), true) = (kv, in_order) else {
            return Err("heads of queries and keys that do not belong together in order".into());
        };
        let (q, by_q) = self.unscaled(q.t);
        let (k, by_k) = self.unscaled(k.t);
        let scale = by_q * by_k;
        Ok(Val::Scores(Rc::new(Scores { q, k, lead, kv, d, scale, masked: false, shares: false, new, all })))
    }

    /// A term without a number that it is multiplied by.
    fn unscaled(&self, t: T) -> (T, f64) {
        if let Term::Bin(op @ (Bin::Mul | Bin::Div), a, b, _) = *self.terms.get(t) {
            match (self.terms.number(a), self.terms.number(b), op) {
                (_, Some(x), Bin::Mul) => return (a, f64::from(x)),
                (_, Some(x), _) => return (a, 1.0 / f64::from(x)),
                (Some(x), _, Bin::Mul) => return (b, f64::from(x)),
                _ => {}
            }
        }
        (t, 1.0)
    }

    /// Values by their shares.
    pub(super) fn weighted(&mut self, s: &Rc<Scores>, v: &Real) -> Made {
        let Some((all, d)) = position_channels(v) else { return Err("values that are no heads".into()) };
        let heads = self.terms.n(s.q) / s.d;
        let kv = shared(&v.axes[..v.axes.len() - 2], &s.lead, d, heads);
        if kv != Some(s.kv) || d != s.d || all != s.all || !s.shares || d * s.kv != self.terms.n(v.t) {
            return Err("values whose heads are not those of the keys, or scores without softmax".into());
        }
        let t = self.attend(s.q, s.k, v.t, s.kv, s.d, s.scale);
        let mut axes = s.lead.clone();
        axes.extend([vec![Digit::pos(s.new)], channels(d, 1)]);
        one(Real { t, axes })
    }

    fn attend(&mut self, q: T, k: T, v: T, kv: u64, d: u64, scale: f64) -> T {
        // The formula's own value, where a graph has it in single precision.
        let exact = 1.0 / (d as f64).sqrt();
        let scale = if (scale / exact - 1.0).abs() < 1e-6 { exact } else { scale };
        let heads = (self.terms.n(q) / d) as u32;
        let attr = AttnAttr { heads, kv_heads: kv as u32, scale: Number(scale) };
        self.terms.attention(q, k, v, attr)
    }

    pub(super) fn attention_node(&mut self, node: &Node, ins: &[Option<Val>]) -> Option<Made> {
        let get = |i: usize| ins.get(i).and_then(Option::as_ref);
        match (node.domain.as_str(), node.op.as_str()) {
            ("com.microsoft", "GroupQueryAttention") => return Some(self.grouped(node, ins)),
            ("com.microsoft", "MultiHeadAttention") => return Some(self.multihead(node, ins)),
            ("com.microsoft", "RotaryEmbedding") => return Some(self.rotary_embedding(node, ins)),
            ("", "Where") => {
                return match (get(0)?, get(1)?, get(2)?) {
                    // Rows without any key are made 0.
                    (Val::Lost(_), Val::Known(_) | Val::Stored { .. }, Val::Scores(s)) => {
                        Some(Ok(vec![Val::Scores(s.clone())]))
                    }
                    (mask, Val::Scores(s), low) => {
                        let (mask, low) = (self.known(mask)?, self.known(low)?.scalar()?);
                        Some(self.masked(s, &mask, low <= HIDDEN))
                    }
                    _ => None,
                };
            }
            _ => {}
        }
        let at = ins.iter().position(|v| matches!(v, Some(Val::Scores(_))))?;
        let Some(Val::Scores(s)) = get(at) else { return None };
        if !node.domain.is_empty() {
            return None;
        }
        let other = ins.get(1 - at.min(1)).and_then(Option::as_ref).and_then(|v| self.known(v));
        let with = |s: Scores| Some(Ok(vec![Val::Scores(Rc::new(s))]));
        let number = other.as_ref().and_then(|k| k.scalar());
        match (node.op.as_str(), number) {
            ("Identity" | "Cast" | "Dropout", _) => Some(Ok(vec![Val::Scores(s.clone())])),
            ("IsNaN", _) => Some(Ok(vec![Val::Lost(s.clone())])),
            ("Mul", Some(x)) if !s.masked => with(Scores { scale: s.scale * f64::from(x), ..(**s).clone() }),
            ("Div", Some(x)) if !s.masked && at == 0 => {
                with(Scores { scale: s.scale / f64::from(x), ..(**s).clone() })
            }
            ("Add", _) if !s.shares => Some(match &other {
                Some(mask) => self.masked(s, mask, true),
                None => {
                    Err("a mask that is computed from tokens, or an input whose name has no `mask` in it"
                        .into())
                }
            }),
            ("Softmax", _) => {
                let last = node.int("axis").unwrap_or(-1);
                let rank = s.dims().len() as i64;
                if !s.masked || !(last == -1 || last == rank - 1) {
                    return Some(Err("attention without a causal mask: qrmc reads decoders".into()));
                }
                with(Scores { shares: true, ..(**s).clone() })
            }
            _ => None,
        }
    }

    fn masked(&self, s: &Rc<Scores>, mask: &Known, hides: bool) -> Made {
        if s.masked || !hides || !s.is_causal(mask) {
            return Err("a mask that is not causal attention to all earlier positions".into());
        }
        Ok(vec![Val::Scores(Rc::new(Scores { masked: true, ..(**s).clone() }))])
    }

    /// Tables of cosines and sines of all positions, as the rotary embedding that they are. Each is looked at once.
    fn tables(&mut self, cos: Option<&Val>, sin: Option<&Val>, d: u64) -> Result<qrmc_ir::RopeAttr, String> {
        let tensor = |v: Option<&Val>| match v {
            Some(Val::Stored { tensor, swapped: false, .. }) => Some(*tensor),
            _ => None,
        };
        let Some(key) = tensor(cos).zip(tensor(sin)) else { return self.angles(cos, sin, d) };
        if let Some(found) = self.tables.get(&key).filter(|r| u64::from(r.head_dim) == d) {
            return Ok(*found);
        }
        let found = self.angles(cos, sin, d)?;
        self.tables.insert(key, found);
        Ok(found)
    }

    fn angles(&mut self, cos: Option<&Val>, sin: Option<&Val>, d: u64) -> Result<qrmc_ir::RopeAttr, String> {
        let both = [cos, sin].map(|v| v.and_then(|v| self.known(v)));
        let [Some(cos), Some(sin)] = both else {
            return Err("tables of cosines and sines that are not stored".into());
        };
        let half = (d / 2) as usize;
        let (Some(c), Some(s), [rows, width]) = (cos.as_floats(), sin.as_floats(), &cos.dims[..]) else {
            return Err("tables that hold no floats".into());
        };
        if *width != half || sin.dims != cos.dims || *rows < 2 {
            return Err(format!("tables {:?} for heads of {d}", cos.dims));
        }
        let row = |v: &[f32], r: usize| v[r * half..(r + 1) * half].to_vec();
        let loose = cos.origin.map_or(0.0, |t| super::rotary::rounding(self.stored(t).ty));
        let found = super::rotary::plain(&row(c, 1), &row(s, 1));
        let coarse = if loose > 0.0 { super::rotary::coarse(c, s, half) } else { Vec::new() };
        for attr in found.into_iter().chain(coarse) {
            if !self.terms.ropes.contains(&attr) {
                self.terms.ropes.push(attr);
            }
        }
        let fits = |a: &&qrmc_ir::RopeAttr| {
            u64::from(a.head_dim) == d
                && (0..*rows).all(|r| super::rotary::fits(a, r, [&row(c, r), &row(s, r)], loose))
        };
        self.terms.ropes.iter().find(fits).copied().ok_or_else(|| UNKNOWN_ROPE.to_owned())
    }

    fn rotary_embedding(&mut self, node: &Node, ins: &[Option<Val>]) -> Made {
        let get = |i: usize| ins.get(i).and_then(Option::as_ref);
        if node.int("interleaved").unwrap_or(0) != 0 || node.int("rotary_embedding_dim").unwrap_or(0) != 0 {
            return Err("a rotary embedding of neighbours, or of a part of a head".into());
        }
        let Some(Val::Real(x)) = get(0) else { return Err("no activations".into()) };
        let d = get(2).map(|v| self.dims(v)).and_then(|dims| dims.get(1).map(|&h| 2 * h as u64)).unwrap_or(0);
        let at = get(1).and_then(|v| self.known(v));
        let (first, new) = (self.probe.past as i64, self.probe.new as i64);
        let want = |v: &[i64]| {
            v == [first] || v.chunks(new as usize).all(|r| r.iter().copied().eq(first..first + new))
        };
        if !at.as_ref().and_then(|k| k.as_ints()).is_some_and(want) {
            return Err("positions that are not those of the tokens".into());
        }
        let attr = self.tables(get(2), get(3), d)?;
        one(Real { t: self.terms.rope(x.t, attr), axes: x.axes.clone() })
    }

    /// `GroupQueryAttention`: positions, caches, mask and attention in one.
    fn grouped(&mut self, node: &Node, ins: &[Option<Val>]) -> Made {
        let get = |i: usize| ins.get(i).and_then(Option::as_ref);
        let int = |name: &str| node.int(name).unwrap_or(0);
        if int("local_window_size") > 0
            || node.float("softcap").unwrap_or(0.0) != 0.0
            || int("smooth_softmax") > 0
        {
            return Err("a window, a cap or a sink in attention".into());
        }
        if let Some(i) = (10..ins.len()).find(|&i| get(i).is_some()) {
            return Err(format!("operand {i} of GroupQueryAttention, which is not read"));
        }
        let (heads, kv) = (int("num_heads").max(1) as u64, int("kv_num_heads").max(1) as u64);
        let mut q = term_of(self, get(0))?;
        let [mut k, v] = match (get(1), get(2)) {
            (None, None) => {
                let n = self.terms.n(q);
                let d = n / (heads + 2 * kv);
                let all = q;
                q = self.terms.part(all, n, 0, heads * d);
                [0, 1].map(|i| self.terms.part(all, n, (heads + i * kv) * d, kv * d))
            }
            (k, v) => [term_of(self, k)?, term_of(self, v)?],
        };
        let d = self.terms.n(q) / heads;
        if d == 0 || d * heads != self.terms.n(q) || d * kv != self.terms.n(k) || heads % kv != 0 {
            return Err(format!(
                "{heads} and {kv} heads of {} and {} channels",
                self.terms.n(q),
                self.terms.n(k)
            ));
        }
        let lengths = [(5, self.probe.all() as i64 - 1), (6, self.probe.all() as i64)];
        for (i, want) in lengths {
            let have = get(i).and_then(|v| self.known(v));
            if !have.as_ref().and_then(|k| k.as_ints()).is_some_and(|v| v.iter().all(|&n| n == want)) {
                return Err(format!("lengths in operand {i} that are not those of the tokens and the cache"));
            }
        }
        if int("do_rotary") != 0 {
            if int("rotary_interleaved") != 0 {
                return Err("a rotary embedding of neighbours".into());
            }
            let attr = self.tables(get(7), get(8), d)?;
            q = self.terms.rope(q, attr);
            k = self.terms.rope(k, attr);
        }
        let mut all = Vec::new();
        for (i, new) in [(3, k), (4, v)] {
            let Some(Val::Real(past)) = get(i) else { return Err("no cache".into()) };
            if !matches!(self.terms.get(past.t), Term::Past(_)) || self.terms.n(past.t) != self.terms.n(new) {
                return Err("a cache that is no input of the model".into());
            }
            let mut axes = past.axes.clone();
            axes[2] = vec![Digit::pos(self.probe.all())];
            all.push(Real { t: self.terms.append(past.t, new), axes });
        }
        let scale = match node.float("scale").unwrap_or(0.0) {
            0.0 => 1.0 / (d as f64).sqrt(),
            s => f64::from(s),
        };
        let t = self.attend(q, all[0].t, all[1].t, kv, d, scale);
        let y = Real::rows(t, self.probe.batch, self.probe.new, (heads * d) as usize);
        debug_assert_eq!(self.terms.pos(t), Pos::New);
        Ok(std::iter::once(y).chain(all).map(Val::Real).collect())
    }
}

/// Why tables are refused.
const UNKNOWN_ROPE: &str = "tables of cosines and sines that are no rotary embedding with a plain base; where frequencies \
                            are scaled, config.json beside the model has to say how";
