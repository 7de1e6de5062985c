//! How f32 payloads travel: as they are, rounded to bf16, or as int8 in groups with a scale.

use std::fmt;
use std::str::FromStr;

/// Elements that share a scale in [`WireFormat::Q8`].
pub const WIRE_GROUP: usize = 32;

/// The encoding of f32 sums between ranks. Sums are formed in f32 whatever travels.
///
/// An Allreduce rounds the input of each rank to this format, adds them in rank order, and rounds
/// the result, whether or not these numbers travel. A sum is therefore the same whatever its place
/// in a message and the length of that message. Groups of `Q8` start at multiples of 32 elements:
/// where rows must not influence each other, they are padded to whole groups.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(u8)]
pub enum WireFormat {
    /// 4 bytes an element, exact.
    #[default]
    F32,
    /// 2 bytes an element: the upper half of the f32, rounded to nearest even.
    Bf16,
    /// 36 bytes per group of 32 elements: an f32 scale, then int8.
    Q8,
}

impl WireFormat {
    /// All formats, each at the place that its number says.
    pub const ALL: [WireFormat; 3] = [WireFormat::F32, WireFormat::Bf16, WireFormat::Q8];

    /// `"f32"`, `"bf16"` or `"q8"`.
    pub fn name(self) -> &'static str {
        match self {
            WireFormat::F32 => "f32",
            WireFormat::Bf16 => "bf16",
            WireFormat::Q8 => "q8",
        }
    }

    /// Bytes that `elements` values take.
    pub const fn encoded_bytes(self, elements: usize) -> usize {
        match self {
            WireFormat::F32 => 4 * elements,
            WireFormat::Bf16 => 2 * elements,
            WireFormat::Q8 => elements + 4 * elements.div_ceil(WIRE_GROUP),
        }
    }

    /// Bytes that blocks of so many values take, each encoded by itself.
    pub(crate) fn encoded_blocks(self, counts: &[usize]) -> usize {
        counts.iter().map(|&count| self.encoded_bytes(count)).sum()
    }
}

/// What becomes of decoded values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fold {
    /// They replace the accumulator.
    Set,
    /// They are added to it.
    Add,
    /// The larger one stays; a number beats NaN.
    Max,
}

impl WireFormat {
    /// Encodes `values` into the front of `bytes`.
    pub(crate) fn encode(self, values: &[f32], bytes: &mut [u8]) {
        let bytes = &mut bytes[..self.encoded_bytes(values.len())];
        match self {
            WireFormat::F32 => bytes.copy_from_slice(bytemuck::cast_slice(values)),
            WireFormat::Bf16 => {
                for (value, out) in values.iter().zip(bytes.chunks_exact_mut(2)) {
                    out.copy_from_slice(&to_bf16(*value).to_ne_bytes());
                }
            }
            WireFormat::Q8 => {
                let (groups, rest) = values.as_chunks::<WIRE_GROUP>();
                let (whole, last) = bytes.split_at_mut(groups.len() * (WIRE_GROUP + 4));
                for (group, out) in groups.iter().zip(whole.as_chunks_mut::<{ WIRE_GROUP + 4 }>().0)
                {
                    encode_group(group, out);
                }
                if !rest.is_empty() {
                    encode_group(rest, last);
                }
            }
        }
    }

    /// Folds `values` into `into` as they are after they have travelled: encoded and decoded.
    pub(crate) fn fold_rounded(self, values: &[f32], into: &mut [f32], fold: Fold) {
        if self == WireFormat::F32 {
            return self.decode(bytemuck::cast_slice(values), into, fold);
        }
        const BLOCK: usize = 8 * WIRE_GROUP;
        let mut bytes = [0; 4 * BLOCK];
        for (values, into) in values.chunks(BLOCK).zip(into.chunks_mut(BLOCK)) {
            self.encode(values, &mut bytes);
            self.decode(&bytes, into, fold);
        }
    }

