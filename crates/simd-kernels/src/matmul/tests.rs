//! Both implementations of the products against sums in f64, in every format and around every edge.

use std::ops::Range;

use proptest::prelude::*;

use super::*;
use crate::guarded::{Guarded, noise};
use crate::half_float::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::isa::witness::{assert_entered, assert_entered_avx512};
use crate::panels::{GROUP, PANEL, PanelData, Q4_BLOCK, Q8_BLOCK};

#[derive(Clone, Copy, PartialEq, Debug)]
enum Format {
    F32,
    Bf16,
    F16,
    Q8,
    Q4,
}

const FORMATS: [Format; 5] = [Format::F32, Format::Bf16, Format::F16, Format::Q8, Format::Q4];

/// A matrix with its packed form, which starts at an odd address of its element's size.
struct Weights {
    format: Format,
    rows: usize,
    cols: usize,
    floats: Vec<f32>,
    halves: Vec<u16>,
    bytes: Vec<u8>,
    /// `[rows, cols]`
    values: Vec<f32>,
}

impl Weights {
    fn new(format: Format, rows: usize, cols: usize, seed: u64) -> Weights {
        let (panels, groups) = (rows.div_ceil(PANEL), cols.div_ceil(GROUP));
        let (mut floats, mut halves, mut bytes) = (vec![0.0; 1], vec![0; 1], vec![0; 1]);
        match format {
            Format::F32 => floats.resize(1 + panels * PANEL * cols, 0.0),
            Format::Bf16 | Format::F16 => halves.resize(1 + panels * PANEL * cols, 0),
            Format::Q8 => bytes.resize(1 + panels * groups * Q8_BLOCK, 0),
            Format::Q4 => bytes.resize(1 + panels * groups * Q4_BLOCK, 0x88),
        }
        let random = noise(rows * cols, seed);
        let scales = noise(rows * groups, seed + 1);
        let mut values = vec![0.0; rows * cols];
        for row in 0..rows {
            let (panel, r) = (row / PANEL, row % PANEL);
            for k in 0..cols {
                let x = random[row * cols + k];
                let at = 1 + panel * PANEL * cols + PANEL * k;
                let (group, j) = (k / GROUP, k % GROUP);
                // A Q4 scale is positive and has no last three bits; its zero point takes every
                // value in turn.
                let mut scale = f32_to_f16(scales[row * groups + group]);
                let zero = ((row + 3 * group) % 16) as u16;
                let mut word = scale;
                if format == Format::Q4 {
                    scale &= 0x7ff8;
                    word = scale << 1 | zero;
                }
                let block = 1
                    + (panel * groups + group)
                        * if format == Format::Q8 { Q8_BLOCK } else { Q4_BLOCK };
                if matches!(format, Format::Q8 | Format::Q4) {
                    bytes[block + 2 * r..block + 2 * r + 2].copy_from_slice(&word.to_le_bytes());
                }
                values[row * cols + k] = match format {
                    Format::F32 => {
                        floats[at + r] = x;
                        x
                    }
                    Format::Bf16 => {
                        let bits = (x.to_bits() >> 16) as u16;
                        halves[at + 8 * (r / 4 % 2) + 4 * (r / 8) + r % 4] = bits;
                        f32::from_bits(u32::from(bits) << 16)
                    }
                    Format::F16 => {
                        halves[at + r] = f32_to_f16(x);
                        f16_to_f32(f32_to_f16(x))
                    }
                    Format::Q8 => {
                        // Stretched, so that the largest magnitudes occur often.
                        let q = (x * 160.0).round().clamp(-127.0, 127.0);
                        bytes[block + 32 + 32 * (j / 2) + 2 * r + j % 2] = q as i8 as u8;
                        f16_to_f32(scale) * q
                    }
                    Format::Q4 => {
                        let nibble = (8.0 + x * 10.0).round().clamp(0.0, 15.0);
                        let byte = &mut bytes[block + 32 + 32 * (j / 4) + 4 * (r % 8) + j % 4];
                        *byte = if r < 8 {
                            *byte & 0xf0 | nibble as u8
                        } else {
                            *byte & 0x0f | (nibble as u8) << 4
                        };
                        f16_to_f32(scale) * (nibble - 4.0 - f32::from(zero) / 2.0)
                    }
                };
            }
        }
        Weights { format, rows, cols, floats, halves, bytes, values }
    }

