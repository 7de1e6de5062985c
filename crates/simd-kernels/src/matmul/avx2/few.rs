//! Weights that stream from memory past the one tile there is, side by side from two places.
//!
//! The processor's own prefetchers stop at each 4 KiB page, so prefetches run ahead in both streams, on into the panels that come next;
//! and with two the other one goes on meanwhile: on a Sapphire Rapids 1.17 times as fast as one stream.

use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::wide::Part;
use super::{Ahead, Columns, Finish, add_tile, finish_row};
use crate::lanes::prefetch;
use crate::matrix::MatMut;
use crate::panels::{GROUP, PANEL, Panels};

/// How a processor likes to read two panels of one matrix; the bits of the products are the same.
///
/// On a Sapphire Rapids neighbours of 32 KiB (bf16 of 1024 columns) were read at 37.5 GB/s and panels from the two halves of the range at
/// 36.5; of 9 KiB (Q4), which turn to the next pair so often and lose the last of the early prefetch each time, at 33 and 37. On a Zen 4
/// the halves and a quarter of the distance are faster for all sizes. The products of a decoded token of Qwen3-0.6B, calls in turns, GB/s of a core,
/// with one thread and with two: bf16 24.7 -> 29.2 and 25.8 -> 30.5, Q8 25.2 -> 25.8 and 23.9 -> 24.8, Q4 25.6 -> 28.3 and 22.3 -> 24.3; where the memory
/// gives two cores no more than one of them gets alone, 17.0 -> 17.6, 17.6 -> 17.8 and 17.5 -> 17.8. From 768 bytes on bf16 and Q4 lose most of that.
#[derive(Clone, Copy)]
struct Reading {
    /// Bytes by which the prefetch into the L1 cache runs ahead.
    ahead: usize,
    /// Bytes of a panel from which on the two are neighbours; smaller ones come from the two halves of the range.
    neighbours_from: usize,
}

impl Reading {
    const AMD: Reading = Reading { ahead: 512, neighbours_from: usize::MAX };
    const OTHERS: Reading = Reading { ahead: TURN, neighbours_from: 20 << 10 };

    /// What this processor likes.
    fn here() -> Reading {
        // Asked once: a virtual machine leaves the answer to its host, which takes microseconds.
        static HERE: OnceLock<Reading> = OnceLock::new();
        *HERE.get_or_init(|| {
            // Older compilers declare the intrinsic unsafe.
            #[allow(unused_unsafe)]
            // SAFETY: a processor with AVX2 has the instruction.
            let maker = unsafe { __cpuid(0) };
            let maker = [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes);
            if maker.as_flattened() == b"AuthenticAMD" { Reading::AMD } else { Reading::OTHERS }
        })
    }
}

/// Bytes before the end of a panel from which on the prefetch of neighbours is in the next pair. The sums of a panel are put together there on
/// all processors, for ranks of different makers to get the same bits.
const TURN: usize = 2048;

/// Bytes by which a prefetch into the L2 cache runs ahead of the one into L1.
///
/// Without it, or with more than 2 KiB, a core of a Sapphire Rapids, which gets 20 GB/s, reads two bf16 streams 5 % slower.
/// A single prefetch 6 KiB ahead into the L1 cache, whose few buffers then wait for memory, takes 30 % there; with one stream
/// it was the best on a Zen 5.
const FARTHER: usize = 1024;

/// Tokens up to which the registers hold the sums of two panels.
const SIDE_BY_SIDE: usize = 3;

