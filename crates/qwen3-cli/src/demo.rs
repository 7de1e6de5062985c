//! `qwen3 demo`: three questions, a sentence to continue, and what they cost.

use clap::Args;
use qwen3_model::generation::Timing;
use qwen3_model::options::KvFormat;
use qwen3_model::{SamplingParams, Sequence};
use ranks::{Failure, Rank};

use crate::ahead;
use crate::answer::{Answer, AnswerOptions};
use crate::options::{EngineOptions, LaunchOptions};
use crate::plan::Workload;
use crate::session::{self, Loaded};
use crate::summary::summary;
use qwen3_text::{ControlTokens, Conversation};

/// Answer three questions and continue a sentence, then say what it cost
#[derive(Args, Clone, Debug)]
pub struct DemoArgs {
    #[command(flatten)]
    engine: EngineOptions,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

/// The bundled model was trained to add, to spell and to talk a little.
const QUESTIONS: [&str; 3] =
    ["What is 17 + 15?", "Spell the word \"sister\".", "Tell me about music."];
const SENTENCE: &str = "It is a truth universally acknowledged, that";
const TOKENS: usize = 64;

impl DemoArgs {
    /// Runs the command on this rank.
    pub fn run(&self, rank: &Rank) -> Result<(), Failure> {
        let path = self.engine.model.clone();
        let any = Conversation::question(QUESTIONS[0], None);
        ahead::look(rank, &self.engine, |_| ahead::conversation(&path, &any))?;
        let read = move || Ok((path.tokenizer()?, path.template()?));
        let (Loaded { model, reason }, texts) = session::load_with(
            rank,
            &self.engine,
            Workload { kv: KvFormat::F16, prompt: 64, generate: TOKENS },
            read,
        )?;
        let options =
            AnswerOptions::new(rank, &model, &self.engine, SamplingParams::default(), TOKENS)?;
        rank.comm().ledger().reset();
        let (mut prefill, mut decode) = (Timing::default(), Timing::default());
        for prompt in QUESTIONS.iter().chain([&SENTENCE]) {
            let sentence = *prompt == SENTENCE;
            rank.print_and_agree(&if sentence {
                (*prompt).to_owned()
            } else {
                format!("> {prompt}\n")
            })?;
            let tokens = rank.broadcast(|| {
                let (text, template) = texts.as_ref().expect("rank 0 read them");
                if sentence {
                    return Ok(text.encode(prompt)?);
                }
                let chat = Conversation::question(prompt, Some(false));
                Ok(template.prompt(text, &chat, ControlTokens::Literal)?.tokens)
            })?;
            let mut cache = Sequence::new(&model, tokens.len() + TOKENS)?;
            let text = texts.as_ref().map(|(text, _)| text);
            let answer = Answer::write(rank, &model, &mut cache, &tokens, text, &options)?;
            add(&mut prefill, answer.generated.prefill);
            add(&mut decode, answer.generated.decode);
            rank.print_and_agree("\n\n")?;
        }
        let entries = rank.comm().ledger().entries();
        rank.print_and_agree(&summary(&model, reason.as_deref(), prefill, decode, &entries))
    }
}

fn add(sum: &mut Timing, other: Timing) {
    sum.tokens += other.tokens;
    sum.elapsed += other.elapsed;
}
