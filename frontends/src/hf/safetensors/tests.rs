use std::fs;

use proptest::prelude::*;

use super::*;

/// A header entry: name, dtype, shape, bytes.
pub(crate) type Row<'a> = (&'a str, &'a str, &'a [usize], usize);

/// Writes a file whose header describes `rows` one after the other; data bytes count up from zero.
pub(crate) fn write_safetensors(path: &Path, rows: &[Row<'_>]) {
    let mut at = 0;
    let entries: Vec<String> = rows
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            let from = at;
            at += bytes;
            format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{from},{at}]}}"#)
        })
        .collect();
    fs::write(path, bytes(&format!("{{{}}}", entries.join(",")), at)).unwrap();
}

/// A file of this header and so many bytes of data.
fn bytes(header: &str, data: usize) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend((0..data).map(|i| i as u8));
    out
}

/// What is said about a file of these bytes.
fn refusal(content: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::write(&path, content).unwrap();
    let error = SafetensorsFile::open(&path).expect_err("this file must be refused");
    assert!(error.path.ends_with("model.safetensors"));
    format!("{} / {}", error.what, error.hint.unwrap_or_default())
}

#[track_caller]
fn assert_refused(header: &str, data: usize, parts: &[&str]) {
    let said = refusal(&bytes(header, data));
    for part in parts {
        assert!(said.contains(part), "`{part}` is not in `{said}`");
    }
}

fn entry(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

#[test]
fn a_file_gives_borrowed_bytes_in_file_order() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    // The header names `b` first although its bytes come second.
    let header = format!(
        r#"{{"__metadata__":{{"format":"pt"}},"b":{},"a":{},"s":{}}}"#,
        entry("BF16", "[2, 1]", "[4,8]"),
        entry("F32", "[1]", "[0,4]"),
        entry("U8", "[]", "[8,9]")
    );
    fs::write(&path, bytes(&header, 9)).unwrap();
    let folder = SafetensorsFolder::open(dir.path()).unwrap().unwrap();
    let tensors = folder.tensors();
    let shown: Vec<_> = tensors.iter().map(|(n, t)| format!("{n}: {t}")).collect();
    assert_eq!(shown, ["a: f32[1]", "b: bf16[2, 1]", "s: u8[]"]);
    let raw = folder.raw("b").unwrap();
    assert!(matches!(raw.bytes, Cow::Borrowed(b) if b == [4, 5, 6, 7]));
    assert_eq!(raw.ty.bytes(), Some(raw.bytes.len()));
    assert!(folder.raw("c").unwrap_err().to_string().contains("no such tensor"));
}

#[test]
fn all_imported_types_have_their_size() {
    let rows: [Row<'_>; 6] = [
        ("a", "F32", &[3], 12),
        ("b", "F16", &[3], 6),
        ("c", "BF16", &[3], 6),
        ("d", "I32", &[3], 12),
        ("e", "I8", &[3], 3),
        ("f", "U8", &[0, 3], 0),
    ];
    let dir = tempfile::tempdir().unwrap();
    write_safetensors(&dir.path().join("model.safetensors"), &rows);
    let file = SafetensorsFile::open(&dir.path().join("model.safetensors")).unwrap();
    assert_eq!(file.tensors().count(), 6);
}

#[test]
fn headers_that_do_not_fit_the_file() {
    assert!(refusal(b"").contains("0 bytes"));
    assert!(refusal(&[1, 0, 0]).contains("3 bytes"));
    assert!(refusal(&100u64.to_le_bytes()).contains("claims 100 bytes, but the file ends after 8"));
    assert!(
        refusal(&u64::MAX.to_le_bytes())
            .contains("claims 18446744073709551615 bytes, more than the 100000000")
    );
    let mut broken = bytes("{}", 0);
    broken[8] = 0xff;
    assert!(refusal(&broken).contains("not UTF-8 at its byte 0"));
    for header in ["[]", "3", "", "{", "{\"a\":1]"] {
        assert_refused(header, 0, &["not a JSON object"]);
    }
    let deep = format!("{{\"a\":{}", "[".repeat(1 << 20));
    assert_refused(&deep, 0, &["recursion limit"]);
}

