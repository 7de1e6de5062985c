//! Parts of panels that are widened once for all the tiles that pass them.
//!
//! The conversions of f16 take a port of the multiply-adds: a prompt of 512 tokens goes 1.17 times
//! as fast without them in each tile. The two shuffles of Q8 take the port of the additions that
//! plain AVX2 needs: 1.03 times; with VNNI there are none, and the stores cost more. The shuffles
//! of bf16 and the two instructions of Q4 for twice as many products are in nobody's way. With
//! AVX-512 the one shuffle of bf16 takes a port of the multiply-adds on some processors, and bf16
//! is widened, too. AVX-512 has Q8 and Q4 as `codes`, for however few tiles.

use std::arch::x86_64::*;

use super::float::{Bf16, Column, F16, widen};
use super::int::{block_bytes, load_bytes, widen_q8, widen_scales, words_in_group};
use super::{FLOATS, INTS, avx512, codes};
use crate::isa::Isa;
use crate::lanes::store;
use crate::panels::{GROUP, PANEL, PanelData, Q8_BLOCK};

/// Words of a group of Q8.
const WORDS: usize = words_in_group(false);

/// Tiles from which on it pays to widen a part for all of them: six lose what later ones gain.
const MANY: usize = 12;

/// The same for bf16 and f16 with AVX-512: two lose, on a Zen 4 and on an Emerald Rapids. Parts
/// that are not widened need not have room.
pub(super) const SOME: usize = 4;

/// A group of 32 columns of a quantized panel.
#[derive(Clone, Copy)]
pub(super) struct WideGroup {
    pub scales: [f32; PANEL],
    /// Of pairs, for each two columns the int16 of rows 0..8, then those of rows 8..16. Of codes,
    /// for each four columns their bytes, in half of the words.
    pub words: [[[u8; 32]; 2]; WORDS],
}

/// Room for the parts of panels that go together, on lines of its own.
#[repr(align(64))]
pub(super) struct Wide {
    groups: [WideGroup; codes::PANELS * INTS / GROUP],
    columns: [[f32; PANEL]; avx512::PANELS * avx512::HALF],
}
const _: () = assert!(avx512::PANELS * avx512::HALF >= FLOATS, "AVX2 widens one whole part");

/// A part of a panel as a tile meets it.
#[derive(Clone, Copy)]
pub(super) enum Part<'a> {
    Stored(PanelData<'a>),
    /// Q8 as int16.
    Pairs(&'a [WideGroup]),
    /// Q8, or Q4 in half steps, without a sign: `EXCESS` above the weights.
    Codes(&'a [WideGroup]),
}

pub(super) fn floats(part: Part<'_>) -> &[[f32; PANEL]] {
    let Part::Stored(PanelData::F32(part)) = part else {
        panic!("panels of one product have one format")
    };
    part.as_chunks().0
}

pub(super) fn halves(part: Part<'_>) -> &[[u16; PANEL]] {
    let Part::Stored(PanelData::Bf16(part) | PanelData::F16(part)) = part else {
        panic!("panels of one product have one format")
    };
    part.as_chunks().0
}

pub(super) fn codes(part: Part<'_>) -> &[WideGroup] {
    let Part::Codes(groups) = part else { panic!("panels of one product have one format") };
    groups
}

pub(super) fn bytes(part: Part<'_>) -> &[u8] {
    let Part::Stored(PanelData::Q8(part) | PanelData::Q4(part)) = part else {
        panic!("panels of one product have one format")
    };
    part
}

impl Wide {
    pub(super) const fn new() -> Wide {
        let group = WideGroup { scales: [0.0; PANEL], words: [[[0; 32]; 2]; WORDS] };
        Wide {
            groups: [group; codes::PANELS * INTS / GROUP],
            columns: [[0.0; PANEL]; avx512::PANELS * avx512::HALF],
        }
    }

    /// `parts` of panels, widened where that pays for so many tiles.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn widen<'a, const P: usize>(
        &'a mut self,
        parts: [PanelData<'a>; P],
        tiles: usize,
        isa: Isa,
    ) -> [Part<'a>; P] {
        let (mut groups, mut columns) = (&mut self.groups[..], &mut self.columns[..]);
        parts.map(|part| match part {
            PanelData::Q8(bytes) | PanelData::Q4(bytes) if isa.has_avx512() => {
                let q4 = matches!(part, PanelData::Q4(_));
                let groups = room(&mut groups, bytes.len() / block_bytes(q4));
                // SAFETY: the instruction set proves the target features.
                unsafe {
                    if q4 {
                        codes::widen::<true>(bytes, groups)
                    } else {
                        codes::widen::<false>(bytes, groups)
                    }
                };
                Part::Codes(groups)
            }
            PanelData::Q8(bytes) if tiles >= MANY && isa.vnni() == Isa::PLAIN => {
                Part::Pairs(pairs(bytes, room(&mut groups, bytes.len() / Q8_BLOCK)))
            }
            PanelData::F16(halves) if tiles >= MANY || isa.has_avx512() && tiles >= SOME => {
                widen_floats::<F16>(halves, room(&mut columns, halves.len() / PANEL))
            }
            PanelData::Bf16(halves) if isa.has_avx512() && tiles >= SOME => {
                widen_floats::<Bf16>(halves, room(&mut columns, halves.len() / PANEL))
            }
            _ => Part::Stored(part),
        })
    }
}

/// The first `count` of what is `left`, which has them no more.
fn room<'a, T>(left: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    left.split_off_mut(..count).expect("parts that go together have room")
}

/// Groups of Q8 as int16.
#[target_feature(enable = "avx2,fma,f16c")]
fn pairs<'a>(bytes: &[u8], groups: &'a mut [WideGroup]) -> &'a [WideGroup] {
    for (group, block) in groups.iter_mut().zip(bytes.chunks_exact(Q8_BLOCK)) {
        let (scales, words) =
            block.as_chunks().0.split_first().expect("a block starts with its scales");
        for (out, scales) in group.scales.as_chunks_mut().0.iter_mut().zip(widen_scales(scales)) {
            store(out, scales);
        }
        for (out, word) in group.words.iter_mut().zip(words) {
            for (out, pairs) in out.iter_mut().zip(widen_q8(load_bytes(word))) {
                store_bytes(out, pairs);
            }
        }
    }
    groups
}

/// Columns in f32.
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_floats<'a, C: Column<Bits = u16>>(
    halves: &[u16],
    columns: &'a mut [[f32; PANEL]],
) -> Part<'a> {
    for (out, halves) in columns.iter_mut().zip(halves.as_chunks().0) {
        for (out, x) in out.as_chunks_mut().0.iter_mut().zip(<[_; 2]>::from(widen::<C>(halves))) {
            store(out, x);
        }
    }
    Part::Stored(PanelData::F32(columns.as_flattened()))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_bytes(out: &mut [u8; 32], bytes: __m256i) {
    // SAFETY: the array is 32 writable bytes, and the unaligned store asks for nothing else.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), bytes) }
}
