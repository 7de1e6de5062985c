//! Rank 0: from submitted requests to step records, and from sampled tokens to events.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use qwen3_model::comm::{CommError, Communicator};
use qwen3_model::sampling::{SampledToken, SamplingError};

use crate::constraint::{ConstraintError, Next, TokenConstraint};
use crate::handle::{Shared, Submission, since};
use crate::pace::Pace;
use crate::record::{AfterPrompt, NewRequest, Record};
use crate::request::{Event, FinishReason, Pooling, Request, RequestError, TokenLogprobs, Usage};
use crate::scheduler::{Arrival, Plan, Scheduler, SequenceId};
use crate::stats::{RankShare, Stats, by_collective};
use crate::step::{Decide, Decision, Outcome};

/// How often an idle engine looks whether a rank is lost.
const IDLE_CHECK: Duration = Duration::from_millis(50);
/// Heartbeats of an idle engine within the timeout of collectives.
const HEARTBEATS: u32 = 4;
/// The shortest time between two reports of the ranks' shares.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// One sequence of a request.
#[derive(Default)]
struct Answer {
    constraint: Option<Box<dyn TokenConstraint>>,
    /// Why the constraint failed during the latest step.
    failed: Option<ConstraintError>,
    /// The scheduler knows the sequence.
    scheduled: bool,
    finished: bool,
    generated: usize,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    preemptions: usize,
}

/// A request that has not ended. It is named after its first sequence.
struct Active {
    events: async_channel::Sender<Event>,
    submitted: Instant,
    deadline: Option<Instant>,
    prompt_tokens: usize,
    max_tokens: usize,
    /// Ids that end a sequence, each with the reason.
    ends: Vec<(u32, FinishReason)>,
    started: Option<Instant>,
    cached_tokens: usize,
    answers: Vec<Answer>,
}

/// The state of rank 0.
pub(crate) struct Service {
    shared: Arc<Shared>,
    submissions: Receiver<Submission>,
    stream_limit: usize,
    scheduler: Scheduler,
    pace: Pace,
    requests: HashMap<SequenceId, Active>,
    /// The request of each sequence.
    owners: HashMap<SequenceId, SequenceId>,
    next_id: SequenceId,
    /// For the next record.
    arrived: Vec<NewRequest>,
    removed: Vec<SequenceId>,
    start: Instant,
    stats: Stats,
    last_report: Instant,
    generated_at_report: u64,
    busy_since_report: Duration,
}

/// A step to carry out.
pub(crate) struct Step {
    pub plan: Plan,
    pub record: Record,
    /// When planning began.
    pub begin: Instant,
}

impl Service {
    pub fn new(
        shared: Arc<Shared>,
        submissions: Receiver<Submission>,
        scheduler: Scheduler,
        pace: Pace,
        stream_limit: usize,
    ) -> Self {
        let start = Instant::now();
        let stats = Stats {
            pages: scheduler.pool().arenas() * scheduler.pool().pages_per_arena(),
            ..Stats::default()
        };
        Self {
            shared,
            submissions,
            stream_limit,
            scheduler,
            pace,
            requests: HashMap::new(),
            owners: HashMap::new(),
            next_id: 0,
            arrived: Vec::new(),
            removed: Vec::new(),
            start,
            stats,
            last_report: start,
            generated_at_report: 0,
            busy_since_report: Duration::ZERO,
        }
    }

    /// Waits for work and plans the next step; `None` if there will be no further request. Without
    /// work it sends heartbeats to the other ranks, which wait no longer than the timeout of
    /// collectives.
    ///
    /// # Errors
    ///
    /// When a rank is lost while there is no work.
    pub fn next(&mut self, comm: &dyn Communicator) -> Result<Option<Step>, CommError> {
        let interval = comm.timeout() / HEARTBEATS;
        let mut sent = Instant::now();
        loop {
            let open = self.take_submissions();
            self.drop_cancelled();
            if self.shared.aborted.load(Ordering::Relaxed) {
                self.fail_all("it was shut down");
                return Ok(None);
            }
            if !self.requests.is_empty() {
                return Ok(Some(self.plan()));
            }
            self.publish_stats();
            if !open {
                return Ok(None);
            }
            match self.submissions.recv_timeout(IDLE_CHECK.min(interval)) {
                Ok(submission) => self.add(submission),
                Err(RecvTimeoutError::Timeout) => comm.check()?,
                Err(RecvTimeoutError::Disconnected) => {}
            }
            if sent.elapsed() >= interval {
                Record { heartbeat: true, ..Record::default() }.send(comm)?;
                sent = Instant::now();
            }
        }
    }

