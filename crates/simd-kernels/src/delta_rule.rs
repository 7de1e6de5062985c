//! The gated delta rule of one value head (Yang et al., "Gated Delta Networks", 2024), one token
//! after another.
//!
//! With state S [key_dim, value_dim], each token computes
//!
//! ```text
//! S ← decay · S
//! d = beta · (v − Sᵀ k)
//! S ← S + k dᵀ
//! out = Sᵀ q
//! ```
//!
//! As Sᵀ q of the new state is decay · (Sᵀ q of the old state) + (k · q) · d, both products read
//! the old state. So one pass over the state updates it for a token and computes the products of
//! the next one. A chunk form would need fewer operations per token, but its sums depend on where
//! chunks begin; here the bits of a token do not depend on how tokens are cut into calls.
//!
//! The state is stored in blocks of 32 columns, which stay in the first-level cache while all
//! tokens of a call pass over them.

use crate::isa::Isa;

/// Columns of a block of the state.
const BLOCK: usize = 32;

/// One row of a block.
type Lanes = [f32; BLOCK];

/// The tokens of a call, in order.
#[derive(Clone, Copy, Debug)]
pub struct DeltaTokens<'a> {
    /// Queries, [tokens, key_dim].
    pub q: &'a [f32],
    /// Keys, [tokens, key_dim].
    pub k: &'a [f32],
    /// Values, [tokens, value_dim].
    pub v: &'a [f32],
    /// The product of each token's key and query, `[tokens]`.
    pub key_query: &'a [f32],
    /// What the state is multiplied by before each token, `[tokens]`.
    pub decay: &'a [f32],
    /// How far each token moves the state towards its value, `[tokens]`.
    pub beta: &'a [f32],
}

/// Elements of the state of one value head.
pub fn delta_state_len(key_dim: usize, value_dim: usize) -> usize {
    value_dim.div_ceil(BLOCK) * BLOCK * key_dim
}

/// Runs the tokens through the delta rule of one value head: updates `state`
/// ([`delta_state_len`] elements, zeros at the start of a sequence) and writes out
/// [tokens, value_dim].
///
/// # Panics
/// When a length does not fit the others.
pub fn delta_rule(
    isa: Isa,
    tokens: &DeltaTokens<'_>,
    (key_dim, value_dim): (usize, usize),
    state: &mut [f32],
    out: &mut [f32],
) {
    if tokens.decay.is_empty() || key_dim == 0 {
        return;
    }
    let DeltaTokens { q, k, v, key_query, decay, beta } = tokens;
    let count = decay.len();
    let found = [q.len(), k.len(), v.len(), key_query.len(), beta.len(), out.len(), state.len()];
    let keys = count * key_dim;
    let values = count * value_dim;
    let expected = [keys, keys, values, count, count, values, delta_state_len(key_dim, value_dim)];
    assert_eq!(
        found, expected,
        "lengths of q, k, v, key_query, beta, out and state for {count} tokens, keys of {key_dim} and values \
         of {value_dim}"
    );
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() {
        #[cfg(test)]
        crate::isa::witness::record("avx512::delta_rule");
        // SAFETY: the CPU has what the function needs, the instruction set says so.
        return unsafe { avx512::delta_rule(tokens, (key_dim, value_dim), state, out) };
    }
    crate::isa::dispatch!(
        isa,
        avx2::delta_rule,
        scalar::delta_rule,
        (tokens, (key_dim, value_dim), state, out)
    )
}

