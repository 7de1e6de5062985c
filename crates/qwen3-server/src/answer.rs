//! One answer: tokens from the engine become thinking, text and calls.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{Event, FinishReason, Stream, TokenLogprobs, Usage};
use qwen3_text::{AnswerEvent, AnswerOptions, AnswerParser, Detokenizer, StopStrings};

use crate::error::ApiError;
use crate::record::Record;
use crate::service::{ServedModel, Service};

/// What an answer gets from the engine and how it is read.
pub struct Job {
    /// What the engine computes.
    pub request: engine::Request,
    /// Texts that end a sequence.
    pub stops: Vec<String>,
    /// How thinking and calls are found; without it, everything is text.
    pub parse: Option<AnswerOptions>,
    /// Ends a sequence after its first call.
    pub one_call: bool,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Delta {
    /// More thinking.
    Thinking(String),
    /// More text.
    Text(String),
    /// A call begins.
    CallStart {
        /// Which call of the sequence.
        call: usize,
        /// The function.
        name: String,
    },
    /// More of a call's arguments, as JSON text.
    CallArguments {
        /// Which call of the sequence.
        call: usize,
        /// The text.
        text: String,
    },
}

/// Why a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The model ended it.
    End,
    /// A stop text.
    StopText(String),
    /// One of the request's stop ids.
    StopToken(u32),
    /// A limit on tokens or time.
    Length,
    /// It ended after calls.
    ToolCalls,
}

impl Reason {
    /// The word of OpenAI's APIs.
    pub fn openai(&self) -> &'static str {
        match self {
            Self::End | Self::StopText(_) | Self::StopToken(_) => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }

    /// The stop text or id, where one ended the answer.
    pub fn stop(&self) -> Option<serde_json::Value> {
        match self {
            Self::StopText(text) => Some(text.clone().into()),
            Self::StopToken(id) => Some((*id).into()),
            _ => None,
        }
    }
}

/// The end of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// Why it ended.
    pub reason: Reason,
    /// What it took.
    pub usage: Usage,
    /// Tokens of thinking.
    pub thinking_tokens: usize,
}

/// What is new of one sequence. A piece has deltas or an end, or both.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// The sequence, `0..n`.
    pub index: usize,
    /// What is added, in order.
    pub deltas: Vec<Delta>,
    /// Ids of the tokens since the last piece.
    pub ids: Vec<u32>,
    /// Their log-probabilities, if they were asked for. A token that ends the sequence has none.
    pub logprobs: Vec<TokenLogprobs>,
    /// The end, in the last piece of the sequence.
    pub end: Option<End>,
}

/// An answer that the engine computes. Dropping it ends the computation within a step.
pub struct Answer {
    service: Arc<Service>,
    model: Arc<ServedModel>,
    record: Arc<Record>,
    stream: Stream,
    sequences: Vec<Sequence>,
    /// Pieces that are not delivered yet.
    ready: VecDeque<Piece>,
    one_call: bool,
    min_tokens: usize,
    /// Ids that end a sequence; they are no part of its text.
    ending: Vec<u32>,
    submitted: Instant,
    started: Option<Instant>,
    usage: Usage,
    /// Log-probabilities of prompt tokens from the second on, if they were asked for.
    pub prompt_logprobs: Vec<TokenLogprobs>,
}

/// The state of one sequence.
struct Sequence {
    detokenizer: Option<Detokenizer>,
    parser: Option<AnswerParser>,
    stops: StopStrings,
    /// The same before any text.
    new_stops: StopStrings,
    /// The stop texts, for naming the one that was found.
    stop_texts: Arc<Vec<String>>,
    piece: Piece,
    generated: usize,
    thinking_tokens: usize,
    /// Calls that began.
    calls: usize,
    first: Option<Instant>,
    last: Option<Instant>,
    ended: bool,
}

