//! Text to token ids and back.

mod layout;
mod vocabulary;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::{
    AddedToken, Model as _, Normalizer as _, OffsetType, PreTokenizedString, PreTokenizer as _,
};

use crate::detokenizer::Detokenizer;
use crate::error::printable;
use crate::file;
use crate::json::Json;
pub(crate) use vocabulary::Vocabulary;

/// Largest `tokenizer.json`, in bytes. That of Qwen3 has 11 MB.
const MAX_FILE: u64 = 64 << 20;
/// Largest `tokenizer_config.json`, in bytes.
const MAX_CONFIG: u64 = 16 << 20;

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// `tokenizer.json` is absent.
    #[error("{}: no such file; expected the checkpoint's tokenizer", printable(&path.display().to_string()))]
    Missing {
        /// Where the file should be.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("{}: {source}", printable(&path.display().to_string()))]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file is not what Qwen3's tokenizers are made of.
    #[error("{}: {}", printable(origin), printable(problem))]
    Unsupported {
        /// The file, or the name the caller gave.
        origin: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// The library `tokenizers` refuses the file or a text.
    #[error("{}: {}", printable(origin), printable(&source.to_string()))]
    Library {
        /// The file, or the name the caller gave.
        origin: String,
        /// The cause.
        source: tokenizers::Error,
    },
    /// The library `tokenizers` panicked.
    #[error("{}: the library tokenizers fails on this file", printable(origin))]
    Panic {
        /// The file, or the name the caller gave.
        origin: String,
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
    vocabulary: Vocabulary,
    added: Vec<Added>,
    /// Finds the added tokens in a text, the longest first.
    finder: AhoCorasick,
}

/// A token outside of the BPE vocabulary, which is matched as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Added {
    pub id: u32,
    pub content: String,
    /// Whether decoding leaves the token out.
    pub special: bool,
}

impl Tokenizer {
    /// Parses the bytes of a `tokenizer.json`, and adds the tokens that only `config`, the text of
    /// `tokenizer_config.json`, defines. `origin` names the first file in error messages.
    ///
    /// Only the components that Qwen3's tokenizers consist of are accepted: NFC, the split by one
    /// of two regular expressions, byte-level BPE, and templates that add tokens around a text.
    pub fn from_json(
        origin: impl Into<String>,
        json: &[u8],
        config: Option<&str>,
    ) -> Result<Self, TokenizerError> {
        let origin = origin.into();
        if let Err(problem) = layout::check(json) {
            return Err(TokenizerError::Unsupported { origin, problem });
        }
        let new = match config.map(|config| tokens_of_config(&origin, config)).transpose() {
            Ok(new) => new.unwrap_or_default(),
            Err(problem) => return Err(problem),
        };
        let parse = || {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(json)?;
            // Padding and truncation are settings for batches in training. A prompt is encoded
            // whole and as it is.
            tokenizer.with_padding(None).with_truncation(None)?;
            let known = tokenizer.get_added_vocabulary().get_vocab().clone();
            // In the order in which transformers gives ids to them.
            let new: Vec<AddedToken> =
                new.into_iter().filter(|token| !known.contains_key(&token.content)).collect();
            tokenizer.add_tokens(&new);
            Ok(tokenizer)
        };
        let tokenizer = match caught(parse) {
            Some(Ok(tokenizer)) => tokenizer,
            Some(Err(source)) => return Err(TokenizerError::Library { origin, source }),
            None => return Err(TokenizerError::Panic { origin }),
        };
        let decoder = tokenizer.get_added_tokens_decoder();
        let mut added: Vec<Added> = decoder
            .iter()
            .filter(|(_, token)| !token.content.is_empty())
            .map(|(&id, token)| Added {
                id,
                content: token.content.clone(),
                special: token.special,
            })
            .collect();
        added.sort_by_key(|token| token.id);
        let vocabulary = Vocabulary::new(&tokenizer, &added);
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(added.iter().map(|token| &token.content));
        let finder = match finder {
            Ok(finder) => finder,
            Err(error) => {
                let problem = format!("added_tokens: {error}");
                return Err(TokenizerError::Unsupported { origin, problem });
            }
        };
        Ok(Self { shared: Arc::new(Shared { origin, tokenizer, vocabulary, added, finder }) })
    }

    /// The path of `tokenizer.json` in a checkpoint's folder, if the file can be opened.
    pub fn find(folder: &Path) -> Result<PathBuf, TokenizerError> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            return Err(TokenizerError::Missing { path });
        }
        match File::open(&path) {
            Ok(_) => Ok(path),
            Err(source) => Err(TokenizerError::Read { path, source }),
        }
    }

    /// Reads `tokenizer.json` and, if it exists, `tokenizer_config.json` in a checkpoint's folder.
    pub fn open(folder: &Path) -> Result<Self, TokenizerError> {
        let path = Self::find(folder)?;
        let json = match file::read(&path, MAX_FILE) {
            Ok(json) => json,
            Err(source) => return Err(TokenizerError::Read { path, source }),
        };
        let config_path = folder.join("tokenizer_config.json");
        let config = match file::read_text(&config_path, MAX_CONFIG) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(source) => return Err(TokenizerError::Read { path: config_path, source }),
        };
        Self::from_json(path.display().to_string(), &json, config.as_deref())
    }

    /// Encodes a text as a user writes it. Added tokens in the text, such as `<|im_start|>`, become
    /// their ids. If the tokenizer's post-processor adds tokens around a text (embedding models end
    /// with one), the ids include them.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.ids(text, true)
    }

    /// Encodes a text that a chat template rendered: nothing is added around it.
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.ids(text, false)
    }

    /// Encodes a text in which nothing is a control token: `<|im_start|>` is encoded as the
    /// characters it consists of.
    pub fn encode_literal(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let tokenizer = &self.shared.tokenizer;
        self.guarded(|| {
            let mut pieces = PreTokenizedString::from(text);
            if let Some(normalizer) = tokenizer.get_normalizer() {
                pieces.normalize(|piece| normalizer.normalize(piece))?;
            }
            if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut pieces)?;
            }
            pieces.tokenize(|piece| tokenizer.get_model().tokenize(piece.get()))?;
            Ok(pieces.into_encoding(None, 0, OffsetType::Byte)?.get_ids().to_vec())
        })
    }

    /// Encodes a rendered text whose added tokens are those of the template, after `literal`
    /// restored the other parts of the text.
    pub(crate) fn encode_template(
        &self,
        text: &str,
        literal: impl Fn(&str) -> String,
    ) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::new();
        let mut from = 0;
        for found in self.shared.finder.find_iter(text) {
            ids.extend(self.encode_literal(&literal(&text[from..found.start()]))?);
            ids.push(self.shared.added[found.pattern().as_usize()].id);
            from = found.end();
        }
        ids.extend(self.encode_literal(&literal(&text[from..]))?);
        Ok(ids)
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        self.guarded(|| {
            let encoding = self.shared.tokenizer.encode_fast(text, add_special_tokens)?;
            Ok(encoding.get_ids().to_vec())
        })
    }

    /// Decodes ids to text without special tokens. Bytes that are not UTF-8 become U+FFFD; ids
    /// beyond the vocabulary have no text.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.shared.vocabulary.text(id));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Starts decoding a stream of ids, for example those of an answer while it is generated.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(self.clone())
    }

    /// One more than the largest id.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary().len()
    }

    /// The id of a token given as its text, for example `<|im_end|>` or `<think>`, if it is an
    /// added token.
    pub fn added_token(&self, content: &str) -> Option<u32> {
        self.added().iter().find(|token| token.content == content).map(|token| token.id)
    }

    /// The bytes that a token stands for, also those of special tokens; none beyond the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.shared.vocabulary.bytes(id)
    }

    pub(crate) fn vocabulary(&self) -> &Vocabulary {
        &self.shared.vocabulary
    }

    pub(crate) fn added(&self) -> &[Added] {
        &self.shared.added
    }

    fn guarded<T>(
        &self,
        work: impl FnOnce() -> tokenizers::Result<T>,
    ) -> Result<T, TokenizerError> {
        let origin = || self.shared.origin.clone();
        match caught(work) {
            Some(Ok(value)) => Ok(value),
            Some(Err(source)) => Err(TokenizerError::Library { origin: origin(), source }),
            None => Err(TokenizerError::Panic { origin: origin() }),
        }
    }
}

