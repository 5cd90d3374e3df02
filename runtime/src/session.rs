//! A loaded model: prefill and decode with caches.

use std::path::Path;

use qrmc_ir::{DimEnv, EngineError, ModelFacts, Module, Prepared, Tensor, WeightSource};

use crate::engine::{CpuEngine, Input, KvCache, Loaded, Source};
use crate::layout::{Identity, Layouts};

/// Positions that prefill runs at once, and rows of logits that exist at once.
pub const CHUNK: usize = 512;

/// Parameters of a layer that are its caches.
const KEYS: u32 = 2;
const VALUES: u32 = 3;

/// A model with its weights in memory, ready to run.
pub struct Session {
    embed: Loaded,
    layers: Vec<Loaded>,
    head: Loaded,
    facts: ModelFacts,
}

/// Keys and values of every layer.
pub struct Caches(Vec<(KvCache, KvCache)>);

impl Caches {
    /// Positions held.
    pub fn len(&self) -> usize {
        self.0.first().map_or(0, |(k, _)| k.len())
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of the memory that all of them take.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|(k, v)| k.bytes() + v.bytes()).sum()
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        for (k, v) in &mut self.0 {
            k.truncate(len);
            v.truncate(len);
        }
    }

    /// The sequences of several caches, one after another, with room for `capacity` positions each.
    ///
    /// # Errors
    /// If they do not hold equally many positions of one model, or more than `capacity`.
    pub fn join(parts: &[Caches], capacity: usize) -> Result<Self, EngineError> {
        let layers = parts.iter().map(|p| p.0.len()).min().unwrap_or(0);
        let layer = |i: usize| {
            let keys: Vec<&KvCache> = parts.iter().map(|p| &p.0[i].0).collect();
            let values: Vec<&KvCache> = parts.iter().map(|p| &p.0[i].1).collect();
            Ok((KvCache::join(&keys, capacity)?, KvCache::join(&values, capacity)?))
        };
        Ok(Caches((0..layers).map(layer).collect::<Result<_, EngineError>>()?))
    }

    /// Keeps the sequences for which `keep` says so, in their order.
    pub fn retain(&mut self, keep: impl Fn(usize) -> bool) {
        for (k, v) in &mut self.0 {
            k.retain(&keep);
            v.retain(&keep);
        }
    }
}

impl Session {
    /// Loads every function of a decoder.
    ///
    /// # Errors
    /// If a function is missing, cannot run on this engine, or a weight cannot be read.
    pub fn load(
        engine: &CpuEngine,
        module: &Module,
        weights: &dyn WeightSource,
    ) -> Result<Self, EngineError> {
        Self::from_source(engine, module, &mut Source::new(weights, None))
    }

    /// As [`Session::load`], with packed weights from a layout file, or into a new one.
    ///
    /// # Errors
    /// As [`Session::load`]. What is wrong with the file is no error, but a note of the layouts.
    pub fn load_with(
        engine: &CpuEngine,
        module: &Module,
        weights: &dyn WeightSource,
        layouts: &mut Layouts,
    ) -> Result<Self, EngineError> {
        let session = Self::from_source(engine, module, &mut Source::new(weights, Some(layouts)))?;
        if layouts.finish() {
            return Ok(session);
        }
        drop(session);
        Self::load(engine, module, weights)
    }

    /// The layout file in the folder of an artefact, checked, or a new one in the making.
    ///
    /// # Errors
    /// If a function of the decoder cannot run on this engine.
    pub fn layouts(
        engine: &CpuEngine,
        module: &Module,
        folder: &Path,
        identity: &Identity<'_>,
    ) -> Result<Layouts, EngineError> {
        let ends = ["embed", "head"].into_iter().filter_map(|name| module.find_func(name));
        let funcs: Vec<_> = ends.chain(module.layers()).collect();
        let tiled = engine.tiled(module, &funcs)?;
        Ok(engine.with_machine(|pool, _| Layouts::open(pool, folder, tiled, identity)))
    }

    fn from_source(
        engine: &CpuEngine,
        module: &Module,
        source: &mut Source<'_>,
    ) -> Result<Self, EngineError> {
        let (embed, head) =
            (load_end(engine, module, "embed", source)?, load_end(engine, module, "head", source)?);
        let layers = module.layers().into_iter().map(|f| engine.load_from(module, module.func(f), source));
        let layers = layers.collect::<Result<_, _>>()?;
        Ok(Session { embed, layers, head, facts: module.facts.clone() })
    }

    /// Facts about the model.
    pub fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    /// Bytes of all weights in memory.
    pub fn bytes(&self) -> usize {
        self.embed.bytes() + self.layers.iter().map(Loaded::bytes).sum::<usize>() + self.head.bytes()
    }

    /// Bytes of weights that a step of one token reads: all but the table of embeddings.
    pub fn step_bytes(&self) -> u64 {
        (self.layers.iter().map(Loaded::bytes).sum::<usize>() + self.head.bytes()) as u64
    }

