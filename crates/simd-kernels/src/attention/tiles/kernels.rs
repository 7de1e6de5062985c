//! The three inner loops of tiled attention, in registers: scores, softmax, weighted values.

use crate::attention::state::sum_without_maximum;
use crate::exp::exp256;
use crate::kv::{BLOCK, KV_GROUP, LINE, Plain};
use crate::lanes::{self, LANES, first, load, load_tail, prefetch, store, store_tail};
use std::arch::x86_64::*;

/// Rows of a full panel: 6 x 2 sums, two vectors of keys and one query element fill 15 of the 16
/// registers.
pub(super) const PANEL_ROWS: usize = 6;

/// Elements of a loop that go together.
const UNROLL: usize = 4;

/// A stored number that becomes f32 on the way to the registers.
pub(super) trait Element: Plain {
    /// Whether the numbers are codes, to be multiplied by the scale of their position and group of
    /// 32.
    const SCALED: bool;

    /// Bytes by which a stream from memory is asked for ahead of its use, into the L1 cache and
    /// earlier into the L2 cache. The hardware's prefetchers alone stop at each turn from keys to
    /// values.
    ///
    /// Measured with two query heads. On two cores of a Sapphire Rapids f16 only: one prefetch into
    /// L1 8 to 16 KiB ahead 34 GB/s, 6 KiB ahead 35, 1 to 4 KiB with 5 to 7 KiB 39, which is what a
    /// plain read gets. On a Zen 4, microseconds for 4096 positions of a KV head:
    ///
    /// | KiB | 3, 6 | 4, 5 | 4, 7 | 1, 6 | 1, 7 |
    /// |---|---|---|---|---|---|
    /// | f16 | 103 | 98 | 103 | 95 | 84 |
    /// | codes | 82 | 82 | 81 | 104 | 100 |
    /// | f32 | 202 | 183 | 194 | 218 | 211 |
    const AHEAD: [usize; 2];

    /// Sixteen numbers as f32.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA and F16C. (A safe method of a trait cannot have target features.)
    unsafe fn widen(x: &[Self; BLOCK]) -> [__m256; 2];
}

impl Element for f32 {
    const SCALED: bool = false;
    const AHEAD: [usize; 2] = [4 << 10, 5 << 10];

    #[inline(always)]
    unsafe fn widen(x: &[f32; BLOCK]) -> [__m256; 2] {
        // SAFETY: the array is 64 readable bytes; the caller vouches for AVX.
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(LANES))] }
    }
}

impl Element for u16 {
    const SCALED: bool = false;
    const AHEAD: [usize; 2] = [1 << 10, 7 << 10];

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

impl Element for i8 {
    const SCALED: bool = true;
    const AHEAD: [usize; 2] = [4 << 10, 5 << 10];

    #[inline(always)]
    unsafe fn widen(x: &[i8; BLOCK]) -> [__m256; 2] {
        // SAFETY: the array is 16 readable bytes; the caller vouches for AVX2.
        unsafe {
            let low = _mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().cast()));
            let high = _mm256_cvtepi8_epi32(_mm_loadl_epi64(x.as_ptr().add(LANES).cast()));
            [_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)]
        }
    }
}

/// Sums of R rows and sixteen lanes, in S parts.
type Sums<const R: usize, const S: usize> = [[[__m256; 2]; R]; S];

/// The S parts of a row's sums together.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn total<const R: usize, const S: usize>(sums: &Sums<R, S>, row: usize) -> [__m256; 2] {
    let mut total = sums[0][row];
    for part in &sums[1..] {
        total = [_mm256_add_ps(total[0], part[row][0]), _mm256_add_ps(total[1], part[row][1])];
    }
    total
}

