//! Buffers for tests: unaligned on purpose, with sentinels around them that a kernel must not
//! touch.

use std::ops::{Deref, DerefMut};

/// Around each buffer; a NaN with a payload that no arithmetic makes.
const SENTINEL: u32 = 0x7fc5_e417;
const MARGIN: usize = 16;

/// Every length from 0 to 130, each at offsets that are and are not multiples of the vector length.
pub(crate) fn lengths_and_offsets() -> impl Iterator<Item = (usize, usize)> {
    (0..=130).flat_map(|len| [0, 1, 3, 5].map(|offset| (len, offset)))
}

/// A slice of f32 inside a larger buffer of sentinels, which are checked when it is dropped.
pub(crate) struct Guarded {
    buffer: Vec<f32>,
    start: usize,
    len: usize,
}

impl Guarded {
    /// The values, `offset` floats after where they would otherwise lie.
    pub(crate) fn of(values: impl IntoIterator<Item = f32>, offset: usize) -> Guarded {
        let sentinel = f32::from_bits(SENTINEL);
        let start = MARGIN + offset;
        let mut buffer = vec![sentinel; start];
        buffer.extend(values);
        let len = buffer.len() - start;
        buffer.resize(start + len + MARGIN, sentinel);
        Guarded { buffer, start, len }
    }

    /// An output: `len` NaNs, so that an element left unwritten or read first is seen.
    pub(crate) fn output(len: usize, offset: usize) -> Guarded {
        Guarded::of(std::iter::repeat_n(f32::NAN, len), offset)
    }

    /// Fails where an element is further from `expected` than `tolerance` of the expected value (or
    /// is NaN).
    pub(crate) fn assert_close(&self, expected: &[f32], tolerance: impl Fn(f32) -> f32) {
        assert_eq!(self.len, expected.len());
        for (i, (&found, &expected)) in self.iter().zip(expected).enumerate() {
            let allowed = tolerance(expected.abs());
            assert!(
                (found - expected).abs() <= allowed,
                "element {i} of {}: {found}, expected {expected} within {allowed:e}",
                self.len
            );
        }
    }
}

impl Deref for Guarded {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.buffer[self.start..self.start + self.len]
    }
}

impl DerefMut for Guarded {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[self.start..self.start + self.len]
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let end = self.start + self.len;
        for (i, x) in self.buffer.iter().enumerate() {
            if i < self.start || i >= end {
                assert_eq!(
                    x.to_bits(),
                    SENTINEL,
                    "a kernel wrote {} floats outside a slice of {}",
                    if i < self.start { self.start - i } else { i + 1 - end },
                    self.len
                );
            }
        }
    }
}

/// Pseudo-random floats in −1..1, the same for the same seed (a 64-bit linear congruential
/// generator).
pub(crate) fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}
