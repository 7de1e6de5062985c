//! `generate --jsonl`: many requests from a file, one per line, together in the engine.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

use engine::{EngineHandle, Event, Stream, Usage};
use qwen3_model::SamplingParams;
use qwen3_model::generation_config::GenerationConfig;
use qwen3_text::{ChatTemplate, ControlTokens, Conversation, Json, Tokenizer};
use ranks::print;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::answer::{AnswerOptions, stop_word};
use crate::failure::CliError;
use crate::options::SamplingOptions;

/// Requests that are with the engine at the same time.
const TOGETHER: usize = 256;

/// One line of the file. What it does not set is as the command line says.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    /// Returned with the result.
    id: Option<Value>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    tokens: Option<Vec<u32>>,
    max_new_tokens: Option<usize>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    seed: Option<u64>,
    ignore_eos: Option<bool>,
}

/// Turns lines into requests and answers into lines.
pub struct Lines<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    pub control: ControlTokens,
    /// A prompt is a user's message; `Some(false)` means "do not think".
    pub chat: Option<Option<bool>>,
    /// The checkpoint's defaults for requests with a temperature.
    pub generation: GenerationConfig,
    pub sampling: &'a SamplingOptions,
    pub options: AnswerOptions,
}

/// A line that was read, with the request's stream or why there is none.
struct Pending {
    id: Value,
    stream: Result<Stream, String>,
}

/// Reads the requests in `file` and prints one result per line, in the same order: an answer, or
/// `{"id","error"}`. Returns the number of requests and of errors. `progress` is told how many
/// requests of how many are done.
pub fn run(
    file: &Path,
    lines: &Lines<'_>,
    handle: &EngineHandle,
    progress: impl Fn(u64, u64),
) -> Result<(u64, u64), CliError> {
    let failed = |source| CliError::file(file, source);
    let open = || File::open(file).map(BufReader::new).map_err(failed);
    let filled =
        |line: &std::io::Result<String>| line.as_ref().map_or(true, |line| !line.trim().is_empty());
    // A pipe can be read only once; its number of lines is not known before.
    let regular = std::fs::metadata(file).map_err(failed)?.is_file();
    let total = if regular { open()?.lines().filter(filled).count() as u64 } else { 0 };
    let mut input = open()?.lines().filter(filled);
    let mut pending = VecDeque::new();
    let (mut done, mut errors) = (0, 0);
    loop {
        while pending.len() < TOGETHER {
            let Some(line) = input.next() else { break };
            let number = done + pending.len() as u64;
            pending.push_back(lines.submit(&line.map_err(failed)?, number, handle));
        }
        let Some(Pending { id, stream }) = pending.pop_front() else { return Ok((done, errors)) };
        let result = match stream.and_then(|stream| lines.answer(&id, &stream)) {
            Ok(result) => result,
            Err(error) => {
                errors += 1;
                json!({ "id": id, "error": error })
            }
        };
        print(&format!("{result}\n"))?;
        done += 1;
        progress(done, total.max(done));
    }
}

impl Lines<'_> {
    /// Submits the request of a line. Without an id of its own it has its number, from 0.
    fn submit(&self, line: &str, number: u64, handle: &EngineHandle) -> Pending {
        let line: Line = match serde_json::from_str(line) {
            Ok(line) => line,
            Err(error) => return Pending { id: number.into(), stream: Err(error.to_string()) },
        };
        let id = line.id.clone().unwrap_or_else(|| number.into());
        let stream = self.tokens(&line).and_then(|tokens| {
            let options = self.options_of(&line).map_err(|error| error.to_string())?;
            handle.submit(options.request(&tokens)).map_err(|error| error.to_string())
        });
        Pending { id, stream }
    }

    /// The tokens of a line's prompt.
    fn tokens(&self, line: &Line) -> Result<Vec<u32>, String> {
        let of_chat = |chat: &Conversation| {
            let template = self.template.ok_or("the checkpoint has no chat template")?;
            let prompt = template.prompt(self.tokenizer, chat, self.control);
            prompt.map(|prompt| prompt.tokens).map_err(|error| error.to_string())
        };
        match (&line.prompt, &line.messages, &line.tokens) {
            (Some(words), None, None) => match (self.chat, self.control) {
                (Some(thinking), _) => of_chat(&Conversation::question(words, thinking)),
                (None, ControlTokens::Trusted) => {
                    self.tokenizer.encode(words).map_err(|error| error.to_string())
                }
                (None, ControlTokens::Literal) => {
                    self.tokenizer.encode_literal(words).map_err(|error| error.to_string())
                }
            },
            (None, Some(messages), None) => {
                let messages = messages.iter().cloned().map(Json::from).collect();
                of_chat(&Conversation::new(messages, self.chat.flatten()))
            }
            (None, None, Some(tokens)) => Ok(tokens.clone()),
            _ => Err("expected exactly one of prompt, messages and tokens".to_owned()),
        }
    }

    fn options_of(&self, line: &Line) -> Result<AnswerOptions, CliError> {
        let mut options = self.options.clone();
        let base = match line.temperature.or(self.sampling.temperature) {
            Some(heat) if heat > 0.0 => {
                SamplingParams::recommended(&self.generation, Some(heat), 0)
            }
            _ => SamplingParams::default(),
        };
        options.sampling = self.sampling.over(base)?;
        let sampling = &mut options.sampling;
        fn set<T: Copy>(value: &mut T, given: Option<T>) {
            *value = given.unwrap_or(*value);
        }
        set(&mut sampling.temperature, line.temperature);
        set(&mut sampling.top_k, line.top_k);
        set(&mut sampling.top_p, line.top_p);
        set(&mut sampling.min_p, line.min_p);
        set(&mut sampling.repetition_penalty, line.repetition_penalty);
        set(&mut sampling.presence_penalty, line.presence_penalty);
        set(&mut sampling.frequency_penalty, line.frequency_penalty);
        set(&mut sampling.seed, line.seed);
        set(&mut options.max_new_tokens, line.max_new_tokens);
        set(&mut options.ignore_eos, line.ignore_eos);
        Ok(options)
    }

    /// Reads an answer to its end.
    fn answer(&self, id: &Value, stream: &Stream) -> Result<Value, String> {
        let mut ids = Vec::new();
        while let Some(event) = stream.recv_blocking() {
            match event {
                Event::Token { id, .. } => ids.push(id),
                Event::Finished { reason, usage, .. } => {
                    let Usage { prompt_tokens, cached_tokens, .. } = usage;
                    let text = self.tokenizer.decode(&ids);
                    return Ok(json!({
                        "id": id,
                        "prompt_tokens": prompt_tokens,
                        "cached_tokens": cached_tokens,
                        "ids": ids,
                        "text": text,
                        "stop": stop_word(Some(reason)),
                    }));
                }
                Event::Failed(error) => return Err(error.to_string()),
                _ => {}
            }
        }
        Err("the engine ended before the answer".to_owned())
    }
}