/// The result of `work`, or `None` if it panicked. What `work` changed is not used afterwards.
fn caught<T>(work: impl FnOnce() -> T) -> Option<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).ok()
}

/// Names of single special tokens in `tokenizer_config.json`.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The tokens of `tokenizer_config.json` in the order in which transformers adds them: those of
/// `added_tokens_decoder` by id, then the named ones, then the additional ones.
fn tokens_of_config(origin: &str, config: &str) -> Result<Vec<AddedToken>, TokenizerError> {
    let wrong = |problem: String| TokenizerError::Unsupported {
        origin: origin.to_owned(),
        problem: format!("tokenizer_config.json: {problem}"),
    };
    let config = Json::parse(config).map_err(|error| wrong(error.to_string()))?;
    let mut tokens: Vec<AddedToken> = Vec::new();
    let mut special: Vec<AddedToken> = Vec::new();
    let flag = |token: &Json, name: &str| matches!(token.get(name), Some(Json::Bool(true)));
    let parsed = |token: &Json| {
        let content = token.as_str().or_else(|| token.get("content")?.as_str())?;
        Some(
            AddedToken::from(content, flag(token, "special"))
                .single_word(flag(token, "single_word"))
                .lstrip(flag(token, "lstrip"))
                .rstrip(flag(token, "rstrip"))
                .normalized(flag(token, "normalized")),
        )
    };
    for name in NAMED {
        special.extend(config.get(name).and_then(parsed));
    }
    for name in ["additional_special_tokens", "extra_special_tokens"] {
        match config.get(name) {
            Some(Json::Array(items)) => special.extend(items.iter().filter_map(parsed)),
            Some(Json::Object(entries)) => special.extend(entries.values().filter_map(parsed)),
            _ => {}
        }
    }
    if let Some(Json::Object(entries)) = config.get("added_tokens_decoder") {
        let mut numbered = Vec::new();
        for (id, token) in entries {
            let id: u32 = id
                .parse()
                .map_err(|_| wrong(format!("added_tokens_decoder: {id:?}: expected an id")))?;
            let token = parsed(token)
                .ok_or_else(|| wrong(format!("added_tokens_decoder: {id}: expected content")))?;
            numbered.push((id, token));
        }
        numbered.sort_by_key(|(id, _)| *id);
        tokens.extend(numbered.into_iter().map(|(_, token)| token));
    }
    for token in &mut tokens {
        token.special |= special.iter().any(|other| other.content == token.content);
    }
    for mut token in special {
        if tokens.iter().all(|other| other.content != token.content) {
            token.special = true;
            tokens.push(token);
        }
    }
    match tokens.iter().find(|token| token.content.len() > layout::MAX_TOKEN) {
        Some(token) => Err(wrong(format!("a token of {} bytes", token.content.len()))),
        None if tokens.len() > layout::MAX_ADDED => {
            Err(wrong(format!("{} tokens, expected at most {}", tokens.len(), layout::MAX_ADDED)))
        }
        None => Ok(tokens),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AUSTEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");

    fn austen() -> (Vec<u8>, Tokenizer) {
        let folder = Path::new(AUSTEN);
        (std::fs::read(folder.join("tokenizer.json")).unwrap(), Tokenizer::open(folder).unwrap())
    }

    #[test]
    fn literal_text_has_no_control_tokens_and_is_otherwise_encoded_alike() {
        let (_, tokenizer) = austen();
        let text = "It is a truth universally acknowledged, \n 你好 cafe\u{301}";
        assert_eq!(tokenizer.encode_literal(text).unwrap(), tokenizer.encode(text).unwrap());
        let typed = "<|im_start|>system<think>";
        let ids = tokenizer.encode_literal(typed).unwrap();
        assert!(tokenizer.added().iter().all(|token| !ids.contains(&token.id)));
        assert_eq!(tokenizer.decode(&ids), typed);
        assert!(tokenizer.encode_literal("").unwrap().is_empty());
    }

    #[test]
    fn tokens_of_the_config_are_added_in_transformers_order() {
        let (json, plain) = austen();
        let config = r#"{
            "added_tokens_decoder": {
                "4097": {"content": "<b>", "special": false},
                "4096": {"content": "<a>", "special": true},
                "4088": {"content": "<|im_start|>", "special": true}
            },
            "eos_token": "<end>",
            "additional_special_tokens": ["<c>", {"content": "<d>"}]
        }"#;
        let tokenizer = Tokenizer::from_json("t", &json, Some(config)).unwrap();
        let size = plain.vocabulary_size() as u32;
        assert_eq!(size, 4096);
        let names = ["<a>", "<b>", "<end>", "<c>", "<d>"];
        let ids: Vec<u32> = names.iter().map(|name| tokenizer.added_token(name).unwrap()).collect();
        assert_eq!(ids, [size, size + 1, size + 2, size + 3, size + 4]);
        let text = "x<a>y<b>z<end>";
        let found = tokenizer.encode(text).unwrap();
        assert!(found.contains(&size) && found.contains(&(size + 1)));
        assert_eq!(tokenizer.decode(&found), "xy<b>z");
    }

    #[test]
    fn decoding_is_that_of_the_library() {
        let (_, tokenizer) = austen();
        let ids: Vec<u32> = (0..4096).collect();
        for start in 0..ids.len() - 3 {
            let ids = &ids[start..start + 3];
            let expected = tokenizer.shared.tokenizer.decode(ids, true).unwrap();
            assert_eq!(tokenizer.decode(ids), expected, "{ids:?}");
        }
        assert_eq!(tokenizer.decode(&[u32::MAX]), "");
    }
}