impl Answer {
    /// Submits a job.
    pub fn submit(
        service: &Arc<Service>,
        model: &Arc<ServedModel>,
        record: &Arc<Record>,
        job: Job,
    ) -> Result<Self, ApiError> {
        let stops = StopStrings::new(job.stops.clone())
            .map_err(|error| ApiError::param("stop", error.to_string()))?;
        let n = job.request.n;
        let prompt_tokens = job.request.prompt.len();
        let min_tokens = job.request.sampling.min_tokens;
        let mut ending = job.request.sampling.stop_token_ids.clone();
        if !job.request.ignore_eos {
            ending.extend(&job.request.eos_token_ids);
        }
        if service.log_text {
            let prompt = model.tokenizer.decode(&job.request.prompt);
            tracing::info!(request_id = record.id(), prompt, "prompt");
        }
        let stream = model.engine.submit(job.request)?;
        service.metrics.prompt_tokens.inc_by(prompt_tokens as u64);
        record.prompt(prompt_tokens);
        let stop_texts = Arc::new(job.stops);
        let sequence = |index| Sequence {
            detokenizer: Some(model.tokenizer.detokenizer()),
            parser: job.parse.clone().map(AnswerParser::new),
            stops: stops.clone(),
            new_stops: stops.clone(),
            stop_texts: Arc::clone(&stop_texts),
            piece: Piece { index, ..Piece::default() },
            generated: 0,
            thinking_tokens: 0,
            calls: 0,
            first: None,
            last: None,
            ended: false,
        };
        Ok(Self {
            service: Arc::clone(service),
            model: Arc::clone(model),
            record: Arc::clone(record),
            stream,
            sequences: (0..n).map(sequence).collect(),
            ready: VecDeque::new(),
            one_call: job.one_call,
            min_tokens,
            ending,
            submitted: Instant::now(),
            started: None,
            usage: Usage { prompt_tokens, ..Usage::default() },
            prompt_logprobs: Vec::new(),
        })
    }

    /// The next piece of any sequence; `None` after the end of all.
    pub async fn next(&mut self) -> Result<Option<Piece>, ApiError> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Ok(Some(piece));
            }
            if self.sequences.iter().all(|sequence| sequence.ended) {
                return Ok(None);
            }
            match self.stream.recv().await {
                Some(event) => self.take(event)?,
                None => {
                    return Err(ApiError::new(
                        axum::http::StatusCode::INTERNAL_SERVER_ERROR,
                        "the engine ended before the answer",
                    ));
                }
            }
        }
    }

    fn take(&mut self, event: Event) -> Result<(), ApiError> {
        let now = Instant::now();
        match event {
            Event::Started { queue_time, cached_tokens } => {
                self.started = Some(now);
                self.usage.queue_time = queue_time;
                self.usage.cached_tokens = cached_tokens;
                self.service.metrics.request_queue_time.observe(queue_time.as_secs_f64());
            }
            Event::PromptLogprobs(tokens) => self.prompt_logprobs.extend(tokens),
            Event::Token { index, id, logprob, top } => {
                let logprobs = logprob.map(|logprob| TokenLogprobs { id, logprob, top });
                self.token(index, id, logprobs, now);
            }
            Event::Finished { index, reason, usage } => {
                // One that a stop text ended is done already.
                if !self.sequences[index].ended {
                    let sequence = &mut self.sequences[index];
                    sequence.finish_text();
                    let reason = match reason {
                        FinishReason::EndOfSequence | FinishReason::Constraint
                            if sequence.calls > 0 =>
                        {
                            Reason::ToolCalls
                        }
                        FinishReason::EndOfSequence | FinishReason::Constraint => Reason::End,
                        FinishReason::StopToken(id) => Reason::StopToken(id),
                        _ => Reason::Length,
                    };
                    self.end(index, reason, usage);
                }
            }
            Event::Failed(error) => {
                self.record.finish("error");
                return Err(error.into());
            }
            Event::Hidden(_) => {}
        }
        Ok(())
    }

    fn token(&mut self, index: usize, id: u32, logprobs: Option<TokenLogprobs>, now: Instant) {
        let metrics = &self.service.metrics;
        let first_of_all = self.sequences.iter().all(|sequence| sequence.first.is_none());
        let sequence = &mut self.sequences[index];
        if sequence.ended {
            return;
        }
        metrics.generation_tokens.inc();
        self.record.token();
        if first_of_all {
            metrics.time_to_first_token.observe((now - self.submitted).as_secs_f64());
        }
        if let Some(last) = sequence.last {
            metrics.inter_token_latency.observe((now - last).as_secs_f64());
        }
        sequence.first.get_or_insert(now);
        sequence.last = Some(now);
        sequence.generated += 1;
        sequence.piece.ids.push(id);
        if self.ending.contains(&id) {
            // `Finished` follows.
            return;
        }
        sequence.piece.logprobs.extend(logprobs);
        if sequence.parser.as_ref().is_some_and(AnswerParser::is_thinking) {
            sequence.thinking_tokens += 1;
        }
        let watch_stops = sequence.generated > self.min_tokens;
        let text = match &mut sequence.detokenizer {
            Some(detokenizer) => detokenizer.push(id),
            None => String::new(),
        };
        let parsed = match &mut sequence.parser {
            Some(parser) => parser.push(&text),
            None => vec![AnswerEvent::Text(text)],
        };
        let reason = sequence.add(parsed, watch_stops, self.one_call);
        if let Some(reason) = reason {
            let usage = self.usage_so_far(index);
            self.end(index, reason, usage);
        } else if !self.sequences[index].piece.deltas.is_empty() {
            self.deliver(index);
        }
    }

    /// What a sequence took that ends before the engine says so.
    fn usage_so_far(&self, index: usize) -> Usage {
        let sequence = &self.sequences[index];
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from),
            _ => Duration::ZERO,
        };
        Usage {
            generated_tokens: sequence.generated,
            prompt_time: between(self.started, sequence.first),
            decode_time: between(sequence.first, sequence.last),
            ..self.usage
        }
    }

    fn end(&mut self, index: usize, reason: Reason, usage: Usage) {
        self.service.metrics.finished(reason.openai(), self.submitted.elapsed());
        self.record.finish(reason.openai());
        let sequence = &mut self.sequences[index];
        let thinking_tokens = sequence.thinking_tokens;
        sequence.ended = true;
        sequence.piece.end = Some(End { reason, usage, thinking_tokens });
        self.deliver(index);
    }

    fn deliver(&mut self, index: usize) {
        let next = Piece { index, ..Piece::default() };
        self.ready.push_back(std::mem::replace(&mut self.sequences[index].piece, next));
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.sequences.iter().all(|sequence| sequence.ended) {
            self.service.metrics.finished("abort", self.submitted.elapsed());
            self.record.finish("abort");
        }
    }
}

