//! Choosing the next token from logits whose vocabulary is split over the ranks.
//!
//! Each rank offers the best candidates of its slice; all gather them and reach the same choice, so
//! no rank ever sees another's logits and the token itself is never sent. The filters are those of
//! Hugging Face transformers, in its order: repetition penalty, temperature, top-k, top-p, min-p.
//! The draw is the largest score after Gumbel noise has been added (the Gumbel-max trick), and the
//! noise is a hash of seed, step and token id: the same token comes out on any number of ranks.
//!
//! | filters | what a rank sends |
//! |---|---|
//! | greedy, or no filter | one candidate |
//! | top-k | k candidates |
//! | min-p alone | its largest score, then one candidate |
//! | top-p without top-k | 128 candidates and its probability mass, then four times as many until the mass suffices |
//!
//! A candidate takes 8 bytes.

use std::ops::Range;
use std::sync::Arc;

use comm::{CommError, Communicator, CommunicatorExt};
use ops::Isa;

use crate::candidates::{Candidate, any_invalid, best, best_perturbed, perturb, select};
use crate::deterministic::{Noise, exp, ln};
use crate::generation_config::GenerationConfig;

/// Candidates of the first round of top-p.
const FIRST_ROUND: usize = 128;
/// Probability masses travel as multiples of 2⁻⁴⁰ of the largest: sums of integers do not depend on
/// their order.
const MASS_SCALE: f64 = (1u64 << 40) as f64;
/// Below this a temperature means greedy: the distribution is a point to f32 precision, and logits
/// must not overflow.
const LEAST_TEMPERATURE: f32 = 1e-5;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 (or less than 1e-5) takes the largest logit and ignores the filters
    /// after it.
    pub temperature: f32,
    /// Keeps the k most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most probable tokens until their mass reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this probable relative to the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divides the positive logits of tokens that occurred and multiplies the negative ones; 1
    /// changes nothing.
    pub repetition_penalty: f32,
    /// Of the random draws.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// What the checkpoint's publisher recommends at `temperature`, or at the publisher's own where
    /// that is `None`: greedy where the file says not to sample, or says nothing. Who samples and
    /// does not say from how many candidates means 50, as transformers do.
    pub fn recommended(config: &GenerationConfig, temperature: Option<f32>, seed: u64) -> Self {
        let temperature = temperature.unwrap_or_else(|| {
            let samples = config.do_sample.unwrap_or(config.temperature.is_some());
            if samples { config.temperature.unwrap_or(1.0) } else { 0.0 }
        });
        let greedy = Self::default();
        Self {
            temperature,
            top_k: config.top_k.unwrap_or(if temperature > 0.0 { 50 } else { greedy.top_k }),
            top_p: config.top_p.unwrap_or(greedy.top_p),
            min_p: config.min_p.unwrap_or(greedy.min_p),
            repetition_penalty: config.repetition_penalty.unwrap_or(greedy.repetition_penalty),
            seed,
        }
    }

    /// Checks every parameter's range.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |valid: bool, name, found: f32, expected| match valid {
            true => Ok(()),
            false => Err(SamplingError::Parameter { name, found, expected }),
        };
        let (penalty, limit) = (self.repetition_penalty, 1e6);
        check(
            (0.0..=limit).contains(&self.temperature),
            "temperature",
            self.temperature,
            "a number in 0..=1e6",
        )?;
        check(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "top_p",
            self.top_p,
            "a number above 0, at most 1",
        )?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p, "a number in 0..=1")?;
        check(
            penalty > 0.0 && penalty <= limit,
            "repetition_penalty",
            penalty,
            "a number above 0, at most 1e6",
        )
    }
}

/// Why no token could be chosen.
#[derive(Debug, thiserror::Error)]
pub enum SamplingError {
    /// A parameter is out of range.
    #[error("sampling parameter {name} is {found}, expected {expected}")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// Its value.
        found: f32,
        /// Its range.
        expected: &'static str,
    },
    /// The model computed a logit that is not a number: its weights are damaged, or a value
    /// overflowed.
    #[error("a logit of rank {rank} is NaN or infinite at step {step}, expected finite numbers")]
    NotFinite {
        /// The first such rank.
        rank: usize,
        /// The step.
        step: u64,
    },
    /// All logits are −∞.
    #[error("no token is possible at step {step}: every logit is -inf")]
    NoCandidate {
        /// The step.
        step: u64,
    },
    /// The exchange failed.
    #[error(transparent)]
    Comm(#[from] CommError),
}

/// The next token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Its id, the same on every rank.
    pub id: u32,
    /// Whether any rank asked to stop; the same on every rank.
    pub stop: bool,
}

