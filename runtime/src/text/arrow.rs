//! Rows of an Arrow IPC file: the stream form, which the caches of Hugging Face `datasets` have, and the file form,
//! which is a stream between a mark and a footer.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int8Type, Int16Type, Int32Type, Int64Type};
use arrow_array::{Array, RecordBatch};
use arrow_buffer::Buffer;
use arrow_ipc::reader::StreamDecoder;
use arrow_schema::{ArrowError, DataType, Schema};
use serde_json::{Map, Value};

use super::TextError;
use super::rows::{Column, Layout, Sink, Wanted, guarded};

const HINT: &str =
    "check that the file is complete; parquet or JSON lines with the same columns can be read instead";
/// What the file form begins with, padding included, and ends with.
const MARK: &[u8; 8] = b"ARROW1\0\0";
/// Bytes that are read at a time.
const CHUNK: usize = 1 << 20;

/// Reads the columns that make the text of a file; `sink` takes a row and says whether to go on.
pub(super) fn read(
    path: &Path,
    wanted: Wanted<'_>,
    max_bytes: u64,
    sink: &mut Sink<'_>,
) -> Result<(), TextError> {
    // Buffers that contradict their message make the decoder panic instead of returning an error.
    guarded(path, "Arrow", HINT, || read_inner(path, wanted, max_bytes, sink))
}

fn read_inner(path: &Path, wanted: Wanted<'_>, max_bytes: u64, sink: &mut Sink<'_>) -> Result<(), TextError> {
    let cannot = |e: std::io::Error| {
        TextError::at(path, format!("cannot be read: {e}"), "check the path and its permissions")
    };
    let broken = |rows: u64, e: ArrowError| {
        TextError::at(path, format!("cannot be read as Arrow after {rows} good rows: {e}"), HINT)
    };
    let mut file = File::open(path).map_err(cannot)?;
    let size = file.metadata().map_err(cannot)?.len();
    if size > max_bytes {
        let what = format!("it has {size} bytes; the size limit is {max_bytes}");
        return Err(TextError::at(path, what, "raise the size limit if that is right"));
    }
    let Some(mut left) = seek_stream(&mut file, size).map_err(cannot)? else {
        return Err(TextError::at(path, "its footer does not fit the file", HINT));
    };
    let (mut decoder, mut layout, mut rows) = (StreamDecoder::new(), None, 0u64);
    while left > 0 {
        let mut chunk = vec![0; left.min(CHUNK as u64) as usize];
        file.read_exact(&mut chunk).map_err(cannot)?;
        left -= chunk.len() as u64;
        let mut chunk = Buffer::from_vec(chunk);
        while !chunk.is_empty() {
            let Some(batch) = decoder.decode(&mut chunk).map_err(|e| broken(rows, e))? else { continue };
            let layout = match &layout {
                Some(layout) => layout,
                None => layout.insert(Layout::choose(&columns(&batch.schema()), wanted, path)?),
            };
            for row in 0..batch.num_rows() {
                rows += 1;
                if !sink(layout, cells(&batch, layout, row))? {
                    return Ok(());
                }
            }
        }
    }
    match decoder.schema() {
        None => Err(TextError::at(path, "holds no Arrow schema", HINT)),
        Some(_) => decoder.finish().map_err(|e| broken(rows, e)),
    }
}

/// Goes to the start of the stream and gives its length; `None` if a footer claims more than there is.
fn seek_stream(file: &mut File, size: u64) -> std::io::Result<Option<u64>> {
    let mut word = [0; 8];
    let n = file.read(&mut word)?;
    if n < 8 || &word != MARK {
        file.seek(SeekFrom::Start(0))?;
        return Ok(Some(size));
    }
    // The length of the footer, and the mark again without padding.
    let mut tail = [0; 10];
    if size < 18 {
        return Ok(None);
    }
    file.seek(SeekFrom::End(-10))?;
    file.read_exact(&mut tail)?;
    let footer = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    let Some(end) = (size - 10).checked_sub(footer).filter(|_| tail[4..] == MARK[..6]) else {
        return Ok(None);
    };
    // Some writers fill up to 64 bytes behind the mark.
    let mut start = 8;
    file.seek(SeekFrom::Start(start))?;
    while start + 8 <= end.min(64) {
        file.read_exact(&mut word)?;
        if word != [0; 8] {
            break;
        }
        start += 8;
    }
    file.seek(SeekFrom::Start(start))?;
    Ok(end.checked_sub(start))
}

fn columns(schema: &Schema) -> Vec<Column> {
    let text = |t: &DataType| {
        t.is_string() || t.is_nested() || matches!(t, DataType::Binary | DataType::LargeBinary)
    };
    schema.fields().iter().map(|f| Column { name: f.name().clone(), text: text(f.data_type()) }).collect()
}

fn cells(batch: &RecordBatch, layout: &Layout, row: usize) -> Map<String, Value> {
    let cell = |name: &str| Some((name.to_owned(), value(batch.column_by_name(name)?, row)));
    layout.columns().into_iter().filter_map(cell).collect()
}

