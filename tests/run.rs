//! Running the binary.

use std::path::Path;
use std::process::{Command, Output};

/// A command line of the binary under test, in a folder of its own.
pub(crate) fn qrmc(dir: &Path, args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_qrmc"));
    c.current_dir(dir).args(args).env("NO_COLOR", "1").env_remove("QRMC_DATA");
    c
}

/// What a finished run said.
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Said {
    fn from(o: Output) -> Self {
        Said {
            code: o.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&o.stdout).into_owned(),
            err: String::from_utf8_lossy(&o.stderr).into_owned(),
        }
    }
}

pub(crate) fn run(dir: &Path, args: &[&str]) -> Said {
    qrmc(dir, args).output().unwrap().into()
}

/// Runs and expects success.
pub(crate) fn ok(dir: &Path, args: &[&str]) -> String {
    let s = run(dir, args);
    assert_eq!(s.code, 0, "{args:?}\n{}\n{}", s.out, s.err);
    s.out
}

/// Every file below a folder with its bytes.
pub(crate) fn snapshot(dir: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let mut out = std::collections::BTreeMap::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(d) = todo.pop() {
        for e in std::fs::read_dir(&d).unwrap() {
            let p = e.unwrap().path();
            if p.is_dir() {
                todo.push(p);
            } else {
                let name = p.strip_prefix(dir).unwrap().to_string_lossy().into_owned();
                out.insert(name, std::fs::read(&p).unwrap());
            }
        }
    }
    out
}
