//! JSON values whose numbers stay as they are written.
//!
//! Chat templates print numbers as Python does. `serde_json` reads 10²¹ + 1 as a floating-point
//! number, and its feature `arbitrary_precision` changes how every crate of a program reads
//! numbers. This reader keeps the text of each number.

use std::fmt;

use indexmap::IndexMap;
use minijinja::Value;
use minijinja::value::Object;

/// Deepest nesting of lists and objects that `Json::parse` accepts.
const MAX_DEPTH: usize = 128;
/// Longest integer in decimal digits, as in Python.
const MAX_DIGITS: usize = 4300;

/// A JSON value; numbers are kept as text.
#[derive(Clone, Debug, PartialEq)]
pub enum Json {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number as it is written, for example `1e+21` or `-0`.
    Number(String),
    /// A string.
    String(String),
    /// A list.
    Array(Vec<Json>),
    /// An object, in the order of the keys' first appearance. The last value of a repeated key
    /// counts.
    Object(IndexMap<String, Json>),
}

/// Where and why a text is not JSON.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not JSON: {problem} at byte {offset}")]
pub struct JsonError {
    /// What was found or expected.
    pub problem: &'static str,
    /// Offset in bytes.
    pub offset: usize,
}

impl Json {
    /// Parses a text that holds exactly one JSON value, nested at most 128 levels deep.
    pub fn parse(text: &str) -> Result<Self, JsonError> {
        Self::parse_to(text, MAX_DEPTH)
    }

    /// Parses a message that wraps such a value.
    pub(crate) fn parse_deep(text: &str) -> Result<Self, JsonError> {
        Self::parse_to(text, MAX_DEPTH + 8)
    }

    fn parse_to(text: &str, deepest: usize) -> Result<Self, JsonError> {
        let mut parser = Parser { text, at: 0, deepest };
        let value = parser.value(0)?;
        parser.skip_space();
        match parser.peek() {
            None => Ok(value),
            Some(_) => Err(parser.error("trailing characters")),
        }
    }

    /// A message of a conversation: an object with `role` and `content`.
    pub fn message(role: &str, content: &str) -> Self {
        let field = |name: &str, text: &str| (name.to_owned(), Json::String(text.to_owned()));
        Json::Object([field("role", role), field("content", content)].into_iter().collect())
    }

    /// The value of `key` if this is an object that has it.
    pub fn get(&self, key: &str) -> Option<&Json> {
        match self {
            Json::Object(entries) => entries.get(key),
            _ => None,
        }
    }

    /// The text if this is a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Json::String(text) => Some(text),
            _ => None,
        }
    }

    /// Whether this is `null`.
    pub fn is_null(&self) -> bool {
        matches!(self, Json::Null)
    }

    /// The kind of value in words, for messages.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Json::Null => "null",
            Json::Bool(_) => "true or false",
            Json::Number(_) => "a number",
            Json::String(_) => "a string",
            Json::Array(_) => "a list",
            Json::Object(_) => "an object",
        }
    }

    /// The value as a template sees it: numbers as Python's `json.loads` reads them.
    pub(crate) fn to_value(&self) -> Value {
        match self {
            Json::Null => Value::from(()),
            Json::Bool(flag) => Value::from(*flag),
            Json::Number(text) => number(text),
            Json::String(text) => Value::from(text.as_str()),
            Json::Array(items) => items.iter().map(Json::to_value).collect(),
            Json::Object(entries) => {
                Value::from_pairs(entries.iter().map(|(key, item)| (key.as_str(), item.to_value())))
            }
        }
    }
}

/// Compact JSON that `Json::parse` reads back to an equal value.
impl fmt::Display for Json {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let string = |text: &str| serde_json::Value::from(text).to_string();
        match self {
            Json::Null => out.write_str("null"),
            Json::Bool(flag) => write!(out, "{flag}"),
            Json::Number(text) => out.write_str(text),
            Json::String(text) => out.write_str(&string(text)),
            Json::Array(items) => {
                out.write_str("[")?;
                for (i, item) in items.iter().enumerate() {
                    write!(out, "{}{item}", if i > 0 { "," } else { "" })?;
                }
                out.write_str("]")
            }
            Json::Object(entries) => {
                out.write_str("{")?;
                for (i, (key, item)) in entries.iter().enumerate() {
                    write!(out, "{}{}:{item}", if i > 0 { "," } else { "" }, string(key))?;
                }
                out.write_str("}")
            }
        }
    }
}

impl From<serde_json::Value> for Json {
    fn from(value: serde_json::Value) -> Self {
        use serde_json::Value;
        match value {
            Value::Null => Json::Null,
            Value::Bool(flag) => Json::Bool(flag),
            Value::Number(number) => Json::Number(number.to_string()),
            Value::String(text) => Json::String(text),
            Value::Array(items) => Json::Array(items.into_iter().map(Json::from).collect()),
            Value::Object(entries) => {
                Json::Object(entries.into_iter().map(|(key, item)| (key, item.into())).collect())
            }
        }
    }
}

/// An integer beyond 128 bits. A template can print it, and nothing else.
#[derive(Debug)]
struct LongInteger(String);

impl Object for LongInteger {
    fn repr(self: &std::sync::Arc<Self>) -> minijinja::value::ObjectRepr {
        minijinja::value::ObjectRepr::Plain
    }

