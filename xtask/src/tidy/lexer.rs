//! Just enough of Rust's lexical rules to tell code from comments and strings.

/// `source` with every comment and every string and character literal blanked; lines and columns stay.
pub fn code_only(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes.get(at + 1) == Some(&b'/') => line_end(bytes, at),
            b'/' if bytes.get(at + 1) == Some(&b'*') => block_comment_end(bytes, at),
            b'"' => string_end(bytes, at + 1),
            b'\'' => character_end(bytes, at),
            byte if is_word(byte) => {
                let word = at + bytes[at..].iter().take_while(|&&b| is_word(b)).count();
                match raw_string_end(bytes, at, word) {
                    Some(end) => end,
                    None => {
                        at = word;
                        continue;
                    }
                }
            }
            _ => {
                at += 1;
                continue;
            }
        };
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    // Only whole literals and comments were blanked, so no character was cut; bytes of others never changed.
    String::from_utf8(out).unwrap_or_default()
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

fn line_end(bytes: &[u8], from: usize) -> usize {
    from + bytes[from..].iter().take_while(|&&b| b != b'\n').count()
}

/// Rust's block comments nest.
fn block_comment_end(bytes: &[u8], from: usize) -> usize {
    let (mut at, mut depth) = (from, 0);
    while at < bytes.len() {
        match &bytes[at..bytes.len().min(at + 2)] {
            b"/*" => (at, depth) = (at + 2, depth + 1),
            b"*/" => (at, depth) = (at + 2, depth - 1),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    bytes.len()
}

fn string_end(bytes: &[u8], mut at: usize) -> usize {
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The end of a raw string that begins with the word at `from..word` (r, br or cr), or `None` if none begins there.
fn raw_string_end(bytes: &[u8], from: usize, word: usize) -> Option<usize> {
    if !matches!(&bytes[from..word], b"r" | b"br" | b"cr") {
        return None;
    }
    let hashes = bytes[word..].iter().take_while(|&&b| b == b'#').count();
    if bytes.get(word + hashes) != Some(&b'"') {
        return None;
    }
    let mut at = word + hashes + 1;
    while at < bytes.len() {
        if bytes[at] == b'"' && bytes[at + 1..].iter().take_while(|&&b| b == b'#').count() >= hashes {
            return Some(at + 1 + hashes);
        }
        at += 1;
    }
    Some(bytes.len())
}

/// A character literal's end; a lifetime's quote is passed over alone.
fn character_end(bytes: &[u8], from: usize) -> usize {
    match bytes.get(from + 1) {
        Some(b'\\') => {
            // After the backslash one byte belongs to the escape, even if it is a quote.
            let rest = from + 3;
            rest + bytes[rest.min(bytes.len())..].iter().take_while(|&&b| b != b'\'').count() + 1
        }
        Some(_) => {
            let first = std::str::from_utf8(&bytes[from + 1..]).ok().and_then(|text| text.chars().next());
            let close = from + 1 + first.map_or(1, char::len_utf8);
            if bytes.get(close) == Some(&b'\'') { close + 1 } else { from + 1 }
        }
        None => from + 1,
    }
    .min(bytes.len())
}

/// The words (identifiers, keywords, numbers) of code, each with its byte offset.
pub fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let bytes = code.as_bytes();
        at += bytes[at..].iter().take_while(|&&b| !is_word(b)).count();
        let length = bytes[at..].iter().take_while(|&&b| is_word(b)).count();
        let word = (at, &code[at..at + length]);
        at += length;
        (length > 0).then_some(word)
    })
}

/// The line, from 1, of a byte offset.
pub fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset].iter().filter(|&&b| b == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(source: &str) -> Vec<String> {
        let code = code_only(source);
        assert_eq!(code.len(), source.len());
        words(&code).map(|(_, word)| word.to_owned()).collect()
    }

    #[test]
    fn comments_and_literals_vanish() {
        assert_eq!(kept("a // b\nc /* d /* e */ f */ g"), ["a", "c", "g"]);
        assert_eq!(kept(r#"a "b \" c" d b"e" f c"g" h"#), ["a", "d", "b", "f", "c", "h"]);
        assert_eq!(kept("a r#\"b \" c\"# d br\"e\\\" f r##\"g\"# h\"## i"), ["a", "d", "f", "i"]);
        assert_eq!(kept(r"a 'b' c '\'' d '\u{1F600}' e 'é' f '\\' g"), ["a", "c", "d", "e", "f", "g"]);
    }

    #[test]
    fn lifetimes_and_raw_names_stay() {
        assert_eq!(
            kept("fn f<'a>(x: &'a str, y: &'static u8) {}"),
            ["fn", "f", "a", "x", "a", "str", "y", "static", "u8"]
        );
        assert_eq!(kept("let r#type = r; 'outer: loop {}"), ["let", "r", "type", "r", "outer", "loop"]);
    }

    #[test]
    fn unfinished_input_ends() {
        for source in ["\"abc", "/* abc", "r#\"abc", "'", "'\\", "x = '\\u", "b\""] {
            assert_eq!(code_only(source).len(), source.len());
        }
    }

    #[test]
    fn lines_count_from_one() {
        assert_eq!([0, 1, 2, 3].map(|offset| line_of("a\nb\n", offset)), [1, 1, 2, 2]);
    }
}
