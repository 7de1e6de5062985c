//! Attention by online softmax in tiles of rows and keys: the AVX2 version.
//!
//! ```text
//! for each tile of at most 264 rows, its queries scaled and packed in panels of six rows:
//!   for each tile of 128 keys that some row sees:
//!     S = Q Kᵀ                     panels x blocks of 16 keys
//!     for each row:  m, s, P = online softmax of its scores; its acc rescaled if m moved
//!     acc += P V                   panels x chunks of 16 elements
//! ```
//!
//! 1. Up to 12 rows (decode) read the cache as it lies: every key and value is loaded once, for all
//!    rows of the group, and widened in registers. There the time is that of the memory.
//! 2. Many rows (prefill) over a cache in f32 share values gathered once per tile as [16-element
//!    chunk][key][16]; so both products stream from L1. There the time is that of the FMAs.
//! 3. Where the caller chooses `AttentionArithmetic::Int16`, rows over a cache in f16 or q8, in
//!    tiles of 528 and not by panels, share keys and values rounded to int16 once per tile (`int`):
//!    the products of integers are faster, and they round less than the cache has rounded.
//! 4. A panel leaves out the blocks of keys that none of its rows sees; only rows that see part of
//!    a tile are masked, by zeros in P behind what they see. Where a value there is NaN or
//!    infinite, which times 0 is NaN, each row takes what it sees by itself.
//! 5. Each sum has one accumulator, to which elements or keys are added in order, so that the bits
//!    of a row do not depend on the height of its panel. A panel of few rows has too few sums to
//!    hide the latency of the FMA; it takes several blocks of keys, or chunks of values, at once.
//! 6. The rows' `acc` is a copy padded to chunks of 16, so that no kernel has a tail in that
//!    direction.

mod int;
mod kernels;
mod widen;

use super::state::Scratch;
use super::{ATTENTION_ROWS, AttentionArithmetic, AttentionInput, SoftmaxState};
use crate::isa::Isa;
use crate::kv::{BLOCK, KV_GROUP, KV_SPAN, KvFormat, KvHead};
use crate::lanes::{LANES, load, store};
use kernels::{Ahead, Block, Element, PANEL_ROWS, Values, blend, scores, soften};
use std::arch::x86_64::*;
use std::ops::Range;
use widen::half;

/// Rows that share keys and values rounded to integers. Their queries and sums are 400 KiB, of
/// which one group's pass through L1 with each tile of keys, so that more rows would cost no time,
/// but leave fewer tasks to balance.
const ROW_TILE: usize = ATTENTION_ROWS;
/// Rows that share keys and values in floats: of all of them queries, scores and sums, 400 KiB, go
/// through L2 several times.
const FLOAT_ROWS: usize = ATTENTION_ROWS / 2;
const _: () = assert!(ROW_TILE.is_multiple_of(2 * LANES) && FLOAT_ROWS.is_multiple_of(PANEL_ROWS));
/// Keys of a tile: a span of the cache.
const KEY_TILE: usize = KV_SPAN;
/// Up to so many rows the cache is read as it lies. More rows of a cache in f32, and so in panels
/// of four to six, first gather the values of a tile.
const DIRECT_ROWS: usize = 2 * PANEL_ROWS;

/// One tile of rows, and where its softmax stands.
struct RowTile<'a> {
    kv: KvHead<'a>,
    /// First row of each panel, and the number of rows last.
    panels: &'a [usize],
    /// The key after the last one that each row sees.
    limits: &'a [usize],
    /// Scores, then weights: [rows, KEY_TILE].
    scores: &'a mut [f32],
    /// [rows, width].
    acc: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
}

/// A tile of keys and values as the kernels read them, of which the first `skip` keys are before
/// the range asked for.
struct KeyTile<'a, T> {
    positions: Range<usize>,
    skip: usize,
    /// As they lie in the cache: block b is `keys[b * key_step..][..head_dim]` with the step of the
    /// cache.
    keys: &'a [[T; BLOCK]],
    /// Keys of a run: those of a block as the cache has them, or all of the tile.
    run: usize,
    /// Run n is `values[n * value_step..]` with the step of the cache: [chunk of 16 elements][key
    /// of the run][16].
    values: &'a [[T; BLOCK]],
}

