//! What the commands say.

use insta::assert_snapshot;
use serde_json::Value;

use crate::run::{ok, run};
use crate::support::{TINY, data};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn help_of_every_command() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["compile", "export", "opt", "inspect", "diff", "eval", "generate", "passes"] {
        assert_snapshot!(format!("help_{command}"), ok(dir.path(), &[command, "--help"]));
    }
    assert_snapshot!("help", ok(dir.path(), &["--help"]));
}

#[test]
fn the_main_job() {
    let dir = tempfile::tempdir().unwrap();
    let said = ok(dir.path(), &["compile", "--pass", "awq", "--nsamples", "2", "--seqlen", "128"]);
    for words in [
        "bits per weight  4.312",
        "place-transforms",
        "logits within",
        "next:",
        "qrmc eval tiny-qwen2-wiki-awq",
    ] {
        assert!(said.contains(words), "`{words}` is not said:\n{said}");
    }
    let out = dir.path().join("tiny-qwen2-wiki-awq");
    for file in ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"] {
        assert!(
            std::fs::read(out.join(file)).unwrap() == std::fs::read(data(TINY).join(file)).unwrap(),
            "{file}"
        );
    }
    // A recipe repeats the compile, byte for byte.
    ok(dir.path(), &["compile", "--recipe", "tiny-qwen2-wiki-awq/recipe.yaml", "-o", "again"]);
    let (a, b) = (crate::run::snapshot(&out), crate::run::snapshot(&dir.path().join("again")));
    assert!(a == b, "{:?}", a.keys().filter(|k| a[*k] != b[*k]).collect::<Vec<_>>());

    let said = ok(dir.path(), &["inspect", "tiny-qwen2-wiki-awq"]);
    assert!(said.contains("u4<group:128, f32, zero>: 28 tensors") && said.contains("clip-search{"), "{said}");
    let v = json(&ok(dir.path(), &["inspect", "tiny-qwen2-wiki-awq", "--json"]));
    assert_eq!((v["arch"].as_str(), v["layers"].as_u64()), (Some("qwen2"), Some(4)));

    let source = data(TINY);
    let source = source.to_str().unwrap();
    let args = ["eval", "tiny-qwen2-wiki-awq", "--windows", "2", "--against", source, "--json"];
    let v = json(&ok(dir.path(), &args));
    assert!(v["kl"].as_f64().unwrap() > 0.0 && v["agreement"].as_f64().unwrap() > 0.7, "{v}");
    assert!(v["protocol"].as_str().unwrap().contains("no BOS"));
    let prompt =
        "Compute 14 - 7 + 5 - 7.\n\nPlease reason step by step, and put your final answer within \\boxed{}.";
    let said = ok(dir.path(), &["generate", "tiny-qwen2-wiki-awq", "--prompt", prompt, "--greedy"]);
    assert!(said.contains("14 - 7 = 7") && said.contains("\\boxed{"), "{said}");

    let v = json(&ok(dir.path(), &["diff", "tiny-qwen2-wiki-awq", "again", "--json"]));
    assert_eq!(v["equal"], true);
    let said = ok(dir.path(), &["diff", source, "tiny-qwen2-wiki-awq"]);
    assert!(said.contains("layer0:") && said.contains("+ ") && said.contains("dcast"), "{said}");
}

