//! The block formats of GGUF files, as ggml defines them.

use std::{ops::Range, path::Path};

use half::f16;
use tensor::WeightFormat;

use crate::{
    CheckpointError,
    matrix::{Scratch, Stored},
    region::Region,
};

/// A type of GGUF tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types)]
pub(crate) enum GgmlType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Iq4Nl,
    Iq4Xs,
    Mxfp4,
}

impl GgmlType {
    /// The type of this number in a file; `None` for types that are not read.
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            20 => Self::Iq4Nl,
            23 => Self::Iq4Xs,
            30 => Self::Bf16,
            39 => Self::Mxfp4,
            _ => return None,
        })
    }

    /// Weights and bytes of a block.
    pub(crate) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 | Self::Iq4Nl => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Mxfp4 => (32, 17),
            Self::Q2_K => (256, 84),
            Self::Q3_K => (256, 110),
            Self::Q4_K => (256, 144),
            Self::Q5_K => (256, 176),
            Self::Q6_K => (256, 210),
            Self::Iq4Xs => (256, 136),
        }
    }

    /// The packed format with the same elements or groups, byte for byte.
    pub(crate) fn same_as(self) -> Option<WeightFormat> {
        match self {
            Self::F32 => Some(WeightFormat::F32),
            Self::F16 => Some(WeightFormat::F16),
            Self::Bf16 => Some(WeightFormat::Bf16),
            Self::Q8_0 => Some(WeightFormat::Q8),
            _ => None,
        }
    }

    /// Writes the weights of one block.
    fn decode(self, block: &[u8], out: &mut [f32]) {
        match self {
            Self::Q4_0 => nibbles(&block[2..], out, |code| half(block, 0) * (code as f32 - 8.0)),
            Self::Q4_1 => {
                nibbles(&block[4..], out, |code| half(block, 0) * code as f32 + half(block, 2));
            }
            Self::Q5_0 => {
                five(&block[2..6], &block[6..], out, |code| half(block, 0) * (code as f32 - 16.0))
            }
            Self::Q5_1 => five(&block[4..8], &block[8..], out, |code| {
                half(block, 0) * code as f32 + half(block, 2)
            }),
            Self::Iq4Nl => {
                nibbles(&block[2..], out, |code| half(block, 0) * f32::from(IQ4[code as usize]));
            }
            Self::Mxfp4 => {
                let scale = 2.0_f32.powi(i32::from(block[0]) - 128);
                let scale = if block[0] == 255 { f32::NAN } else { scale };
                nibbles(&block[1..], out, |code| scale * f32::from(MXFP4[code as usize]));
            }
            Self::Q2_K => q2_k(block, out),
            Self::Q3_K => q3_k(block, out),
            Self::Q4_K => q45_k(block, None, &block[16..], out),
            Self::Q5_K => q45_k(block, Some(&block[16..48]), &block[48..], out),
            Self::Q6_K => q6_k(block, out),
            Self::Iq4Xs => iq4_xs(block, out),
            Self::F32 | Self::F16 | Self::Bf16 | Self::Q8_0 => {
                unreachable!("read as the packed format with the same bytes")
            }
        }
    }
}

/// Values of the codes of IQ4_NL and IQ4_XS.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Twice the values of the codes of MXFP4.
const MXFP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 32 nibbles: the low ones of 16 bytes, then the high ones.
fn nibbles(codes: &[u8], out: &mut [f32], weight: impl Fn(u8) -> f32) {
    for (index, byte) in codes[..16].iter().enumerate() {
        out[index] = weight(byte & 15);
        out[index + 16] = weight(byte >> 4);
    }
}

/// 32 codes of 5 bits, whose highest bits are those of a word.
fn five(high: &[u8], codes: &[u8], out: &mut [f32], weight: impl Fn(u8) -> f32) {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    let bit = |index: usize| ((high >> index & 1) << 4) as u8;
    for (index, byte) in codes[..16].iter().enumerate() {
        out[index] = weight(byte & 15 | bit(index));
        out[index + 16] = weight(byte >> 4 | bit(index + 16));
    }
}

/// 16 bytes of scales and minima, 64 of codes, then two halves.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scale, min) = (half(block, 80), half(block, 82));
    for (part, out) in out.chunks_exact_mut(16).enumerate() {
        // Eight parts of 16 weights for each 32 bytes of codes, two of them at a shift.
        let (shift, first) = (part % 8 / 2 * 2, part / 8 * 32 + part % 2 * 16);
        let both = block[part];
        let (scale, min) = (scale * f32::from(both & 15), min * f32::from(both >> 4));
        for (out, byte) in out.iter_mut().zip(&block[16 + first..]) {
            *out = scale * f32::from(byte >> shift & 3) - min;
        }
    }
}

