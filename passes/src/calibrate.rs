//! Calibration: text streamed through the model a layer at a time, and the store of finished steps.

use qrmc_ir::{Data, EngineError, FuncId, Hash, Tensor, print_func};

use crate::pass::{Event, LayerLoss, PassCx, PassError};
use crate::unit::{Kept, Unit};

/// Tokens that run through a layer at a time. A constant: sums over batches must not depend on the machine.
const BATCH_TOKENS: usize = 1024;

/// Windows of calibration text.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// Windows; neighbours of one length run through a layer together.
    pub windows: Vec<Vec<i32>>,
    /// Where they are from, for people and for the recipe.
    pub description: String,
}

impl Calibration {
    /// Length of the longest window.
    pub fn seqlen(&self) -> usize {
        self.windows.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.windows.iter().map(Vec::len).sum()
    }

    /// Identity of the tokens.
    pub fn hash(&self) -> Hash {
        let bytes: Vec<Vec<u8>> =
            self.windows.iter().map(|w| w.iter().flat_map(|t| t.to_le_bytes()).collect()).collect();
        Hash::of(bytes.iter().map(Vec::as_slice))
    }

    fn batches(&self) -> impl Iterator<Item = Tensor> + '_ {
        self.windows.chunk_by(|a, b| a.len() == b.len()).flat_map(|group| {
            let len = group.first().map_or(0, Vec::len);
            let per = (BATCH_TOKENS / len.max(1)).max(1);
            group.chunks(per).map(move |w| Tensor::i32([w.len(), len], w.concat()))
        })
    }
}

/// Keeps the results of finished steps by key, so that a run that was killed goes on where it was.
pub trait StepStore: Send + Sync {
    /// The tensors kept under a key; `None` if there are none or they are damaged.
    fn get(&self, key: &Hash) -> Option<Vec<(String, Tensor)>>;

    /// Keeps tensors under a key, whole or not at all.
    ///
    /// # Errors
    /// A sentence, if they cannot be written.
    fn put(&self, key: &Hash, tensors: &[(String, Tensor)]) -> Result<(), String>;

    /// Forgets a key.
    fn forget(&self, key: &Hash);

    /// Whether what was put can be got again for as long as the module is worked on.
    fn keeps(&self) -> bool {
        true
    }
}

/// Keeps nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoStore;

impl StepStore for NoStore {
    fn get(&self, _key: &Hash) -> Option<Vec<(String, Tensor)>> {
        None
    }
    fn put(&self, _key: &Hash, _tensors: &[(String, Tensor)]) -> Result<(), String> {
        Ok(())
    }
    fn forget(&self, _key: &Hash) {}
    fn keeps(&self) -> bool {
        false
    }
}

/// One layer during calibration.
pub struct LayerRun<'a> {
    /// Which layer.
    pub index: usize,
    /// How many there are.
    pub total: usize,
    /// Its function.
    pub func: FuncId,
    /// The residual stream before the layer, in batches `[B, S, hidden]`.
    pub stream: &'a [Tensor],
}

/// The arguments of a layer's function behind the first: positions, and caches that hold nothing.
pub(crate) fn rest_args(unit: &Unit, x: &Tensor) -> [Tensor; 3] {
    let facts = &unit.module.facts;
    let (b, s) = (x.shape()[0], x.shape()[1]);
    let empty = Tensor::zeros([b, 0, (facts.kv_heads * facts.head_dim) as usize]);
    [Tensor::i32([s], (0..s as i32).collect()), empty.clone(), empty]
}

/// Results of one layer: named tensors, the losses that were measured, and events.
pub(crate) type LayerResult = Vec<(String, Tensor)>;

/// Values of a layer on every batch: `wanted[v][batch]`, and the stream behind the layer. The layer runs once; its
/// quantizers are the identity.
pub(crate) fn observe(
    unit: &Unit,
    cx: &PassCx<'_>,
    run: &LayerRun<'_>,
    wanted: &[qrmc_ir::ValueId],
) -> Result<(Vec<Vec<Tensor>>, Vec<Tensor>), PassError> {
    let m = &unit.module;
    let f = m.func(run.func);
    let all: Vec<qrmc_ir::ValueId> = wanted.iter().copied().chain(f.results.first().copied()).collect();
    let named = qrmc_ir::extract(m, f, "observe", &f.params, &all)?;
    let func = cx.engine.prepare(
        m,
        &qrmc_ir::without_quantizers(m, &named, qrmc_ir::Identity::All)?,
        &unit.weights,
    )?;
    let mut values: Vec<Vec<Tensor>> = vec![Vec::new(); wanted.len()];
    let mut next = Vec::with_capacity(run.stream.len());
    for x in run.stream {
        let rest = rest_args(unit, x);
        let mut out = func.run(&[x, &rest[0], &rest[1], &rest[2]])?;
        next.extend(out.pop());
        for (list, t) in values.iter_mut().zip(out) {
            list.push(t);
        }
    }
    finite(unit, run.func, &next)?;
    Ok((values, next))
}

