//! What one forward pass computes: tokens of any number of sequences, and the rows wanted of them.

use std::collections::HashMap;
use std::ops::Range;

use ops::attention_headwise::TokenSpan;
use ops::pages::PageOwners;
use ops::{PAGE_POSITIONS, PageId, StateArena};
use tensor::Activations;

use crate::model::Logits;

/// What is wanted of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Its logits.
    Logits,
    /// Its hidden state after the last norm.
    Hidden,
}

/// The tokens of one sequence in a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Names the sequence in errors.
    pub sequence: u64,
    /// Position of the first token; keys and values of all earlier ones are in `pages`.
    pub start: usize,
    /// The tokens in [`Batch::tokens`].
    pub tokens: Range<usize>,
    /// Page i holds positions 128 i and following; together they reach to the last token at least.
    /// Where positions are split over ranks, each number counts in the arena of the page's rank.
    pub pages: Vec<PageId>,
    /// The slot of the sequence's recurrent states, which have seen the `start` tokens before the
    /// span. Without a meaning in a model that has attention everywhere.
    pub slot: usize,
    /// The rank of page 0 among those that split positions: page i lies on rank `(first_rank + i)`
    /// modulo their number. 0 where positions are not split.
    pub first_rank: usize,
    /// Whether the model has generated the tokens. It decides how attention to a cache of 16 or 8
    /// bits rounds, so that a token's bits do not depend on the pass that computes it: tokens of a
    /// prompt say `false` in any chunk, generated ones `true`, also when they are computed again.
    pub generated: bool,
    /// The rows wanted: the index in the span, ascending, and what of it.
    pub wanted: Vec<(usize, Wanted)>,
}

/// The tokens of a forward pass, the same on every rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Tokens of all spans.
    pub tokens: Vec<u32>,
    /// The spans; their tokens follow each other in this order and are all there are.
    pub spans: Vec<Span>,
}

/// The wanted rows, each kind in the order of the spans and of their lists.
#[derive(Clone, Debug)]
pub struct Output {
    /// Logits, as far as this rank has them.
    pub logits: Logits,
    /// Hidden states after the last norm, [rows, hidden], the same on every rank.
    pub hidden: Activations,
}

/// Why a batch cannot be computed. Nothing has been computed then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// A span's tokens do not follow those of the spans before it, are none, or do not exist.
    #[error(
        "sequence {sequence}: its tokens are {found:?} of {tokens}, expected at least one from {expected} on"
    )]
    Tokens {
        /// The sequence.
        sequence: u64,
        /// The span's tokens.
        found: Range<usize>,
        /// Where they have to start.
        expected: usize,
        /// Tokens of the batch.
        tokens: usize,
    },
    /// Tokens that belong to no span.
    #[error("the spans end at token {found}, expected {expected}, the number of tokens")]
    Rest {
        /// Where they end.
        found: usize,
        /// Tokens of the batch.
        expected: usize,
    },
    /// A token is not in the vocabulary.
    #[error(
        "sequence {sequence}: token {index} of its span has id {id}, expected an id below the vocabulary size {vocab_size}"
    )]
    TokenOutOfRange {
        /// The sequence.
        sequence: u64,
        /// Its place in the span.
        index: usize,
        /// The id found.
        id: u32,
        /// Tokens of the vocabulary.
        vocab_size: usize,
    },
    /// Logits of a model without a head.
    #[error(
        "sequence {sequence}: the model has no head over the vocabulary, expected a model that \
         generates text (this one gives embeddings or scores)"
    )]
    NoHead {
        /// The sequence.
        sequence: u64,
    },
    /// A sequence longer than the model's context.
    #[error(
        "sequence {sequence}: it reaches position {end}, expected at most {context_length}, the length of the context"
    )]
    Context {
        /// The sequence.
        sequence: u64,
        /// The position after its last token.
        end: usize,
        /// The model's longest.
        context_length: usize,
    },
    /// The pages end before the last token.
    #[error(
        "sequence {sequence}: it has {found} pages, expected at least {expected}, for {end} positions of {PAGE_POSITIONS} a page"
    )]
    Pages {
        /// The sequence.
        sequence: u64,
        /// Its pages.
        found: usize,
        /// Those that it needs.
        expected: usize,
        /// The position after its last token.
        end: usize,
    },
    /// A page that is not in the arena.
    #[error("sequence {sequence}: page {index} has the number {}, expected one below {pages}, the pages of the arena", page.0)]
    NoSuchPage {
        /// The sequence.
        sequence: u64,
        /// The page's place in the sequence.
        index: usize,
        /// Its number.
        page: PageId,
        /// Pages of the arena.
        pages: usize,
    },
    /// The rank of the first page is none of those that split positions.
    #[error(
        "sequence {sequence}: its first page is on rank {found}, expected one below {ranks}, the ranks that split positions"
    )]
    FirstRank {
        /// The sequence.
        sequence: u64,
        /// The rank.
        found: usize,
        /// Ranks that split positions.
        ranks: usize,
    },
    /// A page that one sequence writes belongs to another one too, or twice to the same.
    #[error("sequence {sequence}: page {} is written in this pass and is also a page of sequence {other}", page.0)]
    SharedPage {
        /// The sequence that writes it.
        sequence: u64,
        /// The page's number.
        page: PageId,
        /// The other sequence.
        other: u64,
    },
    /// A slot of recurrent states that is not in the arena.
    #[error("sequence {sequence}: found slot {found} for its states, expected one below {slots}")]
    NoSuchSlot {
        /// The sequence.
        sequence: u64,
        /// The slot.
        found: usize,
        /// Slots of the arena.
        slots: usize,
    },
    /// Two spans have their recurrent states in the same slot.
    #[error("sequence {sequence}: slot {slot} for its states is also that of sequence {other}")]
    SharedSlot {
        /// The sequence.
        sequence: u64,
        /// The slot.
        slot: usize,
        /// The other sequence.
        other: u64,
    },
    /// The recurrent states are not those before the first token of the span.
    #[error(
        "sequence {sequence}: the states in slot {slot} have seen {} tokens, expected the {expected} before its span",
        found.map_or("an unknown number of".to_owned(), |found| found.to_string())
    )]
    States {
        /// The sequence.
        sequence: u64,
        /// The slot.
        slot: usize,
        /// Tokens that the states have seen; `None` after a pass that failed.
        found: Option<usize>,
        /// Tokens before the span.
        expected: usize,
    },
    /// A wanted row that the span does not have, or that is out of order.
    #[error(
        "sequence {sequence}: row {index} is wanted, expected ascending rows below {tokens}, the tokens of its span"
    )]
    Wanted {
        /// The sequence.
        sequence: u64,
        /// The row.
        index: usize,
        /// Tokens of the span.
        tokens: usize,
    },
    /// An arena that another model made.
    #[error("the arena has {found} bytes a page, expected {expected}")]
    Arena {
        /// Bytes of its pages.
        found: usize,
        /// Bytes of the model's pages.
        expected: usize,
    },
}

