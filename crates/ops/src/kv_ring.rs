//! Ring attention's exchange of keys and values: a rank attends to one block while it receives the
//! next.

use std::collections::VecDeque;
use std::sync::Arc;

use comm::{CommError, CommunicatorExt};

use crate::background::Pending;
use crate::context::Context;
use crate::cost::Work;
use crate::layout::TokenLayout;

/// The keys and values of one rank's tokens in the wire format, [tokens, width].
type Block = Arc<Vec<f32>>;

/// A ring in which each rank sends blocks to the next rank, its own block first, until every rank
/// has received all blocks.
///
/// Each step sends one block and receives one block in the background. All steps together carry the
/// bytes of an Allgatherv. An Allgatherv needs fewer steps, but its result can be used only when it
/// is complete.
pub(crate) struct KvRing<'a> {
    ctx: &'a Context,
    layout: &'a TokenLayout,
    width: usize,
    /// Number of blocks received, including this rank's own.
    received: usize,
    last: Block,
    /// Blocks that the caller has not taken yet, each with the rank that owns its tokens.
    waiting: VecDeque<(usize, Block)>,
    transfer: Option<Pending<Result<Vec<f32>, CommError>>>,
}

impl<'a> KvRing<'a> {
    /// A ring of the ranks that split positions. `own` is this rank's block, with `width` f32 slots
    /// per token.
    pub fn new(ctx: &'a Context, layout: &'a TokenLayout, width: usize, own: Vec<f32>) -> Self {
        let own = Arc::new(own);
        let waiting = VecDeque::from([(ctx.positions.rank(), own.clone())]);
        Self { ctx, layout, width, received: 1, last: own, waiting, transfer: None }
    }

    /// Returns the next block and the rank that owns its tokens, this rank's own block first. It
    /// also starts the transfer of the block after it.
    ///
    /// # Errors
    /// When a message fails.
    pub fn next(&mut self) -> Result<Option<(usize, Block)>, CommError> {
        if self.waiting.is_empty() {
            self.settle()?;
        }
        let next = self.waiting.pop_front();
        self.start_transfer();
        Ok(next)
    }

    /// Starts a transfer: sends the last block on and receives another one. It does nothing if all
    /// blocks have arrived or a transfer is in progress. Before [`settle`](Self::settle) this
    /// thread must not call the same communicator.
    pub fn start_transfer(&mut self) {
        if self.transfer.is_some() || self.received == self.ctx.positions.size() {
            return;
        }
        let (rank, ranks) = (self.ctx.positions.rank(), self.ctx.positions.size());
        let (to, from) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
        let (block, length) =
            (self.last.clone(), self.layout.count(self.owner(self.received)) * self.width);
        self.transfer = Some(self.ctx.background.start(&self.ctx.positions, move |comm| {
            let mut next = vec![0.0; length];
            comm.send_recv(to, &block, from, &mut next)?;
            Ok(next)
        }));
    }

    /// Waits for the transfer in progress, if there is one.
    ///
    /// # Errors
    /// When a message fails.
    pub fn settle(&mut self) -> Result<(), CommError> {
        if let Some(block) = self.transfer.take() {
            let _operation = self.ctx.profile.operation("wait for keys", Work::default());
            self.last = Arc::new(block.wait()?);
            self.waiting.push_back((self.owner(self.received), self.last.clone()));
            self.received += 1;
        }
        Ok(())
    }

    /// The owner of the block that arrives as `number`; this rank's own block is number 0.
    fn owner(&self, number: usize) -> usize {
        let ranks = self.ctx.positions.size();
        (self.ctx.positions.rank() + ranks - number) % ranks
    }
}
