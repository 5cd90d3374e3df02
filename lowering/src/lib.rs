//! Verified modules become programs for a target, packed artefacts and exports.

pub mod artefact;
mod define;
pub mod export;
mod kernel;
mod lower;
pub mod materialize;
mod program;
mod target;

pub use kernel::{CacheForm, CacheRead, Kernel, LinearPart, RowStep, Spread};
pub use lower::{host_elem, lower, lower_func, weight_order};
pub use program::{Arg, Buffer, Const, Layout, Program, Size, Step};
pub use target::{Cpu, Legality, TARGETS, Target};
