//! JSON rows: one array, or values one after another (JSON lines), plain or compressed, read as a stream.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::Value;

use super::TextError;
use super::split::Codec;

/// Takes one row; `Ok(false)` ends the reading.
pub(super) type Sink<'a> = dyn FnMut(Value) -> Result<bool, TextError> + 'a;

/// Reads every row of a JSON file into `sink`; more than `max_bytes` of decompressed JSON are refused.
pub(super) fn read(path: &Path, codec: Codec, max_bytes: u64, sink: &mut Sink<'_>) -> Result<(), TextError> {
    let file = std::fs::File::open(path).map_err(|e| {
        TextError::at(path, format!("cannot open: {e}"), "check the path and its permissions")
    })?;
    let file = BufReader::with_capacity(1 << 16, file);
    match codec {
        Codec::Plain => rows(path, file, max_bytes, sink),
        Codec::Gzip => rows(path, flate2::bufread::MultiGzDecoder::new(file), max_bytes, sink),
        Codec::Zstd => rows(path, Zstd::new(file), max_bytes, sink),
    }
}

fn rows(path: &Path, reader: impl Read, max_bytes: u64, sink: &mut Sink<'_>) -> Result<(), TextError> {
    let mut reader = BufReader::with_capacity(1 << 16, Capped { inner: reader, left: max_bytes });
    let broken = |e: io::Error| TextError::at(path, format!("cannot be read: {e}"), READ_HINT);
    // A byte order mark and leading blanks say nothing; the first byte after them tells the two forms apart.
    let mut skip_bom = true;
    let first = loop {
        let buffer = reader.fill_buf().map_err(broken)?;
        let skip = if skip_bom && buffer.starts_with(b"\xef\xbb\xbf") {
            3
        } else {
            buffer.iter().take_while(|b| b.is_ascii_whitespace()).count()
        };
        skip_bom = false;
        match buffer.get(skip) {
            Some(&b) if !b.is_ascii_whitespace() => {
                reader.consume(skip);
                break b;
            }
            None if buffer.is_empty() => return Ok(()),
            _ => reader.consume(skip),
        }
    };
    let mut failure = None;
    let mut row = 0u64;
    let mut each = |value: Value| {
        row += 1;
        match sink(value) {
            Ok(more) => more,
            Err(e) => {
                failure = Some(e);
                false
            }
        }
    };
    let parsed = if first == b'[' {
        let mut de = serde_json::Deserializer::from_reader(reader);
        let mut stopped = false;
        let visitor = Each { each: &mut each, stopped: &mut stopped };
        let result = visitor.deserialize(&mut de).and_then(|()| de.end());
        if stopped { Ok(()) } else { result }
    } else {
        let mut result = Ok(());
        for value in serde_json::Deserializer::from_reader(reader).into_iter::<Value>() {
            match value {
                Ok(value) => {
                    if !each(value) {
                        break;
                    }
                }
                Err(e) => {
                    result = Err(e);
                    break;
                }
            }
        }
        result
    };
    match (failure, parsed) {
        (Some(e), _) => Err(e),
        (None, Ok(())) => Ok(()),
        (None, Err(e)) => {
            let hint = if e.is_io() { READ_HINT } else { "the file must be JSON lines or one JSON array" };
            Err(TextError::at(path, format!("after {row} good rows: {e}"), hint))
        }
    }
}

const READ_HINT: &str = "check that the file is complete and is what its name says, or raise the size limit";

/// Hands the elements of one array to a callback without keeping them.
struct Each<'a, F> {
    each: &'a mut F,
    stopped: &'a mut bool,
}

impl<'de, F: FnMut(Value) -> bool> DeserializeSeed<'de> for Each<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, de: D) -> Result<(), D::Error> {
        de.deserialize_seq(self)
    }
}

impl<'de, F: FnMut(Value) -> bool> Visitor<'de> for Each<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(value) = seq.next_element::<Value>()? {
            if !(self.each)(value) {
                *self.stopped = true;
                return Ok(());
            }
        }
        Ok(())
    }
}

