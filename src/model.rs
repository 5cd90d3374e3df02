//! Opening whatever MODEL names: a Hugging Face folder, a GGUF file, or an artefact.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use qrmc_frontends::{Checkpoint, Integers, Quantization, SideFile};
use qrmc_ir::{Module, WeightSource};
use qrmc_lowering::artefact::{Artefact, Check, Manifest, SourceInfo, is_artefact};
use qrmc_runtime::engine::CpuEngine;
use qrmc_runtime::layout::Layouts;
use qrmc_runtime::session::Session;
use qrmc_runtime::text::Tokenizer;

use crate::fail::{FAILURE, Failure};
use crate::settings;
use crate::ui::Ui;

/// The model that ships with the repository.
pub(crate) const SHIPPED: &str = "tiny-qwen2-wiki";

/// An opened model.
pub(crate) struct Model {
    pub(crate) path: PathBuf,
    pub(crate) module: Module,
    pub(crate) weights: Arc<dyn WeightSource>,
    /// The checkpoint behind it, unless it is an artefact.
    pub(crate) checkpoint: Option<Arc<dyn Checkpoint>>,
    pub(crate) format: String,
    /// What a Hugging Face folder says of its codes.
    pub(crate) quantization: Option<Quantization>,
    /// Configuration, tokenizer and template files.
    pub(crate) files: Vec<SideFile>,
    /// What the user should know about the way the weights were taken.
    pub(crate) notes: Vec<String>,
    /// Of an artefact.
    pub(crate) manifest: Option<Manifest>,
    /// The layout file of an artefact that was opened to be run, until it is.
    layouts: Mutex<Option<Layouts>>,
}

/// Lets an `Arc<dyn Checkpoint>` stand where a weight source is wanted.
struct Weights(Arc<dyn Checkpoint>);

impl WeightSource for Weights {
    fn raw(&self, name: &str) -> Result<qrmc_ir::RawWeight<'_>, qrmc_ir::WeightError> {
        self.0.raw(name)
    }
    fn shared(&self, name: &str) -> Result<Option<bytes::Bytes>, qrmc_ir::WeightError> {
        self.0.shared(name)
    }
    fn release(&self, name: &str) {
        self.0.release(name);
    }
    fn read(&self, name: &str) -> Result<qrmc_ir::Tensor, qrmc_ir::WeightError> {
        self.0.read(name)
    }
}

/// The path that MODEL means: what was given, or the shipped model.
pub(crate) fn locate(given: Option<&Path>) -> Result<PathBuf, Failure> {
    match given {
        Some(p) => Ok(p.to_owned()),
        None => settings::shipped(SHIPPED).ok_or_else(|| {
            Failure::usage("no MODEL given, and the model that ships with the repository is not there")
                .hint("give a Hugging Face folder or a GGUF file")
        }),
    }
}

/// What an artefact is opened for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// All of it is checked now.
    Look,
    /// What is in a good layout file is not read.
    Run,
    /// Each tensor is read once, and checked then.
    Pass,
}

/// Opens a model. The hashes of all tensors of an artefact are checked on the engine's threads.
/// A checkpoint's integers are kept.
pub(crate) fn open(path: &Path, engine: &CpuEngine) -> Result<Model, Failure> {
    open_for(path, engine, Integers::Keep, Purpose::Look)
}

/// As [`open`], with a checkpoint's integers taken as said.
pub(crate) fn open_as(path: &Path, engine: &CpuEngine, integers: Integers) -> Result<Model, Failure> {
    open_for(path, engine, integers, Purpose::Look)
}

/// As [`open`], to be asked for its schemes: nothing is computed from its values.
pub(crate) fn open_schemes(path: &Path, engine: &CpuEngine) -> Result<Model, Failure> {
    open_for(path, engine, Integers::Schemes, Purpose::Pass)
}

/// As [`open`], to be run: tensors of an artefact whose layouts are in a good layout file are not read.
pub(crate) fn open_to_run(path: &Path, engine: &CpuEngine) -> Result<Model, Failure> {
    open_for(path, engine, Integers::Keep, Purpose::Run)
}

