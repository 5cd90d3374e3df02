//! Accuracy tasks, and calibration by documents.

use serde_json::Value;

use crate::run::{ok, run};
use crate::support::{TINY, data};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn right_answers_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = data(TINY);
    let args = ["eval", tiny.to_str().unwrap(), "--task", "chain-arith", "--limit", "8"];
    let v = json(&ok(dir.path(), &[&args[..], &["--json", "--output", "answers.jsonl"]].concat()));
    assert_eq!((v["correct"].as_u64(), v["total"].as_u64()), (Some(RIGHT_OF_8), Some(8)), "{v}");
    assert_eq!((v["no_answer"].as_u64(), v["hit_limit"].as_u64()), (Some(0), Some(0)), "{v}");
    let text = std::fs::read_to_string(dir.path().join("answers.jsonl")).unwrap();
    let rows: Vec<Value> = text.lines().map(json).collect();
    assert_eq!(rows.iter().filter(|r| r["correct"] == true).count() as u64, RIGHT_OF_8);
    assert!(!dir.path().join("answers.jsonl.partial").exists());
    // The rows are in the order of the data, and a text does not depend on its batch.
    for r in [&rows[0], &rows[5]] {
        let prompt = format!(
            "{}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
            r["question"].as_str().unwrap()
        );
        let args = ["generate", tiny.to_str().unwrap(), "--prompt", &prompt, "--greedy", "--json"];
        let alone = json(&ok(dir.path(), &args));
        assert_eq!(alone["text"], r["text"]);
        assert_eq!(alone["tokens"].as_array().unwrap().len() as u64, r["tokens"].as_u64().unwrap());
    }
    // Cut off after a few tokens, nothing is answered.
    let v = json(&ok(dir.path(), &[&args[..], &["--json", "--max-new", "3", "--threads", "1"]].concat()));
    assert_eq!(
        (v["correct"].as_u64(), v["hit_limit"].as_u64(), v["no_answer"].as_u64()),
        (Some(0), Some(8), Some(8))
    );
}

/// As measured; the questions are the first of `chain-arith`.
const RIGHT_OF_8: u64 = 6;

#[test]
fn questions_that_cannot_be_asked() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = data(TINY);
    let refused = |rows: Option<&str>, more: &[&str], code: i32, words: &[&str]| {
        let path = dir.path().join("test.jsonl");
        let mut args = vec!["eval", tiny.to_str().unwrap(), "--task", "chain-arith"];
        if let Some(rows) = rows {
            std::fs::write(&path, rows).unwrap();
            args.extend(["--data", "test.jsonl"]);
        }
        args.extend(more);
        let s = run(dir.path(), &args);
        assert_eq!(s.code, code, "{args:?}\n{}{}", s.out, s.err);
        for w in words {
            assert!(s.err.contains(w), "`{w}` is not said:\n{}", s.err);
        }
        assert!(s.err.contains("hint: ") && !s.err.contains("panicked"), "{}", s.err);
        assert!(!dir.path().join("a.jsonl").exists() && !dir.path().join("a.jsonl.partial").exists());
    };
    refused(Some("{\"question\":\"q\",\"gold\":\"1\"}"), &[], 1, &["no column `answer`", "`gold`"]);
    refused(Some(""), &["--output", "a.jsonl"], 1, &["no rows"]);
    refused(Some("{\"question\": \"q\", \"ans"), &[], 1, &["test.jsonl", "after 0 good rows"]);
    refused(Some("{\"question\":\"q\",\"answer\":\"#### x\"}"), &[], 1, &["row 1", "####"]);
    refused(None, &["--data", "nowhere"], 1, &["nowhere", "test split"]);
    refused(None, &["--against", "x"], 2, &["--against", "wikitext2"]);
    refused(None, &["--windows", "3"], 2, &["--windows"]);
    refused(None, &["--output", "/proc/a.jsonl"], 1, &["/proc/a.jsonl"]);
    refused(None, &["--limit", "0"], 2, &["--limit 0", "at least 1"]);
    let s = run(dir.path(), &["eval", tiny.to_str().unwrap(), "--task", "wikitext2", "--limit", "3"]);
    assert!(s.code == 2 && s.err.contains("chain-arith"), "{}", s.err);
    let s = run(dir.path(), &["eval", tiny.to_str().unwrap(), "--task", "gsm8k"]);
    assert!(s.code == 2 && s.err.contains("gsm8k/main") && s.err.contains("QRMC_DATA"), "{}", s.err);
}

/// Documents of several lengths in the layout of pile-val.
fn pile(dir: &std::path::Path) {
    let text = std::fs::read_to_string(data("wikitext-2-train-sample.txt")).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut rows = String::new();
    for i in 0..60 {
        let n = 4 + i * i % 200;
        let row = serde_json::json!({"text": words[i * 200..i * 200 + n].join(" "), "meta": {"pile_set_name": "x"}});
        rows += &format!("{row}\n");
    }
    std::fs::create_dir(dir.join("pile")).unwrap();
    std::fs::write(dir.join("pile/val.jsonl"), rows).unwrap();
}

