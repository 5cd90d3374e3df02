//! Killed anywhere and run again: the same bytes, and nothing done twice. One thread or two: the same bytes.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use crate::run::{ok, qrmc, snapshot};

const AWQ: &str = "awq:bits=3";
const GPTQ: &str = "gptq:bits=3";

fn command(pass: &str) -> [&str; 8] {
    ["compile", "--pass", pass, "--nsamples", "4", "--seqlen", "256", "--no-check"]
}

fn steps(dir: &Path) -> Vec<(String, SystemTime)> {
    let Ok(entries) = std::fs::read_dir(dir.join("out.partial/steps")) else { return Vec::new() };
    let mut v: Vec<_> = entries
        .filter_map(Result::ok)
        .filter(|e| e.path().extension().is_some_and(|x| x == "step"))
        .filter_map(|e| {
            Some((e.file_name().to_string_lossy().into_owned(), e.metadata().ok()?.modified().ok()?))
        })
        .collect();
    v.sort();
    v
}

fn compile(dir: &Path, pass: &str, threads: &str) -> Vec<String> {
    let mut args: Vec<String> = command(pass).iter().map(ToString::to_string).collect();
    args.extend(["-o", "out", "--threads", threads].map(String::from));
    let refs: Vec<&str> = args.iter().map(String::as_str).collect();
    ok(dir, &refs);
    args
}

#[test]
fn killed_at_any_layer_the_bytes_are_the_same() {
    // A kept step and its stream are two files; the stream of the layer before goes away.
    killed(AWQ, &[2, 4, 6, 8]);
}

#[test]
fn killed_at_any_layer_of_gptq_the_bytes_are_the_same() {
    killed(GPTQ, &[2, 3, 4]);
}

fn killed(pass: &str, waits: &[usize]) {
    let clean = tempfile::tempdir().unwrap();
    let args = compile(clean.path(), pass, "2");
    let want = snapshot(&clean.path().join("out"));
    assert!(!clean.path().join("out.partial").exists(), "nothing is left beside the output");

    let dir = tempfile::tempdir().unwrap();
    let refs: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut finished: Vec<(String, SystemTime)> = Vec::new();
    for &wait_for in waits {
        let mut child = qrmc(dir.path(), &refs).stdout(std::process::Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while steps(dir.path()).len() < wait_for && start.elapsed() < Duration::from_secs(120) {
            if child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // SIGKILL.
        child.kill().unwrap();
        child.wait().unwrap();
        let now = steps(dir.path());
        for (name, time) in &finished {
            // Streams of earlier layers are removed; results stay, and are not written again.
            if let Some((_, t)) = now.iter().find(|(n, _)| n == name) {
                assert_eq!(t, time, "step {name} was done twice");
            }
        }
        assert!(now.len() >= finished.len(), "finished steps were lost");
        finished = now;
    }
    assert!(finished.len() >= 4, "the runs were killed after some steps: {finished:?}");
    ok(dir.path(), &refs);
    let have = snapshot(&dir.path().join("out"));
    assert_eq!(have.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    for (name, bytes) in &want {
        assert!(have[name] == *bytes, "{name} differs after being killed");
    }
    assert!(!dir.path().join("out.partial").exists());
}

#[test]
fn the_number_of_threads_does_not_show() {
    for pass in [AWQ, GPTQ] {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        compile(one.path(), pass, "1");
        compile(two.path(), pass, "2");
        assert!(snapshot(&one.path().join("out")) == snapshot(&two.path().join("out")), "{pass}");
    }
}

#[test]
fn a_damaged_step_is_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let args: Vec<&str> = command(AWQ).into_iter().chain(["-o", "out", "--cache", "steps"]).collect();
    ok(dir.path(), &args);
    let want = snapshot(&dir.path().join("out"));
    for e in std::fs::read_dir(dir.path().join("steps")).unwrap() {
        let path = e.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    ok(dir.path(), &args);
    assert!(snapshot(&dir.path().join("out")) == want);
}