/// Asks for the lines [`AHEAD`](Element::AHEAD) of the `index`-th of some numbers, once per line.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch_stream<T: Element>(x: &[T; BLOCK], index: usize) {
    if (index * size_of::<[T; BLOCK]>()).is_multiple_of(LINE) {
        let line = x.as_ptr().cast::<u8>();
        prefetch::<_MM_HINT_T0>(line.wrapping_add(T::AHEAD[0]));
        prefetch::<_MM_HINT_T1>(line.wrapping_add(T::AHEAD[1]));
    }
}

/// out[r * stride + j] = Σ_d q[d][r] keys[d][j], for R rows and the sixteen keys of a block.
///
/// keys: [head_dim][16], q: [head_dim][R], scales: [groups][16] of scaled keys. Few rows leave few
/// sums, too few to hide the latency of the FMA: then S elements of the head in turn go to sums of
/// their own. STREAM: the keys come from memory.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scores<K: Element, const R: usize, const S: usize, const STREAM: bool>(
    keys: &[[K; BLOCK]],
    scales: &[[u16; BLOCK]],
    q: &[f32],
    out: &mut [f32],
    stride: usize,
) {
    let (q, _) = q.as_chunks::<R>();
    if !K::SCALED {
        let sums = products::<K, R, S, STREAM>(keys, q);
        for r in 0..R {
            put(&mut out[r * stride..], total(&sums, r));
        }
        return;
    }
    for r in 0..R {
        out[r * stride..][..BLOCK].fill(0.0);
    }
    for ((keys, q), scale) in keys.chunks(KV_GROUP).zip(q.chunks(KV_GROUP)).zip(scales) {
        let sums = products::<K, R, S, STREAM>(keys, q);
        // SAFETY: the target features of this function are those that `widen` needs.
        let scale = unsafe { u16::widen(scale) };
        for r in 0..R {
            let (group, before) = (total(&sums, r), get(&out[r * stride..]));
            let after = [
                _mm256_fmadd_ps(scale[0], group[0], before[0]),
                _mm256_fmadd_ps(scale[1], group[1], before[1]),
            ];
            put(&mut out[r * stride..], after);
        }
    }
}

/// Σ_d q[d][r] keys[d][j].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn products<K: Element, const R: usize, const S: usize, const STREAM: bool>(
    keys: &[[K; BLOCK]],
    q: &[[f32; R]],
) -> Sums<R, S> {
    let mut sums = [[[_mm256_setzero_ps(); 2]; R]; S];
    let (keys_u, keys_rest) = keys.as_chunks::<UNROLL>();
    let (q_u, q_rest) = q.as_chunks::<UNROLL>();
    for (keys, q) in keys_u.iter().zip(q_u) {
        for u in 0..UNROLL {
            if STREAM {
                prefetch_stream(&keys[u], u);
            }
            add_scores(&keys[u], &q[u], &mut sums[u % S]);
        }
    }
    for (keys, q) in keys_rest.iter().zip(q_rest) {
        add_scores(keys, q, &mut sums[0]);
    }
    sums
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_scores<K: Element, const R: usize>(
    keys: &[K; BLOCK],
    q: &[f32; R],
    sums: &mut [[__m256; 2]; R],
) {
    // SAFETY: this function runs only where its target features are there, the ones that `widen`
    // needs.
    let keys = unsafe { K::widen(keys) };
    for r in 0..R {
        let q = _mm256_set1_ps(q[r]);
        sums[r] =
            [_mm256_fmadd_ps(q, keys[0], sums[r][0]), _mm256_fmadd_ps(q, keys[1], sums[r][1])];
    }
}

/// The values that a call of [`blend`] takes.
#[derive(Clone, Copy)]
pub(super) struct Values<'a, V> {
    /// [chunks][run][16].
    pub chunks: &'a [[V; BLOCK]],
    /// [groups][16] of scaled values, whose run is 16.
    pub scales: &'a [[u16; BLOCK]],
    /// Keys of a chunk.
    pub run: usize,
    /// First key taken of each chunk, and the key after the last.
    pub from: usize,
    pub to: usize,
}

