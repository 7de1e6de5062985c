//! Packed matrices, decoded here from the documented layout: every format from every stored dtype,
//! for every shape.

mod folder;

use checkpoint::{Checkpoint, CheckpointWriter, Matrix, TensorSpec};
use folder::{Folder, rounded, weights};
use half::{bf16, f16};
use proptest::prelude::*;
use tensor::{
    GROUP, PANEL, PackedData, PackedMatrix, WeightFormat, quantize_group_q4, quantize_group_q8,
    split_range,
};

const DTYPES: [&str; 3] = ["F32", "BF16", "F16"];

/// Weight (row, k) by the layout's formulas; `row` and `k` may lie in the padding.
fn decode(packed: &PackedMatrix, row: usize, k: usize) -> f32 {
    let (panel, r) = (row / PANEL, row % PANEL);
    let groups = packed.cols().div_ceil(GROUP);
    let element = panel * packed.cols() * PANEL + k * PANEL;
    let scale = |block: &[u8]| f16::from_le_bytes([block[2 * r], block[2 * r + 1]]).to_f32();
    match packed.data() {
        PackedData::F32(data) => data[element + r],
        PackedData::Bf16(data) => {
            bf16::from_bits(data[element + 8 * (r / 4 % 2) + 4 * (r / 8) + r % 4]).to_f32()
        }
        PackedData::F16(data) => f16::from_bits(data[element + r]).to_f32(),
        PackedData::Q8(data) => {
            let block = &data[(panel * groups + k / 32) * 544..][..544];
            let code = block[32 + (k % 32) / 2 * 32 + 2 * r + (k & 1)] as i8;
            scale(block) * f32::from(code)
        }
        PackedData::Q4(data) => {
            let block = &data[(panel * groups + k / 32) * 288..][..288];
            let byte = block[32 + (k % 32) / 4 * 32 + 4 * (r % 8) + (k & 3)];
            let nibble = if r < 8 { byte & 15 } else { byte >> 4 };
            let word = u16::from_le_bytes([block[2 * r], block[2 * r + 1]]);
            let zero = 4.0 + f32::from(word & 15) / 2.0;
            f16::from_bits(word >> 1 & 0x7ff8).to_f32() * (f32::from(nibble) - zero)
        }
    }
}

/// What a row of weights should be in a format.
fn expected(format: WeightFormat, row: &[f32]) -> Vec<f32> {
    match format {
        WeightFormat::F32 => row.to_vec(),
        WeightFormat::Bf16 => row.iter().map(|&weight| rounded("BF16", weight)).collect(),
        WeightFormat::F16 => row.iter().map(|&weight| rounded("F16", weight)).collect(),
        WeightFormat::Q8 | WeightFormat::Q4 => {
            row.chunks(GROUP).flat_map(|group| quantized(format, group)).collect()
        }
    }
}

fn quantized(format: WeightFormat, group: &[f32]) -> Vec<f32> {
    let mut weights = [0.0; GROUP];
    weights[..group.len()].copy_from_slice(group);
    let values: Vec<f32> = if format == WeightFormat::Q8 {
        let group = quantize_group_q8(&weights).unwrap();
        group.codes.iter().map(|&code| group.scale.to_f32() * f32::from(code)).collect()
    } else {
        let group = quantize_group_q4(&weights).unwrap();
        let zero = 4.0 + f32::from(group.zero) / 2.0;
        group.codes.iter().map(|&code| group.scale.to_f32() * (f32::from(code) - zero)).collect()
    };
    values[..group.len()].to_vec()
}

/// Holds every weight, read back and decoded, and all padding against `rows`.
fn check(packed: &PackedMatrix, rows: &[Vec<f32>]) {
    let cols = packed.cols();
    assert_eq!(packed.rows(), rows.len());
    assert_eq!(packed.panel_count(), rows.len().div_ceil(PANEL));
    assert_eq!(packed.bytes(), packed.format().packed_bytes(rows.len(), cols));
    // What Q4 has in columns beyond the last one is arbitrary.
    let padded_cols =
        if packed.format() == WeightFormat::Q8 { cols.next_multiple_of(GROUP) } else { cols };
    let mut out = vec![f32::NAN; cols];
    for (index, row) in rows.iter().enumerate() {
        packed.read_row(index, &mut out);
        assert_eq!(&out, row, "{packed:?} row {index}");
        for (k, &weight) in row.iter().enumerate() {
            assert_eq!(decode(packed, index, k), weight, "{packed:?} row {index} column {k}");
        }
        for k in cols..padded_cols {
            assert_eq!(decode(packed, index, k), 0.0, "{packed:?} row {index} padding {k}");
        }
    }
    for index in rows.len()..packed.panel_count() * PANEL {
        for k in 0..padded_cols {
            assert_eq!(decode(packed, index, k), 0.0, "{packed:?} padding row {index} column {k}");
        }
    }
}

