//! The command line, declared. Help text lives here and nowhere else.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::memory::parse_bytes;

/// A compiler for quantizing large language models.
#[derive(Parser, Debug)]
#[command(name = "qrmc", version, about, max_term_width = 100)]
#[command(after_help = "Exit codes: 0 done, 1 failure, 2 usage, 3 a gate failed, 4 illegal for the target, \
5 over budget, 130 interrupted (run the same command again to go on).")]
pub(crate) struct Cli {
    /// Results as JSON on stdout
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Quantize a model: import, run passes, write an artefact
    Compile(CompileArgs),
    /// Write an artefact as another runtime loads it, with the same integers
    Export(ExportArgs),
    /// Run passes on a graph in text form, or on a model's graph, and print the result
    Opt(OptArgs),
    /// Say what a model, an artefact or a graph is
    Inspect(InspectArgs),
    /// Show how two graphs differ
    Diff(DiffArgs),
    /// Measure perplexity on a text and the distance from another model, or the share of right answers
    Eval(EvalArgs),
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Prove that what runs is what was evaluated: kernels against the reference interpreter
    Check(CheckArgs),
    /// Measure tokens a second
    Bench(BenchArgs),
    /// Say what a compile will need, without doing it
    Plan(CompileArgs),
    /// List passes and presets with their options
    Passes(PassesArgs),
    /// List targets
    Targets,
}

/// How calibration text becomes windows.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SamplingKind {
    /// Of the whole text in one, where the published seeded sampler says
    Random,
    /// Of the whole text in one, one after another from the start
    First,
    /// As AWQ: whole documents of at most SEQLEN tokens in shuffled order, joined and cut
    Packed,
    /// As KVQuant: the first documents in shuffled order, each cut at SEQLEN tokens
    Documents,
}

/// What is written.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Emit {
    /// An artefact with packed integers
    Packed,
    /// A Hugging Face folder in bf16 whose weights are the de-quantized ones
    Fake,
}

#[derive(Args, Debug, Clone)]
pub(crate) struct MachineArgs {
    /// Threads [default: all cores]
    #[arg(short, long, value_name = "N")]
    pub(crate) threads: Option<usize>,
}

#[derive(Args, Debug, Clone)]
pub(crate) struct CompileArgs {
    /// Hugging Face folder or GGUF file [default: the small Qwen2 that ships with the repository]
    pub(crate) model: Option<PathBuf>,
    /// Passes or presets, such as 'awq{bits=4,group=64}' or awq:bits=4,group=64; several chain
    #[arg(long = "pass", value_name = "PIPELINE")]
    pub(crate) pass: Vec<String>,
    /// Take passes and settings from a recipe.yaml; flags given here win
    #[arg(long, value_name = "FILE")]
    pub(crate) recipe: Option<PathBuf>,
    /// Output folder [default: MODEL-PASS in the current folder]
    #[arg(short, long, value_name = "OUT")]
    pub(crate) output: Option<PathBuf>,
    /// What to write
    #[arg(long, value_enum, default_value = "packed")]
    pub(crate) emit: Emit,
    /// cpu, or a runtime that the result is for: what it would refuse is refused at once [default: cpu]
    #[arg(long, value_name = "NAME")]
    pub(crate) target: Option<String>,
    /// Ranks of tensor parallelism that the artefact can be cut for, such as 1,2,4 [default: 1]
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    pub(crate) tp: Vec<u32>,
    /// Calibration text: a text, jsonl, parquet or arrow file or a data set folder
    #[arg(long, value_name = "PATH")]
    pub(crate) calib: Option<PathBuf>,
    /// Column of the calibration text
    #[arg(long, value_name = "NAME")]
    pub(crate) calib_column: Option<String>,
    /// Calibration windows, or documents where they are sampled [default: 16]
    #[arg(long, value_name = "N")]
    pub(crate) nsamples: Option<usize>,
    /// Tokens in a calibration window [default: 512, or the model's context if that is shorter]
    #[arg(long, value_name = "L")]
    pub(crate) seqlen: Option<usize>,
    /// How calibration text becomes windows [default: random]
    #[arg(long, value_enum)]
    pub(crate) sampling: Option<SamplingKind>,
    /// Seed of the calibration windows and of the check [default: 0]
    #[arg(long, value_name = "S")]
    pub(crate) seed: Option<u64>,
    /// Refuse to start if more memory would be needed, such as 8G
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub(crate) mem: Option<u64>,
    /// Largest size of a file of weights
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "4G")]
    pub(crate) shard_size: u64,
    /// Keep finished steps here, across runs, instead of beside the output
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// Do not run the model before and after each transform to prove that it is the same function
    #[arg(long)]
    pub(crate) no_check: bool,
    /// Print the graph after each pass whose name contains this ('' for all)
    #[arg(long, value_name = "PASS")]
    pub(crate) print_after: Option<String>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

