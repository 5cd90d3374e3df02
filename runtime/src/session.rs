//! A loaded model: prefill and decode with caches.

use std::path::Path;

use qrmc_ir::{DimEnv, EngineError, ModelFacts, Module, Prepared, Tensor, WeightSource};

use crate::caches::Caches;
use crate::cpu::gemm::DOT_ROWS;
use crate::engine::{CpuEngine, Input, KvStore, Loaded, Order, PAGE, Sequence, Source};
use crate::layout::{Identity, Layouts};

/// Positions that prefill runs at once, cut at multiples of as many, and rows of logits that exist at once.
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

    /// Empty caches with room for this many pages: [`crate::caches::pages`] of the positions of each sequence.
    pub fn caches(&self, pages: usize) -> Caches {
        Caches::new(self.layers.iter().map(|l| layer_caches(l, &self.facts)).collect(), pages)
    }

    /// Bytes of a page in the caches of all layers.
    pub fn page_bytes(&self) -> u64 {
        let layer = |l: &Loaded| {
            let (k, v) = layer_caches(l, &self.facts);
            (k.page_bytes() + v.page_bytes()) as u64
        };
        self.layers.iter().map(layer).sum()
    }

    /// Bytes of the buffers of a run of this many rows: those of the function that needs most.
    pub fn buffer_bytes(&self, rows: usize) -> u64 {
        // Where caches grow in place, what a run sees of them is no buffer.
        let dims = DimEnv { batch: 1, seq: rows, past: 0 };
        let funcs = [&self.embed, &self.head].into_iter().chain(&self.layers);
        funcs.map(|f| f.program().buffer_bytes(&dims) as u64).max().unwrap_or(0)
    }

    /// The residual stream behind the last layer, `[1, rows, hidden]`, for tokens that follow what the caches hold of some
    /// sequences, one sequence after another; their keys and values are appended.
    ///
    /// # Errors
    /// If an id is outside the vocabulary, the caches are full, or a sequence is not there; they then hold what they held.
    pub fn stream(&self, caches: &mut Caches, parts: &[(Sequence, &[u32])]) -> Result<Tensor, EngineError> {
        let rows: Vec<(Sequence, usize)> = parts.iter().map(|&(s, tokens)| (s, tokens.len())).collect();
        caches.extend(&rows)?;
        let stream = self.run(caches, parts, &rows);
        if stream.is_err() {
            rows.iter().for_each(|&(s, n)| caches.truncate(s, caches.len(s) - n));
        }
        stream
    }

    fn run(
        &self,
        caches: &mut Caches,
        parts: &[(Sequence, &[u32])],
        rows: &[(Sequence, usize)],
    ) -> Result<Tensor, EngineError> {
        let (stores, segments) = caches.run(rows);
        let all = segments.rows();
        let tokens = parts.iter().flat_map(|(_, tokens)| tokens.iter());
        let ids = Tensor::i32([1, all], tokens.map(|&t| t as i32).collect());
        let pos = Tensor::i32([all], segments.new_positions().collect());
        let mut x = self.embed.run(&[&ids])?.remove(0);
        for (layer, (k, v)) in self.layers.iter().zip(stores) {
            let (k, v) = (Input::Cache(k, &segments), Input::Cache(v, &segments));
            x = layer.run_inputs(&mut [Input::Tensor(&x), Input::Tensor(&pos), k, v])?.remove(0);
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

    /// Runs more tokens of one sequence into the caches and gives the logits behind the last of them.
    ///
    /// # Errors
    /// As [`Session::stream`], and if there are no tokens.
    pub fn prefill(&self, caches: &mut Caches, s: Sequence, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        let (mut rest, mut last) = (tokens, None);
        while !rest.is_empty() {
            let to_cut = CHUNK - caches.len(s) % CHUNK;
            let (part, later) = rest.split_at(to_cut.min(rest.len()));
            last = Some(self.stream(caches, &[(s, part)])?);
            rest = later;
        }
        let Some(x) = last else { return Err(EngineError::System("a prompt without tokens".into())) };
        Ok(self.logits(&last_row(&x))?.as_f32().unwrap_or(&[]).to_vec())
    }

    /// A new sequence with these tokens, and the logits behind the last of them. What the caches know of the beginning is
    /// taken over; the results are the same bits as without.
    ///
    /// # Errors
    /// As [`Session::prefill`].
    pub fn start(&self, caches: &mut Caches, tokens: &[u32]) -> Result<(Sequence, Vec<f32>), EngineError> {
        let held = reused(caches.known(tokens), tokens.len());
        let s = caches.take_over(&tokens[..held]);
        match self.prefill(caches, s, &tokens[held..]) {
            Ok(logits) => {
                caches.know(s, tokens);
                Ok((s, logits))
            }
            Err(e) => {
                caches.remove(s);
                Err(e)
            }
        }
    }
}

/// How many of `known` positions, whole pages, are taken over by a prompt of `len` tokens: the last token runs always, and a
/// part of a chunk has so many rows that dense products compute them as they do those of the chunk.
fn reused(known: usize, len: usize) -> usize {
    let mut held = known.min(len.saturating_sub(1) / PAGE * PAGE);
    let end = len.min((held / CHUNK + 1) * CHUNK);
    if !held.is_multiple_of(CHUNK) && end - held <= DOT_ROWS {
        held -= PAGE;
    }
    held
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

/// Stores without pages for the keys and the values of a layer.
pub(crate) fn layer_caches(layer: &Loaded, facts: &ModelFacts) -> (KvStore, KvStore) {
    let sizes = ((facts.kv_heads * facts.head_dim) as usize, facts.head_dim as usize);
    let new = |param, order| KvStore::new(sizes, order, layer.program().cache(param).flatten());
    (new(KEYS, Order::Channels), new(VALUES, Order::Positions))
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
