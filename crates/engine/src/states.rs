//! Slots of recurrent states: one for each running sequence of a hybrid model, and snapshots at the
//! ends of pages, from which later sequences with the same beginning go on.
//!
//! Keys and values of a prefix can be shared as they are. A recurrent state is overwritten by the
//! next token, so it has to be copied while it is the state after the prefix.

use std::collections::HashMap;

use qwen3_model::PAGE_POSITIONS;

use crate::chain::PageHash;

/// A snapshot is taken whenever a sequence has so many tokens more.
const SNAPSHOT_TOKENS: usize = 2048;

/// The slots of an engine.
pub(crate) struct StatePool {
    /// Slots that no sequence and no snapshot has.
    free: Vec<u32>,
    /// Slots that no snapshot has used yet.
    unused: Vec<u32>,
    /// Snapshots by the hash of the last page before them: the slot, and when it was used last.
    snapshots: HashMap<PageHash, (u32, u64)>,
    clock: u64,
    /// Copies from slot to slot that are due before the next pass, in order.
    copies: Vec<(u32, u32)>,
}

impl StatePool {
    /// A pool for `sequences` sequences and `snapshots` snapshots.
    pub fn new(sequences: usize, snapshots: usize) -> Self {
        let (sequences, all) = (sequences as u32, (sequences + snapshots) as u32);
        Self {
            free: (0..sequences).rev().collect(),
            unused: (sequences..all).rev().collect(),
            snapshots: HashMap::new(),
            clock: 0,
            copies: Vec::new(),
        }
    }

    /// A slot for a sequence that starts to run.
    ///
    /// # Panics
    /// When as many sequences run as there are slots for.
    pub fn take(&mut self) -> u32 {
        self.free.pop().expect("no more sequences run than there are slots")
    }

    /// Takes back the slot of a sequence. Its contents stay until the copies that are due are made.
    pub fn release(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// The number of leading pages, at most `pages`, after which there is a snapshot.
    pub fn longest(&self, hashes: &[PageHash], pages: usize) -> usize {
        let known = |pages: &usize| self.snapshots.contains_key(&hashes[pages - 1]);
        (1..=pages).rev().find(known).unwrap_or(0)
    }

    /// Continues the snapshot after the page `hash` in a sequence's slot.
    pub fn restore(&mut self, hash: &PageHash, slot: u32) {
        self.clock += 1;
        let snapshot = self.snapshots.get_mut(hash).expect("the snapshot was found");
        snapshot.1 = self.clock;
        self.copies.push((snapshot.0, slot));
    }

    /// Continues the states of a sequence in another one's slot.
    pub fn fork(&mut self, parent: u32, child: u32) {
        self.copies.push((parent, child));
    }

    /// Keeps the states of a sequence as a snapshot after the page `hash`, in place of the one that
    /// was not used for the longest time if there is no room.
    pub fn save(&mut self, hash: PageHash, slot: u32) {
        self.clock += 1;
        if let Some(snapshot) = self.snapshots.get_mut(&hash) {
            snapshot.1 = self.clock;
            return;
        }
        let target = self.unused.pop().or_else(|| {
            let oldest = self.snapshots.iter().min_by_key(|(_, (_, used))| *used);
            let hash = *oldest?.0;
            self.snapshots.remove(&hash).map(|(slot, _)| slot)
        });
        if let Some(target) = target {
            self.snapshots.insert(hash, (target, self.clock));
            self.copies.push((slot, target));
        }
    }

    /// The copies that are due.
    pub fn take_copies(&mut self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.copies)
    }
}

/// The next number of tokens after `computed` at which a sequence with a prompt of `prompt` tokens
/// has its states saved: at the last page boundary before the prompt's last token, which a later
/// prompt with the same beginning computes at least, and every [`SNAPSHOT_TOKENS`].
pub(crate) fn next_snapshot(computed: usize, prompt: usize) -> usize {
    let regular = (computed / SNAPSHOT_TOKENS + 1) * SNAPSHOT_TOKENS;
    let last = prompt.saturating_sub(1) / PAGE_POSITIONS * PAGE_POSITIONS;
    if last > computed { regular.min(last) } else { regular }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_are_at_the_end_of_the_prompt_and_at_regular_distances() {
        let all = |prompt: usize| -> Vec<usize> {
            let next = |at: &usize| Some(next_snapshot(*at, prompt)).filter(|at| *at <= 5000);
            std::iter::successors(next(&0), next).collect()
        };
        assert_eq!(all(100), [2048, 4096]);
        assert_eq!(all(128), [2048, 4096]);
        assert_eq!(all(129), [128, 2048, 4096]);
        assert_eq!(all(3000), [2048, 2944, 4096]);
        assert_eq!(all(2049), [2048, 4096]);
    }

    #[test]
    fn the_oldest_snapshot_gives_way() {
        let hash = |x: u8| [x; 32];
        let mut pool = StatePool::new(1, 2);
        let slot = pool.take();
        pool.save(hash(1), slot);
        pool.save(hash(2), slot);
        // Known already: no copy.
        pool.save(hash(2), slot);
        assert_eq!(pool.take_copies(), [(0, 1), (0, 2)]);
        pool.restore(&hash(1), slot);
        pool.save(hash(3), slot);
        assert_eq!(pool.take_copies(), [(1, 0), (0, 2)]);
        let chain = [hash(1), hash(2), hash(3), hash(4)];
        assert_eq!(
            (pool.longest(&chain, 4), pool.longest(&chain, 2), pool.longest(&chain, 0)),
            (3, 1, 0)
        );
        // Without room there are no snapshots.
        let mut none = StatePool::new(1, 0);
        none.save(hash(1), 0);
        assert_eq!((none.longest(&chain, 4), none.take_copies()), (0, Vec::new()));
    }
}
