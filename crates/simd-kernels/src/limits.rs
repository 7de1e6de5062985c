//! The two limits of a core, to be timed next to the kernels: multiply-add rate and read bandwidth.
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
}
