//! The kernels of AVX-512: a register holds sixteen rows.
//!
//! Three vectors of rows meet eight keys, or eight elements of values, at once: 24 sums. All numbers are those of AVX2.

use super::{
    BLOCK, Group, IntTile, KEY_TILE, Kernel, LEAST_MAX, LEAST_STEP, LOG2_E, Pair, ROUND, Room, Seen, WEIGHT, WEIGHTS,
};
use crate::exp::pow2_512;
use crate::lanes::{load16, store16};
use std::arch::asm;
use std::arch::x86_64::*;

const LANES: usize = 16;
/// Keys, or elements of values, that meet a group at once.
const STEP: usize = 8;

pub(super) const KERNEL: Kernel = Kernel { lanes: LANES, keys: STEP, step: [step::<1>, step::<2>, step::<3>] };

/// A tile of keys for V vectors of rows.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn step<const V: usize>(group: &mut Group<'_>, tile: &IntTile<'_>, seen: Seen, room: &mut Room<'_>) {
    #[cfg(test)]
    crate::isa::witness::record("wide::step");
    let q = rows::<_, V>(group.q);
    for key in (seen.start..seen.end).step_by(STEP) {
        room.ask_ahead();
        let keys = &tile.keys[key / BLOCK * q.len()..][..q.len()];
        let sums = products(keys, key % BLOCK / STEP, q);
        let scores = &mut rows_mut::<_, V>(room.scores)[key..];
        for ((sums, scale), scores) in sums.iter().zip(&tile.key_scales[key..]).zip(scores) {
            for (sum, score) in sums.iter().zip(scores) {
                store16(score, _mm512_mul_ps(_mm512_cvtepi32_ps(*sum), _mm512_set1_ps(*scale)));
            }
        }
    }

    let soften = if seen.masked { soften::<V, true> } else { soften::<V, false> };
    let factors: [_; V] = std::array::from_fn(|v| soften(v, group, tile, seen, room));

    let weights = &rows::<_, V>(room.weights)[seen.start / 2..seen.end / 2];
    for (n, acc) in rows_mut::<_, V>(group.acc).chunks_exact_mut(STEP).enumerate() {
        let values = &tile.values[n * STEP / BLOCK * KEY_TILE / 2..][seen.start / 2..seen.end / 2];
        let sums = products(values, n % (BLOCK / STEP), weights);
        for (sums, acc) in sums.iter().zip(acc) {
            for ((sum, acc), [before, step]) in sums.iter().zip(acc).zip(factors) {
                store16(acc, _mm512_fmadd_ps(_mm512_cvtepi32_ps(*sum), step, _mm512_mul_ps(load16(acc), before)));
            }
        }
    }
}

