//! The share of right answers.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use qrmc_runtime::batch::{Continuation, generate_many};
use qrmc_runtime::generate::{Ending, GenerateParams};
use qrmc_runtime::sample::SampleParams;
use qrmc_runtime::tasks::{Question, Task, boxed};
use qrmc_runtime::text::{Message, Tokenizer};
use serde_json::{Value, json};

use super::Place;
use crate::cli::EvalArgs;
use crate::fail::{FAILURE, Failure};
use crate::memory::free_bytes;
use crate::model;
use crate::ui::Ui;

pub(super) fn run(args: &EvalArgs, task: &Task, ui: &Ui) -> Result<(), Failure> {
    let p = &args.perplexity;
    let given = [
        ("--against", p.against.is_some()),
        ("--ctx", p.ctx.is_some()),
        ("--stride", p.stride.is_some()),
        ("--last", p.last.is_some()),
        ("--windows", p.windows.is_some()),
        ("--bos", p.bos),
        ("--column", p.column.is_some()),
    ];
    super::refuse(task.name, &given, "it is for perplexity: --task wikitext2, or a file of text")?;
    let max_new = args.accuracy.max_new.unwrap_or(task.max_new);
    for (flag, n) in [("--limit", args.accuracy.limit), ("--max-new", Some(max_new))] {
        if n == Some(0) {
            return Err(Failure::usage(format!("{flag} 0: nothing to do")).hint("give at least 1"));
        }
    }
    let engine = super::super::engine(&args.machine)?;
    let place = Place { task: task.name, folders: task.folders, split: task.split, shipped: task.name };
    let path = place.locate(args.data.as_deref())?;
    let questions = task.questions(&path, args.accuracy.limit)?;
    let model = model::open_to_run(&args.model, &engine)?;
    model.tell(ui);
    let tokenizer = model.tokenizer()?;
    if tokenizer.chat().is_none() {
        return Err(Failure::new(
            FAILURE,
            "the model has no chat template, through which questions are asked",
        )
        .hint("put the template into chat_template.jinja beside tokenizer.json"));
    }
    let ask = |q: &Question| tokenizer.encode_chat(&[Message::new("user", q.prompt())], true);
    let prompts: Vec<Vec<u32>> = questions.iter().map(ask).collect::<Result<_, _>>()?;
    let output = args.accuracy.output.as_deref().map(Output::create).transpose()?;
    let session = model.session(&engine, ui)?;
    let params =
        GenerateParams { sample: SampleParams::default(), max_new, stop: model.stop_tokens(&tokenizer) };
    let start = Instant::now();
    let (mut done, mut right) = (0, 0);
    let mut answers: Vec<Option<Result<Answer, Failure>>> = questions.iter().map(|_| None).collect();
    let mut on_done = |i: usize, c: &Continuation| {
        let answer = grade(task, &tokenizer, &questions[i], c);
        right += usize::from(answer.as_ref().is_ok_and(|a| a.right));
        answers[i] = Some(answer);
        done += 1;
        let note = format!("{right} right, accuracy {:.3}", right as f64 / done as f64);
        ui.progress("eval", done, prompts.len(), &note);
    };
    generate_many(&session, &prompts, &params, free_bytes(), &mut on_done)?;
    ui.clear();
    let seconds = start.elapsed().as_secs_f64();
    let answers: Vec<Answer> = answers.into_iter().flatten().collect::<Result<_, _>>()?;
    if let Some(output) = output {
        output.write(answers.iter().zip(&questions).map(|(a, q)| a.json(q)))?;
    }
    let score = Score::of(&answers);
    let protocol = format!(
        "{} questions in their order; chat template with generation prompt; greedy, at most {max_new} new tokens; \
         last \\boxed{{}} of the text",
        answers.len()
    );
    let rate = score.tokens as f64 / seconds.max(1e-9);
    if ui.json() {
        ui.object(&json!({
            "task": task.name, "data": path.display().to_string(), "protocol": protocol,
            "accuracy": score.right as f64 / score.all as f64, "correct": score.right, "total": score.all,
            "mean_tokens": score.tokens as f64 / score.all as f64, "median_tokens": score.median,
            "hit_limit": score.cut, "no_answer": score.unanswered, "max_new": max_new, "seconds": seconds,
        }));
        return Ok(());
    }
    let Score { all, right, cut, unanswered, .. } = score;
    ui.out(&format!("accuracy         {:.4} ({right} of {all})", right as f64 / all as f64));
    ui.out(&format!(
        "new tokens       {:.1} on average, {:.1} in the median; {cut} of {all} hit the limit",
        score.tokens as f64 / all as f64,
        score.median
    ));
    ui.out(&format!("no \\boxed{{}}       {unanswered} of {all}"));
    ui.out(&format!("data             {}", path.display()));
    ui.out(&format!("protocol         {protocol}"));
    ui.out(&format!(
        "time             {} ({rate:.0} new tokens/s)",
        super::super::summary::show_time(seconds)
    ));
    Ok(())
}

