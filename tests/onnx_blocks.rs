//! Blocks of a decoder, ONNX graphs from hidden states to hidden states: what they compute, which commands work on them, and
//! what is refused.

use std::path::{Path, PathBuf};

use qrmc_frontends::{Imported, Integers};
use qrmc_ir::{Lacks, Module, Tensor, WeightSource, interp, parse, print, print_func, verify};
use qrmc_lowering::export::onnx::{self, Form, Options};

use crate::run::{ok, run};
use crate::support::{Reference, Source, data, gap, import, main_args};

/// Layers with positions, one as transformers calls it with a mask and a cache, and one exported as it is.
const BLOCKS: [&str; 3] = ["block-dynamo-llama", "block-script-qwen2", "block-dynamo-qwen3"];

fn folder(name: &str) -> PathBuf {
    data("onnx").join(name)
}

fn read(path: &Path, integers: Integers) -> Imported {
    qrmc_frontends::import(path, integers).unwrap_or_else(|e| panic!("{e}"))
}

/// All results of `@main` in the interpreter.
fn results(module: &Module, weights: &dyn WeightSource, args: &[Tensor]) -> Vec<Tensor> {
    let main = module.func(module.find_func("main").unwrap());
    interp::run(module, main, weights, args, &main.results).unwrap()
}

/// Some positions of hidden states `[B, S, n]`.
fn cut(x: &Tensor, from: usize, to: usize) -> Tensor {
    let (&[b, s, n], v) = (x.shape(), x.as_f32().unwrap()) else { panic!("hidden states") };
    let rows = (0..b).flat_map(|i| v[(i * s + from) * n..(i * s + to) * n].to_vec());
    Tensor::f32([b, to - from, n], rows.collect())
}

#[test]
fn hidden_states_are_those_of_onnxruntime() {
    for name in BLOCKS {
        let reference = Reference::open(&format!("../onnx/{name}"));
        let (x, want) = (reference.get("hidden_states"), reference.get("last_hidden_state"));
        let model = read(&folder(name), Integers::Keep);
        let (module, weights) = (&model.module, &*model.source.weights);
        let all = results(module, weights, &main_args(module, &x));
        let (diff, size) = gap(&all[0], &want);
        assert!(diff <= 1e-5 * size, "{name}: off by {diff} of {size}");
        // Behind a cache, too.
        let first = results(module, weights, &main_args(module, &cut(&x, 0, 5)));
        let mut args = vec![cut(&x, 5, 9), Tensor::i32([4], (5..9).collect())];
        args.extend(first[1..].iter().cloned());
        let rest = results(module, weights, &args);
        let (diff, size) = gap(&rest[0], &cut(&want, 5, 9));
        assert!(diff <= 1e-5 * size && rest[1].shape()[1] == 9, "{name}: off by {diff} of {size}");
        assert_eq!((module.facts.vocab, module.lacks()), (0, Some(Lacks::Both)), "{name}");
    }
}

#[test]
fn exports_of_blocks_come_back_as_they_were() {
    for name in BLOCKS {
        let model = read(&folder(name), Integers::Keep);
        for form in [Form::Qdq, Form::Ort] {
            let dir = tempfile::tempdir().unwrap();
            let weights = &*model.source.weights;
            onnx::write(verify(&model.module).unwrap(), weights, dir.path(), &Options { form }).unwrap();
            assert!(!dir.path().join("genai_config.json").exists());
            for f in &model.source.files {
                std::fs::write(dir.path().join(&f.name), &f.bytes).unwrap();
            }
            let back = read(&dir.path().join("model.onnx"), Integers::Keep);
            assert_eq!(print(&back.module), print(&model.module), "{name} {form:?}");
            let x = Tensor::f32([1, 3, 32], (0..96).map(|i| (i as f32).sin()).collect());
            let run = |m: &Imported| results(&m.module, &*m.source.weights, &main_args(&m.module, &x));
            assert!(run(&back) == run(&model), "{name} {form:?}");
        }
    }
}

/// What is kept of a head.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Head {
    Whole,
    Norm,
    None,
}