#[test]
fn entries_that_are_none() {
    assert_refused(r#"{"w":3}"#, 0, &["tensor `w`", "no `dtype`"]);
    assert_refused(r#"{"w":{"dtype":"F32","data_offsets":[0,4]}}"#, 4, &["tensor `w`", "`shape`"]);
    assert_refused(&format!(r#"{{"w":{}}}"#, entry("F32", "[-1]", "[0,4]")), 4, &["`shape`"]);
    assert_refused(&format!(r#"{{"w":{}}}"#, entry("F32", "[1]", "[0]")), 4, &["`data_offsets`"]);
    assert_refused(&format!(r#"{{"w":{}}}"#, entry("F32", "[1]", "[0,4.5]")), 4, &["`data_offsets`"]);
    for dtype in ["F8_E4M3", "I64", "F64", "BOOL", "X7"] {
        assert_refused(&format!(r#"{{"w":{}}}"#, entry(dtype, "[1]", "[0,8]")), 8, &["`w`", dtype, "BF16"]);
    }
    let one = entry("U8", "[1]", "[0,1]");
    assert_refused(&format!(r#"{{"w":{one},"w":{one}}}"#), 1, &["`w` twice"]);
    let extra = r#"{"__metadata__":{"a":1}}"#;
    assert_refused(extra, 0, &["safetensors library refuses"]);
}

#[test]
fn bytes_that_are_not_there_or_belong_to_two() {
    let w = |offsets: &str| format!(r#"{{"w":{}}}"#, entry("F32", "[2]", offsets));
    assert_refused(&w("[8,0]"), 8, &["starts at byte 8", "at 0"]);
    assert_refused(&w("[0,4]"), 4, &["[2] of F32 needs 8 bytes, the header gives it 4"]);
    let header = w("[0,8]");
    let need = 8 + header.len() + 8;
    let ends = format!("the file ends after {} bytes but this tensor needs {need}", need - 3);
    assert_refused(&header, 5, &["tensor `w`", &ends, "download this file again"]);
    assert_refused(&w("[18446744073709551607,18446744073709551615]"), 8, &["ends after"]);
    let huge = format!(r#"{{"w":{}}}"#, entry("F32", "[4294967296,4294967296]", "[0,8]"));
    assert_refused(&huge, 8, &["more elements than an address can count"]);
    let two = |b: &str| format!(r#"{{"a":{},"b":{}}}"#, entry("U8", "[4]", "[0,4]"), entry("U8", "[4]", b));
    assert_refused(&two("[2,6]"), 6, &["`b` starts at data byte 2, inside `a`, which ends at 4"]);
    assert_refused(&two("[6,10]"), 10, &["data bytes 4..6 before tensor `b`"]);
    assert_refused(&two("[4,8]"), 10, &["last 2 bytes"]);
}

#[test]
fn a_folder_is_no_file() {
    let dir = tempfile::tempdir().unwrap();
    assert!(SafetensorsFile::open(dir.path()).unwrap_err().what.contains("not a regular file"));
    assert!(SafetensorsFile::open(&dir.path().join("x")).unwrap_err().what.contains("cannot open"));
    assert!(SafetensorsFolder::open(dir.path()).unwrap().is_none());
}

const INDEX: &str = "model.safetensors.index.json";

fn index_refusal(index: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    write_safetensors(&dir.path().join("s1.safetensors"), &[("a", "U8", &[2], 2), ("extra", "U8", &[1], 1)]);
    fs::write(dir.path().join(INDEX), index).unwrap();
    SafetensorsFolder::open(dir.path()).expect_err("this index must be refused").what
}

#[test]
fn shards_are_read_through_their_index() {
    let dir = tempfile::tempdir().unwrap();
    write_safetensors(
        &dir.path().join("s2.safetensors"),
        &[("b", "U8", &[2], 2), ("unlisted", "U8", &[1], 1)],
    );
    write_safetensors(&dir.path().join("s1.safetensors"), &[("a", "U8", &[2], 2), ("b", "U8", &[3], 3)]);
    let index = r#"{"metadata":{},"weight_map":{"b":"s2.safetensors","a":"s1.safetensors"}}"#;
    fs::write(dir.path().join(INDEX), index).unwrap();
    let folder = SafetensorsFolder::open(dir.path()).unwrap().unwrap();
    let shown: Vec<_> = folder.tensors().iter().map(|(n, t)| format!("{n}: {t}")).collect();
    assert_eq!(shown, ["a: u8[2]", "b: u8[2]"]);
    let names = ["s1.safetensors", "s2.safetensors"].map(|n| dir.path().join(n));
    assert_eq!(folder.weight_files(), names);
    assert_eq!(folder.raw("b").unwrap().bytes.len(), 2);
    assert!(folder.raw("unlisted").is_err());
}

#[test]
fn indexes_that_are_none() {
    assert!(index_refusal("{").contains("not JSON"));
    assert!(index_refusal("[]").contains("not a JSON object"));
    assert!(index_refusal("{}").contains("no `weight_map`"));
    assert!(index_refusal(r#"{"weight_map":[]}"#).contains("no `weight_map`"));
    let map = |inner: &str| index_refusal(&format!(r#"{{"weight_map":{{{inner}}}}}"#));
    assert!(map(r#""a":"s1.safetensors","a":"s1.safetensors""#).contains("`a` twice"));
    assert!(map(r#""a":3"#).contains("not a string"));
    for path in ["../s1.safetensors", "/etc/passwd", "..", ""] {
        assert!(map(&format!(r#""a":"{path}""#)).contains("not a plain file name"), "{path}");
    }
    assert!(map(r#""a":"s1.safetensors","b":"s9.safetensors""#).contains("`s9.safetensors` (2 of 2)"));
    let absent = map(r#""a":"s1.safetensors","z":"s1.safetensors""#);
    assert!(absent.contains("`z` into `s1.safetensors`, which does not hold it"), "{absent}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is broken, the answer is an error or a file whose tensors can be read.
    #[test]
    fn broken_files_never_panic(at in 0usize..400, with in "[-0-9\\[\\]{}\",:aU\\x00]{1,6}", cut in 0usize..900) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        write_safetensors(&path, &[("a", "U8", &[4], 4), ("b", "F32", &[2, 3], 24), ("c", "F16", &[], 2)]);
        let mut bytes = fs::read(&path).unwrap();
        let len = bytes.len();
        let at = at % (len - 6);
        bytes[at..at + with.len()].copy_from_slice(with.as_bytes());
        bytes.truncate(if cut < len && cut % 3 == 0 { cut } else { len });
        fs::write(&path, bytes).unwrap();
        if let Ok(Some(folder)) = SafetensorsFolder::open(dir.path()) {
            for (name, ty) in folder.tensors() {
                prop_assert_eq!(ty.bytes(), Some(folder.raw(&name).unwrap().bytes.len()));
            }
        }
    }
}
