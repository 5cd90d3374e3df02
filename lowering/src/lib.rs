//! Verified modules become programs for a target, packed artefacts and exports.

pub mod artefact;
mod define;
mod lower;
pub mod materialize;
mod program;
mod target;

pub use lower::{lower, lower_func, weight_order};
pub use program::{
    Arg, Buffer, CacheForm, CacheRead, Const, Kernel, Layout, LinearPart, Program, Size, Spread, Step,
};
pub use target::{Cpu, Legality, TARGETS, Target};
