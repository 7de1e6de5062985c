//! Values as Python prints them. Chat templates were written against Python's `str`, `repr` and
//! `json.dumps`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value};

use super::arguments::{Bound, all, integer, refused};
use crate::json::long_integer;

/// Deepest nesting of lists and mappings that is printed. Python's own limit is near 1000.
const MAX_DEPTH: usize = 200;
/// Longest text, in bytes, that printing one value may produce.
const MAX_TEXT: usize = 16 << 20;

/// `repr(float)`: the shortest digits that read back to the same number, with an exponent below
/// 1e-4 and from 1e16 on.
pub(super) fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value == 0.0 || (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        if plain.contains('.') { plain } else { plain + ".0" }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{mantissa}e{sign}{:02}", exponent.abs())
    }
}

/// The text being written, with the limits on its size and on the nesting of values.
struct Writer {
    out: String,
    depth: usize,
}

impl Writer {
    fn push(&mut self, text: &str) -> Result<(), Error> {
        if self.out.len() + text.len() > MAX_TEXT {
            return Err(refused("a value is longer than 16 MiB when it is printed"));
        }
        self.out.push_str(text);
        Ok(())
    }

    fn enter(&mut self) -> Result<(), Error> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(refused(format!("a value is nested more than {MAX_DEPTH} levels deep")));
        }
        Ok(())
    }

    /// `repr(value)`.
    fn repr(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::String => self.quoted(value.as_str().unwrap_or_default()),
            ValueKind::Undefined => self.push("Undefined"),
            ValueKind::Seq | ValueKind::Iterable => {
                self.enter()?;
                let (open, close) = if value.is_tuple() { ("(", ")") } else { ("[", "]") };
                self.push(open)?;
                let mut count = 0;
                for item in value.try_iter()? {
                    if count > 0 {
                        self.push(", ")?;
                    }
                    self.repr(&item)?;
                    count += 1;
                }
                if value.is_tuple() && count == 1 {
                    self.push(",")?;
                }
                self.depth -= 1;
                self.push(close)
            }
            ValueKind::Map => {
                self.enter()?;
                self.push("{")?;
                for (i, key) in value.try_iter()?.enumerate() {
                    if i > 0 {
                        self.push(", ")?;
                    }
                    self.repr(&key)?;
                    self.push(": ")?;
                    self.repr(&value.get_item(&key)?)?;
                }
                self.depth -= 1;
                self.push("}")
            }
            _ => self.str(value),
        }
    }

    /// `str(value)`; an undefined value is empty, as in Jinja.
    fn str(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::Undefined => Ok(()),
            ValueKind::None => self.push("None"),
            ValueKind::Bool => self.push(if value.is_true() { "True" } else { "False" }),
            ValueKind::Number if !value.is_integer() => {
                self.push(&float(f64::try_from(value.clone())?))
            }
            ValueKind::String => self.push(value.as_str().unwrap_or_default()),
            // A macro or a loop is a plain object and prints itself.
            ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => self.repr(value),
            ValueKind::Invalid => Err(refused(value)),
            _ => self.push(&value.to_string()),
        }
    }

    /// `repr(str)`: single quotes unless the text has some and no double ones.
    fn quoted(&mut self, text: &str) -> Result<(), Error> {
        let quote = if text.contains('\'') && !text.contains('"') { "\"" } else { "'" };
        self.push(quote)?;
        for c in text.chars() {
            let code = u32::from(c);
            match c {
                '\\' => self.push("\\\\")?,
                '\n' => self.push("\\n")?,
                '\r' => self.push("\\r")?,
                '\t' => self.push("\\t")?,
                ' '..='~' if quote.contains(c) => self.push(&format!("\\{c}"))?,
                ' '..='~' => self.push(c.encode_utf8(&mut [0; 4]))?,
                c if is_printable(c) => self.push(c.encode_utf8(&mut [0; 4]))?,
                _ if code < 0x100 => self.push(&format!("\\x{code:02x}"))?,
                _ if code < 0x10000 => self.push(&format!("\\u{code:04x}"))?,
                _ => self.push(&format!("\\U{code:08x}"))?,
            }
        }
        self.push(quote)
    }
}

/// `str.isprintable` of a character outside ASCII. Rust's table of printable characters follows
/// the same rule; only a combining mark at the start of a text is escaped in addition.
fn is_printable(c: char) -> bool {
    let mut escaped = ['a', c].into_iter().collect::<String>();
    escaped = escaped.escape_debug().to_string();
    escaped.chars().eq(['a', c])
}

/// `str(value)` as text.
pub(super) fn text(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let mut writer = Writer { out: String::new(), depth: 0 };
    writer.str(value)?;
    Ok(writer.out)
}

/// What `{{ value }}` writes.
pub(super) fn print(out: &mut Output, _state: &mut State, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&text(value)?),
    }
    .map_err(Error::from)
}

/// The filter `string`: `str(value)`.
pub(super) fn string(value: &Value) -> Result<Value, Error> {
    if value.kind() == ValueKind::String { Ok(value.clone()) } else { text(value).map(Value::from) }
}

