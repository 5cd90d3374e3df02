//! Rows of a parquet file, by the record reader of the `parquet` crate, as JSON values.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{Compression, Type as PhysicalType};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use serde_json::{Map, Value};

use super::TextError;
use super::rows::{Column, Layout, Sink, Wanted, guarded};

const HINT: &str = "check that the file is complete; JSON lines with the same columns can be read instead";

/// Reads the columns that make the text of a file; `sink` takes a row and says whether to go on.
pub(super) fn read(
    path: &Path,
    wanted: Wanted<'_>,
    max_bytes: u64,
    sink: &mut Sink<'_>,
) -> Result<(), TextError> {
    // The record reader asserts on some malformed files instead of returning an error.
    guarded(path, "parquet", HINT, || read_inner(path, wanted, max_bytes, sink))
}

fn read_inner(path: &Path, wanted: Wanted<'_>, max_bytes: u64, sink: &mut Sink<'_>) -> Result<(), TextError> {
    let broken = |e: ParquetError| TextError::at(path, format!("cannot be read as parquet: {e}"), HINT);
    let file = File::open(path).map_err(|e| {
        TextError::at(path, format!("cannot open: {e}"), "check the path and its permissions")
    })?;
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let schema = reader.metadata().file_metadata().schema();
    let columns: Vec<Column> = schema
        .get_fields()
        .iter()
        .map(|f| Column {
            name: f.name().to_owned(),
            text: f.is_group() || f.get_physical_type() == PhysicalType::BYTE_ARRAY,
        })
        .collect();
    let layout = Layout::choose(&columns, wanted, path)?;
    let names = layout.columns();
    let fields = schema.get_fields().iter().filter(|f| names.contains(&f.name())).map(Arc::clone).collect();
    let projection = Type::group_type_builder(schema.name()).with_fields(fields).build().map_err(broken)?;
    check_columns(path, &reader, &names, max_bytes)?;
    let mut row_number = 0u64;
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(broken)?;
        for row in RowIter::from_row_group(Some(projection.clone()), &*group).map_err(broken)? {
            let row = row.map_err(|e| {
                TextError::at(
                    path,
                    format!("cannot be read as parquet after {row_number} good rows: {e}"),
                    HINT,
                )
            })?;
            row_number += 1;
            let map = row.into_columns().into_iter().map(|(name, field)| (name, value(field))).collect();
            if !sink(&layout, map)? {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Refuses, before a page is read, compression that is not built in and sizes beyond the limit.
fn check_columns(
    path: &Path,
    reader: &SerializedFileReader<File>,
    names: &[&str],
    max_bytes: u64,
) -> Result<(), TextError> {
    let mut total = 0u64;
    for group in reader.metadata().row_groups() {
        for chunk in group.columns() {
            let column = chunk.column_path().parts().first().map_or("", String::as_str);
            if !names.contains(&column) {
                continue;
            }
            let compression = chunk.compression();
            if matches!(compression, Compression::ZSTD(_) | Compression::LZO) {
                let what =
                    format!("column `{column}` is compressed with {compression}, which is not built in");
                let hint =
                    "write the file again with snappy, gzip, brotli or lz4, or convert it to JSON lines";
                return Err(TextError::at(path, what, hint));
            }
            total = total.saturating_add(u64::try_from(chunk.uncompressed_size()).unwrap_or(u64::MAX));
        }
    }
    if total > max_bytes {
        let what = format!("its text columns say they hold {total} bytes; the size limit is {max_bytes}");
        return Err(TextError::at(path, what, "raise the size limit if that is right"));
    }
    Ok(())
}

/// A field as JSON. Binary columns count as text where they hold UTF-8, since some writers leave the annotation out.
fn value(field: Field) -> Value {
    match field {
        Field::Str(text) => Value::String(text),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Value::String(text.to_owned()),
            Err(_) => Value::Null,
        },
        Field::Group(row) => {
            Value::Object(row.into_columns().into_iter().map(|(n, f)| (n, value(f))).collect())
        }
        Field::ListInternal(list) => Value::Array(list.elements().iter().cloned().map(value).collect()),
        Field::Null => Value::Null,
        Field::Bool(flag) => Value::Bool(flag),
        Field::MapInternal(_) => Value::Object(Map::new()),
        Field::Int(n) => Value::from(n),
        Field::Long(n) => Value::from(n),
        Field::Double(x) => Value::from(x),
        // Other numbers, and dates: no layout reads their value, and an error only calls them numbers.
        _ => Value::from(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Row;
    use parquet::column::writer::ColumnWriter;
    use parquet::data_type::ByteArray;
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    /// One string of a column with its definition and repetition level.
    type Cell = (&'static str, i16, i16);

    fn write(path: &Path, schema: &str, compression: Compression, columns: &[&[Cell]]) {
        let schema = Arc::new(parse_message_type(schema).unwrap());
        let props = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut file = SerializedFileWriter::new(File::create(path).unwrap(), schema, props).unwrap();
        let mut group = file.next_row_group().unwrap();
        for cells in columns {
            let mut column = group.next_column().unwrap().unwrap();
            let max_def = cells.iter().map(|c| c.1).max().unwrap();
            let values: Vec<ByteArray> =
                cells.iter().filter(|c| c.1 == max_def).map(|c| c.0.into()).collect();
            let defs: Vec<i16> = cells.iter().map(|c| c.1).collect();
            let reps: Vec<i16> = cells.iter().map(|c| c.2).collect();
            let ColumnWriter::ByteArrayColumnWriter(writer) = column.untyped() else {
                panic!("not a string column")
            };
            writer.write_batch(&values, Some(&defs), Some(&reps)).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
        file.close().unwrap();
    }

    fn rows(path: &Path, wanted: Option<&str>) -> Result<Vec<Row>, TextError> {
        let mut out = Vec::new();
        read(path, wanted.map_or(Wanted::Usual, Wanted::Column), 1 << 20, &mut |layout, mut map| {
            out.push(layout.row(|name| map.remove(name)).map_err(|e| TextError::at(path, e, ""))?);
            Ok(true)
        })?;
        Ok(out)
    }

    const QA: &str = "message m { optional binary question (UTF8); optional binary answer (UTF8); }";

    fn sample(dir: &Path, compression: Compression) -> std::path::PathBuf {
        let path = dir.join("t.parquet");
        write(&path, QA, compression, &[&[("q1", 1, 0), ("q2", 1, 0)], &[("a1", 1, 0), ("a2", 1, 0)]]);
        path
    }

    #[test]
    fn text_columns_in_every_built_compression() {
        let dir = tempfile::tempdir().unwrap();
        for compression in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::GZIP(Default::default()),
            Compression::BROTLI(Default::default()),
            Compression::LZ4_RAW,
        ] {
            let path = sample(dir.path(), compression);
            assert_eq!(rows(&path, None).unwrap(), [Row::Text("q1\na1".into()), Row::Text("q2\na2".into())]);
            assert_eq!(rows(&path, Some("answer")).unwrap()[1], Row::Text("a2".into()));
            assert!(rows(&path, Some("text")).unwrap_err().what.contains("`question`, `answer`"));
        }
    }

    #[test]
    fn lists_of_structs_are_messages() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chat.parquet");
        let schema =
            "message m { optional group messages (LIST) { repeated group list { optional group element {
                      optional binary content (UTF8); optional binary role (UTF8); } } } }";
        write(
            &path,
            schema,
            Compression::SNAPPY,
            &[
                &[("hi", 4, 0), ("hello", 4, 1), ("bye", 4, 0)],
                &[("user", 4, 0), ("assistant", 4, 1), ("user", 4, 0)],
            ],
        );
        let got = rows(&path, None).unwrap();
        let Row::Messages(first) = &got[0] else { panic!("messages wanted") };
        assert_eq!(
            (first.len(), first[1].role.as_str(), first[1].content.as_str()),
            (2, "assistant", "hello")
        );
        assert_eq!(got.len(), 2);
    }

    #[test]
    fn damaged_files_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = sample(dir.path(), Compression::SNAPPY);
        let good = std::fs::read(&path).unwrap();
        std::fs::write(&path, &good[..good.len() - 9]).unwrap();
        assert!(rows(&path, None).is_err());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x55;
            std::fs::write(&path, &bad).unwrap();
            // Some flips only change letters; none may panic or hang.
            let _ = rows(&path, None);
        }
    }

    #[test]
    fn nulls_and_zstd_are_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n.parquet");
        let schema = "message m { optional binary text (UTF8); }";
        write(&path, schema, Compression::SNAPPY, &[&[("a", 1, 0), ("", 0, 0)]]);
        assert!(rows(&path, None).unwrap_err().what.contains("holds null"));
        // A snappy file whose footer says zstd instead: `codec` is field 4 of a column's metadata, 1 becomes 6.
        let good = std::fs::read(sample(dir.path(), Compression::SNAPPY)).unwrap();
        let claims_zstd = |at: usize| {
            let mut bytes = good.clone();
            bytes[at + 1] = 0x0c;
            std::fs::write(&path, bytes).unwrap();
            rows(&path, None).is_err_and(|e| e.what.contains("ZSTD") && e.hint.contains("snappy"))
        };
        assert!((0..good.len() - 1).filter(|&at| good[at..at + 2] == [0x15, 0x02]).any(claims_zstd));
        let err = rows(Path::new("/nonexistent.parquet"), None).unwrap_err();
        assert!(err.what.contains("cannot open"), "{err}");
    }
}