    /// Takes all submitted requests; returns false if there will be no others.
    fn take_submissions(&mut self) -> bool {
        let closed = self.shared.closed.load(Ordering::Relaxed);
        loop {
            match self.submissions.try_recv() {
                Ok(submission) => self.add(submission),
                Err(TryRecvError::Empty) => return !closed,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn add(&mut self, submission: Submission) {
        let Submission { request, events, time } = submission;
        let id = self.next_id;
        let n = request.n as u64;
        self.next_id += n;
        self.owners.extend((id..id + n).map(|sequence| (sequence, id)));
        let Request { prompt, sampling, eos_token_ids, ignore_eos, prompt_logprobs, .. } = &request;
        let after_prompt = match request.pooling {
            Some(Pooling::LastToken) => AfterPrompt::HiddenState,
            None if request.max_tokens == 0 => AfterPrompt::Nothing,
            None => AfterPrompt::Tokens,
        };
        let mut ends = Vec::new();
        if !ignore_eos {
            ends.extend(eos_token_ids.iter().map(|id| (*id, FinishReason::EndOfSequence)));
        }
        ends.extend(sampling.stop_token_ids.iter().map(|id| (*id, FinishReason::StopToken(*id))));
        let mut params = sampling.clone();
        // All of them are excluded until there are `min_tokens`.
        params.stop_token_ids = ends.iter().map(|(id, _)| *id).collect();
        self.arrived.push(NewRequest {
            id,
            n: n as u32,
            prompt: prompt.clone(),
            params,
            prompt_logprobs: *prompt_logprobs,
            after_prompt,
            constrained: !request.constraints.is_empty(),
        });
        self.scheduler.add(Arrival {
            id,
            tokens: prompt.clone(),
            salt: request.cache_salt.clone(),
            priority: request.priority,
            time: since(self.start, time),
            all_logits: prompt_logprobs.is_some(),
        });
        let mut answers: Vec<Answer> = (0..n).map(|_| Answer::default()).collect();
        for (answer, constraint) in answers.iter_mut().zip(request.constraints) {
            answer.constraint = Some(constraint);
        }
        answers[0].scheduled = true;
        let active = Active {
            events,
            submitted: time,
            deadline: request.deadline.and_then(|deadline| time.checked_add(deadline)),
            prompt_tokens: request.prompt.len(),
            max_tokens: request.max_tokens,
            ends,
            started: None,
            cached_tokens: 0,
            answers,
        };
        self.requests.insert(id, active);
    }

    /// Ends requests whose reader is gone or too slow, or whose deadline has passed.
    fn drop_cancelled(&mut self) {
        let now = Instant::now();
        let ids: Vec<SequenceId> = self.requests.keys().copied().collect();
        for id in ids {
            let request = &self.requests[&id];
            let waiting = request.events.len();
            if request.events.is_closed() {
                self.stats.cancelled_requests += 1;
                self.forget(id);
            } else if waiting > self.stream_limit {
                let limit = self.stream_limit;
                self.fail(id, RequestError::SlowReader { events: waiting, limit });
            } else if request.deadline.is_some_and(|deadline| now >= deadline) {
                self.finish_all(id, FinishReason::Deadline);
            }
        }
    }

    /// Plans a step and writes its record.
    fn plan(&mut self) -> Step {
        let begin = Instant::now();
        let plan = self.scheduler.plan(self.pace.prompt_rows(self.scheduler.decoding()));
        let mut record = Record::of_plan(&plan);
        record.arrived = std::mem::take(&mut self.arrived);
        record.removed = std::mem::take(&mut self.removed);
        record.report = begin.duration_since(self.last_report) >= REPORT_INTERVAL;
        for placement in &plan.placed {
            let id = placement.id;
            let Some(request) = self.requests.get_mut(&id) else { continue };
            if request.started.is_none() {
                request.started = Some(begin);
                request.cached_tokens = placement.computed;
                self.stats.prompt_tokens += request.prompt_tokens as u64;
                self.stats.prefix_hit_tokens += placement.computed as u64;
                self.shared.dequeue(request.prompt_tokens);
                let queue_time = since(request.submitted, begin);
                let event = Event::Started { queue_time, cached_tokens: placement.computed };
                send(&request.events, event);
            }
        }
        for id in &plan.preempted {
            self.answer(*id).preemptions += 1;
        }
        Step { plan, record, begin }
    }

    /// Decides about the next tokens of constrained sequences.
    pub fn decide(&mut self) -> Decide<'_> {
        Box::new(|ids| ids.iter().map(|id| self.answer(*id).decide()).collect())
    }

    /// Takes the results of a step, and delivers them.
    pub fn take(&mut self, plan: &Plan, outcome: Outcome, planning: Duration, elapsed: Duration) {
        let begin = Instant::now();
        self.pace.record(plan.decoding, plan.prompt_rows(), elapsed);
        for span in &plan.spans {
            self.scheduler.computed(span.id, span.count);
        }
        self.deliver_scores(outcome.scores);
        for (id, row) in outcome.hidden {
            if let Some(request) = self.requests.get(&id) {
                send(&request.events, Event::Hidden(row));
            }
        }
        for id in outcome.stopped {
            match self.answer(id).failed.take() {
                Some(source) => {
                    let index = self.index(id);
                    self.fail(self.owners[&id], RequestError::Constraint { index, source });
                }
                None => self.finish(id, FinishReason::Constraint),
            }
        }
        // Sequences that start from the pages of another one come first, because they need its
        // pages as they are.
        let (started, starting): (Vec<_>, Vec<_>) =
            outcome.samples.into_iter().partition(|(id, _)| self.is_scheduled(*id));
        for (id, result) in starting.into_iter().chain(started) {
            self.take_token(id, result, begin);
        }
        for span in &plan.spans {
            let completed = self.requests.get(&span.id).is_some_and(|request| {
                request.max_tokens == 0 && self.scheduler.is_computed(span.id)
            });
            if completed {
                self.finish_all(span.id, FinishReason::Length);
            }
        }
        self.count(plan, (planning, outcome.forward, outcome.sampling, begin.elapsed()));
    }

    fn deliver_scores(&mut self, scores: Vec<(SequenceId, Result<TokenLogprobs, SamplingError>)>) {
        for scores in scores.chunk_by(|a, b| a.0 == b.0) {
            let id = scores[0].0;
            let scores: Result<Vec<_>, _> = scores.iter().map(|(_, score)| score.clone()).collect();
            match scores {
                Ok(scores) => {
                    if let Some(request) = self.requests.get(&id) {
                        send(&request.events, Event::PromptLogprobs(scores));
                    }
                }
                Err(error) => {
                    self.fail(id, RequestError::Sampling { index: 0, reason: error.to_string() });
                }
            }
        }
    }

    fn take_token(
        &mut self,
        id: SequenceId,
        result: Result<SampledToken, SamplingError>,
        now: Instant,
    ) {
        // The request may have failed because of another sequence of the same step.
        let Some(owner) = self.owners.get(&id).copied() else { return };
        let index = self.index(id);
        let token = match result {
            Ok(token) => token,
            Err(error) => {
                let reason = error.to_string();
                return self.fail(owner, RequestError::Sampling { index, reason });
            }
        };
        let answer = self.answer(id);
        let scheduled = std::mem::replace(&mut answer.scheduled, true);
        answer.generated += 1;
        answer.first_token.get_or_insert(now);
        answer.last_token = Some(now);
        let accepted = answer.constraint.as_mut().map_or(Ok(()), |rule| rule.accept(token.id));
        if scheduled {
            self.scheduler.push(id, token.id);
        } else {
            self.scheduler.fork(owner, id, token.id);
        }
        self.stats.generated_tokens += 1;
        let token_id = token.id;
        let event = Event::Token { index, id: token_id, logprob: token.logprob, top: token.top };
        let request = &self.requests[&owner];
        send(&request.events, event);
        if let Err(source) = accepted {
            return self.fail(owner, RequestError::Constraint { index, source });
        }
        let generated = request.answers[index].generated;
        let end = request.ends.iter().find(|(end, _)| *end == token_id);
        let context = self.shared.limits.context_length;
        let reason = if let Some((_, reason)) = end {
            *reason
        } else if generated == request.max_tokens {
            FinishReason::Length
        } else if request.prompt_tokens + generated > context {
            FinishReason::Context
        } else {
            return;
        };
        self.finish(id, reason);
    }

    fn is_scheduled(&self, id: SequenceId) -> bool {
        self.owners
            .get(&id)
            .is_some_and(|owner| self.requests[owner].answers[(id - owner) as usize].scheduled)
    }

    fn index(&self, id: SequenceId) -> usize {
        (id - self.owners[&id]) as usize
    }

    fn answer(&mut self, id: SequenceId) -> &mut Answer {
        let owner = self.owners[&id];
        let request = self.requests.get_mut(&owner).expect("an owner is an open request");
        &mut request.answers[(id - owner) as usize]
    }

    /// Ends all unfinished sequences of a request.
    fn finish_all(&mut self, owner: SequenceId, reason: FinishReason) {
        let n = self.requests[&owner].answers.len() as u64;
        for id in owner..owner + n {
            // The last one ends the request.
            let request = self.requests.get(&owner);
            if request.is_some_and(|request| !request.answers[(id - owner) as usize].finished) {
                self.finish(id, reason);
            }
        }
    }

    /// Ends a sequence, and with the last one its request.
    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        let owner = self.owners[&id];
        let index = self.index(id);
        self.answer(id).finished = true;
        let request = &self.requests[&owner];
        let usage = request.usage(index);
        send(&request.events, Event::Finished { index, reason, usage });
        let ended = request.answers.iter().all(|answer| answer.finished);
        if ended {
            self.forget(owner);
        } else {
            self.drop_sequence(id);
        }
    }

    fn fail(&mut self, owner: SequenceId, error: RequestError) {
        if let Some(request) = self.requests.get(&owner) {
            send(&request.events, Event::Failed(error));
            self.forget(owner);
        }
    }

    /// Fails all open requests, and those that are still submitted.
    pub fn fail_all(&mut self, reason: &str) {
        self.shared.closed.store(true, Ordering::Relaxed);
        self.take_submissions();
        let owners: Vec<_> = self.requests.keys().copied().collect();
        for owner in owners {
            self.fail(owner, RequestError::Engine { reason: reason.to_owned() });
        }
        self.publish_stats();
    }

    /// Forgets a request on all ranks.
    fn forget(&mut self, owner: SequenceId) {
        let request = self.requests.remove(&owner).expect("the request is open");
        if request.started.is_none() {
            self.shared.dequeue(request.prompt_tokens);
        }
        for id in owner..owner + request.answers.len() as u64 {
            self.drop_sequence(id);
            self.owners.remove(&id);
        }
        self.stats.finished_requests += 1;
    }

    fn drop_sequence(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        let before = self.arrived.len();
        self.arrived.retain(|request| request.id != id);
        if self.arrived.len() == before {
            self.removed.push(id);
        }
    }

    /// Takes the shares of all ranks, and the ledger of rank 0.
    pub fn report(&mut self, shares: Vec<RankShare>, comm: &dyn Communicator) {
        self.stats.collectives = by_collective(&comm.ledger().entries());
        let tokens = self.stats.generated_tokens - self.generated_at_report;
        self.stats.tokens_per_s = tokens as f64 / self.busy_since_report.as_secs_f64().max(1e-9);
        self.stats.ranks = shares;
        self.generated_at_report = self.stats.generated_tokens;
        self.busy_since_report = Duration::ZERO;
        self.last_report = Instant::now();
    }

    fn count(&mut self, plan: &Plan, parts: (Duration, Duration, Duration, Duration)) {
        let rows = plan.spans.iter().map(|span| span.count).sum();
        let (planning, forward, sampling, delivery) = parts;
        let stats = &mut self.stats;
        stats.steps += 1;
        stats.rows += rows as u64;
        stats.latest_rows = rows;
        stats.time.planning += planning;
        stats.time.forward += forward;
        stats.time.sampling += sampling;
        stats.time.delivery += delivery;
        self.busy_since_report += planning + forward + sampling + delivery;
        self.publish_stats();
    }

    fn publish_stats(&mut self) {
        let (running, waiting) = self.scheduler.counts();
        let (used, cached, evicted) = self.scheduler.pool().counts();
        let stats = &mut self.stats;
        stats.uptime = self.start.elapsed();
        (stats.running, stats.waiting) = (running, waiting);
        stats.preemptions = self.scheduler.preemptions();
        (stats.pages_used, stats.pages_cached, stats.pages_evicted) = (used, cached, evicted);
        let mut shared = self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner);
        shared.clone_from(stats);
    }
}

impl Active {
    fn usage(&self, index: usize) -> Usage {
        let answer = &self.answers[index];
        let now = Instant::now();
        let started = self.started.unwrap_or(now);
        let first = answer.first_token.unwrap_or(now);
        Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            generated_tokens: answer.generated,
            queue_time: since(self.submitted, started),
            prompt_time: since(started, first),
            decode_time: answer.last_token.map_or(Duration::ZERO, |last| since(first, last)),
            preemptions: answer.preemptions,
        }
    }
}

impl Answer {
    fn decide(&mut self) -> Decision {
        let Some(constraint) = &mut self.constraint else { return Decision::Any };
        match constraint.next() {
            Ok(Next::Any) => Decision::Any,
            Ok(Next::Mask(words)) => Decision::Mask(words.to_vec()),
            Ok(Next::Forced(id)) => Decision::Forced(id),
            Ok(Next::Stop) => Decision::Stop,
            Err(error) => {
                self.failed = Some(error);
                Decision::Stop
            }
        }
    }
}

/// Delivers an event. If the reader is gone, the request ends before the next step.
fn send(events: &async_channel::Sender<Event>, event: Event) {
    let _ = events.try_send(event);
}
