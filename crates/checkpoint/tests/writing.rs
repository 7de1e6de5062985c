//! The checkpoint writer, and quantized checkpoints from disk to panels.

mod folder;

use std::path::Path;

use checkpoint::{Checkpoint, CheckpointWriter, TensorSpec, WriteError};
use folder::{Folder, rounded, weights};
use proptest::prelude::*;
use tensor::{GROUP, PackedData, PackedMatrix, WeightFormat, encode_rows};

fn spec(name: &str, format: WeightFormat, shape: &[usize]) -> TensorSpec {
    TensorSpec { name: name.to_owned(), format, shape: shape.to_vec() }
}

/// Writes one matrix named `w`.
fn write(folder: &Folder, format: WeightFormat, rows: usize, cols: usize, values: &[f32]) {
    let path = folder.path().join("model.safetensors");
    let mut writer =
        CheckpointWriter::create(path, &[spec("w", format, &[rows, cols])], &[]).unwrap();
    writer.write("w", values).unwrap();
    writer.finish().unwrap();
}

fn data(packed: &PackedMatrix) -> &[u8] {
    match packed.data() {
        PackedData::F32(data) => bytemuck::cast_slice(data),
        PackedData::Bf16(data) | PackedData::F16(data) => bytemuck::cast_slice(data),
        PackedData::Q8(data) | PackedData::Q4(data) => data,
    }
}

#[test]
fn a_file_of_all_formats_written_in_pieces() {
    let folder = Folder::new();
    let path = folder.path().join("model.safetensors");
    let specs = [
        spec("norm", WeightFormat::F32, &[7]),
        spec("empty", WeightFormat::F32, &[0, 5]),
        spec("scalar", WeightFormat::F32, &[]),
        spec("bf16", WeightFormat::Bf16, &[5, 9]),
        spec("f16", WeightFormat::F16, &[5, 9]),
        spec("q8", WeightFormat::Q8, &[5, 70]),
        spec("q4", WeightFormat::Q4, &[5, 70]),
        spec("nothing", WeightFormat::Q4, &[5, 0]),
    ];
    let mut writer =
        CheckpointWriter::create(&path, &specs, &[("format".into(), "pt".into())]).unwrap();
    let (norm, small, large) = (weights(7, 1), weights(45, 2), weights(350, 3));
    writer.write("norm", &norm).unwrap();
    writer.write("scalar", &[1.5]).unwrap();
    for name in ["bf16", "f16"] {
        // Cut in the middle of rows.
        writer.write(name, &small[..11]).unwrap();
        writer.write(name, &[]).unwrap();
        writer.write(name, &small[11..]).unwrap();
    }
    writer.write("q8", &large[..140]).unwrap();
    writer.write("q8", &large[140..]).unwrap();
    let mut encoded = Vec::new();
    encode_rows(WeightFormat::Q4, 70, &large, &mut encoded).unwrap();
    writer.write_encoded("q4", &encoded).unwrap();
    writer.finish().unwrap();

    // The format's own crate takes the file.
    let bytes = std::fs::read(&path).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), 8);
    assert_eq!(theirs.tensor("q8").unwrap().shape(), [5, 3 * 34]);
    let (header_len, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!((8 + header_len) % 8, 0, "the data is aligned");
    let notes = metadata.metadata().as_ref().unwrap();
    assert_eq!(notes["format"], "pt");
    assert_eq!(notes["group32.q4"], "q4z 5x70");

    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(checkpoint.vector("norm", 7).unwrap(), norm);
    assert_eq!(checkpoint.shape("scalar"), Some(&[][..]));
    assert_eq!(checkpoint.shape("q4"), Some(&[5, 70][..]));
    for (name, dtype) in [("bf16", "BF16"), ("f16", "F16")] {
        let mut out = vec![0.0; 45];
        checkpoint.matrix(name, 5, 9).unwrap().read_rows(0..5, &mut out).unwrap();
        assert_eq!(out, small.iter().map(|&value| rounded(dtype, value)).collect::<Vec<_>>());
    }
    for (name, format) in
        [("q8", WeightFormat::Q8), ("q4", WeightFormat::Q4), ("nothing", WeightFormat::Q4)]
    {
        assert_eq!(checkpoint.stored_format(name).unwrap(), format);
    }
    checkpoint.matrix("nothing", 5, 0).unwrap().read_row(4, &mut []).unwrap();
}

