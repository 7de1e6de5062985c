//! Values spelled as Python spells them, because chat templates were written against Python's `str`
//! and `json.dumps`.

use std::fmt::Write as _;
use std::io;

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Output, State, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// `repr(float)`: the shortest digits that read back the same, with an exponent below 1e-4 and from
/// 1e16 on.
fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').expect("the e format has an exponent");
    let exponent: i32 = exponent.parse().expect("the e format's exponent is a number");
    if value == 0.0 || (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        if plain.contains('.') { plain } else { plain + ".0" }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{mantissa}e{sign}{:02}", exponent.abs())
    }
}

/// `repr(str)`: single quotes unless the text has those and no double ones.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x20 || (0x7f..0xa1).contains(&(c as u32)) => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// `repr(value)`.
fn repr(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| repr(&item)).collect::<Result<Vec<_>, _>>()?;
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let mut items = Vec::new();
            for key in value.try_iter()? {
                items.push(format!("{}: {}", repr(&key)?, repr(&value.get_item(&key)?)?));
            }
            format!("{{{}}}", items.join(", "))
        }
        _ => display(value)?,
    })
}

/// `str(value)`; an undefined value is empty, as in Jinja.
fn display(value: &Value) -> Result<String, Error> {
    Ok(match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool => if value.is_true() { "True" } else { "False" }.to_owned(),
        ValueKind::Number if !value.is_integer() => float(f64::try_from(value.clone())?),
        // A macro or a loop is a plain object: it prints itself.
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => repr(value)?,
        _ => value.to_string(),
    })
}

/// What `{{ value }}` writes.
pub fn print(out: &mut Output, _state: &State, value: &Value) -> Result<(), Error> {
    if let Some(text) = value.as_str() {
        out.write_str(text)
    } else {
        out.write_str(&display(value)?)
    }
    .map_err(Error::from)
}

/// The filter `string`: `str(value)`.
pub fn string(value: &Value) -> Result<Value, Error> {
    if value.kind() == ValueKind::String {
        Ok(value.clone())
    } else {
        display(value).map(Value::from)
    }
}

/// The test `iterable`: none is not, although minijinja has it be an empty list in a loop. What may
/// be absent is guarded with it (Qwen3-Coder: `tools is iterable and tools | length > 0`).
pub fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// The test `sequence`: what has a length and items, in Python also texts and mappings.
pub fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined => true,
        // Slices and ranges.
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    }
}

/// The layout of `json.dumps`: `", "` and `": "` between items, or one item a line with `indent`.
struct PythonJson {
    indent: Option<usize>,
    depth: usize,
    filled: bool,
    between: Option<String>,
    after_key: Option<String>,
}

impl PythonJson {
    fn line<W: ?Sized + io::Write>(&self, out: &mut W) -> io::Result<()> {
        match self.indent {
            Some(width) => write!(out, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.filled = false;
        out.write_all(bracket)
    }

    fn item<W: ?Sized + io::Write>(&self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            let default = if self.indent.is_some() { "," } else { ", " };
            out.write_all(self.between.as_deref().unwrap_or(default).as_bytes())?;
        }
        self.line(out)
    }

    fn close<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.line(out)?;
        }
        // The container that this one stands in has at least this item.
        self.filled = true;
        out.write_all(bracket)
    }
}

