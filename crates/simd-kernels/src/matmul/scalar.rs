//! The reference products in plain Rust, and where the instruction set asks for it
//! `matrixmultiply` for float weights.

use std::ops::Range;

use super::Store;
use crate::input::{FloatTile, Input, InputKind, IntTile};
use crate::matrix::MatMut;
use crate::pack::{EXCESS, split_pair};
use crate::panels::{
    GROUP, PANEL, PanelData, Panels, Q4_BLOCK, Q8_BLOCK, q4_at, q4_scale, q8_at, q8_scale,
    widen_panel,
};
use crate::swiglu::scalar::gated1;

pub(super) fn matmul(
    w: Panels<'_>,
    panels: Range<usize>,
    x: &Input,
    mut out: MatMut<'_>,
    store: Store,
    use_general: bool,
) {
    if use_general && x.kind() == InputKind::Float && x.cols() > 0 {
        return general(w, panels, x, out, store);
    }
    let mut widened = vec![0.0; if x.kind() == InputKind::Float { w.cols() * PANEL } else { 0 }];
    for (i, panel) in panels.enumerate() {
        if x.kind() == InputKind::Float {
            widen_panel(w.data(), panel, w.cols(), &mut widened);
        }
        for tile in 0..x.tiles() {
            for (i_token, token) in x.tile_tokens(tile).enumerate() {
                let sums = match w.data() {
                    PanelData::Q8(data) => {
                        dot_q8(&data[panel * w.stride()..][..w.stride()], x.int_tile(tile), i_token)
                    }
                    PanelData::Q4(data) => {
                        dot_q4(&data[panel * w.stride()..][..w.stride()], x.int_tile(tile), i_token)
                    }
                    _ => dot_float(&widened, x.float_tile(tile), i_token),
                };
                let row = out.row_mut(token);
                let end = row.len().min((i + 1) * PANEL);
                for (out, sum) in row[i * PANEL..end].iter_mut().zip(sums) {
                    match store {
                        Store::Set => *out = sum,
                        Store::Add => *out += sum,
                    }
                }
            }
        }
    }
}

pub(super) fn matmul_swiglu(
    gate: Panels<'_>,
    up: Panels<'_>,
    panels: Range<usize>,
    x: &Input,
    mut out: MatMut<'_>,
    use_general: bool,
) {
    let (tokens, rows) = (out.rows(), out.cols());
    let mut products = vec![0.0; tokens * rows];
    matmul(
        up,
        panels.clone(),
        x,
        MatMut::new(&mut products, tokens, rows, rows),
        Store::Set,
        use_general,
    );
    matmul(gate, panels, x, out.reborrow(), Store::Set, use_general);
    for (token, up) in products.chunks_exact(rows).enumerate() {
        for (out, &up) in out.row_mut(token).iter_mut().zip(up) {
            *out = gated1(*out, up);
        }
    }
}

/// The sixteen outputs of a panel of f32 for one token.
fn dot_float(panel: &[f32], x: FloatTile<'_>, token: usize) -> [f32; PANEL] {
    let mut sums = [0.0; PANEL];
    for (column, x) in panel.chunks_exact(PANEL).zip(x.x.chunks_exact(x.m)) {
        for (sum, w) in sums.iter_mut().zip(column) {
            *sum += w * x[token];
        }
    }
    sums
}

/// The sixteen outputs of a Q8 panel for one token: integer sums within a group, f32 across groups.
fn dot_q8(panel: &[u8], x: IntTile<'_>, token: usize) -> [f32; PANEL] {
    let mut sums = [0.0; PANEL];
    for (g, block) in panel.chunks_exact(Q8_BLOCK).enumerate() {
        let scale = x.scales[g * x.m + token];
        for (r, sum) in sums.iter_mut().enumerate() {
            let products = (0..GROUP).map(|k| {
                let pair = split_pair(x.words[x.m * ((g * GROUP + k) / 2) + token]);
                i32::from(q8_at(block, k, r)) * i32::from(pair[k % 2])
            });
            *sum += q8_scale(block, r) * scale * products.sum::<i32>() as f32;
        }
    }
    sums
}

/// The sixteen outputs of a Q4 panel for one token: integer sums within a group, f32 across groups.
fn dot_q4(panel: &[u8], x: IntTile<'_>, token: usize) -> [f32; PANEL] {
    let mut sums = [0.0; PANEL];
    for (g, block) in panel.chunks_exact(Q4_BLOCK).enumerate() {
        let (scale, total) = (x.scales[g * x.m + token], x.starts[g * x.m + token] / -EXCESS);
        for (r, sum) in sums.iter_mut().enumerate() {
            let (row_scale, zero) = q4_scale(block, r);
            let products = (0..GROUP).map(|k| {
                let quad = x.words[x.m * ((g * GROUP + k) / 4) + token].to_le_bytes();
                i32::from(q4_at(block, k, r)) * i32::from(quad[k % 4] as i8)
            });
            *sum += row_scale * scale * (products.sum::<i32>() as f32 - zero * total);
        }
    }
    sums
}

/// Panels that one call of `sgemm` multiplies: wide enough that packing the activations again costs
/// little.
const PANELS_AT_ONCE: usize = 8;

/// Float weights: widens some panels side by side, then calls one general matrix product. For any
/// number of tokens, since its sums are formed in another order than those above.
fn general(w: Panels<'_>, panels: Range<usize>, x: &Input, mut out: MatMut<'_>, store: Store) {
    let (tokens, cols) = (x.tokens(), x.cols());
    // [tokens, cols]
    let mut rows = vec![0.0; tokens * cols];
    for tile in 0..x.tiles() {
        let packed = x.float_tile(tile);
        for (i, token) in x.tile_tokens(tile).enumerate() {
            for (k, out) in rows[token * cols..(token + 1) * cols].iter_mut().enumerate() {
                *out = packed.x[packed.m * k + i];
            }
        }
    }
    let width = PANELS_AT_ONCE * PANEL;
    // [cols, width]
    let (mut block, mut panel) = (vec![0.0; cols * width], vec![0.0; cols * PANEL]);
    for first in panels.clone().step_by(PANELS_AT_ONCE) {
        let some = first..(first + PANELS_AT_ONCE).min(panels.end);
        for (i, p) in some.clone().enumerate() {
            widen_panel(w.data(), p, cols, &mut panel);
            for (block, panel) in block.chunks_exact_mut(width).zip(panel.chunks_exact(PANEL)) {
                block[i * PANEL..(i + 1) * PANEL].copy_from_slice(panel);
            }
        }
        let offset = (first - panels.start) * PANEL;
        let covered = w.rows_in(&some);
        let (_, right) = out.reborrow().split_cols(offset);
        let (mut target, _) = right.split_cols(covered);
        let (start, stride) = target.as_mut_ptr();
        let beta = if store == Store::Set { 0.0 } else { 1.0 };
        // SAFETY: `rows` is [tokens, cols], `block` is [cols, width] with `covered <= width`, and
        // `target` is an exclusive block of [tokens, covered] with rows `stride` apart; with beta 0
        // its contents are not read.
        unsafe {
            matrixmultiply::sgemm(
                tokens,
                cols,
                covered,
                1.0,
                rows.as_ptr(),
                cols as isize,
                1,
                block.as_ptr(),
                width as isize,
                1,
                beta,
                start,
                stride as isize,
                1,
            );
        }
    }
}