/// What a model answered.
struct Answer {
    text: String,
    prediction: Option<String>,
    tokens: usize,
    /// Whether it went on to the limit in tokens or to the end of the context.
    cut: bool,
    right: bool,
    gold: String,
}

fn grade(task: &Task, tokenizer: &Tokenizer, q: &Question, c: &Continuation) -> Result<Answer, Failure> {
    let text = tokenizer.decode(&c.tokens, true)?;
    let prediction = boxed(&text).map(str::to_owned);
    let right = prediction.as_ref().is_some_and(|p| task.is_right(p, &q.gold));
    let cut = matches!(c.ending, Ending::Length | Ending::Context);
    Ok(Answer { text, prediction, tokens: c.tokens.len(), cut, right, gold: q.gold.clone() })
}

impl Answer {
    fn json(&self, q: &Question) -> Value {
        json!({
            "question": q.text, "gold": self.gold, "prediction": self.prediction, "text": self.text,
            "tokens": self.tokens, "hit_limit": self.cut, "correct": self.right,
        })
    }
}

/// Figures over all answers.
struct Score {
    all: usize,
    right: usize,
    cut: usize,
    unanswered: usize,
    tokens: usize,
    median: f64,
}

impl Score {
    fn of(answers: &[Answer]) -> Self {
        let count = |f: &dyn Fn(&Answer) -> bool| answers.iter().filter(|a| f(a)).count();
        let mut lengths: Vec<usize> = answers.iter().map(|a| a.tokens).collect();
        lengths.sort_unstable();
        let n = lengths.len();
        let middle = |i: usize| lengths.get(i).copied().unwrap_or(0) as f64;
        Score {
            all: n,
            right: count(&|a| a.right),
            cut: count(&|a| a.cut),
            unanswered: count(&|a| a.prediction.is_none()),
            tokens: lengths.iter().sum(),
            median: (middle(n / 2) + middle(n.saturating_sub(1) / 2)) / 2.0,
        }
    }
}

/// A file that takes its place when it is complete.
struct Output {
    path: PathBuf,
    partial: PathBuf,
    file: Option<BufWriter<File>>,
}

impl Output {
    fn create(path: &Path) -> Result<Self, Failure> {
        let mut name = path.file_name().map(std::ffi::OsStr::to_owned).unwrap_or_default();
        name.push(".partial");
        let partial = path.with_file_name(name);
        if path.is_dir() {
            return Err(Failure::usage(format!("--output {}: is a folder", path.display()))
                .hint("give a file, such as answers.jsonl"));
        }
        let file = File::create(&partial).map_err(|e| fault(&partial, &e))?;
        Ok(Output { path: path.to_owned(), partial, file: Some(BufWriter::new(file)) })
    }

    fn write(mut self, rows: impl Iterator<Item = Value>) -> Result<(), Failure> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        let done = (|| {
            for row in rows {
                writeln!(file, "{row}")?;
            }
            file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
            std::fs::rename(&self.partial, &self.path)
        })();
        done.map_err(|e| fault(&self.path, &e))
    }
}

impl Drop for Output {
    /// Takes away what was not completed.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.partial);
    }
}

fn fault(path: &Path, e: &std::io::Error) -> Failure {
    Failure::new(FAILURE, format!("{}: cannot be written: {e}", path.display()))
        .hint("give another file with --output")
}
