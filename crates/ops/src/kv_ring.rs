//! Keys and values on their way round the ranks: a rank attends to one block while the next one
//! travels.

use std::collections::VecDeque;
use std::sync::Arc;

use comm::{CommError, CommunicatorExt};

use crate::background::Pending;
use crate::context::Context;
use crate::cost::Work;
use crate::layout::TokenLayout;

/// The keys and values of one rank's tokens as they travel, [tokens, width].
type Block = Arc<Vec<f32>>;

/// Blocks that each rank passes on to the next one, its own first, until every rank has had all of
/// them.
///
/// A step is one message out and one in, each of a block, made in the background. All steps
/// together carry the bytes of an Allgatherv; that needs fewer steps, but nothing of what it brings
/// can be used before all of it is there.
pub(crate) struct KvRing<'a> {
    ctx: &'a Context,
    layout: &'a TokenLayout,
    width: usize,
    /// Blocks that have come, of which the last is the next to be passed on.
    come: usize,
    last: Block,
    /// Those that nobody has taken yet, each with the rank whose tokens they are of.
    waiting: VecDeque<(usize, Block)>,
    on_its_way: Option<Pending<Result<Vec<f32>, CommError>>>,
}

impl<'a> KvRing<'a> {
    /// A ring of the ranks that split positions, of which this one has its `own` block; `width`
    /// places a token.
    pub fn new(ctx: &'a Context, layout: &'a TokenLayout, width: usize, own: Vec<f32>) -> Self {
        let own = Arc::new(own);
        let waiting = VecDeque::from([(ctx.positions.rank(), own.clone())]);
        Self { ctx, layout, width, come: 1, last: own, waiting, on_its_way: None }
    }

    /// The next block and the rank whose tokens it is of, this rank's own first; the one after it
    /// is on its way from now on.
    ///
    /// # Errors
    /// When a message fails.
    pub fn next(&mut self) -> Result<Option<(usize, Block)>, CommError> {
        if self.waiting.is_empty() {
            self.settle()?;
        }
        let next = self.waiting.pop_front();
        self.pass_on();
        Ok(next)
    }

    /// Passes the last block on and lets another one come, if there is one left and none on its
    /// way. Until it is [settled](Self::settle) this thread makes no other call on these ranks.
    pub fn pass_on(&mut self) {
        if self.on_its_way.is_some() || self.come == self.ctx.positions.size() {
            return;
        }
        let (rank, ranks) = (self.ctx.positions.rank(), self.ctx.positions.size());
        let (to, from) = ((rank + 1) % ranks, (rank + ranks - 1) % ranks);
        let (block, length) =
            (self.last.clone(), self.layout.count(self.owner(self.come)) * self.width);
        self.on_its_way = Some(self.ctx.background.start(&self.ctx.positions, move |comm| {
            let mut next = vec![0.0; length];
            comm.send_recv(to, &block, from, &mut next)?;
            Ok(next)
        }));
    }

    /// Waits for the block that is on its way, if there is one.
    ///
    /// # Errors
    /// When a message fails.
    pub fn settle(&mut self) -> Result<(), CommError> {
        if let Some(block) = self.on_its_way.take() {
            let _operation = self.ctx.profile.operation("wait for keys", Work::default());
            self.last = Arc::new(block.wait()?);
            self.waiting.push_back((self.owner(self.come), self.last.clone()));
            self.come += 1;
        }
        Ok(())
    }

    /// The rank whose block comes as the given one, this rank's own being number 0.
    fn owner(&self, number: usize) -> usize {
        let ranks = self.ctx.positions.size();
        (self.ctx.positions.rank() + ranks - number) % ranks
    }
}