/// A reader that fails once more than its limit has come out of it.
struct Capped<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Capped<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| {
            io::Error::new(io::ErrorKind::FileTooLarge, "there is more data than the size limit allows")
        })?;
        Ok(n)
    }
}

/// All frames of a zstd stream, one after another; skippable frames are skipped.
struct Zstd<R> {
    source: R,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl<R: BufRead> Zstd<R> {
    fn new(source: R) -> Self {
        Self { source, decoder: FrameDecoder::new(), in_frame: false }
    }

    /// Starts the next frame; `false` at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.reset(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    io::copy(&mut self.source.by_ref().take(u64::from(length)), &mut io::sink())?;
                }
                Err(e) => return Err(invalid(e)),
            }
        }
    }
}

fn invalid(e: FrameDecoderError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("bad zstd data: {e}"))
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.in_frame {
                if !self.next_frame()? {
                    return Ok(0);
                }
                self.in_frame = true;
            }
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buf);
            }
            if self.decoder.is_finished() {
                self.in_frame = false;
            } else {
                let strategy = BlockDecodingStrategy::UptoBytes(buf.len());
                self.decoder.decode_blocks(&mut self.source, strategy).map_err(invalid)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn all(bytes: &[u8], codec: Codec) -> Result<Vec<Value>, TextError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, bytes).unwrap();
        let mut out = Vec::new();
        read(&path, codec, 1 << 20, &mut |v| {
            out.push(v);
            Ok(true)
        })?;
        Ok(out)
    }

    fn gz(text: &[u8]) -> Vec<u8> {
        let mut enc = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        enc.write_all(text).unwrap();
        enc.finish().unwrap()
    }

    fn zst(text: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(text, ruzstd::encoding::CompressionLevel::Fastest)
    }

    #[test]
    fn lines_arrays_and_marks() {
        for text in ["{\"a\":1}\n{\"a\":2}\n", "[{\"a\":1},\n {\"a\":2}]\n", "\u{feff} \n{\"a\":1} {\"a\":2}"]
        {
            let rows = all(text.as_bytes(), Codec::Plain).unwrap();
            assert_eq!(rows, [serde_json::json!({"a": 1}), serde_json::json!({"a": 2})], "{text:?}");
        }
        assert!(all(b" \n ", Codec::Plain).unwrap().is_empty());
        assert!(all(b"", Codec::Zstd).unwrap().is_empty());
    }

    #[test]
    fn compressed_streams_of_several_members() {
        let two = [gz(b"1\n2\n"), gz(b"3\n")].concat();
        assert_eq!(all(&two, Codec::Gzip).unwrap().len(), 3);
        let skippable =
            [&[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9][..], &zst(b"1\n2\n"), &zst(b"3\n")].concat();
        assert_eq!(all(&skippable, Codec::Zstd).unwrap().len(), 3);
    }

    #[test]
    fn faults_are_located() {
        let err = all(b"{\"a\":1}\n{\"a\":\n", Codec::Plain).unwrap_err();
        assert!(err.what.contains("after 1 good rows") && err.what.contains("line 3"), "{err}");
        assert!(all(b"[1,2", Codec::Plain).is_err());
        assert!(all(b"[1,2] 3", Codec::Plain).is_err());
        let whole = zst(&b"{\"a\":1}\n".repeat(4000));
        assert!(all(&whole[..whole.len() / 2], Codec::Zstd).is_err());
        assert!(all(b"not zstd at all", Codec::Zstd).is_err());
        let deep = "[".repeat(100_000);
        assert!(all(deep.as_bytes(), Codec::Plain).is_err());
    }

    #[test]
    fn a_bomb_meets_the_limit() {
        let err = all(&gz(&vec![b' '; 2 << 20]), Codec::Gzip).unwrap_err();
        assert!(err.what.contains("size limit"), "{err}");
    }
}