/// Some functions of a decoder, with a `@main` that calls them.
fn part(module: &Module, embed: bool, head: Head) -> Module {
    let text = print(module);
    let f = &module.facts;
    let (logits, stream) = (format!("f32[B, S, {}]", f.vocab), format!("f32[B, S, {}]", f.hidden));
    let mut out = text[..text.find("func @embed").unwrap()].to_owned();
    if !embed && head != Head::Whole {
        out = out.replace(&format!("fact vocab = {}", f.vocab), "fact vocab = 0");
    }
    let func = |name: &str| print_func(module, module.func(module.find_func(name).unwrap()));
    if embed {
        out += &func("embed");
    }
    (0..f.layers).for_each(|i| out += &func(&format!("layer{i}")));
    let normed = |text: String| {
        let lines = text.lines().filter(|l| !l.contains("%logits = "));
        let text: String = lines.map(|l| format!("{l}\n")).collect();
        text.replace("return %logits", "return %head_in").replace(&logits, &stream)
    };
    match head {
        Head::Whole => out += &func("head"),
        Head::Norm => out += &normed(func("head")),
        Head::None => {}
    }
    let mut main: Vec<String> = func("main").lines().map(str::to_owned).collect();
    if !embed {
        main.retain(|l| !l.contains("call @embed"));
        main = main.iter().map(|l| l.replace("%ids: i32[B, S]", &format!("%x: {stream}"))).collect();
        main = main.iter().map(|l| l.replace("@layer0 %0,", "@layer0 %x,")).collect();
    }
    if head != Head::Whole {
        main[0] = main[0].replace(&logits, &stream);
    }
    if head == Head::None {
        main.retain(|l| !l.contains("call @head"));
        let last = format!("call @layer{} ", f.layers - 1);
        let at = main.iter().position(|l| l.contains(&last)).unwrap();
        main[at] = format!("  %y,{}", main[at].split_once(',').unwrap().1);
        main = main.iter().map(|l| l.replace("return %logits", "return %y")).collect();
    }
    let text = out + &main.join("\n") + "\n";
    let mut m = parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
    m.drop_unused_weights();
    m
}

#[test]
fn decoders_without_one_end_come_back_too() {
    let model = import("fixtures/qwen2-bias-untied");
    let config = std::fs::read(data("fixtures/qwen2-bias-untied/config.json")).unwrap();
    let source = Source(model.source.weights);
    for (embed, head, lacks, names) in [
        (false, Head::Whole, Lacks::Embedding, ["inputs_embeds", "logits"]),
        (true, Head::None, Lacks::Head, ["input_ids", "last_hidden_state"]),
        (true, Head::Norm, Lacks::Head, ["input_ids", "last_hidden_state"]),
        (false, Head::Norm, Lacks::Both, ["hidden_states", "last_hidden_state"]),
    ] {
        let of = part(&model.module, embed, head);
        assert_eq!(of.lacks(), Some(lacks));
        for form in [Form::Qdq, Form::Ort] {
            let dir = tempfile::tempdir().unwrap();
            onnx::write(verify(&of).unwrap(), &source, dir.path(), &Options { form }).unwrap();
            std::fs::write(dir.path().join("config.json"), &config).unwrap();
            let path = dir.path().join("model.onnx");
            let header = qrmc_frontends::OnnxHeader::read(&path).unwrap();
            assert_eq!([header.inputs[0].as_str(), header.outputs[0].as_str()], names);
            let back = read(&path, Integers::Keep);
            assert_eq!(print(&back.module), print(&of), "{names:?} {form:?}");
            // A block may have fewer layers than the configuration says, a whole decoder may not.
            let more = String::from_utf8(config.clone()).unwrap();
            let more = more.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 9");
            std::fs::write(dir.path().join("config.json"), more).unwrap();
            let notes = read(&path, Integers::Keep).source.notes;
            assert!(notes.iter().any(|n| n.contains("2 of the 9 layers")), "{notes:?}");
        }
    }
}

#[test]
fn blocks_are_compiled_and_exported_from_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let said = |args: &[&str]| ok(dir.path(), args);
    for name in BLOCKS {
        let model = folder(name);
        let model = model.to_str().unwrap();
        assert!(said(&["inspect", model]).contains(" block of a "), "{name}");
        said(&["check", model, "--target", "onnxruntime"]);
        let out = format!("{name}-w4");
        let summary = said(&["compile", model, "--pass", "rtn{bits=4,group=16}", "-o", &out]);
        assert!(summary.contains("qrmc export") && !summary.contains("qrmc eval"), "{summary}");
        let seen = said(&["inspect", &out]);
        assert!(seen.contains("none, ") && seen.contains("u4<group:16, f32, zero>"), "{seen}");
        said(&["check", &out, "--parity"]);
        // A transform is checked on hidden states.
        let turned = format!("{name}-rotated");
        let passes = "rotate{residual=false},place-transforms,rtn{bits=8,group=row}";
        let summary = said(&["compile", model, "--pass", passes, "-o", &turned]);
        assert!(summary.contains("results within"), "{summary}");
        for form in ["qdq", "ort"] {
            let exported = format!("{name}-{form}");
            said(&["export", &out, "--format", "onnx", "--form", form, "-o", &exported]);
            said(&["check", &exported, "--target", "onnxruntime"]);
            said(&["check", &exported, "--parity"]);
            let layer = |of: &str| said(&["inspect", of, "--ir", "layer0"]);
            assert_eq!(layer(&exported), layer(&out), "{name} {form}");
            assert!(said(&["diff", &out, &exported]).contains("history"));
        }
    }
}

