//! The bytes that each token stands for.

use tokenizers::Tokenizer;

use super::Added;

/// The bytes of every token, one after the other.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    bytes: Vec<u8>,
    /// Where the token of each id ends in `bytes`.
    ends: Vec<u32>,
    /// Ids of tokens that decoding leaves out, ascending.
    special: Vec<u32>,
}

impl Vocabulary {
    pub(super) fn new(tokenizer: &Tokenizer, added: &[Added]) -> Self {
        let table = byte_table();
        let mut tokens: Vec<(u32, String)> =
            tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        tokens.sort();
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for (id, token) in tokens {
            // Ids without a token have no bytes.
            ends.resize(ends.len().max(id as usize), bytes.len() as u32);
            // A character outside of the byte-level alphabet means that the token is text.
            let level: Option<Vec<u8>> =
                token.chars().map(|c| table.get(c as usize).copied().flatten()).collect();
            bytes.extend(level.unwrap_or_else(|| token.into_bytes()));
            ends.push(bytes.len() as u32);
        }
        let special = added.iter().filter(|token| token.special).map(|token| token.id).collect();
        Self { bytes, ends, special }
    }

    /// One more than the largest id.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of a token.
    pub(crate) fn bytes(&self, id: u32) -> &[u8] {
        let at = id as usize;
        let Some(&end) = self.ends.get(at) else {
            return &[];
        };
        let start = at.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }

    /// Whether decoding leaves a token out.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        self.special.binary_search(&id).is_ok()
    }

    /// The bytes that a token adds to a text: none for a special token.
    pub(crate) fn text(&self, id: u32) -> &[u8] {
        if self.is_special(id) { &[] } else { self.bytes(id) }
    }
}

/// The byte that each character stands for in byte-level BPE (GPT-2, `bytes_to_unicode`): printable
/// bytes are written as themselves, the others as the characters from U+0100 on.
fn byte_table() -> Vec<Option<u8>> {
    let mut table = vec![None; 0x100];
    for byte in 0..=255_u8 {
        if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
            table[usize::from(byte)] = Some(byte);
        } else {
            table.push(Some(byte));
        }
    }
    table
}