    fn panels(&self) -> Panels<'_> {
        let data = match self.format {
            Format::F32 => PanelData::F32(&self.floats[1..]),
            Format::Bf16 => PanelData::Bf16(&self.halves[1..]),
            Format::F16 => PanelData::F16(&self.halves[1..]),
            Format::Q8 => PanelData::Q8(&self.bytes[1..]),
            Format::Q4 => PanelData::Q4(&self.bytes[1..]),
        };
        Panels::new(data, self.rows, self.cols)
    }

    /// The product of a row with a token, rounded as `kind` says, in f64, and how far f32
    /// arithmetic may be from it.
    ///
    /// Each of the n products and sums rounds once, relative to at most the sum of magnitudes.
    fn dot(&self, row: usize, x: &[f32], kind: InputKind) -> (f64, f64) {
        let w = &self.values[row * self.cols..(row + 1) * self.cols];
        let (mut sum, mut magnitude) = (0.0, 0.0);
        for (w, x) in w.chunks(GROUP).zip(x.chunks(GROUP)) {
            let largest = x.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
            let round = |x: f32, limit: f32| {
                f64::from((x * (limit / largest)).round_ties_even() * (largest / limit))
            };
            for (&w, &x) in w.iter().zip(x) {
                let x = match kind {
                    InputKind::Int16 => round(x, 32767.0),
                    InputKind::Int8 => round(x, 127.0),
                    InputKind::Bf16 => f64::from(bf16_to_f32(f32_to_bf16(x))),
                    InputKind::Float => f64::from(x),
                };
                sum += f64::from(w) * x;
                magnitude += (f64::from(w) * x).abs();
            }
        }
        // The scales of both sides are products themselves: a few roundings more.
        let terms = self.cols as f64 + 4.0;
        (sum, terms * f64::from(f32::EPSILON) * magnitude + 1.0e-30)
    }
}

/// A strided output block with NaN between and sentinels around.
struct Output {
    buffer: Guarded,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Output {
    fn new(rows: usize, cols: usize, fill: f32) -> Output {
        let stride = cols + rows % 3;
        let len = if rows == 0 { 0 } else { (rows - 1) * stride + cols };
        let values = (0..len).map(|i| if i % stride.max(1) < cols { fill } else { f32::NAN });
        Output { buffer: Guarded::of(values, cols % 4), rows, cols, stride }
    }

    fn block(&mut self) -> MatMut<'_> {
        MatMut::new(&mut self.buffer, self.rows, self.cols, self.stride)
    }

    fn check(&self, what: &str, expected: impl Fn(usize, usize) -> (f64, f64)) {
        for (i, &found) in self.buffer.iter().enumerate() {
            let (t, c) = (i / self.stride, i % self.stride);
            if c >= self.cols {
                assert!(found.is_nan(), "{what}: wrote {found} between the rows, at [{t}, {c}]");
                continue;
            }
            let (value, tolerance) = expected(t, c);
            let error = (f64::from(found) - value).abs();
            assert!(
                error <= tolerance,
                "{what}: [{t}, {c}] is {found}, expected {value} within {tolerance:e}"
            );
        }
    }
}

