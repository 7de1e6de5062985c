//! What packing reports of the weights that it rounds.

use tensor::{DenseMatrix, PackedMatrix, Rounding, WeightFormat};

fn load(format: WeightFormat, weights: &[f32], rows: usize, cols: usize) -> Rounding {
    let mut packed = PackedMatrix::allocate(format, rows, cols);
    let panels = 0..packed.panel_count();
    let mut chunks = packed.split_panels(std::slice::from_ref(&panels));
    let chunk = chunks.pop().expect("one chunk");
    let rounding = chunk.load(&[DenseMatrix::new(weights, rows, cols)]).expect("finite weights");
    drop(chunks);
    // The same from the packed weights.
    let (mut error, mut norm, mut row) = (0.0, 0.0, vec![0.0; cols]);
    for (index, weights) in weights.chunks_exact(cols).enumerate() {
        packed.read_row(index, &mut row);
        for (from, to) in weights.iter().zip(&row) {
            error += f64::from(from - to).powi(2);
            norm += f64::from(*from).powi(2);
        }
    }
    if format != WeightFormat::F32 {
        assert!((rounding.error - error).abs() <= 1e-4 * error + 1e-30, "{format}: {rounding:?}");
        assert!((rounding.norm - norm).abs() <= 1e-4 * norm, "{format}: {rounding:?}");
    }
    rounding
}

#[test]
fn errors_are_those_of_the_packed_weights() {
    let (rows, cols) = (21, 70);
    let weights: Vec<f32> = (0..rows * cols).map(|i| (i as f32 * 0.7).sin() * 0.1).collect();
    assert_eq!(load(WeightFormat::F32, &weights, rows, cols), Rounding::default());
    for (format, limit) in [
        (WeightFormat::Bf16, 0.003),
        (WeightFormat::F16, 0.0004),
        (WeightFormat::Q8, 0.006),
        (WeightFormat::Q4, 0.1),
    ] {
        let rounding = load(format, &weights, rows, cols);
        let relative = rounding.relative();
        assert!(relative > limit / 100.0 && relative < limit, "{format}: {relative}");
        assert_eq!(rounding.vanished, 0);
    }
}

#[test]
fn groups_that_become_zero_are_counted() {
    let mut weights = [0.5_f32; 3 * 64];
    weights[64..96].fill(1e-8);
    weights[160..].fill(0.0);
    for format in [WeightFormat::Q8, WeightFormat::Q4] {
        assert_eq!(load(format, &weights, 3, 64).vanished, 1, "{format}");
    }
}
