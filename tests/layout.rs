//! The layout file of an artefact, from the outside.

use std::fs;

use crate::run::{ok, run, snapshot};
use crate::support::{TINY, data};

/// Generates with the artefact `out`, and gives the text and what was noted.
fn generate(dir: &std::path::Path, more: &[&str]) -> (String, String) {
    let args = ["generate", "out", "--prompt", "The war", "--raw", "--greedy", "--max-new", "12"];
    let s = run(dir, &[&args[..], more].concat());
    assert_eq!(s.code, 0, "{}{}", s.out, s.err);
    (s.out, s.err)
}

#[test]
fn a_layout_file_changes_no_text_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, tiny) = (dir.path(), data(TINY));
    ok(dir, &["compile", tiny.to_str().unwrap(), "--pass", "rtn:bits=4,group=64", "-o", "out"]);
    let compiled = snapshot(&dir.join("out"));
    assert!(!compiled.contains_key("layout.cpu"));
    let (text, note) = generate(dir, &[]);
    assert!(!text.trim().is_empty() && !note.contains("layout.cpu"), "{note}");
    let file = dir.join("out/layout.cpu");
    let good = fs::read(&file).unwrap();
    let (again, note) = generate(dir, &["--threads", "1"]);
    assert!(again == text && !note.contains("layout.cpu"), "{note}");

    // Damage of the cache is noted and mended; the text stays what it is.
    let middle = good.len() / 2;
    let mut flipped = good.clone();
    flipped[middle] ^= 4;
    for (bad, words) in [(&flipped[..], "another checksum"), (&good[..middle], "cut short"), (b"", "0 bytes")]
    {
        fs::write(&file, bad).unwrap();
        let (again, note) = generate(dir, &[]);
        assert_eq!(again, text, "{words}");
        assert!(note.contains("layout.cpu: ") && note.contains(words), "{note}");
        assert_eq!(note.matches("layout.cpu").count(), 1, "{note}");
        assert!(fs::read(&file).unwrap() == good, "{words}");
    }

    // Nothing else of the folder was touched, and the file takes no part in what else is done with it.
    let mut now = snapshot(&dir.join("out"));
    assert!(now.remove("layout.cpu").is_some() && now == compiled);
    fs::write(&file, b"no layout").unwrap();
    ok(dir, &["inspect", "out"]);
    assert_eq!(fs::read(&file).unwrap(), b"no layout");
    fs::write(&file, &good).unwrap();
    ok(dir, &["check", "out", "--parity"]);

    // The layout of another artefact is not believed.
    ok(dir, &["compile", tiny.to_str().unwrap(), "--pass", "rtn:bits=4,group=64,sym=true", "-o", "other"]);
    fs::write(dir.join("other/layout.cpu"), &good).unwrap();
    let ppl = ["eval", "other", "--task", "wikitext2", "--ctx", "64", "--windows", "1"];
    let s = run(dir, &ppl);
    assert!(s.code == 0 && s.err.contains("belongs to another artefact"), "{}{}", s.out, s.err);
    let s = run(dir, &ppl);
    assert!(s.code == 0 && !s.err.contains("layout.cpu"), "{}{}", s.out, s.err);

    // What the layouts stand for need not be read to run, but is checked by what looks at the artefact itself.
    let shard = dir.join("out/model.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("out/manifest.json")).unwrap()).unwrap();
    let tensors = manifest["tensors"].as_object().unwrap();
    let name = tensors.keys().find(|n| n.ends_with("q_proj.weight.codes")).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let head: serde_json::Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    let at = start + head[name]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at] ^= 1;
    fs::write(&shard, &bytes).unwrap();
    assert_eq!(generate(dir, &[]).0, text);
    for args in [&["inspect", "out"][..], &["check", "out", "--parity"]] {
        let s = run(dir, args);
        assert!(s.code == 1 && s.err.contains(name) && s.err.contains("altered"), "{args:?}: {}", s.err);
    }
    // Without the file, the damage is in the way of running as well.
    fs::remove_file(&file).unwrap();
    let s = run(dir, &["generate", "out", "--prompt", "a", "--raw"]);
    assert!(s.code == 1 && s.err.contains("altered"), "{}", s.err);
}
