//! Tiles of integers: many rows over a cache of 16 or 8 bits.
//!
//! ```text
//! q ≈ a q̂, k ≈ b k̂, v ≈ c v̂                      in int16; a for each row, b and c for each key
//! x = a b Σ q̂ k̂                                   int32 sums
//! p = e^(x − m)                                    f32, as are m and the sum of p
//! p c ≈ t p̂                                        in int16; t for each row and tile of keys
//! acc += t Σ p̂ v̂                                   int32 sums
//! ```
//!
//! 1. `vpmaddwd` multiplies and adds pairs: two elements of q and k, two keys of p and v. A pair is one 32-bit lane.
//! 2. No sum can overflow. |Σ q̂ k̂| ≤ |q̂| |k̂| (Cauchy and Schwarz), so a and b keep those norms below 65000 and 32500.
//!    |Σ p̂ v̂| ≤ Σ p̂ · max |v̂|, so t keeps the sum below 2¹⁸ (and p̂ in 15 bits), and c |v̂| below 2¹³.
//! 3. The scale of a value goes into its weight before that is rounded. What is rounded is then what the key adds, and a key
//!    of large weight and small value, as the first one often is, costs the others nothing.
//! 4. A norm spread over 128 elements leaves each 12 bits or more: scores err by 1e-5 |q| |k|, half of what rounding the keys to half
//!    precision has cost. A cache in f32 never comes here.

mod rounded;
mod wide;

use super::kernels::{PANEL_ROWS, get, put};
use super::{KEY_TILE, ROW_TILE, RowTile, widen};
use crate::attention::state::TileScratch;
use crate::exp::pow2_256;
use crate::kv::{BLOCK, KV_SPAN, KvHead};
use crate::lanes::{self, LANES, load, prefetch, store};
use rounded::{VALUE, put_codes, quantize_keys, quantize_queries, quantize_values};
use std::arch::x86_64::*;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Largest p̂.
const WEIGHT: f32 = 32_767.0;
/// Largest Σ p̂ of a tile, before the rounding, which adds at most 64.
const WEIGHTS: f32 = 262_000.0;
const _: () = assert!((WEIGHTS as i64 + KEY_TILE as i64 / 2) * (VALUE as i64) < 1 << 31);

/// Two int16 in a lane, the first one in its lower half.
type Pair = i32;

/// The rows of a tile in integers.
struct IntRows<'a> {
    /// For each panel [⌈head_dim / 2⌉][rows of the panel], and the scale of each row.
    q: &'a [Pair],
    scales: &'a [f32],
    /// [rows, KEY_TILE / 8]
    weights: &'a mut [[Pair; LANES / 2]],
}

/// A tile of rows over some tiles of keys, each with the number of keys before the range asked for: with AVX-512 (`WIDE`), AVX-VNNI or
/// AVX2.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend<const VNNI: u8, const WIDE: bool>(
    tile: &mut RowTile<'_>,
    q: &[f32],
    scale: f32,
    spans: impl Iterator<Item = (usize, Range<usize>)>,
    scratch: &mut TileScratch,
) {
    let (kv, rows) = (tile.kv, tile.limits.len());
    let (head_dim, width) = (kv.head_dim(), kv.width());
    let pairs = head_dim.div_ceil(2);
    let packed = scratch.q.scratch(rows * pairs);
    let scales = scratch.q_scales.scratch(rows);
    for panel in tile.panels.windows(2) {
        let panel_q = &mut packed[panel[0] * pairs..panel[1] * pairs];
        let q = &q[panel[0] * head_dim..panel[1] * head_dim];
        quantize_queries(q, head_dim, scale, panel_q, &mut scales[panel[0]..panel[1]]);
    }
    let mut rows = IntRows { q: packed, scales, weights: scratch.weights.scratch(rows * KEY_TILE / LANES) };
    let block = scratch.block.scratch(width);
    let keys = scratch.keys.scratch(KEY_TILE / BLOCK * pairs);
    let values = scratch.values.scratch(KEY_TILE / 2 * width / BLOCK);
    for (skip, positions) in spans {
        tile.step_int::<VNNI, WIDE>(&mut rows, &IntTile::of(kv, positions, block, keys, values), skip);
    }
}

/// A tile of keys and values in integers.
struct IntTile<'a> {
    positions: Range<usize>,
    /// [block][⌈head_dim / 2⌉][16 keys], and the scale of each key.
    keys: &'a [[Pair; BLOCK]],
    key_scales: [[f32; BLOCK]; KEY_TILE / BLOCK],
    /// [chunk][KEY_TILE / 2][16 elements], and the scale of each key.
    values: &'a [[Pair; BLOCK]],
    value_scales: [[f32; BLOCK]; KEY_TILE / BLOCK],
}