fn check_matmul(format: Format, rows: usize, cols: usize, tokens: usize, panels: Range<usize>) {
    let weights = Weights::new(format, rows, cols, (rows * 1000 + cols) as u64);
    let x = Guarded::of(noise(tokens * cols, tokens as u64), 1);
    let covered = weights.panels().rows_in(&panels);
    let first = panels.start * PANEL;
    let mut bits = [const { None }; 2];
    for isa in Isa::all() {
        let mut input = Input::new();
        input.prepare(isa, InputKind::of(isa, &weights.panels().data()), &x, tokens, cols);
        for ((store, old), bits) in
            [(Store::Set, f32::NAN), (Store::Add, 3.0)].into_iter().zip(&mut bits)
        {
            let mut out = Output::new(tokens, covered, old);
            matmul(isa, weights.panels(), panels.clone(), &input, out.block(), store);
            let base = if store == Store::Set { 0.0 } else { 3.0 };
            let what = format!(
                "{isa} {format:?} [{rows}, {cols}] x {tokens} tokens, panels {panels:?}, {store:?}"
            );
            out.check(&what, |t, c| {
                let (sum, tolerance) =
                    weights.dot(first + c, &x[t * cols..(t + 1) * cols], input.kind());
                (base + sum, tolerance + base * 2.0 * f64::from(f32::EPSILON))
            });
            check_bits(isa, &input, format, &out, bits, &what);
        }
    }
}

/// What AVX2 gives, the instruction sets beyond it give too, of the same activations.
fn check_bits(
    isa: Isa,
    input: &Input,
    format: Format,
    out: &Output,
    bits: &mut Option<Vec<u32>>,
    what: &str,
) {
    if isa.has_avx2() && (format, input.kind()) != (Format::Q8, InputKind::Int8) {
        let found: Vec<_> = out.buffer.iter().map(|x| x.to_bits()).collect();
        assert!(*bits.get_or_insert_with(|| found.clone()) == found, "{what}: differs from AVX2");
    }
}

fn check_swiglu(format: Format, rows: usize, cols: usize, tokens: usize, panels: Range<usize>) {
    let gate = Weights::new(format, rows, cols, 77);
    let up = Weights::new(format, rows, cols, 99);
    let x = noise(tokens * cols, tokens as u64);
    let covered = gate.panels().rows_in(&panels);
    let first = panels.start * PANEL;
    let mut bits = None;
    for isa in Isa::all() {
        let mut input = Input::new();
        input.prepare(isa, InputKind::of(isa, &gate.panels().data()), &x, tokens, cols);
        let mut out = Output::new(tokens, covered, f32::NAN);
        matmul_swiglu(isa, gate.panels(), up.panels(), panels.clone(), &input, out.block());
        let what = format!(
            "{isa} {format:?} SwiGLU [{rows}, {cols}] x {tokens} tokens, panels {panels:?}"
        );
        out.check(&what, |t, c| {
            let x = &x[t * cols..(t + 1) * cols];
            let ((g, dg), (u, du)) =
                (gate.dot(first + c, x, input.kind()), up.dot(first + c, x, input.kind()));
            let silu = g / (1.0 + (-g).exp());
            // |silu'| <= 1.1; the function itself costs a few roundings.
            let own = 8.0 * f64::from(f32::EPSILON) * (silu * u).abs();
            (silu * u, own + 1.1 * dg * (u.abs() + du) + du * silu.abs() + 1.0e-30)
        });
        check_bits(isa, &input, format, &out, &mut bits, &what);
    }
}

#[test]
fn every_number_of_columns() {
    for format in FORMATS {
        for cols in 0..=130 {
            let tokens = [1, 2, 3, 4, 5, 6, 7, 13, 20][cols % 9];
            check_matmul(format, 33, cols, tokens, 0..3);
        }
        for cols in [255, 256, 257, 288, 511, 513, 800] {
            for tokens in [1, 6, 11] {
                check_matmul(format, 20, cols, tokens, 0..2);
            }
        }
        // Two pairs of panels and one left over.
        check_matmul(format, 75, 1300, 1, 0..5);
    }
    assert_entered("avx2::matmul");
}