/// acc[r * acc_stride + 16 c + i] += Σ_j weights[r * weight_stride + j] values[c][j][i], for R rows
/// and chunks c of sixteen elements.
///
/// As with [`scores`], few rows leave too few sums; then S keys in turn go to sums of their own.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn blend<V: Element, const R: usize, const S: usize, const STREAM: bool>(
    values: Values<'_, V>,
    weights: &[f32],
    weight_stride: usize,
    acc: &mut [f32],
    acc_stride: usize,
) {
    for (c, chunk) in values.chunks.chunks_exact(values.run).enumerate() {
        let acc = &mut acc[c * BLOCK..];
        if !V::SCALED {
            let weights = &weights[values.from..];
            add_chunk::<V, R, S, STREAM>(
                &chunk[values.from..values.to],
                weights,
                weight_stride,
                acc,
                acc_stride,
            );
            continue;
        }
        // SAFETY: the target features of this function are those that `widen` needs.
        let scale = unsafe { u16::widen(&values.scales[c * BLOCK / KV_GROUP]) };
        let mut scaled = [[0.0; BLOCK]; R];
        for (r, scaled) in scaled.iter_mut().enumerate() {
            let weights = get(&weights[r * weight_stride..]);
            put(scaled, [_mm256_mul_ps(weights[0], scale[0]), _mm256_mul_ps(weights[1], scale[1])]);
        }
        let weights = &scaled.as_flattened()[values.from..];
        add_chunk::<V, R, S, STREAM>(
            &chunk[values.from..values.to],
            weights,
            BLOCK,
            acc,
            acc_stride,
        );
    }
}

/// One chunk of [`blend`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_chunk<V: Element, const R: usize, const S: usize, const STREAM: bool>(
    values: &[[V; BLOCK]],
    weights: &[f32],
    weight_stride: usize,
    acc: &mut [f32],
    acc_stride: usize,
) {
    let last = (R - 1) * weight_stride + values.len();
    assert!(last <= weights.len(), "{R} rows of weights reach to {last} of {}", weights.len());
    let mut sums: Sums<R, S> = [[[_mm256_setzero_ps(); 2]; R]; S];
    for (r, sums) in sums[0].iter_mut().enumerate() {
        *sums = get(&acc[r * acc_stride..]);
    }
    let (values_u, values_rest) = values.as_chunks::<UNROLL>();
    for (j, values) in values_u.iter().enumerate() {
        for u in 0..UNROLL {
            if STREAM {
                prefetch_stream(&values[u], u);
            }
            // SAFETY: UNROLL j + u is below the number of values, and the assert above bounds the
            // weights by it.
            unsafe {
                add_values(&values[u], weights, UNROLL * j + u, weight_stride, &mut sums[u % S])
            };
        }
    }
    for (j, value) in values_rest.iter().enumerate() {
        // SAFETY: as above.
        unsafe {
            add_values(value, weights, UNROLL * values_u.len() + j, weight_stride, &mut sums[0])
        };
    }
    for r in 0..R {
        put(&mut acc[r * acc_stride..], total(&sums, r));
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

/// Sixteen floats, the first of `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn get(x: &[f32]) -> [__m256; 2] {
    let (halves, _) = x[..BLOCK].as_chunks::<LANES>();
    [load(&halves[0]), load(&halves[1])]
}

/// Into the first sixteen of `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn put(x: &mut [f32], v: [__m256; 2]) {
    let (halves, _) = x[..BLOCK].as_chunks_mut::<LANES>();
    store(&mut halves[0], v[0]);
    store(&mut halves[1], v[1]);
}

/// One step of the online softmax of a row: scores become weights e^(x − m) with the new maximum m,
/// `max` and `sum` move on. Returns the factor e^(old m − m) for what the row gathered before; 1
/// when the maximum did not move.
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
        *sum += sum_without_maximum(scores);
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
