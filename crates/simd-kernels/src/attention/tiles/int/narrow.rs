//! The kernels of AVX2, and of AVX-VNNI: a register holds eight rows.
//!
//! Three vectors of rows meet four keys, or four elements of values, at once: 12 sums.

use super::kernels::kernels;
use super::{
    BLOCK, Group, IntTile, KEY_TILE, Kernel, LEAST_MAX, LEAST_STEP, LOG2_E, Pair, ROUND, Room,
    Seen, WEIGHT, WEIGHTS,
};
use crate::exp::pow2_256 as pow2;
use crate::isa::Isa;
use crate::lanes::{LANES, add_pairs, load, store};
use std::arch::x86_64::{
    __m256 as Floats, __m256i as Ints, _mm256_add_ps as add, _mm256_cvtepi32_ps as floats,
    _mm256_div_ps as div, _mm256_fmadd_ps as fmadd, _mm256_fmsub_ps as fmsub, _mm256_max_ps as max,
    _mm256_mul_ps as mul, _mm256_set1_epi32 as ints, _mm256_set1_ps as set, _mm256_sub_ps as sub,
    *,
};

/// Keys, or elements of values, that meet a group at once.
const STEP: usize = 4;

pub(super) const KERNEL: Kernel = kernel::<{ Isa::PLAIN }>();
pub(super) const KERNEL_VNNI: Kernel = kernel::<{ Isa::AVX_VNNI }>();

kernels!("avx2,fma,f16c", "narrow::step");

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_ints(x: &[i32; LANES]) -> Ints {
    // SAFETY: the array is 32 readable bytes.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

/// `yes` in the lanes with a > b, `no` in the others.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn where_greater(a: Ints, b: Ints, yes: Floats, no: Floats) -> Floats {
    _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)))
}

/// Zeros in the lanes with a = b; NaN equals nothing.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unless_equal(a: Floats, b: Floats, x: [Floats; 2]) -> [Floats; 2] {
    let kept = _mm256_cmp_ps::<_CMP_NEQ_UQ>(a, b);
    x.map(|x| _mm256_and_ps(kept, x))
}

/// Zeros in the lanes with a < b; NaN is not less.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn unless_less(a: Floats, b: Floats, x: Floats) -> Floats {
    _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(a, b), x)
}

/// The lower halves of the bits of `low` and `high`, as pairs.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store_low_halves(out: &mut [Pair; LANES], low: Floats, high: Floats) {
    let high = _mm256_slli_epi32::<16>(_mm256_castps_si256(high));
    let pairs = _mm256_blend_epi16::<0b1010_1010>(_mm256_castps_si256(low), high);
    // SAFETY: the array is 32 writable bytes.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), pairs) };
}
