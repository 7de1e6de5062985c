//! The identity of a page's contents: a keyed hash chain over the tokens of a sequence.
//!
//! With a cache of 16 or 8 bits, the keys and values of generated tokens may differ in their last
//! bits from those of the same tokens in a prompt. The hash of a page therefore tells them apart.
//!
//! The key is drawn at random when the engine starts, so that nobody can construct a prompt whose
//! pages collide with those of another one.

use qwen3_model::PAGE_POSITIONS;

/// Identifies the contents of a page, those of all pages before it, the cache salt, and the model
/// and cache format.
pub(crate) type PageHash = [u8; 32];

/// The key of all chains of an engine.
pub(crate) struct ChainKey {
    key: [u8; 32],
    identity: PageHash,
}

impl ChainKey {
    /// Chains under the secret `key` for a model and cache format that `identity` describes.
    pub fn new(key: [u8; 32], identity: &[u8]) -> Self {
        let identity = *blake3::keyed_hash(&key, identity).as_bytes();
        Self { key, identity }
    }

    /// The parent of the first page of a chain that starts in arena `first`.
    pub fn start(&self, salt: &[u8], first: usize) -> PageHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&self.identity).update(&(first as u64).to_le_bytes()).update(salt);
        *hasher.finalize().as_bytes()
    }

    /// The hash of a page that holds `tokens` after the page `parent`, the first `prompt` of which
    /// are tokens of a prompt.
    pub fn next(&self, parent: &PageHash, tokens: &[u32], prompt: usize) -> PageHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(parent).update(&(prompt as u64).to_le_bytes());
        tokens.iter().for_each(|token| {
            hasher.update(&token.to_le_bytes());
        });
        *hasher.finalize().as_bytes()
    }

    /// The hashes of the full pages of `tokens`, of which `known` are the first. The first `prompt`
    /// tokens are a prompt, the others were generated.
    pub fn extend(
        &self,
        start: &PageHash,
        known: &mut Vec<PageHash>,
        tokens: &[u32],
        prompt: usize,
    ) {
        for (index, page) in tokens.chunks_exact(PAGE_POSITIONS).enumerate().skip(known.len()) {
            let prompt = prompt.saturating_sub(index * PAGE_POSITIONS).min(PAGE_POSITIONS);
            known.push(self.next(known.last().unwrap_or(start), page, prompt));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_identity_changes_the_hash() {
        let tokens: Vec<u32> = (0..300).collect();
        let hashes = |key: u8, identity: &[u8], salt: &[u8], first, tokens: &[u32]| {
            let key = ChainKey::new([key; 32], identity);
            let mut known = Vec::new();
            key.extend(&key.start(salt, first), &mut known, tokens, 280);
            known
        };
        let base = hashes(1, b"m", b"s", 0, &tokens);
        assert_eq!(base.len(), 2);
        assert_eq!(base, hashes(1, b"m", b"s", 0, &tokens[..256]));
        let mut changed = tokens.clone();
        changed[0] = 9;
        for other in [
            hashes(2, b"m", b"s", 0, &tokens),
            hashes(1, b"n", b"s", 0, &tokens),
            hashes(1, b"m", b"", 0, &tokens),
            hashes(1, b"m", b"s", 1, &tokens),
            hashes(1, b"m", b"s", 0, &changed),
        ] {
            assert!(base[0] != other[0] && base[1] != other[1]);
        }
        changed[0] = 0;
        changed[130] = 9;
        let other = hashes(1, b"m", b"s", 0, &changed);
        assert!(base[0] == other[0] && base[1] != other[1]);
        // Hashes that are known already are continued.
        let key = ChainKey::new([1; 32], b"m");
        let mut known = base[..1].to_vec();
        key.extend(&key.start(b"s", 0), &mut known, &tokens, 280);
        assert_eq!(known, base);
        // Where generated tokens begin counts, unless that is behind the page.
        known.clear();
        key.extend(&key.start(b"s", 0), &mut known, &tokens, 200);
        assert!(base[0] == known[0] && base[1] != known[1]);
    }
}