impl<'a, T: Element> KeyTile<'a, T> {
    /// As it lies in the cache.
    fn stored(kv: KvHead<'a>, positions: Range<usize>, skip: usize) -> KeyTile<'a, T> {
        let block = positions.start / BLOCK;
        KeyTile {
            positions,
            skip,
            keys: kv.key_block(block),
            run: BLOCK,
            values: kv.value_block(block),
        }
    }

    /// Run `n`: its values, and of scaled ones the scales [groups][16].
    fn run(&self, kv: KvHead<'a>, n: usize) -> (&'a [[T; BLOCK]], &'a [[u16; BLOCK]]) {
        let values = &self.values[n * kv.value_step::<T>()..][..self.run * kv.width() / BLOCK];
        (values, if T::SCALED { kv.value_scales(self.positions.start / BLOCK + n) } else { &[] })
    }

    /// Whether the values of some keys, counted from the first one of the tile, are finite.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn is_finite(&self, kv: KvHead<'a>, keys: Range<usize>) -> bool {
        let mut zeros = [_mm256_setzero_ps(); 2];
        for key in keys {
            let (values, scales) = self.run(kv, key / self.run);
            for (c, values) in values.chunks_exact(self.run).enumerate() {
                let scale = if T::SCALED {
                    half(scales[c * BLOCK / KV_GROUP][key % self.run])
                } else {
                    1.0
                };
                let zero = _mm256_set1_ps(0.0 * scale);
                // SAFETY: the target features of this function are those that `widen` needs.
                let values = unsafe { T::widen(&values[key % self.run]) };
                zeros = [
                    _mm256_fmadd_ps(values[0], zero, zeros[0]),
                    _mm256_fmadd_ps(values[1], zero, zeros[1]),
                ];
            }
        }
        let zeros = _mm256_add_ps(zeros[0], zeros[1]);
        _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(zeros, zeros)) == 0
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attention(input: &AttentionInput<'_>, state: &mut SoftmaxState, isa: Isa) {
    let rows = input.visible.len();
    let (most, step) = match (input.kv.format(), input.arithmetic) {
        (KvFormat::F32, _) => (FLOAT_ROWS, PANEL_ROWS),
        (KvFormat::F16 | KvFormat::Q8, AttentionArithmetic::Float) => (DIRECT_ROWS, PANEL_ROWS),
        (KvFormat::F16 | KvFormat::Q8, AttentionArithmetic::Int16) => (ROW_TILE, 2 * LANES),
    };
    let tile_rows = rows.div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(step);
    let mut scratch = std::mem::take(&mut state.scratch);
    for first in (0..rows).step_by(tile_rows.max(1)) {
        attend(input, first..rows.min(first + tile_rows), state, &mut scratch, isa);
    }
    state.scratch = scratch;
}

/// One tile of rows over all keys.
#[target_feature(enable = "avx2,fma,f16c")]
fn attend(
    input: &AttentionInput<'_>,
    rows: Range<usize>,
    state: &mut SoftmaxState,
    scratch: &mut Scratch,
    isa: Isa,
) {
    let kv = input.kv;
    let mut limits = [0; ROW_TILE];
    for (limit, row) in limits.iter_mut().zip(rows.clone()) {
        *limit = input.row_keys(row).end;
    }
    let limits = &limits[..rows.len()];
    let end = limits.iter().copied().max().unwrap_or(0);
    if end <= input.keys.start {
        return;
    }
    // Tiles of keys, and how many keys of each are before the range asked for.
    let spans = (input.keys.start / KV_SPAN..end.div_ceil(KV_SPAN)).map(|span| {
        let keys = span * KV_SPAN..end.min((span + 1) * KV_SPAN);
        (input.keys.start.saturating_sub(keys.start), keys)
    });
    if input.arithmetic == AttentionArithmetic::Int16 && kv.format() != KvFormat::F32 {
        int::attend(input, (rows, limits), spans, state, scratch, isa);
    } else {
        attend_float(input, (rows, limits), spans, state, scratch);
    }
}

/// A tile of rows over some tiles of keys, each with the number of keys before the range asked for,
/// in floats. `limits`: the key after the last one that each row sees.
#[target_feature(enable = "avx2,fma,f16c")]
fn attend_float(
    input: &AttentionInput<'_>,
    (rows, limits): (Range<usize>, &[usize]),
    spans: impl Iterator<Item = (usize, Range<usize>)>,
    state: &mut SoftmaxState,
    scratch: &mut Scratch,
) {
    let (kv, head_dim, width) = (input.kv, input.kv.head_dim(), input.kv.width());
    // Panels of equal height, as far as possible: a last panel of one row would cost as much as one
    // of three.
    let count = rows.len().div_ceil(PANEL_ROWS);
    let mut panels = [0; FLOAT_ROWS / PANEL_ROWS + 1];
    for (p, first) in panels[..=count].iter_mut().enumerate() {
        *first = p * rows.len() / count;
    }
    let panels = &panels[..=count];

    let elements = rows.start * head_dim..rows.end * head_dim;
    let q = scratch.q.scratch(elements.len());
    pack_queries(&input.q[elements.clone()], panels, head_dim, input.scale, q);
    let mut tile = RowTile {
        kv,
        panels,
        limits,
        scores: scratch.scores.scratch(rows.len() * KEY_TILE),
        acc: scratch.acc.scratch(rows.len() * width),
        max: &mut state.max[rows.clone()],
        sum: &mut state.sum[rows.clone()],
    };
    for (padded, row) in
        tile.acc.chunks_exact_mut(width).zip(state.acc[elements.clone()].chunks_exact(head_dim))
    {
        padded[..head_dim].copy_from_slice(row);
        padded[head_dim..].fill(0.0);
    }
    for (skip, keys) in spans {
        if limits.len() > DIRECT_ROWS {
            let values = scratch.values.scratch(KEY_TILE * width / BLOCK);
            gather_values(kv, &keys, values);
            let stored = KeyTile::<f32>::stored(kv, keys, skip);
            tile.step::<_, false>(q, &KeyTile { values, run: KEY_TILE, ..stored });
            continue;
        }
        match kv.format() {
            KvFormat::F32 => tile.step::<f32, true>(q, &KeyTile::stored(kv, keys, skip)),
            KvFormat::F16 => tile.step::<u16, true>(q, &KeyTile::stored(kv, keys, skip)),
            KvFormat::Q8 => tile.step::<i8, true>(q, &KeyTile::stored(kv, keys, skip)),
        }
    }
    for (padded, row) in
        tile.acc.chunks_exact(width).zip(state.acc[elements].chunks_exact_mut(head_dim))
    {
        row.copy_from_slice(&padded[..head_dim]);
    }
}

/// Values of a cache in f32 as [chunk of 16 elements][KEY_TILE][16].
fn gather_values(kv: KvHead<'_>, keys: &Range<usize>, out: &mut [[f32; BLOCK]]) {
    for (b, from) in (0..keys.len()).step_by(BLOCK).enumerate() {
        let block = kv.value_block::<f32>(keys.start / BLOCK + b);
        for (values, out) in block.chunks_exact(BLOCK).zip(out.chunks_exact_mut(KEY_TILE)) {
            out[from..from + BLOCK].copy_from_slice(values);
        }
    }
}

/// For each panel [head_dim][rows], times `scale`.
fn pack_queries(q: &[f32], panels: &[usize], head_dim: usize, scale: f32, packed: &mut [f32]) {
    for panel in panels.windows(2) {
        let rows = panel[1] - panel[0];
        let packed = &mut packed[panel[0] * head_dim..panel[1] * head_dim];
        for (r, row) in
            q[panel[0] * head_dim..panel[1] * head_dim].chunks_exact(head_dim).enumerate()
        {
            for (packed, x) in packed[r..].iter_mut().step_by(rows).zip(row) {
                *packed = x * scale;
            }
        }
    }
}

/// Blocks of keys that meet a panel of so many rows at once: sums enough to hide the latency of the
/// FMA, in the registers that there are.
fn together(rows: usize) -> usize {
    match rows {
        1 => 4,
        2 | 3 => 2,
        _ => 1,
    }
}

impl RowTile<'_> {
    /// For each panel, the keys of a tile that some of its rows sees.
    fn cover(&self, keys: &Range<usize>) -> [usize; FLOAT_ROWS / PANEL_ROWS] {
        let mut cover = [0; FLOAT_ROWS / PANEL_ROWS];
        for (cover, panel) in cover.iter_mut().zip(self.panels.windows(2)) {
            let last = self.limits[panel[0]..panel[1]].iter().copied().max().unwrap_or(0);
            *cover = last.min(keys.end).saturating_sub(keys.start);
        }
        cover
    }

