//! The kernels of AVX2, and of AVX-VNNI (`VNNI`): a register holds eight rows.
//!
//! Three vectors of rows meet four keys, or four elements of values, at once: 12 sums.

use super::{
    BLOCK, Group, IntTile, KEY_TILE, Kernel, LEAST_MAX, LEAST_STEP, LOG2_E, Pair, ROUND, Room, Seen, WEIGHT, WEIGHTS,
};
use crate::exp::pow2_256;
use crate::isa::Isa;
use crate::lanes::{self, LANES, load, store};
use std::arch::x86_64::*;

/// Keys, or elements of values, that meet a group at once.
const STEP: usize = 4;

pub(super) const KERNEL: Kernel = kernel::<{ Isa::PLAIN }>();
pub(super) const KERNEL_VNNI: Kernel = kernel::<{ Isa::AVX_VNNI }>();

const fn kernel<const VNNI: u8>() -> Kernel {
    Kernel { lanes: LANES, keys: STEP, step: [step::<VNNI, 1>, step::<VNNI, 2>, step::<VNNI, 3>] }
}

/// A tile of keys for V vectors of rows.
#[target_feature(enable = "avx2,fma,f16c")]
fn step<const VNNI: u8, const V: usize>(group: &mut Group<'_>, tile: &IntTile<'_>, seen: Seen, room: &mut Room<'_>) {
    let q = rows::<_, V>(group.q);
    for key in (seen.start..seen.end).step_by(STEP) {
        room.ask_ahead();
        let keys = &tile.keys[key / BLOCK * q.len()..][..q.len()];
        let sums = products::<VNNI, V>(keys, key % BLOCK / STEP, q);
        let scores = &mut rows_mut::<_, V>(room.scores)[key..];
        for ((sums, scale), scores) in sums.iter().zip(&tile.key_scales[key..]).zip(scores) {
            for (sum, score) in sums.iter().zip(scores) {
                store(score, _mm256_mul_ps(_mm256_cvtepi32_ps(*sum), _mm256_set1_ps(*scale)));
            }
        }
    }

    let soften = if seen.masked { soften::<V, true> } else { soften::<V, false> };
    let factors: [_; V] = std::array::from_fn(|v| soften(v, group, tile, seen, room));

    let weights = &rows::<_, V>(room.weights)[seen.start / 2..seen.end / 2];
    for (n, acc) in rows_mut::<_, V>(group.acc).chunks_exact_mut(STEP).enumerate() {
        let values = &tile.values[n * STEP / BLOCK * KEY_TILE / 2..][seen.start / 2..seen.end / 2];
        let sums = products::<VNNI, V>(values, n % (BLOCK / STEP), weights);
        for (sums, acc) in sums.iter().zip(acc) {
            for ((sum, acc), [before, step]) in sums.iter().zip(acc).zip(factors) {
                store(acc, _mm256_fmadd_ps(_mm256_cvtepi32_ps(*sum), step, _mm256_mul_ps(load(acc), before)));
            }
        }
    }
}

/// sums[j][v] = Σ x[i][STEP * part + j] · y[i][v] over i: in each lane the dot product of two int16.
#[target_feature(enable = "avx2,fma,f16c")]
fn products<const VNNI: u8, const V: usize>(
    x: &[[Pair; BLOCK]],
    part: usize,
    y: &[[[Pair; LANES]; V]],
) -> [[__m256i; V]; STEP] {
    assert!(x.len() == y.len() && part < BLOCK / STEP, "{} pairs meet {}, part {part}", x.len(), y.len());
    let mut sums = [[_mm256_setzero_si256(); V]; STEP];
    for (x, y) in x.iter().zip(y) {
        // SAFETY: each array is 32 readable bytes.
        let y = y.each_ref().map(|y| unsafe { _mm256_loadu_si256(y.as_ptr().cast()) });
        for (x, sums) in x.as_chunks::<STEP>().0[part].iter().zip(&mut sums) {
            let x = _mm256_set1_epi32(*x);
            for (sum, y) in sums.iter_mut().zip(y) {
                lanes::add_pairs::<VNNI>(sum, x, y);
            }
        }
    }
    sums
}

