//! Token ids to text, one id at a time.

use crate::tokenizer::{Tokenizer, TokenizerError};

/// Decodes ids as they arrive and holds back bytes that are not a whole character yet.
///
/// The text of a token may depend on the token before it. Each step therefore decodes the ids of
/// the last two pieces and returns what the new ids add. (`DecodeStream` of the crate `tokenizers`
/// works the same way, but it cannot be finished: it never returns what it holds back.)
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    /// The ids of the last piece that was returned, then those whose text was not returned yet.
    ids: Vec<u32>,
    /// The text of the last piece that was returned.
    returned: String,
    /// How many of `ids` belong to `returned`.
    settled: usize,
}

impl Detokenizer {
    pub(crate) fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), returned: String::new(), settled: 0 }
    }

    /// Takes one id and returns the text that is complete now, which may be empty.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        // U+FFFD at the end may stand for the first bytes of a character. A character has at most
        // four bytes, so after more than four ids the bytes are not a character.
        let partial = text.ends_with('\u{FFFD}') && self.ids.len() - self.settled <= 4;
        if partial {
            return Ok(String::new());
        }
        self.advance(&text)
    }

    /// Ends the stream and returns the text that was held back.
    pub fn finish(mut self) -> Result<String, TokenizerError> {
        let text = self.tokenizer.decode(&self.ids)?;
        self.advance(&text)
    }

    fn advance(&mut self, text: &str) -> Result<String, TokenizerError> {
        let same = text.chars().zip(self.returned.chars()).take_while(|(a, b)| a == b);
        let new = text.chars().skip(same.count()).collect();
        self.ids.drain(..self.settled);
        self.settled = self.ids.len();
        self.returned = self.tokenizer.decode(&self.ids)?;
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn austen() -> Tokenizer {
        Tokenizer::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen")).unwrap()
    }

    #[test]
    fn streamed_text_is_the_whole_text_and_never_a_part_of_a_character() {
        let tokenizer = austen();
        // Most of these characters are several tokens of this small vocabulary.
        let words =
            "<|im_start|>你好，世界！🌍👩‍👩‍👧 naïve café, \n\n  and Elizabeth\u{301} was<|im_end|>";
        let ids = tokenizer.encode(words).unwrap();
        let mut stream = tokenizer.detokenizer();
        let mut shown = String::new();
        for &id in &ids {
            let piece = stream.push(id).unwrap();
            assert!(!piece.contains('\u{FFFD}'), "{piece:?} after {shown:?}");
            shown += &piece;
        }
        shown += &stream.finish().unwrap();
        assert_eq!(shown, words.replace("<|im_start|>", "").replace("<|im_end|>", ""));
        assert_eq!(shown, tokenizer.decode(&ids).unwrap());
    }

    #[test]
    fn bytes_that_never_become_a_character_are_returned_at_last() {
        let tokenizer = austen();
        let earth = tokenizer.encode("🌍").unwrap();
        assert!(earth.len() > 1, "the first id is a part of the character");
        let mut stream = tokenizer.detokenizer();
        assert_eq!(stream.push(earth[0]).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
        let mut stream = tokenizer.detokenizer();
        let pieces: Vec<String> = (0..6).map(|_| stream.push(earth[0]).unwrap()).collect();
        assert_eq!(pieces.concat() + &stream.finish().unwrap(), "\u{FFFD}".repeat(6));
    }
}
