//! One damaged checkpoint for each error: the right variant, and a message that names what a user
//! needs.

mod folder;

use checkpoint::{Checkpoint, CheckpointError};
use folder::{Folder, weights};
use tensor::{PackedMatrix, WeightFormat};

/// Opens the folder, expects an error of the given variant whose message contains all of `parts`.
macro_rules! assert_error {
    ($result:expr, $variant:pat, $($part:expr),+ $(,)?) => {{
        let error = $result.expect_err("a damaged checkpoint");
        assert!(matches!(error, $variant), "{error:?}");
        let message = error.to_string();
        $(assert!(message.contains($part), "{message:?} lacks {:?}", $part);)+
        assert!(!message.contains('\n'), "{message:?} is one line");
    }};
}

fn open(folder: &Folder) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::open(folder.path())
}

fn entry(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

fn single(entries: &[String], data: usize) -> Folder {
    Folder::single(&format!("{{{}}}", entries.join(",")), &vec![0; data])
}

#[test]
fn no_weights() {
    let folder = Folder::new();
    folder.file("config.json", b"{}");
    assert_error!(
        open(&folder),
        CheckpointError::NoWeights { .. },
        "neither",
        "model.safetensors.index.json"
    );
}

#[test]
fn a_folder_in_place_of_the_file() {
    let folder = Folder::new();
    std::fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    assert_error!(
        open(&folder),
        CheckpointError::Open { .. },
        "model.safetensors",
        "not a regular file"
    );
}

#[test]
fn a_pipe_in_place_of_the_file() {
    let folder = Folder::new();
    let made = std::process::Command::new("mkfifo")
        .arg(folder.path().join("model.safetensors"))
        .status()
        .unwrap();
    assert!(made.success());
    // Opening it would wait for somebody who writes.
    assert_error!(
        open(&folder),
        CheckpointError::Open { .. },
        "model.safetensors",
        "not a regular file"
    );
}

#[test]
fn too_short_for_a_header() {
    let folder = Folder::new();
    folder.file("model.safetensors", b"1234567");
    assert_error!(
        open(&folder),
        CheckpointError::NoHeader { found: 7, .. },
        "7 bytes",
        "at least 8"
    );
}

#[test]
fn header_longer_than_the_file() {
    let folder = Folder::new();
    for claimed in [3_u64, 1 << 40, u64::MAX] {
        let mut bytes = claimed.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        folder.file("model.safetensors", &bytes);
        assert_error!(
            open(&folder),
            CheckpointError::HeaderLength { max: 2, .. },
            &claimed.to_string(),
            "at most 2"
        );
    }
}

#[test]
fn a_pointer_in_place_of_the_file() {
    let folder = Folder::new();
    folder.file(
        "model.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    );
    assert_error!(
        open(&folder),
        CheckpointError::LfsPointer { .. },
        "model.safetensors",
        "git lfs pull"
    );
}

#[test]
fn header_that_is_no_json_object() {
    for header in ["", "{", "[1,2]", "nonsense", "{\"a\":1}}", "\u{0}"] {
        let folder = Folder::single(header, &[]);
        assert_error!(
            open(&folder),
            CheckpointError::HeaderJson { .. },
            "model.safetensors",
            "not a JSON object"
        );
    }
    let folder = Folder::new();
    folder.file("model.safetensors", b"\x04\0\0\0\0\0\0\0{\"\xff\"");
    assert_error!(open(&folder), CheckpointError::HeaderJson { .. }, "not a JSON object");
}

#[test]
fn header_fields_absent_or_of_the_wrong_kind() {
    for (entry, field, found) in [
        (r#""w":{"shape":[1],"data_offsets":[0,4]}"#, "dtype", "absent"),
        (r#""w":{"dtype":32,"shape":[1],"data_offsets":[0,4]}"#, "dtype", "32"),
        (r#""w":{"dtype":"F32","data_offsets":[0,4]}"#, "shape", "absent"),
        (r#""w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#, "shape", "[-1]"),
        (r#""w":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}"#, "shape", "[1.5]"),
        (r#""w":{"dtype":"F32","shape":"x","data_offsets":[0,4]}"#, "shape", "\"x\""),
        (r#""w":{"dtype":"F32","shape":[1]}"#, "data_offsets", "absent"),
        (r#""w":{"dtype":"F32","shape":[1],"data_offsets":[0]}"#, "data_offsets", "[0]"),
        (r#""w":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}"#, "data_offsets", "[0,4,8]"),
        (r#""w":null"#, "dtype", "absent"),
    ] {
        let folder = Folder::single(&format!("{{{entry}}}"), &[0; 4]);
        assert_error!(open(&folder), CheckpointError::HeaderField { .. }, "tensor w", field, found);
    }
    let folder = Folder::single(r#"{"__metadata__":{"format":1}}"#, &[]);
    assert_error!(
        open(&folder),
        CheckpointError::HeaderField { .. },
        "__metadata__",
        "an object of strings"
    );
}

#[test]
fn unknown_dtype() {
    let folder = single(&[entry("w", "F33", "[1]", 0, 4)], 4);
    assert_error!(open(&folder), CheckpointError::UnknownDtype { .. }, "tensor w", "F33");
}

#[test]
fn sizes_that_overflow() {
    let shape = format!("[{0},{0}]", u64::MAX / 2);
    let folder = single(&[entry("w", "F32", &shape, 0, 4)], 4);
    assert_error!(
        open(&folder),
        CheckpointError::SizeOverflow { .. },
        "tensor w",
        "overflows",
        "F32"
    );
    let folder = single(&[entry("w", "F32", &format!("[0,{}]", u64::MAX / 2), 0, 0)], 0);
    assert_error!(
        open(&folder),
        CheckpointError::SizeOverflow { .. },
        "tensor w",
        "overflows",
        "F32"
    );
}

#[test]
fn offsets_beyond_the_file_or_backwards() {
    let header =
        format!("{{{},{}}}", entry("a", "F32", "[1]", 0, 4), entry("w", "F32", "[2]", 4, 12));
    let folder = Folder::single(&header, &[0; 11]);
    assert_error!(
        open(&folder),
        CheckpointError::Truncated { .. },
        "shorter than its header says",
        &format!("{} bytes", header.len() + 8 + 11),
        &format!("expected {}", header.len() + 8 + 12)
    );
    let folder = single(&[entry("w", "F32", "[1]", 8, 4)], 8);
    assert_error!(open(&folder), CheckpointError::OutOfRange { .. }, "tensor w", "8..4");
    let folder = single(&[entry("w", "F32", "[1]", u64::MAX - 3, u64::MAX)], 8);
    assert_error!(open(&folder), CheckpointError::OutOfRange { .. }, "tensor w");
}

#[test]
fn offsets_that_do_not_match_the_shape() {
    let folder = single(&[entry("w", "BF16", "[3,5]", 0, 32)], 32);
    assert_error!(
        open(&folder),
        CheckpointError::SizeMismatch { .. },
        "tensor w",
        "span 32",
        "needs 30",
        "BF16 [3, 5]"
    );
}

#[test]
fn overlapping_tensors() {
    let folder = single(&[entry("b", "F32", "[2]", 4, 12), entry("a", "F32", "[2]", 0, 8)], 12);
    assert_error!(
        open(&folder),
        CheckpointError::Overlap { .. },
        "tensor b",
        "byte 4",
        "tensor a",
        "at 8"
    );
}

#[test]
fn holes_between_and_behind_tensors() {
    let folder = single(&[entry("a", "F32", "[1]", 0, 4), entry("b", "F32", "[1]", 8, 12)], 12);
    assert_error!(open(&folder), CheckpointError::Hole { start: 4, end: 8, .. }, "4 bytes", "4..8");
    let folder = single(&[entry("a", "F32", "[1]", 0, 4)], 9);
    assert_error!(open(&folder), CheckpointError::Hole { start: 4, end: 9, .. }, "5 bytes", "4..9");
}

#[test]
fn a_name_twice_in_one_header() {
    let folder = single(&[entry("w", "F32", "[1]", 0, 4), entry("w", "F32", "[1]", 4, 8)], 8);
    assert_error!(open(&folder), CheckpointError::RepeatedTensor { .. }, "tensor w", "twice");
}

/// Two shards: `a` in one.safetensors, `second` in two.safetensors.
fn shards(second: &str, weight_map: &str) -> Folder {
    let folder = Folder::new();
    folder.safetensors(
        "one.safetensors",
        &format!("{{{}}}", entry("a", "F32", "[1]", 0, 4)),
        &[0; 4],
    );
    folder.safetensors(
        "two.safetensors",
        &format!("{{{}}}", entry(second, "F32", "[1]", 0, 4)),
        &[0; 4],
    );
    folder.file("model.safetensors.index.json", weight_map.as_bytes());
    folder
}

#[test]
fn a_name_in_two_files() {
    let folder = shards("a", r#"{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#);
    assert_error!(
        open(&folder),
        CheckpointError::DuplicateTensor { .. },
        "tensor a",
        "one.safetensors",
        "two.safetensors"
    );
}

#[test]
fn index_that_is_no_json_object() {
    for text in ["", "[]", "{\"weight_map\":{"] {
        let folder = shards("b", text);
        assert_error!(
            open(&folder),
            CheckpointError::IndexJson { .. },
            "model.safetensors.index.json"
        );
    }
}

#[test]
fn index_without_a_usable_weight_map() {
    for (text, found) in [
        (r#"{"metadata":{}}"#, "absent"),
        (r#"{"weight_map":[]}"#, "[]"),
        (r#"{"weight_map":{}}"#, "{}"),
        (r#"{"weight_map":{"a":7}}"#, "7"),
        (r#"{"weight_map":{"a":"../one.safetensors"}}"#, "../one.safetensors"),
        (r#"{"weight_map":{"a":"/etc/passwd"}}"#, "/etc/passwd"),
        (r#"{"weight_map":{"a":""}}"#, "\"\""),
    ] {
        let folder = shards("b", text);
        assert_error!(
            open(&folder),
            CheckpointError::IndexField { .. },
            "weight_map",
            found,
            "expected"
        );
    }
}

#[test]
fn index_that_names_a_missing_file() {
    let folder = shards("b", r#"{"weight_map":{"a":"one.safetensors","c":"three.safetensors"}}"#);
    assert_error!(
        open(&folder),
        CheckpointError::IndexFile { .. },
        "tensor c",
        "three.safetensors",
        "does not exist"
    );
}

#[test]
fn index_that_names_a_tensor_its_file_lacks() {
    for map in [
        r#"{"a":"one.safetensors","c":"two.safetensors"}"#,
        r#"{"a":"two.safetensors","b":"one.safetensors"}"#,
    ] {
        let folder = shards("b", &format!(r#"{{"weight_map":{map}}}"#));
        assert_error!(
            open(&folder),
            CheckpointError::IndexTensor { .. },
            "index",
            "does not hold it"
        );
    }
}

#[test]
fn tensors_that_are_absent_or_misshapen_or_no_weights() {
    let folder =
        single(&[entry("w", "F32", "[2,3]", 0, 24), entry("ids", "I64", "[1,2]", 24, 40)], 40);
    let checkpoint = open(&folder).unwrap();
    assert_error!(checkpoint.matrix("q", 2, 3), CheckpointError::NoTensor { .. }, "no tensor q");
    assert_error!(checkpoint.vector("q", 2), CheckpointError::NoTensor { .. }, "no tensor q");
    assert_error!(checkpoint.stored_format("q"), CheckpointError::NoTensor { .. }, "no tensor q");
    assert_error!(
        checkpoint.matrix("w", 3, 2),
        CheckpointError::Shape { .. },
        "tensor w",
        "[2, 3]",
        "[3, 2]"
    );
    assert_error!(
        checkpoint.vector("w", 6),
        CheckpointError::Shape { .. },
        "tensor w",
        "[2, 3]",
        "[6]"
    );
    assert_error!(
        checkpoint.matrix("ids", 1, 2),
        CheckpointError::Dtype { .. },
        "tensor ids",
        "I64",
        "BF16"
    );
    assert_error!(
        checkpoint.stored_format("ids"),
        CheckpointError::Dtype { .. },
        "tensor ids",
        "I64"
    );
}

#[test]
fn quantization_marks_that_are_wrong() {
    let tensor = entry("w", "U8", "[2,34]", 0, 68);
    for mark in [
        "", "q8", "q8 2", "q9 2x32", "f32 2x32", "q8 2x", "q8 2x64", "q4z 2x32", "q8 3x32",
        "q8 1x1x1",
    ] {
        let header = format!(r#"{{"__metadata__":{{"group32.w":"{mark}"}},{tensor}}}"#);
        let folder = Folder::single(&header, &[0; 68]);
        assert_error!(
            open(&folder),
            CheckpointError::QuantizationMark { .. },
            "tensor w",
            &format!("{mark:?}")
        );
    }
    let four_bits = entry("w", "U8", "[2,18]", 0, 36);
    let marked = |mark: &str| {
        let header = format!(r#"{{"__metadata__":{{"group32.w":"{mark}"}},{four_bits}}}"#);
        open(&Folder::single(&header, &[0; 36]))
    };
    assert_error!(
        marked("q4 2x32"),
        CheckpointError::QuantizationMark { .. },
        "earlier version",
        "qwen3 quantize"
    );
    assert_eq!(marked("q4z 2x32").unwrap().shape("w"), Some(&[2, 32][..]));
    let floats = entry("w", "F32", "[2,32]", 0, 256);
    let folder = Folder::single(
        &format!(r#"{{"__metadata__":{{"group32.w":"q8 2x32"}},{floats}}}"#),
        &[0; 256],
    );
    assert_error!(open(&folder), CheckpointError::QuantizationMark { .. }, "F32 [2, 32]");
    // The marks above are refused for what they say: this one is right.
    let header = format!(r#"{{"__metadata__":{{"group32.w":"q8 2x32"}},{tensor}}}"#);
    assert_eq!(open(&Folder::single(&header, &[0; 68])).unwrap().shape("w"), Some(&[2, 32][..]));
    // Without a mark, bytes are no weights.
    let unmarked = open(&single(&[tensor], 68)).unwrap();
    assert_error!(unmarked.matrix("w", 2, 34), CheckpointError::Dtype { .. }, "U8", "group32");
}

#[test]
fn a_file_cut_short_after_it_was_opened_is_an_error_not_a_signal() {
    let values = weights(64 * 40, 1);
    let folder = Folder::matrix("F32", 64, 40, &values);
    let checkpoint = open(&folder).unwrap();
    let matrix = checkpoint.matrix("w", 64, 40).unwrap();
    let path = folder.path().join("model.safetensors");
    let size = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size - 1000).unwrap();
    let mut row = [0.0; 40];
    matrix.read_row(0, &mut row).expect("the part that is left");
    assert_error!(
        matrix.read_row(63, &mut row),
        CheckpointError::Read { .. },
        "160 bytes",
        "for w",
        "model.safetensors"
    );
    let packed = PackedMatrix::load(WeightFormat::Bf16, &[matrix]);
    assert_error!(packed, CheckpointError::Read { .. }, "for w");
}

#[test]
fn weights_that_the_format_cannot_express() {
    for (format, bad) in
        [(WeightFormat::Q8, 1e20), (WeightFormat::Q4, -1e7), (WeightFormat::F16, 65520.0)]
    {
        let mut values = weights(40 * 50, 2);
        values[37 * 50 + 49] = bad;
        let folder = Folder::matrix("F32", 40, 50, &values);
        let matrix = open(&folder).unwrap().matrix("w", 40, 50).unwrap();
        // The row is the tensor's, also when it is read through a slice and below another matrix.
        let stack = [matrix.slice(0..5, 0..50), matrix.slice(30..40, 0..50)];
        assert_error!(
            PackedMatrix::load(format, &stack),
            CheckpointError::NotRepresentable { row: 37, .. },
            "tensor w",
            "row 37",
            &bad.to_string(),
            format.name()
        );
        PackedMatrix::load(format, &[matrix.slice(0..37, 0..50)]).expect("the rows before");
        PackedMatrix::load(WeightFormat::F32, &[matrix]).expect("f32 holds everything");
    }
}

#[test]
fn weights_that_are_no_numbers() {
    for (dtype, bad) in
        [("F32", f32::NAN), ("F32", f32::INFINITY), ("BF16", f32::NEG_INFINITY), ("F16", f32::NAN)]
    {
        // The last one of a row, in the part behind whole vectors.
        let mut values = weights(40 * 50, 2);
        values[37 * 50 + 49] = bad;
        let folder = Folder::matrix(dtype, 40, 50, &values);
        let matrix = open(&folder).unwrap().matrix("w", 40, 50).unwrap();
        let stack = [matrix.slice(0..5, 0..50), matrix.slice(30..40, 0..50)];
        for format in WeightFormat::ALL {
            assert_error!(
                PackedMatrix::load(format, &stack),
                CheckpointError::NotFinite { row: 37, .. },
                "tensor w",
                "row 37",
                &bad.to_string()
            );
            PackedMatrix::load(format, &[matrix.slice(0..40, 0..49)]).expect("the columns before");
        }
        assert_error!(
            matrix.read_row(37, &mut [0.0; 50]),
            CheckpointError::NotFinite { row: 37, .. },
            "row 37"
        );
    }
    let folder = Folder::new();
    let specs =
        [checkpoint::TensorSpec { name: "w".into(), format: WeightFormat::Q8, shape: vec![3, 64] }];
    let file = folder.path().join("model.safetensors");
    let mut writer = checkpoint::CheckpointWriter::create(file.clone(), &specs, &[]).unwrap();
    writer.write("w", &weights(3 * 64, 1)).unwrap();
    writer.finish().unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    // The second scale of the last row.
    let scale = bytes.len() - 34;
    bytes[scale..scale + 2].copy_from_slice(&0x7c00u16.to_le_bytes());
    folder.file("model.safetensors", &bytes);
    let matrix = open(&folder).unwrap().matrix("w", 3, 64).unwrap();
    for format in WeightFormat::ALL {
        let loaded = PackedMatrix::load(format, std::slice::from_ref(&matrix));
        assert_error!(loaded, CheckpointError::NotFinite { row: 2, .. }, "row 2", "inf");
    }
}
