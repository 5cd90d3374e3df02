//! `qrmc generate`.

use qrmc_runtime::generate::{Ending, GenerateParams, generate};
use qrmc_runtime::sample::SampleParams;
use qrmc_runtime::text::{Message, StreamDecoder};
use serde_json::json;

use crate::cli::GenerateArgs;
use crate::fail::{FAILURE, Failure};
use crate::model;
use crate::ui::Ui;

pub(crate) fn run(args: &GenerateArgs, ui: &Ui) -> Result<(), Failure> {
    let sample = SampleParams {
        temperature: if args.greedy { 0.0 } else { args.temperature },
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    };
    sample.validate().map_err(|e| Failure::usage(e.to_string()))?;
    let engine = super::engine(&args.machine)?;
    let model = model::open_to_run(&args.model, &engine)?;
    model.tell(ui);
    let tokenizer = model.tokenizer()?;
    let prompt = if args.raw {
        tokenizer.encode(&args.prompt, true)?
    } else {
        if tokenizer.chat().is_none() {
            return Err(Failure::new(FAILURE, "the model has no chat template")
                .hint("continue the prompt as it is with --raw"));
        }
        let system = args.system.iter().map(|s| Message::new("system", s));
        let messages: Vec<Message> = system.chain([Message::new("user", &args.prompt)]).collect();
        // The template writes BOS itself where the model wants one.
        tokenizer.encode_chat(&messages, true)?
    };
    let session = model.session(&engine, ui)?;
    let params = GenerateParams { sample, max_new: args.max_new, stop: model.stop_tokens(&tokenizer) };
    let mut decoder = StreamDecoder::new(true);
    let mut text = String::new();
    let mut fault = None;
    let mut on_token = |id: u32| match decoder.push(&tokenizer, id) {
        Ok(piece) => {
            if !ui.json() {
                ui.stream(&piece);
            }
            text += &piece;
            true
        }
        Err(e) => {
            fault = Some(e);
            false
        }
    };
    let result = generate(&session, &prompt, &params, &mut on_token)?;
    if let Some(e) = fault {
        return Err(e.into());
    }
    let rest = decoder.finish(&tokenizer)?;
    text += &rest;
    let (new, decode) = (result.tokens.len(), result.decode.as_secs_f64());
    let prefill = result.prefill.as_secs_f64();
    let ending = match result.ending {
        Ending::Stop => "end of text",
        Ending::Length => "--max-new reached",
        Ending::Context => "the context is full",
        Ending::Cancelled => "cancelled",
    };
    // The first new token comes from the prompt's logits.
    let rate = new.saturating_sub(1) as f64 / decode.max(1e-9);
    if ui.json() {
        ui.object(&json!({
            "text": text, "tokens": result.tokens, "prompt_tokens": prompt.len(), "ending": ending,
            "prefill_seconds": prefill, "decode_seconds": decode,
            "prefill_tokens_per_second": prompt.len() as f64 / prefill.max(1e-9),
            "decode_tokens_per_second": rate, "seed": args.seed,
        }));
        return Ok(());
    }
    ui.stream(&rest);
    ui.stream("\n");
    ui.note(&format!(
        "{} prompt tokens at {:.1} tokens/s, {new} new tokens at {rate:.1} tokens/s, {ending}",
        prompt.len(),
        prompt.len() as f64 / prefill.max(1e-9)
    ));
    Ok(())
}
