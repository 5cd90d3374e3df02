//! Attention, its cache, and rotary positions.

use std::collections::HashMap;

use onnx_protobuf::tensor_proto::DataType;
use qrmc_ir::{AttnAttr, Def, Dim, Op, RopeAttr, Sym, TensorType, ValueId};

use super::graph::CONTRIB;
use super::proto::{float, int};
use super::walk::{Frame, Value, Walk};
use super::{ATTENTION_MASK, FLOAT, Form, OnnxError};

/// Most bytes of a table of cosines or sines: a million positions of 128 channels. Beyond, angles are computed.
const MOST_TABLE: u64 = 1 << 28;

fn width(ty: &TensorType) -> i64 {
    ty.shape.last().and_then(Dim::fixed).unwrap_or(0) as i64
}

impl Walk<'_> {
    /// `past` and `new` one after the other.
    pub(super) fn cache_append(
        &mut self,
        past: &Value,
        new: &Value,
        tys: [&TensorType; 2],
    ) -> Result<Value, OnnxError> {
        let Value::Heads(past) = past else {
            let [past, new] = [self.plain(past, tys[0])?, self.plain(new, tys[1])?];
            return Ok(Value::Plain(self.g.op_with("Concat", &[&past, &new], vec![int("axis", 1)])));
        };
        let new = self.heads(new, tys[1], self.module.facts.kv_heads as i64)?;
        Ok(Value::Heads(self.g.op_with("Concat", &[past, &new], vec![int("axis", 2)])))
    }

    /// `[B, T, heads * d] -> [B, heads, T, d]`
    fn heads(&mut self, v: &Value, ty: &TensorType, heads: i64) -> Result<String, OnnxError> {
        match v {
            Value::Heads(name) if self.module.facts.kv_heads as i64 == heads => Ok(name.clone()),
            other => {
                let x = self.plain(other, ty)?;
                let x = self.g.reshape(&x, &[0, 0, heads, width(ty) / heads.max(1)]);
                Ok(self.g.transpose(&x, &[0, 2, 1, 3]))
            }
        }
    }

    /// Attention in standard operators: runs of query heads share a key head.
    pub(super) fn attention(
        &mut self,
        attr: &AttnAttr,
        ins: &[&Value],
        tys: [&TensorType; 3],
    ) -> Result<Value, OnnxError> {
        let (heads, shared) = (i64::from(attr.heads), i64::from(attr.kv_heads));
        let q = self.plain(ins[0], tys[0])?;
        let k = self.heads(ins[1], tys[1], shared)?;
        let v = self.heads(ins[2], tys[2], shared)?;
        let mask = self.mask();
        let g = &mut self.g;
        let split = [0, 0, shared, heads / shared.max(1), width(tys[0]) / heads.max(1)];
        let q = g.reshape(&q, &split);
        let q = g.transpose(&q, &[0, 2, 3, 1, 4]);
        let k = g.transpose(&k, &[0, 1, 3, 2]);
        let axes = g.ints(&[2]);
        let [k, v] = [k, v].map(|x| g.op("Unsqueeze", &[&x, &axes]));
        let scores = g.op("MatMul", &[&q, &k]);
        let scale = g.scalar(attr.scale.0 as f32);
        let scores = g.op("Mul", &[&scores, &scale]);
        let scores = g.op("Add", &[&scores, &mask]);
        let probabilities = g.op_with("Softmax", &[&scores], vec![int("axis", -1)]);
        let y = g.op("MatMul", &[&probabilities, &v]);
        let y = g.transpose(&y, &[0, 3, 1, 2, 4]);
        Ok(Value::Plain(g.reshape(&y, &[0, 0, width(tys[0])])))
    }

    /// `[B, 1, 1, S, T]`: 0 where a key is not after the query and is no padding, the least float elsewhere. So a row of
    /// padding, which sees no key, stays finite.
    fn mask(&mut self) -> String {
        if let Some(mask) = &self.shared.mask {
            return mask.clone();
        }
        let input = self.input;
        let g = &mut self.g;
        let scope = g.enter("");
        let [seen, new] = [ATTENTION_MASK, input].map(|x| {
            let n = g.op_with("Shape", &[x], vec![int("start", 1), int("end", 2)]);
            g.op("Squeeze", &[&n])
        });
        let past = g.op("Sub", &[&seen, &new]);
        let [zero, one] = [0, 1].map(|n| g.int(n));
        let queries = g.op("Range", &[&past, &seen, &one]);
        let keys = g.op("Range", &[&zero, &seen, &one]);
        let axes = g.ints(&[1]);
        let queries = g.op("Unsqueeze", &[&queries, &axes]);
        let causal = g.op("GreaterOrEqual", &[&queries, &keys]);
        let valid = g.cast(ATTENTION_MASK, DataType::BOOL);
        let axes = g.ints(&[1, 2, 3]);
        let valid = g.op("Unsqueeze", &[&valid, &axes]);
        let both = g.op("And", &[&causal, &valid]);
        let [nothing, least] = [0.0, f32::MIN].map(|x| g.scalar(x));
        let mask = g.op("Where", &[&both, &nothing, &least]);
        g.pin(&mask);
        g.enter(&scope);
        self.shared.mask = Some(mask.clone());
        mask
    }

    /// The rotary embedding in standard operators.
    pub(super) fn rope(
        &mut self,
        attr: &RopeAttr,
        x: &Value,
        pos: &Value,
        ty: &TensorType,
    ) -> Result<Value, OnnxError> {
        let x = self.plain(x, ty)?;
        let [cos, sin] = self.angles(attr, pos)?;
        let (d, half) = (i64::from(attr.head_dim), i64::from(attr.head_dim / 2));
        let g = &mut self.g;
        let x = g.reshape(&x, &[0, 0, width(ty) / d.max(1), d]);
        let axes = g.ints(&[3]);
        let [low, high] = [(0, half), (half, d)].map(|(from, to)| {
            let [from, to] = [from, to].map(|n| g.ints(&[n]));
            g.op("Slice", &[&x, &from, &to, &axes])
        });
        let mut mix = |a: &str, b: &str, op: &str| {
            let (a, b) = (g.op("Mul", &[a, &cos]), g.op("Mul", &[b, &sin]));
            g.op(op, &[&a, &b])
        };
        let halves = [mix(&low, &high, "Sub"), mix(&high, &low, "Add")];
        let y = g.op_with("Concat", &[&halves[0], &halves[1]], vec![int("axis", 3)]);
        Ok(Value::Plain(g.reshape(&y, &[0, 0, width(ty)])))
    }

    /// Cosines and sines `[B, S, 1, head_dim / 2]` of the new positions.
    fn angles(&mut self, attr: &RopeAttr, pos: &Value) -> Result<[String; 2], OnnxError> {
        let Value::Positions(pos) = pos else {
            let d = qrmc_ir::Diag::new("Q0501", "`rope` reads positions that are computed");
            return Err(d.hint("positions come from the second parameter of @main").into());
        };
        self.shared.positions = true;
        if let Some(angles) = self.shared.angles.get(attr) {
            return Ok(angles.clone());
        }
        let g = &mut self.g;
        let scope = g.enter("rope");
        let frequencies: Vec<f32> = attr.inv_freq().iter().map(|&f| f as f32).collect();
        let frequencies = g.floats(&[frequencies.len() as i64], &frequencies);
        let at = g.cast(pos, FLOAT);
        let axes = g.ints(&[2, 3]);
        let at = g.op("Unsqueeze", &[&at, &axes]);
        let angle = g.op("Mul", &[&at, &frequencies]);
        let factor = attr.attention_factor() as f32;
        let angles = ["Cos", "Sin"].map(|op| {
            let y = g.op(op, &[&angle]);
            let factor = g.scalar(factor);
            let y = g.op("Mul", &[&y, &factor]);
            g.pin(&y);
            y
        });
        g.enter(&scope);
        self.shared.angles.insert(*attr, angles.clone());
        Ok(angles)
    }

    /// Tables `[context, head_dim / 2]` of cosines and sines.
    fn tables(&mut self, attr: &RopeAttr) -> Result<[String; 2], OnnxError> {
        if let Some(tables) = self.shared.tables.get(attr) {
            return Ok(tables.clone());
        }
        let frequencies: Vec<f32> = attr.inv_freq().iter().map(|&f| f as f32).collect();
        let factor = attr.attention_factor() as f32;
        let context = self.module.facts.context;
        let mut table = |name: &str, f: fn(f64) -> f64| {
            // As the definition rounds: the angle, its cosine or sine, and the product are floats.
            let row = |p: u64| {
                frequencies
                    .iter()
                    .map(move |w| f(f64::from(p as f32 * w)) as f32 * factor)
                    .collect::<Vec<_>>()
            };
            let bytes: Vec<u8> = (0..context).flat_map(row).flat_map(f32::to_le_bytes).collect();
            let dims = [context as i64, frequencies.len() as i64];
            self.g.initializer(name, FLOAT, &dims, &bytes)
        };
        let tables = [table("cos_cache", f64::cos)?, table("sin_cache", f64::sin)?];
        self.shared.tables.insert(*attr, tables.clone());
        Ok(tables)
    }

    /// The last index of each sequence `[B]`, and the number of positions, as `GroupQueryAttention` wants them.
    fn lengths(&mut self) -> [String; 2] {
        if let Some(lengths) = &self.shared.lengths {
            return lengths.clone();
        }
        let g = &mut self.g;
        let scope = g.enter("");
        let axes = g.ints(&[1]);
        let last = g.op_with("ReduceSum", &[ATTENTION_MASK, &axes], vec![int("keepdims", 0)]);
        let one = g.ints(&[1]);
        let last = g.op("Sub", &[&last, &one]);
        let total = g.op_with("Shape", &[ATTENTION_MASK], vec![int("start", 1), int("end", 2)]);
        let total = g.op("Squeeze", &[&total]);
        let lengths = [last, total].map(|n| {
            let n = g.cast(&n, DataType::INT32);
            g.pin(&n);
            n
        });
        g.enter(&scope);
        self.shared.lengths = Some(lengths.clone());
        lengths
    }
}