/// Tokens of one sequence that go through the layers together.
#[derive(Clone, Copy)]
pub(crate) struct StateSpan {
    /// The slot of the sequence's recurrent states.
    pub slot: usize,
    /// Position of the first token.
    pub start: usize,
    /// Number of tokens.
    pub tokens: usize,
}

/// What a batch has to fit.
pub(crate) struct Bounds {
    pub vocab_size: usize,
    /// Whether the model computes logits.
    pub has_head: bool,
    pub context_length: usize,
    /// Pages of an arena.
    pub pages: usize,
    /// Ranks that split positions.
    pub ranks: usize,
}

impl Batch {
    /// Checks everything that the pass relies on; the same on every rank.
    pub(crate) fn check(&self, bounds: &Bounds) -> Result<(), BatchError> {
        let mut next = 0;
        for span in &self.spans {
            span.check(next, &self.tokens, bounds)?;
            next = span.tokens.end;
        }
        if next != self.tokens.len() {
            return Err(BatchError::Rest { found: next, expected: self.tokens.len() });
        }
        self.check_writes(bounds.ranks)
    }

    /// Each page that is written belongs to one span, once.
    fn check_writes(&self, ranks: usize) -> Result<(), BatchError> {
        let owner = |span: &Span, index: usize| (span.first_rank + index) % ranks;
        let mut written = HashMap::new();
        for span in &self.spans {
            for index in span.start / PAGE_POSITIONS..span.end().div_ceil(PAGE_POSITIONS) {
                let page = span.pages[index];
                let writer = (span.sequence, std::ptr::from_ref(span), index);
                if let Some((other, ..)) = written.insert((owner(span, index), page), writer) {
                    return Err(BatchError::SharedPage { sequence: span.sequence, page, other });
                }
            }
        }
        for span in &self.spans {
            for (index, &page) in span.pages.iter().enumerate() {
                if let Some(&(sequence, writer, place)) = written.get(&(owner(span, index), page))
                    && (writer, place) != (std::ptr::from_ref(span), index)
                {
                    return Err(BatchError::SharedPage { sequence, page, other: span.sequence });
                }
            }
        }
        Ok(())
    }

    /// The rows wanted, as tokens of the batch.
    pub(crate) fn wanted(&self) -> impl Iterator<Item = (usize, Wanted)> {
        self.spans.iter().flat_map(|span| {
            span.wanted.iter().map(|(index, wanted)| (span.tokens.start + index, *wanted))
        })
    }

