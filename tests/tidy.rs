//! Rules of the house that no compiler checks.

use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below these folders.
fn sources(folders: &[&str]) -> Vec<(PathBuf, String)> {
    let mut out = Vec::new();
    let mut todo: Vec<PathBuf> = folders.iter().map(|f| root().join(f)).collect();
    while let Some(d) = todo.pop() {
        for e in std::fs::read_dir(&d).unwrap() {
            let p = e.unwrap().path();
            if p.is_dir() {
                todo.push(p);
            } else if p.extension().is_some_and(|x| x == "rs") {
                let text = std::fs::read_to_string(&p).unwrap();
                out.push((p.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    out.sort();
    out
}

const ALL: [&str; 7] =
    ["ir/src", "frontends/src", "passes/src", "lowering/src", "runtime/src", "src", "tests"];

/// Files that are longer, with the reason.
const LONG: [(&str, &str); 0] = [];

#[test]
fn files_are_short() {
    for (path, text) in sources(&[&ALL[..], &["runtime/examples"]].concat()) {
        let n = text.lines().count();
        let excused = LONG.iter().any(|(f, _)| path == Path::new(f));
        assert!(n <= 400 || excused, "{} has {n} lines; split it by notion", path.display());
    }
}

fn none(folder: &str, words: &[&str], except: &[&str], why: &str) {
    for (path, text) in sources(&[folder]) {
        if except.iter().any(|e| path.starts_with(e)) {
            continue;
        }
        // What tests do is their own business.
        let text = text.split("#[cfg(test)]").next().unwrap_or("");
        for (i, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            for w in words {
                assert!(!code.contains(w), "{}:{}: {why}: `{w}`", path.display(), i + 1);
            }
        }
    }
}

#[test]
fn invariants_of_the_crates() {
    let io = ["std::fs", "std::io", "std::thread", "std::process", "std::net", "rayon"];
    none("ir/src", &io, &[], "ir does no input or output and starts no threads");
    none(
        "passes/src",
        &["qrmc_lowering", "qrmc_runtime", "cuda", "ascend", "avx"],
        &[],
        "passes name no target",
    );
    none("passes/src", &["std::fs", "std::thread", "rayon"], &[], "passes see the world through ports");
    none(
        "lowering/src",
        &["awq", "gptq", "smoothquant", "quarot", "flatquant"],
        // File formats that have a method's name.
        &["lowering/src/export", "lowering/src/export.rs"],
        "lowering names no method",
    );
    none("lowering/src", &["qrmc_passes", "qrmc_runtime"], &[], "arrows point one way");
    none("runtime/src", &["qrmc_passes", "qrmc_frontends"], &[], "arrows point one way");
    none("frontends/src", &["qrmc_passes", "qrmc_lowering", "qrmc_runtime"], &[], "arrows point one way");
    for folder in ALL.iter().filter(|f| **f != "tests") {
        none(folder, &["println!", "eprintln!", "print!(", "dbg!"], &[], "only src/ui.rs prints");
        none(folder, &["env::var"], &["src/settings.rs"], "the environment is read in one file");
        none(folder, &["static mut", "lazy_static", "OnceLock", "LazyLock"], &[], "no global state");
        none(folder, &["todo!", "unimplemented!", "FIXME", "XXX"], &[], "nothing is left open");
    }
}

#[test]
fn unsafe_stands_where_it_is_listed() {
    const LISTED: [&str; 29] = [
        "frontends/src/hf/safetensors.rs",
        "lowering/src/artefact/read.rs",
        "runtime/src/cpu/attention.rs",
        "runtime/src/cpu/attention/avx512.rs",
        "runtime/src/cpu/dot.rs",
        "runtime/src/cpu/dot_avx512.rs",
        "runtime/src/cpu/gemm.rs",
        "runtime/src/cpu/linear.rs",
        "runtime/src/cpu/pool.rs",
        "runtime/src/cpu/pool/crew.rs",
        "runtime/src/cpu/reduce.rs",
        "runtime/src/cpu/rows.rs",
        "runtime/src/cpu/simd.rs",
        "runtime/src/cpu/small_avx512.rs",
        "runtime/src/cpu/split.rs",
        "runtime/src/cpu/split/pack.rs",
        "runtime/src/cpu/split/unit.rs",
        "runtime/src/cpu/tile_avx512.rs",
        "runtime/src/cpu/tiles.rs",
        "runtime/src/cpu/tiles/amx.rs",
        "runtime/src/cpu/tiles/amx/unit.rs",
        "runtime/src/cpu/tiles/avx2.rs",
        "runtime/src/cpu/tiles/digits.rs",
        "runtime/src/cpu/tiles/path.rs",
        "runtime/src/cpu/tiles/stored.rs",
        "runtime/src/cpu/tiles/vnni.rs",
        "runtime/src/cpu/weight.rs",
        "runtime/src/layout/file.rs",
        "src/memory.rs",
    ];
    for folder in ALL.iter().filter(|f| **f != "tests") {
        for (path, text) in sources(&[folder]) {
            let has = text.contains("unsafe {") || text.contains("unsafe fn") || text.contains("unsafe impl");
            let listed = LISTED.iter().any(|l| path == Path::new(l));
            assert!(!has || listed, "{} holds unsafe code and is not listed", path.display());
            let blocks = text.matches("unsafe {").count() + text.matches("unsafe impl").count();
            assert!(
                text.matches("SAFETY:").count() >= blocks,
                "{}: a SAFETY comment for each block",
                path.display()
            );
        }
    }
}

#[test]
fn generated_docs_are_current() {
    let dir = tempfile::tempdir().unwrap();
    let want = crate::run::ok(dir.path(), &["passes", "--markdown"]);
    let have = std::fs::read_to_string(root().join("docs/passes.md")).unwrap();
    assert!(have == want, "docs/passes.md is stale: qrmc passes --markdown > docs/passes.md");
}

#[test]
fn every_code_is_documented() {
    let docs = std::fs::read_to_string(root().join("docs/ir.md")).unwrap();
    for (path, text) in sources(&["ir/src", "passes/src", "lowering/src", "runtime/src"]) {
        for (at, _) in text.match_indices("\"Q0") {
            let code = &text[at + 1..at + 6];
            if code.chars().skip(1).all(|c| c.is_ascii_digit()) && code != "Q0000" {
                assert!(docs.contains(code), "{}: {code} is not in docs/ir.md", path.display());
            }
        }
    }
}

#[test]
fn every_pass_has_a_golden_file() {
    let golden: String = std::fs::read_dir(root().join("tests/snapshots"))
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    for p in &qrmc_passes::PASSES {
        let name = p.info().name;
        let short = name.split('-').next().unwrap();
        assert!(
            golden.contains(short) || golden.contains(&name.replace('-', "_")),
            "{name} has no golden file"
        );
    }
}
