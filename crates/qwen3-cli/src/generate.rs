//! `qwen3 generate`: the continuation of a prompt.

use clap::Args;
use qwen3_model::generation_config::GenerationConfig;
use qwen3_model::options::KvFormat;
use qwen3_model::{SamplingParams, Sequence};
use ranks::{Failure, Rank};
use serde_json::json;

use crate::ahead;
use crate::answer::{Answer, AnswerOptions, stop_word};
use crate::options::{EngineOptions, LaunchOptions, SamplingOptions, positive};
use crate::plan::Workload;
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
        options.params.ignore_eos = self.ignore_eos;
        let mut cache = Sequence::new(&model, tokens.len().saturating_add(self.max_new_tokens))?;
        let answer = Answer::write(rank, &model, &mut cache, &tokens, text.as_ref(), &options)?;
        let end = if self.json {
            let object = json!({
                "prompt_tokens": tokens.len(),
                "ids": answer.generated.ids,
                "text": answer.text,
                "prefill_tokens_per_s": answer.generated.prefill.tokens_per_s(),
                "decode_tokens_per_s": answer.generated.decode.tokens_per_s(),
                "stop": stop_word(answer.generated.stop),
            });
            format!("{object}\n")
        } else {
            "\n".to_owned()
        };
        rank.print_and_agree(&end)
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