    /// The tokens `range` of the batch, as attention sees them: spans, the first and the last
    /// perhaps cut.
    pub(crate) fn token_spans(&self, range: Range<usize>) -> Vec<TokenSpan> {
        let part = |span: &Span| {
            let start = span.tokens.start.max(range.start);
            let end = span.tokens.end.min(range.end);
            (start < end).then(|| TokenSpan {
                tokens: end - start,
                start: span.start + start - span.tokens.start,
                pages: span.pages.clone(),
                first_rank: span.first_rank,
                generated: span.generated,
            })
        };
        self.spans.iter().filter_map(part).collect()
    }

    /// Each span must continue the recurrent states in its slot, or begin new ones. All slots are
    /// marked as unknown, until [`finish_states`](Self::finish_states).
    pub(crate) fn start_states(&self, states: &mut StateArena) -> Result<(), BatchError> {
        let mut owners = HashMap::new();
        for &Span { sequence, slot, start, .. } in &self.spans {
            if slot >= states.slots() {
                let slots = states.slots();
                return Err(BatchError::NoSuchSlot { sequence, found: slot, slots });
            }
            if let Some(other) = owners.insert(slot, sequence) {
                return Err(BatchError::SharedSlot { sequence, slot, other });
            }
            let found = states.tokens(slot);
            if start > 0 && found != Some(start) {
                return Err(BatchError::States { sequence, slot, found, expected: start });
            }
        }
        for span in &self.spans {
            if span.start == 0 {
                states.reset(span.slot);
            }
            states.set_tokens(span.slot, None);
        }
        Ok(())
    }

    /// Notes what the states have seen after a pass.
    pub(crate) fn finish_states(&self, states: &mut StateArena) {
        self.spans.iter().for_each(|span| states.set_tokens(span.slot, Some(span.end())));
    }

    /// The tokens `range` of the batch, as recurrent states see them.
    pub(crate) fn state_spans(&self, range: Range<usize>) -> Vec<StateSpan> {
        let part = |span: &Span| {
            let first = span.tokens.start.max(range.start);
            let end = span.tokens.end.min(range.end);
            let start = span.start + first - span.tokens.start;
            (first < end).then(|| StateSpan { slot: span.slot, start, tokens: end - first })
        };
        self.spans.iter().filter_map(part).collect()
    }

    /// The position of each token.
    pub(crate) fn positions(&self) -> Vec<usize> {
        self.spans.iter().flat_map(|span| span.start..span.end()).collect()
    }
}

impl Span {
    /// The position after the last token.
    pub fn end(&self) -> usize {
        self.start + self.tokens.len()
    }

    fn check(&self, expected: usize, tokens: &[u32], bounds: &Bounds) -> Result<(), BatchError> {
        let &Bounds { vocab_size, has_head, context_length, pages, ranks } = bounds;
        let (sequence, found) = (self.sequence, self.tokens.clone());
        let Some(own) =
            tokens.get(found.clone()).filter(|own| found.start == expected && !own.is_empty())
        else {
            return Err(BatchError::Tokens { sequence, found, expected, tokens: tokens.len() });
        };
        if let Some((index, &id)) =
            own.iter().enumerate().find(|(_, id)| **id as usize >= vocab_size)
        {
            return Err(BatchError::TokenOutOfRange { sequence, index, id, vocab_size });
        }
        let end = self.start.saturating_add(own.len());
        if end > context_length {
            return Err(BatchError::Context { sequence, end, context_length });
        }
        let needed = end.div_ceil(PAGE_POSITIONS);
        if self.pages.len() < needed {
            let found = self.pages.len();
            return Err(BatchError::Pages { sequence, found, expected: needed, end });
        }
        if self.first_rank >= ranks {
            return Err(BatchError::FirstRank { sequence, found: self.first_rank, ranks });
        }
        if let Some((index, &page)) =
            self.pages.iter().enumerate().find(|(_, page)| page.0 as usize >= pages)
        {
            return Err(BatchError::NoSuchPage { sequence, index, page, pages });
        }
        let ascends = |(i, &(index, _)): (usize, &(usize, Wanted))| {
            index < own.len() && (i == 0 || self.wanted[i - 1].0 < index)
        };
        if let Some((_, &(index, _))) = self.wanted.iter().enumerate().find(|one| !ascends(*one)) {
            return Err(BatchError::Wanted { sequence, index, tokens: own.len() });
        }
        if !has_head && self.wanted.iter().any(|(_, wanted)| *wanted == Wanted::Logits) {
            return Err(BatchError::NoHead { sequence });
        }
        Ok(())
    }
}

/// Pages of a sequence that has an arena to itself: page i is the next one of its rank, the first
/// one on rank 0.
pub(crate) fn pages_in_order(positions: usize, ranks: usize) -> Vec<PageId> {
    (0..positions.div_ceil(PAGE_POSITIONS)).map(|page| PageId((page / ranks) as u32)).collect()
}

/// Positions of such a sequence on `rank`.
pub(crate) fn local_positions(positions: usize, rank: usize, ranks: usize) -> usize {
    PageOwners { first: 0, ranks, rank }.positions(positions)
}