/// What the new values of a block's columns come from: for each column `beta · (v − decay ·
/// by_key)`. Writes their outputs. `first` is the block's first column; columns beyond the last
/// value stay 0.
#[inline(always)]
fn deltas(
    tokens: &DeltaTokens<'_>,
    (token, first, value_dim): (usize, usize, usize),
    (by_key, by_query): (&Lanes, &Lanes),
    out: &mut [f32],
) -> Lanes {
    let (decay, beta) = (tokens.decay[token], tokens.beta[token]);
    let both = tokens.key_query[token];
    let own = token * value_dim + first..token * value_dim + (first + BLOCK).min(value_dim);
    let mut delta = [0.0; BLOCK];
    let columns = tokens.v[own.clone()].iter().zip(&mut out[own]);
    for (lane, (value, out)) in columns.enumerate() {
        delta[lane] = beta * (value - decay * by_key[lane]);
        *out = both.mul_add(delta[lane], decay * by_query[lane]);
    }
    delta
}

/// The key and the query of a token. After the last token there is none, and products with the last
/// one's own are of no use.
#[inline(always)]
fn key_and_query<'a>(
    tokens: &DeltaTokens<'a>,
    token: usize,
    key_dim: usize,
) -> (&'a [f32], &'a [f32]) {
    let token = token.min(tokens.decay.len() - 1);
    let own = token * key_dim..(token + 1) * key_dim;
    (&tokens.k[own.clone()], &tokens.q[own])
}

mod scalar {
    use super::{BLOCK, DeltaTokens, deltas, key_and_query};

    pub(super) fn delta_rule(
        tokens: &DeltaTokens<'_>,
        (key_dim, value_dim): (usize, usize),
        state: &mut [f32],
        out: &mut [f32],
    ) {
        let rows = state.as_chunks_mut::<BLOCK>().0;
        for (index, block) in rows.chunks_exact_mut(key_dim).enumerate() {
            let mut products = [[0.0f32; BLOCK]; 2];
            let add = |products: &mut [[f32; BLOCK]; 2], lane: usize, x: f32, [k, q]: [f32; 2]| {
                products[0][lane] = x.mul_add(k, products[0][lane]);
                products[1][lane] = x.mul_add(q, products[1][lane]);
            };
            let (key, query) = key_and_query(tokens, 0, key_dim);
            for ((row, k), q) in block.iter().zip(key).zip(query) {
                (0..BLOCK).for_each(|lane| add(&mut products, lane, row[lane], [*k, *q]));
            }
            for token in 0..tokens.decay.len() {
                let (key, _) = key_and_query(tokens, token, key_dim);
                let place = (token, index * BLOCK, value_dim);
                let delta = deltas(tokens, place, (&products[0], &products[1]), out);
                products = [[0.0; BLOCK]; 2];
                let next = key_and_query(tokens, token + 1, key_dim);
                for (at, row) in block.iter_mut().enumerate() {
                    for (lane, x) in row.iter_mut().enumerate() {
                        *x = key[at].mul_add(delta[lane], *x * tokens.decay[token]);
                        add(&mut products, lane, *x, [next.0[at], next.1[at]]);
                    }
                }
            }
        }
    }
}

