//! What the fuzz targets share: a folder to write inputs into, and a limit on memory that follows the input's size.

use std::alloc::System;
use std::path::{Path, PathBuf};

use cap::Cap;
use qrmc_frontends::{Checkpoint, ImportError, Imported, Integers};

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

/// What any input may take: patterns of a configuration may become automata of 10 MiB.
const BASE: usize = 32 << 20;
/// What each byte of an input may take besides: a JSON value is larger than its text, codes of 2 bits become floats.
const EACH: usize = 256;

/// Runs `f` on an input. An allocation beyond its size class ends the process, which the fuzzer reports.
pub fn within_limit<T>(input: usize, f: impl FnOnce() -> T) -> T {
    let limit = MEMORY.allocated() + BASE + EACH * input;
    let set = MEMORY.set_limit(limit);
    assert!(set.is_ok(), "more is allocated than the limit");
    let out = f();
    let _ = MEMORY.set_limit(usize::MAX);
    out
}

/// A folder of this process's own, below the system's folder for temporary files.
pub fn folder() -> PathBuf {
    let dir = std::env::temp_dir().join(format!("qrmc-fuzz-{}", std::process::id()));
    let _ = std::fs::create_dir_all(&dir);
    dir
}

/// Writes a file anew. The old one is removed first, so that a map of it stays what it was.
pub fn write(path: &Path, parts: &[&[u8]]) {
    let _ = std::fs::remove_file(path);
    std::fs::write(path, parts.concat()).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// Imports a checkpoint both ways. What is accepted must be a module that verifies and whose tensors are what they are
/// declared as; what is refused must say what was seen.
pub fn import(path: &Path) {
    for integers in [Integers::Keep, Integers::Dequantize] {
        match qrmc_frontends::import(path, integers) {
            Ok(Imported { module, source }) => {
                if let Err(faults) = qrmc_ir::verify(&module) {
                    panic!("an imported module has the fault {:?}", faults.first());
                }
                read(&*source.weights);
            }
            Err(e) => {
                told(&e);
                // Tensors of a file that makes no module are read all the same.
                if let Ok(opened) = qrmc_frontends::open(path, integers) {
                    read(&*opened.weights);
                }
            }
        }
    }
}

fn told(e: &ImportError) {
    assert!(!e.what.trim().is_empty(), "an error says nothing");
}

/// Reads every tensor.
pub fn read(weights: &dyn Checkpoint) {
    for (name, ty) in weights.tensors() {
        let lent = weights.shared(&name);
        if let Ok(raw) = weights.raw(&name) {
            assert_eq!((&raw.ty, Some(raw.bytes.len())), (&ty, ty.bytes()), "{name}");
            if let Ok(Some(lent)) = lent {
                assert!(*lent == *raw.bytes, "{name}: lent bytes differ");
            }
            let _ = weights.read(&name);
        }
    }
}
