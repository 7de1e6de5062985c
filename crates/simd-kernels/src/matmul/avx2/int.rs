//! The tile of integer products: up to 6 quantized tokens times the 16 rows of a Q8 or Q4 panel.
//!
//! ```text
//! for each group of 32 columns:
//!     for each word of the group (2 columns of int16 or 4 of int8):
//!         w0, w1 = the weights of these columns, rows 0..8 and 8..16, one 32-bit lane a row
//!         for each token m: sum[m] += dot(word[m], w)             in each lane
//!     for each token m: acc[m] += (sum[m] - zero point of the row * total of the token)
//!                                 * (scale of the row * scale of the token)
//! ```
//!
//! 1. Q8: `vpmaddwd` multiplies pairs of int16 and adds each two products in int32. 32 products of
//!    at most 127 * 32767 stay far below 2^31.
//! 2. Q4: `vpmaddubsw` multiplies unsigned nibbles by int8 and adds each two products in int16. All
//!    eight words of a group are summed there: the largest sum of magnitudes is 8 * 2 * 15 * 127 <
//!    2^15. One `vpmaddwd` with ones per group then adds the halves in int32. From their sum the
//!    zero point of the row times the sum of the token's integers is taken, in f32 and exact: these
//!    are multiples of a half below 2^17.
//! 3. With VNNI one instruction does the multiplication and the addition, for Q4 in int32 at once.
//!    The sums are the same numbers.
//! 4. The sums of a group take twelve registers for six tokens, so the f32 totals live in memory
//!    (L1) and are touched once a group (`settle`). The sums of the first word are set, not added.

use std::arch::x86_64::*;

use super::prefetch_weights;
use super::wide::WideGroup;
use crate::input::IntTile;
use crate::isa::Isa;
use crate::lanes::{LINE, add_pairs, hold, load, prefetch, settle, store, vnni};
use crate::pack::EXCESS;
use crate::panels::{PANEL, Q4_BLOCK, Q4_SCALE, Q8_BLOCK};

/// Words in a group: 8 quads or 16 pairs.
pub(super) const fn words_in_group(q4: bool) -> usize {
    if q4 { 8 } else { 16 }
}

/// The float whose last bit is worth half a step, and that in terms of starts.
const MAGIC: f32 = 32_768.0;
const _: () = assert!(MAGIC * f32::EPSILON == 0.5 / EXCESS);

/// Bytes of a packed group.
const fn block_bytes(q4: bool) -> usize {
    if q4 { Q4_BLOCK } else { Q8_BLOCK }
}

/// `acc[p][m] += Σ_k w[p][k] x[k][m]` over the groups of `panels`, and from `ahead[p]` on also asks
/// for as many bytes as a panel has (`WEIGHTS`), or from `ahead[0]` on for as many as the words of
/// `x` have.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_products<
    const Q4: bool,
    const VNNI: u8,
    const P: usize,
    const M: usize,
    const WEIGHTS: bool,
>(
    panels: [&[u8]; P],
    x: IntTile<'_>,
    acc: &mut [[[f32; PANEL]; M]; P],
    ahead: [*const u8; P],
) {
    let size = block_bytes(Q4);
    let words = x.words.as_chunks::<M>().0.chunks_exact(words_in_group(Q4));
    for panel in panels {
        let groups = panel.len() / size;
        assert!(
            groups == words.len(),
            "{groups} groups of weights, {} of activations",
            words.len()
        );
    }
    let (scales, mut starts) = (x.scales.as_chunks::<M>().0, x.starts.as_chunks::<M>().0.iter());
    for (group, (words, scales)) in words.zip(scales).enumerate() {
        let starts = starts.next();
        for ((panel, acc), ahead) in panels.iter().zip(&mut *acc).zip(ahead) {
            let block = &panel[group * size..][..size];
            let (row_scales, weights) =
                block.as_chunks::<32>().0.split_first().expect("a block starts with its scales");
            let next = if WEIGHTS { size } else { size_of_val(words) };
            let mut sums = [[_mm256_setzero_si256(); 2]; M];
            // Two words of weights are a line.
            for (i, (weights, words)) in
                weights.as_chunks::<2>().0.iter().zip(words.as_chunks::<2>().0).enumerate()
            {
                if LINE * i < next {
                    let line = ahead.wrapping_add(group * next + LINE * i);
                    if WEIGHTS { prefetch_weights(line) } else { prefetch::<_MM_HINT_T0>(line) }
                }
                for (weights, word) in weights.iter().zip(words) {
                    add_word::<Q4, VNNI, M>(widen::<Q4>(weights), word, &mut sums);
                }
            }
            if WEIGHTS {
                // A block is half a line longer than its weights: else every second one leaves out
                // a line.
                prefetch_weights(ahead.wrapping_add(group * next + size / LINE * LINE));
            }
            if Q4 {
                let starts = starts.expect("int8 activations have them");
                add_scaled_q4::<VNNI, M>(&sums, row_scales, scales, starts, acc);
            } else {
                add_scaled(&sums, widen_scales(row_scales), scales, acc);
            }
            // The few totals of a decoded token do stay in registers.
            if !WEIGHTS {
                settle(acc);
            }
        }
    }
}

