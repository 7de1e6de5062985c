//! Token ids to text, one id at a time.

use crate::tokenizer::Tokenizer;

/// Decodes ids as they arrive and holds back bytes that are not a whole character yet. The pieces
/// join to what `Tokenizer::decode` makes of all ids.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    /// At most three bytes, the start of a character.
    held: Vec<u8>,
}

impl Detokenizer {
    pub(crate) fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, held: Vec::new() }
    }

    /// Takes one id and returns the text that is complete now, which may be empty.
    pub fn push(&mut self, id: u32) -> String {
        self.held.extend_from_slice(self.tokenizer.vocabulary().text(id));
        let mut text = String::new();
        let mut rest = self.held.as_slice();
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                }
                Err(error) => {
                    let (valid, broken) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = broken;
                    match error.error_len() {
                        Some(length) => {
                            text.push('\u{FFFD}');
                            rest = &rest[length..];
                        }
                        None => break,
                    }
                }
            }
        }
        self.held = rest.to_vec();
        text
    }

    /// Ends the stream and returns the text that was held back.
    pub fn finish(self) -> String {
        String::from_utf8_lossy(&self.held).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

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
            let piece = stream.push(id);
            assert!(!piece.contains('\u{FFFD}'), "{piece:?} after {shown:?}");
            shown += &piece;
        }
        shown += &stream.finish();
        assert_eq!(shown, words.replace("<|im_start|>", "").replace("<|im_end|>", ""));
    }

    #[test]
    fn bytes_that_never_become_a_character_are_returned_at_last() {
        let tokenizer = austen();
        let earth = tokenizer.encode("🌍").unwrap();
        assert!(earth.len() > 1, "the first id is a part of the character");
        let mut stream = tokenizer.detokenizer();
        assert_eq!(stream.push(earth[0]), "");
        assert_eq!(stream.finish(), "\u{FFFD}");
    }

    #[test]
    fn pieces_join_to_the_decoded_text() {
        let tokenizer = austen();
        let ids = proptest::collection::vec(0..4200_u32, 0..40);
        proptest!(|(ids in ids)| {
            let mut stream = tokenizer.detokenizer();
            let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
            text += &stream.finish();
            prop_assert_eq!(text, tokenizer.decode(&ids));
        });
    }
}
