//! Codes with scales in tensors of their own: FP8, GPTQ, AWQ and compressed-tensors.

use std::{ops::Range, path::Path};

use half::{bf16, f16};
use tensor::WeightFormat;

use crate::{
    CheckpointError,
    matrix::{Scratch, Stored},
    region::Region,
};

/// Where the code of a weight is.
#[derive(Debug)]
pub(crate) enum Codes {
    /// `[rows, cols]` codes of 4 or 8 bits, the lowest bits of a byte first.
    Rows { region: Region, bits: usize },
    /// GPTQ: `[cols / (32 / bits), rows]` words, the lowest bits first.
    Columns { region: Region, bits: usize },
    /// AWQ gemm: `[cols, rows / 8]` words of 4 bits in the order 0 2 4 6 1 3 5 7.
    Awq { region: Region },
}

/// What a code means before it is scaled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// A whole number from 0 on, of which the zero point is subtracted.
    Unsigned,
    /// A signed byte.
    Signed,
    /// An FP8 number of 4 exponent and 3 mantissa bits.
    E4m3,
    /// An FP4 number of 2 exponent bits and 1 mantissa bit.
    E2m1,
}

/// The number format of scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ScaleFormat {
    F32,
    F16,
    Bf16,
    E4m3,
    /// A power of two: 2^(byte − 127).
    E8m0,
}

/// Scales of blocks of `rows` x `cols` weights.
#[derive(Debug)]
pub(crate) struct Scales {
    pub region: Region,
    pub format: ScaleFormat,
    /// Whether the tensor is `[groups, rows]` instead of `[rows, groups]`.
    pub transposed: bool,
    /// Rows that share a scale.
    pub rows: usize,
    /// A divisor of all scales.
    pub divisor: f32,
}

/// Zero points of unsigned codes.
#[derive(Debug)]
pub(crate) enum Zeros {
    /// One for all.
    Constant(f32),
    /// GPTQ: `[groups, rows / (32 / bits)]` words; version 1 stores one less.
    Columns { region: Region, bits: usize, add: f32 },
    /// AWQ: `[groups, rows / 8]` words in the order of the codes.
    Awq { region: Region },
    /// compressed-tensors: `[rows / (32 / bits), groups]` words.
    Rows { region: Region, bits: usize },
}

/// The group of each column.
#[derive(Debug)]
pub(crate) enum Groups {
    /// Consecutive columns, so many a group.
    Size(usize),
    /// GPTQ with `desc_act`: one entry for each column.
    Index(Vec<u32>),
}

/// A matrix of codes.
#[derive(Debug)]
pub(crate) struct Coded {
    pub shape: [usize; 2],
    pub codes: Codes,
    pub meaning: Meaning,
    pub scales: Scales,
    pub zeros: Zeros,
    pub groups: Groups,
}

/// Place of row r % 8 among the nibbles of an AWQ word.
const AWQ_ORDER: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

impl Coded {
    fn region(&self) -> &Region {
        match &self.codes {
            Codes::Rows { region, .. } | Codes::Columns { region, .. } | Codes::Awq { region } => {
                region
            }
        }
    }

    fn group(&self, col: usize) -> usize {
        match &self.groups {
            Groups::Size(size) => col / size,
            Groups::Index(index) => index[col] as usize,
        }
    }

    /// The groups that the columns belong to, with those between them.
    fn group_span(&self, cols: &Range<usize>) -> Range<usize> {
        match &self.groups {
            Groups::Size(size) => cols.start / size..(cols.end - 1) / size + 1,
            Groups::Index(index) => {
                let index = &index[cols.clone()];
                let bound = |pick: Option<&u32>| *pick.expect("there are columns") as usize;
                bound(index.iter().min())..bound(index.iter().max()) + 1
            }
        }
    }

