//! Packed weight matrices: sixteen output rows interleaved, so that a kernel reads one contiguous
//! stream.

use std::ops::Range;

use crate::half_float::{bf16_to_f32, f16_to_f32};

/// Output rows interleaved in one panel: two AVX2 registers of f32.
pub const PANEL: usize = 16;

/// Consecutive inputs (columns) of one row that share a quantization scale.
pub const GROUP: usize = 32;

/// Bytes of a Q8 block, the part of a panel that covers one group: 16 f16 scales, then 16 x 32
/// int8.
pub(crate) const Q8_BLOCK: usize = 2 * PANEL + PANEL * GROUP;

/// Bytes of a Q4 block: 16 words of scale and zero point, then 16 x 32 nibbles.
pub(crate) const Q4_BLOCK: usize = 2 * PANEL + PANEL * GROUP / 2;

/// The packed numbers of a weight matrix `[rows, cols]`: `ceil(rows / 16)` panels, one after the
/// other.
///
/// Below, `k` is the column and `r` the row within its panel. Rows beyond the matrix and columns
/// beyond the last group's end hold zeros (Q4: rows have scale 0, columns anything, since they meet
/// activations of 0).
#[derive(Clone, Copy, Debug)]
pub enum PanelData<'a> {
    /// `panel[16 k + r]`.
    F32(&'a [f32]),
    /// bfloat16 bits, `panel[16 k + 8 (r / 4 % 2) + 4 (r / 8) + r % 4]`: of a 32-byte load, the
    /// lower eight bytes of both halves interleaved with zeros are rows 0..8 as f32, the upper ones
    /// are rows 8..16.
    Bf16(&'a [u16]),
    /// Half-precision bits, `panel[16 k + r]`.
    F16(&'a [u16]),
    /// Blocks of 544 bytes, one per 32 columns: 16 little-endian f16 scales, row r at byte `2 r`,
    /// then int8 `q` in -127..=127, column `k` of the block at `32 (k / 2) + 2 r + k % 2`. The
    /// weight is `scale * q`.
    Q8(&'a [u8]),
    /// Blocks of 288 bytes, one per 32 columns: 16 little-endian words, row r at byte `2 r`, then
    /// bytes that hold nibbles `n`, column `k` of the block in byte `32 (k / 4) + 4 (r % 8) + k %
    /// 4`, row `r < 8` in the low nibble, row `r >= 8` in the high one. A word holds `z` = 0..=15
    /// in its lowest 4 bits and above them bits 3..15 of an f16 scale whose other bits are 0. The
    /// weight is `scale * (n - 4 - z / 2)`.
    Q4(&'a [u8]),
}

impl<'a> PanelData<'a> {
    /// Elements that one panel of `cols` columns takes in this format; more than there can be, if
    /// that does not fit.
    pub(crate) fn panel_len(&self, cols: usize) -> usize {
        match self {
            PanelData::F32(_) | PanelData::Bf16(_) | PanelData::F16(_) => {
                cols.saturating_mul(PANEL)
            }
            PanelData::Q8(_) => cols.div_ceil(GROUP).saturating_mul(Q8_BLOCK),
            PanelData::Q4(_) => cols.div_ceil(GROUP).saturating_mul(Q4_BLOCK),
        }
    }

    fn len(&self) -> usize {
        match self {
            PanelData::F32(data) => data.len(),
            PanelData::Bf16(data) | PanelData::F16(data) => data.len(),
            PanelData::Q8(data) | PanelData::Q4(data) => data.len(),
        }
    }

    /// Bytes of the numbers.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn bytes(&self) -> usize {
        match self {
            PanelData::F32(data) => size_of_val(*data),
            PanelData::Bf16(data) | PanelData::F16(data) => size_of_val(*data),
            PanelData::Q8(data) | PanelData::Q4(data) => data.len(),
        }
    }

    /// The address of the first number.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn start(&self) -> *const u8 {
        match self {
            PanelData::F32(data) => data.as_ptr().cast(),
            PanelData::Bf16(data) | PanelData::F16(data) => data.as_ptr().cast(),
            PanelData::Q8(data) | PanelData::Q4(data) => data.as_ptr(),
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            PanelData::F32(_) => "f32",
            PanelData::Bf16(_) => "bf16",
            PanelData::F16(_) => "f16",
            PanelData::Q8(_) => "q8",
            PanelData::Q4(_) => "q4",
        }
    }
}

/// A packed weight matrix `[rows, cols]`: [`PanelData`] with its shape.
#[derive(Clone, Copy, Debug)]
pub struct Panels<'a> {
    data: PanelData<'a>,
    rows: usize,
    cols: usize,
}

impl<'a> Panels<'a> {
    /// Views `data` as a matrix of `rows` outputs and `cols` inputs.
    ///
    /// # Panics
    /// When the length of `data` is not what the format takes for this shape.
    pub fn new(data: PanelData<'a>, rows: usize, cols: usize) -> Panels<'a> {
        let expected = rows.div_ceil(PANEL).saturating_mul(data.panel_len(cols));
        assert!(
            data.len() == expected,
            "{} panels of [{rows}, {cols}] take {expected} elements, got {}",
            data.name(),
            data.len()
        );
        Panels { data, rows, cols }
    }

    /// The packed numbers of all panels.
    pub fn data(&self) -> PanelData<'a> {
        self.data
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Panels: `ceil(rows / 16)`.
    pub fn count(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Rows that `panels` cover; the last panel of the matrix may be short.
    ///
    /// # Panics
    /// When the range goes beyond the matrix.
    pub fn rows_in(&self, panels: &Range<usize>) -> usize {
        assert!(
            panels.start <= panels.end && panels.end <= self.count(),
            "panels {panels:?} of a matrix that has {}",
            self.count()
        );
        panels.end.saturating_mul(PANEL).min(self.rows)
            - panels.start.saturating_mul(PANEL).min(self.rows)
    }

    /// Some columns of a panel, from the first column of a group on.
    pub(crate) fn part(&self, panel: usize, columns: &Range<usize>) -> PanelData<'a> {
        debug_assert!(
            columns.start.is_multiple_of(GROUP),
            "a part that starts at column {}",
            columns.start
        );
        let start = panel * self.stride();
        let part =
            start + self.data.panel_len(columns.start)..start + self.data.panel_len(columns.end);
        match self.data {
            PanelData::F32(data) => PanelData::F32(&data[part]),
            PanelData::Bf16(data) => PanelData::Bf16(&data[part]),
            PanelData::F16(data) => PanelData::F16(&data[part]),
            PanelData::Q8(data) => PanelData::Q8(&data[part]),
            PanelData::Q4(data) => PanelData::Q4(&data[part]),
        }
    }

    /// Elements per panel in the format's own unit (f32, u16 or byte).
    pub(crate) fn stride(&self) -> usize {
        self.data.panel_len(self.cols)
    }
}

/// Writes `panel` of float weights (one panel of `cols` columns, its numbers from the start of
/// `data`) as f32, `out[16 k + r]`.
pub(crate) fn widen_panel(data: PanelData<'_>, panel: usize, cols: usize, out: &mut [f32]) {
    let len = data.panel_len(cols);
    let range = panel * len..(panel + 1) * len;
    assert!(out.len() == cols * PANEL, "a panel of {cols} columns into {} numbers", out.len());
    match data {
        PanelData::F32(data) => out.copy_from_slice(&data[range]),
        PanelData::Bf16(data) => {
            for (out, column) in out.chunks_exact_mut(PANEL).zip(data[range].chunks_exact(PANEL)) {
                for (r, out) in out.iter_mut().enumerate() {
                    *out = bf16_to_f32(column[8 * (r / 4 % 2) + 4 * (r / 8) + r % 4]);
                }
            }
        }
        PanelData::F16(data) => {
            for (out, &bits) in out.iter_mut().zip(&data[range]) {
                *out = f16_to_f32(bits);
            }
        }
        PanelData::Q8(_) | PanelData::Q4(_) => {
            unreachable!("quantized weights are multiplied as they are")
        }
    }
}

/// The scale of row `r` in a Q8 block.
pub(crate) fn q8_scale(block: &[u8], r: usize) -> f32 {
    f16_to_f32(word(block, r))
}

/// The bits of a Q4 word above the zero point, moved down by one: those of the f16 scale.
pub(crate) const Q4_SCALE: u16 = 0x7ff8;

/// The scale of row `r` in a Q4 block, and its zero point `4 + z / 2`.
pub(crate) fn q4_scale(block: &[u8], r: usize) -> (f32, f32) {
    let word = word(block, r);
    (f16_to_f32(word >> 1 & Q4_SCALE), 4.0 + f32::from(word & 15) / 2.0)
}

fn word(block: &[u8], r: usize) -> u16 {
    u16::from_le_bytes([block[2 * r], block[2 * r + 1]])
}

/// The int8 of column `k` and row `r` in a Q8 block.
pub(crate) fn q8_at(block: &[u8], k: usize, r: usize) -> i8 {
    block[2 * PANEL + 2 * PANEL * (k / 2) + 2 * r + k % 2] as i8
}

/// The nibble of column `k` and row `r` in a Q4 block.
pub(crate) fn q4_at(block: &[u8], k: usize, r: usize) -> u8 {
    let byte = block[2 * PANEL + 2 * PANEL * (k / 4) + 4 * (r % 8) + k % 4];
    if r < 8 { byte & 15 } else { byte >> 4 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "got 0")]
    fn a_matrix_larger_than_memory_is_refused() {
        Panels::new(PanelData::F32(&[]), 1 << 60, 1 << 4);
    }

    #[test]
    #[should_panic(expected = "got 0")]
    fn a_panel_larger_than_memory_is_refused() {
        Panels::new(PanelData::F32(&[]), 1, 1 << 60);
    }

    #[test]
    fn rows_without_columns_are_counted() {
        let panels = Panels::new(PanelData::F32(&[]), usize::MAX, 0);
        assert_eq!(panels.rows_in(&(0..panels.count())), usize::MAX);
    }
}
