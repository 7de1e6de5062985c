//! The three inner loops of tiled attention, in registers: scores, softmax, weighted values.

use crate::attention::state::sum_without_maximum;
use crate::exp::exp256;
use crate::kv::{BLOCK, KV_GROUP, KvHead, LINE, Plain};
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

/// Sums of N blocks of keys, or chunks of values, for R rows and sixteen lanes.
type Sums<const R: usize, const N: usize> = [[[__m256; 2]; R]; N];

/// Where a stream goes on behind the end of a span.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// Address behind the span, and from there to the start of the next one. Behind the last span
    /// the stream ends; its own start is asked for, which costs nothing.
    end: usize,
    jump: usize,
}

impl Ahead {
    /// For a stream through span `n` and then the next one.
    pub(super) fn new(kv: &KvHead<'_>, n: usize) -> Ahead {
        let range = |n: usize| kv.span(n).map(|span| span.numbers::<i8>().as_ptr_range());
        let Some(own) = range(n) else { return Ahead { end: usize::MAX, jump: 0 } };
        let (end, next) = (own.end as usize, range(n + 1).unwrap_or(own.clone()));
        Ahead { end, jump: (next.start as usize).wrapping_sub(end) }
    }

    /// From each line of some numbers to the lines that are asked for meanwhile,
    /// [`AHEAD`](Element::AHEAD) in the stream. All of them jump where most of those lines would
    /// lie behind the span: a comparison for each line took an eighth of the time.
    #[inline]
    fn distances<T: Element>(self, x: &[[T; BLOCK]]) -> [usize; 2] {
        let middle = x.as_ptr().addr() + size_of_val(x) / 2;
        T::AHEAD.map(
            |ahead| {
                if middle + ahead >= self.end { ahead.wrapping_add(self.jump) } else { ahead }
            },
        )
    }
}

/// Asks for the lines at some distances of the `index`-th of some numbers, once per line.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch_stream<T: Element>(x: &[T; BLOCK], index: usize, [near, far]: [usize; 2]) {
    if (index * size_of::<[T; BLOCK]>()).is_multiple_of(LINE) {
        let line = x.as_ptr().cast::<u8>();
        prefetch::<_MM_HINT_T0>(line.wrapping_add(near));
        prefetch::<_MM_HINT_T1>(line.wrapping_add(far));
    }
}

/// A block of keys as stored: [head_dim][16], and the scales [groups][16] of scaled ones.
#[derive(Clone, Copy)]
pub(super) struct Block<'a, K> {
    pub keys: &'a [[K; BLOCK]],
    pub scales: &'a [[u16; BLOCK]],
}

/// out[r * stride + 16 b + j] = Σ_d q[d][r] keys_b[d][j], for R rows and the sixteen keys of each
/// of B blocks.
///
/// q: [head_dim][R]. STREAM: the keys come from memory.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scores<K: Element, const R: usize, const B: usize, const STREAM: bool>(
    blocks: [Block<'_, K>; B],
    q: &[f32],
    (out, stride): (&mut [f32], usize),
    ahead: Ahead,
) {
    let (q, _) = q.as_chunks::<R>();
    if !K::SCALED {
        let sums = products::<K, R, B, STREAM>(blocks.map(|block| block.keys), q, ahead);
        for (b, sums) in sums.into_iter().enumerate() {
            for (r, sum) in sums.into_iter().enumerate() {
                put(&mut out[r * stride + b * BLOCK..], sum);
            }
        }
        return;
    }
    for r in 0..R {
        out[r * stride..][..B * BLOCK].fill(0.0);
    }
    for (g, q) in q.chunks(KV_GROUP).enumerate() {
        let keys = blocks.map(|block| &block.keys[g * KV_GROUP..][..q.len()]);
        let sums = products::<K, R, B, STREAM>(keys, q, ahead);
        for (b, sums) in sums.into_iter().enumerate() {
            // SAFETY: the target features of this function are those that `widen` needs.
            let scale = unsafe { u16::widen(&blocks[b].scales[g]) };
            for (r, group) in sums.into_iter().enumerate() {
                let out = &mut out[r * stride + b * BLOCK..];
                let before = get(out);
                let after = [
                    _mm256_fmadd_ps(scale[0], group[0], before[0]),
                    _mm256_fmadd_ps(scale[1], group[1], before[1]),
                ];
                put(out, after);
            }
        }
    }
}