/// The rows of a stored matrix, as f32.
fn stored_rows(matrix: &Matrix) -> Vec<Vec<f32>> {
    (0..matrix.rows())
        .map(|row| {
            let mut out = vec![f32::NAN; matrix.cols()];
            matrix.read_row(row, &mut out).unwrap();
            out
        })
        .collect()
}

fn open(folder: &Folder, rows: usize, cols: usize) -> Matrix {
    Checkpoint::open(folder.path()).unwrap().matrix("w", rows, cols).unwrap()
}

/// The bytes of the panels, whatever their type.
fn bytes(packed: &PackedMatrix) -> &[u8] {
    match packed.data() {
        PackedData::F32(data) => bytemuck::cast_slice(data),
        PackedData::Bf16(data) | PackedData::F16(data) => bytemuck::cast_slice(data),
        PackedData::Q8(data) | PackedData::Q4(data) => data,
    }
}

#[test]
fn every_format_from_every_dtype_for_every_small_shape() {
    for dtype in DTYPES {
        for rows in [0, 1, 7, 15, 16, 17, 31, 32, 33, 48] {
            for cols in [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 65, 100] {
                let folder = Folder::matrix(
                    dtype,
                    rows,
                    cols,
                    &weights(rows * cols, (rows * 1000 + cols) as u64),
                );
                let matrix = open(&folder, rows, cols);
                let stored = stored_rows(&matrix);
                for format in WeightFormat::ALL {
                    let packed = PackedMatrix::load(format, std::slice::from_ref(&matrix)).unwrap();
                    let rows: Vec<_> = stored.iter().map(|row| expected(format, row)).collect();
                    check(&packed, &rows);
                }
            }
        }
    }
}

#[test]
fn a_quantized_slice_ends_in_zero_padding() {
    // The last group of the slice is stored with weights of the columns beyond it, which must not
    // come along.
    for format in [WeightFormat::Q8, WeightFormat::Q4] {
        let folder = Folder::new();
        let spec = TensorSpec { name: "w".to_owned(), format, shape: vec![19, 96] };
        let mut writer =
            CheckpointWriter::create(folder.path().join("model.safetensors"), &[spec], &[])
                .unwrap();
        writer.write("w", &weights(19 * 96, 9)).unwrap();
        writer.finish().unwrap();
        let matrix = open(&folder, 19, 96);
        for cols in [0..1, 0..31, 0..33, 32..63, 32..95, 64..65, 7..40, 33..34] {
            let slice = matrix.slice(2..19, cols.clone());
            let rows = stored_rows(&slice);
            let rows = match cols.start % GROUP {
                0 => rows,
                _ => rows.iter().map(|row| expected(format, row)).collect(),
            };
            check(&PackedMatrix::load(format, &[slice]).unwrap(), &rows);
        }
    }
}

