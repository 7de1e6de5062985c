//! Parts of panels that are widened once for all the tiles that pass them.
//!
//! The conversions of f16 take a port of the multiply-adds. The two shuffles of Q8 take the port of
//! the additions that plain AVX2 needs; with VNNI there are none, and the stores cost more. The
//! shuffles of bf16 and the two instructions of Q4 for twice as many products share no port with
//! the arithmetic.

use std::arch::x86_64::*;

use super::float::widen;
use super::int::{load_bytes, widen_q8, widen_scales, words_in_group};
use super::{FLOATS, INTS};
use crate::isa::Isa;
use crate::lanes::store;
use crate::matmul::formats::{Column, F16};
use crate::panels::{GROUP, PANEL, PanelData, Q8_BLOCK};

/// Words of a group of Q8.
const WORDS: usize = words_in_group(false);

/// Tiles from which on it pays to widen a part for all of them.
const WIDEN_TILES: usize = 12;

/// A group of 32 columns of Q8: for each two columns the int16 of rows 0..8, then those of rows
/// 8..16.
#[derive(Clone, Copy)]
pub(super) struct WideGroup {
    pub scales: [f32; PANEL],
    pub words: [[[u8; 32]; 2]; WORDS],
}

/// Room for the part of a panel, on lines of its own.
#[repr(align(64))]
pub(super) struct Wide {
    groups: [WideGroup; INTS / GROUP],
    columns: [[f32; PANEL]; FLOATS],
}

/// A part of a panel as a tile meets it.
#[derive(Clone, Copy)]
pub(super) enum Part<'a> {
    Stored(PanelData<'a>),
    /// Q8 as int16.
    Pairs(&'a [WideGroup]),
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

pub(super) fn bytes(part: Part<'_>) -> &[u8] {
    let Part::Stored(PanelData::Q8(part) | PanelData::Q4(part)) = part else {
        panic!("panels of one product have one format")
    };
    part
}

impl Wide {
    pub(super) const fn new() -> Wide {
        let group = WideGroup { scales: [0.0; PANEL], words: [[[0; 32]; 2]; WORDS] };
        Wide { groups: [group; INTS / GROUP], columns: [[0.0; PANEL]; FLOATS] }
    }

    /// `part` of a panel, widened where that pays for so many tiles.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn widen<'a>(&'a mut self, part: PanelData<'a>, tiles: usize, isa: Isa) -> Part<'a> {
        match part {
            PanelData::Q8(bytes) if tiles >= WIDEN_TILES && isa.vnni() == Isa::PLAIN => {
                Part::Pairs(pairs(bytes, &mut self.groups[..bytes.len() / Q8_BLOCK]))
            }
            PanelData::F16(halves) if tiles >= WIDEN_TILES => {
                widen_floats::<F16>(halves, &mut self.columns[..halves.len() / PANEL])
            }
            _ => Part::Stored(part),
        }
    }
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