/// 32 bytes of highest bits, 64 of codes, 12 of scales, a half.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let scale = half(block, 108);
    let scales = &block[96..108];
    for (part, out) in out.chunks_exact_mut(16).enumerate() {
        let low = if part < 8 { scales[part] & 15 } else { scales[part - 8] >> 4 };
        let high = scales[8 + part % 4] >> (part / 4 * 2) & 3;
        let scale = scale * (f32::from(low | high << 4) - 32.0);
        let (shift, first) = (part % 8 / 2 * 2, part / 8 * 32 + part % 2 * 16);
        let mask = 1 << (part / 2);
        for (index, out) in out.iter_mut().enumerate() {
            let code = block[32 + first + index] >> shift & 3;
            let high = if block[part % 2 * 16 + index] & mask == 0 { 4.0 } else { 0.0 };
            *out = scale * (f32::from(code) - high);
        }
    }
}

/// Q4_K and Q5_K: two halves, 12 bytes of scales and minima, for Q5_K 32 bytes of highest bits, and
/// 128 bytes of nibbles.
fn q45_k(block: &[u8], high: Option<&[u8]>, codes: &[u8], out: &mut [f32]) {
    let (scale, min) = (half(block, 0), half(block, 2));
    let packed = &block[4..16];
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (own, own_min) = if part < 4 {
            (packed[part] & 63, packed[part + 4] & 63)
        } else {
            let low = packed[part + 4];
            (low & 15 | packed[part - 4] >> 6 << 4, low >> 4 | packed[part] >> 6 << 4)
        };
        let (scale, min) = (scale * f32::from(own), min * f32::from(own_min));
        for (index, out) in out.iter_mut().enumerate() {
            let code = codes[part / 2 * 32 + index] >> (part % 2 * 4) & 15;
            let high = high.map_or(0, |high| (high[index] >> part & 1) << 4);
            *out = scale * f32::from(code | high) - min;
        }
    }
}

/// 128 bytes of low nibbles, 64 of high pairs of bits, 16 scales, a half.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let scale = half(block, 208);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        // Four parts of 32 weights for each 64 bytes of nibbles and 32 of pairs.
        let (half, quarter) = (part / 4, part % 4);
        for (index, out) in out.iter_mut().enumerate() {
            let low = block[half * 64 + quarter % 2 * 32 + index] >> (quarter / 2 * 4) & 15;
            let high = block[128 + half * 32 + index] >> (quarter * 2) & 3;
            let own = block[192 + part * 2 + index / 16] as i8;
            *out = scale * f32::from(own) * (f32::from(low | high << 4) - 32.0);
        }
    }
}

/// A half, a word and 4 bytes of scales, 128 bytes of nibbles.
fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let scale = half(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let low = block[4 + part / 2] >> (part % 2 * 4) & 15;
        let own = low | ((high >> (2 * part) & 3) as u8) << 4;
        let scale = scale * (f32::from(own) - 32.0);
        nibbles(&block[8 + part * 16..], out, |code| scale * f32::from(IQ4[code as usize]));
    }
}

/// A matrix of blocks. Columns may be cut inside of a block.
#[derive(Debug)]
pub(crate) struct Ggml {
    region: Region,
    kind: GgmlType,
    cols: usize,
}

impl Ggml {
    /// `region` holds rows of whole blocks of `kind`, `cols` weights in all.
    pub(crate) fn new(region: Region, kind: GgmlType, cols: usize) -> Self {
        let (weights, bytes) = kind.block();
        assert_eq!(region.row_bytes, cols / weights * bytes, "checked with the header");
        Self { region, kind, cols }
    }
}

impl Stored for Ggml {
    fn name(&self) -> &str {
        &self.region.name
    }

    fn file(&self) -> &Path {
        self.region.path()
    }

    fn shape(&self) -> [usize; 2] {
        [self.region.rows, self.cols]
    }

    fn packed_format(&self) -> WeightFormat {
        WeightFormat::Q8
    }

    fn exact_format(&self, _: &Range<usize>) -> WeightFormat {
        WeightFormat::F32
    }

    fn read_f32(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        let (weights, size) = self.kind.block();
        let blocks = cols.start / weights..cols.end.div_ceil(weights);
        let row_bytes = blocks.len() * size;
        let Scratch { merged, encoded, values, .. } = scratch;
        let bytes = encoded.bytes(rows.len() * row_bytes);
        self.region.read(rows.clone(), blocks.start * size..blocks.end * size, bytes, merged)?;
        values.resize(blocks.len() * weights, 0.0);
        let skipped = cols.start - blocks.start * weights;
        let of_rows = bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(cols.len()));
        for (row, (bytes, out)) in rows.zip(of_rows) {
            let blocks = bytes.chunks_exact(size).zip(values.chunks_exact_mut(weights));
            blocks.for_each(|(block, values)| self.kind.decode(block, values));
            out.copy_from_slice(&values[skipped..][..cols.len()]);
            if let Some(found) = out.iter().find(|value| !value.is_finite()) {
                return Err(self.region.not_finite(row, *found));
            }
        }
        Ok(())
    }

    fn read_encoded(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        self.read_f32(rows, cols, bytemuck::cast_slice_mut(out), scratch)
    }
}