#[test]
fn bit_patterns_survive_when_the_format_stays() {
    for (dtype, format, ones) in
        [("BF16", WeightFormat::Bf16, 0x7f80), ("F16", WeightFormat::F16, 0x7c00)]
    {
        // Subnormals, negative zero: no arithmetic may touch them. What is not finite is refused,
        // so zeros are in its place.
        let patterns = (0..=u16::MAX).map(|bits| if bits & ones == ones { 0 } else { bits });
        let patterns: Vec<u16> = patterns.collect();
        let data: Vec<u8> = patterns.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let header =
            format!(r#"{{"w":{{"dtype":"{dtype}","shape":[256,256],"data_offsets":[0,131072]}}}}"#);
        let packed =
            PackedMatrix::load(format, &[open(&Folder::single(&header, &data), 256, 256)]).unwrap();
        let (PackedData::Bf16(panels) | PackedData::F16(panels)) = packed.data() else {
            panic!("{packed:?}")
        };
        for row in 0..256 {
            for k in 0..256 {
                let r = row % PANEL;
                let slot = if format == WeightFormat::Bf16 {
                    8 * (r / 4 % 2) + 4 * (r / 8) + r % 4
                } else {
                    r
                };
                assert_eq!(
                    panels[row / PANEL * 256 * PANEL + k * PANEL + slot],
                    patterns[row * 256 + k]
                );
            }
        }
    }
}

#[test]
fn an_allocated_matrix_is_zero() {
    for format in WeightFormat::ALL {
        let packed = PackedMatrix::allocate(format, 21, 40);
        let mut row = [1.0; 40];
        packed.read_row(20, &mut row);
        assert!(row.iter().all(|&weight| weight == 0.0), "{format}");
    }
}

#[test]
fn chunks_leave_other_panels_alone() {
    let folder = Folder::matrix("F32", 80, 33, &weights(80 * 33, 8));
    let matrix = open(&folder, 80, 33);
    let mut packed = PackedMatrix::allocate(WeightFormat::Q4, 80, 33);
    let chunks = packed.split_panels(&[1..2, 2..2, 3..4]);
    assert_eq!(chunks.iter().map(|chunk| chunk.panels()).collect::<Vec<_>>(), [1..2, 2..2, 3..4]);
    for chunk in chunks {
        chunk.load(std::slice::from_ref(&matrix)).unwrap();
    }
    let mut rows: Vec<_> =
        stored_rows(&matrix).iter().map(|row| expected(WeightFormat::Q4, row)).collect();
    for (index, row) in rows.iter_mut().enumerate() {
        if ![1, 3].contains(&(index / PANEL)) {
            row.fill(0.0);
        }
    }
    let mut out = [0.0; 33];
    for (index, row) in rows.iter().enumerate() {
        packed.read_row(index, &mut out);
        assert_eq!(out[..], row[..], "row {index}");
    }
}

#[test]
#[should_panic(expected = "panels 1..3 after panel 2")]
fn overlapping_cuts_are_a_broken_contract() {
    let _ = PackedMatrix::allocate(WeightFormat::F32, 64, 4).split_panels(&[0..2, 1..3]);
}

#[test]
#[should_panic(expected = "panels 2..5 of 4")]
fn cuts_beyond_the_matrix_are_a_broken_contract() {
    let _ = PackedMatrix::allocate(WeightFormat::F32, 64, 4).split_panels(&[0..2, 2..5]);
}

#[test]
#[should_panic(expected = "rows of the stack")]
fn a_stack_of_other_rows_is_a_broken_contract() {
    let folder = Folder::matrix("F32", 3, 4, &[0.0; 12]);
    let matrix = open(&folder, 3, 4);
    let mut packed = PackedMatrix::allocate(WeightFormat::F32, 4, 4);
    for chunk in packed.split_panels(&[0..1, 1..1]) {
        let _ = chunk.load(std::slice::from_ref(&matrix));
    }
}

#[test]
fn sizes_of_formats() {
    // 16 rows of one group: 4, 2, 2 bytes a weight; 34 and 18 bytes a group.
    let sizes = WeightFormat::ALL.map(|format| format.packed_bytes(16, 32));
    assert_eq!(sizes, [2048, 1024, 1024, 544, 288]);
    // A started panel and a started group are whole.
    assert_eq!(WeightFormat::Q8.packed_bytes(17, 33), 2 * 2 * 544);
    assert_eq!(WeightFormat::F32.packed_bytes(17, 33), 2 * 16 * 33 * 4);
    assert_eq!(WeightFormat::Q4.stored_row_bytes(33), Some(36));
    assert_eq!(WeightFormat::F32.stored_row_bytes(usize::MAX), None);
    for format in WeightFormat::ALL {
        assert_eq!(format.packed_bytes(0, 100), 0);
        assert_eq!(format.packed_bytes(100, 0), 0);
        assert_eq!(format.to_string().parse::<WeightFormat>(), Ok(format));
    }
    let error = "q5".parse::<WeightFormat>().unwrap_err();
    assert!(error.to_string().contains("\"q5\"") && error.to_string().contains("bf16"), "{error}");
}

proptest! {
    /// A stack of slices of differently stored matrices, loaded in pieces on several threads, is
    /// what its rows say.
    #[test]
    fn stacks_in_pieces(
        parts in prop::collection::vec((0_usize..3, 0_usize..40), 1..5),
        cols in 1_usize..90,
        skipped in 0_usize..50,
        format in 0_usize..5,
        threads in 1_usize..5,
        seed in any::<u64>(),
    ) {
        let format = WeightFormat::ALL[format];
        let folders: Vec<_> = parts
            .iter()
            .enumerate()
            .map(|(index, &(dtype, rows))| {
                let width = cols + skipped + 3;
                Folder::matrix(DTYPES[dtype], rows + 2, width, &weights((rows + 2) * width, seed ^ index as u64))
            })
            .collect();
        let stack: Vec<_> = folders
            .iter()
            .zip(&parts)
            .map(|(folder, &(_, rows))| {
                open(folder, rows + 2, cols + skipped + 3).slice(1..rows + 1, skipped..skipped + cols)
            })
            .collect();
        let rows: Vec<Vec<f32>> = stack.iter().flat_map(stored_rows).map(|row| expected(format, &row)).collect();
        let mut packed = PackedMatrix::allocate(format, rows.len(), cols);
        let panels = packed.panel_count();
        let cuts: Vec<_> = (0..threads).map(|index| split_range(panels, threads, index)).collect();
        std::thread::scope(|scope| {
            for chunk in packed.split_panels(&cuts) {
                let stack = &stack;
                scope.spawn(move || chunk.load(stack).unwrap());
            }
        });
        check(&packed, &rows);
        let whole = PackedMatrix::load(format, &stack).unwrap();
        prop_assert_eq!(bytes(&whole), bytes(&packed));
    }
}
