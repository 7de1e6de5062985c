//! The choice of one token from a split row of scores, as a sequence of exchanges between the
//! ranks.
//!
//! All rows of a step take part in the same exchanges. In each, a row contributes a number of
//! 64-bit words that every rank knows in advance, because it follows from the parameters and from
//! earlier exchanges alone.

use std::borrow::Cow;
use std::ops::Range;

use ops::Isa;

use super::SamplingError;
use super::params::SamplingParams;
use crate::candidates::{Candidate, best, best_perturbed, perturb, select};
use crate::deterministic::{Noise, exp, ln};

/// Candidates that each rank sends in the first exchange of a nucleus (top-p without top-k).
const FIRST_BLOCK: usize = 128;
/// Probability masses travel as multiples of 2⁻⁴⁰ of the largest probability. The sum of integers
/// does not depend on their order.
const MASS_SCALE: f64 = (1u64 << 40) as f64;

/// One row on its way to a token.
pub(super) struct Choice<'a> {
    pub params: &'a SamplingParams,
    pub isa: Isa,
    /// This rank's slice of the vocabulary.
    pub vocab: Range<usize>,
    /// Scores of that slice.
    pub scores: Cow<'a, [f32]>,
    /// A logit of this rank is NaN or +∞. The others learn it from the exchange.
    pub invalid: bool,
    pub step: u64,
    pub noise: Noise,
    pub stage: Stage,
}

/// What a row exchanges next.
pub(super) enum Stage {
    /// The best candidate of each rank; the best of all is chosen.
    Best,
    /// The best candidate of each rank, which decides on the lowest score that `min_p` keeps.
    Peak,
    /// The best candidate of each rank after noise, among scores of at least `least`.
    Draw { least: f32 },
    /// The `count` best candidates of each rank.
    TopK { count: usize },
    /// The best candidates of each rank from `sent` to `count`.
    Nucleus { sent: usize, count: usize, nucleus: Nucleus },
    /// Each rank's probability mass.
    Mass { count: usize, nucleus: Nucleus },
    /// Nothing: the token is chosen.
    Chosen(u32),
    /// Nothing: no token can be chosen.
    Failed(SamplingError),
}

/// What is known of the most probable tokens of all ranks.
#[derive(Default)]
pub(super) struct Nucleus {
    /// Best first.
    known: Vec<Candidate>,
    /// The number of candidates in `known` before which no rank has another one, and whether these
    /// are all candidates there are.
    complete: (usize, bool),
    limit: Option<Limit>,
}

impl Stage {
    /// The first exchange of a row with these parameters.
    pub fn first(params: &SamplingParams, vocab_size: usize) -> Self {
        if params.is_greedy() {
            Self::Best
        } else if params.top_k > 0 && params.top_k < vocab_size {
            Self::TopK { count: params.top_k }
        } else if params.top_p < 1.0 {
            Self::Nucleus { sent: 0, count: FIRST_BLOCK, nucleus: Nucleus::default() }
        } else if params.min_p > 0.0 {
            Self::Peak
        } else {
            Self::Draw { least: f32::NEG_INFINITY }
        }
    }
}