/// Chooses tokens; each rank has one, with the same parameters.
pub struct Sampler {
    params: SamplingParams,
    vocab_size: usize,
    comm: Arc<dyn Communicator>,
    isa: Isa,
    scores: Vec<f32>,
    /// For each token of the slice, the last step that penalized it.
    penalized: Vec<u64>,
    calls: u64,
    own: Vec<Candidate>,
    words: Vec<u64>,
}

impl Sampler {
    /// A sampler for the ranks of `comm`, which share a vocabulary of `vocab_size` tokens.
    pub fn new(
        params: SamplingParams,
        vocab_size: usize,
        comm: Arc<dyn Communicator>,
        isa: Isa,
    ) -> Result<Self, SamplingError> {
        params.validate()?;
        let (scores, penalized, own, words) = Default::default();
        Ok(Self { params, vocab_size, comm, isa, scores, penalized, calls: 0, own, words })
    }

    /// The parameters.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// Chooses the token after `history` from `logits` `[vocab.len()]`, this rank's slice `vocab`
    /// of the vocabulary. The slices of the ranks do not overlap and may be empty. All ranks call
    /// it with the same `step` and `history`; `stop` may differ.
    ///
    /// `step` numbers the draws: two calls with the same seed, step and logits give the same token.
    ///
    /// # Panics
    ///
    /// If `logits` has another length than `vocab`.
    pub fn sample(
        &mut self,
        vocab: Range<usize>,
        logits: &[f32],
        step: u64,
        history: &[u32],
        stop: bool,
    ) -> Result<Sample, SamplingError> {
        assert_eq!(
            logits.len(),
            vocab.len(),
            "logits against the slice {vocab:?} of the vocabulary"
        );
        let changed = self.prepare(&vocab, logits, history);
        let own = std::mem::take(&mut self.scores);
        let scores = if changed { &own } else { logits };
        let mut round = Round { sampler: self, step, stop, invalid: any_invalid(scores) };
        let chosen = round.choose(scores, vocab);
        let stop = round.stop;
        self.scores = own;
        Ok(Sample { id: chosen?.id, stop })
    }

    /// Fills `self.scores` with the logits after repetition penalty and temperature, if these
    /// change any.
    fn prepare(&mut self, vocab: &Range<usize>, logits: &[f32], history: &[u32]) -> bool {
        let (penalty, temperature) = (self.params.repetition_penalty, self.params.temperature);
        let scaled = temperature >= LEAST_TEMPERATURE && temperature != 1.0;
        if penalty == 1.0 && !scaled {
            return false;
        }
        self.scores.clear();
        self.scores.extend_from_slice(logits);
        self.calls += 1;
        if penalty != 1.0 {
            self.penalized.resize(logits.len(), 0);
            for &id in history {
                let Some(index) =
                    (id as usize).checked_sub(vocab.start).filter(|&index| index < logits.len())
                else {
                    continue;
                };
                // Once, however often the token occurred.
                if std::mem::replace(&mut self.penalized[index], self.calls) != self.calls {
                    let score = &mut self.scores[index];
                    *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
                }
            }
        }
        if scaled {
            self.scores.iter_mut().for_each(|score| *score /= temperature);
        }
        true
    }
}

/// One choice, which takes one or more exchanges.
struct Round<'a> {
    sampler: &'a mut Sampler,
    step: u64,
    /// This rank's wish, and after the first exchange whether any rank has it.
    stop: bool,
    /// Whether this rank's logits are unusable; the others learn it from the exchange, as they
    /// could not from an early return.
    invalid: bool,
}

