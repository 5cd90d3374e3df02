//! What runs against what the graph means.

use std::path::Path;

use serde_json::Value;

use crate::run::{ok, run};
use crate::support::{TINY, data};

/// Compiles the tiny model, runs `check --parity`, and gives what it says of each kind of kernel.
fn parity(dir: &Path, name: &str, recipe: &str, more: &[&str]) -> Vec<(String, u64, u64)> {
    let tiny = data(TINY);
    let args = ["compile", tiny.to_str().unwrap(), "--pass", recipe, "--no-check", "-o", name];
    ok(dir, &[&args, more].concat());
    let said: Value = serde_json::from_str(&ok(dir, &["check", name, "--parity", "--json"])).unwrap();
    assert_eq!(said["holds"], true, "{recipe}: {said}");
    assert_eq!(said["left_out"], 0, "{recipe}");
    let kinds = said["kernels"].as_array().unwrap();
    let number = |k: &Value, what: &str| k[what].as_u64().unwrap();
    kinds
        .iter()
        .map(|k| (k["kernel"].as_str().unwrap().to_owned(), number(k, "steps"), number(k, "integers")))
        .collect()
}

#[test]
fn kernels_do_what_the_graph_says() {
    let dir = tempfile::tempdir().unwrap();
    let recipes = [
        ("rtn:bits=4,group=64,head=8", false, false),
        ("rtn:bits=3,group=32,sym=true,a=8", true, false),
        ("rtn:bits=8,group=row,sym=true,a=8,kv=8", true, true),
        ("annotate{w=2,group=32,a=4,a_sym=true,kv=3},rtn", true, true),
        ("annotate{w=16,kv=4,keys=false}", false, true),
        ("rotate,place-transforms,annotate{w=4,group=row,sym=true,a=4,kv=4},rtn", true, true),
        ("kvquant:bits=3", false, true),
    ];
    for (i, (recipe, quantized, cached)) in recipes.into_iter().enumerate() {
        let kinds = parity(dir.path(), &format!("out{i}"), recipe, &[]);
        let integers = |name: &str| kinds.iter().filter(|k| k.0 == name).map(|k| k.2).sum::<u64>();
        assert!(kinds.iter().any(|k| k.0 == "linear" && k.1 > 0), "{recipe}: {kinds:?}");
        assert_eq!(integers("quantize") > 0, quantized || cached, "{recipe}: {kinds:?}");
        // Values that only a cache reads are codes from there on.
        assert!(!kinds.iter().any(|k| k.0 == "fake_quant"), "{recipe}: {kinds:?}");
    }
}

#[test]
fn scales_of_ranks_stay_with_the_codes() {
    let dir = tempfile::tempdir().unwrap();
    for (i, recipe) in
        ["rtn:bits=4,group=32,a=4", "rtn:bits=8,group=row,sym=true,a=8"].into_iter().enumerate()
    {
        let kinds = parity(dir.path(), &format!("out{i}"), recipe, &["--tp", "2"]);
        assert!(!kinds.iter().any(|k| ["dcast", "fake_quant"].contains(&&*k.0)), "{recipe}: {kinds:?}");
        let program = ok(dir.path(), &["inspect", &format!("out{i}"), "--program", "layer0"]);
        let ranks =
            program.lines().filter(|l| l.contains("quantize {q = u") && l.contains("<group:")).count();
        assert_eq!(ranks, 2, "{program}");
    }
}

#[test]
fn compile_compares_kernels_before_it_publishes() {
    let dir = tempfile::tempdir().unwrap();
    let tiny = data(TINY);
    let args = ["compile", tiny.to_str().unwrap(), "--pass", "rtn:bits=4,a=8", "-o", "out", "--json"];
    let said: Value = serde_json::from_str(&ok(dir.path(), &args)).unwrap();
    assert_eq!(said["parity"]["holds"], true, "{said}");
    assert!(said["parity"]["kernels"].as_array().unwrap().len() > 5, "{said}");
}

#[test]
fn check_and_bench_say_what_they_need() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, tiny) = (dir.path(), data(TINY));
    let tiny = tiny.to_str().unwrap();
    let s = run(dir, &["check", tiny]);
    assert!(s.code == 2 && s.err.contains("--parity"), "{}", s.err);
    let s = run(dir, &["bench", tiny, "-p", "1000000", "-n", "1"]);
    assert!(s.code == 2 && s.err.contains("context"), "{}", s.err);
    let s = run(dir, &["bench", tiny, "-p", "512", "-n", "512", "--batch", "1000000"]);
    assert!(s.code != 0 && s.err.contains("1000000 sequences"), "{}", s.err);
    let args = ["bench", tiny, "-p", "20", "-n", "3", "--batch", "1,2", "--repeats", "1", "--json"];
    let said: Value = serde_json::from_str(&ok(dir, &args)).unwrap();
    let rows = said["rows"].as_array().unwrap();
    assert_eq!(rows.iter().map(|r| r["batch"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    for r in rows {
        let positive = |what: &str| r[what].as_f64().is_some_and(|x| x > 0.0);
        assert!(positive("prefill_tokens_per_second") && positive("decode_tokens_per_second"), "{r}");
        assert!(positive("share_of_bandwidth"), "{r}");
    }
}