#[test]
fn every_number_of_rows() {
    for format in FORMATS {
        for rows in 0..=130_usize {
            let tokens = [1, 8, 3, 16, 2, 31][rows % 6];
            check_matmul(format, rows, 40, tokens, 0..rows.div_ceil(PANEL));
        }
    }
    assert_entered("avx2::matmul");
}

#[test]
fn every_number_of_tokens() {
    for format in FORMATS {
        for tokens in (0..=14).chain([15, 16, 17, 64, 509, 510, 511, 512, 517]) {
            check_matmul(format, 17, if tokens > 64 { 33 } else { 270 }, tokens, 0..2);
        }
        // Several parts of the columns, each widened for all tiles.
        check_matmul(format, 17, 1100, 75, 0..2);
        // Two halves of a part, of which the second one is short, with three and with four panels.
        for cols in [129, 136, 200, 255, 383] {
            check_matmul(format, 40, cols, 25, 0..3);
            check_matmul(format, 64, cols, 24, 0..4);
        }
        check_swiglu(format, 40, 200, 25, 0..3);
    }
    assert_entered("avx2::matmul");
    assert_entered_avx512("columns::add_tiles");
    assert_entered_avx512("columns::second_half");
    assert_entered_avx512("codes::add_tiles");
}

#[test]
fn every_range_of_panels() {
    for format in FORMATS {
        for start in 0..=4 {
            for end in start..=4 {
                for tokens in [1, 9] {
                    check_matmul(format, 55, 64, tokens, start..end);
                    check_swiglu(format, 55, 64, tokens, start..end);
                }
            }
        }
    }
}