/// The test `iterable`. None is not iterable, although minijinja treats it as an empty list in a
/// loop. Templates guard fields that may be absent with this test (Qwen3-Coder: `tools is iterable
/// and tools | length > 0`).
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// The test `sequence`: values with a length and items; in Python also strings and mappings.
pub(super) fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined => true,
        // Slices and ranges.
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    }
}

/// How `json.dumps` lays out its text.
struct Layout {
    ascii: bool,
    indent: Option<String>,
    between: String,
    after_key: String,
    sort_keys: bool,
}

impl Writer {
    fn json(&mut self, value: &Value, layout: &Layout) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.push(&value.to_string()),
            ValueKind::Number => {
                let number = f64::try_from(value.clone())?;
                self.push(&match number {
                    f64::INFINITY => "Infinity".to_owned(),
                    f64::NEG_INFINITY => "-Infinity".to_owned(),
                    _ if number.is_nan() => "NaN".to_owned(),
                    _ => float(number),
                })
            }
            ValueKind::String => self.json_string(value.as_str().unwrap_or_default(), layout),
            ValueKind::Seq | ValueKind::Iterable => {
                self.enter()?;
                self.push("[")?;
                let mut count = 0;
                for item in value.try_iter()? {
                    self.json_item(count, layout)?;
                    self.json(&item, layout)?;
                    count += 1;
                }
                self.json_close("]", count, layout)
            }
            ValueKind::Map => {
                self.enter()?;
                self.push("{")?;
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if layout.sort_keys {
                    keys.sort();
                }
                for (i, key) in keys.iter().enumerate() {
                    self.json_item(i, layout)?;
                    match key.kind() {
                        ValueKind::String
                        | ValueKind::Number
                        | ValueKind::Bool
                        | ValueKind::None => {
                            let mut name = Writer { out: String::new(), depth: 0 };
                            match key.as_str() {
                                Some(text) => name.push(text)?,
                                None => name.json(key, layout)?,
                            }
                            self.json_string(&name.out, layout)?;
                        }
                        other => {
                            return Err(refused(format!("tojson: a key is a {other}")));
                        }
                    }
                    self.push(&layout.after_key)?;
                    self.json(&value.get_item(key)?, layout)?;
                }
                self.json_close("}", keys.len(), layout)
            }
            ValueKind::Undefined => {
                let message = "tojson: the value is undefined";
                Err(Error::new(ErrorKind::UndefinedError, message))
            }
            _ => match long_integer(value) {
                Some(digits) => self.push(digits),
                None => Err(refused(format!("tojson: found a {}", value.kind()))),
            },
        }
    }

    fn json_item(&mut self, index: usize, layout: &Layout) -> Result<(), Error> {
        if index > 0 {
            self.push(&layout.between)?;
        }
        self.json_line(layout)
    }

    fn json_line(&mut self, layout: &Layout) -> Result<(), Error> {
        if let Some(indent) = &layout.indent {
            self.push("\n")?;
            for _ in 0..self.depth {
                self.push(indent)?;
            }
        }
        Ok(())
    }

    fn json_close(&mut self, bracket: &str, items: usize, layout: &Layout) -> Result<(), Error> {
        self.depth -= 1;
        if items > 0 {
            self.json_line(layout)?;
        }
        self.push(bracket)
    }

    fn json_string(&mut self, text: &str, layout: &Layout) -> Result<(), Error> {
        let mut out = String::with_capacity(text.len() + 2);
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\0'..='\u{1f}' => drop(write!(out, "\\u{:04x}", u32::from(c))),
                '\u{7f}'.. if layout.ascii && c != '\u{7f}' => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                _ => out.push(c),
            }
        }
        out.push('"');
        self.push(&out)
    }
}

/// The filter `tojson` of transformers: `json.dumps(value, ensure_ascii=False, indent=None,
/// separators=None, sort_keys=False)`, without Jinja's HTML escapes.
pub(super) fn tojson(value: &Value, arguments: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let Bound([ascii, indent, separators, sort_keys]) =
        Bound::new("tojson", &all(arguments, named), names)?;
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => match indent.as_str() {
            Some(text) => Some(text.to_owned()),
            None => {
                let width = integer("tojson", "indent", &indent)?.max(0);
                if width > MAX_TEXT as i64 {
                    return Err(refused(format!("tojson: indent is {width}")));
                }
                Some(" ".repeat(width as usize))
            }
        },
    };
    let default = if indent.is_some() { "," } else { ", " };
    let (between, after_key) = match separators.filter(|separators| !separators.is_none()) {
        None => (default.to_owned(), ": ".to_owned()),
        Some(pair) => {
            let pair: Vec<Value> = pair.try_iter()?.take(3).collect();
            match pair.iter().map(Value::as_str).collect::<Vec<_>>()[..] {
                [Some(between), Some(after_key)] => (between.to_owned(), after_key.to_owned()),
                _ => return Err(refused("tojson: separators: expected two strings")),
            }
        }
    };
    let flag = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let layout =
        Layout { ascii: flag(ascii), indent, between, after_key, sort_keys: flag(sort_keys) };
    let mut writer = Writer { out: String::new(), depth: 0 };
    writer.json(value, &layout)?;
    Ok(Value::from(writer.out))
}
