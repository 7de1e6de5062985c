//! What is changed in the source of a template before minijinja compiles it.
//!
//! - transformers writes the template with the line ends of its platform, `\n`.
//! - `{% generation %}` marks the assistant's words for training. It adds nothing to the text, and
//!   minijinja takes no new tags, so it becomes a condition that always holds.
//! - minijinja's `~` prints a float in its own way. Each operand becomes `(operand)|string`, and
//!   the filter `string` prints as Python does.
//! - minijinja's `%` has no strings. `a % b` becomes `(a)|percent(b)`.
//! - minijinja has no sign `+`. It is left out.

/// The source that minijinja compiles.
pub(super) fn prepare(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source.as_str();
    while let Some(start) =
        rest.find("{{").into_iter().chain(rest.find("{%")).chain(rest.find("{#")).min()
    {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let end = if tag.starts_with("{#") {
            tag.find("#}").map_or(tag.len(), |at| at + 2)
        } else {
            end_of_tag(tag)
        };
        let (tag, after) = tag.split_at(end);
        rest = after;
        let Some(inner) = inside(tag) else {
            out.push_str(tag);
            continue;
        };
        match inner.trim_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", " if true ")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", " endif ")),
            // Everything up to the end of a raw block is text.
            "raw" => {
                let end = end_of_raw(rest);
                out.push_str(tag);
                out.push_str(&rest[..end]);
                rest = &rest[end..];
            }
            _ => {
                let statement = tag.starts_with("{%");
                let (signs, body) =
                    inner.split_at(inner.len() - inner.trim_start_matches(['-', '+']).len());
                out.push_str(&tag[..2]);
                out.push_str(signs);
                out.push_str(&operators(body, statement));
                out.push_str(&tag[tag.len() - 2..]);
            }
        }
    }
    out.push_str(rest);
    out
}

/// The text between the two-character delimiters of a complete tag that is no comment.
fn inside(tag: &str) -> Option<&str> {
    let closed = match tag.get(..2)? {
        "{{" => tag.len() >= 4 && tag.ends_with("}}"),
        "{%" => tag.len() >= 4 && tag.ends_with("%}"),
        _ => false,
    };
    closed.then(|| &tag[2..tag.len() - 2])
}

/// The length of the tag at the start of `text`: up to its closing delimiter outside of strings
/// and, for `}}`, outside of braces.
fn end_of_tag(text: &str) -> usize {
    let close: &[u8] = if text.starts_with("{{") { b"}}" } else { b"%}" };
    let bytes = text.as_bytes();
    let (mut at, mut braces) = (2, 0_usize);
    while at < bytes.len() {
        match bytes[at] {
            quote @ (b'\'' | b'"') => at = end_of_string(bytes, at, quote),
            b'{' => {
                braces += 1;
                at += 1;
            }
            b'}' if braces > 0 => {
                braces -= 1;
                at += 1;
            }
            _ if bytes[at..].starts_with(close) => return at + 2,
            _ => at += 1,
        }
    }
    text.len()
}

/// The position after the string whose opening quote is at `at`.
fn end_of_string(bytes: &[u8], mut at: usize, quote: u8) -> usize {
    at += 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// The offset of the tag `endraw`, or the length of the text.
fn end_of_raw(text: &str) -> usize {
    let mut from = 0;
    while let Some(at) = text[from..].find("{%").map(|at| from + at) {
        let word = text[at + 2..].trim_start_matches(['-', '+']).trim_start();
        if word.starts_with("endraw") {
            return at;
        }
        from = at + 2;
    }
    text.len()
}

/// Words that end an operand of `~`. (`not` and `in` after `is` belong to a test.)
const WORDS: [&str; 7] = ["and", "or", "not", "in", "if", "else", "recursive"];

/// The operators of an expression, or of a statement, in minijinja's form.
fn operators(body: &str, statement: bool) -> String {
    // A level per open bracket; each holds the finished text, and the operands of the current
    // expression.
    let mut levels = vec![Level::default()];
    let tokens = Tokens { rest: body };
    let (mut first, mut after_is, mut after_operator) = (statement, false, true);
    for token in tokens {
        let outermost = levels.len() == 1;
        let top = levels.last_mut().expect("the outermost level stays");
        let blank = token.trim().is_empty();
        match token {
            _ if blank => top.operand.push_str(token),
            "(" | "[" | "{" => levels.push(Level::default()),
            ")" | "]" | "}" if !outermost => {
                let inner = levels.pop().unwrap_or_default().finish();
                let open = match token {
                    ")" => '(',
                    "]" => '[',
                    _ => '{',
                };
                let top = levels.last_mut().expect("the outermost level stays");
                top.operand.push(open);
                top.operand.push_str(&inner);
                top.operand.push_str(token);
            }
            "%" => {
                top.close_percent();
                top.operand = format!("({})|percent(", top.operand);
                top.in_percent = true;
            }
            "*" | "/" | "//" => {
                top.close_percent();
                top.operand.push_str(token);
            }
            "~" => {
                top.close_percent();
                let operand = std::mem::take(&mut top.operand);
                top.operands.push(operand);
            }
            "," | ":" | "=" | "==" | "!=" | "<" | "<=" | ">" | ">=" => top.boundary(token),
            // `~` binds more tightly than a sum, and less than a product or a sign.
            "+" | "-" if !after_operator => top.boundary(token),
            "+" => {}
            _ if first || (WORDS.contains(&token) && !after_is) => top.boundary(token),
            _ => top.operand.push_str(token),
        }
        if !blank {
            first = false;
            after_operator = !token.ends_with(|c: char| {
                c.is_alphanumeric() || matches!(c, '_' | '\'' | '"' | ')' | ']' | '}')
            }) || WORDS.contains(&token);
            after_is = token == "is" || (after_is && token == "not");
        }
    }
    // An unclosed bracket is an error, which minijinja reports on the source as it is.
    match <[Level; 1]>::try_from(levels) {
        Ok([level]) => level.finish(),
        Err(_) => body.to_owned(),
    }
}

#[derive(Default)]
struct Level {
    done: String,
    operands: Vec<String>,
    operand: String,
    /// Whether `operand` ends in the right side of a `%`.
    in_percent: bool,
}

impl Level {
    fn close_percent(&mut self) {
        if std::mem::take(&mut self.in_percent) {
            self.operand.push(')');
        }
    }

    fn boundary(&mut self, token: &str) {
        self.close_percent();
        let operand = std::mem::take(&mut self.operand);
        let operands = std::mem::take(&mut self.operands);
        if operands.is_empty() {
            self.done.push_str(&operand);
        } else {
            // The blanks around the operands also keep words apart.
            self.done.push_str(" (");
            for operand in operands {
                self.done.push_str(&printed(&operand));
                self.done.push_str(" ~ ");
            }
            self.done.push_str(&printed(&operand));
            self.done.push_str(") ");
        }
        self.done.push_str(token);
    }

    fn finish(mut self) -> String {
        self.boundary("");
        self.done
    }
}

/// `(operand)|string`. Line breaks stay, so that errors name the right line.
fn printed(operand: &str) -> String {
    let body = operand.trim();
    let lines = operand.matches('\n').count() - body.matches('\n').count();
    format!("({body})|string{}", "\n".repeat(lines))
}

/// Cuts an expression into names and numbers, strings, operators and blanks.
struct Tokens<'t> {
    rest: &'t str,
}