    /// Decodes the front of `bytes` and folds it into `into`.
    #[inline]
    pub(crate) fn decode(self, bytes: &[u8], into: &mut [f32], fold: Fold) {
        let bytes = &bytes[..self.encoded_bytes(into.len())];
        match fold {
            Fold::Set if self == WireFormat::F32 => {
                bytemuck::cast_slice_mut(into).copy_from_slice(bytes);
            }
            Fold::Set => self.decode_with(bytes, into, |_, value| value),
            Fold::Add => self.decode_with(bytes, into, |sum, value| sum + value),
            Fold::Max => self.decode_with(bytes, into, larger),
        }
    }

    #[inline(always)]
    fn decode_with(self, bytes: &[u8], into: &mut [f32], fold: impl Fn(f32, f32) -> f32) {
        match self {
            WireFormat::F32 => {
                for (into, bytes) in into.iter_mut().zip(bytes.chunks_exact(4)) {
                    let value = f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    *into = fold(*into, value);
                }
            }
            WireFormat::Bf16 => {
                for (into, bytes) in into.iter_mut().zip(bytes.chunks_exact(2)) {
                    let bits = u16::from_ne_bytes([bytes[0], bytes[1]]);
                    *into = fold(*into, f32::from_bits((bits as u32) << 16));
                }
            }
            WireFormat::Q8 => {
                let (groups, rest) = into.as_chunks_mut::<WIRE_GROUP>();
                let (whole, last) = bytes.split_at(groups.len() * (WIRE_GROUP + 4));
                for (group, bytes) in
                    groups.iter_mut().zip(whole.as_chunks::<{ WIRE_GROUP + 4 }>().0)
                {
                    decode_group(bytes, group, &fold);
                }
                if !rest.is_empty() {
                    decode_group(last, rest, &fold);
                }
            }
        }
    }
}

// The loops below and above are written so that the compiler makes vectors of them on any
// processor: no calls, no order of floating-point operations to keep, and in whole groups a known
// number of rounds.

/// The scale and the values of a group in steps of it. A group with an infinity or NaN comes out as
/// NaN: nothing broken passes for a number.
#[inline(always)]
fn encode_group(group: &[f32], out: &mut [u8]) {
    // Bits of values without their sign are ordered as the values are, with NaN above all.
    let largest = group
        .iter()
        .fold(0, |largest: i32, value| largest.max((value.to_bits() & 0x7fff_ffff) as i32));
    let scale = f32::from_bits(largest as u32) / 127.0;
    // The inverse of anything smaller could be infinite.
    let inverse = if scale >= f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
    let (head, tail) = out.split_at_mut(4);
    head.copy_from_slice(&scale.to_ne_bytes());
    for (value, out) in group.iter().zip(tail) {
        // Where the numbers lie one apart, an addition rounds to the nearest whole one, the even
        // one of two, and leaves it in the low bits.
        const ONE_APART: f32 = (3 << 22) as f32;
        *out = (value * inverse + ONE_APART).to_bits() as u8;
    }
}

#[inline(always)]
fn decode_group(bytes: &[u8], group: &mut [f32], fold: impl Fn(f32, f32) -> f32) {
    let (head, tail) = bytes.split_at(4);
    let scale = f32::from_ne_bytes([head[0], head[1], head[2], head[3]]);
    for (into, byte) in group.iter_mut().zip(tail) {
        *into = fold(*into, scale * (*byte as i8 as f32));
    }
}

/// The larger of two values, the first of equals; a number beats NaN. The same bits for the same
/// order.
#[inline]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if b > a || a.is_nan() { b } else { a }
}

/// The nearest bf16, the even one of two.
#[inline]
fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    // Rounding could carry a NaN's payload away and leave an infinity.
    if value.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded }
}

impl fmt::Display for WireFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text is none of `f32`, `bf16`, `q8`.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("wire format is '{found}', expected f32, bf16 or q8")]
pub struct UnknownWireFormat {
    /// The text.
    pub found: String,
}

