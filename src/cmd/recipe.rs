//! Settings of a compile with every default decided, as they go into `recipe.yaml` and come out of it.

mod ascend;

use std::path::PathBuf;

use clap::ValueEnum;
use qrmc_frontends::Integers;
use qrmc_lowering::artefact::SourceInfo;
use qrmc_lowering::export::rules::RUNTIMES;
use qrmc_passes::{Pipeline, expand_presets, find, legal, parse_pipeline};
use serde::{Deserialize, Serialize};

use super::check::{refuse, runtime};
use crate::calib::{self, CalibSettings};
use crate::cli::{CompileArgs, SamplingKind};
use crate::fail::{FAILURE, Failure};
use crate::model::{Model, SHIPPED};

/// Calibration windows when nothing else is said: the search then takes minutes on two cores.
const NSAMPLES: usize = 16;
const SEQLEN: usize = 512;

/// The file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Recipe {
    /// Version of qrmc that wrote it.
    pub(crate) qrmc: String,
    /// What was compiled; not read back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<SourceInfo>,
    /// Passes in normal form.
    pub(crate) pass: Vec<String>,
    pub(crate) target: String,
    pub(crate) check: bool,
    pub(crate) seed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) calibration: Option<CalibRecipe>,
}

/// Calibration in a recipe.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CalibRecipe {
    pub(crate) path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) column: Option<String>,
    pub(crate) nsamples: usize,
    pub(crate) seqlen: usize,
    pub(crate) sampling: String,
    /// Hash of the tokens of all windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tokens: Option<String>,
}

/// A compile with every choice made.
pub(crate) struct Settings {
    pub(crate) pipeline: Pipeline,
    /// What the user wrote, for names.
    pub(crate) label: String,
    pub(crate) target: String,
    /// Numbers of ranks that were asked for.
    pub(crate) tp: Vec<u32>,
    pub(crate) check: bool,
    pub(crate) seed: u64,
    pub(crate) calib: Option<CalibSettings>,
}

/// The ranks that transforms and scales are made for: the largest number asked for, of which the others are divisors.
fn ranks(tp: &[u32]) -> Result<u32, Failure> {
    let most = tp.iter().copied().max().unwrap_or(1);
    match tp.iter().find(|n| **n == 0 || !most.is_multiple_of(**n)) {
        None => Ok(most),
        Some(n) => Err(Failure::usage(format!("--tp: {n} does not divide {most}"))
            .hint("one artefact serves numbers of ranks that divide the largest, such as 1,2,4")),
    }
}

/// Joins several `--pass` into one pipeline with presets expanded, for these numbers of ranks.
pub(crate) fn pipeline(texts: &[String], tp: &[u32]) -> Result<Pipeline, Failure> {
    expanded(&joined(texts)?, ranks(tp)?)
}

fn joined(texts: &[String]) -> Result<Pipeline, Failure> {
    let mut all = Pipeline::default();
    for text in texts {
        let p = parse_pipeline(text).map_err(|e| {
            Failure::usage(e.to_string())
                .hint("example: --pass 'awq{bits=4,group=64}' or --pass awq:bits=4,group=64")
        })?;
        all.0.extend(p.0);
    }
    Ok(all)
}

fn expanded(pipeline: &Pipeline, tp: u32) -> Result<Pipeline, Failure> {
    expand_presets(pipeline, tp).map_err(|e| {
        let f = Failure::usage(e.to_string());
        match e.hint {
            Some(h) => f.hint(h),
            None => f,
        }
    })
}

fn read(path: &std::path::Path) -> Result<Recipe, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::new(FAILURE, format!("{}: cannot read: {e}", path.display())))?;
    serde_yaml_ng::from_str(&text).map_err(|e| {
        Failure::new(FAILURE, format!("{}: is no recipe: {e}", path.display()))
            .hint("every artefact holds one as recipe.yaml")
    })
}

/// The passes that the flags or the recipe ask for, as they are written.
fn texts(args: &CompileArgs, recipe: Option<&Recipe>) -> Vec<String> {
    match (&args.pass[..], recipe) {
        ([], Some(r)) => r.pass.clone(),
        (given, _) => given.to_vec(),
    }
}

/// How a compile takes a checkpoint's integers: passes start from floats, and without any there is nothing to change.
pub(crate) fn integers(args: &CompileArgs) -> Result<Integers, Failure> {
    let recipe = args.recipe.as_deref().map(read).transpose()?;
    Ok(if texts(args, recipe.as_ref()).is_empty() { Integers::Keep } else { Integers::Dequantize })
}