    fn render(self: &std::sync::Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// The digits of an integer beyond 128 bits that came from JSON.
pub(crate) fn long_integer(value: &Value) -> Option<&str> {
    value.downcast_object_ref::<LongInteger>().map(|integer| integer.0.as_str())
}

fn number(text: &str) -> Value {
    if text.contains(['.', 'e', 'E']) {
        // A value beyond f64 becomes an infinity, as in Python.
        return Value::from(text.parse::<f64>().unwrap_or(f64::NAN));
    }
    if let Ok(value) = text.parse::<i64>() {
        Value::from(value)
    } else if let Ok(value) = text.parse::<i128>() {
        Value::from(value)
    } else {
        Value::from_object(LongInteger(text.to_owned()))
    }
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    deepest: usize,
}

impl Parser<'_> {
    fn error(&self, problem: &'static str) -> JsonError {
        JsonError { problem, offset: self.at }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// Skips blanks and takes `byte` if it is next.
    fn take(&mut self, byte: u8) -> bool {
        self.skip_space();
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn value(&mut self, depth: usize) -> Result<Json, JsonError> {
        self.skip_space();
        if depth > self.deepest {
            return Err(self.error("nested more than 128 levels deep"));
        }
        match self.peek() {
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            Some(b'"') => Ok(Json::String(self.string()?)),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => {
                let words = [
                    ("null", Json::Null),
                    ("true", Json::Bool(true)),
                    ("false", Json::Bool(false)),
                ];
                for (word, value) in words {
                    if self.text[self.at..].starts_with(word) {
                        self.at += word.len();
                        return Ok(value);
                    }
                }
                Err(self.error("expected a value"))
            }
        }
    }

    fn array(&mut self, depth: usize) -> Result<Json, JsonError> {
        self.at += 1;
        let mut items = Vec::new();
        if self.take(b']') {
            return Ok(Json::Array(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            if self.take(b']') {
                return Ok(Json::Array(items));
            }
            if !self.take(b',') {
                return Err(self.error("expected `,` or `]`"));
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<Json, JsonError> {
        self.at += 1;
        let mut entries = IndexMap::new();
        if self.take(b'}') {
            return Ok(Json::Object(entries));
        }
        loop {
            self.skip_space();
            if self.peek() != Some(b'"') {
                return Err(self.error("expected a key"));
            }
            let key = self.string()?;
            if !self.take(b':') {
                return Err(self.error("expected `:`"));
            }
            let value = self.value(depth + 1)?;
            entries.insert(key, value);
            if self.take(b'}') {
                return Ok(Json::Object(entries));
            }
            if !self.take(b',') {
                return Err(self.error("expected `,` or `}`"));
            }
        }
    }

    /// The string that starts at the next byte, a quote. `serde_json` decodes its escapes.
    fn string(&mut self) -> Result<String, JsonError> {
        let start = self.at;
        let mut end = start + 1;
        let bytes = self.text.as_bytes();
        loop {
            match bytes.get(end) {
                Some(b'"') => break,
                Some(b'\\') => end += 2,
                Some(_) => end += 1,
                None => return Err(self.error("a string without its end")),
            }
        }
        self.at = end + 1;
        serde_json::from_str(&self.text[start..=end]).map_err(|_| JsonError {
            problem: "a string with a control character or a wrong escape",
            offset: start,
        })
    }

    fn number(&mut self) -> Result<Json, JsonError> {
        let start = self.at;
        let digits = |parser: &mut Self| {
            let from = parser.at;
            while matches!(parser.peek(), Some(b'0'..=b'9')) {
                parser.at += 1;
            }
            parser.at - from
        };
        self.at += usize::from(self.peek() == Some(b'-'));
        let zero = self.peek() == Some(b'0');
        let count = digits(self);
        if count == 0 || (zero && count > 1) {
            return Err(self.error("expected a digit, or no digit after a leading zero"));
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            if digits(self) == 0 {
                return Err(self.error("expected a digit"));
            }
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            self.at += usize::from(matches!(self.peek(), Some(b'+' | b'-')));
            if digits(self) == 0 {
                return Err(self.error("expected a digit"));
            }
        }
        let text = &self.text[start..self.at];
        if text.len() > MAX_DIGITS {
            return Err(self.error("a number of more than 4300 characters"));
        }
        Ok(Json::Number(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_keep_their_digits() {
        let text = r#"[12.917521550408111,1000000000000000000001,-0,-0.0,1e999,5e-324]"#;
        assert_eq!(Json::parse(text).unwrap().to_string(), text);
    }

    #[test]
    fn nesting_and_digits_have_limits() {
        let deep = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert!(Json::parse(&deep(MAX_DEPTH)).is_ok());
        let error = Json::parse(&deep(100_000)).unwrap_err();
        assert_eq!(error.problem, "nested more than 128 levels deep");
        assert!(Json::parse(&"1".repeat(4300)).is_ok());
        assert!(Json::parse(&"1".repeat(4301)).is_err());
    }

    #[test]
    fn the_last_value_of_a_repeated_key_counts_at_its_first_place() {
        let found = Json::parse(r#"{"a": 1, "b": 2, "a": 3}"#).unwrap();
        assert_eq!(found.to_string(), r#"{"a":3,"b":2}"#);
    }

    proptest! {
        /// `serde_json` accepts the same texts and finds the same values, up to numbers.
        #[test]
        fn reads_what_serde_json_reads(text in r#"[\[\]{}",:0-9eE+\-. tfnrualse\\u]{0,24}"#) {
            let found = Json::parse(&text);
            let expected = serde_json::from_str::<serde_json::Value>(&text);
            match expected {
                Ok(expected) => {
                    let again = serde_json::from_str::<serde_json::Value>(&found.unwrap().to_string());
                    prop_assert_eq!(again.unwrap(), expected);
                }
                Err(error) if error.to_string().contains("out of range") => {}
                Err(_) => prop_assert!(found.is_err(), "{:?}", found),
            }
        }
    }
}
