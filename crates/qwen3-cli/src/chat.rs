//! `qwen3 chat`: a conversation in the terminal.

mod dialogue;
mod input;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use qwen3_model::generation_config::GenerationConfig;
use qwen3_model::options::KvFormat;
use qwen3_model::{Model, SamplingParams};
use qwen3_text::{ChatTemplate, Conversation, Json, Tokenizer};
use ranks::{Failure, Rank};

use self::dialogue::{Dialogue, Form};

use crate::ahead;
use crate::answer::{Answer, AnswerOptions, single_sequence};
use crate::client;
use crate::ctrl_c;
use crate::failure::CliError;
use crate::options::{EngineOptions, LaunchOptions, SamplingOptions, positive};
use crate::plan::Workload;
use crate::prompt::TextOptions;
use crate::session::{self, Loaded};

/// Talk with the model: Ctrl-C stops an answer, Ctrl-D leaves
///
/// On a terminal, messages are edited in a line editor with a history
/// ($XDG_STATE_HOME/qwen3/chat_history). /help lists its keys and the commands. Elsewhere each line
/// of standard input is a message.
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
    #[arg(long, short = 'n', alias = "max-tokens", value_name = "N", value_parser = positive)]
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
        let dialogue =
            texts.map(|(text, template)| self.dialogue(text, template, &model)).transpose();
        let mut dialogue = rank.agree(dialogue)?;
        rank.agree(ctrl_c::handle(rank))?;
        if let Some(dialogue) = &dialogue {
            let source = self.engine.model.open()?;
            dialogue.greet(&model_name(source.folder()), rank.comm().size());
        }

        let context = model.config().context_length();
        let limit = self.max_new_tokens.unwrap_or(context);
        let mut options = AnswerOptions::new(rank, &model, &self.engine, sampling, limit)?;
        options.hide_empty_thought = true;
        let config = single_sequence(&model, &self.engine, context);
        client::serve(rank, model, &config, |handle| {
            let dialogue = dialogue.as_mut().expect("rank 0 has the texts");
            while let Some(tokens) = dialogue.next()? {
                ctrl_c::begin();
                let answer = Answer::write(handle, &tokens, Some(dialogue.tokenizer()), &options);
                ctrl_c::end();
                dialogue.keep(&answer?)?;
                // Another seed, so that the next answer does not draw alike.
                options.sampling.seed = options.sampling.seed.wrapping_add(1);
            }
            Ok(())
        })?;
        Ok(())
    }

    fn dialogue(
        &self,
        text: Tokenizer,
        template: ChatTemplate,
        model: &Model,
    ) -> Result<Dialogue, CliError> {
        let form = Form {
            text,
            template,
            control: self.text.control(),
            enable_thinking: self.enable_thinking(),
        };
        Dialogue::new(self.system(), form, model)
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

/// The name of the model in the folder `path`: the repository of a Hugging Face cache, or the name
/// of the folder.
fn model_name(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = |path: Option<&Path>| {
        path.and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned())
    };
    let repository = name(path.parent().and_then(Path::parent));
    let repository = repository.as_deref().and_then(|name| name.strip_prefix("models--"));
    let in_cache = name(path.parent()).is_some_and(|name| name == "snapshots");
    match repository.filter(|_| in_cache) {
        Some(repository) => repository.replacen("--", "/", 1),
        None => name(Some(&path)).unwrap_or_else(|| path.display().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_named_after_its_folder_or_its_repository() {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = dir.path().join("models--Qwen--Qwen3-0.6B/snapshots/c1899de");
        std::fs::create_dir_all(&snapshot).unwrap();
        assert_eq!(model_name(&snapshot), "Qwen/Qwen3-0.6B");
        assert_eq!(model_name(&snapshot.join("..")), "snapshots");
        let bundled = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen/"));
        assert_eq!(model_name(bundled), "austen");
    }
}
