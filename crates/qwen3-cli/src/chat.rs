//! `qwen3 chat`: a conversation in the terminal.

use std::io::{self, BufRead as _, IsTerminal as _};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use qwen3_model::generation::StopReason;
use qwen3_model::generation_config::GenerationConfig;
use qwen3_model::options::KvFormat;
use qwen3_model::{Model, SamplingParams, Sequence};
use qwen3_text::{ChatTemplate, ControlTokens, Conversation, Json, Tokenizer};
use ranks::{Failure, LaunchedProcess, Rank};

use crate::ahead;
use crate::answer::{Answer, AnswerOptions};
use crate::ctrl_c;
use crate::failure::CliError;
use crate::options::{EngineOptions, LaunchOptions, SamplingOptions, positive};
use crate::plan::Workload;
use crate::prompt::TextOptions;
use crate::session::{self, Loaded};

/// Talk with the model: Ctrl-C stops an answer, Ctrl-D leaves
///
/// Tokens are chosen as the checkpoint's generation_config.json recommends, where the options below
/// say nothing else. The history is kept; when it outgrows the model's context, its oldest messages
/// are forgotten. Under mpirun, Ctrl-C reaches the launcher: Open MPI's ends the whole job, MPICH's
/// passes the first one on and ends the job at the second.
#[derive(Args, Clone, Debug)]
pub struct ChatArgs {
    #[command(flatten)]
    engine: EngineOptions,

    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// Have the model answer at once, without thinking first
    #[arg(long)]
    no_thinking: bool,

    /// The most tokens of an answer [default: as many as the context holds]
    #[arg(long, value_name = "N", value_parser = positive)]
    max_new_tokens: Option<usize>,

    #[command(flatten)]
    text: TextOptions,

    #[command(flatten)]
    sampling: SamplingOptions,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

impl ChatArgs {
    /// Runs the command on this rank.
    pub fn run(&self, rank: &Rank) -> Result<(), Failure> {
        let path = self.engine.model.clone();
        ahead::look(rank, &self.engine, |_| {
            ahead::conversation(&path, &self.conversation("Hello"))
        })?;
        let sampling = self.params(rank)?;
        let read = move || Ok((path.tokenizer()?, path.template()?));
        let (Loaded { model, .. }, texts) = session::load_with(
            rank,
            &self.engine,
            Workload { kv: KvFormat::F16, prompt: 512, generate: 256 },
            read,
        )?;
        let speaker =
            texts.map(|(text, template)| Speaker::new(self, text, template, &model)).transpose();
        let mut speaker = rank.agree(speaker)?;
        rank.agree(ctrl_c::handle(rank))?;

        let context = model.config().context_length();
        let limit = self.max_new_tokens.unwrap_or(context);
        let mut options = AnswerOptions::new(rank, &model, &self.engine, sampling, limit)?;
        let mut cache = Sequence::new(&model, context)?;
        let mut seen: Vec<u32> = Vec::new();
        while let Some(tokens) = self.next(rank, &mut speaker)? {
            // What the template left as it was is still in the cache.
            let same = seen.iter().zip(&tokens).take_while(|(old, new)| old == new).count();
            let keep = same.min(tokens.len() - 1).min(cache.len());
            cache.truncate(keep);
            let text = speaker.as_ref().map(|speaker| &speaker.text);
            ctrl_c::begin();
            let answer = Answer::write(rank, &model, &mut cache, &tokens, text, &options)?;
            ctrl_c::end();
            rank.agree_after(|| {
                Ok(speaker.as_mut().map_or(Ok(()), |speaker| speaker.heard(rank, &answer))?)
            })?;
            seen = tokens;
            seen.extend(&answer.generated.ids);
            seen.truncate(cache.len());
            // Another seed, so that the next answer does not draw alike.
            options.params.sampling.seed = options.params.sampling.seed.wrapping_add(1);
        }
        Ok(())
    }

    /// The tokens of the conversation with the user's next message; `None` when the user leaves.
    /// The user may take any time: meanwhile the ranks wait without a deadline.
    fn next(
        &self,
        rank: &Rank,
        speaker: &mut Option<Speaker>,
    ) -> Result<Option<Vec<u32>>, Failure> {
        rank.without_deadline(|| {
            rank.broadcast(|| Ok(speaker.as_mut().expect("rank 0 has the texts").next()?))
        })
    }

    /// The conversation up to the answer to its first message.
    fn conversation(&self, words: &str) -> Conversation {
        let mut chat = Conversation::question(words, self.enable_thinking());
        chat.messages.splice(0..0, self.system());
        chat
    }

    /// The message that is never forgotten, if there is one.
    fn system(&self) -> Option<Json> {
        self.system.as_ref().map(|system| Json::message("system", system))
    }

    fn enable_thinking(&self) -> Option<bool> {
        self.no_thinking.then_some(false)
    }