/// As [`open`], to be read from one end to the other: each tensor's hash is checked when it is first read.
pub(crate) fn open_to_pass(path: &Path, engine: &CpuEngine) -> Result<Model, Failure> {
    open_for(path, engine, Integers::Keep, Purpose::Pass)
}

fn open_for(path: &Path, engine: &CpuEngine, integers: Integers, purpose: Purpose) -> Result<Model, Failure> {
    if is_artefact(path) {
        let spread = |n: usize, check: &Check<'_>| {
            engine.with_machine(|pool, _| pool.map(n, check)).into_iter().collect::<Result<(), _>>()
        };
        let a = Artefact::map(path)?;
        if purpose == Purpose::Run {
            whole(path, &a.module, FAILURE)?;
        }
        let layouts = if purpose == Purpose::Run {
            Some(Session::layouts(engine, &a.module, path, &|n| a.manifest.identity(n))?)
        } else {
            None
        };
        let now = |name: &str| purpose != Purpose::Pass && layouts.as_ref().is_none_or(|l| !l.covers(name));
        a.check(&spread, now)?;
        let names = a.manifest.files.keys().filter(|n| !["model.qir", "recipe.yaml"].contains(&n.as_str()));
        let files = names.filter_map(|n| Some(SideFile { name: n.clone(), bytes: a.file(n)? })).collect();
        let (module, manifest) = (a.module.clone(), a.manifest.clone());
        return Ok(Model {
            path: path.to_owned(),
            module,
            weights: Arc::new(a),
            checkpoint: None,
            format: "qrmc artefact".into(),
            quantization: None,
            files,
            notes: Vec::new(),
            manifest: Some(manifest),
            layouts: Mutex::new(layouts),
        });
    }
    let imported = qrmc_frontends::import(path, integers)?;
    if purpose == Purpose::Run {
        whole(path, &imported.module, FAILURE)?;
    }
    let checkpoint: Arc<dyn Checkpoint> = imported.source.weights.into();
    Ok(Model {
        path: path.to_owned(),
        module: imported.module,
        weights: Arc::new(Weights(checkpoint.clone())),
        checkpoint: Some(checkpoint),
        format: imported.source.format,
        quantization: imported.source.quantization,
        files: imported.source.files,
        notes: imported.source.notes,
        manifest: None,
        layouts: Mutex::default(),
    })
}

/// Refuses a block of a decoder with an exit code.
fn whole(path: &Path, module: &Module, code: u8) -> Result<(), Failure> {
    match module.lacks() {
        None => Ok(()),
        Some(lacks) => {
            Err(Failure::new(code, format!("{}: this is a block of a decoder: it has {lacks}", path.display())).hint(
                "give the whole model; a block can be inspected, compiled with passes that read no text, checked with \
                 --parity, and exported with --format onnx",
            ))
        }
    }
}

impl Model {
    /// As [`whole`].
    pub(crate) fn whole(&self, code: u8) -> Result<(), Failure> {
        whole(&self.path, &self.module, code)
    }

    /// Tells what should be known about the way the weights were taken.
    pub(crate) fn tell(&self, ui: &Ui) {
        self.notes.iter().for_each(|n| ui.note(n));
    }

    /// Whether some weights are codes.
    pub(crate) fn is_quantized(&self) -> bool {
        self.module.weights().iter().any(|w| matches!(w.ty.elem, qrmc_ir::Elem::Quant(_)))
    }

    /// Name for people and for output folders.
    pub(crate) fn name(&self) -> String {
        let full = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        let name =
            full.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_else(|| "model".into());
        name.strip_suffix(".gguf").map(str::to_owned).unwrap_or(name)
    }

    /// The model ready to run; of an artefact, with its layout file, which is made if need be.
    pub(crate) fn session(&self, engine: &CpuEngine, ui: &Ui) -> Result<Session, Failure> {
        let opened = self.layouts.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut layouts = match (opened, &self.manifest) {
            (Some(l), _) => l,
            (None, Some(m)) => Session::layouts(engine, &self.module, &self.path, &|n| m.identity(n))?,
            (None, None) => return Ok(Session::load(engine, &self.module, &*self.weights)?),
        };
        let session = Session::load_with(engine, &self.module, &*self.weights, &mut layouts)?;
        layouts.take_notes().iter().for_each(|n| ui.note(n));
        Ok(session)
    }

