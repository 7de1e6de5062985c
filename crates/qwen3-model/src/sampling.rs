//! Choosing the next tokens of several sequences from logits whose vocabulary is split over the
//! ranks.
//!
//! Each rank sends the best candidates of its slice. All ranks gather them and reach the same
//! choices, so no rank sees another's logits and the tokens themselves are never sent. The filters
//! are those of Hugging Face transformers, in its order: repetition penalty, temperature, top-k,
//! top-p, min-p. A draw is the largest score after Gumbel noise has been added (the Gumbel-max
//! trick). The noise is a hash of seed, step and token id, so the same logits and seed give the
//! same token on any number of ranks and in any batch.
//!
//! All rows of a step share one exchange of fixed size. Rows that need more exchanges share them:
//!
//! | row | words of 8 bytes that each rank sends |
//! |---|---|
//! | greedy, or no filter | 1 |
//! | top-k | k |
//! | min-p alone | 1, then 1 |
//! | top-p without top-k | 128, then 1, then four times as many candidates until they suffice |
//! | with k log-probabilities | k + 2 more, in an exchange after the choice |

use std::borrow::Cow;
use std::sync::Arc;

use comm::{CommError, Communicator, CommunicatorExt};
use ops::Isa;

mod adjust;
mod choice;
mod logprobs;
mod params;

use crate::candidates::any_invalid;
use crate::deterministic::Noise;
use crate::model::Logits;
use adjust::{Counts, adjust};
use choice::{Choice, Stage};
use logprobs::Logprobs;
pub use params::SamplingParams;

/// Why no token can be chosen for a row, or why its parameters are refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
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
    /// A parameter names a token that is not in the vocabulary.
    #[error("sampling parameter {name} has id {id}, expected ids below {vocab_size}")]
    TokenId {
        /// The parameter.
        name: &'static str,
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// A token has two biases.
    #[error("sampling parameter logit_bias has id {id} twice, expected each id at most once")]
    DuplicateBias {
        /// The token.
        id: u32,
    },
    /// A forbidden sequence of no tokens.
    #[error("entry {index} of sampling parameter bad_words is empty, expected at least one token")]
    EmptyBadWord {
        /// Its index in the list.
        index: usize,
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
    /// Every token is excluded.
    #[error("no token is possible at step {step}: every logit is -inf")]
    NoCandidate {
        /// The step.
        step: u64,
    },
}

/// One row of logits and the sequence that its token continues. Equal on all ranks, except for
/// `mask`.
#[derive(Clone, Copy, Debug)]
pub struct SampleRow<'a> {
    /// The row of the logits.
    pub row: usize,
    /// How the token is chosen.
    pub params: &'a SamplingParams,
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// Tokens of the answer so far.
    pub generated: &'a [u32],
    /// Numbers the draws of a seed: equal seeds, steps and logits give equal tokens.
    pub step: u64,
    /// The allowed tokens of this rank's slice of the vocabulary: bit `i % 32` of word `i / 32`
    /// stands for the i-th token of the slice. Missing words count as zero.
    pub mask: Option<&'a [u32]>,
    /// The token to take; then only log-probabilities are computed.
    pub forced: Option<u32>,
}

impl<'a> SampleRow<'a> {
    /// A row whose token may be any and does not depend on earlier tokens, as a benchmark draws it.
    pub fn new(row: usize, params: &'a SamplingParams, step: u64) -> Self {
        Self { row, params, prompt: &[], generated: &[], step, mask: None, forced: None }
    }
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// Its id, equal on all ranks.
    pub id: u32,
    /// Its log-probability under the model's logits, before any change, if `params.logprobs` is
    /// set.
    pub logprob: Option<f32>,
    /// The most probable tokens with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// Chooses tokens; each rank has one.
pub struct Sampler {
    vocab_size: usize,
    comm: Arc<dyn Communicator>,
    isa: Isa,
    counts: Counts,
    /// Memory for changed rows of logits.
    buffers: Vec<Vec<f32>>,
    send: Vec<u64>,
    recv: Vec<u64>,
}

impl Sampler {
    /// A sampler for the ranks of `comm`, which share a vocabulary of `vocab_size` tokens.
    pub fn new(vocab_size: usize, comm: Arc<dyn Communicator>, isa: Isa) -> Self {
        let (counts, buffers, send, recv) = Default::default();
        Self { vocab_size, comm, isa, counts, buffers, send, recv }
    }

