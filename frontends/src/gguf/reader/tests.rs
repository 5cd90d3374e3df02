use proptest::prelude::*;

use super::super::testing::{Gguf, V, f32s, string, write};
use super::*;

#[track_caller]
fn assert_refused(bytes: &[u8], parts: &[&str]) {
    let (_dir, path) = write(bytes);
    let error = GgufFile::open(&path).expect_err("this file must be refused");
    assert_eq!(error.path, path);
    for part in parts {
        assert!(error.what.contains(part), "`{part}` is not in `{}`", error.what);
    }
}

/// Header of version 3 with these counts, then `rest`.
fn raw(tensors: u64, meta: u64, rest: &[&[u8]]) -> Vec<u8> {
    let head = [b"GGUF", &3u32.to_le_bytes()[..], &tensors.to_le_bytes(), &meta.to_le_bytes()].concat();
    [&head, &rest.concat()[..]].concat()
}

fn sample() -> Gguf {
    Gguf::empty()
        .with("u", V::U32(7))
        .with("f", V::F32(1e-5))
        .with("b", V::Bool(true))
        .with("s", V::Str("text".into()))
        .with("strings", V::Strs(vec!["a".into(), "é".into()]))
        .with("ints", V::I32s(vec![3, -4]))
        .with("floats", V::F32s(vec![0.5, -1.0]))
        .with("i8", V::Raw(1, vec![0xff]))
        .with("u64", V::Raw(10, u64::MAX.to_le_bytes().to_vec()))
        .with("f64", V::Raw(12, 0.1f64.to_le_bytes().to_vec()))
        .tensor("t", &[2, 3], 0, f32s(6))
        .tensor("q", &[32], 8, (0..34).collect())
}

#[test]
fn values_and_tensors_come_back() {
    for version in [2, 3] {
        let (_dir, file) = Gguf { version, ..sample() }.file();
        let file = file.unwrap();
        assert_eq!(file.version(), version);
        assert_eq!(file.uint("u").unwrap(), Some(7));
        assert_eq!(file.uint("u64").unwrap(), Some(u64::MAX));
        assert_eq!(file.meta("i8"), Some(&Meta::Int(-1)));
        assert_eq!(file.float("f").unwrap(), Some(1e-5));
        assert_eq!(file.float("f64").unwrap(), Some(0.1));
        assert_eq!(file.bool("b").unwrap(), Some(true));
        assert_eq!(file.str("s").unwrap(), Some("text"));
        assert_eq!(file.strings("strings").unwrap().unwrap(), ["a", "é"]);
        assert_eq!(file.ints("ints").unwrap().unwrap(), [3, -4]);
        assert_eq!(file.floats("floats").unwrap().unwrap(), [0.5, -1.0]);
        assert_eq!(file.uint("none").unwrap(), None);
        let [t, q] = file.tensors() else { panic!("two tensors") };
        assert_eq!((t.shape.as_slice(), t.ty), (&[3, 2][..], GgmlType::F32));
        assert_eq!(file.bytes(t), f32s(6));
        assert_eq!(file.bytes(q), (0..34).collect::<Vec<u8>>());
    }
}

#[test]
fn values_of_another_kind_are_named() {
    let (_dir, file) = sample().file();
    let file = file.unwrap();
    let said = [
        file.uint("s").unwrap_err().what,
        file.uint("i8").unwrap_err().what,
        file.float("u").unwrap_err().what,
        file.bool("f").unwrap_err().what,
        file.str("strings").unwrap_err().what,
        file.strings("ints").unwrap_err().what,
        file.ints("floats").unwrap_err().what,
        file.floats("b").unwrap_err().what,
    ];
    for (what, part) in said.iter().zip([
        "the string `text`",
        "the integer -1",
        "the integer 7",
        "the float 0.00001",
        "a list of 2 values of string",
        "a list of 2 values of i32",
        "a list of 2 values of f32",
        "`b` is true",
    ]) {
        assert!(what.contains(part), "`{part}` is not in `{what}`");
    }
}

#[test]
fn other_files_and_versions() {
    assert_refused(b"GGUF", &["4 bytes"]);
    assert_refused(&[b"PK\x03\x04", &[0; 40][..]].concat(), &["not with `GGUF`"]);
    let version = |v: u32| [b"GGUF", &v.to_le_bytes()[..], &[0; 16]].concat();
    assert_refused(&version(1), &["GGUF version 1; versions 2 and 3"]);
    assert_refused(&version(4), &["GGUF version 4"]);
    assert_refused(&version(3u32.swap_bytes()), &["big-endian GGUF (version 3)"]);
    assert_refused(&version(0), &["version 0"]);
}