type Work<'a> =
    dyn FnMut(&Unit, &mut PassCx<'_>, &LayerRun<'_>) -> Result<(LayerResult, Vec<Tensor>), PassError> + 'a;
type Apply<'a> = dyn FnMut(&mut Unit, FuncId, LayerResult, &Kept) -> Result<(), PassError> + 'a;

/// Which layers the residual stream of a walk has passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stream {
    /// The layers as they were before the pass.
    Before,
    /// The layers as the pass leaves them.
    After,
}

/// Streams the calibration text through the layers. For each layer, `work` computes named tensors from the layer and
/// its inputs, and the stream behind it; `apply` puts the tensors into the unit. Results are kept in the store under a
/// key of everything that they depend on; where they are found there, only `apply` runs.
pub(crate) fn walk_layers(
    unit: &mut Unit,
    cx: &mut PassCx<'_>,
    (pass, source): (&str, Stream),
    work: &mut Work<'_>,
    apply: &mut Apply<'_>,
) -> Result<(), PassError> {
    let Some(calibration) = cx.calibration else {
        return Err(PassError::Calibration {
            what: format!("`{pass}` needs calibration text"),
            hint: "give some with --calib PATH: a text, jsonl, parquet or arrow file, or a data set folder"
                .into(),
        });
    };
    let name = pass.split('{').next().unwrap_or(pass);
    let layers = unit.module.layers();
    let mut key = Hash::of([
        cx.source_key.as_bytes(),
        pass.as_bytes(),
        &calibration.hash().0,
        unit.weights.hash().hex().as_bytes(),
        unit.module
            .find_func("embed")
            .map(|f| print_func(&unit.module, unit.module.func(f)))
            .unwrap_or_default()
            .as_bytes(),
    ]);
    let keys: Vec<Hash> = layers
        .iter()
        .map(|&f| {
            key = Hash::of([&key.0[..], print_func(&unit.module, unit.module.func(f)).as_bytes()]);
            key
        })
        .collect();
    let store = cx.store.clone();
    let kept = |key: &Hash| Kept { store: store.clone(), key: *key };
    let stream_key = |k: &Hash| Hash::of([&k.0[..], b"stream"]);
    // The layers of the module as it was.
    let before = unit.clone();
    let mut stream: Option<Vec<Tensor>> = None;
    for (index, &func) in layers.iter().enumerate() {
        if cx.report.interrupted() {
            return Err(PassError::Interrupted);
        }
        if let Some(found) = cx.store.get(&keys[index]) {
            apply(unit, func, report(cx, name, index, found), &kept(&keys[index]))?;
            cx.report.progress(name, index + 1, layers.len(), "kept from before");
            // The stream behind the last finished layer was kept; only the first unfinished layer asks for it.
            stream = None;
            continue;
        }
        let inputs = match stream.take() {
            Some(s) => s,
            None => {
                let of = if source == Stream::Before { &before } else { &*unit };
                recover_stream(of, cx, calibration, &layers[..index], &keys[..index], stream_key)?
            }
        };
        let run = LayerRun { index, total: layers.len(), func, stream: &inputs };
        let (result, next) = work(unit, cx, &run)?;
        // The stream goes first: a kept result without its stream would cost a run through all layers before it.
        let named: Vec<(String, Tensor)> =
            next.into_iter().enumerate().map(|(i, t)| (format!("batch{i}"), t)).collect();
        cx.store.put(&stream_key(&keys[index]), &named).map_err(PassError::Store)?;
        cx.store.put(&keys[index], &result).map_err(PassError::Store)?;
        if index > 0 {
            cx.store.forget(&stream_key(&keys[index - 1]));
        }
        apply(unit, func, report(cx, name, index, result), &kept(&keys[index]))?;
        cx.report.progress(name, index + 1, layers.len(), "");
        stream = Some(named.into_iter().map(|(_, t)| t).collect());
    }
    if let Some(last) = keys.last() {
        cx.store.forget(&stream_key(last));
    }
    Ok(())
}

