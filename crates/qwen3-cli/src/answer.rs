//! One answer of the model, shown as it comes.

use std::ops::ControlFlow;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{panic, thread};

use qwen3_model::generation::{Generated, Progress, StopReason};
use qwen3_model::generation_config::eos_token_ids;
use qwen3_model::{GenerateParams, Model, SamplingParams, Sequence, generate};
use qwen3_text::{Detokenizer, Tokenizer};
use ranks::{Failure, Rank, RankError, print};

use crate::ctrl_c;
use crate::empty_thought::EmptyThought;
use crate::failure::CliError;
use crate::options::EngineOptions;

/// How answers are made.
#[derive(Clone, Debug)]
pub struct AnswerOptions {
    /// How tokens are chosen, and when an answer ends.
    pub params: GenerateParams,
    /// Nothing is shown before the end.
    pub quiet: bool,
    /// A thought without content at the start of an answer is not shown.
    pub hide_empty_thought: bool,
}

impl AnswerOptions {
    /// Answers of at most `max_new_tokens` tokens. They end at the tokens that end a text: those of
    /// `generation_config.json`, else of `config.json`.
    pub fn new(
        rank: &Rank,
        model: &Model,
        engine: &EngineOptions,
        sampling: SamplingParams,
        max_new_tokens: usize,
    ) -> Result<Self, Failure> {
        // Rank 0's count: the files of others may be of another day.
        let eos_token_ids =
            rank.broadcast(|| Ok(eos_token_ids(&*engine.model.open()?, model.config())?))?;
        let prefill_chunk = engine.chunk;
        let params = GenerateParams {
            sampling,
            max_new_tokens,
            eos_token_ids,
            ignore_eos: false,
            prefill_chunk,
        };
        Ok(Self { params, quiet: false, hide_empty_thought: false })
    }
}

/// One answer, whole.
#[derive(Debug)]
pub struct Answer {
    /// The tokens, with the one that ended the answer, and what they took.
    pub generated: Generated,
    /// Their text on rank 0, without special tokens.
    pub text: String,
}

impl Answer {
    /// Computes and shows the answer to `tokens`, of which the first `cache.len()` are in the
    /// cache. All ranks call it; rank 0 alone has `text`, and without it shows ids.
    pub fn write(
        rank: &Rank,
        model: &Model,
        cache: &mut Sequence,
        tokens: &[u32],
        text: Option<&Tokenizer>,
        options: &AnswerOptions,
    ) -> Result<Self, Failure> {
        let mut screen = Screen::new(rank, text, options);
        let generated =
            generate(model, cache, tokens, &options.params, &mut |progress| screen.show(progress))
                .map_err(Failure::agreed)?;
        let text = rank.agree_after(|| Ok(screen.finish(&generated.ids)?))?;
        Ok(Self { generated, text })
    }
}

/// Why an answer ended, as the JSON of `generate` has it.
pub fn stop_word(stop: StopReason) -> &'static str {
    match stop {
        StopReason::EndOfSequence => "end",
        StopReason::MaxNewTokens => "limit",
        StopReason::ContextFull => "context",
        StopReason::Callback => "stopped",
    }
}

/// Where the answer appears, on rank 0.
struct Screen<'a> {
    rank: &'a Rank,
    text: Option<&'a Tokenizer>,
    stream: Option<Detokenizer>,
    filter: Option<EmptyThought>,
    quiet: bool,
    writer: Option<Writer>,
    /// The first thing that went wrong; it ends the answer on all ranks.
    result: Result<(), CliError>,
}

impl<'a> Screen<'a> {
    fn new(rank: &'a Rank, text: Option<&'a Tokenizer>, options: &AnswerOptions) -> Self {
        let quiet = options.quiet;
        let others_wait = rank.is_root() && rank.comm().size() > 1 && !quiet;
        let (writer, result) = match others_wait.then(Writer::start).transpose() {
            Ok(writer) => (writer, Ok(())),
            Err(error) => (None, Err(error)),
        };
        let stream = text.map(Tokenizer::detokenizer);
        let filter = options.hide_empty_thought.then(EmptyThought::default);
        Self { rank, text, stream, filter, quiet, writer, result }
    }

    fn show(&mut self, progress: Progress) -> ControlFlow<()> {
        if let Progress::Token(id) = progress
            && self.result.is_ok()
            && !self.quiet
        {
            let words = match &mut self.stream {
                Some(stream) => Ok(stream.push(id)),
                None => Ok(format!("{id} ")),
            };
            self.result = words.and_then(|words| {
                let shown = self.filter.as_mut().map(|filter| filter.push(&words));
                self.print(shown.unwrap_or(words))
            });
        }
        if self.result.is_err() || ctrl_c::pressed() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }

    fn print(&mut self, words: String) -> Result<(), CliError> {
        match &mut self.writer {
            Some(writer) => writer.write(words),
            None => Ok(self.rank.print(&words)?),
        }
    }

    /// Shows what is left, however long that takes; returns the whole text.
    fn finish(mut self, ids: &[u32]) -> Result<String, CliError> {
        std::mem::replace(&mut self.result, Ok(()))?;
        if let Some(stream) = self.stream.take()
            && !self.quiet
        {
            let words = stream.finish();
            let shown = self.filter.as_mut().map(|filter| filter.push(&words) + &filter.finish());
            self.print(shown.unwrap_or(words))?;
        }
        self.writer.as_mut().map_or(Ok(()), Writer::finish)?;
        Ok(self.text.map(|text| text.decode(ids)).unwrap_or_default())
    }
}

/// A thread that writes to standard output. Whoever reads may take any time (a terminal that is
/// held, a pager), and the other ranks wait for this one's next collective no longer than they wait
/// for any.
struct Writer {
    words: Option<mpsc::Sender<String>>,
    thread: Option<thread::JoinHandle<Result<(), RankError>>>,
}

impl Writer {
    fn start() -> Result<Self, CliError> {
        let (words, written) = mpsc::channel::<String>();
        // Whoever interrupts an answer wants to see no more of it.
        let write = move || {
            written
                .iter()
                .try_for_each(|words| if ctrl_c::pressed() { Ok(()) } else { print(&words) })
        };
        let thread = thread::Builder::new()
            .name("standard output".into())
            .spawn(write)
            .map_err(|source| CliError::Thread { purpose: "writes to standard output", source })?;
        Ok(Self { words: Some(words), thread: Some(thread) })
    }

    /// Has `words` written soon. An error is that of words before them.
    fn write(&mut self, words: String) -> Result<(), CliError> {
        match &self.words {
            Some(channel) if channel.send(words).is_ok() => Ok(()),
            _ => self.finish(),
        }
    }

    /// Waits until all is written, or until the first thing that cannot be.
    fn finish(&mut self) -> Result<(), CliError> {
        self.words = None;
        match self.thread.take().map(thread::JoinHandle::join) {
            Some(Ok(result)) => Ok(result?),
            Some(Err(payload)) => panic::resume_unwind(payload),
            None => Ok(()),
        }
    }
}

impl Drop for Writer {
    /// Without `finish` the command fails: what was said before is written first, as far as that is
    /// quickly done.
    fn drop(&mut self) {
        self.words = None;
        let end = Instant::now() + Duration::from_millis(500);
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
            && Instant::now() < end
        {
            thread::sleep(Duration::from_millis(1));
        }
    }
}
