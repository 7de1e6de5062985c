//! One answer of the model, shown as it comes.

use std::ops::ControlFlow;

use qwen3_model::{
    GenerateParams, Generated, KvCache, Model, Progress, SamplingParams, StopReason, eos_token_ids, generate,
};

use crate::failure::{CliError, Failure};
use crate::interrupt;
use crate::options::EngineOptions;
use crate::rank::Rank;
use crate::text::{Text, TextStream};

/// How answers are made.
#[derive(Clone, Debug)]
pub struct AnswerOptions {
    /// How tokens are chosen, and when an answer ends.
    pub params: GenerateParams,
    /// Nothing is shown before the end.
    pub quiet: bool,
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
        let eos_token_ids = rank.share(|| Ok(eos_token_ids(&engine.model, model.config())?))?;
        let prefill_chunk = engine.chunk;
        let params = GenerateParams { sampling, max_new_tokens, eos_token_ids, ignore_eos: false, prefill_chunk };
        Ok(Self { params, quiet: false })
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
    /// Computes and shows the answer to `tokens`, of which the first `cache.len()` are in the cache. All ranks call it; rank
    /// 0 alone has `text`, and without it shows ids.
    pub fn write(
        rank: &Rank,
        model: &Model,
        cache: &mut KvCache,
        tokens: &[u32],
        text: Option<&Text>,
        options: &AnswerOptions,
    ) -> Result<Self, Failure> {
        let mut screen = Screen { rank, text, stream: text.map(Text::stream), quiet: options.quiet, result: Ok(()) };
        let generated = generate(model, cache, tokens, &options.params, &mut |progress| screen.show(progress))?;
        let text = rank.agree(screen.finish(&generated.ids))?;
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
    text: Option<&'a Text>,
    stream: Option<TextStream<'a>>,
    quiet: bool,
    /// The first thing that went wrong; it ends the answer on all ranks.
    result: Result<(), CliError>,
}

impl Screen<'_> {
    fn show(&mut self, progress: Progress) -> ControlFlow<()> {
        if let Progress::Token(id) = progress
            && self.result.is_ok()
            && !self.quiet
        {
            let words = match &mut self.stream {
                Some(stream) => stream.push(id).map_err(CliError::from),
                None => Ok(format!("{id} ")),
            };
            self.result = words.and_then(|words| self.rank.say(&words));
        }
        if self.result.is_err() || interrupt::pressed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Shows what is left; returns the whole text.
    fn finish(self, ids: &[u32]) -> Result<String, CliError> {
        self.result?;
        if let Some(stream) = self.stream
            && !self.quiet
        {
            self.rank.say(&stream.finish()?)?;
        }
        Ok(self.text.map(|text| text.decode(ids)).transpose()?.unwrap_or_default())
    }
}