/// The bits of the products of `x [tokens, cols]` with all panels, with one matrix and with gate
/// and up.
fn bits(isa: Isa, kind: InputKind, weights: &[Weights; 2], x: &[f32]) -> Vec<u32> {
    let [gate, up] = weights.each_ref().map(Weights::panels);
    let tokens = x.len() / gate.cols();
    let mut input = Input::new();
    input.prepare(isa, kind, x, tokens, gate.cols());
    let rows = gate.rows();
    let mut out = vec![f32::NAN; 2 * tokens * rows];
    let (products, gated) = MatMut::new(&mut out, tokens, 2 * rows, 2 * rows).split_cols(rows);
    matmul(isa, gate, 0..gate.count(), &input, products, Store::Set);
    matmul_swiglu(isa, gate, up, 0..gate.count(), &input, gated);
    out.into_iter().map(f32::to_bits).collect()
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others() {
    // The panels make groups of each size, with a short last panel. The columns end within a part,
    // within a group and within a round of a kernel.
    let every: Vec<usize> = (2..=40).chain(127..=129).collect();
    let shapes = [(7 * PANEL - 5, 549, &every[..]), (2 * PANEL + 1, 1283, &[2, 6, 7, 27][..])];
    for (rows, cols, counts) in shapes {
        let most = counts[counts.len() - 1];
        for format in FORMATS {
            let weights = [5, 6].map(|seed| Weights::new(format, rows, cols, seed));
            let x = noise(most * cols, 7);
            for isa in Isa::all() {
                let kind = InputKind::of(isa, &weights[0].panels().data());
                // The reference multiplies row by row and is slow.
                let scalar = isa == Isa::scalar();
                let most = if scalar { 13 } else { most };
                let x = &x[..most * cols];
                let bits = |x: &[f32]| bits(isa, kind, &weights, x);
                let alone: Vec<u32> = x.chunks(cols).flat_map(bits).collect();
                for &tokens in counts.iter().filter(|&&tokens| tokens <= most) {
                    let found = bits(&x[..tokens * cols]);
                    let row = found.iter().zip(&alone).position(|(a, b)| a != b);
                    assert!(
                        row.is_none(),
                        "{isa} {format:?} [{rows}, {cols}]: row {:?} of {tokens} differs from the \
                         row alone",
                        row.map(|i| i / (2 * rows))
                    );
                }
            }
        }
    }
}

/// The isa, if its products take activations in bf16.
fn with_bf16_dot() -> Option<Isa> {
    let isa = Isa::avx512().filter(|isa| isa.has_bf16_dot());
    if isa.is_none() {
        eprintln!("not tested: this CPU has no AVX512-BF16");
    }
    isa
}

#[test]
fn activations_in_bf16() {
    let Some(isa) = with_bf16_dot() else { return };
    for cols in (0..=70).chain([127, 128, 255, 256, 257, 300, 513]) {
        for tokens in [1, 3, 6, 8, 23, 24, 28] {
            let rows = 3 * PANEL + 16 * (cols % 3) - 5;
            let weights = Weights::new(Format::Bf16, rows, cols, cols as u64);
            let x = noise(tokens * cols, tokens as u64);
            let mut input = Input::new();
            input.prepare(isa, InputKind::Bf16, &x, tokens, cols);
            let mut out = Output::new(tokens, rows, f32::NAN);
            let panels = weights.panels();
            matmul(isa, panels, 0..panels.count(), &input, out.block(), Store::Set);
            out.check(&format!("[{rows}, {cols}] x {tokens} tokens"), |t, c| {
                weights.dot(c, &x[t * cols..(t + 1) * cols], InputKind::Bf16)
            });
        }
    }
    assert_entered_avx512("columns::pairs");
}

#[test]
fn a_row_in_bf16_has_the_same_bits_alone_and_among_others() {
    let Some(isa) = with_bf16_dot() else { return };
    for (rows, cols) in [(7 * PANEL - 5, 549), (2 * PANEL + 1, 1282)] {
        let weights = [5, 6].map(|seed| Weights::new(Format::Bf16, rows, cols, seed));
        let x = noise(129 * cols, 7);
        let bits = |x: &[f32]| bits(isa, InputKind::Bf16, &weights, x);
        let alone: Vec<u32> = x.chunks(cols).flat_map(bits).collect();
        for tokens in (2..=40).chain(127..=129) {
            let found = bits(&x[..tokens * cols]);
            assert!(found == alone[..found.len()], "[{rows}, {cols}], {tokens} rows");
        }
    }
}

#[test]
#[should_panic(expected = "the weights take Float activations, got Bf16")]
fn activations_in_bf16_are_refused_without_the_instruction() {
    let weights = Weights::new(Format::Bf16, 16, 32, 1);
    let mut input = Input::new();
    input.prepare(Isa::scalar(), InputKind::Bf16, &[0.0; 32], 1, 32);
    let out = &mut [0.0; 16];
    matmul(Isa::scalar(), weights.panels(), 0..1, &input, MatMut::new(out, 1, 16, 16), Store::Set);
}

#[test]
fn swiglu_of_every_size() {
    for format in FORMATS {
        for cols in (0..=130).step_by(7).chain([300]) {
            for tokens in (0..=14).chain([64]) {
                check_swiglu(
                    format,
                    1 + cols % 35,
                    cols,
                    tokens,
                    0..(1 + cols % 35_usize).div_ceil(PANEL),
                );
            }
        }
    }
    assert_entered("avx2::matmul_swiglu");
}

#[test]
fn swiglu_of_extreme_numbers_agrees() {
    let (gate, up) = ([-89.0; PANEL], [f32::INFINITY; PANEL]);
    let [gate, up] = [&gate, &up].map(|weights| Panels::new(PanelData::F32(weights), PANEL, 1));
    for isa in Isa::all() {
        let mut input = Input::new();
        input.prepare(isa, InputKind::Float, &[1.0], 1, 1);
        let mut out = [f32::NAN; PANEL];
        matmul_swiglu(isa, gate, up, 0..1, &input, MatMut::new(&mut out, 1, PANEL, PANEL));
        // e^89 is beyond f32, e^HIGHEST is not.
        assert_eq!(out, [f32::NEG_INFINITY; PANEL], "{isa}");
    }
}

#[test]
fn extreme_integers_do_not_overflow() {
    // All weights and activations at their largest magnitude, with the signs that add up and
    // cancel. The words of Q4 have the largest zero point of either side.
    let one = f32_to_f16(1.0);
    let cases = [
        (Format::Q8, one, [0x7f, 0x81]),
        (Format::Q4, one << 1, [0x00, 0xff]),
        (Format::Q4, one << 1 | 15, [0x00, 0xff]),
    ];
    for (format, word, fill) in cases {
        for fill in fill {
            let mut weights = Weights::new(format, 16, 256, 5);
            let block = if format == Format::Q8 { Q8_BLOCK } else { Q4_BLOCK };
            for block in weights.bytes[1..].chunks_exact_mut(block) {
                block[..32].as_chunks_mut().0.fill(word.to_le_bytes());
                block[32..].fill(fill);
            }
            let w = match format {
                Format::Q8 => f32::from(fill as i8),
                _ => f32::from(fill & 15) - 4.0 - f32::from(word & 15) / 2.0,
            };
            for signs in [[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]] {
                for tokens in [1, 7] {
                    let x: Vec<f32> = (0..256 * tokens).map(|i| signs[i % 2] * 0.5).collect();
                    for isa in Isa::all() {
                        let mut input = Input::new();
                        input.prepare(
                            isa,
                            InputKind::of(isa, &weights.panels().data()),
                            &x,
                            tokens,
                            256,
                        );
                        let mut out = Output::new(tokens, 16, f32::NAN);
                        matmul(isa, weights.panels(), 0..1, &input, out.block(), Store::Set);
                        let expected = f64::from(w * 64.0 * (signs[0] + signs[1]));
                        let tolerance =
                            256.0 * f64::from(f32::EPSILON) * f64::from(w.abs()) * 128.0;
                        out.check("extremes", |_, _| (expected, tolerance));
                    }
                }
            }
        }
    }
}

#[test]
fn infinities_and_nans_are_not_hidden() {
    for format in FORMATS {
        let weights = Weights::new(format, 16, 64, 3);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for tokens in [1, 8, 30] {
                let mut x = noise(64 * tokens, 9);
                x[40] = bad;
                for isa in Isa::all() {
                    let mut input = Input::new();
                    input.prepare(
                        isa,
                        InputKind::of(isa, &weights.panels().data()),
                        &x,
                        tokens,
                        64,
                    );
                    let mut out = vec![0.0; 16 * tokens];
                    let block = MatMut::new(&mut out, tokens, 16, 16);
                    matmul(isa, weights.panels(), 0..1, &input, block, Store::Set);
                    assert!(
                        out[..16].iter().all(|x| !x.is_finite()),
                        "{isa} {format:?} {bad}: {:?}",
                        &out[..16]
                    );
                    assert!(
                        out[16..].iter().all(|x| x.is_finite()),
                        "another token of {isa} {format:?} {bad}"
                    );
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "the weights take Int16 activations, got Float")]
fn activations_of_another_kind_are_refused() {
    let weights = Weights::new(Format::Q8, 16, 32, 1);
    let mut input = Input::new();
    input.prepare(Isa::scalar(), InputKind::Float, &[0.0; 32], 1, 32);
    matmul(
        Isa::scalar(),
        weights.panels(),
        0..1,
        &input,
        MatMut::new(&mut [0.0; 16], 1, 16, 16),
        Store::Set,
    );
}

proptest! {
    #[test]
    fn any_shape(format in 0..5_usize, rows in 1..200_usize, cols in 1..600_usize, tokens in 0..40_usize, cut in 0.0..1.0_f64) {
        let panels = rows.div_ceil(PANEL);
        let start = (cut * panels as f64) as usize;
        check_matmul(FORMATS[format], rows, cols, tokens, start..panels);
    }
}
