//! A model's answer, taken apart while it is generated: thinking, text and tool calls.
//!
//! Tool calls come in two forms. Qwen3 writes JSON, Qwen3-Coder and later models write tags:
//!
//! ```text
//! <tool_call>                                   <tool_call>
//! {"name": "f", "arguments": {"x": 1}}          <function=f>
//! </tool_call>                                  <parameter=x>
//!                                               1
//!                                               </parameter>
//!                                               </function>
//!                                               </tool_call>
//! ```
//!
//! The parser recognizes both by what follows `<tool_call>`. Text is held back only while it may be
//! the beginning of a tag, so the events do not depend on how the answer is cut into pieces, except
//! that neighbouring events of one kind may be joined.

mod json_call;
mod tagged_call;

use crate::json::Json;
use json_call::JsonCall;
use tagged_call::TaggedCall;

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerEvent {
    /// A piece of the thinking.
    Thinking(String),
    /// A piece of the text.
    Text(String),
    /// A call of a tool begins.
    CallStart {
        /// The number of the call in the answer, from 0.
        index: usize,
        /// The tool's name.
        name: String,
    },
    /// A piece of a call's arguments. The pieces of a call join to a JSON object.
    CallArguments {
        /// The number of the call.
        index: usize,
        /// A piece of JSON.
        json: String,
    },
    /// A call ends.
    CallEnd {
        /// The number of the call.
        index: usize,
        /// Whether the arguments are a JSON object. They are not if the answer ends inside of the
        /// call or the model writes invalid JSON.
        complete: bool,
    },
}

/// What the parser of an answer looks for.
#[derive(Clone, Debug, Default)]
pub struct AnswerOptions {
    /// Whether the prompt ends inside of the thinking: the template itself writes `<think>`.
    pub in_thinking: bool,
    /// Whether `<think>` begins the thinking.
    pub thinking: bool,
    /// The tools that the model may call. Without tools, `<tool_call>` is text.
    pub tools: Vec<Json>,
}

impl AnswerOptions {
    /// Options for the answer to a rendered prompt.
    pub fn for_prompt(prompt: &str, tools: Vec<Json>) -> Self {
        let in_thinking = prompt.trim_end_matches('\n').ends_with(THINK);
        Self { in_thinking, thinking: true, tools }
    }
}

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
pub(crate) const CALL: &str = "<tool_call>";
pub(crate) const CALL_END: &str = "</tool_call>";
const FUNCTION: &str = "<function=";

/// Takes an answer apart while it is generated.
#[derive(Debug)]
pub struct AnswerParser {
    options: AnswerOptions,
    state: State,
    /// Text that no event stands for yet.
    pending: String,
    calls: usize,
    events: Vec<AnswerEvent>,
}

#[derive(Debug)]
enum State {
    /// Before anything but white space.
    Start,
    /// `begun`: some thinking was seen, so line breaks are part of it.
    Thinking {
        begun: bool,
    },
    /// `begun`: white space belongs to the text. It does not after thinking and after a call.
    Text {
        begun: bool,
    },
    /// After `<tool_call>`, before it is known which form follows.
    Call,
    Json(JsonCall),
    Tagged(TaggedCall),
    /// After a call, until its closing tag.
    AfterCall,
}

impl AnswerParser {
    /// A parser at the beginning of an answer.
    pub fn new(options: AnswerOptions) -> Self {
        let state = match (options.in_thinking, options.thinking) {
            (true, _) => State::Thinking { begun: false },
            (false, true) => State::Start,
            (false, false) => State::Text { begun: true },
        };
        Self { options, state, pending: String::new(), calls: 0, events: Vec::new() }
    }

    /// Whether the answer is still in its thinking.
    pub fn is_thinking(&self) -> bool {
        matches!(self.state, State::Thinking { .. })
    }

    /// Takes a piece of the answer and returns what it completes.
    pub fn push(&mut self, piece: &str) -> Vec<AnswerEvent> {
        self.pending.push_str(piece);
        while self.step(false) {}
        std::mem::take(&mut self.events)
    }

    /// Ends the answer and returns what was held back.
    pub fn finish(mut self) -> Vec<AnswerEvent> {
        while self.step(true) {}
        match std::mem::replace(&mut self.state, State::Start) {
            State::Call => self.text(CALL),
            State::Json(call) if !call.started() => {
                let raw = format!("{CALL}{}", call.raw());
                self.text(&raw);
            }
            State::Json(_) | State::Tagged(_) => self.end_call(false),
            _ => {}
        }
        self.events
    }

