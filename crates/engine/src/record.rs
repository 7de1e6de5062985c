//! The step record: what rank 0 tells the other ranks before each step.
//!
//! A record names only what changes: tokens that were sampled are known to every rank already, so
//! a sequence that decodes takes a few bytes. The first [`HEAD`] bytes travel in a broadcast of
//! fixed size; longer records need a second broadcast.

use qwen3_model::SamplingParams;
use qwen3_model::comm::{CommError, Communicator, CommunicatorExt as _};
use serde::{Deserialize, Serialize};

use crate::pages::Page;
use crate::scheduler::{Plan, SequenceId};

/// Bytes of the first broadcast: the record's length and its beginning.
pub(crate) const HEAD: usize = 1024;

/// What every rank has to know of a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct NewRequest {
    /// The first sequence; the others have the following ids.
    pub id: SequenceId,
    /// Number of sequences.
    pub n: u32,
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
    /// Number of most probable tokens at the place of each prompt token, if these are scored.
    pub prompt_logprobs: Option<usize>,
    /// What is computed from the last token of the prompt.
    pub after_prompt: AfterPrompt,
    /// Rank 0 restricts the tokens of these sequences.
    pub constrained: bool,
}

/// What is computed from the last token of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum AfterPrompt {
    Tokens,
    HiddenState,
    Nothing,
}

/// One step, in the order in which it is carried out.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The engine ends; all else is empty.
    pub end: bool,
    /// Rank 0 has no work and shows that it can still be reached; all else is empty.
    pub heartbeat: bool,
    /// The ranks exchange where their time went.
    pub report: bool,
    pub arrived: Vec<NewRequest>,
    /// Sequences that have ended.
    pub removed: Vec<SequenceId>,
    pub preempted: Vec<SequenceId>,
    /// Arena, source and target.
    pub copies: Vec<(u32, u32, u32)>,
    /// Recurrent states to copy, from slot to slot, one after another.
    pub state_copies: Vec<(u32, u32)>,
    pub placed: Vec<Placed>,
    /// Sequences with their further pages.
    pub grown: Vec<(SequenceId, u32)>,
    /// Sequences with the number of tokens to compute.
    pub spans: Vec<(SequenceId, u32)>,
}

/// A sequence that gets pages.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Placed {
    pub id: SequenceId,
    pub slot: u32,
    pub first: u32,
    pub computed: u32,
    pub pages: Vec<u32>,
}

/// A record that cannot be decoded: the ranks run different programs, or the transport is broken.
#[derive(Debug, thiserror::Error)]
#[error("the step record of {bytes} bytes from rank 0 cannot be decoded: {source}")]
pub struct RecordError {
    bytes: usize,
    source: postcard::Error,
}

impl Record {
    /// The record of a plan.
    pub fn of_plan(plan: &Plan) -> Self {
        let ids = |pages: &[Page]| pages.iter().map(|page| page.id.0).collect();
        Self {
            preempted: plan.preempted.clone(),
            copies: plan
                .copies
                .iter()
                .map(|(from, to)| (from.arena as u32, from.id.0, to.id.0))
                .collect(),
            state_copies: plan.state_copies.clone(),
            placed: plan
                .placed
                .iter()
                .map(|placement| Placed {
                    id: placement.id,
                    slot: placement.slot,
                    first: placement.first as u32,
                    computed: placement.computed as u32,
                    pages: ids(&placement.pages),
                })
                .collect(),
            grown: plan.grown.iter().map(|(id, page)| (*id, page.id.0)).collect(),
            spans: plan.spans.iter().map(|span| (span.id, span.count as u32)).collect(),
            ..Self::default()
        }
    }

