//! Which sequences compute which tokens in the next step, and in which pages.
//!
//! The scheduler runs on rank 0 alone and sees neither the model nor a clock: it works on tokens,
//! pages and arrival times. In each step
//!
//! 1. every sequence that decodes computes one token. If it needs a page and none can be taken, the
//!    sequence that is last in the order is preempted: its pages are released and it waits again,
//! 2. running sequences compute chunks of their prompts, within a budget of rows,
//! 3. waiting sequences are admitted, in order, if the pages for all their tokens can be taken.
//!
//! The order is by arrival time plus priority times the aging interval. A sequence that waits for
//! one interval has thus caught up with a sequence of the next better priority that arrives now.
//! The order of two sequences never changes, so the first one is never preempted for another and
//! every sequence becomes the first in the end.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use qwen3_model::PAGE_POSITIONS;

use crate::chain::{ChainKey, PageHash};
use crate::pages::{Page, PagePool, pages_for};
use crate::states::{StatePool, next_snapshot};

/// Names a sequence on all ranks.
pub(crate) type SequenceId = u64;

/// Sizes that bound a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// Ranks that split the positions of a sequence; 1 without such a split.
    pub arenas: usize,
    /// Pages of each of them.
    pub pages: usize,
    /// Sequences that run together.
    pub sequences: usize,
    /// The pages of generated tokens equal those of the same tokens in a prompt.
    pub uniform_pages: bool,
    /// Snapshots of recurrent states that are kept; `None` for a model without such states.
    pub snapshots: Option<usize>,
    /// Rows of a step for prompts that need logits for every token.
    pub logit_rows: usize,
    /// The waiting time that makes up for one level of priority.
    pub aging: Duration,
}

/// A sequence that arrives.
pub(crate) struct Arrival {
    /// A new name.
    pub id: SequenceId,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// Separates its pages from those of other sequences.
    pub salt: Vec<u8>,
    /// A lower value comes first.
    pub priority: i32,
    /// Time of arrival since the engine's start.
    pub time: Duration,
    /// Every token of the prompt needs logits, so none can be taken from cached pages.
    pub all_logits: bool,
}

/// Place in the order of sequences; lower comes first.
type Order = (i64, SequenceId);

struct Sequence {
    tokens: Vec<u32>,
    /// Tokens of the prompt; the others were generated.
    prompt: usize,
    /// Tokens whose keys and values are in `pages`.
    computed: usize,
    pages: Vec<Page>,
    /// The slot of the recurrent states, while the sequence runs.
    slot: u32,
    /// The arena of page 0.
    first: usize,
    /// For each arena, the hashes of the full pages of a chain that starts there.
    chains: Vec<(PageHash, Vec<PageHash>)>,
    /// Pages whose contents other sequences may find.
    published: usize,
    order: Order,
    /// No token of the prompt may come from cached pages, until all are computed once.
    all_logits: bool,
}

/// One sequence's part in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PlannedSpan {
    pub id: SequenceId,
    /// Tokens to compute, from the first that is not computed yet.
    pub count: usize,
}

/// A sequence that gets its pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    pub id: SequenceId,
    /// The slot of its recurrent states; 0 in a model without such states.
    pub slot: u32,
    /// The arena of page 0.
    pub first: usize,
    /// Tokens that are in the pages already.
    pub computed: usize,
    /// Pages for all tokens that are known.
    pub pages: Vec<Page>,
}

/// A step. It is carried out in the order of the fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Sequences that lose their pages.
    pub preempted: Vec<SequenceId>,
    /// Pages to copy, from and to; both are of one arena.
    pub copies: Vec<(Page, Page)>,
    /// Recurrent states to copy, from slot to slot, one after another.
    pub state_copies: Vec<(u32, u32)>,
    /// Sequences that get pages.
    pub placed: Vec<Placement>,
    /// Running sequences that get one more page.
    pub grown: Vec<(SequenceId, Page)>,
    /// The tokens to compute.
    pub spans: Vec<PlannedSpan>,
    /// Spans that decode: the first ones.
    pub decoding: usize,
}

impl Plan {
    /// Rows of prompts.
    pub fn prompt_rows(&self) -> usize {
        self.spans[self.decoding..].iter().map(|span| span.count).sum()
    }
}

/// Why a waiting sequence is not admitted.
enum Refusal {
    /// Another sequence computes pages that this one can use.
    PagesArePending,
    /// Pages are missing.
    NoPages,
}

/// The scheduler.
pub(crate) struct Scheduler {
    sizes: Sizes,
    key: ChainKey,
    pool: PagePool,
    /// The recurrent states of a hybrid model.
    states: Option<StatePool>,
    sequences: HashMap<SequenceId, Sequence>,
    waiting: BTreeSet<Order>,
    running: BTreeSet<Order>,
    /// Full pages of prompts that running sequences are going to compute.
    pending: HashMap<PageHash, SequenceId>,
    /// Sequences that were forked since the last plan, each with the page to copy, if any.
    forked: Vec<(Placement, Option<(Page, Page)>)>,
    preemptions: u64,
}