#[test]
fn what_needs_the_ends_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = folder("block-script-qwen2");
    let model = model.to_str().unwrap();
    ok(dir.path(), &["compile", model, "--pass", "rtn{bits=4,group=16}", "-o", "out"]);
    let text = data("wikitext-2-train-sample.txt");
    let text = text.to_str().unwrap();
    let cases: &[(&[&str], i32)] = &[
        (&["eval", model, "--task", text], 1),
        (&["eval", "out", "--task", "chain-arith"], 1),
        (&["generate", model, "--raw", "--prompt", "a"], 1),
        (&["generate", "out", "--raw", "--prompt", "a"], 1),
        (&["bench", model], 1),
        (&["bench", "out"], 1),
        (&["compile", model, "--pass", "awq{group=16}", "--calib", text, "-o", "no"], 1),
        (&["plan", model, "--pass", "gptq{group=16}", "--calib", text], 1),
        (&["compile", model, "--pass", "quarot", "-o", "no"], 1),
        (&["compile", model, "--pass", "rtn{group=16}", "--emit", "fake", "-o", "no"], 4),
        (&["compile", model, "--pass", "rtn{group=16}", "--target", "vllm", "-o", "no"], 4),
        (&["export", "out", "--format", "gguf", "-o", "no"], 4),
        (&["export", "out", "--format", "awq", "-o", "no"], 4),
        (&["export", model, "--format", "fake", "-o", "no"], 4),
    ];
    for (args, code) in cases {
        let said = run(dir.path(), args);
        let why = "this is a block of a decoder: it has no embedding and no head";
        assert!(said.code == *code && said.err.contains(why), "{args:?}: {} {}", said.code, said.err);
        assert!(said.err.contains("hint: ") && !dir.path().join("no").exists(), "{args:?}: {}", said.err);
    }
}

/// What is said of a block whose bytes were changed, with or without its configuration.
fn changed(changes: &[(&str, &str)], configured: bool) -> String {
    let dir = tempfile::tempdir().unwrap();
    let from = folder("block-script-qwen2");
    let mut bytes = std::fs::read(from.join("model.onnx")).unwrap();
    for (from, to) in changes {
        assert_eq!(from.len(), to.len());
        let starts = |i: &usize| bytes[*i..].starts_with(from.as_bytes());
        let places: Vec<usize> = (0..bytes.len()).filter(starts).collect();
        assert!(!places.is_empty(), "{from}");
        places.iter().for_each(|&i| bytes[i..i + to.len()].copy_from_slice(to.as_bytes()));
    }
    std::fs::write(dir.path().join("model.onnx"), bytes).unwrap();
    if configured {
        std::fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
    }
    let said = run(dir.path(), &["inspect", "model.onnx"]);
    assert!(said.code == 0 || said.code == 1, "{}", said.err);
    said.out + &said.err
}

#[test]
fn inputs_of_blocks_are_told_apart_or_named() {
    let base = "its input `cos` is a table of a rotary embedding, of which nothing in the model says the base: config.json \
                beside the model must say `rope_theta`";
    let unsaid = "what its inputs `hidden_statex`, `xos` of three axes are is not said: hidden states are `hidden_states`";
    for (changes, configured, why) in [
        (&[][..], false, base),
        (&[][..], true, "block of a qwen2 decoder"),
        // Any name will do where one input is left.
        (&[("hidden_states", "some_thing_el")], true, "block of a qwen2 decoder"),
        (&[("hidden_states", "hidden_statex"), ("\u{3}cos", "\u{3}xos")], true, unsaid),
        (&[("\u{3}sin", "\u{3}xin")], true, "what its inputs `xin` of three axes are is not said"),
        // A cosine that is a sine.
        (
            &[("\u{3}sin", "\u{3}tmp"), ("\u{3}cos", "\u{3}sin"), ("\u{3}tmp", "\u{3}cos")],
            true,
            "is part of no decoder",
        ),
        // Without a name for masks it is a cache.
        (&[("attention_mask", "attention_musk")], true, "an input whose name has no `mask` in it"),
    ] {
        let said = changed(changes, configured);
        assert!(said.contains(why), "{changes:?}: {said}");
    }
}
