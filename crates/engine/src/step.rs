//! One step as every rank carries it out: copy pages, run the forward pass, sample.

use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use qwen3_model::comm::{CommError, Communicator, CommunicatorExt as _, Phase};
use qwen3_model::sampling::{SampleRow, SampledToken, SamplingError};
use qwen3_model::tensor::split_range;
use qwen3_model::{Arena, Logits, Model, ModelError, PageId, Sampler, SamplingParams, Workspace};

use crate::record::Record;
use crate::request::TokenLogprobs;
use crate::scheduler::SequenceId;
use crate::sequences::{Pass, RowUse, Sequences};

/// What a constraint says about the next token of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Any,
    Mask(Vec<u32>),
    Forced(u32),
    /// No token is sampled.
    Stop,
}

/// Decides about the next tokens of constrained sequences; on rank 0 only. It runs beside the
/// forward pass.
pub(crate) type Decide<'a> = Box<dyn FnOnce(&[SequenceId]) -> Vec<Decision> + Send + 'a>;

// Words that stand for decisions; all others are forced tokens.
const ANY: u32 = u32::MAX;
const STOP: u32 = u32::MAX - 1;
const MASK: u32 = u32::MAX - 2;

/// What a step has produced; equal on all ranks.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Sampled tokens.
    pub samples: Vec<(SequenceId, Result<SampledToken, SamplingError>)>,
    /// Sequences whose constraint allows no token.
    pub stopped: Vec<SequenceId>,
    /// Log-probabilities of prompt tokens, in order.
    pub scores: Vec<(SequenceId, Result<TokenLogprobs, SamplingError>)>,
    /// Hidden states.
    pub hidden: Vec<(SequenceId, Vec<f32>)>,
    /// Time of the forward pass.
    pub forward: Duration,
    /// Time of sampling, with the wait for constraints.
    pub sampling: Duration,
}

/// This rank's model, pages and sequences.
pub(crate) struct Executor {
    pub model: Model,
    arena: Arena,
    workspace: Workspace,
    sampler: Sampler,
    sequences: Sequences,
}

impl Executor {
    /// An executor without sequences.
    pub fn new(model: Model, arena: Arena) -> Self {
        let vocab_size = model.config().vocab_size;
        let sampler = Sampler::new(vocab_size, model.comm().clone(), model.options().isa);
        let workspace = model.new_workspace();
        Self { model, arena, workspace, sampler, sequences: Sequences::default() }
    }

    /// Carries out a step. All ranks call it with the same record; rank 0 also decides about
    /// constrained sequences.
    pub fn execute(
        &mut self,
        record: &Record,
        decide: Option<Decide<'_>>,
    ) -> Result<Outcome, ModelError> {
        self.sequences.apply(record);
        let position = self.model.context().positions.rank();
        for &(arena, from, to) in &record.copies {
            if arena as usize == position {
                self.arena.pages.copy_page(PageId(from), PageId(to));
            }
        }
        for &(from, to) in &record.state_copies {
            self.arena.states.copy(from as usize, to as usize);
        }
        if record.spans.is_empty() {
            return Ok(Outcome::default());
        }
        let pass = self.sequences.pass(record);
        self.sequences.start_siblings(record);
        let constrained: Vec<SequenceId> = pass
            .rows
            .iter()
            .filter_map(|(_, row)| match row {
                RowUse::Sample { id } if self.sequences.get(*id).constrained => Some(*id),
                _ => None,
            })
            .collect();
        let comm = self.model.comm().clone();
        let decodes = pass.batch.tokens.len() == pass.batch.spans.len();
        comm.ledger().set_phase(if decodes { Phase::Decode } else { Phase::Prefill });
        let start = Instant::now();
        let decides = decide.is_some() && !constrained.is_empty();
        let decide = Mutex::new(decide.filter(|_| decides));
        let answer = || {
            let decide = decide.lock().unwrap_or_else(PoisonError::into_inner).take();
            decide.map_or_else(Vec::new, |decide| decide(&constrained))
        };
        let (output, decisions) = thread::scope(|scope| {
            let builder = || thread::Builder::new().name("constraints".to_owned());
            let deciding = decides.then(|| builder().spawn_scoped(scope, answer));
            let output = self.model.forward(&mut self.arena, &pass.batch, &mut self.workspace);
            // Where the system refuses a thread, the constraints are asked after the pass.
            let decisions = match deciding {
                Some(Ok(thread)) => thread.join(),
                _ => Ok(answer()),
            };
            (output, decisions)
        });
        let output = output?;
        let forward = start.elapsed();
        let decisions = decisions.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let guides = share(&*comm, self.model.config().vocab_size, constrained.len(), decisions)?;
        self.sequences.computed(record);
        let mut outcome = self.sample(&pass, &output.logits, &constrained, &guides)?;
        comm.ledger().set_phase(Phase::Other);
        outcome.hidden = pass
            .hidden
            .into_iter()
            .zip(output.hidden.outer_iter())
            .map(|(id, row)| (id, row.to_vec()))
            .collect();
        (outcome.forward, outcome.sampling) = (forward, start.elapsed() - forward);
        Ok(outcome)
    }