/// sums[j][v] = Σ x[i][STEP * part + j] · y[i][v] over i: in each lane the dot product of two int16.
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn products<const V: usize>(x: &[[Pair; BLOCK]], part: usize, y: &[[[Pair; LANES]; V]]) -> [[__m512i; V]; STEP] {
    assert!(x.len() == y.len() && part < BLOCK / STEP, "{} pairs meet {}, part {part}", x.len(), y.len());
    let mut sums = [[_mm512_setzero_si512(); V]; STEP];
    for (x, y) in x.iter().zip(y) {
        // SAFETY: each array is 64 readable bytes.
        let y = y.each_ref().map(|y| unsafe { _mm512_loadu_si512(y.as_ptr().cast()) });
        for (x, sums) in x.as_chunks::<STEP>().0[part].iter().zip(&mut sums) {
            let x = _mm512_set1_epi32(*x);
            for (sum, y) in sums.iter_mut().zip(y) {
                // By its name: of 4 of 24 of `_mm512_dpwssd_epi32` the compiler made `vpmaddwd` and `vpaddd`.
                // SAFETY: the target features of this function have the instruction, which touches the named registers only.
                unsafe {
                    asm!("vpdpwssd {}, {}, {}", inout(zmm_reg) *sum, in(zmm_reg) x, in(zmm_reg) y,
                        options(pure, nomem, nostack, preserves_flags));
                }
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
#[target_feature(enable = "avx512bw,avx512vl,avx512vnni")]
fn soften<const V: usize, const MASKED: bool>(
    v: usize,
    group: &mut Group<'_>,
    tile: &IntTile<'_>,
    seen: Seen,
    room: &mut Room<'_>,
) -> [__m512; 2] {
    let scores = &mut rows_mut::<_, V>(room.scores)[seen.start..seen.end];
    let floor = _mm512_set1_ps(f32::NEG_INFINITY);
    if MASKED {
        // SAFETY: the array is 64 readable bytes.
        let limits = unsafe { _mm512_loadu_si512(rows::<_, V>(group.limits)[0][v].as_ptr().cast()) };
        for (key, scores) in (seen.start..).zip(&mut *scores) {
            let sees = _mm512_cmpgt_epi32_mask(limits, _mm512_set1_epi32((tile.positions.start + key) as i32));
            let sees = if key < tile.skip { 0 } else { sees };
            let shown = _mm512_mask_mov_ps(floor, sees, load16(&scores[v]));
            store16(&mut scores[v], shown);
        }
    }
    let mut most = [floor; 4];
    for scores in scores.as_chunks::<4>().0 {
        for (most, score) in most.iter_mut().zip(scores) {
            *most = _mm512_max_ps(load16(&score[v]), *most);
        }
    }
    let most = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    let (scale, log2_e) = (load16(&rows::<_, V>(group.scales)[0][v]), _mm512_set1_ps(LOG2_E));
    let max = &mut rows_mut::<_, V>(group.max)[0][v];
    let old = load16(max);
    // The second one of two wins if one is NaN, here and below.
    let new = _mm512_max_ps(_mm512_mul_ps(most, scale), old);
    store16(max, new);
    let m = _mm512_mul_ps(_mm512_max_ps(new, _mm512_set1_ps(LEAST_MAX)), log2_e);
    // Rounded as m is, so that it is 1 where the maximum stays.
    let factor = pow2_512(_mm512_sub_ps(_mm512_mul_ps(old, log2_e), m));

    let scale = _mm512_mul_ps(scale, log2_e);
    let [mut sum, mut total, mut most] = [_mm512_setzero_ps(); 3];
    for (score, value_scale) in scores.iter_mut().zip(&tile.value_scales[seen.start..]) {
        let x = load16(&score[v]);
        let mut p = pow2_512(_mm512_fmsub_ps(x, scale, m));
        let mut scaled = _mm512_mul_ps(p, _mm512_set1_ps(*value_scale));
        if MASKED {
            // A value that a row does not see may be NaN; one that is seen must show, however little it weighs.
            let sees = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(x, floor);
            (p, scaled) = (_mm512_maskz_mov_ps(sees, p), _mm512_maskz_mov_ps(sees, scaled));
        }
        sum = _mm512_add_ps(sum, p);
        total = _mm512_add_ps(total, scaled);
        most = _mm512_max_ps(most, scaled);
        store16(&mut score[v], scaled);
    }
    let before = &mut rows_mut::<_, V>(group.sum)[0][v];
    store16(before, _mm512_fmadd_ps(load16(before), factor, sum));

    // NaN is in the total if it is anywhere, and is passed on.
    let one = _mm512_div_ps(most, _mm512_set1_ps(WEIGHT));
    let step = _mm512_max_ps(one, _mm512_div_ps(total, _mm512_set1_ps(WEIGHTS)));
    let counts = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(step, _mm512_set1_ps(LEAST_STEP));
    let inverse = _mm512_maskz_div_ps(counts, _mm512_set1_ps(1.0), step);
    let round = _mm512_set1_ps(ROUND);
    let weights = &mut rows_mut::<_, V>(room.weights)[seen.start / 2..];
    for (weights, [first, second]) in weights.iter_mut().zip(scores.as_chunks::<2>().0) {
        let [low, high] = [first, second].map(|x| _mm512_castps_si512(_mm512_fmadd_ps(load16(&x[v]), inverse, round)));
        let codes = _mm512_mask_blend_epi16(0xaaaa_aaaa, low, _mm512_slli_epi32::<16>(high));
        // SAFETY: the array is 64 writable bytes.
        unsafe { _mm512_storeu_si512(weights[v].as_mut_ptr().cast(), codes) };
    }
    [factor, step]
}

fn rows<T, const V: usize>(x: &[T]) -> &[[[T; LANES]; V]] {
    x.as_chunks().0.as_chunks().0
}

fn rows_mut<T, const V: usize>(x: &mut [T]) -> &mut [[[T; LANES]; V]] {
    x.as_chunks_mut().0.as_chunks_mut().0
}