    fn params(&self, rank: &Rank) -> Result<SamplingParams, Failure> {
        let (mut config, seed) = rank.broadcast(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            Ok((GenerationConfig::read(&*self.engine.model.open()?)?, now.as_nanos() as u64))
        })?;
        if config.do_sample.is_none() && config.temperature.is_none() {
            // What Qwen3's publisher recommends for thinking.
            let (top_k, top_p) = (config.top_k.or(Some(20)), config.top_p.or(Some(0.95)));
            config = GenerationConfig { temperature: Some(0.6), top_k, top_p, ..config };
        }
        let params = SamplingParams::recommended(&config, self.sampling.temperature, seed);
        self.sampling.over(params).map_err(Failure::agreed)
    }
}

/// Rank 0's side of the conversation.
struct Speaker {
    text: Tokenizer,
    template: ChatTemplate,
    control: ControlTokens,
    enable_thinking: Option<bool>,
    messages: Vec<Json>,
    /// Messages that are never forgotten: the system's.
    fixed: usize,
    /// Tokens of a prompt that leaves room for an answer.
    room: usize,
    /// Whether to say that it is the user's turn. A launcher passes a terminal on as a pipe, so
    /// below one it is always said.
    prompts: bool,
}

impl Speaker {
    fn new(
        args: &ChatArgs,
        text: Tokenizer,
        template: ChatTemplate,
        model: &Model,
    ) -> Result<Self, CliError> {
        let messages = Vec::from_iter(args.system());
        let context = model.config().context_length();
        let speaker = Self {
            text,
            template,
            control: args.text.control(),
            enable_thinking: args.enable_thinking(),
            fixed: messages.len(),
            messages,
            room: context - (context / 8).min(256),
            prompts: io::stdin().is_terminal()
                || LaunchedProcess::detect().is_some_and(|process| process.has_peers()),
        };
        // Else every message would be too long.
        let least = speaker.encode(args.conversation("").messages)?.len();
        if least > speaker.room {
            let expected = format!("at most {}, which leaves room for an answer", speaker.room);
            return Err(CliError::option(
                "--system",
                format!("{least} tokens with an empty message"),
                expected,
            ));
        }
        Ok(speaker)
    }

    fn encode(&self, messages: Vec<Json>) -> Result<Vec<u32>, CliError> {
        let chat = Conversation::new(messages, self.enable_thinking);
        Ok(self.template.prompt(&self.text, &chat, self.control)?.tokens)
    }

    /// Reads messages until one fits the model.
    fn next(&mut self) -> Result<Option<Vec<u32>>, CliError> {
        loop {
            if self.prompts {
                eprint!("> ");
            }
            let mut line = Vec::new();
            if io::stdin()
                .lock()
                .read_until(b'\n', &mut line)
                .map_err(|source| CliError::Input { source })?
                == 0
            {
                if self.prompts {
                    eprintln!();
                }
                return Ok(None);
            }
            // A key that is no character here, or half of one, is no reason to lose the
            // conversation.
            let line = String::from_utf8_lossy(&line);
            let words = line.trim();
            if words.is_empty() {
                continue;
            }
            self.messages.push(Json::message("user", words));
            if let Some(tokens) = self.fitting()? {
                return Ok(Some(tokens));
            }
            self.messages.truncate(self.fixed);
            eprintln!(
                "(this message is longer than the model's context; it is dropped, with the history)"
            );
        }
    }

    /// The conversation's tokens, without the oldest messages where there is no room; `None` if the
    /// last one alone is too long.
    fn fitting(&mut self) -> Result<Option<Vec<u32>>, CliError> {
        let mut forgotten = 0;
        loop {
            let tokens = self.encode(self.messages.clone())?;
            if tokens.is_empty() {
                let expected = "at least one token (chat_template.jinja, or chat_template in tokenizer_config.json)";
                return Err(CliError::option(
                    "chat template",
                    "it makes nothing of this conversation",
                    expected,
                ));
            }
            if tokens.len() <= self.room {
                if forgotten > 0 {
                    eprintln!(
                        "(the history is longer than the model's context; its oldest {forgotten} messages are forgotten)"
                    );
                }
                return Ok(Some(tokens));
            }
            if self.messages.len() <= self.fixed + 1 {
                return Ok(None);
            }
            // A question goes together with its answer.
            let end = (self.fixed + 2).min(self.messages.len() - 1);
            forgotten += self.messages.drain(self.fixed..end).len();
        }
    }

    /// Keeps an answer. The template drops its thinking when the next question comes.
    fn heard(&mut self, rank: &Rank, answer: &Answer) -> Result<(), CliError> {
        let stop = answer.generated.stop;
        // An answer that was cut says so: it may look like a whole one.
        rank.print(match stop {
            StopReason::EndOfSequence => "\n",
            StopReason::MaxNewTokens => " (--max-new-tokens reached)\n",
            StopReason::ContextFull => " (the context is full)\n",
            StopReason::Callback => " (stopped)\n",
        })?;
        if stop == StopReason::Callback && answer.generated.ids.is_empty() {
            // Stopped while the prompt was read: the conversation goes on as if the message had not
            // been sent.
            self.messages.pop();
            return Ok(());
        }
        self.messages.push(Json::message("assistant", &answer.text));
        Ok(())
    }
}