    /// Empty caches with room for `capacity` positions of `batch` sequences.
    pub fn caches(&self, batch: usize, capacity: usize) -> Caches {
        let width = (self.facts.kv_heads * self.facts.head_dim) as usize;
        Caches(self.layers.iter().map(|l| layer_caches(l, batch, capacity, width)).collect())
    }

    /// Bytes that `batch` sequences take with room for `capacity` positions each, of which `seq` run at once: caches, and the
    /// buffers of the function that needs most.
    pub fn run_bytes(&self, batch: usize, seq: usize, capacity: usize) -> u64 {
        let width = (self.facts.kv_heads * self.facts.head_dim) as usize;
        let cache = |l: &Loaded, param: u32| {
            KvCache::bytes_for(batch, capacity, width, l.program().cache(param).flatten())
        };
        let caches = self.layers.iter().map(|l| cache(l, KEYS).saturating_add(cache(l, VALUES)));
        // Where caches grow in place, what a run sees of them is no buffer.
        let dims = DimEnv { batch, seq, past: 0 };
        let funcs = [&self.embed, &self.head].into_iter().chain(&self.layers);
        let buffers = funcs.map(|f| f.program().buffer_bytes(&dims) as u64).max().unwrap_or(0);
        caches.fold(buffers, u64::saturating_add)
    }

    /// The residual stream behind the last layer, `[B, S, hidden]`, for token ids `[B, S]` that follow what the caches
    /// hold; their keys and values are appended.
    ///
    /// # Errors
    /// If an id is outside the vocabulary or the caches are full.
    pub fn stream(&self, ids: &Tensor, caches: &mut Caches) -> Result<Tensor, EngineError> {
        let (past, seq) = (caches.len(), ids.shape()[1]);
        let pos = positions(past, seq);
        let mut x = self.embed.run(&[ids])?.remove(0);
        for (layer, (k, v)) in self.layers.iter().zip(&mut caches.0) {
            let mut args = [Input::Tensor(&x), Input::Tensor(&pos), Input::Cache(k), Input::Cache(v)];
            x = layer.run_inputs(&mut args)?.remove(0);
        }
        Ok(x)
    }

    /// Logits `[B, S, vocab]` of a residual stream.
    ///
    /// # Errors
    /// What the engine says.
    pub fn logits(&self, stream: &Tensor) -> Result<Tensor, EngineError> {
        Ok(self.head.run(&[stream])?.remove(0))
    }

    /// Runs one sequence of tokens into the caches and gives the logits behind the last of them.
    ///
    /// # Errors
    /// As [`Session::stream`].
    pub fn prefill(&self, tokens: &[u32], caches: &mut Caches) -> Result<Vec<f32>, EngineError> {
        let mut last = None;
        for part in tokens.chunks(CHUNK) {
            let ids = Tensor::i32([1, part.len()], part.iter().map(|&t| t as i32).collect());
            last = Some(self.stream(&ids, caches)?);
        }
        let Some(x) = last else { return Err(EngineError::System("a prompt without tokens".into())) };
        Ok(self.logits(&last_row(&x))?.as_f32().unwrap_or(&[]).to_vec())
    }
}

/// `@embed` or `@head` of a decoder.
pub(crate) fn load_end(
    engine: &CpuEngine,
    module: &Module,
    name: &str,
    source: &mut Source<'_>,
) -> Result<Loaded, EngineError> {
    match module.find_func(name) {
        Some(f) => engine.load_from(module, module.func(f), source),
        None => Err(EngineError::System(format!("the model has no @{name}, so it is no decoder"))),
    }
}

/// Positions of `seq` tokens behind `past` others.
pub(crate) fn positions(past: usize, seq: usize) -> Tensor {
    Tensor::i32([seq], (past..past + seq).map(|p| p as i32).collect())
}

/// Empty caches of a layer, for keys and for values of `width` elements.
pub(crate) fn layer_caches(
    layer: &Loaded,
    batch: usize,
    capacity: usize,
    width: usize,
) -> (KvCache, KvCache) {
    let new = |param: u32| KvCache::new(batch, capacity, width, layer.program().cache(param).flatten());
    (new(KEYS), new(VALUES))
}

/// The last row of a stream `[1, S, n]`.
pub(crate) fn last_row(stream: &Tensor) -> Tensor {
    let n = stream.shape()[2];
    let rows = stream.as_f32().unwrap_or(&[]);
    Tensor::f32([1, 1, n], rows[rows.len() - n..].to_vec())
}

/// The rows of a stream `[1, S, n]` in parts of at most 512: logits of all at once would not fit for long windows.
pub(crate) fn row_parts(stream: &Tensor) -> impl Iterator<Item = Tensor> + '_ {
    let n = stream.shape()[2];
    stream
        .as_f32()
        .unwrap_or(&[])
        .chunks(CHUNK * n)
        .map(move |rows| Tensor::f32([1, rows.len() / n, n], rows.to_vec()))
}
