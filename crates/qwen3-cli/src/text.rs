//! Text to token ids and back, also one id at a time.

use std::fs::File;
use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// `tokenizer.json` is absent.
    #[error("{}: no such file; expected the checkpoint's tokenizer", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// `tokenizer.json` cannot be read or understood, a text has no ids, or ids have no text.
    #[error("{}: {source}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        source: tokenizers::Error,
    },
}

/// A checkpoint's tokenizer.
#[derive(Debug)]
pub struct Text {
    path: PathBuf,
    tokenizer: Tokenizer,
}

impl Text {
    /// `tokenizer.json` of a checkpoint's folder, if it can be opened.
    pub fn find(dir: &Path) -> Result<PathBuf, TextError> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(TextError::Missing { path });
        }
        match File::open(&path) {
            Ok(_) => Ok(path),
            Err(source) => Err(TextError::Tokenizer { path, source: source.into() }),
        }
    }

    /// Reads `tokenizer.json` of a checkpoint's folder.
    pub fn open(dir: &Path) -> Result<Self, TextError> {
        let path = Self::find(dir)?;
        let read = || {
            let mut tokenizer = Tokenizer::from_file(&path)?;
            // Those are habits of batches in training: a prompt is neither cut nor filled up.
            tokenizer.with_padding(None).with_truncation(None)?;
            Ok(tokenizer)
        };
        match read() {
            Ok(tokenizer) => Ok(Self { path, tokenizer }),
            Err(source) => Err(TextError::Tokenizer { path, source }),
        }
    }

    /// The ids of a text as a user writes it, with what the tokenizer puts around texts.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.ids(text, true)
    }

    /// The ids of a text that a chat template rendered: what belongs around it is there.
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, TextError> {
        self.ids(text, false)
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TextError> {
        let encoding = self
            .tokenizer
            .encode_fast(text, add_special_tokens)
            .map_err(|source| self.failed(source))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, without special tokens. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TextError> {
        self.tokenizer.decode(ids, true).map_err(|source| self.failed(source))
    }

    /// Text that grows with each id.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { text: self, ids: Vec::new(), shown: String::new(), settled: 0 }
    }

    fn failed(&self, source: tokenizers::Error) -> TextError {
        TextError::Tokenizer { path: self.path.clone(), source }
    }
}

/// Turns ids into text as they come, holding back bytes that are not a whole character yet.
///
/// The text of a token may depend on the one before it, so each step decodes the ids of the last
/// two pieces and shows what the new ones add. (`DecodeStream` of `tokenizers` works alike, but it
/// has no end: it never shows what it holds back.)
#[derive(Debug)]
pub struct TextStream<'t> {
    text: &'t Text,
    /// The ids of the last piece shown, then those not shown yet.
    ids: Vec<u32>,
    /// The text of the last piece shown.
    shown: String,
    /// How many of `ids` are in `shown`.
    settled: usize,
}

impl TextStream<'_> {
    /// Takes one id; returns the text that is whole now, which may be empty.
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        self.ids.push(id);
        let text = self.text.decode(&self.ids)?;
        // U+FFFD at the end may be the first bytes of a character. A character has four at most, so
        // after more ids than that it is none.
        let partial = text.ends_with('\u{FFFD}') && self.ids.len() - self.settled <= 4;
        if partial {
            return Ok(String::new());
        }
        self.show(&text)
    }

    /// The text that was held back, when no more ids come.
    pub fn finish(mut self) -> Result<String, TextError> {
        let text = self.text.decode(&self.ids)?;
        self.show(&text)
    }

    fn show(&mut self, text: &str) -> Result<String, TextError> {
        let same = text.chars().zip(self.shown.chars()).take_while(|(a, b)| a == b);
        let new = text.chars().skip(same.count()).collect();
        self.ids.drain(..self.settled);
        self.settled = self.ids.len();
        self.shown = self.text.decode(&self.ids)?;
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn austen() -> Text {
        Text::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen")).unwrap()
    }

    #[test]
    fn streamed_text_is_the_whole_text_and_never_a_part_of_a_character() {
        let text = austen();
        // Most of these characters are several tokens of this small vocabulary.
        let words =
            "<|im_start|>你好，世界！🌍👩‍👩‍👧 naïve café, \n\n  and Elizabeth\u{301} was<|im_end|>";
        let ids = text.encode(words).unwrap();
        let mut stream = text.stream();
        let mut shown = String::new();
        for &id in &ids {
            let piece = stream.push(id).unwrap();
            assert!(!piece.contains('\u{FFFD}'), "{piece:?} after {shown:?}");
            shown += &piece;
        }
        shown += &stream.finish().unwrap();
        assert_eq!(shown, words.replace("<|im_start|>", "").replace("<|im_end|>", ""));
        assert_eq!(shown, text.decode(&ids).unwrap());
    }

    #[test]
    fn bytes_that_never_become_a_character_are_shown_at_last() {
        let text = austen();
        let earth = text.encode("🌍").unwrap();
        assert!(earth.len() > 1, "the first id is a part of the character");
        let mut stream = text.stream();
        assert_eq!(stream.push(earth[0]).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
        let mut stream = text.stream();
        let pieces: Vec<String> = (0..6).map(|_| stream.push(earth[0]).unwrap()).collect();
        assert_eq!(pieces.concat() + &stream.finish().unwrap(), "\u{FFFD}".repeat(6));
    }
}
