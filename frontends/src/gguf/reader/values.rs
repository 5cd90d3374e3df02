//! Metadata values by key and kind.

use super::cursor::Cursor;
use super::{GgufFile, Meta};
use crate::ImportError;

impl GgufFile {
    /// An error about this file.
    pub(in crate::gguf) fn fail(&self, what: impl Into<String>) -> ImportError {
        ImportError::new(&self.path, what)
    }

    fn wrong(&self, key: &str, seen: &Meta, wanted: &str) -> ImportError {
        self.fail(format!("metadata `{key}` is {seen}; {wanted} is wanted"))
    }

    /// A non-negative integer of any width.
    ///
    /// # Errors
    /// If the key is there with another kind of value.
    pub fn uint(&self, key: &str) -> Result<Option<u64>, ImportError> {
        match self.meta(key) {
            None => Ok(None),
            Some(&Meta::Uint(v)) => Ok(Some(v)),
            Some(&Meta::Int(v)) if v >= 0 => Ok(Some(v as u64)),
            Some(other) => Err(self.wrong(key, other, "a non-negative integer")),
        }
    }

    /// A finite float, as the shortest decimal that rounds to what is stored.
    ///
    /// # Errors
    /// If the key is there with another kind of value.
    pub fn float(&self, key: &str) -> Result<Option<f64>, ImportError> {
        match self.meta(key) {
            None => Ok(None),
            Some(&Meta::F32(v)) if v.is_finite() => Ok(Some(shortest(v))),
            Some(&Meta::F64(v)) if v.is_finite() => Ok(Some(v)),
            Some(other) => Err(self.wrong(key, other, "a finite float")),
        }
    }

    /// True or false.
    ///
    /// # Errors
    /// If the key is there with another kind of value.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, ImportError> {
        match self.meta(key) {
            None => Ok(None),
            Some(&Meta::Bool(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong(key, other, "a boolean")),
        }
    }

    /// Text.
    ///
    /// # Errors
    /// If the key is there with another kind of value.
    pub fn str(&self, key: &str) -> Result<Option<&str>, ImportError> {
        match self.meta(key) {
            None => Ok(None),
            Some(Meta::Str(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong(key, other, "a string")),
        }
    }

    /// A list of strings.
    ///
    /// # Errors
    /// If the key is there with another kind of value, or a string is not UTF-8.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&str>>, ImportError> {
        self.list(
            key,
            "a list of strings",
            |kind| kind == 8,
            |cur, _| cur.string(&format!("a string of `{key}`")),
        )
    }

    /// A list of integers of any width.
    ///
    /// # Errors
    /// If the key is there with another kind of value.
    pub fn ints(&self, key: &str) -> Result<Option<Vec<i64>>, ImportError> {
        self.list(
            key,
            "a list of integers",
            |kind| matches!(kind, 0..=5 | 10 | 11),
            |cur, kind| {
                Ok(match cur.value(kind, key, 0)? {
                    Meta::Uint(v) => i64::try_from(v).unwrap_or(i64::MAX),
                    Meta::Int(v) => v,
                    _ => 0,
                })
            },
        )
    }

    /// A list of floats, narrowed to `f32`.
    ///
    /// # Errors
    /// If the key is there with another kind of value.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, ImportError> {
        self.list(
            key,
            "a list of floats",
            |kind| matches!(kind, 6 | 12),
            |cur, kind| {
                Ok(match cur.value(kind, key, 0)? {
                    Meta::F32(v) => v,
                    Meta::F64(v) => v as f32,
                    _ => 0.0,
                })
            },
        )
    }

    fn list<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        fits: impl Fn(u32) -> bool,
        read: impl Fn(&mut Cursor<'a>, u32) -> Result<T, ImportError>,
    ) -> Result<Option<Vec<T>>, ImportError> {
        let array = match self.meta(key) {
            None => return Ok(None),
            Some(Meta::Array(a)) if fits(a.kind) => a,
            Some(other) => return Err(self.wrong(key, other, wanted)),
        };
        let mut cur = Cursor { path: &self.path, bytes: &self.map[..array.at.end], pos: array.at.start };
        (0..array.len).map(|_| read(&mut cur, array.kind)).collect::<Result<_, _>>().map(Some)
    }
}

/// The double that prints as `x` does: `1e-5` rather than `9.999999747378752e-6`.
fn shortest(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}