    /// Codes as numbers, `[rows, cols]`.
    fn read_codes(
        &self,
        rows: &Range<usize>,
        cols: &Range<usize>,
        out: &mut [f32],
        merged: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let width = cols.len();
        match &self.codes {
            Codes::Rows { region, bits } => {
                let per = 8 / bits;
                let span = cols.start / per..cols.end.div_ceil(per);
                let mut bytes = vec![0; rows.len() * span.len()];
                region.read(rows.clone(), span.clone(), &mut bytes, merged)?;
                let table: Vec<f32> = (0..=255).map(|code| self.number(code)).collect();
                let mask = (1_u32 << bits) - 1;
                for (bytes, out) in bytes.chunks_exact(span.len()).zip(out.chunks_exact_mut(width))
                {
                    for (col, out) in cols.clone().zip(out) {
                        let byte = u32::from(bytes[col / per - span.start]);
                        *out = table[(byte >> (col % per * bits) & mask) as usize];
                    }
                }
            }
            Codes::Columns { region, bits } => {
                let per = 32 / bits;
                let words = cols.start / per..cols.end.div_ceil(per);
                let words_of = read_words(region, words.clone(), rows.clone(), merged)?;
                let mask = (1_u32 << bits) - 1;
                for (r, out) in out.chunks_exact_mut(width).enumerate() {
                    for (col, out) in cols.clone().zip(out) {
                        let word = words_of[(col / per - words.start) * rows.len() + r];
                        *out = (word >> (col % per * bits) & mask) as f32;
                    }
                }
            }
            Codes::Awq { region } => {
                let span = rows.start / 8..rows.end.div_ceil(8);
                let words = read_words(region, cols.clone(), span.clone(), merged)?;
                for (row, out) in rows.clone().zip(out.chunks_exact_mut(width)) {
                    for (k, out) in out.iter_mut().enumerate() {
                        let word = words[k * span.len() + row / 8 - span.start];
                        *out = (word >> (4 * AWQ_ORDER[row % 8]) & 15) as f32;
                    }
                }
            }
        }
        Ok(())
    }

    fn number(&self, code: u8) -> f32 {
        match self.meaning {
            Meaning::Unsigned => f32::from(code),
            Meaning::Signed => f32::from(code as i8),
            Meaning::E4m3 => e4m3(code),
            Meaning::E2m1 => {
                let size = E2M1[usize::from(code & 7)];
                if code & 8 == 0 { size } else { -size }
            }
        }
    }

    /// Scales, `[rows, groups]`.
    fn read_scales(
        &self,
        rows: &Range<usize>,
        groups: &Range<usize>,
        merged: &mut Vec<u8>,
    ) -> Result<Vec<f32>, CheckpointError> {
        let Scales { region, format, transposed, rows: shared, divisor } = &self.scales;
        let size = format.bytes();
        let stored = rows.start / shared..(rows.end - 1) / shared + 1;
        let (outer, inner) = if *transposed { (groups, &stored) } else { (&stored, groups) };
        let mut bytes = vec![0; outer.len() * inner.len() * size];
        region.read(outer.clone(), inner.start * size..inner.end * size, &mut bytes, merged)?;
        let mut scales = Vec::with_capacity(rows.len() * groups.len());
        for row in rows.clone() {
            let r = row / shared - stored.start;
            for g in 0..groups.len() {
                let index = if *transposed { g * stored.len() + r } else { r * groups.len() + g };
                let scale = format.value(&bytes[index * size..][..size]) / divisor;
                if !scale.is_finite() {
                    return Err(region.not_finite(row, scale));
                }
                scales.push(scale);
            }
        }
        Ok(scales)
    }

    /// Zero points, `[rows, groups]`.
    fn read_zeros(
        &self,
        rows: &Range<usize>,
        groups: &Range<usize>,
        merged: &mut Vec<u8>,
    ) -> Result<Vec<f32>, CheckpointError> {
        let mut zeros = Vec::with_capacity(rows.len() * groups.len());
        let mut each = |zero: &dyn Fn(usize, usize) -> f32| {
            for row in rows.clone() {
                zeros.extend((0..groups.len()).map(|g| zero(row, g)));
            }
        };
        match &self.zeros {
            Zeros::Constant(zero) => each(&|_, _| *zero),
            Zeros::Columns { region, bits, add } => {
                let per = 32 / bits;
                let span = rows.start / per..rows.end.div_ceil(per);
                let words = read_words(region, groups.clone(), span.clone(), merged)?;
                let mask = (1_u32 << bits) - 1;
                each(&|row, g| {
                    let word = words[g * span.len() + row / per - span.start];
                    (word >> (row % per * bits) & mask) as f32 + add
                });
            }
            Zeros::Awq { region } => {
                let span = rows.start / 8..rows.end.div_ceil(8);
                let words = read_words(region, groups.clone(), span.clone(), merged)?;
                each(&|row, g| {
                    let word = words[g * span.len() + row / 8 - span.start];
                    (word >> (4 * AWQ_ORDER[row % 8]) & 15) as f32
                });
            }
            Zeros::Rows { region, bits } => {
                let per = 32 / bits;
                let span = rows.start / per..rows.end.div_ceil(per);
                let words = read_words(region, span.clone(), groups.clone(), merged)?;
                let mask = (1_u32 << bits) - 1;
                each(&|row, g| {
                    let word = words[(row / per - span.start) * groups.len() + g];
                    (word >> (row % per * bits) & mask) as f32
                });
            }
        }
        Ok(zeros)
    }
}