impl Scheduler {
    /// A scheduler without sequences.
    pub fn new(sizes: Sizes, key: ChainKey) -> Self {
        Self {
            sizes,
            key,
            pool: PagePool::new(sizes.arenas, sizes.pages),
            states: sizes.snapshots.map(|snapshots| StatePool::new(sizes.sequences, snapshots)),
            sequences: HashMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            pending: HashMap::new(),
            forked: Vec::new(),
            preemptions: 0,
        }
    }

    /// Adds a sequence to those that wait.
    pub fn add(&mut self, arrival: Arrival) {
        let Arrival { id, tokens, salt, priority, time, all_logits } = arrival;
        let aging = self.sizes.aging.as_nanos() as i64;
        let order =
            (time.as_nanos() as i64).saturating_add(i64::from(priority).saturating_mul(aging));
        let order = (order, id);
        let chains = (0..self.sizes.arenas)
            .map(|first| (self.key.start(&salt, first), Vec::new()))
            .collect();
        let sequence = Sequence {
            prompt: tokens.len(),
            tokens,
            computed: 0,
            pages: Vec::new(),
            slot: 0,
            first: 0,
            chains,
            published: 0,
            order,
            all_logits,
        };
        self.waiting.insert(order);
        self.sequences.insert(id, sequence);
    }

    /// Forgets a sequence and releases its pages.
    pub fn remove(&mut self, id: SequenceId) {
        let Some(order) = self.sequences.get(&id).map(|sequence| sequence.order) else { return };
        self.release(id);
        self.waiting.remove(&order);
        self.running.remove(&order);
        self.forked.retain(|(placement, _)| placement.id != id);
        self.sequences.remove(&id);
    }

