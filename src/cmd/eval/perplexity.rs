//! Perplexity on a text.

use std::path::PathBuf;
use std::time::Instant;

use qrmc_runtime::eval::{TextScore, score_text};
use qrmc_runtime::text::windows::eval_windows;
use qrmc_runtime::text::{Join, ReadOptions, Split, read_corpus};
use serde_json::json;

use super::{Place, WIKITEXT2};
use crate::cli::EvalArgs;
use crate::fail::{FAILURE, Failure};
use crate::model;
use crate::ui::Ui;

/// Tokens in a window when nothing else is said.
const CTX: usize = 2048;
/// Where the text of a task is.
fn locate(args: &EvalArgs) -> Result<PathBuf, Failure> {
    if args.task == WIKITEXT2 {
        let folders = &["wikitext/wikitext-2-raw-v1", "wikitext-2-raw-v1"];
        return Place { task: WIKITEXT2, folders, split: Split::Test, shipped: folders[1] }
            .locate(args.data.as_deref());
    }
    let path = PathBuf::from(&args.task);
    if path.exists() {
        return Ok(path);
    }
    Err(Failure::usage(format!("there is no task or file `{}`", args.task)).hint(super::known()))
}

pub(super) fn run(args: &EvalArgs, ui: &Ui) -> Result<(), Failure> {
    let a = &args.accuracy;
    let given = [
        ("--limit", a.limit.is_some()),
        ("--max-new", a.max_new.is_some()),
        ("--output", a.output.is_some()),
    ];
    let p = &args.perplexity;
    super::refuse(&args.task, &given, "it is for tasks with an answer, such as --task chain-arith")?;
    let engine = super::super::engine(&args.machine)?;
    let path = locate(args)?;
    let model = model::open_to_run(&args.model, &engine)?;
    model.tell(ui);
    let tokenizer = model.tokenizer()?;
    let mut options = ReadOptions::new(Split::Test);
    options.column = p.column.as_deref();
    let mut corpus = read_corpus(&path, &options)?;
    if let Some(chat) = tokenizer.chat() {
        corpus.render(|m| chat.render(m, false))?;
    }
    let join = if corpus.default_join == Join::Concat { Join::Concat } else { Join::All };
    let text = corpus.join(join)?;
    let mut tokens = tokenizer.encode(&text, false)?;
    let bos = match (p.bos, tokenizer.bos()) {
        (false, _) => "no BOS".to_owned(),
        (true, Some((name, id))) => {
            tokens.insert(0, id);
            format!("BOS {name} once")
        }
        (true, None) => {
            return Err(Failure::usage("--bos: the tokenizer has no BOS token").hint("leave --bos out"));
        }
    };
    let context = model.module.facts.context as usize;
    let ctx = p.ctx.unwrap_or(CTX.min(context));
    if ctx < 2 || ctx > context {
        return Err(Failure::usage(format!("--ctx {ctx}: this model takes 2 to {context} tokens")));
    }
    let stride = p.stride.unwrap_or(ctx);
    let mut windows = eval_windows(tokens.len(), ctx, stride, p.windows)?;
    if let Some(last) = p.last {
        if last == 0 || last >= ctx {
            return Err(Failure::usage(format!("--last {last}: a window of {ctx} scores 1 to {}", ctx - 1)));
        }
        windows.iter_mut().for_each(|w| w.first_scored = w.first_scored.max(ctx - last));
    }
    let session = model.session(&engine, ui)?;
    let other = match &p.against {
        None => None,
        Some(path) => {
            let other = model::open_to_run(path, &engine)?;
            if other.file("tokenizer.json") != model.file("tokenizer.json") {
                let same = other.tokenizer()?.encode(&text, false)? == tokens[usize::from(p.bos)..];
                if !same {
                    return Err(Failure::new(FAILURE, "the two models cut the text into different tokens")
                        .hint("--against compares models with one tokenizer"));
                }
            }
            Some(other.session(&engine, ui)?)
        }
    };
    let start = Instant::now();
    let total = windows.len();
    let mut progress = |s: &TextScore| {
        ui.progress("eval", s.windows, total, &format!("perplexity {:.3}", s.perplexity()));
        true
    };
    let score = score_text(&engine, &session, other.as_ref(), &tokens, &windows, &mut progress)?;
    let seconds = start.elapsed().as_secs_f64();
    ui.clear();
    let protocol = format!(
        "{}; {}; {bos}; {} tokens; windows of {ctx}, stride {stride}, {} of them{}, {} predictions",
        corpus.describe(),
        join.describe(),
        tokens.len(),
        score.windows,
        p.last.map(|n| format!(", the last {n} tokens of each")).unwrap_or_default(),
        score.tokens
    );
    if ui.json() {
        ui.object(&json!({
            "task": args.task, "text": path.display().to_string(), "protocol": protocol,
            "perplexity": score.perplexity(), "nll": score.nll / score.tokens.max(1) as f64,
            "kl": score.mean_kl(), "agreement": score.agreement(),
            "tokens": score.tokens, "windows": score.windows, "ctx": ctx, "stride": stride, "last": p.last, "bos": p.bos,
            "seconds": seconds,
        }));
        return Ok(());
    }
    ui.out(&format!("perplexity       {:.4}", score.perplexity()));
    if let (Some(kl), Some(agree), Some(other)) = (score.mean_kl(), score.agreement(), &p.against) {
        ui.out(&format!("against          {}", other.display()));
        ui.out(&format!("KL divergence    {kl:.5} nats a token"));
        ui.out(&format!("top-1 agreement  {:.2} %", 100.0 * agree));
    }
    ui.out(&format!("text             {}", path.display()));
    ui.out(&format!("protocol         {protocol}"));
    ui.out(&format!(
        "time             {} ({:.0} tokens/s)",
        super::super::summary::show_time(seconds),
        (score.windows * ctx) as f64 / seconds.max(1e-9)
    ));
    Ok(())
}
