//! A filter that hides an empty thought at the start of an answer: `<think>`, blanks, `</think>`.

/// Text that arrives in pieces of any size. What may still become an empty thought is held back.
#[derive(Default)]
pub struct EmptyThought {
    held: String,
    decided: bool,
}

impl EmptyThought {
    /// The text to show after the piece `text` has arrived.
    pub fn push(&mut self, text: &str) -> String {
        if self.decided {
            return text.to_owned();
        }
        self.held += text;
        // What is left after each part that is there completely.
        let mut rest = self.held.trim_start();
        for tag in ["<think>", "</think>"] {
            match rest.strip_prefix(tag) {
                Some(after) => rest = after.trim_start(),
                None if tag.starts_with(rest) => return String::new(),
                None => {
                    self.decided = true;
                    return std::mem::take(&mut self.held);
                }
            }
        }
        let shown = rest.to_owned();
        if !shown.is_empty() {
            self.decided = true;
            self.held.clear();
        }
        shown
    }

    /// The text that is still held back at the end of the answer.
    pub fn finish(&mut self) -> String {
        let held = std::mem::take(&mut self.held);
        let is_empty_thought = held.trim_end().ends_with("</think>");
        if self.decided || is_empty_thought { String::new() } else { held }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of `text` when it arrives in pieces of `size` characters.
    fn shown(text: &str, size: usize) -> String {
        let mut filter = EmptyThought::default();
        let chars: Vec<char> = text.chars().collect();
        let pieces = chars.chunks(size).map(|piece| filter.push(&String::from_iter(piece)));
        let mut shown: String = pieces.collect();
        shown += &filter.finish();
        shown
    }

    #[test]
    fn only_an_empty_thought_is_hidden() {
        for (text, expected) in [
            ("<think>\n\n</think>\n\n17 + 15 = 32", "17 + 15 = 32"),
            ("<think></think>32", "32"),
            ("\n<think>\n</think>\n", ""),
            ("<think>\nLet me see.\n</think>\n\n32", "<think>\nLet me see.\n</think>\n\n32"),
            ("<think>\n\n", "<think>\n\n"),
            ("32 <think></think>", "32 <think></think>"),
            (" 32", " 32"),
            ("<thin", "<thin"),
            ("", ""),
        ] {
            for size in [1, 2, 3, 7, 100] {
                assert_eq!(shown(text, size), expected, "{text:?} in pieces of {size}");
            }
        }
    }
}
