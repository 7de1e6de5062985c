//! Asks the bundled model a question on two ranks of this process, and streams its answer.

use engine::{Engine, EngineConfig, Event, Request};
use qwen3_model::generation_config::eos_token_ids;
use qwen3_model::{Isa, Model, ModelOptions, ModelSource};
use qwen3_text::{ChatTemplate, ControlTokens, Conversation, Tokenizer};
use ranks::{Failure, JobOptions, run_in_threads};

fn main() -> Result<(), Failure> {
    answer("What is 17 + 15?", &|text| ranks::print(text).is_ok())
}

/// Calls `show` with each piece of the answer to `question`, until it returns false.
pub fn answer(question: &str, show: &(dyn Fn(&str) -> bool + Sync)) -> Result<(), Failure> {
    let source = ModelSource::open(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen"))?;
    let tokenizer = Tokenizer::open(source.folder())?;
    let chat = Conversation::question(question, Some(false));
    let template = ChatTemplate::open(source.folder())?;
    let prompt = template.prompt(&tokenizer, &chat, ControlTokens::Literal)?.tokens;
    run_in_threads(&JobOptions { ranks: 2, ..JobOptions::default() }, |rank| {
        let options = ModelOptions::new(Isa::from_env()?);
        let model = Model::load(&source, rank.comm().clone(), &options, &|_| ())?;
        let eos_token_ids = eos_token_ids(&source, model.config())?;
        let request = Request { eos_token_ids, ..Request::new(prompt.clone(), 256) };
        let (_, asked) = Engine::new(model, &EngineConfig::default())?.serve(|handle| {
            let (stream, mut text) = (handle.submit(request)?, tokenizer.detokenizer());
            while let Some(event) = stream.recv_blocking() {
                if matches!(event, Event::Token { id, .. } if !show(&text.push(id))) {
                    break;
                }
            }
            Ok(())
        })?;
        asked.unwrap_or(Ok(()))
    })
}