    /// Sends the record to all ranks, from rank 0.
    pub fn send(&self, comm: &dyn Communicator) -> Result<(), CommError> {
        let mut bytes = vec![0; size_of::<u32>()];
        bytes = postcard::to_extend(self, bytes).expect("a record can always be encoded");
        let length = (bytes.len() - size_of::<u32>()) as u32;
        bytes[..size_of::<u32>()].copy_from_slice(&length.to_le_bytes());
        bytes.resize(bytes.len().max(HEAD), 0);
        let (head, rest) = bytes.split_at_mut(HEAD);
        comm.broadcast(0, head)?;
        if rest.is_empty() { Ok(()) } else { comm.broadcast(0, rest) }
    }

    /// Waits for the next record of rank 0. It fails if there is none within the timeout of
    /// collectives: an idle rank 0 sends heartbeats, so either rank 0 or the link to it is lost.
    pub fn receive(comm: &dyn Communicator) -> Result<Result<Self, RecordError>, CommError> {
        let mut bytes = vec![0; HEAD];
        comm.broadcast(0, &mut bytes[..])?;
        let (length, _) = bytes.split_first_chunk().expect("a head is longer than a number");
        let end = size_of::<u32>() + u32::from_le_bytes(*length) as usize;
        if end > HEAD {
            bytes.resize(end, 0);
            comm.broadcast(0, &mut bytes[HEAD..])?;
        }
        let record = postcard::from_bytes(&bytes[size_of::<u32>()..end]);
        Ok(record.map_err(|source| RecordError { bytes: end, source }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use qwen3_model::comm::ThreadComm;

    use super::*;

    fn decoding(sequences: u64) -> Record {
        let first = 1 << 20;
        Record {
            spans: (first..first + sequences).map(|id| (id, 1)).collect(),
            grown: (first..first + sequences).step_by(8).map(|id| (id, 3000)).collect(),
            ..Record::default()
        }
    }

    #[test]
    fn thirty_two_sequences_decode_from_one_broadcast() {
        let bytes = postcard::to_allocvec(&decoding(32)).expect("a record can be encoded");
        assert!(bytes.len() + 4 < HEAD, "{} bytes", bytes.len());
    }

    #[test]
    fn a_rank_that_hears_nothing_of_rank_0_gives_up() {
        let [_silent, waiting] = &ThreadComm::group(2)[..] else { panic!("two ranks") };
        waiting.set_timeout(std::time::Duration::from_millis(50));
        assert!(Record::receive(waiting).is_err());
    }

    #[test]
    fn records_of_any_length_arrive() {
        let long = Record {
            arrived: vec![NewRequest {
                id: 9,
                n: 2,
                prompt: (0..5000).collect(),
                params: SamplingParams::default(),
                prompt_logprobs: Some(3),
                after_prompt: AfterPrompt::Tokens,
                constrained: true,
            }],
            ..decoding(3)
        };
        let records = [decoding(32), long, Record { end: true, ..Record::default() }];
        let text = |record: &Record| format!("{record:?}");
        std::thread::scope(|scope| {
            for comm in ThreadComm::group(3) {
                let records = &records;
                scope.spawn(move || {
                    let comm: Arc<dyn Communicator> = Arc::new(comm);
                    for record in records {
                        if comm.rank() == 0 {
                            record.send(&*comm).expect("no rank is lost");
                        } else {
                            let found = Record::receive(&*comm).expect("no rank is lost");
                            assert_eq!(text(&found.expect("a record")), text(record));
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn a_broken_record_is_an_error() {
        let mut group = ThreadComm::group(2);
        let (second, first) = (group.remove(1), group.remove(0));
        let sent = std::thread::spawn(move || {
            let mut bytes = [0xff; HEAD];
            bytes[..4].copy_from_slice(&20u32.to_le_bytes());
            first.broadcast(0, &mut bytes).expect("no rank is lost");
        });
        let error = Record::receive(&second).expect("no rank is lost").expect_err("no record");
        assert!(error.to_string().starts_with("the step record of 24 bytes from rank 0"));
        sent.join().expect("rank 0 sends");
    }
}