    /// The keys of a tile before the first one that a row does not see.
    fn seen(&self, row: usize, keys: &Range<usize>) -> usize {
        self.limits[row].min(keys.end).saturating_sub(keys.start)
    }

    /// One tile of keys. STREAM: they come from memory as they lie there, and not from a tile of
    /// scratch. q: scaled queries, for each panel [head_dim][rows of the panel].
    #[target_feature(enable = "avx2,fma,f16c")]
    fn step<T: Element, const STREAM: bool>(&mut self, q: &[f32], tile: &KeyTile<'_, T>) {
        let (kv, head_dim, width) = (self.kv, self.kv.head_dim(), self.kv.width());
        let (keys, skip, first_block) = (&tile.positions, tile.skip, tile.positions.start / BLOCK);
        let count = self.panels.len() - 1;
        let cover = &self.cover(keys)[..count];

        let ahead = Ahead::new(&kv, keys.start / KV_SPAN);
        let block = |b: usize| Block {
            keys: &tile.keys[b * kv.key_step::<T>()..][..head_dim],
            scales: if T::SCALED { kv.key_scales(first_block + b) } else { &[] },
        };
        let least = (0..count).map(|p| self.panels[p + 1] - self.panels[p]).min().unwrap_or(1);
        let end = keys.len().div_ceil(BLOCK);
        for b in (skip / BLOCK..end).step_by(together(least)) {
            for (p, cover) in cover.iter().enumerate() {
                let (first, rows) = (self.panels[p], self.panels[p + 1] - self.panels[p]);
                let q = &q[first * head_dim..(first + rows) * head_dim];
                let mut b = b;
                let end = end.min(b + together(least)).min(cover.div_ceil(BLOCK));
                while b < end {
                    let out = &mut self.scores[first * KEY_TILE + b * BLOCK..];
                    let all = b + together(rows) <= end;
                    let (one, two) = (|| [block(b)], || [block(b), block(b + 1)]);
                    match (rows, all) {
                        (1, true) => {
                            let four = [0, 1, 2, 3].map(|i| block(b + i));
                            scores::<T, 1, 4, STREAM>(four, q, (out, KEY_TILE), ahead);
                        }
                        (1, false) => scores::<T, 1, 1, STREAM>(one(), q, (out, KEY_TILE), ahead),
                        (2, true) => scores::<T, 2, 2, STREAM>(two(), q, (out, KEY_TILE), ahead),
                        (2, false) => scores::<T, 2, 1, STREAM>(one(), q, (out, KEY_TILE), ahead),
                        (3, true) => scores::<T, 3, 2, STREAM>(two(), q, (out, KEY_TILE), ahead),
                        (3, false) => scores::<T, 3, 1, STREAM>(one(), q, (out, KEY_TILE), ahead),
                        (4, _) => scores::<T, 4, 1, STREAM>(one(), q, (out, KEY_TILE), ahead),
                        (5, _) => scores::<T, 5, 1, STREAM>(one(), q, (out, KEY_TILE), ahead),
                        _ => scores::<T, 6, 1, STREAM>(one(), q, (out, KEY_TILE), ahead),
                    }
                    b += if all { together(rows) } else { 1 };
                }
            }
        }

        for (p, &cover) in cover.iter().enumerate() {
            for row in self.panels[p]..self.panels[p + 1] {
                self.weigh(row, skip, self.seen(row, keys), cover);
            }
        }

        // The keys whose values all rows of a panel take: those that some row sees, or those that
        // every row sees.
        let mut shared = [0; FLOAT_ROWS / PANEL_ROWS];
        for (p, (shared, &cover)) in shared.iter_mut().zip(cover).enumerate() {
            let least = (self.panels[p]..self.panels[p + 1])
                .map(|row| self.seen(row, keys))
                .min()
                .unwrap_or(0);
            *shared = if tile.is_finite(kv, least..cover) { cover } else { least };
        }

        // Values that many panels share stay in L1 a chunk at a time; as they lie, the chunks of a
        // run are one stream.
        let (run, chunks) = (tile.run, width / BLOCK);
        let at_once = if STREAM { chunks } else { 1 };
        for (n, from) in (0..keys.len()).step_by(run).enumerate() {
            let (values, scales) = tile.run(kv, n);
            for c in (0..chunks).step_by(at_once) {
                let chunks = &values[c * run..][..at_once * run];
                for (p, &shared) in shared[..count].iter().enumerate() {
                    let (first, rows) = (self.panels[p], self.panels[p + 1] - self.panels[p]);
                    let taken = skip.saturating_sub(from)..shared.saturating_sub(from).min(run);
                    if taken.is_empty() {
                        continue;
                    }
                    let values = Values { chunks, scales, run, from: taken.start, to: taken.end };
                    let weights = &self.scores[first * KEY_TILE + from..];
                    let acc = &mut self.acc[first * width + c * BLOCK..];
                    let (weights, acc) = ((weights, KEY_TILE), (acc, width));
                    match rows {
                        1 => blend::<T, 1, 4, STREAM>(values, weights, acc, ahead),
                        2 => blend::<T, 2, 2, STREAM>(values, weights, acc, ahead),
                        3 => blend::<T, 3, 2, STREAM>(values, weights, acc, ahead),
                        4 => blend::<T, 4, 1, STREAM>(values, weights, acc, ahead),
                        5 => blend::<T, 5, 1, STREAM>(values, weights, acc, ahead),
                        _ => blend::<T, PANEL_ROWS, 1, STREAM>(values, weights, acc, ahead),
                    }
                }
            }
        }
        for p in (0..count).filter(|&p| shared[p] < cover[p]) {
            for row in self.panels[p]..self.panels[p + 1] {
                self.blend_row(row, tile, shared[p]..self.seen(row, keys));
            }
        }
    }