/// The kernel for vectors of `$lanes` elements, `$vectors` of which are a row of a block.
#[cfg(target_arch = "x86_64")]
macro_rules! kernel {
    (
        $features:literal, $lanes:literal, $vectors:literal, $load:ident, $store:ident,
        $set1:ident, $mul:ident, $fmadd:ident
    ) => {
        #[target_feature(enable = $features)]
        pub(super) fn delta_rule(
            tokens: &DeltaTokens<'_>,
            (key_dim, value_dim): (usize, usize),
            state: &mut [f32],
            out: &mut [f32],
        ) {
            let rows = state.as_chunks_mut::<BLOCK>().0;
            for (index, block) in rows.chunks_exact_mut(key_dim).enumerate() {
                let zeros = [$set1(0.0); $vectors];
                let (mut by_key, mut by_query) = (zeros, zeros);
                let (key, query) = key_and_query(tokens, 0, key_dim);
                for ((row, key), query) in block.iter().zip(key).zip(query) {
                    let (key, query) = ($set1(*key), $set1(*query));
                    let row = row.as_chunks::<$lanes>().0;
                    for vector in 0..$vectors {
                        let x = $load(&row[vector]);
                        by_key[vector] = $fmadd(x, key, by_key[vector]);
                        by_query[vector] = $fmadd(x, query, by_query[vector]);
                    }
                }
                for token in 0..tokens.decay.len() {
                    let (mut keys, mut queries) = ([0.0; BLOCK], [0.0; BLOCK]);
                    for vector in 0..$vectors {
                        $store(&mut keys.as_chunks_mut().0[vector], by_key[vector]);
                        $store(&mut queries.as_chunks_mut().0[vector], by_query[vector]);
                    }
                    let place = (token, index * BLOCK, value_dim);
                    let own = deltas(tokens, place, (&keys, &queries), out);
                    let mut delta = zeros;
                    for vector in 0..$vectors {
                        delta[vector] = $load(&own.as_chunks().0[vector]);
                    }
                    // The update of this token, and the products of the next one.
                    (by_key, by_query) = (zeros, zeros);
                    let decay = $set1(tokens.decay[token]);
                    let (key, _) = key_and_query(tokens, token, key_dim);
                    let (next_key, next_query) = key_and_query(tokens, token + 1, key_dim);
                    let next = next_key.iter().zip(next_query);
                    for ((row, key), (next_key, next_query)) in block.iter_mut().zip(key).zip(next)
                    {
                        let key = $set1(*key);
                        let (next_key, next_query) = ($set1(*next_key), $set1(*next_query));
                        let row = row.as_chunks_mut::<$lanes>().0;
                        for vector in 0..$vectors {
                            let kept = $mul($load(&row[vector]), decay);
                            let x = $fmadd(key, delta[vector], kept);
                            $store(&mut row[vector], x);
                            by_key[vector] = $fmadd(x, next_key, by_key[vector]);
                            by_query[vector] = $fmadd(x, next_query, by_query[vector]);
                        }
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use super::{BLOCK, DeltaTokens, deltas, key_and_query};
    use crate::lanes::{load, store};
    use std::arch::x86_64::*;

    kernel!("avx2,fma,f16c", 8, 4, load, store, _mm256_set1_ps, _mm256_mul_ps, _mm256_fmadd_ps);
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{BLOCK, DeltaTokens, deltas, key_and_query};
    use crate::lanes::{load16, store16};
    use std::arch::x86_64::*;

    kernel!(
        "avx512f,avx2,fma,f16c",
        16,
        2,
        load16,
        store16,
        _mm512_set1_ps,
        _mm512_mul_ps,
        _mm512_fmadd_ps
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::{Guarded, noise};
    use crate::isa::witness::{assert_entered, assert_entered_avx512};
    use proptest::prelude::*;

    struct Case {
        dims: (usize, usize),
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
        key_query: Vec<f32>,
        decay: Vec<f32>,
        beta: Vec<f32>,
    }

    impl Case {
        fn new(tokens: usize, key_dim: usize, value_dim: usize, seed: u64) -> Self {
            // Keys and queries of length 1, as the model has them.
            let unit = |seed| {
                let mut x = noise(tokens * key_dim, seed);
                for row in x.chunks_mut(key_dim) {
                    let length = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-3);
                    row.iter_mut().for_each(|x| *x /= length);
                }
                x
            };
            let within = |seed| noise(tokens, seed).iter().map(|x| 0.5 + 0.49 * x).collect();
            let (q, k) = (unit(seed), unit(seed + 1));
            let pairs = q.chunks(key_dim).zip(k.chunks(key_dim));
            Self {
                dims: (key_dim, value_dim),
                key_query: pairs.map(|(q, k)| q.iter().zip(k).map(|(q, k)| q * k).sum()).collect(),
                q,
                k,
                v: noise(tokens * value_dim, seed + 2),
                decay: within(seed + 3),
                beta: within(seed + 4),
            }
        }

        fn tokens(&self, range: std::ops::Range<usize>) -> DeltaTokens<'_> {
            let (key, value) = self.dims;
            DeltaTokens {
                q: &self.q[range.start * key..range.end * key],
                k: &self.k[range.start * key..range.end * key],
                v: &self.v[range.start * value..range.end * value],
                key_query: &self.key_query[range.clone()],
                decay: &self.decay[range.clone()],
                beta: &self.beta[range],
            }
        }

        /// Runs the tokens in calls that end at `cuts`: the outputs and the last state.
        fn run(&self, isa: Isa, cuts: &[usize]) -> (Guarded, Guarded) {
            let (key, value) = self.dims;
            let mut state = Guarded::of(vec![0.0; delta_state_len(key, value)], 3);
            let mut out = Guarded::output(self.v.len(), 1);
            let mut start = 0;
            for &end in cuts.iter().chain([&self.decay.len()]) {
                let out = &mut out[start * value..end * value];
                delta_rule(isa, &self.tokens(start..end), self.dims, &mut state, out);
                start = end;
            }
            (out, state)
        }

        /// The four lines of the formula, in f64.
        fn exact(&self) -> Vec<f32> {
            let (key, value) = self.dims;
            let mut state = vec![vec![0.0f64; value]; key];
            let mut out = Vec::new();
            for token in 0..self.decay.len() {
                let row = |x: &[f32], n: usize| -> Vec<f64> {
                    x[token * n..(token + 1) * n].iter().map(|x| f64::from(*x)).collect()
                };
                let (q, k, v) = (row(&self.q, key), row(&self.k, key), row(&self.v, value));
                let product = |state: &[Vec<f64>], x: &[f64], column: usize| -> f64 {
                    state.iter().zip(x).map(|(row, x)| row[column] * x).sum()
                };
                let decay = f64::from(self.decay[token]);
                state.iter_mut().flatten().for_each(|x| *x *= decay);
                let beta = f64::from(self.beta[token]);
                let delta: Vec<f64> =
                    (0..value).map(|i| beta * (v[i] - product(&state, &k, i))).collect();
                for (row, k) in state.iter_mut().zip(&k) {
                    row.iter_mut().zip(&delta).for_each(|(x, delta)| *x += k * delta);
                }
                out.extend((0..value).map(|i| product(&state, &q, i) as f32));
            }
            out
        }
    }

    #[test]
    fn every_instruction_set_follows_the_formula() {
        for (tokens, key, value) in [(1, 16, 16), (70, 128, 128), (9, 24, 40), (5, 7, 1), (0, 8, 8)]
        {
            let case = Case::new(tokens, key, value, 3);
            let exact = case.exact();
            for isa in Isa::all() {
                case.run(isa, &[]).0.assert_close(&exact, |x| 1e-5 * x + 2e-6);
            }
        }
        assert_entered("avx2::delta_rule");
        assert_entered_avx512("avx512::delta_rule");
    }

    #[test]
    fn the_columns_beyond_the_last_value_stay_zero() {
        let case = Case::new(6, 8, 40, 11);
        for isa in Isa::all() {
            let (_, state) = case.run(isa, &[]);
            let second = state[BLOCK * 8..].chunks(BLOCK);
            assert!(second.flat_map(|row| &row[8..]).all(|x| *x == 0.0));
        }
    }

    proptest! {
        /// Bit for bit, outputs and state.
        #[test]
        fn a_token_does_not_depend_on_the_cuts(
            (tokens, key, value) in (1usize..40, 1usize..40, 1usize..100),
            mut cuts in prop::collection::vec(0usize..40, 0..6),
            seed in 0u64..1000,
        ) {
            let case = Case::new(tokens, key, value, seed);
            cuts.iter_mut().for_each(|cut| *cut = (*cut).min(tokens));
            cuts.sort_unstable();
            for isa in Isa::all() {
                let (out, state) = case.run(isa, &[]);
                let (cut_out, cut_state) = case.run(isa, &cuts);
                prop_assert_eq!(&*out, &*cut_out);
                prop_assert_eq!(&*state, &*cut_state);
            }
        }
    }
}