impl Formatter for PythonJson {
    fn write_f64<W: ?Sized + io::Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(float(value).as_bytes())
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.item(out, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _out: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.item(out, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.after_key.as_deref().unwrap_or(": ").as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _out: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }
}

/// The `tojson` filter of transformers: `json.dumps(value, ensure_ascii=False, indent, separators,
/// sort_keys)`, without Jinja's own HTML escapes.
pub fn tojson(value: Value, options: Kwargs) -> Result<Value, Error> {
    let broken =
        |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent = options.get::<Option<usize>>("indent")?;
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    // Templates ask for `ensure_ascii=False`, which is what this filter always does.
    let _ = options.get::<Option<bool>>("ensure_ascii")?;
    options.assert_all_used()?;
    let (between, after_key) = match separators {
        Some(pair) => match <[String; 2]>::try_from(pair) {
            Ok([between, after_key]) => (Some(between), Some(after_key)),
            Err(found) => {
                let message = format!("tojson: separators has {} items, expected 2", found.len());
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        },
        None => (None, None),
    };
    if value.is_undefined() {
        let message = "tojson: the value is undefined";
        return Err(Error::new(ErrorKind::UndefinedError, message));
    }
    let mut json = serde_json::to_value(&value).map_err(broken)?;
    if sort_keys {
        json.sort_all_objects();
    }
    let mut out = Vec::new();
    let layout = PythonJson { indent, depth: 0, filled: false, between, after_key };
    json.serialize(&mut Serializer::with_formatter(&mut out, layout)).map_err(broken)?;
    let text = String::from_utf8(out).expect("serde_json writes UTF-8");
    Ok(Value::from_safe_string(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::Environment;

    fn render(template: &str, json: &str) -> String {
        let mut env = Environment::new();
        env.add_filter("tojson", tojson);
        env.add_filter("string", string);
        env.add_test("iterable", is_iterable);
        env.add_test("sequence", is_sequence);
        env.set_formatter(print);
        let x: serde_json::Value = serde_json::from_str(json).unwrap();
        env.render_str(template, minijinja::context! { x => Value::from_serialize(&x) }).unwrap()
    }

    #[test]
    fn json_has_pythons_separators_key_order_and_floats() {
        let json = r#"{"b":[1,-2,3.0,1e16,1e-5,0.0001,123456789012345.6],"a":{"é":"<&>\"\u0001\u007f\\/"},"n":null,"t":true,"e":[],"o":{}}"#;
        let expected = "{\"b\": [1, -2, 3.0, 1e+16, 1e-05, 0.0001, 123456789012345.6], \
                        \"a\": {\"é\": \"<&>\\\"\\u0001\u{7f}\\\\/\"}, \"n\": null, \"t\": true, \"e\": [], \"o\": {}}";
        assert_eq!(render("{{ x | tojson }}", json), expected);
    }

    #[test]
    fn json_with_indent_sorted_keys_and_separators() {
        let json = r#"{"b":[1,{"c":[]}],"a":{}}"#;
        let expected = "{\n  \"a\": {},\n  \"b\": [\n    1,\n    {\n      \"c\": []\n    }\n  ]\n}";
        assert_eq!(render("{{ x | tojson(indent=2, sort_keys=true) }}", json), expected);
        let compact = "{{ x | tojson(separators=(',', ':'), ensure_ascii=false) }}";
        assert_eq!(render(compact, json), r#"{"b":[1,{"c":[]}],"a":{}}"#);
    }

    #[test]
    fn printed_values_read_as_in_python() {
        let json = r#"[true,false,null,1.0,2,"it's","a\"b'","line\n",{"k":[1.5]}]"#;
        let expected = r#"[True, False, None, 1.0, 2, "it's", 'a"b\'', 'line\n', {'k': [1.5]}]"#;
        assert_eq!(render("{{ x }}", json), expected);
        assert_eq!(render("{{ x[0] }}{{ x[2] }}{{ x[5] }}{{ y }}", json), "TrueNoneit's");
        let texts = "{{ '<' ~ (x | string) ~ (x[2] | string) ~ (x[5] | string) ~ '>' }}";
        assert_eq!(render(texts, json), format!("<{expected}Noneit's>"));
        assert_eq!(render("{{ (x[0] | string) ~ (x[1] | string) }}", "[1e-7, 1e20]"), "1e-071e+20");
    }

    #[test]
    fn what_is_iterable_and_a_sequence_is_as_in_jinja() {
        let kinds = "{% for v in x %}{{ v is iterable }} {{ v is sequence }},{% endfor %}{{ y is iterable }} {{ y is sequence }}";
        let json = r#"[null, 1, true, "a", [], {}]"#;
        let (no, yes) = ("False False", "True True");
        assert_eq!(render(kinds, json), [no, no, no, yes, yes, yes, yes].join(","));
        assert_eq!(render("{{ x[1:] is sequence }} {{ range(3) is sequence }}", json), "True True");
        assert_eq!(
            render(
                "{% if x is iterable and x | length > 0 %}some{% else %}none{% endif %}",
                "null"
            ),
            "none"
        );
    }
}