impl Sequence {
    /// Adds what was parsed to the piece. Returns why the sequence ends here, if it does.
    fn add(
        &mut self,
        parsed: Vec<AnswerEvent>,
        watch_stops: bool,
        one_call: bool,
    ) -> Option<Reason> {
        for event in parsed {
            match event {
                AnswerEvent::Text(text) if watch_stops => {
                    let text = self.stops.push(&text);
                    self.text(text);
                    if let Some(at) = self.stops.stopped() {
                        return Some(Reason::StopText(self.stop_texts[at].clone()));
                    }
                }
                AnswerEvent::Text(text) => self.text(text),
                AnswerEvent::Thinking(text) => match self.piece.deltas.last_mut() {
                    Some(Delta::Thinking(last)) => last.push_str(&text),
                    _ => self.piece.deltas.push(Delta::Thinking(text)),
                },
                AnswerEvent::CallStart { index: call, name } => {
                    let held = self.release();
                    self.text(held);
                    self.piece.deltas.push(Delta::CallStart { call, name });
                    self.calls += 1;
                }
                AnswerEvent::CallArguments { index: call, json } => {
                    match self.piece.deltas.last_mut() {
                        Some(Delta::CallArguments { text, .. }) => text.push_str(&json),
                        _ => self.piece.deltas.push(Delta::CallArguments { call, text: json }),
                    }
                }
                AnswerEvent::CallEnd { .. } if one_call => return Some(Reason::ToolCalls),
                AnswerEvent::CallEnd { .. } => {}
            }
        }
        None
    }

    /// The text that was held back because it may have been the beginning of a stop text.
    fn release(&mut self) -> String {
        std::mem::replace(&mut self.stops, self.new_stops.clone()).finish()
    }