impl Stored for Coded {
    fn name(&self) -> &str {
        &self.region().name
    }

    fn file(&self) -> &Path {
        self.region().path()
    }

    fn shape(&self) -> [usize; 2] {
        self.shape
    }

    fn packed_format(&self) -> WeightFormat {
        packed_format(self.meaning)
    }

    fn exact_format(&self, _: &Range<usize>) -> WeightFormat {
        WeightFormat::F32
    }

    fn by_columns(&self) -> bool {
        !matches!(self.codes, Codes::Rows { .. })
    }

    fn read_f32(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        let merged = &mut scratch.merged;
        self.read_codes(&rows, &cols, out, merged)?;
        let groups = self.group_span(&cols);
        let scales = self.read_scales(&rows, &groups, merged)?;
        let zeros = self.read_zeros(&rows, &groups, merged)?;
        let of_row = scales.chunks_exact(groups.len()).zip(zeros.chunks_exact(groups.len()));
        for ((row, out), (scales, zeros)) in rows.zip(out.chunks_exact_mut(cols.len())).zip(of_row)
        {
            for (col, out) in cols.clone().zip(out) {
                let group = self.group(col) - groups.start;
                *out = (*out - zeros[group]) * scales[group];
                // FP8 has a code for NaN.
                if !out.is_finite() {
                    return Err(self.region().not_finite(row, *out));
                }
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

/// The format in which codes are kept unless the user chooses one.
pub(crate) fn packed_format(meaning: Meaning) -> WeightFormat {
    match meaning {
        // 3 mantissa bits times a scale fit neither 16-bit format.
        Meaning::E4m3 => WeightFormat::F32,
        Meaning::Unsigned | Meaning::Signed | Meaning::E2m1 => WeightFormat::Q8,
    }
}

/// Words of a rectangle of a tensor of 32-bit words, row by row.
fn read_words(
    region: &Region,
    rows: Range<usize>,
    cols: Range<usize>,
    merged: &mut Vec<u8>,
) -> Result<Vec<u32>, CheckpointError> {
    let mut words = vec![0; rows.len() * cols.len()];
    region.read(
        rows,
        cols.start * 4..cols.end * 4,
        bytemuck::cast_slice_mut(&mut words),
        merged,
    )?;
    Ok(words)
}

impl ScaleFormat {
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::E4m3 | Self::E8m0 => 1,
        }
    }

    pub(crate) fn value(self, bytes: &[u8]) -> f32 {
        let half = || [bytes[0], bytes[1]];
        match self {
            Self::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            Self::F16 => f16::from_le_bytes(half()).to_f32(),
            Self::Bf16 => bf16::from_le_bytes(half()).to_f32(),
            Self::E4m3 => e4m3(bytes[0]),
            Self::E8m0 if bytes[0] == 255 => f32::NAN,
            Self::E8m0 => 2.0_f32.powi(i32::from(bytes[0]) - 127),
        }
    }
}

/// The value of an FP8 number: sign, 4 exponent bits with a bias of 7, 3 mantissa bits; no
/// infinities, and NaN where all other bits are ones (Micikevicius et al. 2022).
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_numbers() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0xb8, -1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ] {
            assert_eq!(e4m3(code), value, "{code:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert_eq!(ScaleFormat::E8m0.value(&[127]), 1.0);
        assert_eq!(ScaleFormat::E8m0.value(&[120]), 1.0 / 128.0);
        assert!(ScaleFormat::E8m0.value(&[255]).is_nan());
    }
}