impl FromStr for WireFormat {
    type Err = UnknownWireFormat;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        WireFormat::ALL
            .into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| UnknownWireFormat { found: text.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(wire: WireFormat, values: &[f32]) -> Vec<f32> {
        let mut bytes = vec![0xaa; wire.encoded_bytes(values.len()) + 3];
        wire.encode(values, &mut bytes);
        assert_eq!(bytes[bytes.len() - 3..], [0xaa; 3], "{wire} writes beyond its bytes");
        let mut out = vec![f32::NAN; values.len()];
        wire.decode(&bytes, &mut out, Fold::Set);
        let mut twice = out.clone();
        wire.decode(&bytes, &mut twice, Fold::Add);
        assert!(out.iter().zip(&twice).all(|(a, b)| 2.0 * a == *b));
        out
    }

    #[test]
    fn every_length_comes_back_within_the_step_of_its_format() {
        for len in 0..=130 {
            let values: Vec<f32> =
                (0..len).map(|i| ((i * 37 + 11) % 101) as f32 / 7.0 - 6.5).collect();
            assert_eq!(round_trip(WireFormat::F32, &values), values);
            for (value, back) in values.iter().zip(round_trip(WireFormat::Bf16, &values)) {
                assert!((value - back).abs() <= value.abs() / 256.0, "{value} came back as {back}");
            }
            for (group, back) in values
                .chunks(WIRE_GROUP)
                .zip(round_trip(WireFormat::Q8, &values).chunks(WIRE_GROUP))
            {
                let largest = group.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                for (value, back) in group.iter().zip(back) {
                    let step = largest / 127.0;
                    assert!((value - back).abs() <= 0.5001 * step, "{value} came back as {back}");
                }
            }
        }
    }

    #[test]
    fn q8_rounds_ties_to_even_and_has_steps_for_the_smallest_numbers() {
        let mut bytes = [0; 4 + 7];
        WireFormat::Q8.encode(&[127.0, 0.5, 1.5, -0.5, -1.5, -127.0, 126.51], &mut bytes);
        assert_eq!(
            bytes[4..].iter().map(|byte| *byte as i8).collect::<Vec<_>>(),
            [127, 0, 2, 0, -2, -127, 127]
        );
        for largest in
            [f32::MAX / 2.0, f32::MIN_POSITIVE, 127.0 * f32::MIN_POSITIVE, f32::from_bits(1), 0.0]
        {
            let values = [largest, -largest, largest / 3.0];
            let step = (largest / 127.0).max(f32::MIN_POSITIVE);
            for (value, back) in values.iter().zip(round_trip(WireFormat::Q8, &values)) {
                assert!(
                    (value - back).abs() <= 127.0 * f32::MIN_POSITIVE + 0.5001 * step,
                    "{value} came back as {back}"
                );
            }
        }
    }

    #[test]
    fn bf16_rounds_ties_to_even_and_keeps_what_is_not_finite() {
        let bits = |value: u32| f32::from_bits(value);
        assert_eq!(to_bf16(bits(0x3f80_8000)), 0x3f80);
        assert_eq!(to_bf16(bits(0x3f81_8000)), 0x3f82);
        assert_eq!(to_bf16(bits(0x3f80_8001)), 0x3f81);
        assert_eq!(to_bf16(f32::NEG_INFINITY), 0xff80);
        assert!(f32::from_bits((to_bf16(bits(0x7f80_0001)) as u32) << 16).is_nan());
        assert!(round_trip_nan(WireFormat::Q8) && round_trip_nan(WireFormat::Bf16));
    }

    fn round_trip_nan(wire: WireFormat) -> bool {
        let mut bytes = [0; 16];
        wire.encode(&[1.0, f32::NAN], &mut bytes);
        let mut out = [0.0; 2];
        wire.decode(&bytes, &mut out, Fold::Set);
        out[1].is_nan()
    }

    #[test]
    fn the_larger_is_a_number_wherever_there_is_one() {
        assert_eq!(larger(1.0, f32::NAN), 1.0);
        assert_eq!(larger(f32::NAN, 1.0), 1.0);
        assert_eq!(larger(-1.0, -2.0), -1.0);
        assert!(larger(f32::NAN, f32::NAN).is_nan());
    }

    #[test]
    fn names_parse_and_others_are_refused() {
        for wire in WireFormat::ALL {
            assert_eq!(wire.name().parse(), Ok(wire));
            assert_eq!(WireFormat::ALL[wire as usize], wire);
        }
        let error = "fp8".parse::<WireFormat>().unwrap_err();
        assert_eq!(error.to_string(), "wire format is 'fp8', expected f32, bf16 or q8");
    }
}