/// Σ_d q[d][r] keys_b[d][j].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
// Indices over the blocks: with iterators the sums did not stay in registers.
fn products<K: Element, const R: usize, const B: usize, const STREAM: bool>(
    keys: [&[[K; BLOCK]]; B],
    q: &[[f32; R]],
    ahead: Ahead,
) -> Sums<R, B> {
    let mut sums = [[[_mm256_setzero_ps(); 2]; R]; B];
    let keys = keys.map(|keys| &keys[..q.len()]);
    let (q_u, q_rest) = q.as_chunks::<UNROLL>();
    let keys_u = keys.map(|keys| &keys.as_chunks::<UNROLL>().0[..q_u.len()]);
    let distances = keys.map(|keys| ahead.distances(keys));
    for (i, q) in q_u.iter().enumerate() {
        for u in 0..UNROLL {
            for b in 0..B {
                let keys = &keys_u[b][i][u];
                if STREAM {
                    prefetch_stream(keys, u, distances[b]);
                }
                add_scores(keys, &q[u], &mut sums[b]);
            }
        }
    }
    let done = q_u.len() * UNROLL;
    for (i, q) in q_rest.iter().enumerate() {
        for (keys, sums) in keys.iter().zip(&mut sums) {
            add_scores(&keys[done + i], q, sums);
        }
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
/// and chunks c of sixteen elements, of which C meet the weights at once.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn blend<V: Element, const R: usize, const C: usize, const STREAM: bool>(
    values: Values<'_, V>,
    (weights, weight_stride): (&[f32], usize),
    (acc, acc_stride): (&mut [f32], usize),
    ahead: Ahead,
) {
    let chunks = values.chunks.len() / values.run;
    let weights = (weights, weight_stride);
    let mut c = 0;
    while c + C <= chunks {
        add_chunks::<V, R, C, STREAM>(values, c, weights, (acc, acc_stride), ahead);
        c += C;
    }
    while c < chunks {
        add_chunks::<V, R, 1, STREAM>(values, c, weights, (acc, acc_stride), ahead);
        c += 1;
    }
}

/// Chunks `first..first + C` of [`blend`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_chunks<V: Element, const R: usize, const C: usize, const STREAM: bool>(
    values: Values<'_, V>,
    first: usize,
    (weights, weight_stride): (&[f32], usize),
    (acc, acc_stride): (&mut [f32], usize),
    ahead: Ahead,
) {
    let Values { run, from, to, .. } = values;
    let chunk = |c: usize| &values.chunks[(first + c) * run..][from..to];
    let chunks: [&[[V; BLOCK]]; C] = std::array::from_fn(chunk);
    let acc = &mut acc[first * BLOCK..];
    if !V::SCALED {
        let weights = [(&weights[from..], weight_stride); C];
        return add_weighted::<V, R, C, STREAM>(chunks, weights, (acc, acc_stride), ahead);
    }
    let mut scaled = [[[0.0; BLOCK]; R]; C];
    for (c, scaled) in scaled.iter_mut().enumerate() {
        // SAFETY: the target features of this function are those that `widen` needs.
        let scale = unsafe { u16::widen(&values.scales[(first + c) * BLOCK / KV_GROUP]) };
        for (r, scaled) in scaled.iter_mut().enumerate() {
            let weights = get(&weights[r * weight_stride..]);
            put(scaled, [_mm256_mul_ps(weights[0], scale[0]), _mm256_mul_ps(weights[1], scale[1])]);
        }
    }
    let weights = scaled.each_ref().map(|scaled| (&scaled.as_flattened()[from..], BLOCK));
    add_weighted::<V, R, C, STREAM>(chunks, weights, (acc, acc_stride), ahead);
}

/// acc[r * acc_stride + 16 c + i] += Σ_j weights_c[r * stride_c + j] values_c[j][i].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
// Indices over the chunks, as in `products`.
#[expect(clippy::needless_range_loop)]
fn add_weighted<V: Element, const R: usize, const C: usize, const STREAM: bool>(
    values: [&[[V; BLOCK]]; C],
    weights: [(&[f32], usize); C],
    (acc, acc_stride): (&mut [f32], usize),
    ahead: Ahead,
) {
    let keys = values[0].len();
    let values = values.map(|values| &values[..keys]);
    for (weights, stride) in weights {
        let last = (R - 1) * stride + keys;
        assert!(last <= weights.len(), "{R} rows of weights reach to {last} of {}", weights.len());
    }
    let mut sums: Sums<R, C> = [[[_mm256_setzero_ps(); 2]; R]; C];
    for (c, sums) in sums.iter_mut().enumerate() {
        for (r, sum) in sums.iter_mut().enumerate() {
            *sum = get(&acc[r * acc_stride + c * BLOCK..]);
        }
    }
    let values_u = values.map(|values| &values.as_chunks::<UNROLL>().0[..keys / UNROLL]);
    let distances = values.map(|values| ahead.distances(values));
    for j in 0..keys / UNROLL {
        for u in 0..UNROLL {
            for c in 0..C {
                let value = &values_u[c][j][u];
                if STREAM {
                    prefetch_stream(value, u, distances[c]);
                }
                // SAFETY: UNROLL j + u is below the number of values, and the assert above bounds
                // the weights by it.
                unsafe { add_values(value, weights[c], UNROLL * j + u, &mut sums[c]) };
            }
        }
    }
    for j in keys / UNROLL * UNROLL..keys {
        for ((values, weights), sums) in values.iter().zip(weights).zip(&mut sums) {
            // SAFETY: as above.
            unsafe { add_values(&values[j], weights, j, sums) };
        }
    }
    for (c, sums) in sums.into_iter().enumerate() {
        for (r, sum) in sums.into_iter().enumerate() {
            put(&mut acc[r * acc_stride + c * BLOCK..], sum);
        }
    }
}

/// # Safety
/// `(R - 1) * stride + j` is inside the weights.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_values<V: Element, const R: usize>(
    value: &[V; BLOCK],
    (weights, stride): (&[f32], usize),
    j: usize,
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