#[test]
fn calibration_by_documents() {
    let dir = tempfile::tempdir().unwrap();
    pile(dir.path());
    let compile = |sampling: &str, out: &str| {
        let args = [
            "compile",
            "--pass",
            "awq",
            "--calib",
            "pile",
            "--sampling",
            sampling,
            "--nsamples",
            "12",
            "--seqlen",
            "128",
            "-o",
            out,
            "--json",
        ];
        json(&ok(dir.path(), &args))["calibration"].clone()
    };
    let c = compile("packed", "packed");
    let n = |key: &str| c[key].as_u64().unwrap();
    assert_eq!(n("window_tokens"), 128 * n("windows"), "{c}");
    assert!(n("windows") >= 2 && c["too_long"]["documents"].as_u64().unwrap() > 0, "{c}");
    let of_used = n("tokens") - c["too_long"]["tokens"].as_u64().unwrap();
    assert_eq!(of_used, n("window_tokens") + n("tail_tokens"), "{c}");
    let counts: u64 = c["lengths"].as_array().unwrap().iter().map(|r| r["documents"].as_u64().unwrap()).sum();
    assert_eq!((counts, n("documents") + n("not_needed")), (n("documents"), 60), "{c}");

    let c = compile("documents", "documents");
    let n = |key: &str| c[key].as_u64().unwrap();
    assert_eq!((n("windows"), n("documents")), (12, 12), "{c}");
    assert_eq!(n("tokens"), n("window_tokens") + c["cut"]["tokens"].as_u64().unwrap(), "{c}");
    // The recipe keeps the sampling, and repeats the compile byte for byte.
    let recipe = std::fs::read_to_string(dir.path().join("documents/recipe.yaml")).unwrap();
    assert!(recipe.contains("sampling: documents"), "{recipe}");
    ok(dir.path(), &["compile", "--recipe", "documents/recipe.yaml", "-o", "again"]);
    let at = |name: &str| crate::run::snapshot(&dir.path().join(name));
    assert!(at("documents") == at("again"));
    // What was left out is told to people, too.
    let args = [
        "compile",
        "--pass",
        "awq",
        "--calib",
        "pile",
        "--sampling",
        "packed",
        "--nsamples",
        "12",
        "--seqlen",
        "128",
    ];
    let s = run(dir.path(), &args);
    for words in ["documents", "64 to 127", "%  #", "are too long", "a tail of"] {
        assert!(s.err.contains(words), "`{words}` is not said:\n{}", s.err);
    }
}

#[test]
fn calibration_text_that_does_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    pile(dir.path());
    let file = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    file("empty.txt", "");
    file("empty.jsonl", "");
    file("one.txt", "a");
    file("columns.jsonl", "{\"body\":\"some text\",\"id\":3}\n");
    file("null.jsonl", "{\"text\":null}\n");
    file("bad.arrow", "ARROW1\0\0 and nothing else that is right ARROW1");
    file("chat.jsonl", "{\"messages\":[{\"role\":\"user\"}]}\n");
    for (calib, more, code, words) in [
        ("empty.txt", &[][..], 1, &["token", "longer text"][..]),
        ("empty.jsonl", &[], 1, &["no rows"]),
        ("one.txt", &[], 1, &["too few"]),
        ("one.txt", &["--sampling", "documents"], 1, &["window", "2 tokens"]),
        ("one.txt", &["--sampling", "packed"], 1, &["one document", "--sampling random"]),
        ("empty.txt", &["--sampling", "packed"], 1, &["one document"]),
        ("pile", &["--seqlen", "513"], 2, &["--seqlen 513", "512"]),
        ("pile", &["--sampling", "packed", "--seqlen", "2"], 1, &["more than 2 tokens", "--seqlen"]),
        ("columns.jsonl", &[], 1, &["`body`, `id`", "--calib-column", "`body` may hold text"]),
        ("columns.jsonl", &["--calib-column", "txt"], 1, &["no column `txt`", "`body`"]),
        ("null.jsonl", &[], 1, &["row 1", "null"]),
        ("bad.arrow", &[], 1, &["bad.arrow"]),
        ("chat.jsonl", &[], 1, &["no string `content`"]),
    ] {
        let args = ["compile", "--pass", "awq", "--calib", calib, "-o", "out"];
        let s = run(dir.path(), &[&args[..], more].concat());
        assert_eq!(s.code, code, "{calib} {more:?}\n{}{}", s.out, s.err);
        for w in words {
            assert!(s.err.contains(w), "{calib} {more:?}: `{w}` is not said:\n{}", s.err);
        }
        assert!(s.err.contains("hint: ") && !s.err.contains("panicked"), "{}", s.err);
        assert!(!dir.path().join("out").exists());
    }
}
