//! Checkpoints become modules: Hugging Face folders and GGUF files.
//!
//! Weights stay where they are; files are mapped, and headers are checked before anything is believed.

mod checkpoint;
mod error;
pub mod gguf;
pub mod hf;

pub use checkpoint::{Checkpoint, Opened, SideFile};
pub use error::ImportError;
