//! The inputs and outputs of a model, by what they are.

use std::collections::HashMap;

use qrmc_ir::RopeAttr;

use super::eval::{self, Eval, Probe, Val};
use super::facts::Beside;
use super::file::{Input, Model, Node, Type};
use super::known::{self, Data, Known};
use super::product;
use super::rotary;
use super::term::{Pos, T, Term};
use super::view::{Digit, Real};

/// The inputs of a model by what they are.
pub(super) struct Ports<'a> {
    stream: Stream<'a>,
    /// What follows from the sizes.
    known: Vec<(&'a Input, What)>,
    /// Caches with their heads and channels.
    pasts: Vec<(&'a Input, usize, usize)>,
}

/// What the layers work on.
#[derive(Clone, Copy)]
enum Stream<'a> {
    /// Tokens `[batch, new]`.
    Ids(&'a Input),
    /// Hidden states `[batch, new, hidden]`, and how many channels they have.
    Hidden(&'a Input, usize),
}

impl<'a> Stream<'a> {
    fn input(self) -> &'a Input {
        match self {
            Stream::Ids(i) | Stream::Hidden(i, _) => i,
        }
    }
}

#[derive(Clone, Copy)]
enum What {
    Mask,
    /// A mask `[batch, 1, new, all]`.
    Causal,
    Positions,
    PastLength,
    AllLength,
    /// Cosines, or else sines, `[batch, new, head_dim]` of a rotary embedding.
    Angles(RopeAttr, bool),
}

/// Names that exporters give to hidden states.
const HIDDEN: [&str; 2] = ["hidden_states", "inputs_embeds"];
/// How the inputs of a block are told apart.
const NAMES: &str = "hidden states are `hidden_states` or `inputs_embeds`, the tables of a rotary embedding `cos` and `sin`, \
                     or `position_embeddings` with more behind it";

impl<'a> Ports<'a> {
    pub(super) fn find(model: &'a Model, beside: &Beside) -> Result<Self, String> {
        let stored = model.by_name();
        // Old versions list tensors of the file as inputs, too.
        let inputs = model.inputs.iter().filter(|i| !stored.contains_key(i.name.as_str()));
        let (mut ids, mut rows, mut known, mut pasts) = (None, Vec::new(), Vec::new(), Vec::new());
        for i in inputs {
            let integer = matches!(i.ty, Some(Type::I64 | Type::I32));
            let float = i.ty.is_some_and(|t| t.float().is_some());
            match (i.name.as_str(), i.dims.len()) {
                ("input_ids", 2) if integer => ids = Some(i),
                ("attention_mask", 2) => known.push((i, What::Mask)),
                (name, 4) if i.ty == Some(Type::Bool) || float && name.contains("mask") => {
                    if !matches!(i.dims[1], None | Some(1)) {
                        return Err(format!(
                            "its input `{name}` has the sizes {}: a mask of four axes is [batch, 1, new, all]",
                            sizes(i)
                        ));
                    }
                    known.push((i, What::Causal));
                }
                ("position_ids" | "cache_position", 1 | 2) if integer => known.push((i, What::Positions)),
                ("past_seq_len" | "past_sequence_length", _) if integer => known.push((i, What::PastLength)),
                ("total_seq_len" | "total_sequence_length", _) if integer => known.push((i, What::AllLength)),
                (_, 4) if float => {
                    let d = i.dims[3].or(beside.head_dim).or_else(|| head_of(model, &stored));
                    let (Some(heads), Some(d)) = (i.dims[1], d) else {
                        return Err(format!(
                            "the sizes of the cache `{}` are not known: heads {:?}, channels {:?}",
                            i.name, i.dims[1], i.dims[3]
                        ));
                    };
                    if heads == 0 || d == 0 || heads.saturating_mul(d) > 1 << 24 {
                        return Err(format!("the cache `{}` has {heads} heads of {d}", i.name));
                    }
                    pasts.push((i, heads as usize, d as usize));
                }
                (_, 3) if float => rows.push(i),
                (_, rank) => {
                    let ty = i.ty.map_or("another type".to_owned(), |t| format!("type {t:?}"));
                    return Err(format!(
                        "its input `{}` of {ty} and {rank} axes is none that a decoder has: input_ids, or hidden states of \
                         three axes, attention_mask, position_ids and a cache of four axes for keys and one for values of \
                         each layer",
                        i.name
                    ));
                }
            }
        }
        let stream = sorted(ids, rows, &mut known, beside)?;
        Ok(Ports { stream, known, pasts })
    }

    /// The number of caches.
    pub(super) fn caches(&self) -> usize {
        self.pasts.len()
    }

    /// Whether the angles of positions are inputs.
    pub(super) fn has_angles(&self) -> bool {
        self.known.iter().any(|(_, what)| matches!(what, What::Angles(..)))
    }

    /// The sizes of a walk, where the model does not fix them.
    pub(super) fn probe(&self, free: Probe) -> Probe {
        let fixed = |d: Option<&Option<u64>>, otherwise: usize| match d {
            Some(Some(n)) if (1..=4096).contains(n) => *n as usize,
            _ => otherwise,
        };
        let past = self.pasts.first().map_or(0, |(i, ..)| fixed(i.dims.get(2), free.past));
        let dims = &self.stream.input().dims;
        Probe { batch: fixed(dims.first(), free.batch), new: fixed(dims.get(1), free.new), past }
    }

    /// Gives the inputs and stored tensors their values.
    pub(super) fn seed(&self, e: &mut Eval) -> Result<(), String> {
        let model = e.model.clone();
        for (tensor, t) in model.tensors.iter().enumerate() {
            let dims = t.dims.iter().map(|&d| d as usize).collect();
            e.values.insert(t.name.clone(), Val::Stored { tensor, dims, swapped: false });
        }
        let Probe { batch, new, past } = e.probe;
        let stream = match self.stream {
            Stream::Ids(_) => Val::Ids,
            Stream::Hidden(_, n) => {
                let t = e.terms.put(Term::Given, n as u64, Pos::New);
                Val::Real(Real::rows(t, batch, new, n))
            }
        };
        e.values.insert(self.stream.input().name.clone(), stream);
        for (input, what) in &self.known {
            let k = value(input, *what, e.probe)?;
            e.live += k.count();
            if e.live > eval::LIVE {
                return Err("its masks, positions and tables of angles are too much for a decoder".into());
            }
            e.values.insert(input.name.clone(), Val::Known(k.into()));
        }
        for (i, &(input, heads, d)) in self.pasts.iter().enumerate() {
            let t = e.terms.put(Term::Past(i as u32), (heads * d) as u64, Pos::Past);
            let axes = vec![
                vec![Digit::batch(batch)],
                product::channels(heads as u64, d as u64),
                vec![Digit::pos(past)],
                product::channels(d as u64, 1),
            ];
            e.values.insert(input.name.clone(), Val::Real(Real { t, axes }));
        }
        Ok(())
    }
}

/// Which of the inputs of three axes are hidden states; the others are tables of angles, which become known.
fn sorted<'a>(
    ids: Option<&'a Input>,
    mut rows: Vec<&'a Input>,
    known: &mut Vec<(&'a Input, What)>,
    beside: &Beside,
) -> Result<Stream<'a>, String> {
    let mut named =
        |find: &dyn Fn(&str) -> bool| rows.iter().position(|i| find(&i.name)).map(|at| rows.remove(at));
    let word = |name: &str, word: &str| name.split(|c: char| !c.is_ascii_alphanumeric()).any(|w| w == word);
    let hidden = HIDDEN.into_iter().find_map(|h| named(&|name| name == h));
    let mut angles = Vec::new();
    for (kind, cosines) in [("cos", true), ("sin", false)] {
        // Without words of their own, the first is that of cosines.
        let own = named(&|name| word(name, kind));
        angles.push((own.or_else(|| named(&|name| name.starts_with("position_embeddings"))), cosines));
    }
    for (input, cosines) in angles.into_iter().filter_map(|(i, cosines)| Some((i?, cosines))) {
        let (name, d) = (&input.name, input.dims[2]);
        let Some(rope) = beside.rope else {
            return Err(format!(
                "its input `{name}` is a table of a rotary embedding, of which nothing in the model says the base: \
                 config.json beside the model must say `rope_theta`"
            ));
        };
        if d.is_some_and(|d| d != u64::from(rope.head_dim)) {
            return Err(format!(
                "its input `{name}` has the sizes {}, config.json says heads of {}",
                sizes(input),
                rope.head_dim
            ));
        }
        known.push((input, What::Angles(rope, cosines)));
    }
    let list = |of: &[&Input]| of.iter().map(|i| format!("`{}`", i.name)).collect::<Vec<_>>().join(", ");
    let hidden = match (hidden, &rows[..]) {
        (Some(h), []) => Some(h),
        (None, [one]) => Some(*one),
        (None, []) => None,
        (_, more) => {
            return Err(format!("what its inputs {} of three axes are is not said: {NAMES}", list(more)));
        }
    };
    match (ids, hidden) {
        (Some(ids), None) => Ok(Stream::Ids(ids)),
        (Some(ids), Some(h)) => Err(format!(
            "its inputs {} are tokens and hidden states: a decoder starts from one of them",
            list(&[ids, h])
        )),
        (None, Some(h)) => {
            let n = h.dims[2].or(beside.hidden()).filter(|n| (1..=1 << 20).contains(n));
            let n = n.ok_or_else(|| {
                format!("its input `{}` has the sizes {}: the last must be a fixed number of channels, up to 2^20", h.name, sizes(h))
            })?;
            Ok(Stream::Hidden(h, n as usize))
        }
        (None, None) => Err(
            "it has no input `input_ids` with integers of two axes, and no hidden states, floats of three"
                .into(),
        ),
    }
}

