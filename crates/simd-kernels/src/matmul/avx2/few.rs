//! Weights that stream from memory past the one tile there is, side by side from two places.
//!
//! The processor's own prefetchers stop at each 4 KiB page, so prefetches run ahead in both
//! streams, on into the panels that come next; and with two the other one goes on meanwhile: on a
//! Sapphire Rapids 1.17 times as fast as one stream.

use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::wide::Part;
use super::{Ahead, Columns, Finish, add_tile, finish_row};
use crate::matrix::MatMut;
use crate::panels::{GROUP, PANEL, Panels};

/// How a processor likes to read weights for one token. The bits of the products are the same,
/// since all put their sums together at [`TURN`].
///
/// On a Sapphire Rapids neighbours of 32 KiB (bf16 of 1024 columns) were read at 37.5 GB/s and
/// panels from the two halves of the range at 36.5; of 9 KiB (Q4), which turn to the next pair so
/// often and lose the last of the early prefetch each time, at 33 and 37.
///
/// On a Zen 4 the halves and a quarter of the distance are faster for all sizes. GB/s of a core in
/// the products of a decoded token of Qwen3-0.6B, the two ways in turns, with one thread and with
/// two: bf16 24.7 -> 29.2 and 25.8 -> 30.5, Q8 25.2 -> 25.8 and 23.9 -> 24.8, Q4 25.6 -> 28.3 and
/// 22.3 -> 24.3; where two cores get no more than one of them gets alone, 17.0 -> 17.6, 17.6 ->
/// 17.8 and 17.5 -> 17.8. At 768 bytes bf16 and Q4 lose most of that. Other processors of AMD were
/// not measured so.
#[derive(Clone, Copy)]
struct Reading {
    /// Bytes by which the prefetch into the L1 cache runs ahead: those of [`TURN`] where panels can
    /// be neighbours.
    ahead: usize,
    /// Bytes of a panel above which the two that are read side by side are neighbours; smaller ones
    /// come from the two halves of the range, each a stream without turns.
    neighbours_above: usize,
}

impl Reading {
    const AMD: Reading = Reading { ahead: 512, neighbours_above: usize::MAX };
    const OTHERS: Reading = Reading { ahead: TURN, neighbours_above: 20 << 10 };

    /// What this processor likes.
    fn here() -> Reading {
        // Asked once: a virtual machine leaves the answer to its host, which takes microseconds.
        static HERE: OnceLock<Reading> = OnceLock::new();
        *HERE.get_or_init(|| {
            // Older compilers declare the intrinsic unsafe.
            #[allow(unused_unsafe)]
            // SAFETY: all x86-64 processors have the instruction.
            let maker = unsafe { __cpuid(0) };
            let maker = [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes);
            if maker.as_flattened() == b"AuthenticAMD" { Reading::AMD } else { Reading::OTHERS }
        })
    }
}

/// Bytes before the end of a panel from which on the prefetch of neighbours is in the next pair.
/// The sums of a panel are put together there on all processors, for ranks of different makers to
/// get the same bits.
const TURN: usize = 2048;

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
    // Of more tokens Q8 with 2 and 3 and all single streams, those of 4 to 6, were slower at the
    // distance of a Zen 4, by up to a fourth.
    let reading = if M == 1 { Reading::here() } else { Reading::OTHERS };
    read::<N, M, SETS>(ws, panels, x, out, finish, reading);
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
    let neighbours =
        pairs > 0 && ws[0].part(panels.start, &x.range).bytes() > reading.neighbours_above;
    debug_assert!(
        !neighbours || reading.ahead == TURN,
        "the prefetch of neighbours turns elsewhere"
    );
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

/// The products of whole panels with the one tile there is, and prefetches `ahead` of them. Next
/// comes, for each, the panel after it but `skip`.
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
                add_tile::<1, M, SETS, true>(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::noise;
    use crate::input::{Input, InputKind};
    use crate::isa::Isa;
    use crate::matmul::Store;
    use crate::panels::PanelData;

    /// The bits of the products of `M` tokens, read in each way.
    fn bits<const M: usize, const SETS: usize>(
        w: Panels<'_>,
        panels: Range<usize>,
        isa: Isa,
    ) -> [Vec<u32>; 2] {
        let (rows, cols) = (panels.len() * PANEL, w.cols());
        let mut input = Input::new();
        input.prepare(isa, InputKind::Float, &noise(M * cols, 2), M, cols);
        let x = Columns { x: &input, range: 0..cols, isa };
        [Reading::AMD, Reading::OTHERS].map(|reading| {
            let mut out = vec![f32::NAN; M * rows];
            let (place, finish) = (MatMut::new(&mut out, M, rows, rows), Finish::Store(Store::Set));
            // SAFETY: the instruction set proves the target features.
            unsafe { read::<1, M, SETS>([w], panels.clone(), &x, place, finish, reading) };
            assert!(out.iter().all(|sum| sum.is_finite()), "a sum was not written");
            out.into_iter().map(f32::to_bits).collect()
        })
    }

    #[test]
    fn all_ways_to_read_give_the_same_bits() {
        let Some(isa) = Isa::avx2() else { return eprintln!("not tested: this CPU has no AVX2") };
        // Panels of the first are neighbours for one of the two, those of the second for none.
        for cols in [700, 50] {
            let floats = noise(7 * PANEL * cols, 1);
            let halves: Vec<u16> = floats.iter().map(|x| (x.to_bits() >> 16) as u16).collect();
            for data in [PanelData::F32(&floats), PanelData::Bf16(&halves)] {
                let w = Panels::new(data, 7 * PANEL, cols);
                for panels in [0..7, 1..7] {
                    let what = format!("{}, {cols} columns, panels {panels:?}", data.name());
                    let [amd, others] = bits::<1, 2>(w, panels.clone(), isa);
                    assert_eq!(amd, others, "{what}, one token");
                    let [amd, others] = bits::<2, 1>(w, panels, isa);
                    assert_eq!(amd, others, "{what}, two tokens");
                }
            }
        }
    }
}
