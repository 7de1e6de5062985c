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
//! Rows are lanes: a register holds a number of each of 8 or 16 rows, and up to three such vectors
//! of rows, a group, meet some keys at once. What is done for a row is then done for all of them,
//! and nothing is summed across a register. For each tile of keys each group goes through all three
//! steps, so that its scores and weights, 18 or 36 KiB, are still in L1 or just beyond it.
//!
//! 1. `vpmaddwd` multiplies and adds pairs: two elements of q and k, two keys of p and v. A pair is
//!    one 32-bit lane.
//! 2. No sum can overflow. |Σ q̂ k̂| ≤ |q̂| |k̂| (Cauchy and Schwarz), so a and b keep those norms
//!    below 65000 and 32500.
//!    |Σ p̂ v̂| ≤ Σ p̂ · max |v̂|, so t keeps the sum below 2¹⁸ (and p̂ in 15 bits), and c |v̂| below 2¹³.
//! 3. The scale of a value goes into its weight before that is rounded. What is rounded is then
//!    what the key adds, and a key of large weight and small value, as the first one often is,
//!    costs the others nothing.
//! 4. A norm spread over 128 elements leaves each 12 bits or more: scores err by 1e-5 |q| |k|, half
//!    of what rounding the keys to half precision has cost. That 2^x is off by up to 3e-6 is less
//!    than that and than the rounding of weights. A cache in f32 never comes here.

mod kernels;
mod narrow;
mod rounded;
mod wide;

use super::{KEY_TILE, ROW_TILE, widen};
use crate::attention::AttentionInput;
use crate::attention::state::{Scratch, SoftmaxState};
use crate::isa::Isa;
use crate::kv::{BLOCK, KV_SPAN, KvHead};
use crate::lanes::prefetch;
use rounded::{VALUE, quantize_keys, quantize_queries, quantize_values, transpose};
use std::arch::x86_64::_MM_HINT_T1;
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Largest p̂.
const WEIGHT: f32 = 32_767.0;
/// Largest Σ p̂ of a tile, before the rounding, which adds at most 64.
const WEIGHTS: f32 = 262_000.0;
const _: () = assert!((WEIGHTS as i64 + KEY_TILE as i64 / 2) * (VALUE as i64) < 1 << 31);
/// Next to a sum of at least 1, weights of which this is the step add nothing.
const LEAST_STEP: f32 = f32::MIN_POSITIVE * 1.0e8;
/// 1.5·2²³: its sum with a number of up to 15 bits has that, rounded, in its low bits.
const ROUND: f32 = 12_582_912.0;
/// Taken for the maximum of a row that has seen nothing, since from −∞ nothing can be taken.
const LEAST_MAX: f32 = -1.0e38;

/// Two int16 in a lane, the first one in its lower half.
type Pair = i32;

/// Most vectors of a group.
const VECTORS: usize = 3;

/// The kernels of an instruction set.
struct Kernel {
    /// Rows of a vector.
    lanes: usize,
    /// Keys that meet a group at once.
    keys: usize,
    /// A tile of keys for a group of one, two and three vectors.
    step: [unsafe fn(&mut Group<'_>, &IntTile<'_>, Seen, &mut Room<'_>); VECTORS],
}

/// Rows that go together: V vectors of L rows each.
struct Group<'a> {
    /// [⌈head_dim / 2⌉][V][L]; and [V][L] each:
    q: &'a [Pair],
    scales: &'a [f32],
    /// The key after the last one that a row sees.
    limits: &'a [i32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// [width][V][L]
    acc: &'a mut [f32],
}

/// The keys of a tile that some row of a group sees, and perhaps some more, counted from the first
/// one of the tile.
#[derive(Clone, Copy)]
struct Seen {
    start: usize,
    end: usize,
    /// Whether some row does not see some of them.
    masked: bool,
}

/// Room for scores and weights, and what is asked for meanwhile.
struct Room<'a> {
    /// [KEY_TILE][V][L]
    scores: &'a mut [f32],
    /// [KEY_TILE / 2][V][L]
    weights: &'a mut [Pair],
    /// Lines of the cache that come next, of which `each` are asked for at a time.
    ahead: std::slice::Iter<'a, [i32; BLOCK]>,
    each: usize,
}