/// The sizes of an input, with `?` for those that are not fixed.
fn sizes(i: &Input) -> String {
    let all: Vec<String> = i.dims.iter().map(|d| d.map_or("?".to_owned(), |n| n.to_string())).collect();
    format!("[{}]", all.join(", "))
}

/// The value of an input that follows from the sizes.
fn value(input: &Input, what: What, probe: Probe) -> Result<Known, String> {
    let Probe { batch, new, past } = probe;
    let (all, rank) = (probe.all(), input.dims.len());
    // What is the same for every sequence may be there once.
    let sequences = if input.dims.first() == Some(&Some(1)) { 1 } else { batch };
    let dims = match what {
        What::Mask => vec![batch, all],
        What::Causal => vec![sequences, 1, new, all],
        What::Positions if rank == 1 => vec![new],
        What::Positions => vec![sequences, new],
        What::PastLength | What::AllLength => vec![1; rank],
        What::Angles(rope, _) => vec![sequences, new, rope.head_dim as usize],
    };
    let n = known::product(&dims)?;
    let data = match what {
        What::Mask => Data::Ints(vec![1; n]),
        What::Causal => {
            let seen = (0..n).map(|i| i % all <= past + i / all % new);
            match input.ty {
                Some(Type::Bool) => Data::Bools(seen.collect()),
                _ => Data::Floats(seen.map(|s| if s { 0.0 } else { f32::MIN }).collect()),
            }
        }
        What::Positions => Data::Ints((0..n).map(|i| (past + i % new) as i64).collect()),
        What::PastLength => Data::Ints(vec![past as i64]),
        What::AllLength => Data::Ints(vec![all as i64]),
        What::Angles(rope, cosines) => {
            let [cos, sin] = rotary::table(&rope, past..all);
            Data::Floats(if cosines { cos } else { sin }.repeat(sequences))
        }
    };
    Ok(Known { dims, data, origin: None })
}

