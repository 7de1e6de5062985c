//! `qwen3 demo`: three questions, a sentence to continue, and what they cost.

use clap::Args;
use qwen3_model::SamplingParams;
use qwen3_model::options::KvFormat;
use ranks::{Failure, Rank, print};

use crate::ahead;
use crate::answer::{Answer, AnswerOptions, Timing, single_sequence};
use crate::client;
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
        // Texts of the demo are much shorter.
        let config = single_sequence(&model, &self.engine, 1024);
        let (model, timings) = client::serve(rank, model, &config, |handle| {
            let (text, template) = texts.as_ref().expect("rank 0 read them");
            let (mut prefill, mut decode) = (Timing::default(), Timing::default());
            for prompt in QUESTIONS.iter().chain([&SENTENCE]) {
                let tokens = if *prompt == SENTENCE {
                    print(prompt)?;
                    text.encode(prompt)?
                } else {
                    print(&format!("> {prompt}\n"))?;
                    let chat = Conversation::question(prompt, Some(false));
                    template.prompt(text, &chat, ControlTokens::Literal)?.tokens
                };
                let answer = Answer::write(handle, &tokens, Some(text), &options)?;
                add(&mut prefill, answer.prefill);
                add(&mut decode, answer.decode);
                print("\n\n")?;
            }
            Ok((prefill, decode))
        })?;
        let (prefill, decode) = timings.unwrap_or_default();
        let entries = rank.comm().ledger().entries();
        rank.print_and_agree(&summary(&model, reason.as_deref(), prefill, decode, &entries))
    }
}

fn add(sum: &mut Timing, other: Timing) {
    sum.tokens += other.tokens;
    sum.elapsed += other.elapsed;
}
