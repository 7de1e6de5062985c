//! Strings that end an answer.

use crate::answer::held;

/// Most stop strings of a request.
const MAX_STRINGS: usize = 16;
/// Longest stop string, in bytes.
const MAX_BYTES: usize = 4096;

/// Why stop strings are refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StopError {
    /// There are too many.
    #[error("stop: found {found} strings, expected at most {MAX_STRINGS}")]
    TooMany {
        /// How many there are.
        found: usize,
    },
    /// One is empty or too long.
    #[error("stop: string {index} has {bytes} bytes, expected 1 to {MAX_BYTES}")]
    Length {
        /// Its position in the list.
        index: usize,
        /// Its length.
        bytes: usize,
    },
}

/// Ends a text before the first stop string, which may come in several pieces. No part of a stop
/// string is returned.
#[derive(Clone, Debug)]
pub struct StopStrings {
    strings: Vec<String>,
    /// Text that may be the beginning of a stop string.
    pending: String,
    stopped: Option<usize>,
}

impl StopStrings {
    /// At most 16 strings of 1 to 4096 bytes; none stops nothing.
    pub fn new(strings: Vec<String>) -> Result<Self, StopError> {
        if strings.len() > MAX_STRINGS {
            return Err(StopError::TooMany { found: strings.len() });
        }
        for (index, string) in strings.iter().enumerate() {
            if string.is_empty() || string.len() > MAX_BYTES {
                return Err(StopError::Length { index, bytes: string.len() });
            }
        }
        Ok(Self { strings, pending: String::new(), stopped: None })
    }

    /// Takes a piece of the text and returns what cannot be a part of a stop string. After a stop
    /// string was found, everything is dropped.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped.is_some() {
            return String::new();
        }
        self.pending.push_str(piece);
        // The string that is complete first counts; of two that end together, the longer one.
        let found = self.strings.iter().enumerate().filter_map(|(index, string)| {
            let start = self.pending.find(string)?;
            Some((start + string.len(), start, index))
        });
        if let Some((_, start, index)) = found.min() {
            self.stopped = Some(index);
            self.pending.truncate(start);
            return std::mem::take(&mut self.pending);
        }
        let strings: Vec<&str> = self.strings.iter().map(String::as_str).collect();
        let kept = held(&self.pending, &strings, |_| false, false);
        self.pending.drain(..self.pending.len() - kept).collect()
    }

    /// The position in the list of the string that was found.
    pub fn stopped(&self) -> Option<usize> {
        self.stopped
    }

    /// Ends the text and returns what was held back.
    pub fn finish(self) -> String {
        if self.stopped.is_some() { String::new() } else { self.pending }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(strings: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let strings = strings.iter().map(|text| (*text).to_owned()).collect();
        let mut stop = StopStrings::new(strings).unwrap();
        let mut text: String = pieces.iter().map(|piece| stop.push(piece)).collect();
        let stopped = stop.stopped();
        text += &stop.finish();
        (text, stopped)
    }

    #[test]
    fn a_stop_string_across_pieces_is_never_returned() {
        let mut stop = StopStrings::new(vec!["END".to_owned()]).unwrap();
        assert_eq!(stop.push("the E"), "the ");
        assert_eq!(stop.push("N"), "");
        assert_eq!(stop.push("d EN"), "ENd ");
        assert_eq!(stop.push("D more"), "");
        assert_eq!(
            (stop.stopped(), stop.push("x"), stop.finish()),
            (Some(0), "".into(), "".into())
        );
        assert_eq!(cut(&["END"], &["an EN"]), ("an EN".to_owned(), None));
        assert_eq!(cut(&["bc", "abcd", "abc"], &["xabcd"]), ("x".to_owned(), Some(2)));
        assert_eq!(cut(&["ü"], &["für"]), ("f".to_owned(), Some(0)));
        assert_eq!(cut(&[], &["all"]), ("all".to_owned(), None));
    }

    #[test]
    fn too_many_and_wrong_strings_are_refused() {
        let many = vec!["a".to_owned(); 17];
        assert_eq!(StopStrings::new(many).unwrap_err(), StopError::TooMany { found: 17 });
        let empty = vec!["a".to_owned(), String::new()];
        assert_eq!(StopStrings::new(empty).unwrap_err(), StopError::Length { index: 1, bytes: 0 });
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            text in "[abc]{0,30}",
            strings in proptest::collection::vec("[abc]{1,4}", 0..4),
            cuts in proptest::collection::vec(0..31_usize, 0..6),
        ) {
            let strings: Vec<&str> = strings.iter().map(String::as_str).collect();
            let mut places: Vec<usize> = cuts.iter().map(|at| at % (text.len() + 1)).collect();
            places.extend([0, text.len()]);
            places.sort_unstable();
            let pieces: Vec<&str> = places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            let single: Vec<String> = text.chars().map(String::from).collect();
            let single: Vec<&str> = single.iter().map(String::as_str).collect();
            let expected = cut(&strings, &single);
            prop_assert_eq!(&cut(&strings, &pieces), &expected);
            prop_assert!(strings.iter().all(|string| !expected.0.contains(string)));
            prop_assert!(text.starts_with(&expected.0));
        }
    }
}
