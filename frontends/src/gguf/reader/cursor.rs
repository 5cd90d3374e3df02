//! Reading forward through bytes that may end anywhere.

use std::path::Path;

use super::{Array, FETCH_AGAIN, MAX_NESTING, Meta, kind_name};
use crate::ImportError;

/// A position in the mapped file. Every step is checked against the end.
pub(super) struct Cursor<'a> {
    pub(super) path: &'a Path,
    pub(super) bytes: &'a [u8],
    pub(super) pos: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn fail(&self, what: impl Into<String>) -> ImportError {
        ImportError::new(self.path, what)
    }

    /// The next `n` bytes, which are `what`.
    pub(super) fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8], ImportError> {
        let left = self.bytes.len() - self.pos;
        let Some(n) = usize::try_from(n).ok().filter(|&n| n <= left) else {
            let what = format!("{what} needs {n} bytes at byte {}, but only {left} are left", self.pos);
            return Err(self.fail(what).hint(FETCH_AGAIN));
        };
        let taken = &self.bytes[self.pos..self.pos + n];
        self.pos += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], ImportError> {
        let bytes = self.take(N as u64, what)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, ImportError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, ImportError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// Refuses a count of things that cannot all be in the rest of the file.
    pub(super) fn fits(&self, count: u64, each: u64, what: &str) -> Result<(), ImportError> {
        let left = (self.bytes.len() - self.pos) as u64;
        if count > left / each {
            let what = format!(
                "the file claims {count} {what} of at least {each} bytes each, but only {left} bytes are left"
            );
            return Err(self.fail(what).hint(FETCH_AGAIN));
        }
        Ok(())
    }

    /// A length and that many bytes of UTF-8.
    pub(super) fn string(&mut self, what: &str) -> Result<&'a str, ImportError> {
        let n = self.u64(what)?;
        let bytes = self.take(n, what)?;
        std::str::from_utf8(bytes).map_err(|e| {
            let at = self.pos - bytes.len() + e.valid_up_to();
            self.fail(format!("{what} is not UTF-8 at byte {at} of the file")).hint(FETCH_AGAIN)
        })
    }

    /// A metadata value of type `kind`; lists are walked over, not copied.
    pub(super) fn value(&mut self, kind: u32, key: &str, depth: u32) -> Result<Meta, ImportError> {
        Ok(match kind {
            0 => Meta::Uint(self.array::<1>(key)?[0].into()),
            1 => Meta::Int(self.array(key).map(i8::from_le_bytes)?.into()),
            2 => Meta::Uint(self.array(key).map(u16::from_le_bytes)?.into()),
            3 => Meta::Int(self.array(key).map(i16::from_le_bytes)?.into()),
            4 => Meta::Uint(self.u32(key)?.into()),
            5 => Meta::Int(self.array(key).map(i32::from_le_bytes)?.into()),
            6 => Meta::F32(self.array(key).map(f32::from_le_bytes)?),
            7 => match self.array::<1>(key)?[0] {
                b @ (0 | 1) => Meta::Bool(b == 1),
                b => return Err(self.fail(format!("`{key}` is a boolean of value {b}; 0 and 1 are allowed"))),
            },
            8 => Meta::Str(self.string(&format!("the text of `{key}`"))?.to_owned()),
            9 => {
                let (kind, len) = (self.u32(key)?, self.u64(key)?);
                let start = self.pos;
                self.skip_list(kind, len, key, depth)?;
                Meta::Array(Array { kind, len: len as usize, at: start..self.pos })
            }
            10 => Meta::Uint(self.u64(key)?),
            11 => Meta::Int(self.array(key).map(i64::from_le_bytes)?),
            12 => Meta::F64(self.array(key).map(f64::from_le_bytes)?),
            _ => {
                return Err(self
                    .fail(format!("`{key}` has value type {kind}; 0 to 12 are known"))
                    .hint(FETCH_AGAIN));
            }
        })
    }

    /// Walks over the elements of a list without keeping any.
    fn skip_list(&mut self, kind: u32, len: u64, key: &str, depth: u32) -> Result<(), ImportError> {
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 12,
            _ => {
                let what = format!("`{key}` is a list of value type {kind}; 0 to 12 are known");
                return Err(self.fail(what).hint(FETCH_AGAIN));
            }
        };
        self.fits(len, least, &format!("values of {} in `{key}`", kind_name(kind)))?;
        if kind == 9 && depth + 1 >= MAX_NESTING {
            return Err(self.fail(format!("`{key}` nests lists more than {MAX_NESTING} deep")));
        }
        match kind {
            8 => {
                let what = format!("a string of `{key}`");
                (0..len).try_for_each(|_| {
                    let n = self.u64(&what)?;
                    self.take(n, &what).map(drop)
                })
            }
            9 => (0..len).try_for_each(|_| {
                let (kind, len) = (self.u32(key)?, self.u64(key)?);
                self.skip_list(kind, len, key, depth + 1)
            }),
            _ => self.take(len * least, key).map(drop),
        }
    }
}
