//! Log-probabilities of a chosen token and of the most probable ones, over a split vocabulary.
//!
//! Each rank sends its largest logit, the sum of exponentials relative to it, the chosen token's
//! logit if it owns the token, and its best tokens. Every rank computes the same values from them.

use std::ops::Range;

use ops::Isa;

use super::adjust::index_in;
use crate::candidates::{Candidate, best, select};
use crate::deterministic::{exp, ln};

/// Words before the candidates.
const HEAD: usize = 2;

/// The log-probabilities that one row returns.
pub(super) struct Logprobs<'a> {
    pub isa: Isa,
    /// This rank's slice of the vocabulary.
    pub vocab: Range<usize>,
    /// The model's logits for that slice.
    pub logits: &'a [f32],
    pub chosen: u32,
    /// The number of most probable tokens.
    pub count: usize,
}

impl Logprobs<'_> {
    /// Words that each rank contributes.
    pub fn words(&self) -> usize {
        HEAD + self.count
    }

    /// Appends this rank's words to `out`. With `invalid` logits the first word says so.
    pub fn offer(&self, invalid: bool, out: &mut Vec<u64>) {
        let largest = best(self.isa, self.logits, self.vocab.start).score;
        let own = index_in(&self.vocab, self.chosen).map(|index| self.logits[index]);
        let max = if invalid { f32::NAN } else { largest };
        out.push(pair(max, own.unwrap_or(f32::NEG_INFINITY)));
        out.push(sum_exp(self.isa, self.logits, largest).to_bits());
        let mut top = Vec::new();
        select(self.logits, self.vocab.start, self.count, &mut top);
        top.resize(self.count, Candidate::NONE);
        out.extend(top.iter().map(|candidate| candidate.pack()));
    }

    /// The chosen token's log-probability and the best tokens with theirs, from the words of all
    /// ranks in rank order. The error is the first rank with an invalid logit.
    pub fn take<'w>(
        &self,
        gathered: impl Iterator<Item = &'w [u64]> + Clone,
    ) -> Result<(f32, Vec<(u32, f32)>), usize> {
        let heads = gathered.clone().map(|words| (split(words[0]), f64::from_bits(words[1])));
        if let Some(rank) = heads.clone().position(|((max, _), _)| max.is_nan()) {
            return Err(rank);
        }
        let max = heads.clone().map(|((max, _), _)| max).fold(f32::NEG_INFINITY, f32::max);
        let chosen = heads.clone().map(|((_, own), _)| own).fold(f32::NEG_INFINITY, f32::max);
        let parts = heads.filter(|((max, _), _)| *max > f32::NEG_INFINITY);
        let sum: f64 =
            parts.map(|((part, _), sum)| sum * exp(f64::from(part) - f64::from(max))).sum();
        // Without any finite logit no token has a probability above 0.
        let normalizer = if sum > 0.0 { f64::from(max) + ln(sum) } else { 0.0 };
        let logprob = |logit: f32| (f64::from(logit) - normalizer) as f32;
        let words = gathered.flat_map(|words| &words[HEAD..]);
        let candidates = words.map(|&word| Candidate::unpack(word));
        let mut top: Vec<_> = candidates.filter(|candidate| !candidate.is_none()).collect();
        top.sort_unstable_by(Candidate::rank);
        top.truncate(self.count);
        let top = top.iter().map(|candidate| (candidate.id, logprob(candidate.score))).collect();
        Ok((logprob(chosen), top))
    }
}

/// Σ e^(x − max), summed in f64 over blocks that the kernel exponentiates.
fn sum_exp(isa: Isa, logits: &[f32], max: f32) -> f64 {
    let mut block = [0.0; 512];
    let mut sum = 0.0;
    for logits in logits.chunks(block.len()) {
        let block = &mut block[..logits.len()];
        block.iter_mut().zip(logits).for_each(|(x, logit)| *x = logit - max);
        ops::kernels::exp(isa, block);
        sum += block.iter().map(|&x| f64::from(x)).sum::<f64>();
    }
    sum
}

fn pair(high: f32, low: f32) -> u64 {
    u64::from(high.to_bits()) << 32 | u64::from(low.to_bits())
}

fn split(word: u64) -> (f32, f32) {
    (f32::from_bits((word >> 32) as u32), f32::from_bits(word as u32))
}
