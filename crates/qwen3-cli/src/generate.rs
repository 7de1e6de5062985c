//! `qwen3 generate`: the continuation of a prompt.

use std::path::{Path, PathBuf};

use clap::Args;
use engine::{EngineConfig, KvMemory};
use qwen3_model::SamplingParams;
use qwen3_model::generation_config::GenerationConfig;
use qwen3_model::options::KvFormat;
use qwen3_text::Conversation;
use ranks::{Failure, Rank, print};
use serde_json::json;

use crate::ahead;
use crate::answer::{Answer, AnswerOptions, single_sequence, stop_word};
use crate::client;
use crate::failure::CliError;
use crate::jsonl::{self, Lines};
use crate::options::{EngineOptions, LaunchOptions, SamplingOptions, positive};
use crate::plan::Workload;
use crate::progress::{Progress, Unit};
use crate::prompt::{PromptForm, PromptOptions, TextOptions};
use crate::session::{self, Loaded};

/// Continue a prompt: the text comes as it is chosen
///
/// The likeliest token is taken each time, so that the same prompt gives the same text. With
/// --temperature above 0 tokens are drawn instead, and top-k, top-p, min-p and the repetition
/// penalty default to the checkpoint's generation_config.json.
#[derive(Args, Clone, Debug)]
pub struct GenerateArgs {
    #[command(flatten)]
    engine: EngineOptions,

    #[command(flatten)]
    prompt: PromptOptions,

    /// A file with one request per line, each a JSON object with "prompt", "messages" or "tokens"
    ///
    /// A line may also have "id", "max_new_tokens", "temperature", "top_k", "top_p", "min_p",
    /// "repetition_penalty", "presence_penalty", "frequency_penalty", "seed" and "ignore_eos". The
    /// requests are computed together. One result per line is printed, in the order of the file:
    /// {"id","prompt_tokens","cached_tokens","ids","text","stop"} or {"id","error"}.
    #[arg(long, value_name = "FILE", group = "PromptOptions", conflicts_with = "json")]
    jsonl: Option<PathBuf>,

    /// With --jsonl: memory for keys and values on each rank, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, requires = "jsonl", value_parser = positive)]
    kv_memory: usize,

    /// Take the prompt as a user's message and write it with the chat template
    #[arg(long, conflicts_with = "tokens")]
    chat: bool,

    /// With --chat: have the model answer at once, without thinking first
    #[arg(long, requires = "chat")]
    no_thinking: bool,

    /// The most tokens to generate; the model's context may end before
    #[arg(long, short = 'n', alias = "max-tokens", value_name = "N", default_value_t = 256, value_parser = positive)]
    max_new_tokens: usize,

    #[command(flatten)]
    text: TextOptions,

    #[command(flatten)]
    sampling: SamplingOptions,

    /// Go on after a token that ends a text
    #[arg(long)]
    ignore_eos: bool,

    /// Print one JSON object at the end:
    /// {"prompt_tokens","ids","text","prefill_tokens_per_s","decode_tokens_per_s","stop"}
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

impl GenerateArgs {
    /// Runs the command on this rank.
    pub fn run(&self, rank: &Rank) -> Result<(), Failure> {
        let chat = self.chat.then(|| self.no_thinking.then_some(false));
        if let Some(file) = &self.jsonl {
            return self.run_lines(rank, file, chat);
        }
        let form = PromptForm { chat, control: self.text.control() };
        let (prompt, path) = (self.prompt.clone(), self.engine.model.clone());
        let length = ahead::look(rank, &self.engine, |config| prompt.look(&path, config, form))?;
        let sampling = self.params(rank)?;
        let read = move || prompt.read(&path, form);
        let (Loaded { model, .. }, prompt) = session::load_with(
            rank,
            &self.engine,
            Workload { kv: KvFormat::F16, prompt: length, generate: self.max_new_tokens.min(1024) },
            read,
        )?;
        let (tokens, text) = match prompt {
            Some(prompt) => (Some(prompt.tokens), prompt.text),
            None => (None, None),
        };
        let tokens = rank.broadcast(|| Ok(tokens.expect("rank 0 read the prompt")))?;
        self.prompt
            .check(model.config().context_length(), tokens.len())
            .map_err(Failure::agreed)?;
        let mut options =
            AnswerOptions::new(rank, &model, &self.engine, sampling, self.max_new_tokens)?;
        options.quiet = self.json;
        options.ignore_eos = self.ignore_eos;
        let positions = tokens.len().saturating_add(self.max_new_tokens);
        let config = single_sequence(&model, &self.engine, positions);
        client::serve(rank, model, &config, |handle| {
            let answer = Answer::write(handle, &tokens, text.as_ref(), &options)?;
            let end = if self.json {
                let object = json!({
                    "prompt_tokens": tokens.len(),
                    "ids": answer.ids,
                    "text": answer.text,
                    "prefill_tokens_per_s": answer.prefill.tokens_per_s(),
                    "decode_tokens_per_s": answer.decode.tokens_per_s(),
                    "stop": stop_word(answer.reason),
                });
                format!("{object}\n")
            } else {
                "\n".to_owned()
            };
            Ok(print(&end)?)
        })?;
        Ok(())
    }

    /// Answers the requests in `file`.
    fn run_lines(
        &self,
        rank: &Rank,
        file: &Path,
        chat: Option<Option<bool>>,
    ) -> Result<(), Failure> {
        let path = self.engine.model.clone();
        ahead::look(rank, &self.engine, |_| {
            ahead::input(file)?;
            let hello = |thinking| Conversation::question("Hello", thinking);
            chat.map_or(Ok(()), |thinking| ahead::conversation(&path, &hello(thinking)))
        })?;
        // Without a template only requests with messages fail.
        let read = move || Ok((path.tokenizer()?, path.template().ok()));
        let work = Workload { kv: KvFormat::F16, prompt: 512, generate: 256 };
        let (Loaded { model, .. }, texts) = session::load_with(rank, &self.engine, work, read)?;
        let greedy = SamplingParams::default();
        let mut options =
            AnswerOptions::new(rank, &model, &self.engine, greedy, self.max_new_tokens)?;
        options.ignore_eos = self.ignore_eos;
        let config = EngineConfig {
            kv_memory: KvMemory::Bytes(self.kv_memory.saturating_mul(1 << 20)),
            step_rows: self.engine.chunk,
            stream_limit: usize::MAX,
            ..EngineConfig::default()
        };
        let shown = Progress::new(rank, "generating", Unit::Count("requests"));
        client::serve(rank, model, &config, |handle| {
            let (tokenizer, template) = texts.as_ref().expect("rank 0 read them");
            let (template, control) = (template.as_ref(), self.text.control());
            let generation = GenerationConfig::read(&*self.engine.model.open()?)?;
            let sampling = &self.sampling;
            let lines = Lines { tokenizer, template, control, chat, generation, sampling, options };
            let update = |done, total| shown.update(done, total);
            let (requests, errors) = jsonl::run(file, &lines, handle, update)?;
            if errors > 0 {
                return Err(CliError::Requests { errors, requests });
            }
            Ok(())
        })?;
        Ok(())
    }

    fn params(&self, rank: &Rank) -> Result<SamplingParams, Failure> {
        let base = match self.sampling.temperature {
            Some(temperature) if temperature > 0.0 => {
                let config =
                    rank.broadcast(|| Ok(GenerationConfig::read(&*self.engine.model.open()?)?))?;
                SamplingParams::recommended(&config, Some(temperature), 0)
            }
            _ => SamplingParams::default(),
        };
        self.sampling.over(base).map_err(Failure::agreed)
    }
}
