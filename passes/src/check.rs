//! Proof by running: two modules on the same seeded tokens, a layer at a time.

use qrmc_ir::{Diag, Elem, Engine, EngineError, Identity, Module, Op, Tensor, WeightSource};

/// Most channels of hidden states that are made from a seed: a larger fact is not believed, and the run says what it wants.
const MOST_HIDDEN: u64 = 1 << 20;

/// How far two results are apart.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Gap {
    /// Largest difference.
    pub absolute: f64,
    /// Largest difference over the largest magnitude.
    pub relative: f64,
}

/// Token ids from a seed, `[1, len]` (SplitMix64).
pub fn seeded_tokens(seed: u64, len: usize, vocab: u64) -> Tensor {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let ids = (0..len).map(|_| (next() % vocab.max(1)) as i32).collect();
    Tensor::i32([1, len], ids)
}

/// What `@main` starts from, made from a seed: tokens `[1, len]`, or the hidden states `[1, len, hidden]` of a block, from -1
/// to 1.
pub fn seeded_input(seed: u64, len: usize, module: &Module) -> Tensor {
    let main = module.find_func("main").map(|f| module.func(f));
    let first = main.and_then(|f| Some(f.ty(*f.params.first()?)));
    match first {
        Some(ty) if ty.elem == Elem::F32 => {
            let hidden = module.facts.hidden.min(MOST_HIDDEN) as usize;
            let draws = seeded_tokens(seed, len * hidden, 1 << 16);
            let values = draws.as_i32().unwrap_or(&[]).iter().map(|&d| d as f32 / 32768.0 - 1.0);
            Tensor::f32([1, len, hidden], values.collect())
        }
        _ => seeded_tokens(seed, len, module.facts.vocab),
    }
}

/// The first result of `@main`, logits or hidden states, on tokens `[B, S]` or hidden states `[B, S, hidden]`, in two parts
/// through its caches, holding the weights of one function at a time.
///
/// # Errors
/// What the engine says.
pub fn forward(
    engine: &dyn Engine,
    module: &Module,
    weights: &dyn WeightSource,
    input: &Tensor,
) -> Result<Tensor, EngineError> {
    let missing = |what: &str| EngineError::System(format!("the module has no {what}"));
    let main = module.find_func("main").ok_or_else(|| missing("@main"))?;
    let main = module.func(main);
    let (b, s) = (input.shape()[0], input.shape()[1]);
    let width = (module.facts.kv_heads * module.facts.head_dim) as usize;
    let mut caches = vec![Tensor::zeros([b, 0, width]); main.params.len().saturating_sub(2)];
    let mut logits: Vec<Tensor> = Vec::new();
    // In two parts: what the first leaves in the caches, the second reads.
    for (from, to) in [(0, s.div_ceil(2)), (s.div_ceil(2), s)] {
        if from == to {
            continue;
        }
        let mut args = vec![
            positions(input, from, to).ok_or_else(|| missing("tokens or hidden states as arguments"))?,
            Tensor::i32([to - from], (from as i32..to as i32).collect()),
        ];
        args.append(&mut caches);
        let mut results = calls(engine, module, main, weights, args)?.into_iter();
        logits.push(results.next().ok_or_else(|| missing("logits"))?);
        caches = results.collect();
    }
    let join = |parts: &[Tensor]| {
        let n = parts[0].shape()[2];
        let mut data = Vec::new();
        for i in 0..b {
            for p in parts {
                let row = p.shape()[1] * n;
                data.extend_from_slice(&p.as_f32()?[i * row..(i + 1) * row]);
            }
        }
        Some(Tensor::f32([b, s, n], data))
    };
    join(&logits).ok_or_else(|| missing("logits in f32"))
}

/// Some positions of tokens `[B, S]` or hidden states `[B, S, n]`.
fn positions(input: &Tensor, from: usize, to: usize) -> Option<Tensor> {
    fn cut<T: Copy>(v: &[T], [b, s, n]: [usize; 3], from: usize, to: usize) -> Vec<T> {
        (0..b).flat_map(|i| v[(i * s + from) * n..(i * s + to) * n].iter().copied()).collect()
    }
    match *input.shape() {
        [b, s] => Some(Tensor::i32([b, to - from], cut(input.as_i32()?, [b, s, 1], from, to))),
        [b, s, n] => Some(Tensor::f32([b, to - from, n], cut(input.as_f32()?, [b, s, n], from, to))),
        _ => None,
    }
}

