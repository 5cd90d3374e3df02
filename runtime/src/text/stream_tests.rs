use super::*;
use crate::text::tokenizer::tests::{byte_fallback, load, tiny};
use proptest::prelude::*;

fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> (Vec<String>, String) {
    let mut decoder = StreamDecoder::new(skip);
    let pieces: Vec<String> = ids.iter().map(|&id| decoder.push(tokenizer, id).unwrap()).collect();
    let rest = decoder.finish(tokenizer).unwrap();
    (pieces, rest)
}

fn check(tokenizer: &Tokenizer, ids: &[u32], skip: bool) {
    let (pieces, rest) = streamed(tokenizer, ids, skip);
    assert_eq!(pieces.concat() + &rest, tokenizer.decode(ids, skip).unwrap(), "{ids:?}");
}

#[test]
fn characters_come_whole() {
    let tokenizer = tiny();
    let text = "naïve 😀 日本\n  two";
    let ids = tokenizer.encode(text, true).unwrap();
    let (pieces, rest) = streamed(&tokenizer, &ids, true);
    assert_eq!(pieces.concat(), text);
    assert!(rest.is_empty() && pieces.iter().all(|p| !p.contains('\u{fffd}')));
    // The last id of the emoji's four bytes is missing.
    let cut = tokenizer.encode("a😀", false).unwrap();
    let (pieces, rest) = streamed(&tokenizer, &cut[..cut.len() - 1], false);
    assert_eq!((pieces.concat().as_str(), rest.as_str()), ("a", "\u{fffd}"));
}

#[test]
fn leading_spaces_are_stripped_once() {
    let tokenizer = load(&byte_fallback(), None).unwrap();
    for text in ["ab a a", " a", "é a.日", "😀😀a", "\n\n a"] {
        let ids = tokenizer.encode(text, true).unwrap();
        let (pieces, rest) = streamed(&tokenizer, &ids, true);
        assert_eq!(pieces.concat() + &rest, text);
    }
    // A special token between two words does not begin a new text.
    let a = tokenizer.token_to_id("▁a").unwrap();
    check(&tokenizer, &[1, a, 2, a, a], true);
    check(&tokenizer, &[1, a, 2, a, a], false);
}

#[test]
fn broken_byte_runs() {
    let tokenizer = load(&byte_fallback(), None).unwrap();
    let byte = |b: u8| tokenizer.token_to_id(&format!("<0x{b:02X}>")).unwrap();
    let a = tokenizer.token_to_id("a").unwrap();
    for run in [&[0xe6][..], &[0xe6, 0x97], &[0xff], &[0xff, 0xff], &[0xe6, 0xe6]] {
        let ids: Vec<u32> = [a].into_iter().chain(run.iter().map(|&b| byte(b))).chain([a]).collect();
        check(&tokenizer, &ids, false);
        check(&tokenizer, &ids[..ids.len() - 1], false);
    }
    let mixed: Vec<u32> = [0x41, 0xff, 0xc3, 0xa9].iter().map(|&b| byte(b)).collect();
    assert_eq!(streamed(&tokenizer, &mixed, false).0.concat(), "A\u{fffd}é");
}

#[test]
fn the_byte_alphabet_is_gpt2s() {
    let mut shifted = 0;
    for byte in 0..=255u8 {
        let kept = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let code = if kept {
            u32::from(byte)
        } else {
            shifted += 1;
            0x100 + shifted - 1
        };
        assert_eq!(char::from_u32(code).and_then(alphabet_byte), Some(byte));
    }
    assert_eq!((alphabet_byte(' '), alphabet_byte('\u{144}')), (None, None));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_ids_of_a_byte_level_tokenizer(ids in proptest::collection::vec(0u32..4100, 0..200), skip: bool) {
        let tokenizer = tiny();
        check(&tokenizer, &ids, skip);
    }

    #[test]
    fn any_text_through_byte_fallback(text in "[ab. \n\u{e9}\u{1f600}\u{65e5}]{0,40}") {
        let tokenizer = load(&byte_fallback(), None).unwrap();
        check(&tokenizer, &tokenizer.encode(&text, true).unwrap(), true);
        check(&tokenizer, &tokenizer.encode(&text, true).unwrap(), false);
    }
}
