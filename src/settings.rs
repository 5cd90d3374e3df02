//! What the environment and the place of the program say. No other file reads the environment.

use std::path::{Path, PathBuf};

/// Folder with data sets in their Hugging Face layouts, searched when a task is given without `--data`.
pub(crate) const DATA_VARIABLE: &str = "QRMC_DATA";
/// Any value switches colour off (see no-color.org).
const NO_COLOR: &str = "NO_COLOR";

/// Whether colour is unwanted.
pub(crate) fn no_color() -> bool {
    std::env::var_os(NO_COLOR).is_some_and(|v| !v.is_empty())
}

/// The data folder of the environment.
pub(crate) fn data_folder() -> Option<PathBuf> {
    std::env::var_os(DATA_VARIABLE).map(PathBuf::from)
}

/// What ships with the repository that this binary was built from, if it is still there.
pub(crate) fn shipped(name: &str) -> Option<PathBuf> {
    Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)).filter(|p| p.exists())
}

/// Threads to use when none are asked for.
pub(crate) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