/// An element as JSON. Binary columns count as text where they hold UTF-8, as in parquet files.
fn value(array: &dyn Array, row: usize) -> Value {
    if array.is_null(row) {
        return Value::Null;
    }
    let utf8 = |bytes: &[u8]| std::str::from_utf8(bytes).map_or(Value::Null, Value::from);
    let list = |items: &dyn Array| Value::Array((0..items.len()).map(|i| value(items, i)).collect());
    match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().value(row).into(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row).into(),
        DataType::Utf8View => array.as_string_view().value(row).into(),
        DataType::Binary => utf8(array.as_binary::<i32>().value(row)),
        DataType::LargeBinary => utf8(array.as_binary::<i64>().value(row)),
        DataType::List(_) => list(&array.as_list::<i32>().value(row)),
        DataType::LargeList(_) => list(&array.as_list::<i64>().value(row)),
        DataType::Struct(fields) => {
            let columns = array.as_struct().columns();
            Value::Object(
                fields.iter().zip(columns).map(|(f, c)| (f.name().clone(), value(c, row))).collect(),
            )
        }
        DataType::Boolean => array.as_boolean().value(row).into(),
        DataType::Int8 => array.as_primitive::<Int8Type>().value(row).into(),
        DataType::Int16 => array.as_primitive::<Int16Type>().value(row).into(),
        DataType::Int32 => array.as_primitive::<Int32Type>().value(row).into(),
        DataType::Int64 => array.as_primitive::<Int64Type>().value(row).into(),
        DataType::Float64 => array.as_primitive::<Float64Type>().value(row).into(),
        DataType::Null => Value::Null,
        // No layout reads these, and an error only calls them numbers.
        _ => Value::from(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{Message, Row};
    use arrow_array::{ArrayRef, Int64Array, LargeStringArray, ListArray, StringArray, StructArray};
    use arrow_buffer::OffsetBuffer;
    use arrow_ipc::writer::{FileWriter, StreamWriter};
    use arrow_schema::Field;
    use std::sync::Arc;

    fn rows(bytes: &[u8], wanted: Wanted<'_>) -> Result<Vec<Row>, TextError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.arrow");
        std::fs::write(&path, bytes).unwrap();
        let mut out = Vec::new();
        read(&path, wanted, 1 << 20, &mut |layout, mut map| {
            out.push(layout.row(|name| map.remove(name)).map_err(|e| TextError::at(&path, e, ""))?);
            Ok(true)
        })?;
        Ok(out)
    }

    /// The same batch twice, in stream form and in file form.
    fn written(columns: Vec<(&str, ArrayRef)>) -> [Vec<u8>; 2] {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let (mut stream, mut file) = (Vec::new(), Vec::new());
        let mut w = StreamWriter::try_new(&mut stream, &batch.schema()).unwrap();
        w.write(&batch).unwrap();
        w.write(&batch).unwrap();
        w.finish().unwrap();
        let mut w = FileWriter::try_new(&mut file, &batch.schema()).unwrap();
        w.write(&batch).unwrap();
        w.write(&batch).unwrap();
        w.finish().unwrap();
        drop(w);
        [stream, file]
    }

    fn qa() -> [Vec<u8>; 2] {
        written(vec![
            ("id", Arc::new(Int64Array::from(vec![7, 8]))),
            ("question", Arc::new(StringArray::from(vec!["q1", "q2"]))),
            ("answer", Arc::new(LargeStringArray::from(vec!["a1", "a2"]))),
        ])
    }

    #[test]
    fn both_forms_and_both_widths() {
        for bytes in qa() {
            let got = rows(&bytes, Wanted::Usual).unwrap();
            let want = ["q1\na1", "q2\na2", "q1\na1", "q2\na2"].map(|t| Row::Text(t.into()));
            assert_eq!(got, want);
            let got = rows(&bytes, Wanted::Column("answer")).unwrap();
            assert_eq!(got[1], Row::Text("a2".into()));
            let err = rows(&bytes, Wanted::Column("text")).unwrap_err();
            assert!(err.what.contains("`id`, `question`, `answer`"), "{err}");
            assert!(rows(&bytes, Wanted::Column("id")).unwrap_err().what.contains("holds a number"));
        }
    }

    #[test]
    fn lists_of_structs_are_messages() {
        let strings = |v: Vec<&str>| Arc::new(StringArray::from(v)) as ArrayRef;
        let field = |name| Arc::new(Field::new(name, DataType::Utf8, true));
        let items = StructArray::from(vec![
            (field("content"), strings(vec!["hi", "hello", "bye"])),
            (field("role"), strings(vec!["user", "assistant", "user"])),
        ]);
        let item = Arc::new(Field::new("item", items.data_type().clone(), true));
        let list = ListArray::new(item, OffsetBuffer::from_lengths([2, 1]), Arc::new(items), None);
        for bytes in written(vec![("messages", Arc::new(list))]) {
            let got = rows(&bytes, Wanted::Usual).unwrap();
            let first = vec![Message::new("user", "hi"), Message::new("assistant", "hello")];
            assert_eq!((got.len(), &got[0]), (4, &Row::Messages(first)));
        }
    }

    #[test]
    fn damaged_files_are_errors() {
        for good in qa() {
            for cut in [1, 9, good.len() / 2, good.len() - 5] {
                assert!(rows(&good[..good.len() - cut], Wanted::Usual).is_err(), "{cut}");
            }
            for at in 0..good.len() {
                let mut bad = good.clone();
                bad[at] ^= 0x55;
                // Some flips only change letters; none may hang or end the process.
                let _ = rows(&bad, Wanted::Usual);
            }
            let mut huge = good.clone();
            let at = good.iter().position(|&b| b == 0xff).unwrap() + 4;
            huge[at..at + 4].copy_from_slice(&0x7fff_fff0u32.to_le_bytes());
            assert!(rows(&huge, Wanted::Usual).is_err());
        }
        assert!(rows(b"", Wanted::Usual).unwrap_err().what.contains("no Arrow schema"));
        assert!(rows(b"not arrow at all", Wanted::Usual).is_err());
        assert!(rows(b"ARROW1\0\0", Wanted::Usual).unwrap_err().what.contains("footer"));
    }
}
