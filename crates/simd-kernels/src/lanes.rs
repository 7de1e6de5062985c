//! Eight f32 lanes over slices: loads, stores, masked tails and folds, shared by the AVX2 kernels;
//! and sixteen for AVX-512.
//!
//! The array references prove the bounds, so that the kernels above need no unsafe code for whole
//! vectors.

use std::arch::x86_64::*;

/// Lanes of one AVX register of f32.
pub(crate) const LANES: usize = 8;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Eight consecutive floats, at any alignment.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn load(x: &[f32; LANES]) -> __m256 {
    // SAFETY: the array is eight readable floats, and the unaligned load asks for nothing else.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

/// Writes eight consecutive floats, at any alignment.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn store(x: &mut [f32; LANES], v: __m256) {
    // SAFETY: the array is eight writable floats, and the unaligned store asks for nothing else.
    unsafe { _mm256_storeu_ps(x.as_mut_ptr(), v) }
}

/// Sixteen consecutive floats, at any alignment.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn load16(x: &[f32; 2 * LANES]) -> __m512 {
    // SAFETY: the array is sixteen readable floats, and the unaligned load asks for nothing else.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

/// Writes sixteen consecutive floats, at any alignment.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn store16(x: &mut [f32; 2 * LANES], v: __m512) {
    // SAFETY: the array is sixteen writable floats, and the unaligned store asks for nothing else.
    unsafe { _mm512_storeu_ps(x.as_mut_ptr(), v) }
}

/// Asks for the cache line at `address`, which need not be readable, with one of the `_MM_HINT_*`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn prefetch<const HINT: i32>(address: *const u8) {
    // Older compilers declare the intrinsic unsafe.
    #[allow(unused_unsafe)]
    // SAFETY: a prefetch has no effect but on time; an address that is not mapped is ignored.
    unsafe {
        _mm_prefetch::<HINT>(address.cast())
    }
}

/// All bits set in the first `n` lanes (all eight from n = 8 on).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn first(n: usize) -> __m256i {
    let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_cmpgt_epi32(_mm256_set1_epi32(n.min(LANES) as i32), lane)
}

/// The at most eight floats of `x`, zero in the lanes beyond.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn load_tail(x: &[f32]) -> __m256 {
    debug_assert!(x.len() <= LANES, "a tail of {} floats, at most {LANES} fit", x.len());
    // SAFETY: the masked load touches only lanes below x.len(), all inside the slice.
    unsafe { _mm256_maskload_ps(x.as_ptr(), first(x.len())) }
}

/// Writes the first `x.len()` lanes, at most eight.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn store_tail(x: &mut [f32], v: __m256) {
    debug_assert!(x.len() <= LANES, "a tail of {} floats, at most {LANES} fit", x.len());
    // SAFETY: the masked store touches only lanes below x.len(), all inside the slice.
    unsafe { _mm256_maskstore_ps(x.as_mut_ptr(), first(x.len()), v) }
}

/// The sum of the eight lanes, pairwise.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn sum(v: __m256) -> f32 {
    let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
}

/// The largest of the eight lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn max(v: __m256) -> f32 {
    let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
}

/// The bits of |v|, which as integers are in the order of the floats, NaN above all.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn magnitude(v: __m256) -> __m256i {
    _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fff_ffff))
}

/// The largest of eight [`magnitude`]s; NaN, if one is.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn max_magnitude(v: __m256i) -> f32 {
    let four = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    let one = _mm_max_epi32(two, _mm_shuffle_epi32::<1>(two));
    f32::from_bits(_mm_cvtsi128_si32(one) as u32)
}

/// `sum += dot(a, b)` by the named instruction in the encoding that a constant
/// [`Isa::vnni`](crate::isa::Isa::vnni) says, or else by a block.
///
/// The intrinsics would need functions that enable them, all the way up from here; the rest of
/// those gains nothing by it.
macro_rules! vnni {
    ($name:literal, $vnni:expr, $sum:expr, $a:expr, $b:expr, $plain:block) => {
        match $vnni {
            $crate::isa::Isa::AVX_VNNI => $crate::lanes::vnni!("{{vex}} ", $name, $sum, $a, $b),
            $crate::isa::Isa::AVX512_VNNI => $crate::lanes::vnni!("{{evex}} ", $name, $sum, $a, $b),
            _ => $plain,
        }
    };
    ($encoding:literal, $name:literal, $sum:expr, $a:expr, $b:expr) => {
        // SAFETY: callers have a constant only where an `Isa` proves it; the instruction touches
        // the named registers only.
        unsafe {
            std::arch::asm!(concat!($encoding, $name, " {}, {}, {}"), inout(ymm_reg) *$sum, in(ymm_reg) $a, in(ymm_reg) $b,
                options(nomem, nostack, preserves_flags))
        }
    };
}
pub(crate) use vnni;

/// `sum += dot(a, b)` of the two int16 in each 32-bit lane: with one instruction where `VNNI` (an
/// [`Isa::vnni`](crate::isa::Isa::vnni)) has it, or two of AVX2.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn add_pairs<const VNNI: u8>(sum: &mut __m256i, a: __m256i, b: __m256i) {
    vnni!("vpdpwssd", VNNI, sum, a, b, {
        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(a, b));
        hold(sum);
    })
}

/// Makes the compiler have `sum` in a register here, after those held before it.
///
/// Integer addition is associative and the terms of a sum are independent, so it may otherwise form
/// all products of one sum, then those of the next, and then has far more factors and products to
/// keep than registers: two tokens of Q4 weights took twice as long.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn hold(sum: &mut __m256i) {
    // SAFETY: there is no instruction in it.
    unsafe {
        std::arch::asm!("/* {} */", inout(ymm_reg) * sum, options(nomem, nostack, preserves_flags))
    }
}

/// Makes the compiler have `totals` in memory here.
///
/// It may otherwise keep totals that a loop updates in registers that it does not have, and copy
/// them to the stack and back in each round: products with Q8 weights took 2 to 5 % longer.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn settle<T>(totals: &mut [T]) {
    // SAFETY: there is no instruction in it; it only may, as far as the compiler knows, change what
    // `totals` borrows mutably.
    unsafe {
        std::arch::asm!("/* {} */", in(reg) totals.as_mut_ptr(), options(nostack, preserves_flags))
    }
}
