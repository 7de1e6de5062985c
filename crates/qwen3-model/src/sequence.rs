//! One sequence with an arena to itself, for programs that run one at a time.

use ops::{LogitRows, PAGE_POSITIONS, PageId};

use crate::arena::Arena;
use crate::batch::{Batch, Span, Wanted, local_positions, pages_in_order};
use crate::error::ModelError;
use crate::model::{Logits, Model};
use crate::workspace::Workspace;

/// The slots of the recurrent states of the sequence, and of their copy.
const OWN: usize = 0;
const KEPT: usize = 1;

/// A sequence, its pages and a workspace.
pub struct Sequence {
    arena: Arena,
    workspace: Workspace,
    pages: Vec<PageId>,
    len: usize,
    capacity: usize,
    /// Tokens of the states that [`keep`](Self::keep) copied.
    kept: usize,
    /// This rank among those that split positions, and their number.
    place: (usize, usize),
}

impl Sequence {
    /// An empty sequence of at most `capacity` tokens (and never more than the context). All ranks
    /// call it.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn new(model: &Model, capacity: usize) -> Result<Self, ModelError> {
        let capacity = capacity.min(model.config().context_length());
        let positions = &model.context().positions;
        let (rank, ranks) = (positions.rank(), positions.size());
        let pages = capacity.div_ceil(PAGE_POSITIONS).div_ceil(ranks);
        Ok(Self {
            arena: model.new_arena(pages, 2)?,
            workspace: model.new_workspace(),
            pages: pages_in_order(capacity, ranks),
            len: 0,
            capacity,
            kept: 0,
            place: (rank, ranks),
        })
    }

    /// Tokens of the sequence so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the sequence is still empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The most tokens that the sequence may have.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets all but the first `tokens` of the sequence. The recurrent states of a hybrid model
    /// only go back to where they were [kept](Self::keep) last; with another number of tokens, none
    /// excepted, the next pass fails.
    pub fn truncate(&mut self, tokens: usize) {
        if tokens < self.len && tokens == self.kept && self.arena.states.slots() > 0 {
            self.arena.states.copy(KEPT, OWN);
        }
        self.len = self.len.min(tokens);
    }

    /// Makes it possible to [truncate](Self::truncate) the sequence to its present length later.
    pub fn keep(&mut self) {
        if self.arena.states.slots() > 0 {
            self.arena.states.copy(OWN, KEPT);
        }
        self.kept = self.len;
    }

    /// Bytes of keys, values and recurrent states on this rank.
    pub fn bytes(&self) -> usize {
        let (rank, ranks) = self.place;
        self.arena.pages.bytes(local_positions(self.len, rank, ranks))
            + self.arena.states.slot_bytes()
    }

    /// Runs tokens of a prompt, which follow those so far, through the model. All ranks call it
    /// with the same tokens; each gets the logits of `rows` of its part of the vocabulary.
    ///
    /// # Errors
    /// When a token is outside the vocabulary, the sequence has no room, the embedding cannot be
    /// read, or a rank is lost; after the last two the sequence is of no further use.
    pub fn forward(
        &mut self,
        model: &Model,
        tokens: &[u32],
        rows: LogitRows,
    ) -> Result<Logits, ModelError> {
        self.run(model, tokens, rows, false)
    }

    /// Runs a generated token through the model; gives its logits.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn decode(&mut self, model: &Model, token: u32) -> Result<Logits, ModelError> {
        self.run(model, &[token], LogitRows::Last, true)
    }

    fn run(
        &mut self,
        model: &Model,
        tokens: &[u32],
        rows: LogitRows,
        generated: bool,
    ) -> Result<Logits, ModelError> {
        ModelError::check_tokens(tokens, model.config().vocab_size)?;
        if self.len + tokens.len() > self.capacity {
            return Err(ModelError::ContextFull {
                tokens: tokens.len(),
                cached: self.len,
                capacity: self.capacity,
            });
        }
        let first = match rows {
            LogitRows::None => tokens.len(),
            LogitRows::Last => tokens.len().saturating_sub(1),
            LogitRows::All => 0,
        };
        let span = Span {
            sequence: 0,
            start: self.len,
            tokens: 0..tokens.len(),
            pages: self.pages.clone(),
            slot: OWN,
            first_rank: 0,
            generated,
            wanted: (first..tokens.len()).map(|index| (index, Wanted::Logits)).collect(),
        };
        let spans = if tokens.is_empty() { Vec::new() } else { vec![span] };
        let batch = Batch { tokens: tokens.to_vec(), spans };
        let output = model.forward(&mut self.arena, &batch, &mut self.workspace)?;
        self.len += tokens.len();
        Ok(output.logits)
    }
}