/// Tells the losses and events among the results of a layer, and gives the rest. Losses are named `*.loss` and hold
/// before and after; events are named `*.event` and hold a text.
fn report(cx: &mut PassCx<'_>, pass: &str, layer: usize, result: LayerResult) -> LayerResult {
    let mut rest = LayerResult::new();
    for (key, tensor) in result {
        match (key.rsplit_once('.'), tensor.data()) {
            (Some((what, "loss")), Data::F64(v)) => {
                cx.report.loss(pass, LayerLoss { layer, what: what.into(), before: v[0], after: v[1] });
            }
            (Some((what, "event")), Data::U8(v)) => {
                let text = String::from_utf8_lossy(v).into_owned();
                cx.report.event(pass, Event { layer, what: what.into(), text });
            }
            _ => rest.push((key, tensor)),
        }
    }
    rest
}

/// The stream behind these layers: kept, or computed from the tokens.
fn recover_stream(
    unit: &Unit,
    cx: &mut PassCx<'_>,
    calibration: &Calibration,
    layers: &[FuncId],
    keys: &[Hash],
    stream_key: impl Fn(&Hash) -> Hash,
) -> Result<Vec<Tensor>, PassError> {
    if let Some(kept) = keys.last().and_then(|key| cx.store.get(&stream_key(key))) {
        return Ok(kept.into_iter().map(|(_, t)| t).collect());
    }
    let embed = unit.module.find_func("embed").map(|f| unit.module.func(f));
    let Some(embed) = embed else {
        return Err(EngineError::System("the module has no @embed".into()).into());
    };
    let embed = cx.engine.prepare(&unit.module, embed, &unit.weights)?;
    let mut stream = Vec::new();
    for ids in calibration.batches() {
        stream.append(&mut embed.run(&[&ids])?);
    }
    for &f in layers {
        stream = advance(unit, cx, f, stream)?;
    }
    Ok(stream)
}

/// The stream behind a layer, with quantizers as the identity.
fn advance(
    unit: &Unit,
    cx: &PassCx<'_>,
    func: FuncId,
    stream: Vec<Tensor>,
) -> Result<Vec<Tensor>, PassError> {
    let run = LayerRun { index: 0, total: 0, func, stream: &stream };
    Ok(observe(unit, cx, &run, &[])?.1)
}

pub(crate) fn finite(unit: &Unit, func: FuncId, stream: &[Tensor]) -> Result<(), PassError> {
    match stream.iter().find(|t| !t.as_f32().is_some_and(|v| v.iter().all(|x| x.is_finite()))) {
        None => Ok(()),
        Some(t) => Err(PassError::Calibration {
            what: format!(
                "@{} gives NaN or infinity on the calibration text ({:?})",
                unit.module.func(func).name,
                t.shape()
            ),
            hint:
                "the source model overflows on this text; look at the text and at the model's rope settings"
                    .into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes(lengths: &[usize]) -> Vec<Vec<usize>> {
        let windows = lengths.iter().enumerate().map(|(i, &n)| vec![i as i32; n]).collect();
        let c = Calibration { windows, description: String::new() };
        let batches: Vec<Tensor> = c.batches().collect();
        let flat: Vec<i32> = batches.iter().flat_map(|b| b.as_i32().unwrap().to_vec()).collect();
        assert_eq!(flat, c.windows.concat());
        assert_eq!((c.tokens(), c.seqlen()), (flat.len(), lengths.iter().copied().max().unwrap_or(0)));
        batches.iter().map(|b| b.shape().to_vec()).collect()
    }

    #[test]
    fn neighbours_of_one_length_run_together() {
        assert_eq!(shapes(&[512, 512, 512]), [[2, 512], [1, 512]]);
        assert_eq!(shapes(&[400, 400, 7, 400, 7, 7]), [[2, 400], [1, 7], [1, 400], [2, 7]]);
        assert_eq!(shapes(&[2048, 2048]), [[1, 2048], [1, 2048]]);
        assert!(shapes(&[]).is_empty());
    }
}