/// As [`add_products`], of a part that has been widened, for plain AVX2.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_wide<const M: usize, const WEIGHTS: bool>(
    groups: &[WideGroup],
    x: IntTile<'_>,
    acc: &mut [[f32; PANEL]; M],
    ahead: *const u8,
) {
    let words = x.words.as_chunks::<M>().0.chunks_exact(words_in_group(false));
    assert!(
        groups.len() == words.len(),
        "{} groups of weights, {} of activations",
        groups.len(),
        words.len()
    );
    for (g, ((group, words), scales)) in
        groups.iter().zip(words).zip(x.scales.as_chunks::<M>().0).enumerate()
    {
        let next = if WEIGHTS { Q8_BLOCK } else { size_of_val(words) };
        for line in (g * next..(g + 1) * next).step_by(LINE) {
            let line = ahead.wrapping_add(line);
            if WEIGHTS { prefetch_weights(line) } else { prefetch::<_MM_HINT_T0>(line) }
        }
        let mut sums = [[_mm256_setzero_si256(); 2]; M];
        for (weights, word) in group.words.iter().zip(words) {
            add_word::<false, { Isa::PLAIN }, M>(
                [load_bytes(&weights[0]), load_bytes(&weights[1])],
                word,
                &mut sums,
            );
        }
        let (row_scales, _) = group.scales.as_chunks();
        add_scaled(&sums, [load(&row_scales[0]), load(&row_scales[1])], scales, acc);
        settle(acc);
    }
}

/// `sums[m] += dot(word[m], w)` in each lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_word<const Q4: bool, const VNNI: u8, const M: usize>(
    w: [__m256i; 2],
    word: &[i32; M],
    sums: &mut [[__m256i; 2]; M],
) {
    for (sums, x) in sums.iter_mut().zip(word) {
        let x = _mm256_set1_epi32(*x);
        for (sum, w) in sums.iter_mut().zip(w) {
            if Q4 { add_quads::<VNNI>(sum, w, x) } else { add_pairs::<VNNI>(sum, w, x) }
        }
    }
}

/// `sum += dot(w, x)` of the four bytes in each lane, those of `w` unsigned: as int32 with VNNI, or
/// as two int16 with AVX2.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_quads<const VNNI: u8>(sum: &mut __m256i, w: __m256i, x: __m256i) {
    vnni!("vpdpbusd", VNNI, sum, w, x, {
        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(w, x));
        hold(sum);
    })
}

/// The sum of the two int16 of each lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_halves(v: __m256i) -> __m256i {
    _mm256_madd_epi16(v, _mm256_set1_epi16(1))
}

/// `acc[m] += sums[m] * row_scales * scales[m]`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_scaled<const M: usize>(
    sums: &[[__m256i; 2]; M],
    row_scales: [__m256; 2],
    scales: &[f32; M],
    acc: &mut [[f32; PANEL]; M],
) {
    for ((sums, scale), acc) in sums.iter().zip(scales).zip(acc) {
        let scale = _mm256_set1_ps(*scale);
        for ((sum, row_scale), acc) in sums.iter().zip(row_scales).zip(acc.as_chunks_mut().0) {
            let both = _mm256_mul_ps(row_scale, scale);
            store(acc, _mm256_fmadd_ps(_mm256_cvtepi32_ps(*sum), both, load(acc)));
        }
    }
}

/// As [`add_scaled`] for Q4, with the zero points that stand beside the scales in `words`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_scaled_q4<const VNNI: u8, const M: usize>(
    sums: &[[__m256i; 2]; M],
    words: &[u8; 32],
    scales: &[f32; M],
    starts: &[f32; M],
    acc: &mut [[f32; PANEL]; M],
) {
    let words = load_bytes(words);
    let bits = _mm256_and_si256(_mm256_srli_epi16::<1>(words), _mm256_set1_epi16(Q4_SCALE as i16));
    let row_scales = halves(bits).map(|half| _mm256_cvtph_ps(half));
    // In half steps from code 0 on, and starts are multiples of the excess: as the last bits of a
    // float that are worth as much. Converted and multiplied instead they took 2 % of the speed of
    // Q4.
    let magic = _mm256_set1_ps(MAGIC);
    let first = _mm256_add_epi32(_mm256_castps_si256(magic), _mm256_set1_epi32(8));
    let zeros = halves(_mm256_and_si256(words, _mm256_set1_epi16(15))).map(|half| {
        let bits = _mm256_add_epi32(_mm256_cvtepi16_epi32(half), first);
        _mm256_sub_ps(_mm256_castsi256_ps(bits), magic)
    });
    for (((sums, scale), start), acc) in sums.iter().zip(scales).zip(starts).zip(acc) {
        let (scale, start) = (_mm256_set1_ps(*scale), _mm256_set1_ps(*start));
        for (i, (sum, acc)) in sums.iter().zip(acc.as_chunks_mut().0).enumerate() {
            // Without VNNI the sums are two int16 in a lane.
            let sum = if VNNI == Isa::PLAIN { add_halves(*sum) } else { *sum };
            let sum = _mm256_fmadd_ps(zeros[i], start, _mm256_cvtepi32_ps(sum));
            store(acc, _mm256_fmadd_ps(sum, _mm256_mul_ps(row_scales[i], scale), load(acc)));
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(v: __m256i) -> [__m128i; 2] {
    [_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v)]
}

/// A packed word as two registers of int16 pairs (Q8) or of unsigned bytes (Q4), rows 0..8 and
/// 8..16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widen<const Q4: bool>(word: &[u8; 32]) -> [__m256i; 2] {
    let packed = load_bytes(word);
    if Q4 {
        let low = _mm256_set1_epi8(15);
        [_mm256_and_si256(packed, low), _mm256_and_si256(_mm256_srli_epi16::<4>(packed), low)]
    } else {
        widen_q8(packed)
    }
}

/// 32 int8 as int16.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen_q8(packed: __m256i) -> [__m256i; 2] {
    halves(packed).map(|half| _mm256_cvtepi8_epi16(half))
}

/// The sixteen f16 scales of a Q8 block.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn widen_scales(scales: &[u8; 32]) -> [__m256; 2] {
    halves(load_bytes(scales)).map(|half| _mm256_cvtph_ps(half))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load_bytes(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: the array is 32 readable bytes, and the unaligned load asks for nothing else.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}