    pub(crate) fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.iter().find(|f| f.name == name).map(|f| f.bytes.as_slice())
    }

    /// The tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<Tokenizer, Failure> {
        self.whole(FAILURE)?;
        let Some(json) = self.file("tokenizer.json") else {
            return Err(Failure::new(
                FAILURE,
                format!("{}: there is no tokenizer.json", self.path.display()),
            )
            .hint("copy the tokenizer files of the model beside its weights"));
        };
        let t = Tokenizer::from_bytes(
            json,
            self.file("tokenizer_config.json"),
            self.file("chat_template.jinja"),
        )?;
        let rows = self.module.facts.vocab;
        if u64::from(t.max_id()) >= rows {
            let what = format!("the tokenizer has ids up to {}, the embedding {rows} rows", t.max_id());
            return Err(Failure::new(FAILURE, format!("{}: {what}", self.path.display()))
                .hint("the tokenizer belongs to another model"));
        }
        Ok(t)
    }

    /// Tokens that end a generated text: what the configuration, `generation_config.json` and the tokenizer say.
    pub(crate) fn stop_tokens(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let mut stop = self.module.facts.eos.clone();
        if let Some(v) = self.file("generation_config.json").and_then(|b| serde_json::from_slice(b).ok()) {
            let v: serde_json::Value = v;
            let ids = match &v["eos_token_id"] {
                serde_json::Value::Array(a) => a.clone(),
                other => vec![other.clone()],
            };
            stop.extend(ids.iter().filter_map(serde_json::Value::as_u64).map(|n| n as u32));
        }
        stop.extend(tokenizer.eos().map(|(_, id)| id));
        stop.sort_unstable();
        stop.dedup();
        stop
    }

    /// Reads every weight once: its identity, and that all of it is finite.
    pub(crate) fn examine(&self, engine: &CpuEngine) -> Result<SourceInfo, Failure> {
        let Some(checkpoint) = &self.checkpoint else {
            return Err(Failure::usage(format!("{} is an artefact already", self.path.display()))
                .hint("compile starts from a Hugging Face folder or a GGUF file"));
        };
        let names: Vec<&str> = self.module.weights().iter().map(|w| w.name.as_str()).collect();
        let finite =
            engine.with_machine(|pool, _| pool.map(names.len(), |i| finite(&**checkpoint, names[i])));
        finite.into_iter().collect::<Result<(), _>>()?;
        let files = checkpoint.weight_files();
        let hashes = engine.with_machine(|pool, _| pool.map(files.len(), |i| hash_file(&files[i])));
        let mut all = blake3::Hasher::new();
        for h in hashes {
            all.update(h?.as_bytes());
        }
        if let Some(config) = self.file("config.json") {
            all.update(config);
        }
        let hash = all.finalize().to_hex().to_string();
        let full = self.path.canonicalize().unwrap_or_else(|_| self.path.clone());
        let name = full.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(SourceInfo { name, format: self.format.clone(), hash })
    }
}

fn hash_file(path: &Path) -> Result<blake3::Hash, Failure> {
    let io = |e: std::io::Error| Failure::new(FAILURE, format!("{}: cannot read: {e}", path.display()));
    let mut hasher = blake3::Hasher::new();
    let file = std::fs::File::open(path).map_err(io)?;
    hasher.update_reader(file).map_err(io)?;
    Ok(hasher.finalize())
}

fn finite(weights: &dyn Checkpoint, name: &str) -> Result<(), Failure> {
    let fail = |what: String| Err(Failure::new(FAILURE, format!("weight `{name}`: {what}")));
    let raw = match weights.raw(name) {
        Ok(raw) => raw,
        Err(e) => return Err(Failure::new(FAILURE, e.to_string())),
    };
    let bad = raw.ty.elem.find_non_finite(&raw.bytes);
    match bad {
        None => Ok(()),
        Some(at) => {
            let cols = raw.ty.shape.last().and_then(qrmc_ir::Dim::fixed).unwrap_or(1).max(1);
            match fail(format!("element [{}, {}] is NaN or infinite", at / cols, at % cols)) {
                Err(f) => Err(f.hint("the checkpoint is damaged: download it again")),
                ok => ok,
            }
        }
    }
}
