//! What each rank knows of the sequences: their tokens, pages and sampling parameters.
//!
//! All ranks apply the same records and take the same sampled tokens, so their copies are equal.

use std::collections::HashMap;

use qwen3_model::{Batch, PageId, SamplingParams, Span, Wanted};

use crate::record::{AfterPrompt, NewRequest, Record};
use crate::scheduler::SequenceId;

/// One sequence on this rank.
pub(crate) struct Sequence {
    pub prompt: std::sync::Arc<[u32]>,
    pub generated: Vec<u32>,
    pub params: SamplingParams,
    pub prompt_logprobs: Option<usize>,
    pub after_prompt: AfterPrompt,
    pub constrained: bool,
    /// Sequences that start when the prompt is computed.
    siblings: std::ops::Range<SequenceId>,
    /// Prompt tokens whose log-probabilities were computed, the first token included.
    scored: usize,
    /// The slot of the recurrent states.
    slot: usize,
    first: usize,
    computed: usize,
    pages: Vec<PageId>,
}

impl Sequence {
    /// Number of tokens of the prompt and the answer.
    pub fn len(&self) -> usize {
        self.prompt.len() + self.generated.len()
    }

    fn token(&self, position: usize) -> u32 {
        match position.checked_sub(self.prompt.len()) {
            Some(index) => self.generated[index],
            None => self.prompt[position],
        }
    }
}

/// What a row of logits, or a hidden state, is computed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowUse {
    /// The log-probability of a prompt token.
    Score { id: SequenceId, target: u32 },
    /// The next token.
    Sample { id: SequenceId },
}

/// The forward pass of a step, and what its rows are for.
pub(crate) struct Pass {
    pub batch: Batch,
    /// For each row of logits.
    pub rows: Vec<(usize, RowUse)>,
    /// For each hidden state.
    pub hidden: Vec<SequenceId>,
}

/// All sequences that have not ended.
#[derive(Default)]
pub(crate) struct Sequences(HashMap<SequenceId, Sequence>);

impl Sequences {
    /// A sequence that has not ended.
    pub fn get(&self, id: SequenceId) -> &Sequence {
        self.0.get(&id).expect("rank 0 names sequences that have not ended")
    }

    fn get_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.0.get_mut(&id).expect("rank 0 names sequences that have not ended")
    }

    /// Applies what a record says about sequences and pages.
    pub fn apply(&mut self, record: &Record) {
        for id in &record.removed {
            self.0.remove(id);
        }
        for request in &record.arrived {
            self.0.insert(request.id, Sequence::arrived(request));
        }
        for id in &record.preempted {
            if let Some(sequence) = self.0.get_mut(id) {
                (sequence.computed, sequence.pages) = (0, Vec::new());
            }
        }
        for placed in &record.placed {
            let sequence = self.get_mut(placed.id);
            sequence.slot = placed.slot as usize;
            sequence.first = placed.first as usize;
            sequence.computed = placed.computed as usize;
            sequence.pages = placed.pages.iter().map(|id| PageId(*id)).collect();
        }
        for (id, page) in &record.grown {
            self.get_mut(*id).pages.push(PageId(*page));
        }
    }

    /// The forward pass of a record's spans; `samples` of a prompt that is completed come in the
    /// order of their sequences.
    pub fn pass(&self, record: &Record) -> Pass {
        let mut pass = Pass { batch: Batch::default(), rows: Vec::new(), hidden: Vec::new() };
        let mut row = 0;
        for &(id, count) in &record.spans {
            let sequence = self.get(id);
            let (start, end) = (sequence.computed, sequence.computed + count as usize);
            let first = pass.batch.tokens.len();
            pass.batch.tokens.extend((start..end).map(|position| sequence.token(position)));
            let mut wanted = Vec::new();
            if sequence.prompt_logprobs.is_some() {
                let targets =
                    (start + 1).max(sequence.scored)..(end + 1).min(sequence.prompt.len());
                for target in targets {
                    wanted.push((target - 1 - start, Wanted::Logits));
                    let target = sequence.prompt[target];
                    pass.rows.push((row, RowUse::Score { id, target }));
                    row += 1;
                }
            }
            if end == sequence.len() {
                match sequence.after_prompt {
                    AfterPrompt::Tokens => {
                        wanted.push((end - 1 - start, Wanted::Logits));
                        let all = std::iter::once(id).chain(sequence.siblings.clone());
                        pass.rows.extend(all.map(|id| (row, RowUse::Sample { id })));
                        row += 1;
                    }
                    AfterPrompt::HiddenState => {
                        wanted.push((end - 1 - start, Wanted::Hidden));
                        pass.hidden.push(id);
                    }
                    AfterPrompt::Nothing => {}
                }
            }
            pass.batch.spans.push(Span {
                sequence: id,
                start,
                tokens: first..pass.batch.tokens.len(),
                pages: sequence.pages.clone(),
                slot: sequence.slot,
                first_rank: sequence.first,
                generated: start >= sequence.prompt.len(),
                wanted,
            });
        }
        pass
    }

    /// Creates the sequences that share the prompts which `record` completes, before their first
    /// token is sampled.
    pub fn start_siblings(&mut self, record: &Record) {
        for &(id, count) in &record.spans {
            let parent = self.get_mut(id);
            if parent.computed + (count as usize) < parent.len() {
                continue;
            }
            let siblings = std::mem::take(&mut parent.siblings);
            for (index, child) in (1..).zip(siblings) {
                let child_state = self.get(id).sibling(index);
                self.0.insert(child, child_state);
            }
        }
    }

    /// Notes that a record's spans are computed.
    pub fn computed(&mut self, record: &Record) {
        for &(id, count) in &record.spans {
            let sequence = self.get_mut(id);
            sequence.computed += count as usize;
            let scored = (sequence.computed + 1).min(sequence.prompt.len());
            sequence.scored = sequence.scored.max(scored);
        }
    }

    /// Appends a sampled token.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        self.get_mut(id).generated.push(token);
    }
}

impl Sequence {
    fn arrived(request: &NewRequest) -> Self {
        Self {
            prompt: request.prompt.clone().into(),
            generated: Vec::new(),
            params: request.params.clone(),
            prompt_logprobs: request.prompt_logprobs,
            after_prompt: request.after_prompt,
            constrained: request.constrained,
            siblings: request.id + 1..request.id + u64::from(request.n),
            scored: 1,
            slot: 0,
            first: 0,
            computed: 0,
            pages: Vec::new(),
        }
    }

    /// Another sequence after the same prompt, before its first token.
    fn sibling(&self, index: u64) -> Self {
        let mut params = self.params.clone();
        // The golden ratio in 64 bits: seeds of different requests that follow each other do not
        // meet those of siblings.
        params.seed = params.seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Self {
            prompt: self.prompt.clone(),
            generated: Vec::new(),
            params,
            prompt_logprobs: None,
            after_prompt: self.after_prompt,
            constrained: self.constrained,
            siblings: 0..0,
            scored: self.prompt.len(),
            slot: 0,
            first: self.first,
            computed: 0,
            pages: Vec::new(),
        }
    }
}