    /// Handles pending text in the current state; returns whether the state changed.
    fn step(&mut self, at_end: bool) -> bool {
        match &mut self.state {
            State::Start => {
                let rest = self.pending.trim_start();
                if let Some(rest) = rest.strip_prefix(THINK) {
                    self.pending = rest.to_owned();
                    self.state = State::Thinking { begun: false };
                } else if THINK.starts_with(rest) && !at_end {
                    return false;
                } else {
                    self.state = State::Text { begun: true };
                }
                true
            }
            State::Thinking { begun } => {
                if !*begun {
                    self.pending = self.pending.trim_start_matches('\n').to_owned();
                    *begun = !self.pending.is_empty();
                }
                if let Some((before, after)) = self.pending.split_once(THINK_END) {
                    let (before, after) =
                        (before.trim_end_matches('\n').to_owned(), after.to_owned());
                    self.pending = after;
                    self.state = State::Text { begun: false };
                    self.thinking(&before);
                    return true;
                }
                let kept = held(&self.pending, &[THINK_END], |c| c == '\n', at_end);
                let ready: String = self.pending.drain(..self.pending.len() - kept).collect();
                self.thinking(&ready);
                false
            }
            State::Text { begun } => {
                if !*begun {
                    self.pending = self.pending.trim_start().to_owned();
                    *begun = !self.pending.is_empty();
                }
                if self.options.tools.is_empty() {
                    let ready = std::mem::take(&mut self.pending);
                    self.text(&ready);
                    return false;
                }
                let found = [CALL, FUNCTION].iter().filter_map(|tag| self.pending.find(tag)).min();
                if let Some(at) = found {
                    let before = self.pending[..at].trim_end().to_owned();
                    self.pending.drain(..at);
                    self.state = match self.pending.strip_prefix(CALL) {
                        Some(rest) => {
                            self.pending = rest.to_owned();
                            State::Call
                        }
                        None => State::Tagged(TaggedCall::new()),
                    };
                    self.text(&before);
                    return true;
                }
                let kept = held(&self.pending, &[CALL, FUNCTION], char::is_whitespace, at_end);
                let ready: String = self.pending.drain(..self.pending.len() - kept).collect();
                self.text(&ready);
                false
            }
            State::Call => {
                let rest = self.pending.trim_start();
                if rest.starts_with(FUNCTION) {
                    self.pending = rest.to_owned();
                    self.state = State::Tagged(TaggedCall::new());
                } else if rest.starts_with('{') {
                    self.state = State::Json(JsonCall::default());
                } else if FUNCTION.starts_with(rest) {
                    // At the end, `finish` makes the tag text.
                    if at_end && !self.pending.is_empty() {
                        let raw = format!("{CALL}{}", std::mem::take(&mut self.pending));
                        self.state = State::Text { begun: true };
                        self.text(&raw);
                    }
                    return false;
                } else {
                    self.state = State::Text { begun: true };
                    self.text(CALL);
                }
                true
            }
            State::Json(call) => {
                let taken = call.push(&self.pending);
                self.pending.drain(..taken.length);
                let index = self.calls;
                if let Some(name) = taken.name {
                    self.events.push(AnswerEvent::CallStart { index, name });
                }
                if !taken.arguments.is_empty() {
                    self.events.push(AnswerEvent::CallArguments { index, json: taken.arguments });
                }
                let (started, raw) = (call.started(), call.raw().to_owned());
                match taken.end {
                    None => false,
                    Some(complete) if started => {
                        self.end_call(complete);
                        self.state = State::AfterCall;
                        true
                    }
                    Some(_) => {
                        self.state = State::Text { begun: true };
                        self.text(&format!("{CALL}{raw}"));
                        true
                    }
                }
            }
            State::Tagged(call) => {
                let (events, ended) = call.push(&mut self.pending, self.calls, &self.options.tools);
                self.events.extend(events);
                if let Some(complete) = ended {
                    self.end_call(complete);
                    self.state = State::AfterCall;
                }
                ended.is_some()
            }
            State::AfterCall => {
                let rest = self.pending.trim_start();
                if let Some(rest) = rest.strip_prefix(CALL_END) {
                    self.pending = rest.to_owned();
                    self.state = State::Text { begun: false };
                } else if CALL_END.starts_with(rest) && !at_end {
                    return false;
                } else {
                    self.state = State::Text { begun: false };
                }
                true
            }
        }
    }

    fn thinking(&mut self, piece: &str) {
        if !piece.is_empty() {
            self.events.push(AnswerEvent::Thinking(piece.to_owned()));
        }
    }

    fn text(&mut self, piece: &str) {
        if !piece.is_empty() {
            self.events.push(AnswerEvent::Text(piece.to_owned()));
        }
    }

    fn end_call(&mut self, complete: bool) {
        self.events.push(AnswerEvent::CallEnd { index: self.calls, complete });
        self.calls += 1;
    }
}

/// How many bytes at the end of `text` wait for the next piece: the beginning of one of `tags`, and
/// before it characters that a tag would swallow.
pub(crate) fn held(
    text: &str,
    tags: &[&str],
    swallowed: impl Fn(char) -> bool,
    at_end: bool,
) -> usize {
    if at_end {
        return 0;
    }
    let begins = |length: &usize| {
        let start = text.len() - length;
        text.is_char_boundary(start) && tags.iter().any(|tag| tag.starts_with(&text[start..]))
    };
    let longest = tags.iter().map(|tag| tag.len() - 1).max().unwrap_or(0).min(text.len());
    let tag = (1..=longest).rev().find(begins).unwrap_or(0);
    text.len() - text[..text.len() - tag].trim_end_matches(swallowed).len()
}

#[cfg(test)]
mod tests;
