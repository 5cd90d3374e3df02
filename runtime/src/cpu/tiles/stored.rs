//! Elements that lie in memory of their own, or in shared bytes such as a mapped file.
#![allow(
    unsafe_code,
    reason = "a slice and what keeps it alive, side by side, so that reading it costs no test"
)]

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use bytemuck::Pod;
use bytes::Bytes;

/// A slice that nobody writes. Copies share its memory.
#[derive(Clone)]
pub(super) struct Stored<T> {
    at: *const T,
    len: usize,
    /// Keeps the elements alive and in their place.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the elements are only read, and what owns them may be sent and shared.
unsafe impl<T: Sync> Send for Stored<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Stored<T> {}

impl<T: Pod + Send + Sync> Stored<T> {
    /// Little-endian elements in shared bytes; `None` on a big-endian host, at an address that does not suit `T`, or if
    /// part of an element is left over.
    pub(super) fn shared(bytes: Bytes) -> Option<Self> {
        if cfg!(target_endian = "big") {
            return None;
        }
        let slice: &[T] = bytemuck::try_cast_slice(&bytes).ok()?;
        let (at, len) = (slice.as_ptr(), slice.len());
        Some(Stored { at, len, _owner: Arc::new(bytes) })
    }

    /// As they lie in memory.
    pub(super) fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self)
    }
}

impl<T: Send + Sync + 'static> From<Vec<T>> for Stored<T> {
    fn from(v: Vec<T>) -> Self {
        let owner = Arc::new(v);
        Stored { at: owner.as_ptr(), len: owner.len(), _owner: owner }
    }
}

impl<T> Deref for Stored<T> {
    type Target = [T];
    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `at` and `len` come from a slice of a `Vec` or of `Bytes` whose alignment was checked; the owner keeps its
        // memory in place, nothing hands out a way to write it, and it lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }
}

impl<T: PartialEq> PartialEq for Stored<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<T> fmt::Debug for Stored<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} elements]", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Floats(Vec<f32>);

    impl AsRef<[u8]> for Floats {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn shared_bytes_are_read_where_they_fit() {
        let bytes = Bytes::from_owner(Floats(vec![0.0, 1.0, -2.5, 3.0]));
        let owned = Stored::from(vec![1.0f32, -2.5, 3.0]);
        assert_eq!(Stored::<f32>::shared(bytes.slice(4..)).unwrap(), owned);
        assert_eq!(Stored::<u8>::shared(bytes.slice(1..)).unwrap().len(), 15);
        assert!(Stored::<f32>::shared(bytes.slice(1..13)).is_none(), "unaligned");
        assert!(Stored::<f32>::shared(bytes.slice(0..7)).is_none(), "part of an element");
    }

    #[test]
    fn copies_outlive_the_first() {
        let first = Stored::from(vec![7u8; 100]);
        let copy = first.clone();
        drop(first);
        let there = std::thread::spawn(move || copy.iter().map(|&x| u32::from(x)).sum::<u32>());
        assert_eq!(there.join().unwrap(), 700);
    }
}
