//! The limits of a core, to be timed next to the kernels: multiply-add rates and read bandwidth.
//!
//! Neither times anything itself; the caller runs them on as many threads as the kernels it
//! compares.

use crate::isa::{Isa, dispatch};

/// Floating-point operations of one round of [`multiply_add`].
pub const MULTIPLY_ADD_FLOPS: usize = 16 * 12 * 8 * 2;

/// Does `rounds` rounds of independent f32 multiply-adds in registers, [`MULTIPLY_ADD_FLOPS`]
/// operations each, and returns the mean of the results, 1.
pub fn multiply_add(isa: Isa, rounds: usize) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() {
        // SAFETY: the instruction set proves the target features.
        return unsafe { avx512::multiply_add(rounds) };
    }
    dispatch!(isa, avx2::multiply_add, scalar::multiply_add, (rounds))
}

/// Operations of one round of [`dot_int8`] with AVX2 and with AVX-512.
const INT8_OPS: usize = 8 * 12 * 32 * 2;

/// Operations of one round of [`dot_int8`].
pub fn dot_int8_ops(isa: Isa) -> usize {
    if isa.has_avx512() { 2 * INT8_OPS } else { INT8_OPS }
}

/// Does `rounds` rounds of independent dot products of unsigned and signed bytes in registers,
/// [`dot_int8_ops`] operations each, with the instruction that products with integer codes use:
/// `vpdpbusd`, or `vpmaddubsw` and two more where the CPU lacks it. Returns a sum of the results;
/// all factors are 1.
pub fn dot_int8(isa: Isa, rounds: usize) -> i32 {
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() {
        // SAFETY: the instruction set proves the target features.
        return unsafe { avx512::dot_int8(rounds) };
    }
    #[cfg(target_arch = "x86_64")]
    if Isa::avx2_vnni() == Some(isa) {
        // SAFETY: the instruction set proves the target features.
        return unsafe { avx2::dot_int8_vnni(rounds) };
    }
    dispatch!(isa, avx2::dot_int8, scalar::dot_int8, (rounds))
}

/// Operations of one round of [`dot_bf16`].
pub const DOT_BF16_OPS: usize = 8 * 12 * 32 * 2;

/// Does `rounds` rounds of independent `vdpbf16ps` in registers, [`DOT_BF16_OPS`] operations each,
/// and returns the mean of the sums; `None` where the CPU lacks the instruction. All factors are 1.
pub fn dot_bf16(isa: Isa, rounds: usize) -> Option<f32> {
    #[cfg(target_arch = "x86_64")]
    if isa.has_bf16_dot() {
        // SAFETY: the instruction set proves the target features.
        return Some(unsafe { avx512::dot_bf16(rounds) });
    }
    let _ = rounds;
    None
}

/// Reads all of `data` once, in order, and returns the exclusive or of its bits.
pub fn read(isa: Isa, data: &[f32]) -> u32 {
    dispatch!(isa, avx2::read, scalar::read, (data))
}

mod scalar {
    pub(super) fn multiply_add(rounds: usize) -> f32 {
        let (mut sums, factor) = ([1.0_f32; 96], std::hint::black_box(0.5_f32));
        for _ in 0..16 * rounds {
            sums.iter_mut().for_each(|sum| *sum = *sum * factor + 0.5);
        }
        sums.iter().sum::<f32>() / 96.0
    }

    pub(super) fn dot_int8(rounds: usize) -> i32 {
        let (mut sums, factor) = ([0_i32; 96], std::hint::black_box(1_i8));
        for _ in 0..8 * rounds {
            for sum in &mut sums {
                *sum += (0..4).map(|_| i32::from(factor) * i32::from(factor)).sum::<i32>();
            }
        }
        sums.iter().sum()
    }

