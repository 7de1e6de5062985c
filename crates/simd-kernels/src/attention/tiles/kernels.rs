//! The three inner loops of tiled attention, in registers: scores, softmax, weighted values.

use crate::exp::exp256;
use crate::kv::{BLOCK, Plain};
use crate::lanes::{self, LANES, first, load, load_tail, store, store_tail};
use std::arch::x86_64::*;
use std::ops::Range;
const KD: usize = 12288;
const VD: usize = 12288;
const KH: i32 = _MM_HINT_T0;
const VH: i32 = _MM_HINT_T0;

/// Rows of a full panel: 6 x 2 sums, two vectors of keys and one query element fill 15 of the 16 registers.
pub(super) const PANEL_ROWS: usize = 6;

/// A stored number that becomes f32 on the way to the registers.
pub(super) trait Element: Plain {
    /// Sixteen numbers as f32.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C. (A trait cannot say so with `#[target_feature]`, which would not inline either.)
    unsafe fn widen(x: &[Self; BLOCK]) -> [__m256; 2];
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn widen(x: &[f32; BLOCK]) -> [__m256; 2] {
        // SAFETY: the array is 64 readable bytes; the caller vouches for AVX.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(LANES))] }
    }
}

impl Element for u16 {
    #[inline(always)]
    unsafe fn widen(x: &[u16; BLOCK]) -> [__m256; 2] {
        // SAFETY: the array is 32 readable bytes; the caller vouches for F16C.
        unsafe {
            let low = _mm_loadu_si128(x.as_ptr().cast());
            let high = _mm_loadu_si128(x.as_ptr().add(LANES).cast());
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
    }
}

/// out[r * stride + j] = Σ_d q[d][r] keys[d][j], for R rows and the sixteen keys of a block.
///
/// keys: [head_dim][16], q: [head_dim][R]. Few rows leave few sums, too few to hide the latency of the FMA: then S
/// elements of the head in turn go to sums of their own.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scores<K: Element, const R: usize, const S: usize>(
    keys: &[[K; BLOCK]],
    q: &[f32],
    out: &mut [f32],
    stride: usize,
) {
    let (q, _) = q.as_chunks::<R>();
    let mut sums = [[[_mm256_setzero_ps(); 2]; R]; S];
    let (keys_u, keys_rest) = keys.as_chunks::<UNROLL>();
    let (q_u, q_rest) = q.as_chunks::<UNROLL>();
    for (keys, q) in keys_u.iter().zip(q_u) {
        for u in 0..UNROLL {
            prefetch::<_, KD>(&keys[u], u);
            add_scores(&keys[u], &q[u], &mut sums[u % S]);
        }
    }
    for (keys, q) in keys_rest.iter().zip(q_rest) {
        add_scores(keys, q, &mut sums[0]);
    }
    for r in 0..R {
        let (halves, _) = out[r * stride..][..BLOCK].as_chunks_mut::<LANES>();
        for h in 0..2 {
            let total = sums[1..].iter().fold(sums[0][r][h], |total, part| _mm256_add_ps(total, part[r][h]));
            store(&mut halves[h], total);
        }
    }
}

/// Asks for the line that many bytes ahead, once per line.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch<T: Plain, const AHEAD: usize>(x: &[T; BLOCK], index: usize) {
    if size_of::<T>() < 4 && index * size_of::<[T; BLOCK]>() % 64 == 0 {
        _mm_prefetch::<KH>(x.as_ptr().wrapping_byte_add(AHEAD).cast());
    }
}

const UNROLL: usize = 4;

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_scores<K: Element, const R: usize>(keys: &[K; BLOCK], q: &[f32; R], sums: &mut [[__m256; 2]; R]) {
    // SAFETY: this function runs only where its target features are there, the ones that `widen` needs.
    let keys = unsafe { K::widen(keys) };
    for r in 0..R {
        let q = _mm256_set1_ps(q[r]);
        sums[r] = [_mm256_fmadd_ps(q, keys[0], sums[r][0]), _mm256_fmadd_ps(q, keys[1], sums[r][1])];
    }
}