impl Round<'_> {
    fn choose(&mut self, scores: &[f32], vocab: Range<usize>) -> Result<Candidate, SamplingError> {
        let params = self.sampler.params;
        let noise = Noise::new(params.seed, self.step);
        if params.temperature < LEAST_TEMPERATURE {
            return self.best_of_all(best(self.sampler.isa, scores, vocab.start));
        }
        let count = params.top_k;
        if count > 0 && count < self.sampler.vocab_size {
            let mut all = self.exchange(count, |own| select(scores, vocab.start, count, own))?;
            all.sort_unstable_by(Candidate::rank);
            all.truncate(count);
            if all.is_empty() {
                return Err(SamplingError::NoCandidate { step: self.step });
            }
            let total = all.iter().map(|candidate| mass(candidate.score, all[0].score)).sum();
            let limit = Limit::new(&params, all[0].score, total);
            let kept = limit.prefix(&all).unwrap_or(all.len());
            return Ok(draw(&all[..kept], noise));
        }
        if params.top_p < 1.0 {
            return self.nucleus(scores, vocab.start, noise);
        }
        let mut least = f32::NEG_INFINITY;
        if params.min_p > 0.0 {
            least = least_score(
                self.best_of_all(best(self.sampler.isa, scores, vocab.start))?.score,
                params.min_p,
            );
        }
        self.best_of_all(best_perturbed(scores, vocab, least, noise))
    }

    /// Top-p over the whole vocabulary: gathers candidates until they hold the mass that is kept.
    fn nucleus(
        &mut self,
        scores: &[f32],
        first: usize,
        noise: Noise,
    ) -> Result<Candidate, SamplingError> {
        let params = self.sampler.params;
        let mut known: Vec<Candidate> = Vec::new();
        let (mut sent, mut count) = (0, FIRST_ROUND);
        let mut limit = None;
        loop {
            let block = count - sent;
            let gathered = self.exchange(block, |own| {
                select(scores, first, count, own);
                own.drain(..sent.min(own.len()));
            })?;
            // A rank that filled its block may have more, all of them behind the last one that it
            // sent. What comes before the best of these last ones is therefore complete.
            let last = self.last_of_full_blocks(block);
            known.extend(gathered);
            known.sort_unstable_by(Candidate::rank);
            if known.is_empty() {
                return Err(SamplingError::NoCandidate { step: self.step });
            }
            let limit = match &limit {
                Some(limit) => limit,
                None => limit.insert(Limit::new(
                    &params,
                    known[0].score,
                    self.total_mass(scores, known[0].score)?,
                )),
            };
            let complete = match last {
                Some(last) => known.partition_point(|candidate| !last.beats(candidate)),
                None => known.len(),
            };
            match limit.prefix(&known[..complete]) {
                Some(kept) => return Ok(draw(&known[..kept], noise)),
                None if last.is_none() => return Ok(draw(&known, noise)),
                None => (sent, count) = (count, count.saturating_mul(4)),
            }
        }
    }

    /// The best candidate of all ranks.
    fn best_of_all(&mut self, own: Candidate) -> Result<Candidate, SamplingError> {
        let all = self.exchange(1, |list| list.push(own))?;
        all.into_iter()
            .min_by(Candidate::rank)
            .ok_or(SamplingError::NoCandidate { step: self.step })
    }

    /// The candidates of all ranks, in rank order, where each offers at most `count`. Missing ones
    /// are filled up on the wire: blocks of one size need no agreement on sizes. Fails on all ranks
    /// alike where one has an invalid logit.
    fn exchange(
        &mut self,
        count: usize,
        offer: impl FnOnce(&mut Vec<Candidate>),
    ) -> Result<Vec<Candidate>, SamplingError> {
        let Sampler { comm, own, words, .. } = &mut *self.sampler;
        own.clear();
        offer(own);
        own.resize(count, Candidate::NONE);
        if self.invalid {
            own[0].score = f32::NAN;
        }
        let send: Vec<u64> = own.iter().map(|candidate| candidate.pack(self.stop)).collect();
        words.clear();
        words.resize(count * comm.size(), 0);
        comm.all_gather(&send, words)?;
        let mut all = Vec::with_capacity(words.len());
        for (index, &word) in words.iter().enumerate() {
            let (candidate, stop) = Candidate::unpack(word);
            self.stop |= stop;
            if candidate.score.is_nan() {
                return Err(SamplingError::NotFinite { rank: index / count, step: self.step });
            }
            if !candidate.is_none() {
                all.push(candidate);
            }
        }
        Ok(all)
    }

    /// The best among the last candidates of those ranks that filled their block in the exchange
    /// just made.
    fn last_of_full_blocks(&self, block: usize) -> Option<Candidate> {
        let lasts = self
            .sampler
            .words
            .chunks_exact(block)
            .map(|words| Candidate::unpack(words[block - 1]).0);
        lasts.filter(|last| !last.is_none()).min_by(Candidate::rank)
    }

    /// The probability mass of all ranks' tokens.
    fn total_mass(&self, scores: &[f32], max: f32) -> Result<u64, SamplingError> {
        let own: u64 = scores.iter().map(|&score| mass(score, max)).sum();
        Ok(self.sampler.comm.all_gather_one(own)?.iter().sum())
    }
}

/// Where a list of candidates, best first, is cut by top-p and min-p.
struct Limit {
    max: f32,
    /// Candidates before which this mass lies are dropped.
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

    /// How many candidates stay (at least one), if the cut lies within the list.
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
    // Rounds to 0, as most of a vocabulary does.
    if distance < -28.5 {
        return 0;
    }
    (exp(distance.min(0.0)) * MASS_SCALE + 0.5) as u64
}

/// The score of a token that is `min_p` times as probable as one of score `max`.
fn least_score(max: f32, min_p: f32) -> f32 {
    (f64::from(max) + ln(f64::from(min_p))) as f32
}

/// A draw from the softmax of the candidates' scores.
fn draw(candidates: &[Candidate], noise: Noise) -> Candidate {
    let perturbed = candidates.iter().map(|candidate| perturb(candidate, noise));
    perturbed.min_by(Candidate::rank).expect("at least one candidate is kept")
}
