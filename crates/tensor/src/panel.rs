//! The layout of one panel, [`PANEL`] rows interleaved so that a kernel reads one stream and needs
//! no horizontal sums.
//!
//! With k the column, r the row in the panel and g = k / 32 the group:
//!
//! - F32 and F16: element `k·16 + r`.
//! - Bf16: element `k·16 + 8·(r / 4 % 2) + 4·(r / 8) + r % 4`. A 32-byte load has rows 0..4 and
//!   8..12 in its lower 16 bytes, the others in its upper ones: interleaving zeros with the first 8
//!   bytes of both halves widens rows 0..8, with the last, rows 8..16.
//! - Q8: 544 bytes a group: 16 f16 scales, then code (k, r) at byte `32 + (k/2 % 16)·32 + 2·r + k %
//!   2`. Widening 16 bytes to 16 bits gives 8 rows x 2 columns, what a multiply-add of pairs takes.
//! - Q4: 288 bytes a group: 16 words of scale and zero point ([`GroupQ4`]), then code (k, r) in
//!   byte `32 + (k/4 % 8)·32 + 4·(r % 8) + k % 4`, the low nibble for r < 8, the high one for r ≥
//!   8.
//!
//! Rows that are missing in the last panel have scale 0. Columns missing in the last group have
//! code 0 in Q8 and any in Q4: they meet activations of 0.

use half::f16;

use crate::{
    GROUP, PANEL,
    quantize::{GroupQ4, GroupQ8},
};

/// Bytes of the scales at the start of a quantized block.
const SCALES: usize = 2 * PANEL;

/// Bytes of one group of a Q8 panel.
pub(crate) const BLOCK_Q8: usize = SCALES + PANEL * GROUP;

/// Bytes of one group of a Q4 panel.
pub(crate) const BLOCK_Q4: usize = SCALES + PANEL * GROUP / 2;

/// Columns moved at once: a cache line of each of 16 rows, read once, against 1 or 2 KiB of panel.
const STEP: usize = 32;

/// `tile` `[16, cols]` to `panel` `[cols, 16]`, for F32 and F16.
pub(crate) fn interleave<T: Copy>(tile: &[T], cols: usize, panel: &mut [T]) {
    for start in (0..cols).step_by(STEP) {
        let end = (start + STEP).min(cols);
        let out = &mut panel[start * PANEL..end * PANEL];
        for r in 0..PANEL {
            let row = &tile[r * cols + start..r * cols + end];
            for (slots, &value) in out.as_chunks_mut::<PANEL>().0.iter_mut().zip(row) {
                slots[r] = value;
            }
        }
    }
}

/// `tile` `[16, cols]` to `panel` in the Bf16 layout: pairs of rows r, r + 1 written together.
pub(crate) fn interleave_bf16(tile: &[u16], cols: usize, panel: &mut [u16]) {
    let panel: &mut [u32] = bytemuck::cast_slice_mut(panel);
    for start in (0..cols).step_by(STEP) {
        let end = (start + STEP).min(cols);
        let out = &mut panel[start * PANEL / 2..end * PANEL / 2];
        for r in (0..PANEL).step_by(2) {
            let low = &tile[r * cols + start..r * cols + end];
            let high = &tile[(r + 1) * cols + start..(r + 1) * cols + end];
            for ((slots, &low), &high) in
                out.as_chunks_mut::<{ PANEL / 2 }>().0.iter_mut().zip(low).zip(high)
            {
                slots[slot_bf16(r) / 2] = u32::from(low) | u32::from(high) << 16;
            }
        }
    }
}

/// Position of row `r` of a Bf16 panel among the 16 of its column.
pub(crate) fn slot_bf16(r: usize) -> usize {
    8 * (r / 4 % 2) + 4 * (r / 8) + r % 4
}

/// The groups of 16 rows to a Q8 block.
pub(crate) fn pack_q8(groups: &[GroupQ8; PANEL], block: &mut [u8]) {
    let (scales, codes) = block.split_at_mut(SCALES);
    for (r, group) in groups.iter().enumerate() {
        scales[2 * r..2 * r + 2].copy_from_slice(&group.scale.to_le_bytes());
        for (pair, out) in
            group.codes.as_chunks::<2>().0.iter().zip(codes.as_chunks_mut::<{ 2 * PANEL }>().0)
        {
            out[2 * r] = pair[0] as u8;
            out[2 * r + 1] = pair[1] as u8;
        }
    }
}

/// The groups of 16 rows to a Q4 block.
pub(crate) fn pack_q4(groups: &[GroupQ4; PANEL], block: &mut [u8]) {
    let (scales, codes) = block.split_at_mut(SCALES);
    for (r, group) in groups.iter().enumerate() {
        scales[2 * r..2 * r + 2].copy_from_slice(&group.word().to_le_bytes());
    }
    for r in 0..PANEL / 2 {
        let (low, high) =
            (groups[r].codes.as_chunks::<4>().0, groups[r + 8].codes.as_chunks::<4>().0);
        for ((low, high), out) in low.iter().zip(high).zip(codes.as_chunks_mut::<{ 2 * PANEL }>().0)
        {
            for k in 0..4 {
                out[4 * r + k] = low[k] | high[k] << 4;
            }
        }
    }
}

/// Weight (`k`, `r`) of a Q8 panel.
pub(crate) fn weight_q8(panel: &[u8], k: usize, r: usize) -> f32 {
    let block = &panel[k / GROUP * BLOCK_Q8..][..BLOCK_Q8];
    f16::from_bits(word(block, r)).to_f32()
        * f32::from(block[SCALES + k / 2 % (GROUP / 2) * 2 * PANEL + 2 * r + k % 2] as i8)
}

/// Weight (`k`, `r`) of a Q4 panel.
pub(crate) fn weight_q4(panel: &[u8], k: usize, r: usize) -> f32 {
    let block = &panel[k / GROUP * BLOCK_Q4..][..BLOCK_Q4];
    let byte = block[SCALES + k / 4 % (GROUP / 4) * 2 * PANEL + 4 * (r % 8) + k % 4];
    let code = if r < 8 { byte & 15 } else { byte >> 4 };
    let (scale, zero) = GroupQ4::from_word(word(block, r));
    scale.to_f32() * (f32::from(code) - 4.0 - f32::from(zero) / 2.0)
}

/// The 16 bits of row `r` before a block's codes.
fn word(block: &[u8], r: usize) -> u16 {
    u16::from_le_bytes([block[2 * r], block[2 * r + 1]])
}
