//! Text to token ids and back.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::detokenizer::Detokenizer;

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// `tokenizer.json` is absent.
    #[error("{}: no such file; expected the checkpoint's tokenizer", path.display())]
    Missing {
        /// Where the file should be.
        path: PathBuf,
    },
    /// `tokenizer.json` cannot be read or parsed, a text cannot be encoded, or ids cannot be
    /// decoded.
    #[error("{origin}: {source}")]
    Tokenizer {
        /// The file, or the name the caller gave.
        origin: String,
        /// The cause.
        source: tokenizers::Error,
    },
}

/// The tokenizer of a checkpoint. Clones share the vocabulary.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    origin: String,
    tokenizer: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Parses the bytes of a `tokenizer.json`. `origin` names them in error messages.
    pub fn from_json(origin: impl Into<String>, json: &[u8]) -> Result<Self, TokenizerError> {
        let origin = origin.into();
        let parse = || {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(json)?;
            // Padding and truncation are settings for batches in training. A prompt is encoded
            // whole and as it is.
            tokenizer.with_padding(None).with_truncation(None)?;
            Ok(tokenizer)
        };
        match parse() {
            Ok(tokenizer) => Ok(Self { shared: Arc::new(Shared { origin, tokenizer }) }),
            Err(source) => Err(TokenizerError::Tokenizer { origin, source }),
        }
    }

    /// The path of `tokenizer.json` in a checkpoint's folder, if the file can be opened.
    pub fn find(folder: &Path) -> Result<PathBuf, TokenizerError> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(TokenizerError::Missing { path });
        }
        match File::open(&path) {
            Ok(_) => Ok(path),
            Err(source) => Err(unreadable(&path, source)),
        }
    }

    /// Reads `tokenizer.json` in a checkpoint's folder.
    pub fn open(folder: &Path) -> Result<Self, TokenizerError> {
        let path = Self::find(folder)?;
        let json = std::fs::read(&path).map_err(|source| unreadable(&path, source))?;
        Self::from_json(path.display().to_string(), &json)
    }

    /// Encodes a text as a user writes it. If the tokenizer's post-processor adds tokens around a
    /// text (embedding models end with one), the ids include them.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.ids(text, true)
    }

    /// Encodes a text that a chat template rendered: nothing is added around it.
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.ids(text, false)
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self
            .shared
            .tokenizer
            .encode_fast(text, add_special_tokens)
            .map_err(|source| self.failed(source))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Decodes ids to text without special tokens. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.shared.tokenizer.decode(ids, true).map_err(|source| self.failed(source))
    }

    /// Starts decoding a stream of ids, for example those of an answer while it is generated.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(self.clone())
    }

    fn failed(&self, source: tokenizers::Error) -> TokenizerError {
        TokenizerError::Tokenizer { origin: self.shared.origin.clone(), source }
    }
}

fn unreadable(path: &Path, source: std::io::Error) -> TokenizerError {
    TokenizerError::Tokenizer { origin: path.display().to_string(), source: source.into() }
}