#[test]
fn stored_groups_are_as_documented() {
    // Q8, llama.cpp's Q8_0: f16 scale, 32 signed bytes. Q4: a word of scale and zero point, byte i
    // = code i | code (i + 16) << 4.
    let values: Vec<f32> = (0..32).map(|k| (k as f32 - 16.0) / 16.0).collect();
    let mut bytes = Vec::new();
    encode_rows(WeightFormat::Q8, 32, &values, &mut bytes).unwrap();
    assert_eq!(bytes.len(), 34);
    let scale = half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
    for (k, &value) in values.iter().enumerate() {
        assert!((scale * f32::from(bytes[2 + k] as i8) - value).abs() <= scale, "{k}");
    }
    bytes.clear();
    encode_rows(WeightFormat::Q4, 32, &values, &mut bytes).unwrap();
    assert_eq!(bytes.len(), 18);
    let word = u16::from_le_bytes([bytes[0], bytes[1]]);
    let (scale, zero) =
        (half::f16::from_bits(word >> 1 & 0x7ff8).to_f32(), 4.0 + f32::from(word & 15) / 2.0);
    for (k, &value) in values.iter().enumerate() {
        let nibble = if k < 16 { bytes[2 + k] & 15 } else { bytes[2 + k - 16] >> 4 };
        assert!((scale * (f32::from(nibble) - zero) - value).abs() <= 0.51 * scale, "{k}");
    }
}

#[test]
fn errors_of_writing() {
    let folder = Folder::new();
    let path = folder.path().join("out.safetensors");
    let create = |specs: &[TensorSpec]| CheckpointWriter::create(&path, specs, &[]);
    let message = |error: WriteError| error.to_string();

    let error =
        CheckpointWriter::create(folder.path().join("no/such/folder"), &[], &[]).unwrap_err();
    assert!(
        matches!(error, WriteError::Io { .. }) && error.to_string().contains("no/such/folder"),
        "{error}"
    );

    let error = create(&[spec("a", WeightFormat::F32, &[1]), spec("a", WeightFormat::F32, &[1])])
        .unwrap_err();
    assert!(matches!(error, WriteError::Repeated { .. }) && message(error).contains("tensor a"));
    for shape in [&[4][..], &[2, 2, 2], &[]] {
        let error = create(&[spec("a", WeightFormat::Q8, shape)]).unwrap_err();
        assert!(matches!(error, WriteError::Shape { .. }), "{error}");
        assert!(message(error).contains("cannot be stored as q8"));
    }
    let error = create(&[spec("a", WeightFormat::F32, &[usize::MAX, 2])]).unwrap_err();
    assert!(matches!(error, WriteError::Shape { .. }), "{error}");
    let huge = [usize::MAX / 8, 1];
    let error = create(&[
        spec("a", WeightFormat::F32, &huge),
        spec("b", WeightFormat::F32, &huge),
        spec("c", WeightFormat::F32, &huge),
    ]);
    assert!(matches!(error.unwrap_err(), WriteError::Shape { .. }), "the sum of sizes overflows");

    let specs = [spec("a", WeightFormat::F32, &[3]), spec("b", WeightFormat::Q4, &[4, 40])];
    let mut writer = create(&specs).unwrap();
    let error = writer.write("b", &[0.0; 40]).unwrap_err();
    assert!(matches!(error, WriteError::Order { .. }), "{error}");
    assert!(message(error).contains("it is a's turn, of which 12 are missing"));
    let error = writer.write("a", &[0.0; 4]).unwrap_err();
    assert!(matches!(error, WriteError::Order { bytes: 16, .. }), "{error}");
    writer.write("a", &[0.0; 3]).unwrap();
    writer.write("b", &weights(40, 1)).unwrap();
    let mut bad = weights(80, 1);
    bad[41] = f32::NAN;
    let error = writer.write("b", &bad).unwrap_err();
    assert!(message(error).contains("row 2: NaN cannot be stored as q4"));
    let error = writer.finish().unwrap_err();
    assert!(
        matches!(error, WriteError::Unfinished { missing, .. } if missing == 3 * 36),
        "{error}"
    );
    assert!(message(error).contains("tensor b"));

    let mut writer = create(&specs[..1]).unwrap();
    writer.write("a", &[0.0; 3]).unwrap();
    let error = writer.write("a", &[0.0]).unwrap_err();
    assert!(message(error).contains("all tensors are complete"));
    writer.finish().unwrap();

    let mut writer = create(&[spec("h", WeightFormat::F16, &[2, 3])]).unwrap();
    let error = writer.write("h", &[0.0, 0.0, 0.0, 0.0, 1e6, 0.0]).unwrap_err();
    assert!(matches!(error, WriteError::Encode { .. }), "{error}");
    assert!(message(error).contains("row 1: 1000000 cannot be stored as f16"));
    // Of a tensor before its turn not even the format matters.
    let error = writer.write("w", &[1e6]).unwrap_err();
    assert!(matches!(error, WriteError::Order { bytes: 4, .. }), "{error}");
    let mut writer = create(&specs[1..]).unwrap();
    let error = writer.write("w", &[1e6]).unwrap_err();
    assert!(message(error).contains("it is b's turn"));
    writer.write("w", &[]).unwrap();
}