/// Channels of a head, where an operator with stored tables of angles says them.
fn head_of(model: &Model, stored: &HashMap<&str, usize>) -> Option<u64> {
    let table = |n: &Node| match n.op.as_str() {
        "GroupQueryAttention" => stored.get(n.inputs.get(7)?.as_str()),
        "RotaryEmbedding" => stored.get(n.inputs.get(2)?.as_str()),
        _ => None,
    };
    match model.tensors[*model.nodes.iter().find_map(table)?].dims[..] {
        [_, half] => half.checked_mul(2),
        _ => None,
    }
}

/// The output that is no cache: logits, or the hidden states behind the last layer.
pub(super) fn result(e: &Eval) -> Result<T, String> {
    let mut found = None;
    for name in &e.model.outputs {
        let Some(v) = e.values.get(name) else { return Err(format!("no node makes the output `{name}`")) };
        let Val::Real(r) = v else {
            return Err(format!("the output `{name}` does not depend on the tokens"));
        };
        match e.terms.get(r.t) {
            Term::Append(..) => {}
            _ if found.is_some() => {
                return Err(format!("the output `{name}` is neither logits or hidden states nor a cache"));
            }
            _ => found = Some(eval::rows(&e.terms, r).map_err(|e| format!("the output `{name}`: {e}"))?),
        }
    }
    found.ok_or_else(|| "none of its outputs are logits or hidden states".into())
}