#[test]
fn counts_and_lengths_that_cannot_be() {
    assert_refused(&raw(0, u64::MAX, &[]), &["claims 18446744073709551615 metadata entries", "only 0 bytes"]);
    assert_refused(&raw(1 << 60, 0, &[&[0; 64]]), &["1152921504606846976 tensors", "64 bytes"]);
    assert_refused(
        &raw(0, 1, &[&u64::MAX.to_le_bytes(), &[0; 8]]),
        &["key of metadata entry 0", "only 8 are left"],
    );
    let value = |kind: u32, body: &[u8]| raw(0, 1, &[&string("k"), &kind.to_le_bytes(), body, &[0; 16]]);
    assert_refused(&value(8, &(1u64 << 40).to_le_bytes()), &["text of `k` needs 1099511627776 bytes"]);
    assert_refused(&value(13, &[]), &["`k` has value type 13"]);
    assert_refused(&value(7, &[2]), &["`k` is a boolean of value 2"]);
    assert_refused(&value(8, &[&2u64.to_le_bytes()[..], &[0xc3, 0x28]].concat()), &["not UTF-8 at byte"]);
    let list = |kind: u32, len: u64| value(9, &[&kind.to_le_bytes()[..], &len.to_le_bytes()].concat());
    assert_refused(&list(4, 1 << 62), &["claims 4611686018427387904 values of u32 in `k`"]);
    assert_refused(&list(8, 1 << 62), &["values of string in `k`"]);
    assert_refused(&list(99, 1), &["list of value type 99"]);
    // A value that is cut short: the counts fit, its four bytes do not.
    let short = raw(0, 1, &[&string("k"), &4u32.to_le_bytes(), &[0]]);
    assert_refused(&short, &["k needs 4 bytes at byte 37, but only 1 are left"]);
}

#[test]
fn lists_of_lists_nest_only_so_deep() {
    let nest = |depth: usize| {
        let inner = [&0u32.to_le_bytes()[..], &1u64.to_le_bytes(), &[5]].concat();
        (1..depth).fold(inner, |v, _| [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &v].concat())
    };
    let open = |depth| Gguf::empty().with("k", V::Raw(9, nest(depth))).file().1;
    assert!(open(4).is_ok());
    assert!(open(5).unwrap_err().what.contains("`k` nests lists more than 4 deep"));
    assert!(open(10_000).unwrap_err().what.contains("more than 4 deep"));
}

#[test]
fn names_that_come_twice() {
    let mut g = sample();
    g.meta.push(("u".into(), V::U32(8)));
    assert_refused(&g.bytes(), &["metadata key `u` comes twice"]);
    assert_refused(&sample().tensor("t", &[1], 0, f32s(1)).bytes(), &["tensor `t` comes twice"]);
}

#[test]
fn tensors_that_cannot_be() {
    let one = |sizes: &[u64], kind: u32, n: usize| Gguf::empty().tensor("w", sizes, kind, vec![0; n]).bytes();
    assert_refused(&one(&[], 0, 32), &["`w` has 0 dimensions"]);
    assert_refused(&one(&[1; 5], 0, 32), &["`w` has 5 dimensions"]);
    assert_refused(&one(&[33], 8, 64), &["`w` has sizes [33]", "blocks of 32 for Q8_0"]);
    assert_refused(&one(&[0], 0, 0), &["`w` has sizes [0]"]);
    assert_refused(&one(&[1 << 40, 1 << 40], 0, 32), &["more elements than an address"]);
    assert_refused(&one(&[256], 17, 64), &["`w` is stored as IQ2_XS (ggml type 17)"]);
    assert_refused(&one(&[256], 1000, 64), &["`w` is of ggml type 1000, which is not known"]);
    let whole = one(&[64], 0, 256);
    assert_refused(
        &whole[..whole.len() - 1],
        &["file ends after 319 bytes but tensor `w` needs 256 from byte 64 + 0"],
    );
}

#[test]
fn places_that_overlap_or_are_crooked() {
    let two = Gguf::empty().tensor("a", &[8], 0, f32s(8)).tensor("b", &[8], 0, f32s(8)).bytes();
    let at = two.windows(8).rposition(|w| w == 32u64.to_le_bytes()).unwrap();
    let moved = |to: u64| {
        let mut bytes = two.clone();
        bytes[at..at + 8].copy_from_slice(&to.to_le_bytes());
        bytes
    };
    assert_refused(&moved(0), &["tensor `b` starts at byte 96, inside `a`, which ends at 128"]);
    assert_refused(&moved(16), &["tensor `b` starts at data byte 16, no multiple of 32"]);
    assert_refused(&moved(u64::MAX - 31), &["needs 32 from byte 96 + 18446744073709551584"]);
    let align = |v: V| Gguf::empty().with("general.alignment", v);
    assert_refused(&align(V::U32(24)).bytes(), &["`general.alignment` is the integer 24"]);
    assert_refused(&align(V::U32(0)).bytes(), &["a power of two"]);
    assert_refused(&align(V::Str("32".into())).bytes(), &["the string `32`"]);
    assert!(align(V::U32(8)).tensor("a", &[8], 0, f32s(8)).file().1.is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is broken, the answer is an error or a file whose tensors can be read.
    #[test]
    fn broken_files_never_panic(at in 0usize..600, with in any::<[u8; 8]>(), n in 1usize..9, cut in 0usize..900) {
        let mut bytes = sample().bytes();
        let len = bytes.len();
        let at = at % (len - 8);
        bytes[at..at + n].copy_from_slice(&with[..n]);
        bytes.truncate(if cut < len && cut % 3 == 0 { cut } else { len });
        let (_dir, path) = write(&bytes);
        if let Ok(file) = GgufFile::open(&path) {
            for t in file.tensors() {
                t.ty.dequantize(file.bytes(t), |_| ());
            }
            for key in ["u", "f", "b", "s", "strings", "ints", "floats"] {
                let _ = (file.uint(key), file.float(key), file.str(key), file.strings(key), file.ints(key), file.floats(key));
            }
        }
    }
}