    /// Number of sequences that run, and that wait.
    pub fn counts(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// How often a sequence lost its pages.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// The pages.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// Running sequences that compute one token in the next step.
    pub fn decoding(&self) -> usize {
        self.running.iter().filter(|(_, id)| self.sequences[id].remaining() == 1).count()
    }

    /// Plans a step with at most `prompt_rows` rows of prompts.
    pub fn plan(&mut self, prompt_rows: usize) -> Plan {
        let mut plan = Plan::default();
        for (placement, copy) in self.forked.drain(..) {
            plan.copies.extend(copy);
            plan.placed.push(placement);
        }
        self.plan_decoding(&mut plan);
        plan.decoding = plan.spans.len();
        let mut rows = prompt_rows;
        let mut logit_rows = self.sizes.logit_rows;
        let hybrid = self.states.is_some();
        for (_, id) in &self.running {
            let sequence = &self.sequences[id];
            if sequence.remaining() > 1 {
                sequence.add_chunk(*id, hybrid, &mut rows, &mut logit_rows, &mut plan);
            }
        }
        if plan.preempted.is_empty() {
            self.admit(&mut rows, &mut logit_rows, &mut plan);
        }
        if let Some(states) = &mut self.states {
            plan.state_copies = states.take_copies();
        }
        plan
    }

    /// One token for each sequence that decodes, in order; the last ones in the order lose their
    /// pages where these run out.
    fn plan_decoding(&mut self, plan: &mut Plan) {
        let orders: Vec<_> = self.running.iter().copied().collect();
        for order in orders {
            let id = order.1;
            if !self.running.contains(&order) || self.sequences[&id].remaining() != 1 {
                continue;
            }
            let sequence = &self.sequences[&id];
            if sequence.pages.len() * PAGE_POSITIONS == sequence.computed {
                let arena = self.pool.arena_of(sequence.first, sequence.pages.len());
                let page = loop {
                    if let Some(page) = self.pool.take(arena) {
                        break Some(page);
                    }
                    let last = *self.running.last().expect("the sequence itself runs");
                    self.preempt(last.1, plan);
                    if last == order {
                        break None;
                    }
                };
                let Some(page) = page else { continue };
                self.sequence(id).pages.push(page);
                // A sequence that was forked for this step is placed with the page.
                match plan.placed.iter_mut().find(|placement| placement.id == id) {
                    Some(placement) => placement.pages.push(page),
                    None => plan.grown.push((id, page)),
                }
            }
            plan.spans.push(PlannedSpan { id, count: 1 });
        }
    }

    /// Admits waiting sequences in order, until one does not fit.
    fn admit(&mut self, rows: &mut usize, logit_rows: &mut usize, plan: &mut Plan) {
        let waiting: Vec<_> = self.waiting.iter().copied().collect();
        for order in waiting {
            if *rows == 0 || self.running.len() >= self.sizes.sequences {
                return;
            }
            let id = order.1;
            if self.sequences[&id].all_logits && *logit_rows == 0 {
                return;
            }
            match self.place(id) {
                Ok(placement) => {
                    self.waiting.remove(&order);
                    self.running.insert(order);
                    plan.placed.push(placement);
                    let hybrid = self.states.is_some();
                    self.sequences[&id].add_chunk(id, hybrid, rows, logit_rows, plan);
                }
                Err(Refusal::PagesArePending) => {}
                Err(Refusal::NoPages) => return,
            }
        }
    }

    /// Finds or takes pages for all tokens of a waiting sequence.
    fn place(&mut self, id: SequenceId) -> Result<Placement, Refusal> {
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence is known");
        let tokens = sequence.tokens.len();
        // At least one token is computed, so that there are logits.
        let most = if sequence.all_logits { 0 } else { (tokens - 1) / PAGE_POSITIONS };
        let prompt = sequence.hashed_prompt(&self.sizes);
        let mut best: Option<(usize, Vec<Page>)> = None;
        for (first, (start, hashes)) in sequence.chains.iter_mut().enumerate() {
            self.key.extend(start, hashes, &sequence.tokens, prompt);
            let mut hits: Vec<Page> =
                hashes[..most].iter().map_while(|hash| self.pool.find(hash)).collect();
            if let Some(states) = &self.states {
                hits.truncate(states.longest(hashes, hits.len()));
            }
            // Pages of a hybrid model are of use up to a snapshot, so only these are waited for.
            let next = if self.states.is_some() { most } else { most.min(hits.len() + 1) };
            if hashes[hits.len()..next].iter().any(|hash| self.pending.contains_key(hash)) {
                return Err(Refusal::PagesArePending);
            }
            if best.as_ref().is_none_or(|(_, longest)| hits.len() > longest.len()) {
                best = Some((first, hits));
            }
        }
        let (mut first, hits) = best.expect("there is at least one arena");
        if hits.is_empty() {
            first = self.pool.emptiest();
        }
        let needed = pages_for(tokens);
        // Sequences that run already need pages soon; a few are left for them.
        let reserve = self.running.len().min(self.sizes.pages / 16);
        for arena in 0..self.pool.arenas() {
            let here = |index: &usize| self.pool.arena_of(first, *index) == arena;
            let fresh = (hits.len()..needed).filter(here).count();
            let revived = hits.iter().filter(|page| page.arena == arena);
            let revived = revived.filter(|page| self.pool.is_cached(**page)).count();
            if fresh + revived + reserve > self.pool.available(arena) {
                return Err(Refusal::NoPages);
            }
        }
        let computed = hits.len() * PAGE_POSITIONS;
        let mut pages = hits;
        pages.iter().for_each(|page| self.pool.retain(*page));
        for index in pages.len()..needed {
            let page = self.pool.take(self.pool.arena_of(first, index));
            pages.push(page.expect("the pages were counted"));
        }
        sequence.first = first;
        sequence.computed = computed;
        sequence.published = computed / PAGE_POSITIONS;
        sequence.pages = pages.clone();
        let hashes = &sequence.chains[first].1;
        if let Some(states) = &mut self.states {
            sequence.slot = states.take();
            if computed > 0 {
                states.restore(&hashes[computed / PAGE_POSITIONS - 1], sequence.slot);
            }
            let mut at = next_snapshot(computed, sequence.prompt);
            while at / PAGE_POSITIONS <= hashes.len() {
                self.pending.entry(hashes[at / PAGE_POSITIONS - 1]).or_insert(id);
                at = next_snapshot(at, sequence.prompt);
            }
        } else {
            for hash in &hashes[sequence.published..] {
                self.pending.entry(*hash).or_insert(id);
            }
        }
        Ok(Placement { id, slot: sequence.slot, first, computed, pages })
    }

    /// Takes the pages of a running sequence away; it waits again.
    fn preempt(&mut self, id: SequenceId, plan: &mut Plan) {
        self.release(id);
        let order = self.sequences[&id].order;
        self.running.remove(&order);
        self.waiting.insert(order);
        self.preemptions += 1;
        plan.placed.retain(|placement| placement.id != id);
        plan.grown.retain(|(other, _)| *other != id);
        plan.spans.retain(|span| span.id != id);
        plan.preempted.push(id);
    }

    /// Releases the pages and the slot of a sequence, if it runs, and its claim on the pages that
    /// it was going to compute.
    fn release(&mut self, id: SequenceId) {
        let sequence = self.sequences.get_mut(&id).expect("the sequence is known");
        let pages = std::mem::take(&mut sequence.pages);
        (sequence.computed, sequence.published) = (0, 0);
        self.pool.release(&pages);
        if let Some(states) =
            self.states.as_mut().filter(|_| self.running.contains(&sequence.order))
        {
            states.release(sequence.slot);
        }
        self.pending.retain(|_, owner| *owner != id);
    }

    /// Notes that a step has computed `count` further tokens of a sequence, and makes full pages
    /// and snapshots of states known to others.
    pub fn computed(&mut self, id: SequenceId, count: usize) {
        let sequence = self.sequences.get_mut(&id).expect("a span's sequence is known");
        sequence.computed += count;
        let prompt = sequence.hashed_prompt(&self.sizes);
        let (start, hashes) = &mut sequence.chains[sequence.first];
        self.key.extend(start, hashes, &sequence.tokens, prompt);
        let full = sequence.computed / PAGE_POSITIONS;
        if let Some(states) = &mut self.states
            && next_snapshot(sequence.computed - count, sequence.prompt) == sequence.computed
        {
            states.save(hashes[full - 1], sequence.slot);
        }
        let new = sequence.published..full;
        for (page, hash) in sequence.pages[new.clone()].iter().zip(&hashes[new]) {
            self.pool.publish(*page, *hash);
            if self.pending.get(hash) == Some(&id) {
                self.pending.remove(hash);
            }
        }
        sequence.published = full;
        sequence.all_logits &= sequence.remaining() > 0;
    }

    /// Whether all tokens of a sequence are computed.
    pub fn is_computed(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|sequence| sequence.remaining() == 0)
    }

