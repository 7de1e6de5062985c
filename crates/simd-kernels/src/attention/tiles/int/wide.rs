//! The kernels of AVX-512: a register holds sixteen rows.
//!
//! Three vectors of rows meet eight keys, or eight elements of values, at once: 24 sums. All
//! numbers are those of AVX2.

use super::kernels::kernels;
use super::{
    BLOCK, Group, IntTile, KEY_TILE, Kernel, LEAST_MAX, LEAST_STEP, LOG2_E, Pair, ROUND, Room,
    Seen, WEIGHT, WEIGHTS,
};
use crate::exp::pow2_512 as pow2;
use crate::isa::Isa;
use crate::lanes::{load16 as load, store16 as store};
use std::arch::asm;
use std::arch::x86_64::{
    __m512 as Floats, __m512i as Ints, _mm512_add_ps as add, _mm512_cvtepi32_ps as floats,
    _mm512_div_ps as div, _mm512_fmadd_ps as fmadd, _mm512_fmsub_ps as fmsub, _mm512_max_ps as max,
    _mm512_mul_ps as mul, _mm512_set1_epi32 as ints, _mm512_set1_ps as set, _mm512_sub_ps as sub,
    *,
};

const LANES: usize = 16;
/// Keys, or elements of values, that meet a group at once.
const STEP: usize = 8;

pub(super) const KERNEL: Kernel = kernel::<{ Isa::AVX512_VNNI }>();

kernels!("avx512bw,avx512vl,avx512vnni", "wide::step");

#[inline]
#[target_feature(enable = "avx512f")]
fn load_ints(x: &[i32; LANES]) -> Ints {
    // SAFETY: the array is 64 readable bytes.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}

/// `sum += dot(a, b)` of the two int16 in each lane.
///
/// By its name: of 4 of 24 of `_mm512_dpwssd_epi32` the compiler made `vpmaddwd` and `vpaddd`.
#[inline]
#[target_feature(enable = "avx512vnni")]
fn add_pairs<const VNNI: u8>(sum: &mut Ints, a: Ints, b: Ints) {
    // SAFETY: the target features of this function have the instruction, which touches the named
    // registers only.
    unsafe {
        asm!("vpdpwssd {}, {}, {}", inout(zmm_reg) *sum, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
}

/// `yes` in the lanes with a > b, `no` in the others.
#[inline]
#[target_feature(enable = "avx512f")]
fn where_greater(a: Ints, b: Ints, yes: Floats, no: Floats) -> Floats {
    _mm512_mask_mov_ps(no, _mm512_cmpgt_epi32_mask(a, b), yes)
}

/// Zeros in the lanes with a = b; NaN equals nothing.
#[inline]
#[target_feature(enable = "avx512f")]
fn unless_equal(a: Floats, b: Floats, x: [Floats; 2]) -> [Floats; 2] {
    let kept = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(a, b);
    x.map(|x| _mm512_maskz_mov_ps(kept, x))
}

/// Zeros in the lanes with a < b; NaN is not less.
#[inline]
#[target_feature(enable = "avx512f")]
fn unless_less(a: Floats, b: Floats, x: Floats) -> Floats {
    _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(a, b), x)
}

/// The lower halves of the bits of `low` and `high`, as pairs.
#[inline]
#[target_feature(enable = "avx512bw")]
fn store_low_halves(out: &mut [Pair; LANES], low: Floats, high: Floats) {
    let high = _mm512_slli_epi32::<16>(_mm512_castps_si512(high));
    let pairs = _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_castps_si512(low), high);
    // SAFETY: the array is 64 writable bytes.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs) };
}
