//! Weights that stream from memory past the one tile there is, side by side from two places.
//!
//! The processor's own prefetchers stop at each 4 KiB page, so prefetches run ahead in both
//! streams. With two streams, one goes on while the other waits at the end of a page. The two
//! panels come from the two halves of the range, so that each stream is contiguous.

use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::wide::Part;
use super::{Ahead, Columns, add_tile, depth};
use crate::input::InputKind;
use crate::matmul::finish::{Finish, finish_row};
use crate::matrix::MatMut;
use crate::panels::{PANEL, Panels};

/// Tokens up to which the registers hold the sums of two panels.
pub(super) const SIDE_BY_SIDE: usize = 3;

/// Bytes by which the prefetch into the L1 cache runs ahead: on processors of AMD with one token,
/// and else. It changes no result.
const AHEAD_AMD: usize = 512;
const AHEAD: usize = 2048;

/// The prefetch distance of this processor for `tokens` tokens.
fn prefetch_distance(tokens: usize) -> usize {
    // Asked once: a virtual machine leaves the answer to its host, which takes microseconds.
    static ONE_TOKEN: OnceLock<usize> = OnceLock::new();
    if tokens > 1 {
        return AHEAD;
    }
    *ONE_TOKEN.get_or_init(|| {
        // Older compilers declare the intrinsic unsafe.
        #[allow(unused_unsafe)]
        // SAFETY: all x86-64 processors have the instruction.
        let maker = unsafe { __cpuid(0) };
        let maker = [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes);
        if maker.as_flattened() == b"AuthenticAMD" { AHEAD_AMD } else { AHEAD }
    })
}

/// The products of all `panels` of one matrix, or of gate and up, with `M` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn stream<const N: usize, const M: usize>(
    ws: [Panels<'_>; N],
    panels: Range<usize>,
    x: &Columns<'_>,
    mut out: MatMut<'_>,
    finish: Finish,
) {
    let ahead = prefetch_distance(M);
    // Two panels of one matrix side by side are two streams, as those of two matrices are.
    let pairs = if N == 1 && M <= SIDE_BY_SIDE { panels.len() / 2 } else { 0 };
    for i in 0..pairs {
        let pair = [i, i + pairs];
        let acc = products::<2, M>(pair.map(|i| (ws[0], panels.start + i)), x, ahead);
        for (i, acc) in pair.into_iter().zip(&acc) {
            for (m, acc) in acc.iter().enumerate() {
                finish_row(finish, [acc], out.row_mut(m), i * PANEL);
            }
        }
    }
    for i in 2 * pairs..panels.len() {
        let acc = products::<N, M>(ws.map(|w| (w, panels.start + i)), x, ahead);
        for m in 0..M {
            finish_row(finish, acc.each_ref().map(|acc| &acc[m]), out.row_mut(m), i * PANEL);
        }
    }
}

/// The products of whole panels with the one tile there is, and prefetches `ahead` of them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products<const P: usize, const M: usize>(
    panels: [(Panels<'_>, usize); P],
    x: &Columns<'_>,
    ahead: usize,
) -> [[[f32; PANEL]; M]; P] {
    let mut acc = [[[0.0; PANEL]; M]; P];
    let cols = x.range.end;
    // Only sums of floats are formed in parts.
    let depth = if x.x.kind() == InputKind::Float { depth(InputKind::Float) } else { cols.max(1) };
    for column in (0..cols).step_by(depth) {
        let columns = Columns { range: column..(column + depth).min(cols), ..*x };
        let parts = panels.map(|(w, panel)| w.part(panel, &columns.range));
        let next = parts.map(|part| part.start().wrapping_add(ahead));
        let parts = parts.map(Part::Stored);
        if M <= SIDE_BY_SIDE {
            add_tile::<P, M, true>(parts, &columns, 0, &mut acc, Ahead::stream(next));
        } else {
            for ((part, acc), next) in parts.into_iter().zip(&mut acc).zip(next) {
                add_tile::<1, M, true>(
                    [part],
                    &columns,
                    0,
                    std::array::from_mut(acc),
                    Ahead::stream([next]),
                );
            }
        }
    }
    acc
}
