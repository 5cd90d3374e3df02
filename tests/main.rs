//! All integration tests, in one binary.
#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod numerics;
mod support;
