//! Runs qrmc programs: CPU kernels, generation, evaluation and data sets.

pub mod batch;
pub mod bench;
pub mod caches;
pub mod cpu;
pub mod engine;
pub mod eval;
pub mod generate;
pub mod layout;
pub mod parity;
pub mod sample;
pub mod session;
pub mod tasks;
pub mod text;