    /// Samples and scores all rows of a pass in the same exchanges.
    fn sample(
        &mut self,
        pass: &Pass,
        logits: &Logits,
        constrained: &[SequenceId],
        guides: &[Guide],
    ) -> Result<Outcome, CommError> {
        let mut outcome = Outcome::default();
        let guide_of = |id: SequenceId| {
            constrained.iter().position(|other| *other == id).map(|index| &guides[index])
        };
        let scoring: Vec<_> = pass
            .rows
            .iter()
            .map(|(_, row)| match row {
                RowUse::Score { id, .. } => SamplingParams {
                    logprobs: self.sequences.get(*id).prompt_logprobs,
                    ..SamplingParams::default()
                },
                RowUse::Sample { .. } => SamplingParams::default(),
            })
            .collect();
        let (mut rows, mut uses) = (Vec::new(), Vec::new());
        for ((row, of), scoring) in pass.rows.iter().zip(&scoring) {
            let row = match of {
                RowUse::Score { id, target } => SampleRow {
                    row: *row,
                    params: scoring,
                    prompt: &[],
                    generated: &[],
                    step: *id,
                    mask: None,
                    forced: Some(*target),
                },
                RowUse::Sample { id } => {
                    let sequence = self.sequences.get(*id);
                    let guide = guide_of(*id);
                    if guide.is_some_and(|guide| matches!(guide, Guide::Stop)) {
                        outcome.stopped.push(*id);
                        continue;
                    }
                    SampleRow {
                        row: *row,
                        params: &sequence.params,
                        prompt: &sequence.prompt,
                        generated: &sequence.generated,
                        step: sequence.len() as u64,
                        mask: guide.and_then(Guide::mask),
                        forced: guide.and_then(Guide::forced),
                    }
                }
            };
            rows.push(row);
            uses.push(*of);
        }
        let results = self.sampler.sample_rows(logits, &rows)?;
        for (of, result) in uses.into_iter().zip(results) {
            match of {
                RowUse::Score { id, .. } => {
                    let score = result.map(|token| TokenLogprobs {
                        id: token.id,
                        logprob: token.logprob.expect("scored rows ask for log-probabilities"),
                        top: token.top,
                    });
                    outcome.scores.push((id, score));
                }
                RowUse::Sample { id } => {
                    if let Ok(token) = &result {
                        self.sequences.push(id, token.id);
                    }
                    outcome.samples.push((id, result));
                }
            }
        }
        Ok(outcome)
    }
}

/// A decision as it concerns one rank: masks have only the bits of its slice of the vocabulary.
enum Guide {
    Any,
    Mask(Vec<u32>),
    Forced(u32),
    Stop,
}

impl Guide {
    fn mask(&self) -> Option<&[u32]> {
        if let Self::Mask(words) = self { Some(words) } else { None }
    }

    fn forced(&self) -> Option<u32> {
        if let Self::Forced(id) = self { Some(*id) } else { None }
    }
}