    /// Appends a generated token.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        self.sequence(id).tokens.push(token);
    }

    /// Adds a sequence `child` that continues the tokens computed for `parent` with `token`. It
    /// shares the full pages of `parent`, and starts with a copy of the last one if that is not
    /// full. Without a page for the copy the sequence waits.
    ///
    /// It is called after [`computed`](Self::computed) and before `parent` is continued.
    pub fn fork(&mut self, parent: SequenceId, child: SequenceId, token: u32) {
        let sequence = &self.sequences[&parent];
        let (computed, first) = (sequence.computed, sequence.first);
        let order = (sequence.order.0, child);
        let mut tokens = sequence.tokens[..computed].to_vec();
        tokens.push(token);
        let full = computed / PAGE_POSITIONS;
        let mut pages = sequence.pages[..full].to_vec();
        let last = (!computed.is_multiple_of(PAGE_POSITIONS)).then(|| sequence.pages[full]);
        let mut new = Sequence {
            tokens,
            prompt: computed,
            computed: 0,
            pages: Vec::new(),
            slot: 0,
            first,
            chains: sequence.chains.clone(),
            published: 0,
            order,
            all_logits: false,
        };
        new.chains.iter_mut().for_each(|(_, hashes)| hashes.truncate(full));
        let room = self.running.len() < self.sizes.sequences;
        let copy = match last {
            _ if !room => None,
            None => Some(None),
            Some(from) => self.pool.take(from.arena).map(|to| Some((from, to))),
        };
        if let Some(copy) = copy {
            pages.iter().for_each(|page| self.pool.retain(*page));
            pages.extend(copy.map(|(_, to)| to));
            (new.computed, new.published, new.pages) = (computed, full, pages.clone());
            if let Some(states) = &mut self.states {
                new.slot = states.take();
                states.fork(self.sequences[&parent].slot, new.slot);
            }
            self.running.insert(order);
            let placement = Placement { id: child, slot: new.slot, first, computed, pages };
            self.forked.push((placement, copy));
        } else {
            self.waiting.insert(order);
        }
        self.sequences.insert(child, new);
    }

    fn sequence(&mut self, id: SequenceId) -> &mut Sequence {
        self.sequences.get_mut(&id).expect("the sequence is known")
    }
}

impl Sequence {
    /// Tokens that are not computed yet.
    fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Tokens that the hashes of pages count as a prompt.
    fn hashed_prompt(&self, sizes: &Sizes) -> usize {
        if sizes.uniform_pages { usize::MAX } else { self.prompt }
    }

    /// Adds a chunk of the remaining tokens to a plan, within the budgets. A chunk has tokens of
    /// the prompt or generated ones, not both, and in a hybrid model ends where the states are
    /// saved.
    fn add_chunk(
        &self,
        id: SequenceId,
        hybrid: bool,
        rows: &mut usize,
        logit_rows: &mut usize,
        plan: &mut Plan,
    ) {
        let mut end = if self.computed < self.prompt { self.prompt } else { self.tokens.len() };
        if hybrid {
            end = end.min(next_snapshot(self.computed, self.prompt));
        }
        let mut count = (end - self.computed).min(*rows);
        if self.all_logits {
            count = count.min(*logit_rows);
            *logit_rows -= count;
        }
        *rows -= count;
        if count > 0 {
            plan.spans.push(PlannedSpan { id, count });
        }
    }
}

#[cfg(test)]
mod tests;