impl Choice<'_> {
    /// Words that each rank contributes to the coming exchange.
    pub fn words(&self) -> usize {
        match self.stage {
            Stage::Best | Stage::Peak | Stage::Draw { .. } | Stage::Mass { .. } => 1,
            Stage::TopK { count } => count,
            Stage::Nucleus { sent, count, .. } => count - sent,
            Stage::Chosen(_) | Stage::Failed(_) => 0,
        }
    }

    /// Appends this rank's words for the coming exchange to `out`.
    pub fn offer(&self, out: &mut Vec<u64>) {
        let (scores, first) = (&self.scores[..], self.vocab.start);
        let mut own = Vec::new();
        match &self.stage {
            Stage::Best | Stage::Peak => own.push(best(self.isa, scores, first)),
            Stage::Draw { least } => {
                own.push(best_perturbed(scores, self.vocab.clone(), *least, self.noise));
            }
            Stage::TopK { count } => select(scores, first, *count, &mut own),
            Stage::Nucleus { sent, count, .. } => {
                select(scores, first, *count, &mut own);
                own.drain(..(*sent).min(own.len()));
            }
            Stage::Mass { nucleus, .. } => {
                let max = nucleus.known[0].score;
                return out.push(scores.iter().map(|&score| mass(score, max)).sum());
            }
            Stage::Chosen(_) | Stage::Failed(_) => return,
        }
        own.resize(self.words(), Candidate::NONE);
        if self.invalid {
            own[0].score = f32::NAN;
        }
        out.extend(own.iter().map(|candidate| candidate.pack()));
    }

    /// Takes the words of all ranks, in rank order, and goes on to the next stage.
    pub fn take<'w>(&mut self, gathered: impl Iterator<Item = &'w [u64]> + Clone) {
        let stage = std::mem::replace(&mut self.stage, Stage::Chosen(0));
        let next = match stage {
            Stage::Mass { count, mut nucleus } => {
                let total = gathered.map(|words| words[0]).sum();
                nucleus.limit = Some(Limit::new(self.params, nucleus.known[0].score, total));
                Ok(self.cut(nucleus, count))
            }
            stage => self.advance(stage, gathered),
        };
        self.stage = next.unwrap_or_else(Stage::Failed);
    }

    /// The stage after an exchange of candidates.
    fn advance<'w>(
        &self,
        stage: Stage,
        gathered: impl Iterator<Item = &'w [u64]> + Clone,
    ) -> Result<Stage, SamplingError> {
        let mut all: Vec<Candidate> = Vec::new();
        for (rank, words) in gathered.clone().enumerate() {
            if Candidate::unpack(words[0]).score.is_nan() {
                return Err(SamplingError::NotFinite { rank, step: self.step });
            }
            let candidates = words.iter().map(|&word| Candidate::unpack(word));
            all.extend(candidates.filter(|candidate| !candidate.is_none()));
        }
        all.sort_unstable_by(Candidate::rank);
        let none = SamplingError::NoCandidate { step: self.step };
        Ok(match stage {
            Stage::Nucleus { count, mut nucleus, .. } => {
                nucleus.known.extend(all);
                nucleus.known.sort_unstable_by(Candidate::rank);
                if nucleus.known.is_empty() {
                    return Err(none);
                }
                // A rank that filled its block may have more candidates, all of them behind the
                // last one that it sent. The list is complete up to the best of these last ones.
                let last = gathered.map(|words| Candidate::unpack(words[words.len() - 1]));
                let last = last.filter(|last| !last.is_none()).min_by(Candidate::rank);
                nucleus.complete = match last {
                    Some(last) => (nucleus.known.partition_point(|c| !last.beats(c)), false),
                    None => (nucleus.known.len(), true),
                };
                if nucleus.limit.is_none() {
                    Stage::Mass { count, nucleus }
                } else {
                    self.cut(nucleus, count)
                }
            }
            Stage::TopK { count } => {
                all.truncate(count);
                let max = all.first().ok_or(none)?.score;
                let total = all.iter().map(|candidate| mass(candidate.score, max)).sum();
                let kept = Limit::new(self.params, max, total).prefix(&all).unwrap_or(all.len());
                Stage::Chosen(self.draw(&all[..kept]))
            }
            Stage::Peak => {
                let max = all.first().ok_or(none)?.score;
                Stage::Draw { least: least_score(max, self.params.min_p) }
            }
            _ => Stage::Chosen(all.first().ok_or(none)?.id),
        })
    }

    /// Draws from the nucleus if its limit lies within the known candidates; otherwise asks for
    /// four times as many.
    fn cut(&self, nucleus: Nucleus, count: usize) -> Stage {
        let (complete, all) = nucleus.complete;
        let limit = nucleus.limit.as_ref().expect("the mass is known");
        match limit.prefix(&nucleus.known[..complete]) {
            Some(kept) => Stage::Chosen(self.draw(&nucleus.known[..kept])),
            None if all => Stage::Chosen(self.draw(&nucleus.known)),
            None => Stage::Nucleus { sent: count, count: count.saturating_mul(4), nucleus },
        }
    }

    /// A draw from the softmax of the scores of `candidates`, of which there is at least one.
    fn draw(&self, candidates: &[Candidate]) -> u32 {
        let perturbed = candidates.iter().map(|candidate| perturb(candidate, self.noise));
        perturbed.min_by(Candidate::rank).expect("at least one candidate is kept").id
    }
}

/// Where a list of candidates, best first, is cut by top-p and min-p.
struct Limit {
    max: f32,
    /// Candidates behind this much mass are dropped.
    mass: f64,
    /// Candidates below this score are dropped.
    least: f32,
}

impl Limit {
    fn new(params: &SamplingParams, max: f32, total: u64) -> Self {
        let mass =
            if params.top_p < 1.0 { f64::from(params.top_p) * total as f64 } else { f64::INFINITY };
        let least =
            if params.min_p > 0.0 { least_score(max, params.min_p) } else { f32::NEG_INFINITY };
        Self { max, mass, least }
    }

    /// The number of candidates that are kept (at least one), if the cut lies within the list.
    fn prefix(&self, sorted: &[Candidate]) -> Option<usize> {
        let mut before = 0u64;
        for (index, candidate) in sorted.iter().enumerate() {
            if index > 0 && (before as f64 >= self.mass || candidate.score < self.least) {
                return Some(index);
            }
            before += mass(candidate.score, self.max);
        }
        (before as f64 >= self.mass).then_some(sorted.len())
    }
}

/// e^(score − max) in units of 2⁻⁴⁰, rounded.
fn mass(score: f32, max: f32) -> u64 {
    let distance = f64::from(score) - f64::from(max);
    // Rounds to 0, as for most of a vocabulary.
    if distance < -28.5 {
        return 0;
    }
    (exp(distance.min(0.0)) * MASS_SCALE + 0.5) as u64
}

/// The score of a token that is `min_p` times as probable as one of score `max`.
fn least_score(max: f32, min_p: f32) -> f32 {
    (f64::from(max) + ln(f64::from(min_p))) as f32
}
