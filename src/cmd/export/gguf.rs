//! `qrmc export --format gguf`: one file, whose tokenizer is read back and compared.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use qrmc_frontends::gguf::Vocabulary;
use qrmc_lowering::export::View;
use qrmc_lowering::export::gguf::{self, GgufPlan, Meta};
use serde_json::Value;

use crate::fail::{FAILURE, Failure, ILLEGAL};
use crate::model::Model;
use crate::ui::Ui;

/// Name of the file in the output folder.
pub(super) const FILE: &str = "model.gguf";

/// Texts whose tokens must be the same after the way into the file and back: words, contractions, numbers, spaces, line
/// ends, signs, scripts with and without spaces, and marks that stand on letters.
const PROBES: [&str; 8] = [
    "The quick brown fox doesn't jump; it's 12,345.678 metres, I'VE said.",
    "  two  spaces\n\n\tand\r\nlines   \n",
    "def f(x):\n    return x**2 + 3*x - 1  # ∑ ≤ ∞\n",
    "Find \\(x\\) such that $\\frac{1}{2}x^2 = 1234567890$.",
    "Größe, naïve, e\u{301}te\u{301}, Ελλάδα, Привет, العربية, हिन्दी",
    "推理模型量化,第3题:1+1=2。日本語テキスト、한국어",
    "emoji 👩‍💻🚀 and symbols ©®™ … — « »",
    "'s't're've'm'll'd 'S'T'RE don't DON'T 1st 22nd 333rd 4444th",
];

/// Plans the file of a model.
pub(super) fn plan<'a>(model: &Model, view: &'a View) -> Result<GgufPlan<'a>, Failure> {
    let vocabulary = match model.file("tokenizer.json") {
        Some(_) => words(vocabulary(model, view.facts.vocab as usize)?),
        None => vec![("tokenizer.ggml.model".to_owned(), Meta::Str("no_vocab".to_owned()))],
    };
    Ok(gguf::plan(view, &*model.weights, &model.name(), vocabulary)?)
}

fn vocabulary(model: &Model, rows: usize) -> Result<Vocabulary, Failure> {
    let json = |name: &str| model.file(name).and_then(|b| serde_json::from_slice::<Value>(b).ok());
    let tokenizer =
        json("tokenizer.json").ok_or_else(|| Failure::new(FAILURE, "tokenizer.json is no JSON"))?;
    let config = json("tokenizer_config.json");
    let template = model.file("chat_template.jinja").and_then(|b| std::str::from_utf8(b).ok());
    let mut v = Vocabulary::read(&tokenizer, config.as_ref(), template, rows).map_err(|why| {
        Failure::new(ILLEGAL, format!("{}: tokenizer.json: {why}", model.path.display()))
            .hint("llama.cpp names the ways of cutting text up that it knows; export to another format")
    })?;
    v.bos = v.bos.or(model.module.facts.bos);
    v.eos = v.eos.or(model.module.facts.eos.first().copied());
    Ok(v)
}

/// The metadata of a tokenizer.
fn words(v: Vocabulary) -> Vec<(String, Meta)> {
    let mut meta = Vec::new();
    let mut put = |key: &str, value: Meta| meta.push((format!("tokenizer.{key}"), value));
    put("ggml.model", Meta::Str(v.model.to_owned()));
    put("ggml.pre", Meta::Str(v.pre.to_owned()));
    put("ggml.tokens", Meta::Strs(v.tokens));
    put("ggml.token_type", Meta::I32s(v.kinds));
    put("ggml.merges", Meta::Strs(v.merges));
    for (key, id) in [("bos", v.bos), ("eos", v.eos), ("unknown", v.unk), ("padding", v.pad)] {
        id.into_iter().for_each(|id| put(&format!("ggml.{key}_token_id"), Meta::U32(id)));
    }
    put("ggml.add_bos_token", Meta::Bool(v.add_bos));
    put("ggml.add_eos_token", Meta::Bool(v.add_eos));
    if v.add_space_prefix {
        put("ggml.add_space_prefix", Meta::Bool(true));
    }
    v.chat_template.into_iter().for_each(|t| put("chat_template", Meta::Str(t)));
    meta
}

/// Writes the file and reads its tokenizer back.
pub(super) fn write(model: &Model, plan: &GgufPlan<'_>, folder: &Path, ui: &Ui) -> Result<(), Failure> {
    let path = folder.join(FILE);
    let io = |e: std::io::Error| {
        let f = Failure::new(FAILURE, format!("{}: cannot write: {e}", path.display()));
        if e.kind() == std::io::ErrorKind::StorageFull { f.hint("the disk is full") } else { f }
    };
    let mut out = BufWriter::with_capacity(1 << 20, File::create(&path).map_err(io)?);
    let (mut done, all) = (0, plan.tensors());
    let mut told = |name: &str, from: &[&str]| {
        done += 1;
        ui.progress("export", done, all, name);
        super::release(&*model.weights, from.iter().copied());
    };
    plan.write(&*model.weights, &mut out, &mut told).map_err(|e| match e {
        gguf::WriteError::Made(e) => e.into(),
        gguf::WriteError::Io(e) => io(e),
    })?;
    ui.clear();
    out.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)?;
    same_tokens(model, &path)
}

/// Refuses a file whose tokenizer cuts text up in another way than the model's.
fn same_tokens(model: &Model, path: &Path) -> Result<(), Failure> {
    if model.file("tokenizer.json").is_none() {
        return Ok(());
    }
    let files = qrmc_frontends::open(path, qrmc_frontends::Integers::Keep)?.files;
    let file = |name: &str| files.iter().find(|f| f.name == name).map(|f| f.bytes.as_slice());
    let back = qrmc_runtime::text::Tokenizer::from_bytes(
        file("tokenizer.json").unwrap_or_default(),
        file("tokenizer_config.json"),
        None,
    )?;
    let ours = model.tokenizer()?;
    for probe in PROBES {
        let (want, have) = (ours.encode(probe, true)?, back.encode(probe, true)?);
        if want != have {
            let at = want.iter().zip(&have).take_while(|(a, b)| a == b).count();
            return Err(Failure::new(
                ILLEGAL,
                format!("the tokenizer as GGUF has it differs on {probe:?} from token {at} on"),
            )
            .hint("llama.cpp would see other tokens than the model was made for; export to another format"));
        }
    }
    Ok(())
}