impl<'a> IntTile<'a> {
    /// Positions of a cache, of a span at most. `block` is room for one block of keys or values.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn of(
        kv: &KvHead,
        positions: Range<usize>,
        block: &mut [[f32; BLOCK]],
        keys: &'a mut [[Pair; BLOCK]],
        values: &'a mut [[Pair; BLOCK]],
    ) -> IntTile<'a> {
        let (first, head_dim, width) = (positions.start / BLOCK, kv.head_dim(), kv.width());
        let (mut key_scales, mut value_scales) = ([[0.0; BLOCK]; KEY_TILE / BLOCK], [[0.0; BLOCK]; KEY_TILE / BLOCK]);
        for b in 0..positions.len().div_ceil(BLOCK) {
            let pairs = head_dim.div_ceil(2);
            widen::keys(kv, first + b, &mut block[..head_dim]);
            quantize_keys(&block[..head_dim], &mut keys[b * pairs..][..pairs], &mut key_scales[b]);
            widen::values(kv, first + b, &mut block[..width]);
            quantize_values(&block[..width], &mut values[b * BLOCK / 2..], KEY_TILE / 2, &mut value_scales[b]);
        }
        IntTile { positions, keys, key_scales, values, value_scales }
    }
}

impl RowTile<'_> {
    /// One tile of keys, of which the first `skip` are before the range asked for.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn step_int<const VNNI: u8, const WIDE: bool>(&mut self, int: &mut IntRows<'_>, tile: &IntTile<'_>, skip: usize) {
        let (keys, width, pairs) = (&tile.positions, self.kv.width(), self.kv.head_dim().div_ceil(2));
        let count = self.panels.len() - 1;
        let cover = &self.cover(keys)[..count];
        // Of blocks that come together, those that nobody asked for give scores that nobody reads.
        let together = if WIDE { wide::TOGETHER } else { 1 };
        // A next span comes into L2 meanwhile: attention was 3 % slower where rounding it waited for memory (an Emerald Rapids).
        let goes_on = self.limits.iter().any(|&limit| limit > keys.end);
        let mut ahead = if goes_on { self.kv.span(keys.start / KV_SPAN + 1) } else { &[] }.iter();
        let each = ahead.len().div_ceil(count * (KEY_TILE / BLOCK).div_ceil(together));
        for b in (skip / BLOCK / together * together..keys.len().div_ceil(BLOCK)).step_by(together) {
            let block = &tile.keys[b * pairs..][..together * pairs];
            let scales = &tile.key_scales[b..b + together];
            for p in (0..count).filter(|&p| cover[p] > b * BLOCK) {
                let (first, rows) = (self.panels[p], self.panels[p + 1] - self.panels[p]);
                let q = &int.q[first * pairs..(first + rows) * pairs];
                for line in ahead.by_ref().take(each) {
                    prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
                }
                let out = &mut self.scores[first * KEY_TILE + b * BLOCK..];
                match rows {
                    4 => scores::<4, VNNI, WIDE>(block, scales, q, out, KEY_TILE),
                    5 => scores::<5, VNNI, WIDE>(block, scales, q, out, KEY_TILE),
                    _ => scores::<PANEL_ROWS, VNNI, WIDE>(block, scales, q, out, KEY_TILE),
                }
            }
        }

        let mut factors = [[1.0, 0.0]; ROW_TILE];
        for (row, factors) in factors[..self.limits.len()].iter_mut().enumerate() {
            let seen = skip..self.seen(row, keys);
            let weights = &mut int.weights[row * KEY_TILE / LANES..][..KEY_TILE / LANES];
            if seen.is_empty() {
                weights.fill([0; LANES / 2]);
                continue;
            }
            let scores = &mut self.scores[row * KEY_TILE..][..KEY_TILE];
            let (max, sum) = (&mut self.max[row], &mut self.sum[row]);
            *factors = soften::<WIDE>(scores, seen, int.scales[row], &tile.value_scales, weights, [max, sum]);
        }

        let (from, weights) = (skip / LANES, int.weights.as_flattened());
        let chunks = width / BLOCK;
        let mut c = 0;
        while c < chunks {
            let together = if WIDE && c + wide::TOGETHER <= chunks { wide::TOGETHER } else { 1 };
            let values = &tile.values[c * KEY_TILE / 2..][..together * KEY_TILE / 2];
            for (p, &cover) in cover.iter().enumerate() {
                let (first, rows) = (self.panels[p], self.panels[p + 1] - self.panels[p]);
                let taken = from * LANES / 2..cover.div_ceil(LANES) * LANES / 2;
                if taken.is_empty() {
                    continue;
                }
                let weights = &weights[first * KEY_TILE / 2..];
                let factors = &factors[first..first + rows];
                let acc = &mut self.acc[first * width + c * BLOCK..];
                match rows {
                    4 => blend::<4, VNNI, WIDE>(values, taken, weights, factors, acc, width),
                    5 => blend::<5, VNNI, WIDE>(values, taken, weights, factors, acc, width),
                    _ => blend::<PANEL_ROWS, VNNI, WIDE>(values, taken, weights, factors, acc, width),
                }
            }
            c += together;
        }
    }
}