    pub(super) fn read(data: &[f32]) -> u32 {
        data.iter().fold(0, |bits, x| bits ^ x.to_bits())
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use crate::lanes::{load, prefetch, sum};

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn multiply_add(rounds: usize) -> f32 {
        let (mut sums, factor) =
            ([_mm256_set1_ps(1.0); 12], _mm256_set1_ps(std::hint::black_box(0.5)));
        for _ in 0..rounds {
            for _ in 0..16 {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(*sum, factor, factor);
                }
            }
        }
        sums.into_iter().map(|v| sum(v)).sum::<f32>() / 96.0
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn dot_int8(rounds: usize) -> i32 {
        let factor = _mm256_set1_epi8(std::hint::black_box(1));
        let (mut sums, pairs) = ([_mm256_setzero_si256(); 12], _mm256_set1_epi16(1));
        for _ in 0..rounds {
            for _ in 0..8 {
                for sum in &mut sums {
                    // The sum takes part, so that the product is computed each time.
                    let codes = _mm256_or_si256(factor, _mm256_and_si256(*sum, factor));
                    let words = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, factor), pairs);
                    *sum = _mm256_add_epi32(*sum, words);
                }
            }
        }
        total(sums)
    }

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    pub(super) fn dot_int8_vnni(rounds: usize) -> i32 {
        let factor = _mm256_set1_epi8(std::hint::black_box(1));
        let mut sums = [_mm256_setzero_si256(); 12];
        for _ in 0..rounds {
            for _ in 0..8 {
                for sum in &mut sums {
                    *sum = _mm256_dpbusd_avx_epi32(*sum, factor, factor);
                }
            }
        }
        total(sums)
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    fn total(sums: [__m256i; 12]) -> i32 {
        let sum = sums.into_iter().fold(_mm256_setzero_si256(), |a, b| _mm256_add_epi32(a, b));
        let mut lanes = [0.0; 8];
        crate::lanes::store(&mut lanes, _mm256_castsi256_ps(sum));
        lanes.iter().fold(0, |sum, x| sum.wrapping_add(x.to_bits() as i32))
    }

    /// One stream, eight loads in flight and a prefetch ahead, as plain as a loop can be.
    ///
    /// A yardstick and not a wall: on a Sapphire Rapids, two such streams side by side were up to
    /// 1.1 times as fast in some places of memory, and slower in others.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn read(data: &[f32]) -> u32 {
        let (blocks, tail) = data.as_chunks::<64>();
        let mut bits = [_mm256_setzero_ps(); 8];
        for block in blocks {
            for (i, bits) in bits.iter_mut().enumerate() {
                if i % 2 == 0 {
                    prefetch::<_MM_HINT_T0>(
                        block[8 * i..].as_ptr().cast::<u8>().wrapping_add(2048),
                    );
                }
                *bits =
                    _mm256_xor_ps(*bits, load(block[8 * i..].first_chunk().expect("eight floats")));
            }
        }
        let all = bits.into_iter().fold(_mm256_setzero_ps(), |a, b| _mm256_xor_ps(a, b));
        let mut lanes = [0.0; 8];
        crate::lanes::store(&mut lanes, all);
        lanes.iter().chain(tail).fold(0, |bits, x| bits ^ x.to_bits())
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx512f")]
    pub(super) fn multiply_add(rounds: usize) -> f32 {
        let (mut sums, factor) =
            ([_mm512_set1_ps(1.0); 12], _mm512_set1_ps(std::hint::black_box(0.5)));
        for _ in 0..rounds {
            for _ in 0..8 {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(*sum, factor, factor);
                }
            }
        }
        sums.into_iter().map(|v| _mm512_reduce_add_ps(v)).sum::<f32>() / 192.0
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn dot_int8(rounds: usize) -> i32 {
        let factor = _mm512_set1_epi8(std::hint::black_box(1));
        let mut sums = [_mm512_setzero_si512(); 12];
        for _ in 0..rounds {
            for _ in 0..8 {
                for sum in &mut sums {
                    *sum = _mm512_dpbusd_epi32(*sum, factor, factor);
                }
            }
        }
        sums.into_iter().map(|v| _mm512_reduce_add_epi32(v)).sum()
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn dot_bf16(rounds: usize) -> f32 {
        let factor = _mm512_set1_ps(std::hint::black_box(1.0));
        let factor = _mm512_cvtne2ps_pbh(factor, factor);
        let mut sums = [_mm512_setzero_ps(); 12];
        for _ in 0..rounds {
            for _ in 0..8 {
                for sum in &mut sums {
                    *sum = _mm512_dpbf16_ps(*sum, factor, factor);
                }
            }
        }
        sums.into_iter().map(|v| _mm512_reduce_add_ps(v)).sum::<f32>() / 192.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, lengths_and_offsets, noise};
    use crate::isa::witness::assert_entered;

    #[test]
    fn reads_every_element() {
        for isa in Isa::all() {
            for (len, offset) in lengths_and_offsets() {
                let data = Guarded::of(noise(len, 8), offset);
                assert_eq!(read(isa, &data), scalar::read(&data), "{len} floats");
            }
        }
        assert_entered("avx2::read");
    }

    #[test]
    fn the_sums_settle_at_one() {
        for isa in Isa::all() {
            // 1 * 0.5 + 0.5 = 1 in each lane.
            assert_eq!(multiply_add(isa, 3), 1.0);
        }
        assert_entered("avx2::multiply_add");
    }

    #[test]
    fn dot_products_sum_ones() {
        for isa in Isa::all() {
            // Without AVX2 a round has fewer lanes.
            let lanes = if isa.has_avx2() { dot_int8_ops(isa) / 2 } else { 8 * 96 * 4 };
            assert_eq!(dot_int8(isa, 3), 3 * lanes as i32, "{isa}");
            if let Some(mean) = dot_bf16(isa, 3) {
                assert_eq!(mean, 3.0 * 8.0 * 2.0);
            }
        }
    }
}
