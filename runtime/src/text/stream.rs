//! Decoding an answer token by token.

use super::TextError;
use super::tokenizer::Tokenizer;

/// Turns ids into text as they come, giving out only whole characters.
///
/// The pieces given out, [`StreamDecoder::finish`] included, add up to what [`Tokenizer::decode`] gives for all ids.
/// The one exception is malformed UTF-8 from a tokenizer with byte-fallback tokens: there `decode` spoils the whole run
/// of bytes, while whole characters before the fault have been given out here.
#[derive(Debug, Clone, Default)]
pub struct StreamDecoder {
    skip_special: bool,
    /// Bytes that do not make a character yet.
    bytes: Vec<u8>,
    /// Ids whose text is not given out yet; with `bytes` in use, the ids of these bytes.
    held: Vec<u32>,
    /// The ids given out last. A piece is what `held` adds to the text of these, so that a decoder which treats the
    /// first token of a text differently (a stripped space) does so once.
    anchor: Vec<u32>,
}

/// Ids are held back at most this long where a piece ends in the replacement character.
const MAX_HELD: usize = 8;

impl StreamDecoder {
    /// A decoder at the start of a text.
    pub fn new(skip_special: bool) -> Self {
        Self { skip_special, ..Self::default() }
    }

    /// Takes the next id and gives out the text that is complete with it, which may be empty.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, TextError> {
        if self.skip_special && tokenizer.is_special(id) {
            return Ok(String::new());
        }
        let Some(token) = tokenizer.id_to_token(id) else { return Ok(String::new()) };
        if tokenizer.is_byte_level() {
            push_byte_level(&token, &mut self.bytes);
            return Ok(self.take_lossy());
        }
        if let Some(byte) = fallback_byte(&token) {
            return self.push_byte(tokenizer, id, byte);
        }
        let mut out = self.flush_bytes();
        self.held.push(id);
        let piece = self.piece(tokenizer)?;
        if piece.ends_with('\u{fffd}') && self.held.len() < MAX_HELD {
            return Ok(out);
        }
        self.anchor = std::mem::take(&mut self.held);
        out.push_str(&piece);
        Ok(out)
    }

    /// Gives out what is left: bytes that never became a character count as U+FFFD.
    pub fn finish(mut self, tokenizer: &Tokenizer) -> Result<String, TextError> {
        if tokenizer.is_byte_level() {
            return Ok(String::from_utf8_lossy(&self.bytes).into_owned());
        }
        let out = self.flush_bytes();
        if self.held.is_empty() { Ok(out) } else { Ok(out + &self.piece(tokenizer)?) }
    }

    /// What `held` adds to the text of `anchor`.
    fn piece(&self, tokenizer: &Tokenizer) -> Result<String, TextError> {
        let before = tokenizer.decode(&self.anchor, false)?;
        let both = tokenizer.decode(&[self.anchor.as_slice(), &self.held].concat(), false)?;
        match both.strip_prefix(&before) {
            Some(piece) => Ok(piece.to_owned()),
            None => tokenizer.decode(&self.held, false),
        }
    }

    fn push_byte(&mut self, tokenizer: &Tokenizer, id: u32, byte: u8) -> Result<String, TextError> {
        let mut out = String::new();
        if self.bytes.is_empty() && !self.held.is_empty() {
            out = self.piece(tokenizer)?;
            self.anchor = std::mem::take(&mut self.held);
        }
        self.bytes.push(byte);
        self.held.push(id);
        match std::str::from_utf8(&self.bytes) {
            Ok(_) => {
                out.push_str(&self.piece(tokenizer)?);
                self.anchor = std::mem::take(&mut self.held);
                self.bytes.clear();
            }
            Err(e) if e.error_len().is_none() => {}
            Err(_) if self.bytes.len() == 1 => out.push_str(&self.flush_bytes()),
            Err(_) => {
                // The last byte ends the broken character and may begin one of its own.
                self.bytes.pop();
                self.held.pop();
                out.push_str(&self.flush_bytes());
                out.push_str(&self.push_byte(tokenizer, id, byte)?);
            }
        }
        Ok(out)
    }

    /// Gives up on bytes of an unfinished character, one U+FFFD each as the byte-fallback decoder does.
    fn flush_bytes(&mut self) -> String {
        let out = "\u{fffd}".repeat(self.bytes.len());
        if !self.bytes.is_empty() {
            self.bytes.clear();
            self.held.clear();
        }
        out
    }

    /// The complete characters of `bytes`, with U+FFFD for what can never become one, as `from_utf8_lossy`.
    fn take_lossy(&mut self) -> String {
        let mut out = String::new();
        let mut done = 0;
        for chunk in self.bytes.utf8_chunks() {
            out.push_str(chunk.valid());
            done += chunk.valid().len();
            let bad = chunk.invalid();
            let unfinished = done + bad.len() == self.bytes.len()
                && matches!(std::str::from_utf8(bad), Err(e) if e.error_len().is_none());
            if unfinished {
                break;
            }
            if !bad.is_empty() {
                out.push('\u{fffd}');
                done += bad.len();
            }
        }
        self.bytes.drain(..done);
        out
    }
}

/// The byte of a byte-fallback token such as `<0x0A>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Appends the bytes of a byte-level token; a token outside the byte alphabet (an added one) counts as its own text.
fn push_byte_level(token: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in token.chars() {
        match alphabet_byte(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                out.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// GPT-2's byte alphabet: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and on, in order.
fn alphabet_byte(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