/// out[r * stride + j] = scales[j] Σ q[i][r] · keys[i][j], for R rows and the sixteen keys of a block, or of some blocks (`WIDE`).
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scores<const R: usize, const VNNI: u8, const WIDE: bool>(
    keys: &[[Pair; BLOCK]],
    scales: &[[f32; BLOCK]],
    q: &[Pair],
    out: &mut [f32],
    stride: usize,
) {
    if WIDE {
        #[cfg(test)]
        crate::isa::witness::record("wide::scores");
        // SAFETY: `WIDE` is set where an `Isa` proves AVX-512.
        return unsafe { wide::scores::<R>(keys, scales, q, out, stride) };
    }
    let mut sums = [[_mm256_setzero_si256(); 2]; R];
    for (keys, q) in keys.iter().zip(q.as_chunks::<R>().0) {
        let keys = pairs(keys);
        for r in 0..R {
            add_products::<VNNI>(&mut sums[r], keys, q[r]);
        }
    }
    let [low, high] = get(&scales[0]);
    for (r, sums) in sums.iter().enumerate() {
        let [a, b] = sums.map(|sum| _mm256_cvtepi32_ps(sum));
        put(&mut out[r * stride..], [_mm256_mul_ps(a, low), _mm256_mul_ps(b, high)]);
    }
}