/// Gives every rank the decisions of rank 0 about `count` sequences: one broadcast of four bytes
/// per sequence, and if there are masks, one message per rank with its slices.
fn share(
    comm: &dyn Communicator,
    vocab_size: usize,
    count: usize,
    decisions: Vec<Decision>,
) -> Result<Vec<Guide>, CommError> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let mut words: Vec<u32> = decisions
        .iter()
        .map(|decision| match decision {
            Decision::Any => ANY,
            Decision::Mask(_) => MASK,
            Decision::Forced(id) => *id,
            Decision::Stop => STOP,
        })
        .collect();
    words.resize(count, 0);
    comm.broadcast(0, &mut words)?;
    let masks = words.iter().filter(|word| **word == MASK).count();
    let slice = split_range(vocab_size, comm.size(), comm.rank());
    let mut own = vec![0; masks * slice.len().div_ceil(32)];
    if comm.rank() == 0 {
        let masks: Vec<_> = decisions
            .iter()
            .filter_map(|decision| match decision {
                Decision::Mask(mask) => Some(mask),
                _ => None,
            })
            .collect();
        let cut = |rank| {
            let range = split_range(vocab_size, comm.size(), rank);
            masks.iter().flat_map(|mask| bits(mask, range.clone())).collect::<Vec<u32>>()
        };
        for rank in (1..comm.size()).filter(|_| !masks.is_empty()) {
            comm.send(rank, &cut(rank))?;
        }
        own = cut(0);
    } else if masks > 0 {
        comm.recv(0, &mut own)?;
    }
    let mut masks = own.chunks_exact(slice.len().div_ceil(32).max(1));
    let guide = |word| match word {
        ANY => Guide::Any,
        STOP => Guide::Stop,
        MASK => Guide::Mask(masks.next().unwrap_or_default().to_vec()),
        id => Guide::Forced(id),
    };
    Ok(words.into_iter().map(guide).collect())
}

/// The bits `range` of a mask, from bit 0 on. Missing words count as zero.
fn bits(mask: &[u32], range: std::ops::Range<usize>) -> Vec<u32> {
    let (word, shift) = (range.start / 32, range.start % 32);
    let at = |index: usize| mask.get(index).copied().unwrap_or(0);
    let joined = |index| u64::from(at(index)) | u64::from(at(index + 1)) << 32;
    (0..range.len().div_ceil(32)).map(|index| (joined(word + index) >> shift) as u32).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use qwen3_model::comm::ThreadComm;

    use super::*;

    #[test]
    fn each_rank_receives_its_slice_of_each_mask() {
        let allowed = |mask: usize, id: usize| (id * 7 + mask * 3) % 5 < 2;
        let masks: Vec<Vec<u32>> = (0..2)
            .map(|mask| {
                let bit = |id: &usize| u32::from(allowed(mask, *id)) << (id % 32);
                (0..203)
                    .collect::<Vec<_>>()
                    .chunks(32)
                    .map(|ids| ids.iter().map(bit).sum())
                    .collect()
            })
            .collect();
        let decisions = vec![
            Decision::Mask(masks[0].clone()),
            Decision::Any,
            Decision::Forced(17),
            Decision::Mask(masks[1].clone()),
            Decision::Stop,
        ];
        for ranks in [1, 2, 3, 5] {
            std::thread::scope(|scope| {
                for comm in ThreadComm::group(ranks) {
                    let decisions = &decisions;
                    scope.spawn(move || {
                        let comm: Arc<dyn Communicator> = Arc::new(comm);
                        let own = if comm.rank() == 0 { decisions.clone() } else { Vec::new() };
                        let guides = share(&*comm, 203, 5, own).expect("no rank is lost");
                        let slice = split_range(203, ranks, comm.rank());
                        for (index, mask) in [(0, 0), (3, 1)] {
                            let words = guides[index].mask().expect("a mask");
                            for (local, id) in slice.clone().enumerate() {
                                let bit = words[local / 32] >> (local % 32) & 1;
                                assert_eq!(bit == 1, allowed(mask, id), "{id} on {ranks} ranks");
                            }
                        }
                        assert!(matches!(guides[1], Guide::Any) && guides[1].mask().is_none());
                        assert_eq!(guides[2].forced(), Some(17));
                        assert!(matches!(guides[4], Guide::Stop));
                    });
                }
            });
        }
    }
}
