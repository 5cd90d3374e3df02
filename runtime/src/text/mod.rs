//! Text in and out: corpora, tokenizers, chat templates, windows of tokens, and the random generators that choose them.
//!
//! Reading is exact and deterministic: the same files give the same rows, the same token ids and the same windows on
//! every machine, and each choice that changes a published number (how rows are joined, where windows start, whether a
//! BOS token is added) can be stated in words by the type that makes it.

mod arrow;
pub mod chat;
pub mod dataset;
pub mod documents;
mod error;
mod files;
mod jsonl;
mod parquet;
mod pieces;
pub use qrmc_ir::random;
mod rows;
mod split;
mod stream;
pub mod tokenizer;
pub mod windows;

pub use chat::{ChatTemplate, Message};
pub use dataset::{Corpus, Fields, Join, ReadOptions, read_corpus, read_fields, text_bytes};
pub use error::TextError;
pub use rows::Row;
pub use split::{Split, available_splits};
pub use stream::StreamDecoder;
pub use tokenizer::Tokenizer;