/// acc[r * acc_stride + i] = acc[r * acc_stride + i] f + t Σ weights[r * KEY_TILE / 2 + j] · values[j][i] for j in `taken`, where f and t are
/// `factors[r]`, for R rows and the sixteen elements of a chunk, or of some chunks (`WIDE`) of KEY_TILE / 2 pairs each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn blend<const R: usize, const VNNI: u8, const WIDE: bool>(
    values: &[[Pair; BLOCK]],
    taken: Range<usize>,
    weights: &[Pair],
    factors: &[[f32; 2]],
    acc: &mut [f32],
    acc_stride: usize,
) {
    let (weight_stride, weights) = (KEY_TILE / 2, &weights[taken.start..]);
    if WIDE {
        let (values, pairs) = (&values[taken.start..], taken.len());
        // SAFETY: `WIDE` is set where an `Isa` proves AVX-512.
        return unsafe {
            if values.len() > KEY_TILE / 2 {
                wide::blend::<R, { wide::TOGETHER }>(values, pairs, weights, factors, acc, acc_stride)
            } else {
                wide::blend::<R, 1>(values, pairs, weights, factors, acc, acc_stride)
            }
        };
    }
    let values = &values[taken];
    let last = (R - 1) * weight_stride + values.len();
    assert!(last <= weights.len(), "{R} rows of weights reach to {last} of {}", weights.len());
    let mut sums = [[_mm256_setzero_si256(); 2]; R];
    for (j, values) in values.iter().enumerate() {
        let values = pairs(values);
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: j is below the number of values, and the assert above bounds the weights by it.
            let weight = unsafe { *weights.get_unchecked(r * weight_stride + j) };
            add_products::<VNNI>(sums, values, weight);
        }
    }
    for ((r, sums), [before, step]) in sums.iter().enumerate().zip(factors) {
        let (before, step) = (_mm256_set1_ps(*before), _mm256_set1_ps(*step));
        let acc = &mut acc[r * acc_stride..];
        let old = get(acc);
        let new = |half: usize| _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[half]), step, _mm256_mul_ps(old[half], before));
        put(acc, [new(0), new(1)]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pairs(x: &[Pair; BLOCK]) -> [__m256i; 2] {
    // SAFETY: the array is 64 readable bytes.
    unsafe { [_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x.as_ptr().add(LANES).cast())] }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add_products<const VNNI: u8>(sums: &mut [__m256i; 2], x: [__m256i; 2], y: Pair) {
    let y = _mm256_set1_epi32(y);
    for (sum, x) in sums.iter_mut().zip(x) {
        lanes::add_pairs::<VNNI>(sum, x, y);
    }
}

/// One step of the online softmax of a row: those scores of a tile that it has `seen`, still to be multiplied by `scale`, become weights
/// e^(x − m) times the scales of their values, as pairs of codes; `max` and `sum` move on. Scores of −∞ weigh nothing.
///
/// Returns the factor e^(old m − m) for what the row gathered before, and the step of the codes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn soften<const WIDE: bool>(
    scores: &mut [f32],
    seen: Range<usize>,
    scale: f32,
    value_scales: &[[f32; BLOCK]; KEY_TILE / BLOCK],
    weights: &mut [[Pair; LANES / 2]],
    [max, sum]: [&mut f32; 2],
) -> [f32; 2] {
    // With AVX-512 half a tile or all of it, so that the scores stay in registers.
    let (start, unit) = if WIDE { (0, KEY_TILE / 2) } else { (seen.start / LANES * LANES, LANES) };
    let end = seen.end.next_multiple_of(unit);
    scores[start..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..end].fill(f32::NEG_INFINITY);
    weights[end / LANES..].fill([0; LANES / 2]);
    let weights = &mut weights[start / LANES..end / LANES];
    let (scores, _) = scores[start..end].as_chunks_mut::<LANES>();
    let (value_scales, _) = value_scales.as_flattened()[start..end].as_chunks::<LANES>();
    if WIDE {
        // SAFETY: `WIDE` is set where an `Isa` proves AVX-512.
        return unsafe {
            if end == KEY_TILE {
                wide::soften::<{ KEY_TILE / BLOCK }>(scores, scale, value_scales, weights, [max, sum])
            } else {
                wide::soften::<{ KEY_TILE / 2 / BLOCK }>(scores, scale, value_scales, weights, [max, sum])
            }
        };
    }
    let floor = _mm256_set1_ps(f32::NEG_INFINITY);
    let mut most = [floor; 2];
    for (i, x) in scores.iter().enumerate() {
        most[i % 2] = _mm256_max_ps(load(x), most[i % 2]);
    }
    let factor = raise(lanes::max(_mm256_max_ps(most[0], most[1])) * scale, max, sum);
    let (scale, m) = (_mm256_set1_ps(scale * LOG2_E), _mm256_set1_ps(*max * LOG2_E));
    // Even and odd vectors have sums of their own: the halves of what AVX-512 adds, or the other way round, which their sum does not see.
    let [mut sums, mut totals, mut most] = [[_mm256_setzero_ps(); 2]; 3];
    for (i, (x, value_scale)) in scores.iter_mut().zip(value_scales).enumerate() {
        let (p, half) = (pow2_256(_mm256_fmsub_ps(load(x), scale, m)), i % 2);
        // An unseen value may be NaN; one that is seen must show, however little it weighs.
        let unseen = _mm256_cmp_ps::<_CMP_EQ_OQ>(load(x), floor);
        let scaled = _mm256_andnot_ps(unseen, _mm256_mul_ps(p, load(value_scale)));
        store(x, scaled);
        sums[half] = _mm256_add_ps(sums[half], p);
        totals[half] = _mm256_add_ps(totals[half], scaled);
        most[half] = _mm256_max_ps(most[half], scaled);
    }
    *sum += lanes::sum(_mm256_add_ps(sums[0], sums[1]));
    let totals = lanes::sum(_mm256_add_ps(totals[0], totals[1]));
    let (step, inverse) = code_step(lanes::max(_mm256_max_ps(most[0], most[1])), totals);
    let inverse = _mm256_set1_ps(inverse);
    for (x, out) in scores.iter().zip(weights) {
        put_codes(out, _mm256_mul_ps(load(x), inverse));
    }
    [factor, step]
}

/// The step of codes for weights of this largest one and this sum, and 1 / step.
fn code_step(most: f32, total: f32) -> (f32, f32) {
    let (one, all) = (most / WEIGHT, total / WEIGHTS);
    // NaN is in the sum if it is anywhere, and is passed on.
    let step = if one > all { one } else { all };
    // Next to a sum of at least 1, weights below this add nothing.
    (step, if step < f32::MIN_POSITIVE * 1.0e8 { 0.0 } else { 1.0 / step })
}

/// Moves the maximum up to what was seen, if that is larger; the factor for what was summed before.
fn raise(seen: f32, max: &mut f32, sum: &mut f32) -> f32 {
    let mut factor = 1.0;
    if seen > *max {
        factor = crate::exp::scalar::exp1(*max - seen);
        *max = seen;
        *sum *= factor;
    }
    factor
}
