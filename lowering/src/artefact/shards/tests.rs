use super::*;

fn plan(name: &str, n: usize) -> StoredTensor {
    StoredTensor { name: name.into(), dtype: Dtype::F32, shape: vec![n] }
}

#[test]
fn shards_hold_what_was_planned() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = ShardWriter::new(dir.path(), vec![plan("a", 2), plan("b", 1), plan("c", 4)], 12);
    assert_eq!(w.count(), 2);
    assert_eq!(w.write("a", &[1; 8]).unwrap(), "model-00001-of-00002.safetensors");
    assert!(w.begin("c").is_err(), "another tensor was planned");
    w.begin("b").unwrap();
    w.put(&[2; 3]).unwrap();
    assert!(w.put(&[2; 2]).is_err(), "fewer bytes were planned");
    w.put(&[2]).unwrap();
    w.end().unwrap();
    assert_eq!(w.write("c", &[3; 16]).unwrap(), "model-00002-of-00002.safetensors");
    w.finish().unwrap();
    let bytes = std::fs::read(dir.path().join("model-00001-of-00002.safetensors")).unwrap();
    assert_eq!(bytes[bytes.len() - 12..], [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
    assert!(bytes.len().is_multiple_of(4) && (bytes.len() - 12).is_multiple_of(8));
}

#[test]
fn unwritten_tensors_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = ShardWriter::new(dir.path(), vec![plan("a", 1), plan("b", 1)], 100);
    w.write("a", &[0; 4]).unwrap();
    assert!(w.finish().is_err());
}

// Every write to /dev/full fails as on a full disk.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.path().join("model.safetensors")).unwrap();
    let mut w = ShardWriter::new(dir.path(), vec![plan("a", 1 << 20)], 1 << 30);
    let e = w.write("a", &vec![0; 4 << 20]).and_then(|_| w.finish()).unwrap_err();
    assert!(
        e.what.contains("cannot write") && e.hint.as_deref().is_some_and(|h| h.contains("disk is full")),
        "{e}"
    );
}

#[test]
fn kept_tensors_come_back_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.step");
    let tensors = vec![
        ("s".to_owned(), Tensor::f32([2], vec![1.5, -2.0])),
        ("loss".to_owned(), Tensor::new([1], Data::F64(vec![0.1]))),
    ];
    write_tensors(&path, &tensors).unwrap();
    assert_eq!(read_tensors(&path).unwrap(), tensors);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() - 1;
    bytes[at] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(read_tensors(&path), None);
    std::fs::write(&path, &bytes[..20]).unwrap();
    assert_eq!(read_tensors(&path), None);
}
