//! Shared by the benches: inputs, weights that do not fit in a cache, the check before the clock
//! starts.

use std::time::Duration;

use criterion::Criterion;
use simd_kernels::{GROUP, Input, InputKind, Isa, MatMut, PANEL, PanelData, Panels, Store, matmul};

/// The weight formats by their names.
pub const FORMATS: [&str; 5] = ["f32", "bf16", "f16", "q8", "q4"];

/// Criterion for ratios within one run: many short groups rather than a few long ones.
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .configure_from_args()
}

/// Pseudo-random floats in −1..1, the same for the same seed.
pub fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    (0..len).map(|_| (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0
    }
}

/// Bytes that are sound weights in every format, so that one buffer larger than the caches serves
/// them all.
pub struct Weights(Vec<u64>);

impl Weights {
    /// About `bytes` of weights.
    ///
    /// Each 16 bits are a half between 1 and 2, which is also a bfloat16 (and the upper half of an
    /// f32) between 0.007 and 2; as Q8 they are scales of that size and integers of either sign, as
    /// Q4 scales near 0.007, any zero points and nibbles.
    pub fn new(bytes: usize) -> Weights {
        let mut random = Random(7);
        Weights(
            (0..bytes / 8)
                .map(|_| random.next() & 0x03ff_03ff_03ff_03ff | 0x3c00_3c00_3c00_3c00)
                .collect(),
        )
    }

    /// All of it as f32, to read through.
    pub fn floats(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }

    /// How many matrices `[rows, cols]` of a format there are.
    pub fn count(&self, format: &str, rows: usize, cols: usize) -> usize {
        8 * self.0.len() / bytes(format, rows, cols)
    }

    /// Matrix number `index`, modulo their count, so that weights in use come from memory and not
    /// from a cache.
    pub fn panels(&self, format: &str, rows: usize, cols: usize, index: usize) -> Panels<'_> {
        let len = bytes(format, rows, cols);
        let start = index % self.count(format, rows, cols) * len;
        let bytes = &bytemuck::cast_slice::<u64, u8>(&self.0)[start..start + len];
        let data = match format {
            "f32" => PanelData::F32(bytemuck::cast_slice(bytes)),
            "bf16" => PanelData::Bf16(bytemuck::cast_slice(bytes)),
            "f16" => PanelData::F16(bytemuck::cast_slice(bytes)),
            "q8" => PanelData::Q8(bytes),
            "q4" => PanelData::Q4(bytes),
            _ => panic!("unknown format {format}"),
        };
        Panels::new(data, rows, cols)
    }
}

/// Bytes of a packed matrix.
pub fn bytes(format: &str, rows: usize, cols: usize) -> usize {
    let (panels, groups) = (rows.div_ceil(PANEL), cols.div_ceil(GROUP));
    match format {
        "f32" => panels * PANEL * cols * 4,
        "bf16" | "f16" => panels * PANEL * cols * 2,
        "q8" => panels * groups * (32 + 512),
        "q4" => panels * groups * (32 + 256),
        _ => panic!("unknown format {format}"),
    }
}

/// Fails when two results of the same formula differ by more than `tolerance(|expected|)`.
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: impl Fn(f32) -> f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(
            error <= tolerance(expected.abs()),
            "{what}: element {i} is {found}, the reference says {expected}"
        );
    }
}

/// Fails when `isa` and the scalar reference give different products of these weights.
///
/// Inputs are positive and so are nearly all weights: the sum of magnitudes is at most some eight
/// times the sum, and each of `cols` products and additions rounds by half an epsilon of it. Where
/// one has activations in int8 and the other in int16, each is off by at most half a step, of 127
/// to the largest, which is less than twice the mean: even if all were off one way that would be 1
/// / 127 of a sum of positive products, and half as much again is left for the few negative
/// weights.
pub fn check_matmul(isa: Isa, format: &str, w: Panels<'_>, tokens: usize) {
    let cols = w.cols();
    let x: Vec<f32> = noise(tokens * cols, 3).into_iter().map(|x| x + 1.5).collect();
    let panels = 0..w.count().min(3);
    let rows = w.rows_in(&panels);
    let run = |isa: Isa| {
        let (mut input, mut out) = (Input::new(), vec![f32::NAN; tokens * rows]);
        input.prepare(isa, InputKind::of(isa, &w.data()), &x, tokens, cols);
        matmul(
            isa,
            w,
            panels.clone(),
            &input,
            MatMut::new(&mut out, tokens, rows, rows),
            Store::Set,
        );
        out
    };
    let [kind, reference] = [isa, Isa::scalar()].map(|isa| InputKind::of(isa, &w.data()));
    let steps = if kind == reference { 0.0 } else { 3.0 * 0.5 / 127.0 };
    let tolerance = 8.0 * cols as f32 * f32::EPSILON + steps;
    assert_close(format, &run(isa), &run(Isa::scalar()), |expected| tolerance * expected);
}
