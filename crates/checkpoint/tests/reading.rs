//! What a rank reads: the right values, and only the bytes it owns.

mod folder;

use checkpoint::Checkpoint;
use folder::{Folder, rounded, stored, weights};
use proptest::prelude::*;
use tensor::WeightFormat;

const FLOATS: [(&str, WeightFormat); 3] =
    [("F32", WeightFormat::F32), ("BF16", WeightFormat::Bf16), ("F16", WeightFormat::F16)];

#[test]
fn sharded_checkpoint_with_metadata_in_the_index() {
    let folder = Folder::new();
    let (a, b) = (weights(6, 1), weights(4, 2));
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#;
    folder.safetensors("model-00001-of-00002.safetensors", header, &stored("F32", &a));
    let header = r#"{"b":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}"#;
    folder.safetensors("model-00002-of-00002.safetensors", header, &stored("BF16", &b));
    let index = r#"{"metadata":{"total_size":32,"total_parameters":10},
        "weight_map":{"b":"model-00002-of-00002.safetensors","a":"model-00001-of-00002.safetensors"}}"#;
    folder.file("model.safetensors.index.json", index.as_bytes());

    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.names(), ["a", "b"]);
    assert!(checkpoint.contains("a") && !checkpoint.contains("c"));
    assert_eq!(checkpoint.shape("a"), Some(&[2, 3][..]));
    assert_eq!(checkpoint.shape("c"), None);
    assert_eq!(checkpoint.stored_format("a").unwrap(), WeightFormat::F32);
    assert_eq!(checkpoint.stored_format("b").unwrap(), WeightFormat::Bf16);
    assert_eq!(
        checkpoint.file("b"),
        Some(&*folder.path().join("model-00002-of-00002.safetensors"))
    );
    let expected: Vec<f32> = b.iter().map(|&value| rounded("BF16", value)).collect();
    assert_eq!(checkpoint.vector("b", 4).unwrap(), expected);
    let mut row = [0.0; 3];
    checkpoint.matrix("a", 2, 3).unwrap().read_row(1, &mut row).unwrap();
    assert_eq!(row, a[3..]);
}

#[test]
fn vectors_are_f32_from_any_float_format() {
    for (dtype, format) in FLOATS {
        let values = weights(1000, 3);
        let data = stored(dtype, &values);
        let header = format!(
            r#"{{"n":{{"dtype":"{dtype}","shape":[1000],"data_offsets":[0,{}]}}}}"#,
            data.len()
        );
        let folder = Folder::single(&header, &data);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.stored_format("n").unwrap(), format);
        let expected: Vec<f32> = values.iter().map(|&value| rounded(dtype, value)).collect();
        assert_eq!(checkpoint.vector("n", 1000).unwrap(), expected, "{dtype}");
    }
}

#[test]
fn reading_agrees_with_the_safetensors_crate() {
    let values = weights(37 * 53, 4);
    let folder = Folder::matrix("F32", 37, 53, &values);
    let bytes = std::fs::read(folder.path().join("model.safetensors")).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut ours = vec![0.0; 37 * 53];
    Checkpoint::open(folder.path())
        .unwrap()
        .matrix("w", 37, 53)
        .unwrap()
        .read_rows(0..37, &mut ours)
        .unwrap();
    assert_eq!(theirs.tensor("w").unwrap().data(), stored("F32", &ours));
}

/// Bytes read while `read` runs.
fn counted(checkpoint: &Checkpoint, read: impl FnOnce()) -> u64 {
    let before = checkpoint.bytes_read();
    read();
    checkpoint.bytes_read() - before
}

#[test]
fn opening_reads_headers_only() {
    let folder = Folder::matrix("BF16", 512, 512, &weights(512 * 512, 5));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let data = 512 * 512 * 2;
    let file = std::fs::metadata(folder.path().join("model.safetensors")).unwrap().len();
    assert_eq!(checkpoint.bytes_read(), file - data);
    assert_eq!(counted(&checkpoint, || drop(checkpoint.matrix("w", 512, 512).unwrap())), 0);
}