/// Attention with the appending to its caches, and with the rotary embedding where nothing stands between: one
/// `GroupQueryAttention`.
pub(super) struct Fused {
    attr: AttnAttr,
    query: ValueId,
    /// New keys and values, before a rotary embedding that is part of it.
    new: [ValueId; 2],
    past: [ValueId; 2],
    all: [ValueId; 2],
    rope: Option<RopeAttr>,
    skipped: Vec<usize>,
}

impl Fused {
    /// By the number of the attention's node.
    pub(super) fn all(walk: &Walk<'_>, frame: &Frame<'_>) -> HashMap<usize, Fused> {
        if walk.form != Form::Ort {
            return HashMap::new();
        }
        let users = frame.func.users();
        let nodes = 0..frame.func.nodes.len();
        nodes.filter_map(|n| Some((n, Fused::of(walk, frame, &users, n)?))).collect()
    }

    /// Nodes that it takes the place of, beside the attention's.
    pub(super) fn skipped(&self) -> impl Iterator<Item = usize> + '_ {
        self.skipped.iter().copied()
    }

    fn of(walk: &Walk<'_>, frame: &Frame<'_>, users: &[Vec<usize>], n: usize) -> Option<Self> {
        let func = frame.func;
        let node = &func.nodes[n];
        let Op::Attention(attr) = node.op else { return None };
        let facts = &walk.module.facts;
        let head = width(frame.ty(node.ins[0])) / i64::from(attr.heads).max(1);
        // What the operator takes, and the layout of the caches.
        let fits =
            u64::from(attr.kv_heads) == facts.kv_heads && head as u64 == facts.head_dim && head % 8 == 0;
        if !fits {
            return None;
        }
        let only = |v: ValueId, user: usize| users[v.0 as usize] == [user];
        let made = |v: ValueId| match func.value(v).def {
            Def::Node(at, _) => Some(at as usize),
            Def::Param(_) => None,
        };
        let append = |all: ValueId| {
            let at = made(all).filter(|_| only(all, n))?;
            let [past, new] = func.nodes[at].ins[..] else { return None };
            let cached = matches!(frame.values[past.0 as usize], Some(Value::Heads(_)));
            (func.nodes[at].op == Op::CacheAppend && cached).then_some((at, past, new))
        };
        let all = [node.ins[1], node.ins[2]];
        let (at_k, past_k, new_k) = append(all[0])?;
        let (at_v, past_v, new_v) = append(all[1])?;
        let mut fused = Fused {
            attr,
            query: node.ins[0],
            new: [new_k, new_v],
            past: [past_k, past_v],
            all,
            rope: None,
            skipped: vec![at_k, at_v],
        };
        let rope = |v: ValueId, user: usize| {
            let at = made(v).filter(|_| only(v, user) && !func.results.contains(&v))?;
            let node = &func.nodes[at];
            let here = frame.ty(*node.ins.first()?).shape.0.get(1) == Some(&Dim::Sym(Sym::S));
            let given = matches!(frame.values[node.ins.get(1)?.0 as usize], Some(Value::Positions(_)));
            match node.op {
                Op::Rope(attr) if here && given => Some((at, attr, node.ins[0])),
                _ => None,
            }
        };
        let table = facts.context.saturating_mul(facts.head_dim / 2 * 4);
        let aligned = head % 16 == 0 && (1..=MOST_TABLE).contains(&table);
        if let (Some((at_q, q, query)), Some((at_k, k, key))) = (rope(fused.query, n), rope(new_k, at_k))
            && q == k
            && aligned
            && u64::from(q.head_dim) == facts.head_dim
        {
            fused.rope = Some(q);
            fused.query = query;
            fused.new[0] = key;
            fused.skipped.extend([at_q, at_k]);
        }
        Some(fused)
    }

    /// Writes the node; gives the attention's result and sets the caches.
    pub(super) fn write(&self, walk: &mut Walk<'_>, frame: &mut Frame<'_>) -> Result<Vec<Value>, OnnxError> {
        let mut inputs = Vec::new();
        for v in [self.query, self.new[0], self.new[1]] {
            inputs.push(walk.plain(frame.get(v), frame.ty(v))?);
        }
        for v in self.past {
            let Value::Heads(name) = frame.get(v) else { unreachable!("checked when it was found") };
            inputs.push(name.clone());
        }
        inputs.extend(walk.lengths());
        if let Some(attr) = &self.rope {
            inputs.extend(walk.tables(attr)?);
        }
        let mut attributes = vec![
            int("num_heads", i64::from(self.attr.heads)),
            int("kv_num_heads", i64::from(self.attr.kv_heads)),
            float("scale", self.attr.scale.0 as f32),
        ];
        if self.rope.is_some() {
            attributes.extend([int("do_rotary", 1), int("rotary_interleaved", 0)]);
        }
        let names: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let [y, k, v] = walk.g.domain_op(CONTRIB, "GroupQueryAttention", &names, attributes);
        for (all, present) in self.all.into_iter().zip([k, v]) {
            frame.values[all.0 as usize] = Some(Value::Heads(present));
        }
        Ok(vec![Value::Plain(y)])
    }
}