    fn text(&mut self, text: String) {
        if text.is_empty() {
            return;
        }
        match self.piece.deltas.last_mut() {
            Some(Delta::Text(last)) => last.push_str(&text),
            _ => self.piece.deltas.push(Delta::Text(text)),
        }
    }

    /// Adds what was held back, when no more tokens come.
    fn finish_text(&mut self) {
        let rest = self.detokenizer.take().map_or_else(String::new, Detokenizer::finish);
        let parsed = match self.parser.take() {
            Some(mut parser) => {
                let mut parsed = parser.push(&rest);
                parsed.extend(parser.finish());
                parsed
            }
            None => vec![AnswerEvent::Text(rest)],
        };
        self.add(parsed, true, false);
        let held = self.release();
        self.text(held);
    }
}

/// A stretch of an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// Thinking.
    Thinking(String),
    /// Text.
    Text(String),
    /// A call.
    Call {
        /// The function.
        name: String,
        /// Its arguments, as JSON text.
        arguments: String,
    },
}

/// A sequence of an answer, whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Whole {
    /// Thinking, text and calls, in order.
    pub parts: Vec<Part>,
    /// All ids, with the one that ended it.
    pub ids: Vec<u32>,
    /// Log-probabilities of the ids, except the one that ended it.
    pub logprobs: Vec<TokenLogprobs>,
    /// The end.
    pub end: Option<End>,
}

impl Whole {
    /// Adds a piece. A streamed answer is the same pieces, one at a time.
    pub fn add(&mut self, piece: Piece) {
        for delta in piece.deltas {
            match (delta, self.parts.last_mut()) {
                (Delta::Thinking(text), Some(Part::Thinking(last)))
                | (Delta::Text(text), Some(Part::Text(last)))
                | (Delta::CallArguments { text, .. }, Some(Part::Call { arguments: last, .. })) => {
                    last.push_str(&text)
                }
                (Delta::Thinking(text), _) => self.parts.push(Part::Thinking(text)),
                (Delta::Text(text), _) => self.parts.push(Part::Text(text)),
                (Delta::CallStart { name, .. }, _) => {
                    self.parts.push(Part::Call { name, arguments: String::new() });
                }
                // Arguments without a call do not occur.
                (Delta::CallArguments { .. }, _) => {}
            }
        }
        self.ids.extend(piece.ids);
        self.logprobs.extend(piece.logprobs);
        self.end = self.end.take().or(piece.end);
    }

    /// All text.
    pub fn text(&self) -> String {
        let text = self.parts.iter().filter_map(|part| match part {
            Part::Text(text) => Some(&**text),
            _ => None,
        });
        text.collect()
    }

    /// All thinking.
    pub fn thinking(&self) -> String {
        let thinking = self.parts.iter().filter_map(|part| match part {
            Part::Thinking(text) => Some(&**text),
            _ => None,
        });
        thinking.collect()
    }

    /// Functions and arguments of all calls.
    pub fn calls(&self) -> impl Iterator<Item = (&str, &str)> {
        self.parts.iter().filter_map(|part| match part {
            Part::Call { name, arguments } => Some((&**name, &**arguments)),
            _ => None,
        })
    }

    /// The end; every sequence of a complete answer has one.
    pub fn end(&self) -> End {
        self.end.clone().unwrap_or(End {
            reason: Reason::Length,
            usage: Usage::default(),
            thinking_tokens: 0,
        })
    }
}

impl Answer {
    /// Waits for all sequences.
    pub async fn whole(&mut self) -> Result<Vec<Whole>, ApiError> {
        let mut all = vec![Whole::default(); self.sequences.len()];
        while let Some(piece) = self.next().await? {
            all[piece.index].add(piece);
        }
        Ok(all)
    }
}

impl Answer {
    /// The model that computes it.
    pub fn model(&self) -> &Arc<ServedModel> {
        &self.model
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Tokens so far.
    pub fn usage(&self) -> crate::protocol::answer::Usage {
        let generated = self.sequences.iter().map(|sequence| sequence.generated).sum();
        let thinking = self.sequences.iter().map(|sequence| sequence.thinking_tokens).sum();
        let Usage { prompt_tokens, cached_tokens, .. } = self.usage;
        crate::protocol::answer::Usage::new(prompt_tokens, cached_tokens, generated, thinking)
    }
}