    /// Chooses one token for each of `rows` from `logits` `[rows, vocab.len()]`, this rank's slice
    /// of the vocabulary. The slices of the ranks do not overlap and may be empty. All ranks call
    /// it with equal `rows` (see [`SampleRow`]) and get equal results. The parameters must be
    /// valid ([`SamplingParams::validate`]).
    ///
    /// # Errors
    ///
    /// When a rank is lost. A row for which no token can be chosen has its own error and does not
    /// affect the others.
    ///
    /// # Panics
    ///
    /// If a row is not in `logits`, or the logits have another width than their slice.
    pub fn sample_rows(
        &mut self,
        logits: &Logits,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<Result<SampledToken, SamplingError>>, CommError> {
        let (vocab, values) = (&logits.vocab, &logits.values);
        assert_eq!(values.ncols(), vocab.len(), "logits against the slice {vocab:?}");
        let row_of = |row: &SampleRow<'_>| {
            let values = values.row(row.row).to_slice();
            values.expect("a row of row-major logits is contiguous")
        };
        let mut choices: Vec<_> =
            rows.iter().map(|row| self.begin(row, logits, row_of(row))).collect();
        while choices.iter().any(|choice| choice.words() > 0) {
            let words: Vec<usize> = choices.iter().map(Choice::words).collect();
            self.send.clear();
            choices.iter().for_each(|choice| choice.offer(&mut self.send));
            self.gather()?;
            let participants = choices.iter_mut().filter(|choice| choice.words() > 0);
            let blocks = self.blocks(words.into_iter().filter(|words| *words > 0));
            participants.zip(blocks).for_each(|(choice, words)| choice.take(words));
        }
        let mut results = Vec::with_capacity(rows.len());
        let mut scored = Vec::new();
        for (index, (choice, row)) in choices.into_iter().zip(rows).enumerate() {
            if let Cow::Owned(buffer) = choice.scores {
                self.buffers.push(buffer);
            }
            results.push(match choice.stage {
                Stage::Failed(error) => Err(error),
                Stage::Chosen(id) => {
                    if let Some(count) = row.params.logprobs {
                        let (isa, vocab, logits) = (self.isa, vocab.clone(), row_of(row));
                        let query = Logprobs { isa, vocab, logits, chosen: id, count };
                        scored.push((index, choice.invalid, query));
                    }
                    Ok(SampledToken { id, logprob: None, top: Vec::new() })
                }
                _ => unreachable!("a choice without further words is finished"),
            });
        }
        self.add_logprobs(rows, &scored, &mut results)?;
        Ok(results)
    }

    /// Prepares the choice of one row.
    fn begin<'a>(&mut self, row: &SampleRow<'a>, logits: &Logits, values: &'a [f32]) -> Choice<'a> {
        let mut invalid = any_invalid(values);
        let (scores, stage) = match row.forced {
            Some(id) => (Cow::Borrowed(values), Stage::Chosen(id)),
            None => {
                let mut buffer = self.buffers.pop().unwrap_or_default();
                let first = Stage::first(row.params, self.vocab_size);
                if adjust(row, &logits.vocab, values, &mut self.counts, &mut buffer) {
                    invalid |= any_invalid(&buffer);
                    (Cow::Owned(buffer), first)
                } else {
                    self.buffers.push(buffer);
                    (Cow::Borrowed(values), first)
                }
            }
        };
        Choice {
            params: row.params,
            isa: self.isa,
            vocab: logits.vocab.clone(),
            scores,
            invalid,
            step: row.step,
            noise: Noise::new(row.params.seed, row.step),
            stage,
        }
    }

    /// Fills in the log-probabilities of the rows that ask for them: one exchange, if any do.
    fn add_logprobs(
        &mut self,
        rows: &[SampleRow<'_>],
        scored: &[(usize, bool, Logprobs<'_>)],
        results: &mut [Result<SampledToken, SamplingError>],
    ) -> Result<(), CommError> {
        if scored.is_empty() {
            return Ok(());
        }
        self.send.clear();
        scored.iter().for_each(|(_, invalid, query)| query.offer(*invalid, &mut self.send));
        self.gather()?;
        let blocks = self.blocks(scored.iter().map(|(_, _, query)| query.words()));
        for ((index, _, query), words) in scored.iter().zip(blocks) {
            results[*index] = match query.take(words) {
                Ok((logprob, top)) => {
                    Ok(SampledToken { id: query.chosen, logprob: Some(logprob), top })
                }
                Err(rank) => Err(SamplingError::NotFinite { rank, step: rows[*index].step }),
            };
        }
        Ok(())
    }

    /// Gathers the words of all ranks.
    fn gather(&mut self) -> Result<(), CommError> {
        self.recv.clear();
        self.recv.resize(self.send.len() * self.comm.size(), 0);
        self.comm.all_gather(&self.send, &mut self.recv)
    }

    /// The gathered words of each participant, rank by rank, for participants that sent so many
    /// words each.
    fn blocks(
        &self,
        words: impl Iterator<Item = usize>,
    ) -> impl Iterator<Item = impl Iterator<Item = &[u64]> + Clone> {
        let mut start = 0;
        words.map(move |count| {
            let place = start..start + count;
            start = place.end;
            self.recv.chunks_exact(self.send.len()).map(move |rank| &rank[place.clone()])
        })
    }
}