/// The products of all `panels` of one matrix, or of gate and up, with `M` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn few<const N: usize, const M: usize, const SETS: usize>(
    ws: [Panels<'_>; N],
    panels: Range<usize>,
    x: &Columns<'_>,
    out: MatMut<'_>,
    finish: Finish,
) {
    read::<N, M, SETS>(ws, panels, x, out, finish, Reading::here());
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn read<const N: usize, const M: usize, const SETS: usize>(
    ws: [Panels<'_>; N],
    panels: Range<usize>,
    x: &Columns<'_>,
    mut out: MatMut<'_>,
    finish: Finish,
    reading: Reading,
) {
    // Two panels of one matrix side by side are two streams, as those of two matrices are.
    let pairs = if N == 1 && M <= SIDE_BY_SIDE { panels.len() / 2 } else { 0 };
    let neighbours = pairs > 0 && ws[0].part(panels.start, &x.range).bytes() >= reading.neighbours_from;
    for i in 0..pairs {
        let pair = if neighbours { [2 * i, 2 * i + 1] } else { [i, i + pairs] };
        let streams = pair.map(|i| (ws[0], panels.start + i));
        let acc = products::<2, M, SETS>(streams, usize::from(neighbours), x, reading.ahead);
        for (i, acc) in pair.into_iter().zip(&acc) {
            for (m, acc) in acc.iter().enumerate() {
                finish_row(finish, [acc], out.row_mut(m), i * PANEL);
            }
        }
    }
    for i in 2 * pairs..panels.len() {
        let acc = products::<N, M, SETS>(ws.map(|w| (w, panels.start + i)), 0, x, reading.ahead);
        for m in 0..M {
            finish_row(finish, acc.each_ref().map(|acc| &acc[m]), out.row_mut(m), i * PANEL);
        }
    }
}

/// The products of whole panels with the one tile there is, and prefetches `ahead` of them. Next comes, for each, the panel after it but
/// `skip`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products<const P: usize, const M: usize, const SETS: usize>(
    panels: [(Panels<'_>, usize); P],
    skip: usize,
    x: &Columns<'_>,
    ahead: usize,
) -> [[[f32; PANEL]; M]; P] {
    let mut acc = [[[0.0; PANEL]; M]; P];
    let (cols, panel) = (x.range.end, panels[0].0.part(panels[0].1, &x.range).bytes().max(1));
    let turn = cols.saturating_sub(TURN * cols / panel) / GROUP * GROUP;
    for (range, skip) in [(0..turn, 0), (turn..cols, skip * panel)] {
        let columns = Columns { range, ..*x };
        let parts = panels.map(|(w, panel)| w.part(panel, &columns.range));
        let next = parts.map(|part| part.start().wrapping_add(ahead + skip));
        let parts = parts.map(Part::Stored);
        if M <= SIDE_BY_SIDE {
            add_tile::<P, M, SETS, true>(parts, &columns, 0, &mut acc, Ahead::stream(next));
        } else {
            for ((part, acc), next) in parts.into_iter().zip(&mut acc).zip(next) {
                add_tile::<1, M, SETS, true>([part], &columns, 0, std::array::from_mut(acc), Ahead::stream([next]));
            }
        }
    }
    acc
}

/// Asks for a line of weights that is soon needed, and for one that is needed later.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn prefetch_weights(line: *const u8) {
    prefetch::<_MM_HINT_T0>(line);
    prefetch::<_MM_HINT_T1>(line.wrapping_add(FARTHER));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::noise;
    use crate::input::{Input, InputKind};
    use crate::isa::Isa;
    use crate::matmul::Store;
    use crate::panels::PanelData;

    #[test]
    fn all_ways_to_read_give_the_same_bits() {
        let Some(isa) = Isa::avx2() else { return eprintln!("not tested: this CPU has no AVX2") };
        // Panels of the first are neighbours for one of the two, those of the second for none.
        for cols in [700, 50] {
            let weights = noise(7 * PANEL * cols, 1);
            let w = Panels::new(PanelData::F32(&weights), 7 * PANEL, cols);
            let mut input = Input::new();
            input.prepare(isa, InputKind::Float, &noise(2 * cols, 2), 2, cols);
            let x = Columns { x: &input, range: 0..cols, isa };
            for panels in [0..7, 1..7] {
                let rows = panels.len() * PANEL;
                let [amd, others] = [Reading::AMD, Reading::OTHERS].map(|reading| {
                    let mut out = vec![f32::NAN; 2 * rows];
                    let finish = Finish::Store(Store::Set);
                    // SAFETY: the instruction set proves the target features.
                    unsafe {
                        read::<1, 2, 1>([w], panels.clone(), &x, MatMut::new(&mut out, 2, rows, rows), finish, reading)
                    };
                    out.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
                });
                assert_eq!(amd, others, "{cols} columns, panels {panels:?}");
                assert!(!amd.contains(&f32::NAN.to_bits()), "a sum was not written");
            }
        }
    }
}