/// One step of the online softmax of vector `v`: scores, still to be multiplied by the scales of their rows, become weights e^(x − m) times
/// the scales of their values, as pairs of codes; maxima and sums move on. With `MASKED`, what a row does not see weighs nothing.
///
/// Returns the factors e^(old m − m) for what the rows gathered before, and the steps of the codes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn soften<const V: usize, const MASKED: bool>(
    v: usize,
    group: &mut Group<'_>,
    tile: &IntTile<'_>,
    seen: Seen,
    room: &mut Room<'_>,
) -> [__m256; 2] {
    let scores = &mut rows_mut::<_, V>(room.scores)[seen.start..seen.end];
    let floor = _mm256_set1_ps(f32::NEG_INFINITY);
    if MASKED {
        // SAFETY: the array is 32 readable bytes.
        let limits = unsafe { _mm256_loadu_si256(rows::<_, V>(group.limits)[0][v].as_ptr().cast()) };
        for (key, scores) in (seen.start..).zip(&mut *scores) {
            let sees = _mm256_cmpgt_epi32(limits, _mm256_set1_epi32((tile.positions.start + key) as i32));
            let sees = if key < tile.skip { _mm256_setzero_si256() } else { sees };
            let shown = _mm256_blendv_ps(floor, load(&scores[v]), _mm256_castsi256_ps(sees));
            store(&mut scores[v], shown);
        }
    }
    let mut most = [floor; 4];
    for scores in scores.as_chunks::<4>().0 {
        for (most, score) in most.iter_mut().zip(scores) {
            *most = _mm256_max_ps(load(&score[v]), *most);
        }
    }
    let most = _mm256_max_ps(_mm256_max_ps(most[0], most[1]), _mm256_max_ps(most[2], most[3]));
    let (scale, log2_e) = (load(&rows::<_, V>(group.scales)[0][v]), _mm256_set1_ps(LOG2_E));
    let max = &mut rows_mut::<_, V>(group.max)[0][v];
    let old = load(max);
    // The second one of two wins if one is NaN, here and below.
    let new = _mm256_max_ps(_mm256_mul_ps(most, scale), old);
    store(max, new);
    let m = _mm256_mul_ps(_mm256_max_ps(new, _mm256_set1_ps(LEAST_MAX)), log2_e);
    // Rounded as m is, so that it is 1 where the maximum stays.
    let factor = pow2_256(_mm256_sub_ps(_mm256_mul_ps(old, log2_e), m));

    let scale = _mm256_mul_ps(scale, log2_e);
    let [mut sum, mut total, mut most] = [_mm256_setzero_ps(); 3];
    for (score, value_scale) in scores.iter_mut().zip(&tile.value_scales[seen.start..]) {
        let x = load(&score[v]);
        let mut p = pow2_256(_mm256_fmsub_ps(x, scale, m));
        let mut scaled = _mm256_mul_ps(p, _mm256_set1_ps(*value_scale));
        if MASKED {
            // A value that a row does not see may be NaN; one that is seen must show, however little it weighs.
            let sees = _mm256_cmp_ps::<_CMP_NEQ_UQ>(x, floor);
            (p, scaled) = (_mm256_and_ps(sees, p), _mm256_and_ps(sees, scaled));
        }
        sum = _mm256_add_ps(sum, p);
        total = _mm256_add_ps(total, scaled);
        most = _mm256_max_ps(most, scaled);
        store(&mut score[v], scaled);
    }
    let before = &mut rows_mut::<_, V>(group.sum)[0][v];
    store(before, _mm256_fmadd_ps(load(before), factor, sum));

    // NaN is in the total if it is anywhere, and is passed on.
    let one = _mm256_div_ps(most, _mm256_set1_ps(WEIGHT));
    let step = _mm256_max_ps(one, _mm256_div_ps(total, _mm256_set1_ps(WEIGHTS)));
    let counts = _mm256_cmp_ps::<_CMP_NLT_UQ>(step, _mm256_set1_ps(LEAST_STEP));
    let inverse = _mm256_and_ps(counts, _mm256_div_ps(_mm256_set1_ps(1.0), step));
    let round = _mm256_set1_ps(ROUND);
    let weights = &mut rows_mut::<_, V>(room.weights)[seen.start / 2..];
    for (weights, [first, second]) in weights.iter_mut().zip(scores.as_chunks::<2>().0) {
        let [low, high] = [first, second].map(|x| _mm256_castps_si256(_mm256_fmadd_ps(load(&x[v]), inverse, round)));
        let codes = _mm256_blend_epi16::<0b1010_1010>(low, _mm256_slli_epi32::<16>(high));
        // SAFETY: the array is 32 writable bytes.
        unsafe { _mm256_storeu_si256(weights[v].as_mut_ptr().cast(), codes) };
    }
    [factor, step]
}

fn rows<T, const V: usize>(x: &[T]) -> &[[[T; LANES]; V]] {
    x.as_chunks().0.as_chunks().0
}

fn rows_mut<T, const V: usize>(x: &mut [T]) -> &mut [[[T; LANES]; V]] {
    x.as_chunks_mut().0.as_chunks_mut().0
}