#[derive(Args, Debug)]
pub(crate) struct OptArgs {
    /// A .qir file, `-` for standard input, or a model
    pub(crate) input: PathBuf,
    /// Passes or presets; several chain
    #[arg(long = "pass", value_name = "PIPELINE")]
    pub(crate) pass: Vec<String>,
    /// Ranks of tensor parallelism, such as 1,2,4 [default: 1]
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    pub(crate) tp: Vec<u32>,
    /// Prove transforms by running the graph on seeded weights and tokens
    #[arg(long)]
    pub(crate) check: bool,
    /// Print the graph after each pass whose name contains this ('' for all)
    #[arg(long, value_name = "PASS")]
    pub(crate) print_after: Option<String>,
    /// Print only this function
    #[arg(long, value_name = "NAME")]
    pub(crate) func: Option<String>,
    /// Seed of weights and tokens of the check
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// Which operators an ONNX model is written in.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnnxForm {
    /// Standard operators alone, weights through DequantizeLinear
    Qdq,
    /// With those of onnxruntime: MatMulNBits, GroupQueryAttention
    Ort,
}

#[derive(Args, Debug)]
pub(crate) struct ExportArgs {
    /// An artefact, or a model
    pub(crate) model: PathBuf,
    /// awq, gptq, gptq-v2, compressed-tensors, ascend, gguf, onnx or fake
    #[arg(long, value_name = "NAME")]
    pub(crate) format: String,
    /// Operators of an ONNX model [default: qdq]
    #[arg(long, value_enum)]
    pub(crate) form: Option<OnnxForm>,
    /// Output folder [default: MODEL-FORMAT in the current folder]
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Ranks of tensor parallelism that it must be loadable on, such as 1,2,4
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    pub(crate) tp: Vec<u32>,
    /// Round what the format cannot hold exactly, and say what is lost
    #[arg(long)]
    pub(crate) requantize: bool,
    /// Largest size of a file of weights
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "5G")]
    pub(crate) shard_size: u64,
    /// What `qrmc eval --json` has printed, for the model card; may be repeated
    #[arg(long, value_name = "FILE")]
    pub(crate) evaluation: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

