//! Half-precision numbers in pairs, two in the place of an f32: for buffers of f32 that are sent or
//! kept in half the space.

use crate::isa::{Isa, dispatch};

/// Each place of `out` holds two numbers of `x`, rounded to nearest even, the first in its lower
/// half. A place is not to be calculated with.
///
/// # Panics
/// When `x` has not twice as many numbers as `out` has places.
pub fn pack_halves(isa: Isa, x: &[f32], out: &mut [f32]) {
    assert_eq!(
        x.len(),
        2 * out.len(),
        "pack_halves: {} numbers into {} places",
        x.len(),
        out.len()
    );
    dispatch!(isa, avx2::pack, scalar::pack, (x, out))
}

/// The numbers in `x`, exactly.
///
/// # Panics
/// When `out` has not twice as many numbers as `x` has places.
pub fn unpack_halves(isa: Isa, x: &[f32], out: &mut [f32]) {
    assert_eq!(
        2 * x.len(),
        out.len(),
        "unpack_halves: {} places into {} numbers",
        x.len(),
        out.len()
    );
    dispatch!(isa, avx2::unpack, scalar::unpack, (x, out))
}

mod scalar {
    use crate::half_float::{f16_to_f32, f32_to_f16};

    pub(super) fn pack(x: &[f32], out: &mut [f32]) {
        for (out, [low, high]) in out.iter_mut().zip(x.as_chunks().0) {
            *out = f32::from_bits(u32::from(f32_to_f16(*low)) | u32::from(f32_to_f16(*high)) << 16);
        }
    }

    pub(super) fn unpack(x: &[f32], out: &mut [f32]) {
        for (x, [low, high]) in x.iter().zip(out.as_chunks_mut().0) {
            (*low, *high) =
                (f16_to_f32(x.to_bits() as u16), f16_to_f32((x.to_bits() >> 16) as u16));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use crate::lanes::{LANES, load, store};

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn pack(x: &[f32], out: &mut [f32]) {
        let (x, x_tail) = x.as_chunks::<LANES>();
        let (out, out_tail) = out.as_chunks_mut::<{ LANES / 2 }>();
        for (out, x) in out.iter_mut().zip(x) {
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(load(x));
            // SAFETY: `out` is sixteen writable bytes.
            unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), halves) };
        }
        super::scalar::pack(x_tail, out_tail);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn unpack(x: &[f32], out: &mut [f32]) {
        let (x, x_tail) = x.as_chunks::<{ LANES / 2 }>();
        let (out, out_tail) = out.as_chunks_mut::<LANES>();
        for (x, out) in x.iter().zip(out) {
            // SAFETY: `x` is sixteen readable bytes.
            let halves = unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
            store(out, _mm256_cvtph_ps(halves));
        }
        super::scalar::unpack(x_tail, out_tail);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, lengths_and_offsets, noise};
    use crate::half_float::{f16_to_f32, f32_to_f16};
    use crate::isa::witness::assert_entered;

    #[test]
    fn what_is_unpacked_was_rounded_once() {
        for isa in Isa::all() {
            for (places, offset) in lengths_and_offsets() {
                let mut x = noise(2 * places, 5);
                // Beyond the largest half, below the smallest, and no number at all.
                for (x, special) in
                    x.iter_mut().step_by(3).zip([1e6, -1e-9, f32::INFINITY, f32::NAN])
                {
                    *x = special;
                }
                let x = Guarded::of(x, offset);
                let (mut packed, mut out) =
                    (Guarded::output(places, offset), Guarded::output(2 * places, offset));
                pack_halves(isa, &x, &mut packed);
                unpack_halves(isa, &packed, &mut out);
                for (i, (x, out)) in x.iter().zip(out.iter()).enumerate() {
                    let once = f16_to_f32(f32_to_f16(*x));
                    assert_eq!(
                        out.to_bits(),
                        once.to_bits(),
                        "{isa}, {places} places, number {i}: {x}"
                    );
                }
                let mut again = Guarded::output(places, 0);
                pack_halves(isa, &out, &mut again);
                assert!(
                    packed.iter().zip(again.iter()).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{isa}, {places}"
                );
            }
        }
        assert_entered("avx2::pack");
        assert_entered("avx2::unpack");
    }
}
