//! Fields of a message in the wire format of protocol buffers, lent from the bytes of the file.
//!
//! Messages inside a message are handed out as bytes, and whoever wants one walks its fields. So nesting costs nothing until
//! it is followed, and a file makes no memory of its own.

use protobuf::CodedInputStream;

/// The value of a field.
#[derive(Clone, Copy, Debug)]
pub(super) enum Field<'a> {
    /// An integer, a truth value or an element of an enumeration.
    Int(u64),
    /// Four bytes: a float.
    Four(u32),
    /// Eight bytes: a double.
    Eight(u64),
    /// Text, bytes, a message, or numbers one after the other.
    Bytes(&'a [u8]),
}

impl<'a> Field<'a> {
    pub(super) fn int(self) -> Option<i64> {
        match self {
            Field::Int(n) => Some(n as i64),
            _ => None,
        }
    }

    pub(super) fn bytes(self) -> Option<&'a [u8]> {
        match self {
            Field::Bytes(b) => Some(b),
            _ => None,
        }
    }

    pub(super) fn text(self) -> Option<&'a str> {
        self.bytes().and_then(|b| std::str::from_utf8(b).ok())
    }

    /// Appends the integers of a repeated field, packed or one at a time.
    pub(super) fn ints(self, out: &mut Vec<i64>) -> Option<()> {
        match self {
            Field::Int(n) => out.push(n as i64),
            Field::Bytes(b) => {
                let mut input = CodedInputStream::from_bytes(b);
                while !input.eof().ok()? {
                    out.push(input.read_raw_varint64().ok()? as i64);
                }
            }
            Field::Four(_) | Field::Eight(_) => return None,
        }
        Some(())
    }

    /// Appends the little-endian bytes of numbers of a fixed size, packed or one at a time.
    pub(super) fn fixed(self, out: &mut Vec<u8>) -> Option<()> {
        match self {
            Field::Four(n) => out.extend(n.to_le_bytes()),
            Field::Eight(n) => out.extend(n.to_le_bytes()),
            Field::Bytes(b) => out.extend(b),
            Field::Int(_) => return None,
        }
        Some(())
    }
}

/// Walks the fields of a message: number and value of each.
///
/// # Errors
/// What is wrong with the bytes, in a sentence, or what `take` says: `None` is a field of a type that it does not have.
pub(super) fn walk<'a>(
    message: &'a [u8],
    mut take: impl FnMut(u32, Field<'a>) -> Result<Option<()>, String>,
) -> Result<(), String> {
    let mut input = CodedInputStream::from_bytes(message);
    let cut = |_| "the message ends in the middle of a field".to_owned();
    while let Some(tag) = input.read_raw_tag_or_eof().map_err(cut)? {
        let (number, wire) = (tag >> 3, tag & 7);
        let field = match wire {
            0 => Field::Int(input.read_raw_varint64().map_err(cut)?),
            1 => Field::Eight(input.read_fixed64().map_err(cut)?),
            2 => {
                let len = input.read_raw_varint64().map_err(cut)?;
                let at = input.pos() as usize;
                let part = usize::try_from(len).ok().and_then(|n| message.get(at..at.checked_add(n)?));
                let left = message.len().saturating_sub(at);
                let part = part.ok_or_else(|| {
                    format!("field {number} claims {len} bytes, the message has {left} left")
                })?;
                input.skip_raw_bytes(part.len() as u32).map_err(cut)?;
                Field::Bytes(part)
            }
            5 => Field::Four(input.read_fixed32().map_err(cut)?),
            _ => return Err(format!("field {number} has the wire type {wire}, which ONNX does not use")),
        };
        if take(number, field)?.is_none() {
            return Err(format!("field {number} is of another type than the schema says"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(bytes: &[u8]) -> Result<Vec<String>, String> {
        let mut out = Vec::new();
        walk(bytes, |n, f| {
            out.push(format!("{n} {f:?}"));
            Ok(Some(()))
        })?;
        Ok(out)
    }

    #[test]
    fn fields_are_lent() {
        let bytes = [0x08, 0x96, 0x01, 0x12, 2, b'a', b'b', 0x1d, 0, 0, 0x80, 0x3f];
        assert_eq!(fields(&bytes).unwrap(), ["1 Int(150)", "2 Bytes([97, 98])", "3 Four(1065353216)"]);
    }

    #[test]
    fn what_is_no_message_is_refused() {
        assert!(fields(&[0x12, 9, 1]).unwrap_err().contains("claims 9 bytes, the message has 1 left"));
        assert!(fields(&[0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]).is_err());
        assert!(fields(&[0x08]).unwrap_err().contains("middle"));
        // A group, which readers of the format nest without a limit.
        assert!(fields(&[0x0b, 0x0b]).unwrap_err().contains("wire type 3"));
    }
}
