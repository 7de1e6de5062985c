//! What is looked at before a model is loaded: a mistake that is soon found is not said after
//! minutes.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use qwen3_model::Config;
use qwen3_text::Conversation;
use ranks::{Failure, Rank};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::failure::CliError;
use crate::model_path::ModelPath;
use crate::options::EngineOptions;

/// Has rank 0 look at the files and values of a command, with the checkpoint's configuration; all
/// ranks have the result.
pub fn look<T: Serialize + DeserializeOwned>(
    rank: &Rank,
    engine: &EngineOptions,
    work: impl FnOnce(&Config) -> Result<T, CliError>,
) -> Result<T, Failure> {
    // A long text takes its time.
    rank.without_deadline(|| rank.broadcast(|| Ok(work(&Config::read(&*engine.model.open()?)?)?)))
}

/// The bytes of a file that can be read; nothing where it is a device or a pipe, which may be read
/// only once and keep its reader waiting.
pub fn input(path: &Path) -> Result<Option<u64>, CliError> {
    let bytes = || {
        let found = fs::metadata(path)?;
        if !found.is_file() && !found.is_dir() {
            return Ok(None);
        }
        // A folder opens like a file and is first refused when it is read.
        _ = File::open(path)?.read(&mut [0])?;
        Ok(Some(found.len()))
    };
    bytes().map_err(|source| CliError::file(path, source))
}

/// Bytes of a text that is read at most: a device may have no end.
pub const TEXT_BYTES: u64 = 1 << 28;

/// Reads a text file of at most [`TEXT_BYTES`].
pub fn read_text(path: &Path) -> Result<String, CliError> {
    let read = || {
        let mut text = String::new();
        let file = File::open(path)?;
        if file.take(TEXT_BYTES + 1).read_to_string(&mut text)? as u64 > TEXT_BYTES {
            return Err(io::Error::other(format!("longer than {TEXT_BYTES} bytes")));
        }
        Ok(text)
    };
    read().map_err(|source| CliError::file(path, source))
}

/// Whether a checkpoint has what a conversation needs besides its weights, and takes one that
/// begins like this.
pub fn conversation(model: &ModelPath, chat: &Conversation) -> Result<(), CliError> {
    model.open()?.find_tokenizer()?;
    let text = model.template()?.render(chat)?;
    // A model that always thinks has a template that begins the thought itself.
    if chat.enable_thinking() == Some(false) && text.trim_end().ends_with("<think>") {
        let found = "the chat template begins a thought all the same";
        return Err(CliError::option(
            "--no-thinking",
            found,
            "a model that can answer at once, or no such option",
        ));
    }
    Ok(())
}