#[test]
fn the_source_generates_what_transformers_does() {
    let dir = tempfile::tempdir().unwrap();
    let refs: Value = json(&std::fs::read_to_string(data(TINY).join("reference_logits.json")).unwrap());
    for r in refs.as_array().unwrap().iter().take(2) {
        let prompt = r["prompt"].as_str().unwrap();
        let user = prompt.split("<｜User｜>").nth(1).unwrap().split("<｜Assistant｜>").next().unwrap();
        let args = [
            "generate",
            data(TINY).to_str().unwrap(),
            "--prompt",
            user,
            "--greedy",
            "--json",
            "--max-new",
            "60",
        ]
        .map(str::to_owned);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let v = json(&ok(dir.path(), &args));
        let want: Vec<u64> =
            r["greedy_ids"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
        let have: Vec<u64> = v["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
        // The reference keeps the token that ends the text.
        assert_eq!(have[..], want[..want.len() - usize::from(want.last() == Some(&4088))]);
    }
}

#[test]
fn seeds_repeat() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = data(TINY);
    let text = |seed: &str| {
        let args = [
            "generate",
            tiny.to_str().unwrap(),
            "--prompt",
            "The",
            "--raw",
            "--max-new",
            "20",
            "--temperature",
            "1.5",
            "--seed",
            seed,
            "--json",
        ];
        json(&ok(dir.path(), &args))["tokens"].clone()
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn opt_reads_and_writes_text() {
    let dir = tempfile::tempdir().unwrap();
    let ir = ok(dir.path(), &["opt", data("fixtures/qwen2-bias-tied").to_str().unwrap()]);
    std::fs::write(dir.path().join("m.qir"), &ir).unwrap();
    assert_eq!(ok(dir.path(), &["opt", "m.qir"]), ir);
    let s = run(
        dir.path(),
        &["opt", "m.qir", "--pass", "fuse-norm,annotate{group=8},rtn", "--check", "--func", "layer0"],
    );
    assert_eq!(s.code, 0, "{}", s.err);
    assert!(s.err.contains("fuse-norm: logits within") && s.out.contains("qparams"), "{}{}", s.out, s.err);
    std::fs::write(dir.path().join("bad.qir"), ir.replace("rope %q, %pos", "rope %q, %x")).unwrap();
    let s = run(dir.path(), &["opt", "bad.qir"]);
    assert_eq!(s.code, 1);
    assert!(s.err.contains("bad.qir") && s.err.contains("line ") && s.err.contains("Q0103"), "{}", s.err);
}

#[test]
fn fake_is_an_ordinary_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    ok(dir.path(), &["compile", "--pass", "rtn:bits=4", "-o", "packed"]);
    ok(dir.path(), &["compile", "--pass", "rtn:bits=4", "-o", "fake", "--emit", "fake"]);
    let ppl = |m: &str| {
        let v = json(&ok(dir.path(), &["eval", m, "--windows", "4", "--json"]));
        v["perplexity"].as_f64().unwrap()
    };
    // The packed weights are the same but for rounding to bf16.
    let (packed, fake) = (ppl("packed"), ppl("fake"));
    assert!((packed / fake - 1.0).abs() < 2e-3, "{packed} {fake}");
    let v = json(&ok(dir.path(), &["inspect", "fake", "--json"]));
    assert!(v["tensors"].as_array().unwrap().iter().all(|t| t["type"].as_str().unwrap().starts_with("bf16")));
    // What stays online cannot be emitted so.
    let s = run(dir.path(), &["compile", "--pass", "rotate,annotate,rtn", "-o", "no", "--emit", "fake"]);
    assert_eq!(s.code, 4, "{}", s.err);
}

#[test]
fn plan_foretells() {
    let dir = tempfile::tempdir().unwrap();
    let v = json(&ok(dir.path(), &["plan", "--pass", "awq", "--json"]));
    assert!(v["memory_bytes"].as_u64().unwrap() > 1 << 20 && v["flops"].as_f64().unwrap() > 1e9, "{v}");
    let compiled = json(&ok(dir.path(), &["compile", "--pass", "rtn", "-o", "out", "--json"]));
    let disk = json(&ok(dir.path(), &["plan", "--pass", "rtn", "--json"]))["disk_bytes"].as_u64().unwrap();
    let bytes = compiled["bytes"].as_u64().unwrap();
    assert!(bytes <= disk && disk < bytes + (3 << 20), "{bytes} {disk}");
}

#[test]
fn failures_in_json() {
    let dir = tempfile::tempdir().unwrap();
    let s = run(dir.path(), &["compile", "--pass", "rtn:group=100", "--json"]);
    assert_eq!(s.code, 4);
    let v = json(&s.out);
    assert_eq!((v["error"]["exit"].as_u64(), v["error"]["code"].as_str()), (Some(4), Some("Q0202")));
    assert_eq!(run(dir.path(), &["compile", "--bogus"]).code, 2);
    assert_eq!(run(dir.path(), &[]).code, 2);
}

/// Windows that overlap score each token once, and `--last` scores the ends of windows alone.
#[test]
fn overlapping_windows_score_each_token_once() {
    let dir = tempfile::tempdir().unwrap();
    let model = data(TINY);
    let model = model.to_str().unwrap();
    let eval = |more: &[&str]| -> Value {
        let args = [&["eval", model, "--ctx", "64", "--json"], more].concat();
        serde_json::from_str(&ok(dir.path(), &args)).unwrap()
    };
    let tokens = |v: &Value| v["tokens"].as_u64().unwrap();
    assert_eq!(tokens(&eval(&["--windows", "5"])), 5 * 63);
    assert_eq!(tokens(&eval(&["--stride", "16", "--windows", "5"])), 63 + 4 * 16);
    let halves = eval(&["--last", "31", "--windows", "5"]);
    assert_eq!(tokens(&halves), 5 * 31);
    // The second half of a window sees the first.
    assert!(halves["perplexity"].as_f64() < eval(&["--windows", "5"])["perplexity"].as_f64());
    let s = run(dir.path(), &["eval", model, "--ctx", "64", "--last", "64"]);
    assert!(s.code == 2 && s.err.contains("scores 1 to 63"), "{}", s.err);
}