#[derive(Args, Debug)]
pub(crate) struct InspectArgs {
    /// A model, an artefact or a .qir file
    pub(crate) model: PathBuf,
    /// Print the graph of one function, such as layer0, or of all with ''
    #[arg(long, value_name = "NAME")]
    pub(crate) ir: Option<String>,
    /// Print the lowered program of one function
    #[arg(long, value_name = "NAME")]
    pub(crate) program: Option<String>,
    /// List every tensor
    #[arg(long)]
    pub(crate) tensors: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DiffArgs {
    /// A model, an artefact or a .qir file
    pub(crate) before: PathBuf,
    /// A model, an artefact or a .qir file
    pub(crate) after: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct EvalArgs {
    /// A model or an artefact
    pub(crate) model: PathBuf,
    /// Perplexity: wikitext2, or a file of text. Right answers: chain-arith, gsm8k, math-500, aime-90, aime-2024,
    /// aime-2025
    #[arg(long, default_value = "wikitext2")]
    pub(crate) task: String,
    /// Where the task's data set is [default: $QRMC_DATA, or what ships with the repository]
    #[arg(long, value_name = "PATH")]
    pub(crate) data: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) perplexity: PerplexityArgs,
    #[command(flatten)]
    pub(crate) accuracy: AccuracyArgs,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Perplexity")]
pub(crate) struct PerplexityArgs {
    /// Another model on the same tokens: KL divergence and share of equal likeliest tokens
    #[arg(long, value_name = "MODEL")]
    pub(crate) against: Option<PathBuf>,
    /// Tokens in a window [default: 2048, or the model's context if that is shorter]
    #[arg(long, value_name = "N")]
    pub(crate) ctx: Option<usize>,
    /// Tokens from one window to the next [default: the window]
    #[arg(long, value_name = "N")]
    pub(crate) stride: Option<usize>,
    /// Score only the last N tokens of each window
    #[arg(long, value_name = "N")]
    pub(crate) last: Option<usize>,
    /// Stop after this many windows
    #[arg(long, value_name = "N")]
    pub(crate) windows: Option<usize>,
    /// Begin the text with the tokenizer's BOS, if it has one
    #[arg(long)]
    pub(crate) bos: bool,
    /// Column of the text
    #[arg(long, value_name = "NAME")]
    pub(crate) column: Option<String>,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Right answers")]
pub(crate) struct AccuracyArgs {
    /// Stop after this many questions
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    /// Most new tokens of an answer [default: 110 for chain-arith, 1024 for gsm8k, 32768 for the others]
    #[arg(long, value_name = "N")]
    pub(crate) max_new: Option<usize>,
    /// Write question, right answer, answer and text of each question here, as JSON lines
    #[arg(long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct GenerateArgs {
    /// A model or an artefact
    pub(crate) model: PathBuf,
    /// The user's message, or the text to continue with --raw
    #[arg(long, short)]
    pub(crate) prompt: String,
    /// A system message
    #[arg(long)]
    pub(crate) system: Option<String>,
    /// Continue the prompt as it is, without the chat template
    #[arg(long)]
    pub(crate) raw: bool,
    /// Most new tokens
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) max_new: usize,
    /// 0 takes the likeliest token
    #[arg(long, default_value_t = 0.6)]
    pub(crate) temperature: f64,
    /// The likeliest token, always: temperature 0
    #[arg(long, conflicts_with = "temperature")]
    pub(crate) greedy: bool,
    /// Keep only this many likeliest tokens (0: all)
    #[arg(long, default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Keep the likeliest tokens that add up to this probability
    #[arg(long, default_value_t = 0.95)]
    pub(crate) top_p: f64,
    /// Seed of the sampling
    #[arg(long, default_value_t = 42)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    /// A model or an artefact; for --target, an exported folder or a GGUF file
    pub(crate) model: PathBuf,
    /// Run every kernel and the reference interpreter on the same operands: equal integers, floats within 2e-5 of the
    /// largest of their tensor, or of what a product adds
    #[arg(long)]
    pub(crate) parity: bool,
    /// Replay what a runtime asks of names, shapes, schemes and ranks: vllm, vllm-cpu, vllm-ascend, transformers,
    /// gptqmodel, llama.cpp or onnxruntime
    #[arg(long, value_name = "NAME")]
    pub(crate) target: Option<String>,
    /// Ranks of tensor parallelism for --target, such as 1,2,4 [default: 1]
    #[arg(long, value_name = "N,..", value_delimiter = ',')]
    pub(crate) tp: Vec<u32>,
    /// Tokens that run at once, before two that run alone
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) tokens: usize,
    /// Seed of the tokens
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

#[derive(Args, Debug)]
pub(crate) struct BenchArgs {
    /// A model or an artefact
    pub(crate) model: PathBuf,
    /// Tokens of the prompts; 0: no prefill is measured
    #[arg(short, long, value_name = "N", default_value_t = 512)]
    pub(crate) prompt: usize,
    /// New tokens; 0: no decode is measured
    #[arg(short, long, value_name = "N", default_value_t = 128)]
    pub(crate) new: usize,
    /// Sequences side by side, such as 1,4,16
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1")]
    pub(crate) batch: Vec<usize>,
    /// Runs of each, of which the median is told
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) repeats: usize,
    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

#[derive(Args, Debug)]
pub(crate) struct PassesArgs {
    /// Print the reference as Markdown (docs/passes.md)
    #[arg(long)]
    pub(crate) markdown: bool,
}