impl Room<'_> {
    /// The next span comes into L2 while this one is worked on: attention was 3 % slower where
    /// rounding it waited for memory (an Emerald Rapids).
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn ask_ahead(&mut self) {
        for line in self.ahead.by_ref().take(self.each) {
            prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
        }
    }
}

/// A tile of rows over some tiles of keys, each with the number of keys before the range asked for.
/// `limits`: the key after the last one that each row sees.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend(
    input: &AttentionInput<'_>,
    (rows, limits): (Range<usize>, &[usize]),
    spans: impl Iterator<Item = (usize, Range<usize>)>,
    state: &mut SoftmaxState,
    scratch: &mut Scratch,
    isa: Isa,
) {
    let kernel = match isa.vnni() {
        _ if isa.has_avx512() => wide::KERNEL,
        Isa::AVX_VNNI => narrow::KERNEL_VNNI,
        _ => narrow::KERNEL,
    };
    let (kv, lanes) = (input.kv, kernel.lanes);
    let (head_dim, width, pairs) = (kv.head_dim(), kv.width(), kv.head_dim().div_ceil(2));
    // Groups of about as many vectors, as ranges of lanes. What is in lanes behind the last row
    // means nothing and stays there.
    let vectors = rows.len().div_ceil(lanes);
    let groups = vectors.div_ceil(VECTORS);
    let group = |g: usize| vectors * g / groups * lanes..vectors * (g + 1) / groups * lanes;
    let elements = |r: &Range<usize>| {
        (rows.start + r.start) * head_dim..(rows.start + r.end.min(rows.len())) * head_dim
    };

    let (mut max, mut sum) = ([f32::NEG_INFINITY; ROW_TILE], [0.0; ROW_TILE]);
    max[..rows.len()].copy_from_slice(&state.max[rows.clone()]);
    sum[..rows.len()].copy_from_slice(&state.sum[rows.clone()]);
    let mut ends = [0; ROW_TILE];
    for (end, limit) in ends.iter_mut().zip(limits) {
        *end = i32::try_from(*limit).expect("a cache has fewer than 2³¹ positions");
    }
    let mut scales = [1.0; ROW_TILE];
    let q = scratch.q.scratch(vectors * lanes * pairs);
    let acc = scratch.acc.scratch(vectors * lanes * width);
    let codes = scratch.codes.scratch(VECTORS * lanes * pairs);
    for group in (0..groups).map(group) {
        let (elements, stride) = (elements(&group), group.len());
        let count = elements.len() / head_dim;
        let codes = &mut codes[..count * pairs];
        quantize_queries(
            &input.q[elements.clone()],
            head_dim,
            input.scale,
            codes,
            &mut scales[group.start..][..count],
        );
        let q = &mut q[group.start * pairs..][..stride * pairs];
        transpose(codes, pairs, q, stride, [count, pairs]);
        transpose(
            &state.acc[elements],
            head_dim,
            &mut acc[group.start * width..],
            stride,
            [count, head_dim],
        );
    }

    let block = scratch.block.scratch(width);
    let keys = scratch.keys.scratch(KEY_TILE / BLOCK * pairs);
    let values = scratch.values.scratch(KEY_TILE / 2 * width / BLOCK);
    let scores = scratch.scores.scratch(KEY_TILE * VECTORS * lanes);
    let weights = scratch.weights.scratch(KEY_TILE / 2 * VECTORS * lanes);
    let mut spans = spans.peekable();
    while let Some((skip, positions)) = spans.next() {
        let next = spans.peek().and_then(|_| kv.span(positions.start / KV_SPAN + 1));
        let next = next.map_or(&[][..], |span| span.numbers());
        let each = next.len().div_ceil(groups * KEY_TILE / kernel.keys);
        let tile = IntTile::of(&kv, (skip, positions), block, keys, values);
        let mut room = Room { scores, weights, ahead: next.iter(), each };
        for group in (0..groups).map(group) {
            let Some(seen) =
                tile.seen(&limits[group.start..group.end.min(rows.len())], kernel.keys)
            else {
                continue;
            };
            let vectors = group.len() / lanes;
            let mut group = Group {
                q: &q[group.start * pairs..group.end * pairs],
                scales: &scales[group.clone()],
                limits: &ends[group.clone()],
                max: &mut max[group.clone()],
                sum: &mut sum[group.clone()],
                acc: &mut acc[group.start * width..group.end * width],
            };
            // SAFETY: the instruction set proves the target features of its kernels.
            unsafe { kernel.step[vectors - 1](&mut group, &tile, seen, &mut room) };
        }
    }
    for group in (0..groups).map(group) {
        let (elements, stride) = (elements(&group), group.len());
        let count = elements.len() / head_dim;
        transpose(
            &acc[group.start * width..],
            stride,
            &mut state.acc[elements],
            head_dim,
            [head_dim, count],
        );
    }
    state.max[rows.clone()].copy_from_slice(&max[..rows.len()]);
    state.sum[rows.clone()].copy_from_slice(&sum[..rows.len()]);
}

