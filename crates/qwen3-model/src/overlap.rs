//! Passes in two halves: the sums of one half travel while the other one computes.
//!
//! Causal attention permits it: in each layer the first half's keys are in the cache before the
//! second half attends. The layers are then gone through in lockstep, half after half, and each
//! half's sum has a step of the other half's to come through:
//!
//! ```text
//! first   attention ─┐ sum ┌ feed-forward ─┐ sum ┌ attention …
//! second             └ attention ─┐ sum ┌──┴ feed-forward ─┐ sum ┌ …
//! ```

use std::ops::Range;

use ops::schedule::MlpSchedule;
use tensor::split_range;

use crate::config::Config;

/// Which passes go in halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Overlap {
    /// Machines on which the ranks that split heads lie: within one, sums take the cores' time,
    /// which is not gained back.
    pub machines: usize,
    /// The least tokens of a pass; in a mixture of experts, of an expert on average. Products with
    /// fewer would be slower.
    pub tokens: usize,
}

impl Overlap {
    /// The tokens that go through the layers together, by their indices in the pass: halves, or
    /// all.
    ///
    /// `positions` is the number of ranks that split positions. Only where these are not split, and
    /// the feed-forward block exchanges nothing but its result, are sums all that there is to wait
    /// for.
    pub fn parts(
        &self,
        config: &Config,
        positions: usize,
        schedule: MlpSchedule,
        tokens: usize,
    ) -> Vec<Range<usize>> {
        let visits = config
            .moe
            .as_ref()
            .map_or(tokens, |moe| tokens * moe.num_experts_per_tok / moe.num_experts);
        let pays = self.machines > 1 && tokens > 1 && visits >= self.tokens;
        let parts = if pays && positions == 1 && schedule == MlpSchedule::Fused { 2 } else { 1 };
        (0..parts).map(|part| split_range(tokens, parts, part)).collect()
    }
}
