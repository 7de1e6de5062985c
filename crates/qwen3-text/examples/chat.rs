//! Renders a question with the chat template of a checkpoint and prints the token ids.

use std::path::Path;

use qwen3_text::{ChatTemplate, Conversation, Tokenizer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(folder), Some(question)) = (arguments.next(), arguments.next()) else {
        return Err("usage: chat FOLDER QUESTION".into());
    };
    let folder = Path::new(&folder);
    let tokenizer = Tokenizer::open(folder)?;
    let text = ChatTemplate::open(folder)?.render(&Conversation::question(&question, None))?;
    println!("{text}\n{:?}", tokenizer.encode_rendered(&text)?);
    Ok(())
}