#[test]
fn a_rank_reads_only_its_rows_and_columns() {
    let (rows, cols) = (96, 4096);
    let folder = Folder::matrix("BF16", rows, cols, &weights(rows * cols, 6));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let matrix = checkpoint.matrix("w", rows, cols).unwrap();
    let read = |rows: std::ops::Range<usize>, cols: std::ops::Range<usize>| {
        let part = matrix.slice(rows, cols);
        let mut out = vec![0.0; part.rows() * part.cols()];
        counted(&checkpoint, || part.read_rows(0..part.rows(), &mut out).unwrap())
    };
    assert_eq!(read(10..30, 0..cols), 20 * 4096 * 2, "whole rows");
    assert_eq!(
        read(0..rows, 1024..2048),
        96 * 1024 * 2,
        "a quarter of the columns, read row by row"
    );
    assert_eq!(read(7..8, 5..6), 2, "one weight");
    assert_eq!(read(7..7, 0..cols), 0, "no rows");
    assert_eq!(read(0..rows, 9..9), 0, "no columns");
    // 512 bytes between two rows' columns are cheaper to read than to jump over.
    assert_eq!(read(0..2, 0..cols - 256), 2 * 4096 * 2 - 512, "a small gap is read with the rest");
    assert_eq!(
        counted(&checkpoint, || matrix.slice(3..4, 16..48).read_row(0, &mut [0.0; 32]).unwrap()),
        64
    );
}

#[test]
fn ranks_together_read_the_data_once() {
    let (rows, cols) = (60, 6000);
    let folder = Folder::matrix("F32", rows, cols, &weights(rows * cols, 7));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let matrix = checkpoint.matrix("w", rows, cols).unwrap();
    for ranks in [1, 2, 3, 4, 7] {
        let bytes = counted(&checkpoint, || {
            for rank in 0..ranks {
                let part = matrix.slice(0..rows, tensor::split_granular(cols, 32, ranks, rank));
                tensor::PackedMatrix::load(WeightFormat::Bf16, &[part]).unwrap();
            }
        });
        assert_eq!(bytes, (rows * cols * 4) as u64, "{ranks} ranks by columns");
        let bytes = counted(&checkpoint, || {
            for rank in 0..ranks {
                let part = matrix.slice(tensor::split_range(rows, ranks, rank), 0..cols);
                tensor::PackedMatrix::load(WeightFormat::Bf16, &[part]).unwrap();
            }
        });
        assert_eq!(bytes, (rows * cols * 4) as u64, "{ranks} ranks by rows");
    }
}

#[test]
#[should_panic(expected = "rows 3..9 of 8")]
fn a_slice_beyond_the_rows_is_a_broken_contract() {
    let folder = Folder::matrix("F32", 8, 4, &[0.0; 32]);
    let matrix = Checkpoint::open(folder.path()).unwrap().matrix("w", 8, 4).unwrap();
    let _ = matrix.slice(3..9, 0..4);
}

#[test]
#[should_panic(expected = "columns 0..5 of 4")]
fn a_slice_beyond_the_columns_is_a_broken_contract() {
    let folder = Folder::matrix("F32", 8, 4, &[0.0; 32]);
    let matrix = Checkpoint::open(folder.path()).unwrap().matrix("w", 8, 4).unwrap();
    let _ = matrix.slice(0..8, 0..5);
}

proptest! {
    /// Slices of slices give the values that plain indexing gives, for narrow and wide gaps.
    #[test]
    fn rectangles_hold_their_values(
        dtype in 0_usize..3,
        (rows, cols) in (0_usize..40, prop_oneof![0_usize..70, 500_usize..1500]),
        cuts in prop::array::uniform8(0.0_f64..=1.0),
        seed in any::<u64>(),
    ) {
        let (dtype, _) = FLOATS[dtype];
        let values = weights(rows * cols, seed);
        let folder = Folder::matrix(dtype, rows, cols, &values);
        let whole = Checkpoint::open(folder.path()).unwrap().matrix("w", rows, cols).unwrap();
        let range = |n: usize, a: f64, b: f64| {
            let (a, b) = ((a * n as f64) as usize, (b * n as f64) as usize);
            a.min(b)..a.max(b)
        };
        let (outer_rows, outer_cols) = (range(rows, cuts[0], cuts[1]), range(cols, cuts[2], cuts[3]));
        let outer = whole.slice(outer_rows.clone(), outer_cols.clone());
        let (inner_rows, inner_cols) = (range(outer.rows(), cuts[4], cuts[5]), range(outer.cols(), cuts[6], cuts[7]));
        let inner = outer.slice(inner_rows.clone(), inner_cols.clone());
        let mut all = vec![f32::NAN; inner.rows() * inner.cols()];
        inner.read_rows(0..inner.rows(), &mut all).unwrap();
        for row in 0..inner.rows() {
            let mut one = vec![f32::NAN; inner.cols()];
            inner.read_row(row, &mut one).unwrap();
            for col in 0..inner.cols() {
                let index = (outer_rows.start + inner_rows.start + row) * cols + outer_cols.start + inner_cols.start + col;
                let expected = rounded(dtype, values[index]);
                prop_assert_eq!(one[col], expected);
                prop_assert_eq!(all[row * inner.cols() + col], expected);
            }
        }
    }
}