impl<'t> Iterator for Tokens<'t> {
    type Item = &'t str;

    fn next(&mut self) -> Option<&'t str> {
        let first = self.rest.chars().next()?;
        let run = |keep: fn(char) -> bool| self.rest.find(|c| !keep(c)).unwrap_or(self.rest.len());
        let length = match first {
            '\'' | '"' => end_of_string(self.rest.as_bytes(), 0, first as u8).min(self.rest.len()),
            c if c.is_whitespace() => run(char::is_whitespace),
            '0'..='9' => number(self.rest),
            c if c.is_alphanumeric() || c == '_' => run(|c| c.is_alphanumeric() || c == '_'),
            '*' | '/' if self.rest[1..].starts_with(first) => 2,
            '=' | '!' | '<' | '>' if self.rest[1..].starts_with('=') => 2,
            c => c.len_utf8(),
        };
        let (token, rest) = self.rest.split_at(length);
        self.rest = rest;
        Some(token)
    }
}

/// The length of the number at the start of `text`.
fn number(text: &str) -> usize {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let sign = matches!(byte, b'+' | b'-')
            && matches!(bytes[at - 1], b'e' | b'E')
            && !text.starts_with("0x")
            && !text.starts_with("0X");
        match byte {
            b'.' if digit(at + 1) => at += 1,
            _ if sign && digit(at + 1) => at += 1,
            b'_' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => at += 1,
            _ => break,
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_printed_and_the_rest_stays() {
        for (source, expected) in [
            ("{{ a ~ b }}", "{{ ((a)|string ~ (b)|string) }}"),
            ("{{- a ~ b -}}", "{{- ((a)|string ~ (b)|string) -}}"),
            (
                "{{ f(a ~ b, c) ~ d if x == y ~ z else 'a ~ b' }}",
                "{{ ((f( ((a)|string ~ (b)|string) , c))|string ~ (d)|string) \
                 if x == ((y)|string ~ (z)|string) else 'a ~ b' }}",
            ),
            ("{%- set x = a ~ b %}", "{%- set x = ((a)|string ~ (b)|string) %}"),
            ("{% if a is not in b ~ c %}", "{% if ((a is not in b)|string ~ (c)|string) %}"),
            ("{{ 1 - a * -b ~ c + d }}", "{{ 1 - ((a * -b)|string ~ (c)|string) + d }}"),
            (
                "{{ '}}' }}~{# ~ {{ #}{% raw %}{{ a ~ b }}{% endraw %}",
                "{{ '}}' }}~{# ~ {{ #}{% raw %}{{ a ~ b }}{% endraw %}",
            ),
            ("{% generation %}x{%- endgeneration -%}", "{%  if true  %}x{%-  endif  -%}"),
            ("{{ {'a': {'b': x ~ y}} }}", "{{ {'a': {'b': ((x)|string ~ (y)|string) }} }}"),
            (
                "{{ a * 2 % b * c ~ 1e-7 }}",
                "{{ (((a * 2)|percent( b )* c)|string ~ (1e-7)|string) }}",
            ),
            ("{{ +3 - +x[-1:+2] }}", "{{ 3 - x[-1:2] }}"),
            ("a\r\nb\rc", "a\nb\nc"),
            ("{{ a ~ (b", "{{ a ~ (b"),
        ] {
            let squeeze = |text: &str| text.split_whitespace().collect::<String>();
            assert_eq!(squeeze(&prepare(source)), squeeze(expected), "{source}");
        }
    }
}