    /// Adds the weighted values of some keys, counted from the first one of the tile, to a row.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn blend_row<T: Element>(&mut self, row: usize, tile: &KeyTile<'_, T>, keys: Range<usize>) {
        let width = self.kv.width();
        for n in keys.start / tile.run..keys.end.div_ceil(tile.run) {
            let ((chunks, scales), from) = (tile.run(self.kv, n), n * tile.run);
            let (start, end) = (keys.start.saturating_sub(from), (keys.end - from).min(tile.run));
            let values = Values { chunks, scales, run: tile.run, from: start, to: end };
            let weights = &self.scores[row * KEY_TILE + from..];
            let (weights, acc) = ((weights, KEY_TILE), (&mut self.acc[row * width..], width));
            blend::<T, 1, 1, false>(values, weights, acc, Ahead::new(&self.kv, 0));
        }
    }

    /// Turns a row's scores `skip..seen` into weights, with zeros behind them up to `cover`, and
    /// rescales its sums. What lies before `skip` is left out by all.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn weigh(&mut self, row: usize, skip: usize, seen: usize, cover: usize) {
        let scores = &mut self.scores[row * KEY_TILE..][..cover];
        if seen <= skip {
            scores.fill(0.0);
            return;
        }
        scores[seen..].fill(0.0);
        let factor = soften(&mut scores[skip..seen], &mut self.max[row], &mut self.sum[row]);
        if factor != 1.0 {
            let (factor, width) = (_mm256_set1_ps(factor), self.kv.width());
            let (acc, _) = self.acc[row * width..][..width].as_chunks_mut::<LANES>();
            for acc in acc {
                store(acc, _mm256_mul_ps(load(acc), factor));
            }
        }
    }
}