impl Settings {
    /// Decides everything that the flags and the recipe leave open.
    pub(crate) fn decide(args: &CompileArgs, model: &Model) -> Result<Self, Failure> {
        let recipe = args.recipe.as_deref().map(read).transpose()?;
        let texts = texts(args, recipe.as_ref());
        if texts.is_empty() && !model.is_quantized() {
            return Err(Failure::usage("nothing to do: give --pass or --recipe")
                .hint("for example --pass awq; `qrmc passes` lists all"));
        }
        let target =
            args.target.clone().or(recipe.as_ref().map(|r| r.target.clone())).unwrap_or_else(|| "cpu".into());
        if !qrmc_lowering::TARGETS.iter().any(|t| t.name() == target) && runtime(&target).is_none() {
            let machines = qrmc_lowering::TARGETS.iter().map(|t| t.name());
            let known = machines.chain(RUNTIMES.iter().map(|r| r.name)).collect::<Vec<_>>().join(", ");
            return Err(
                Failure::usage(format!("there is no target `{target}`")).hint(format!("targets: {known}"))
            );
        }
        let (mut given, tp) = (joined(&texts)?, ranks(&args.tp)?);
        let flat = runtime(&target).filter(|r| r.name == ascend::NAME);
        if flat.is_some() {
            ascend::fill(&mut given, &model.module, tp);
        }
        let pipeline = expanded(&given, tp)?;
        legal(&pipeline, &model.module)?;
        if let Some(runtime) = flat {
            refuse(runtime, ascend::faults(&pipeline, &model.module, tp)?)?;
        }
        let seed = args.seed.or(recipe.as_ref().map(|r| r.seed)).unwrap_or(0);
        let check = !args.no_check && recipe.as_ref().is_none_or(|r| r.check);
        let needs = pipeline.0.iter().any(|c| find(&c.name).is_some_and(|p| p.info().calibrates));
        let calib = if needs { Some(calibration(args, recipe.as_ref(), model, seed)?) } else { None };
        let label = texts.join("-");
        Ok(Settings { pipeline, label, target, tp: args.tp.clone(), check, seed, calib })
    }

    /// The recipe that repeats this compile.
    pub(crate) fn recipe(&self, source: &SourceInfo, tokens: Option<String>) -> Recipe {
        Recipe {
            qrmc: env!("CARGO_PKG_VERSION").into(),
            source: Some(source.clone()),
            pass: self.pipeline.0.iter().map(ToString::to_string).collect(),
            target: self.target.clone(),
            check: self.check,
            seed: self.seed,
            calibration: self.calib.as_ref().map(|c| CalibRecipe {
                path: c.path.clone(),
                column: c.column.clone(),
                nsamples: c.nsamples,
                seqlen: c.seqlen,
                sampling: word(c.sampling),
                tokens,
            }),
        }
    }

    /// The output folder when none is named: the model and what is done to it.
    pub(crate) fn default_output(&self, model: &Model) -> PathBuf {
        let clean: String = self
            .label
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' })
            .collect();
        let label = clean.split('-').filter(|s| !s.is_empty()).collect::<Vec<_>>().join("-");
        let label = if label.is_empty() { "qrmc".to_owned() } else { label };
        PathBuf::from(format!("{}-{label}", model.name()))
    }
}

fn calibration(
    args: &CompileArgs,
    recipe: Option<&Recipe>,
    model: &Model,
    seed: u64,
) -> Result<CalibSettings, Failure> {
    let from = recipe.and_then(|r| r.calibration.as_ref());
    let shipped = || (model.name() == SHIPPED).then(calib::shipped_text).flatten();
    let path = args.calib.clone().or_else(|| from.map(|c| c.path.clone())).or_else(shipped);
    let Some(path) = path else {
        return Err(Failure::usage("this pipeline needs calibration text")
            .hint("give some with --calib PATH: a text, jsonl, parquet or arrow file, or a data set folder such as wikitext-2-v1"));
    };
    let sampling = match (args.sampling, from.map(|c| c.sampling.as_str())) {
        (Some(k), _) => k,
        (None, None) => SamplingKind::Random,
        (None, Some(said)) => SamplingKind::from_str(said, false).map_err(|_| {
            let known: Vec<String> = SamplingKind::value_variants().iter().map(|k| word(*k)).collect();
            Failure::usage(format!("recipe: `{said}` is no sampling"))
                .hint(format!("write one of {}", known.join(", ")))
        })?,
    };
    let context = model.module.facts.context as usize;
    let seqlen = args.seqlen.or(from.map(|c| c.seqlen)).unwrap_or_else(|| SEQLEN.min(context.max(1)));
    if seqlen == 0 || seqlen > context {
        return Err(Failure::usage(format!("--seqlen {seqlen} does not fit this model"))
            .hint(format!("windows have 1 to {context} tokens")));
    }
    let nsamples = args.nsamples.or(from.map(|c| c.nsamples)).unwrap_or(NSAMPLES);
    if nsamples == 0 {
        return Err(Failure::usage("--nsamples 0: nothing to calibrate on").hint("give at least 1"));
    }
    Ok(CalibSettings {
        path,
        column: args.calib_column.clone().or_else(|| from.and_then(|c| c.column.clone())),
        nsamples,
        seqlen,
        sampling,
        seed,
    })
}

/// The word for a sampling, on the command line and in a recipe.
fn word(kind: SamplingKind) -> String {
    kind.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}
