//! The model that a command line names, opened once for all ranks of the process.

use std::ffi::OsString;
use std::path::{Display, Path, PathBuf};
use std::sync::{Arc, OnceLock};

use qwen3_model::checkpoint::{Document, ModelSource, OpenError};
use qwen3_text::{ChatTemplate, TemplateSource, Tokenizer};

use crate::failure::CliError;

/// The value of `--model`. Clones share the opened model.
#[derive(Clone, Debug)]
pub struct ModelPath {
    path: PathBuf,
    opened: Arc<OnceLock<Result<Arc<ModelSource>, OpenError>>>,
}

impl From<OsString> for ModelPath {
    fn from(path: OsString) -> Self {
        Self { path: path.into(), opened: Arc::default() }
    }
}

impl ModelPath {
    /// The path as the user wrote it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path as the user wrote it, for messages.
    pub fn display(&self) -> Display<'_> {
        self.path.display()
    }

    /// The model, opened by the first call.
    pub fn open(&self) -> Result<Arc<ModelSource>, CliError> {
        Ok(self.opened.get_or_init(|| ModelSource::open(&self.path)).clone()?)
    }

    /// Reads the tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer, CliError> {
        let source = self.open()?;
        let document = source.tokenizer()?;
        let config = source.tokenizer_config()?.map(Document::text).transpose()?;
        Ok(Tokenizer::from_json(document.file.display().to_string(), &document.bytes, config)?)
    }

    /// Reads the chat template, found as transformers finds it.
    pub fn template(&self) -> Result<ChatTemplate, CliError> {
        let source = self.open()?;
        let config = source.tokenizer_config()?.map(Document::text).transpose()?;
        let mut texts = Vec::new();
        for (name, document) in source.chat_templates()? {
            texts.push((name.clone(), document.text()?.to_owned()));
        }
        let main = texts.first().map(|(_, text)| text.as_str());
        let origin = source.folder().display().to_string();
        let mut templates = TemplateSource::new(&origin, main, config)?;
        templates.templates.extend(texts.into_iter().skip(1));
        Ok(ChatTemplate::isolated(templates)?)
    }
}