#[test]
#[should_panic(expected = "41 values are no rows of 40")]
fn quantized_rows_cannot_be_cut() {
    let folder = Folder::new();
    let path = folder.path().join("out.safetensors");
    let mut writer =
        CheckpointWriter::create(path, &[spec("w", WeightFormat::Q8, &[4, 40])], &[]).unwrap();
    let _ = writer.write("w", &[0.0; 41]);
}

#[test]
fn an_unfinished_file_does_not_open() {
    let folder = Folder::new();
    let path: &Path = &folder.path().join("model.safetensors");
    let mut writer =
        CheckpointWriter::create(path, &[spec("w", WeightFormat::F32, &[4, 40])], &[]).unwrap();
    writer.write("w", &[0.0; 40]).unwrap();
    drop(writer);
    assert!(matches!(
        Checkpoint::open(folder.path()),
        Err(checkpoint::CheckpointError::Truncated { .. })
    ));
}

proptest! {
    /// A quantized checkpoint gives, bit for bit, the panels that quantizing while loading gives;
    /// also for slices whose columns begin a group, and wherever they end.
    #[test]
    fn quantized_from_disk_or_at_load(
        four_bits in any::<bool>(),
        rows in 0_usize..40,
        cols in 0_usize..150,
        (first, last) in (0_usize..5, 0_usize..150),
        seed in any::<u64>(),
    ) {
        let format = if four_bits { WeightFormat::Q4 } else { WeightFormat::Q8 };
        let values = weights(rows * cols, seed);
        let plain = Folder::matrix("F32", rows, cols, &values);
        let quantized = Folder::new();
        write(&quantized, format, rows, cols, &values);
        let open = |folder: &Folder| Checkpoint::open(folder.path()).unwrap().matrix("w", rows, cols).unwrap();
        let (plain, quantized) = (open(&plain), open(&quantized));
        prop_assert_eq!(quantized.format(), format);

        let at_load = PackedMatrix::load(format, &[plain]).unwrap();
        let from_disk = PackedMatrix::load(format, std::slice::from_ref(&quantized)).unwrap();
        prop_assert_eq!(data(&at_load), data(&from_disk));

        // A slice on a group border keeps the codes; what it dequantizes to is what the whole
        // matrix has there.
        let start = (first * GROUP).min(cols / GROUP * GROUP);
        let end = last.clamp(start, cols.max(start)).min(cols).max(start);
        let slice = PackedMatrix::load(format, &[quantized.slice(0..rows, start..end)]).unwrap();
        let (mut whole_row, mut slice_row) = (vec![0.0; cols], vec![0.0; end - start]);
        for row in 0..rows {
            at_load.read_row(row, &mut whole_row);
            slice.read_row(row, &mut slice_row);
            prop_assert_eq!(&whole_row[start..end], &slice_row[..]);
        }
    }

    /// A slice that begins inside a group dequantizes to the stored weights, in every float format
    /// and through `read_rows`.
    #[test]
    fn quantized_slices_off_the_groups(
        four_bits in any::<bool>(),
        rows in 1_usize..20,
        cols in 1_usize..130,
        (a, b) in (0_usize..130, 0_usize..130),
        seed in any::<u64>(),
    ) {
        let format = if four_bits { WeightFormat::Q4 } else { WeightFormat::Q8 };
        let folder = Folder::new();
        write(&folder, format, rows, cols, &weights(rows * cols, seed));
        let matrix = Checkpoint::open(folder.path()).unwrap().matrix("w", rows, cols).unwrap();
        let range = a.min(b).min(cols)..a.max(b).min(cols);
        let slice = matrix.slice(0..rows, range.clone());
        let mut values = vec![f32::NAN; rows * range.len()];
        slice.read_rows(0..rows, &mut values).unwrap();
        let whole = PackedMatrix::load(format, std::slice::from_ref(&matrix)).unwrap();
        let packed = PackedMatrix::load(WeightFormat::F32, std::slice::from_ref(&slice)).unwrap();
        let requantized = PackedMatrix::load(format, &[slice]).unwrap();
        let (mut expected, mut found) = (vec![0.0; cols], vec![0.0; range.len()]);
        for row in 0..rows {
            whole.read_row(row, &mut expected);
            prop_assert_eq!(&values[row * range.len()..(row + 1) * range.len()], &expected[range.clone()]);
            packed.read_row(row, &mut found);
            prop_assert_eq!(&found[..], &expected[range.clone()]);
            // Quantizing again loses at most another half step or so of the largest scale in reach.
            requantized.read_row(row, &mut found);
            let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
            let steps = if four_bits { 4.0 } else { 60.0 };
            for (found, expected) in found.iter().zip(&expected[range.clone()]) {
                prop_assert!((found - expected).abs() <= largest / steps, "{found} for {expected}, largest {largest}");
            }
        }
    }
}