/// Results of a function made of calls.
fn calls(
    engine: &dyn Engine,
    module: &Module,
    main: &qrmc_ir::Func,
    weights: &dyn WeightSource,
    args: Vec<Tensor>,
) -> Result<Vec<Tensor>, EngineError> {
    let missing = |what: &str| EngineError::System(format!("the module has no {what}"));
    let mut values: Vec<Option<Tensor>> = vec![None; main.value_count()];
    for (p, t) in main.params.iter().zip(args) {
        values[p.0 as usize] = Some(t);
    }
    for node in &main.nodes {
        let Op::Call(f) = node.op else { return Err(missing("@main made of calls")) };
        let args: Vec<&Tensor> = node.ins.iter().filter_map(|v| values[v.0 as usize].as_ref()).collect();
        let outs = engine.run(module, module.func(f), weights, &args)?;
        for (o, t) in node.outs.iter().zip(outs) {
            values[o.0 as usize] = Some(t);
        }
    }
    main.results
        .iter()
        .map(|r| values[r.0 as usize].clone().ok_or_else(|| missing("result that is computed")))
        .collect()
}

/// The gap between two tensors of one shape. NaN is infinitely far from everything.
pub fn logit_gap(have: &Tensor, want: &Tensor) -> Gap {
    let (h, w) = (have.as_f32().unwrap_or(&[]), want.as_f32().unwrap_or(&[]));
    let mut gap = Gap { absolute: if h.len() == w.len() { 0.0 } else { f64::INFINITY }, relative: 0.0 };
    let mut size = 0.0f64;
    for (&a, &b) in h.iter().zip(w) {
        let d = (f64::from(a) - f64::from(b)).abs();
        gap.absolute = if d.is_nan() { f64::INFINITY } else { gap.absolute.max(d) };
        size = size.max(f64::from(b).abs());
    }
    gap.relative = if gap.absolute == 0.0 { 0.0 } else { gap.absolute / size.max(f64::MIN_POSITIVE) };
    gap
}

/// A module and where its weights are.
pub type Sourced<'a> = (&'a Module, &'a dyn WeightSource);

/// The gap between the logits of two modules over the same weights, with quantizers as the identity. Equal graphs are
/// told apart without running them.
///
/// # Errors
/// What the engine says; logits of `before` that are not finite (`Q0611`).
pub fn compare_logits(
    engine: &dyn Engine,
    before: &Module,
    after: &Module,
    weights: &dyn WeightSource,
    input: &Tensor,
) -> Result<Gap, EngineError> {
    let before = qrmc_ir::module_without_quantizers(before, Identity::All)?;
    let after = qrmc_ir::module_without_quantizers(after, Identity::All)?;
    let same = before.funcs.len() == after.funcs.len()
        && before
            .funcs
            .iter()
            .zip(&after.funcs)
            .all(|(a, b)| qrmc_ir::print_func(&before, a) == qrmc_ir::print_func(&after, b));
    if same {
        return Ok(Gap { absolute: 0.0, relative: 0.0 });
    }
    let want = forward(engine, &before, weights, input)?;
    if want.as_f32().is_some_and(|v| v.iter().any(|x| !x.is_finite())) {
        let m = "the model gives NaN or infinity on the tokens of the check, before this step";
        return Err(Diag::new("Q0611", m).hint("it overflows in f32: look at its weights").into());
    }
    let have = forward(engine, &after, weights, input)?;
    Ok(logit_gap(&have, &want))
}

/// As [`compare_logits`] for modules over weights of their own, what was compiled and what was written. Weights are
/// rounded and clipped in both; only the quantizers of values that are computed online are the identity.
///
/// # Errors
/// What the engine says.
pub fn compare_sourced(
    engine: &dyn Engine,
    before: Sourced<'_>,
    after: Sourced<'_>,
    input: &Tensor,
) -> Result<Gap, EngineError> {
    let mut logits = Vec::new();
    for (module, weights) in [before, after] {
        logits.push(forward(
            engine,
            &qrmc_ir::module_without_quantizers(module, Identity::Online)?,
            weights,
            input,
        )?);
    }
    Ok(logit_gap(&logits[1], &logits[0]))
}
