//! The scheduler against a simulated clock, model and cache.
//!
//! The simulated cache stores, for each position of each page, a hash of the tokens up to that
//! position. A step checks that every earlier position of every span has the right hash, which a
//! page that was given away, not copied, or matched wrongly would not have. In the same way a slot
//! of recurrent states has the hash of the tokens that its states have seen.

use std::collections::HashMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn mix(hash: u64, token: u32) -> u64 {
    (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
}

/// The hash of each beginning of `tokens`.
fn prefixes(tokens: &[u32]) -> Vec<u64> {
    tokens
        .iter()
        .scan(1, |hash, token| {
            *hash = mix(*hash, *token);
            Some(*hash)
        })
        .collect()
}

/// The token that the simulated model generates after `tokens`, as sequence `index` of its request.
fn answer(tokens: &[u32], index: usize) -> u32 {
    (mix(*prefixes(tokens).last().expect("tokens"), index as u32) % 50) as u32
}

#[derive(Clone, Debug)]
struct Wish {
    gap: u64,
    family: u32,
    prompt: usize,
    tokens: usize,
    n: usize,
    priority: i32,
    cancel: Option<usize>,
    all_logits: bool,
}

/// A sequence as the engine sees it.
struct Follower {
    tokens: Vec<u32>,
    prompt: usize,
    index: usize,
    limit: usize,
    /// Sequences that fork from this one after the prompt.
    siblings: Vec<SequenceId>,
    computed: usize,
    first: usize,
    slot: u32,
    pages: Vec<Page>,
}

struct Simulation {
    scheduler: Scheduler,
    now: Duration,
    cache: HashMap<(Page, usize), u64>,
    states: HashMap<u32, u64>,
    followers: HashMap<SequenceId, Follower>,
    next: SequenceId,
    finished: Vec<(SequenceId, Vec<u32>)>,
    computed_rows: usize,
}

impl Simulation {
    fn new(arenas: usize, pages: usize, sequences: usize) -> Self {
        Self::with_states(arenas, pages, sequences, None)
    }

    /// With so many snapshots of recurrent states, if the model has such states.
    fn with_states(
        arenas: usize,
        pages: usize,
        sequences: usize,
        snapshots: Option<usize>,
    ) -> Self {
        let aging = Duration::from_secs(1);
        let sizes = Sizes {
            arenas,
            pages,
            sequences,
            snapshots,
            uniform_pages: pages.is_multiple_of(2),
            logit_rows: 100,
            aging,
        };
        Self {
            scheduler: Scheduler::new(sizes, ChainKey::new([3; 32], b"simulation")),
            now: Duration::ZERO,
            cache: HashMap::new(),
            states: HashMap::new(),
            followers: HashMap::new(),
            next: 0,
            finished: Vec::new(),
            computed_rows: 0,
        }
    }

    /// Submits a request; returns the name of its first sequence.
    fn submit(&mut self, wish: &Wish) -> SequenceId {
        let id = self.next;
        self.next += wish.n as u64;
        // Prompts of a family share a beginning; every third token comes from the length.
        let shared = wish.prompt * 2 / 3;
        let tokens: Vec<u32> = (0..wish.prompt)
            .map(|at| if at < shared { wish.family } else { wish.prompt as u32 % 7 } + at as u32)
            .collect();
        self.scheduler.add(Arrival {
            id,
            tokens: tokens.clone(),
            salt: Vec::new(),
            priority: wish.priority,
            time: self.now,
            all_logits: wish.all_logits,
        });
        let follower = Follower {
            tokens,
            prompt: wish.prompt,
            index: 0,
            limit: wish.tokens,
            siblings: (id + 1..id + wish.n as u64).collect(),
            computed: 0,
            first: 0,
            slot: 0,
            pages: Vec::new(),
        };
        self.followers.insert(id, follower);
        id
    }

    fn cancel(&mut self, id: SequenceId) {
        if self.followers.remove(&id).is_some() {
            self.scheduler.remove(id);
        }
    }

    /// Carries out one step.
    fn step(&mut self, prompt_rows: usize) -> Plan {
        let plan = self.scheduler.plan(prompt_rows);
        self.apply(&plan);
        assert!(plan.prompt_rows() <= prompt_rows);
        for span in &plan.spans {
            self.compute(span);
        }
        for span in &plan.spans {
            self.continue_sequence(span);
        }
        self.scheduler.pool().check();
        self.now += Duration::from_millis(20 + plan.prompt_rows() as u64);
        plan
    }

    fn apply(&mut self, plan: &Plan) {
        for id in &plan.preempted {
            if let Some(follower) = self.followers.get_mut(id) {
                (follower.computed, follower.pages) = (0, Vec::new());
            }
        }
        for (from, to) in &plan.copies {
            assert_eq!(from.arena, to.arena);
            for slot in 0..PAGE_POSITIONS {
                match self.cache.get(&(*from, slot)).copied() {
                    Some(hash) => self.cache.insert((*to, slot), hash),
                    None => self.cache.remove(&(*to, slot)),
                };
            }
        }
        for (from, to) in &plan.state_copies {
            match self.states.get(from).copied() {
                Some(hash) => self.states.insert(*to, hash),
                None => self.states.remove(to),
            };
        }
        for placement in &plan.placed {
            let follower = self.followers.get_mut(&placement.id).expect("a live sequence");
            follower.first = placement.first;
            follower.slot = placement.slot;
            follower.computed = placement.computed;
            follower.pages = placement.pages.clone();
        }
        for (id, page) in &plan.grown {
            self.followers.get_mut(id).expect("a live sequence").pages.push(*page);
        }
        // No two sequences have the same slot.
        if self.scheduler.states.is_some() {
            let running = self.followers.values().filter(|follower| !follower.pages.is_empty());
            let mut slots: Vec<_> = running.map(|follower| follower.slot).collect();
            slots.sort_unstable();
            assert!(slots.windows(2).all(|pair| pair[0] != pair[1]), "{slots:?}");
        }
        // Every reference that the pool counts is a page of a live sequence.
        let mut tables: HashMap<Page, u32> = HashMap::new();
        for page in self.followers.values().flat_map(|follower| &follower.pages) {
            *tables.entry(*page).or_default() += 1;
        }
        assert_eq!(tables, self.scheduler.pool().references());
    }

    fn compute(&mut self, span: &PlannedSpan) {
        let follower = &self.followers[&span.id];
        let end = follower.computed + span.count;
        assert!(span.count > 0 && end <= follower.tokens.len());
        // A span is of the prompt or of generated tokens.
        assert!(end <= follower.prompt || follower.computed >= follower.prompt);
        let arenas = self.scheduler.pool().arenas();
        if self.scheduler.states.is_some() {
            let hashes = prefixes(&follower.tokens);
            if let Some(last) = follower.computed.checked_sub(1) {
                assert_eq!(self.states.get(&follower.slot), Some(&hashes[last]), "{}", span.id);
            }
            self.states.insert(follower.slot, hashes[end - 1]);
        }
        for (position, hash) in prefixes(&follower.tokens)[..end].iter().enumerate() {
            let page = follower.pages[position / PAGE_POSITIONS];
            assert_eq!(page.arena, (follower.first + position / PAGE_POSITIONS) % arenas);
            let slot = (page, position % PAGE_POSITIONS);
            if position >= follower.computed {
                self.cache.insert(slot, *hash);
            } else {
                assert_eq!(self.cache.get(&slot), Some(hash), "{position} of {}", span.id);
            }
        }
        self.computed_rows += span.count;
        self.followers.get_mut(&span.id).expect("a live sequence").computed = end;
    }

    fn continue_sequence(&mut self, span: &PlannedSpan) {
        self.scheduler.computed(span.id, span.count);
        let follower = self.followers.get_mut(&span.id).expect("a live sequence");
        if follower.computed < follower.tokens.len() {
            return;
        }
        let before = follower.tokens.clone();
        let siblings = std::mem::take(&mut follower.siblings);
        let (prompt, limit) = (follower.prompt, follower.limit);
        for (index, id) in (1..).zip(siblings) {
            let token = answer(&before, index);
            self.scheduler.fork(span.id, id, token);
            let tokens = [&before[..], &[token]].concat();
            let (siblings, pages) = Default::default();
            let (computed, first, slot) = Default::default();
            let child =
                Follower { tokens, prompt, index, limit, siblings, computed, first, slot, pages };
            self.followers.insert(id, child);
            // Placed in the next plan; until then the pool counts pages that no table shows.
            self.finish_if_done(id);
        }
        let follower = self.followers.get_mut(&span.id).expect("a live sequence");
        let token = answer(&before, follower.index);
        follower.tokens.push(token);
        self.scheduler.push(span.id, token);
        self.finish_if_done(span.id);
    }

    fn finish_if_done(&mut self, id: SequenceId) {
        let follower = &self.followers[&id];
        if follower.tokens.len() == follower.prompt + follower.limit {
            let mut tokens = follower.tokens[..follower.prompt].to_vec();
            while tokens.len() < follower.tokens.len() {
                tokens.push(answer(&tokens, follower.index));
            }
            assert_eq!(tokens, follower.tokens, "the answer of {id}");
            self.finished.push((id, tokens));
            self.cancel(id);
        }
    }

    /// Whether everything is released.
    fn assert_empty(&self) {
        assert_eq!(self.scheduler.counts(), (0, 0));
        assert_eq!(self.scheduler.pool().counts().0, 0, "pages are still used");
        assert!(self.scheduler.sequences.is_empty() && self.scheduler.pending.is_empty());
        assert!(self.scheduler.forked.is_empty() && self.followers.is_empty());
    }
}

fn wish() -> impl Strategy<Value = Wish> {
    let numbers = (0..400u64, 0..3u32, 1..700usize, 1..200usize);
    let rest = (1..4usize, -3..4i32, proptest::option::weighted(0.2, 0..60usize), 0..8u32);
    (numbers, rest).prop_map(|((gap, family, prompt, tokens), (n, priority, cancel, kind))| Wish {
        gap,
        family,
        prompt,
        tokens,
        n: if kind < 5 { 1 } else { n },
        priority,
        cancel,
        all_logits: kind == 0,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_starves_or_leaks(
        wishes in proptest::collection::vec(wish(), 1..20),
        arenas in 1..4usize,
        extra in prop_oneof![Just(0), 0..6usize, Just(60)],
        sequences in 1..9usize,
        prompt_rows in prop_oneof![16..64usize, Just(512)],
        snapshots in proptest::option::of(0..4usize),
    ) {
        // The fewest pages with which each sequence fits alone.
        let longest = wishes.iter().map(|wish| pages_for(wish.prompt + wish.tokens)).max();
        let pages = longest.expect("a wish").div_ceil(arenas) + extra;
        // A hybrid model splits no positions.
        let snapshots = snapshots.filter(|_| arenas == 1);
        let mut simulation = Simulation::with_states(arenas, pages, sequences, snapshots);
        let mut arrivals = wishes.iter();
        let mut next = arrivals.next();
        let mut due = Duration::ZERO;
        let mut cancellations: Vec<(usize, SequenceId)> = Vec::new();
        let mut expected = 0;
        let total: usize =
            wishes.iter().map(|wish| wish.n * (wish.prompt / 16 + wish.tokens + 2)).sum();
        // Each step computes at least one row of some sequence. What preemption repeats is bounded
        // by the order: the first sequence always gets on.
        let mut steps = 0;
        while next.is_some() || simulation.scheduler.counts() != (0, 0) {
            while let Some(wish) = next.filter(|_| due <= simulation.now) {
                let id = simulation.submit(wish);
                if let Some(after) = wish.cancel {
                    cancellations.extend((id..id + wish.n as u64).map(|id| (steps + after, id)));
                } else {
                    expected += wish.n;
                }
                next = arrivals.next();
                due += Duration::from_millis(next.map_or(0, |wish| wish.gap));
            }
            let cancelled: Vec<_> =
                cancellations.iter().filter(|(step, _)| *step == steps).map(|c| c.1).collect();
            for id in cancelled {
                simulation.finished.retain(|(finished, _)| *finished != id);
                simulation.cancel(id);
            }
            let first = simulation.scheduler.running.first().copied();
            let plan = simulation.step(prompt_rows);
            if let Some((_, id)) = first {
                prop_assert!(!plan.preempted.contains(&id), "the first sequence is preempted");
            }
            if plan.spans.is_empty() {
                let (running, waiting) = simulation.scheduler.counts();
                prop_assert_eq!((running, waiting), (0, 0), "work is left but none is planned");
            }
            steps += 1;
            prop_assert!(steps < 20 * total + 1000, "too many steps");
        }
        // A request that is cancelled before its prompt is done never forks; what is not
        // cancelled is finished.
        let cancelled: Vec<_> = cancellations.iter().map(|(_, id)| *id).collect();
        let finished = simulation.finished.iter().filter(|(id, _)| !cancelled.contains(id));
        prop_assert_eq!(finished.count(), expected);
        simulation.assert_empty();
    }
}

fn plain(prompt: usize, tokens: usize) -> Wish {
    Wish { gap: 0, family: 1, prompt, tokens, n: 1, priority: 0, cancel: None, all_logits: false }
}

#[test]
fn a_new_prefix_is_computed_once_and_the_waiter_takes_over() {
    for cancelled in [false, true] {
        let mut simulation = Simulation::new(1, 40, 4);
        let first = simulation.submit(&plain(1000, 3));
        let second = simulation.submit(&plain(1000, 3));
        // 300 rows a step: the second request waits for the pages of the first.
        let plan = simulation.step(300);
        assert_eq!(plan.spans, [PlannedSpan { id: first, count: 300 }]);
        if cancelled {
            simulation.cancel(first);
        }
        while simulation.scheduler.counts() != (0, 0) {
            simulation.step(300);
        }
        simulation.assert_empty();
        let finished: Vec<_> = simulation.finished.iter().map(|(id, _)| *id).collect();
        // The second request computes the 104 tokens after the last full page (7 pages), and, if
        // the first was cancelled, all but the two pages that it left.
        let (order, rows) = if cancelled {
            (vec![second], 300 + (1000 - 256) + 2)
        } else {
            (vec![first, second], 1000 + 2 + 104 + 2)
        };
        assert_eq!((finished, simulation.computed_rows), (order, rows));
    }
}

#[test]
fn a_hit_leaves_at_least_one_token_to_compute() {
    let mut simulation = Simulation::new(1, 20, 4);
    simulation.submit(&plain(256, 1));
    simulation.step(512);
    assert_eq!(simulation.computed_rows, 256);
    simulation.submit(&plain(256, 1));
    simulation.step(512);
    assert_eq!(simulation.computed_rows, 256 + 128);
    simulation.assert_empty();
    // Log-probabilities of the prompt need all of it.
    simulation.submit(&Wish { all_logits: true, ..plain(256, 1) });
    let rows: Vec<_> = (0..3).map(|_| simulation.step(512).prompt_rows()).collect();
    assert_eq!(rows, [100, 100, 56]);
    simulation.assert_empty();
}

#[test]
fn priorities_count_until_waiting_makes_up_for_them() {
    let mut simulation = Simulation::new(1, 40, 1);
    let running = simulation.submit(&plain(10, 30));
    simulation.step(512);
    let last = simulation.submit(&Wish { priority: 2, ..plain(20, 1) });
    let middle = simulation.submit(&plain(30, 1));
    simulation.now += Duration::from_millis(500);
    let best = simulation.submit(&Wish { priority: -1, ..plain(40, 1) });
    // Two levels of priority are worth two seconds of waiting.
    simulation.now += Duration::from_millis(2000);
    let late = simulation.submit(&plain(50, 1));
    while simulation.scheduler.counts() != (0, 0) {
        simulation.step(512);
    }
    let order: Vec<_> = simulation.finished.iter().map(|(id, _)| *id).collect();
    assert_eq!(order, [running, best, middle, last, late]);
}

#[test]
fn samples_share_the_pages_of_their_prompt() {
    let mut simulation = Simulation::new(1, 20, 8);
    simulation.submit(&Wish { n: 4, ..plain(300, 2) });
    let plan = simulation.step(512);
    assert_eq!(plan.spans.len(), 1);
    // Two full pages are shared, the third is copied for each of the others.
    let plan = simulation.step(512);
    assert_eq!((plan.copies.len(), plan.placed.len(), plan.spans.len()), (3, 3, 4));
    assert_eq!(simulation.computed_rows, 304);
    simulation.assert_empty();
}

#[test]
fn the_last_in_the_order_is_preempted_and_goes_on_later() {
    // 3 pages: two sequences of 128 + 40 tokens need 4.
    let mut simulation = Simulation::new(1, 3, 4);
    let first = simulation.submit(&Wish { family: 1, ..plain(100, 68) });
    let second = simulation.submit(&Wish { family: 2, ..plain(100, 68) });
    let mut preempted = Vec::new();
    while simulation.scheduler.counts() != (0, 0) {
        preempted.extend(simulation.step(512).preempted);
    }
    assert_eq!(preempted, [second]);
    assert_eq!(simulation.scheduler.preemptions(), 1);
    let order: Vec<_> = simulation.finished.iter().map(|(id, _)| *id).collect();
    assert_eq!(order, [first, second]);
    simulation.assert_empty();
}