/// A tile of keys and values in integers.
struct IntTile<'a> {
    positions: Range<usize>,
    /// Keys before the range asked for.
    skip: usize,
    /// [block][⌈head_dim / 2⌉][16 keys], and the scale of each key.
    keys: &'a [[Pair; BLOCK]],
    key_scales: [f32; KEY_TILE],
    /// [chunk][KEY_TILE / 2][16 elements], and the scale of each key.
    values: &'a [[Pair; BLOCK]],
    value_scales: [f32; KEY_TILE],
}

impl<'a> IntTile<'a> {
    /// Positions of a cache, of a span at most. `block` is room for one block of keys or values.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn of(
        kv: &KvHead<'_>,
        (skip, positions): (usize, Range<usize>),
        block: &mut [[f32; BLOCK]],
        keys: &'a mut [[Pair; BLOCK]],
        values: &'a mut [[Pair; BLOCK]],
    ) -> IntTile<'a> {
        let (first, head_dim, width) = (positions.start / BLOCK, kv.head_dim(), kv.width());
        let [mut key_scales, mut value_scales] = [[0.0; KEY_TILE]; 2];
        let scales = key_scales.as_chunks_mut().0.iter_mut().zip(value_scales.as_chunks_mut().0);
        for (b, (key_scales, value_scales)) in (0..positions.len().div_ceil(BLOCK)).zip(scales) {
            let pairs = head_dim.div_ceil(2);
            widen::keys(kv, first + b, &mut block[..head_dim]);
            quantize_keys(&block[..head_dim], &mut keys[b * pairs..][..pairs], key_scales);
            widen::values(kv, first + b, &mut block[..width]);
            quantize_values(
                &block[..width],
                &mut values[b * BLOCK / 2..],
                KEY_TILE / 2,
                value_scales,
            );
        }
        IntTile { positions, skip, keys, key_scales, values, value_scales }
    }

    /// What some row with one of these limits sees, in steps of as many keys; `None` if that is
    /// nothing.
    fn seen(&self, limits: &[usize], step: usize) -> Option<Seen> {
        let after =
            |limit: usize| limit.min(self.positions.end).saturating_sub(self.positions.start);
        let least = after(limits.iter().copied().min()?);
        let most = after(limits.iter().copied().max()?);
        let (start, end) = (self.skip / step * step, most.next_multiple_of(step));
        (self.skip < most).then_some(Seen { start, end, masked: start < self.skip || least < end })
    }
}