/// acc[r * acc_stride + 16 c + i] += Σ_j weights[r * weight_stride + j] values[c][j][i], for R rows, the keys j in
/// `taken`, and chunks c of sixteen elements, of which `values` holds [chunks][run][16].
///
/// As with [`scores`], few rows leave too few sums; then S keys in turn go to sums of their own.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn blend<V: Element, const R: usize, const S: usize>(
    values: &[[V; BLOCK]],
    run: usize,
    taken: Range<usize>,
    weights: &[f32],
    weight_stride: usize,
    acc: &mut [f32],
    acc_stride: usize,
) {
    let last = (R - 1) * weight_stride + taken.end;
    assert!(last <= weights.len(), "{R} rows of weights reach to {last} of {}", weights.len());
    for (c, chunk) in values.chunks_exact(run).enumerate() {
        let mut sums = [[[_mm256_setzero_ps(); 2]; R]; S];
        for (r, sums) in sums[0].iter_mut().enumerate() {
            let (halves, _) = acc[r * acc_stride + c * BLOCK..][..BLOCK].as_chunks::<LANES>();
            *sums = [load(&halves[0]), load(&halves[1])];
        }
        let (values_u, values_rest) = chunk[taken.clone()].as_chunks::<UNROLL>();
        let mut j = taken.start;
        for values in values_u {
            for u in 0..UNROLL {
                prefetch::<_, VD>(&values[u], u);
                // SAFETY: j + u is below taken.end, for which the assert above has the weights.
                unsafe { add_values(&values[u], weights, j + u, weight_stride, &mut sums[u % S]) };
            }
            j += UNROLL;
        }
        for value in values_rest {
            // SAFETY: as above.
            unsafe { add_values(value, weights, j, weight_stride, &mut sums[0]) };
            j += 1;
        }
        for r in 0..R {
            let (halves, _) = acc[r * acc_stride + c * BLOCK..][..BLOCK].as_chunks_mut::<LANES>();
            for h in 0..2 {
                let total = sums[1..].iter().fold(sums[0][r][h], |total, part| _mm256_add_ps(total, part[r][h]));
                store(&mut halves[h], total);
            }
        }
    }
}

/// # Safety
/// `(R - 1) * stride + j` is inside `weights`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_values<V: Element, const R: usize>(
    value: &[V; BLOCK],
    weights: &[f32],
    j: usize,
    stride: usize,
    sums: &mut [[__m256; 2]; R],
) {
    // SAFETY: the target features of this function are those that `widen` needs.
    let value = unsafe { V::widen(value) };
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller keeps the last row's weight inside.
        let w = _mm256_broadcast_ss(unsafe { weights.get_unchecked(r * stride + j) });
        *sums = [_mm256_fmadd_ps(w, value[0], sums[0]), _mm256_fmadd_ps(w, value[1], sums[1])];
    }
}

/// One step of the online softmax of a row: scores become weights e^(x − m) with the new maximum m, `max` and `sum` move
/// on. Returns the factor e^(old m − m) for what the row gathered before; 1 when the maximum did not move.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn soften(scores: &mut [f32], max: &mut f32, sum: &mut f32) -> f32 {
    let (chunks, tail) = scores.as_chunks_mut::<LANES>();
    let tail_lanes = _mm256_castsi256_ps(first(tail.len()));
    let floor = _mm256_set1_ps(f32::NEG_INFINITY);
    let mut most = [_mm256_blendv_ps(floor, load_tail(tail), tail_lanes), floor];
    let (twos, one) = chunks.as_chunks::<2>();
    for two in twos {
        most[0] = _mm256_max_ps(load(&two[0]), most[0]);
        most[1] = _mm256_max_ps(load(&two[1]), most[1]);
    }
    for x in one {
        most[0] = _mm256_max_ps(load(x), most[0]);
    }
    let seen = lanes::max(_mm256_max_ps(most[0], most[1]));
    let mut factor = 1.0;
    if seen > *max {
        factor = crate::exp::scalar::exp1(*max - seen);
        *max = seen;
        *sum *= factor;
    } else if *max == f32::NEG_INFINITY {
        // Nothing but scores of −∞ so far; −∞ − (−∞) would be NaN.
        scores.fill(0.0);
        return factor;
    }
    let m = _mm256_set1_ps(*max);
    let mut sums = [_mm256_setzero_ps(); 2];
    for (i, x) in chunks.iter_mut().enumerate() {
        let weight = exp256(_mm256_sub_ps(load(x), m));
        store(x, weight);
        sums[i & 1] = _mm256_add_ps(sums[i & 1], weight);
    }
    let weight = _mm256_and_ps(exp256(_mm256_sub_ps(load_tail(tail), m)), tail_lanes);
    store_tail(tail, weight);
    *sum += lanes::sum(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), weight));
    factor
}
