//! Filters of Jinja that minijinja lacks or has in another form.

use minijinja::filters as builtin;
use minijinja::value::{Kwargs, Rest, StringInput, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::arguments::{Bound, all, integer, refused};
use super::methods::{self, is_space};
use super::python;

/// Registers the filters and tests.
pub(super) fn register(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", python::tojson);
    environment.add_filter("string", python::string);
    environment.add_filter("join", join);
    environment.add_filter("upper", |state: &State, value: &Value| {
        Ok(builtin::upper(StringInput::new(state, &python::string(value)?)?))
    });
    environment.add_filter("lower", |state: &State, value: &Value| {
        Ok(builtin::lower(StringInput::new(state, &python::string(value)?)?))
    });
    environment.add_filter("capitalize", |state: &State, value: &Value| {
        Ok(builtin::capitalize(StringInput::new(state, &python::string(value)?)?))
    });
    environment
        .add_filter("title", |value: &Value| Ok(builtin::title(python::text(value)?.into())));
    environment.add_filter("trim", trim);
    environment.add_filter("replace", replace);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("items", items);
    environment.add_filter("first", first);
    environment.add_filter("attr", |_value: &Value, _name: &Value| Value::UNDEFINED);
    environment.add_filter("round", round);
    environment.add_filter("float", float);
    environment.add_filter("int", int);
    environment.add_filter("center", center);
    environment.add_filter("wordcount", |value: &Value| {
        let text = python::text(value)?;
        // Jinja counts runs of word characters.
        let word = |c: char| c.is_alphanumeric() || c == '_';
        Ok(text.split(|c| !word(c)).filter(|part| !part.is_empty()).count())
    });
    environment.add_filter("forceescape", escape);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("percent", percent);
    environment.add_filter("indent", indent);
    environment.add_filter("dictsort", dictsort);
    environment.add_filter("urlencode", urlencode);
    environment.add_filter("truncate", truncate);
    environment.add_filter("striptags", |value: &Value| {
        Ok(minijinja_contrib::filters::striptags(python::text(value)?))
    });
    environment.add_filter("filesizeformat", minijinja_contrib::filters::filesizeformat);
    environment.add_test("iterable", python::is_iterable);
    environment.add_test("sequence", python::is_sequence);
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    // These would print otherwise than in Python, or do not exist there.
    for name in ["pprint", "split", "lines", "bool", "chain", "zip"] {
        environment.remove_filter(name);
    }
    for name in ["startingwith", "endingwith", "safe"] {
        environment.remove_test(name);
    }
    environment.remove_global("debug");
}

/// `join(separator='', attribute=None)`: items as Python prints them.
fn join(
    state: &mut State,
    value: &Value,
    arguments: Rest<Value>,
    named: Kwargs,
) -> Result<Value, Error> {
    let Bound([separator, attribute]) =
        Bound::new("join", &all(arguments, named), ["d", "attribute"])?;
    if value.is_undefined() {
        return Ok(Value::from(""));
    }
    let value = match attribute.filter(|attribute| !attribute.is_none()) {
        Some(attribute) => {
            let named = Kwargs::from_iter([("attribute", attribute)]);
            state.apply_filter("map", &[value.clone(), Value::from(named)])?
        }
        None => value.clone(),
    };
    let separator = separator.as_ref().map_or(Ok(String::new()), python::text)?;
    let mut out = String::new();
    for (i, item) in characters_or_items(&value)?.enumerate() {
        if i > 0 {
            out.push_str(&separator);
        }
        out.push_str(&python::text(&item)?);
        // The engine charges for a result; this loop may make a long one of a lazy input.
        state.consume_fuel((separator.len() / 64) as u64 + 1)?;
    }
    Ok(Value::from(out))
}

/// The items of a value; those of a string are its characters.
fn characters_or_items(value: &Value) -> Result<Box<dyn Iterator<Item = Value>>, Error> {
    match value.as_str() {
        Some(text) => {
            let items: Vec<Value> = text.chars().map(Value::from).collect();
            Ok(Box::new(items.into_iter()))
        }
        None => Ok(Box::new(value.try_iter()?)),
    }
}

/// `trim(chars=None)`.
fn trim(value: &Value, arguments: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let Bound([chars]) = Bound::new("trim", &all(arguments, named), ["chars"])?;
    let text = python::text(value)?;
    Ok(match chars.filter(|chars| !chars.is_none()) {
        Some(chars) => {
            let chars = python::text(&chars)?;
            text.trim_matches(|c| chars.contains(c)).to_owned()
        }
        None => text.trim_matches(is_space).to_owned(),
    })
}

/// `replace(old, new, count=None)`.
fn replace(
    state: &State,
    value: &Value,
    arguments: Rest<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let Bound([old, new, count]) =
        Bound::new("replace", &all(arguments, named), ["old", "new", "count"])?;
    let missing = || Error::from(ErrorKind::MissingArgument);
    let text = python::text(value)?;
    let old = python::text(&old.ok_or_else(missing)?)?;
    let new = python::text(&new.ok_or_else(missing)?)?;
    let count = match count.filter(|count| !count.is_none()) {
        Some(count) => usize::try_from(integer("replace", "count", &count)?).ok(),
        None => None,
    };
    let count = count.unwrap_or(usize::MAX).min(text.matches(&old).count());
    state.consume_fuel((count.saturating_mul(new.len()) / 64) as u64)?;
    Ok(text.replacen(&old, &new, count))
}

/// `length`; that of an undefined value is 0.
fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() { Ok(0) } else { builtin::length(value) }
}

/// `items`; an undefined value has none.
fn items(value: &Value) -> Result<Value, Error> {
    if value.is_undefined() { Ok(Value::from(Vec::<Value>::new())) } else { builtin::items(value) }
}

/// `first`; that of an undefined value is undefined.
fn first(value: &Value) -> Result<Value, Error> {
    if value.is_undefined() { Ok(Value::UNDEFINED) } else { builtin::first(value) }
}

/// `round(precision=0, method='common')`: `common` rounds the exact decimal value of the float,
/// half to even.
fn round(value: &Value, arguments: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let Bound([precision, method]) =
        Bound::new("round", &all(arguments, named), ["precision", "method"])?;
    let precision = precision.map_or(Ok(0), |value| integer("round", "precision", &value))?;
    let number = match value.kind() {
        ValueKind::Number | ValueKind::Bool => f64::try_from(value.clone())?,
        other => return Err(refused(format!("round: found a {other}, expected a number"))),
    };
    let method = method.as_ref().map_or(Ok("common".to_owned()), python::text)?;
    // Beyond this many digits, every float is a whole number or has no further digits.
    let digits = precision.clamp(-400, 400);
    let rounded = match method.as_str() {
        "common" if !number.is_finite() => number,
        // Rust prints the exact value, rounded half to even.
        "common" if digits >= 0 => {
            format!("{number:.*}", digits as usize).parse().unwrap_or(number)
        }
        "common" => {
            let exact = format!("{number:e}");
            let exponent: i64 =
                exact.split_once('e').and_then(|(_, text)| text.parse().ok()).unwrap_or(0);
            match usize::try_from(exponent + digits) {
                Ok(kept) => format!("{number:.kept$e}").parse().unwrap_or(number),
                Err(_) => {
                    let unit = 10_f64.powi(-digits as i32);
                    if unit.is_finite() {
                        (number / unit).round_ties_even() * unit
                    } else {
                        0.0 * number
                    }
                }
            }
        }
        "ceil" | "floor" => {
            let scale = 10_f64.powi(digits as i32);
            let scaled = number * scale;
            (if method == "ceil" { scaled.ceil() } else { scaled.floor() }) / scale
        }
        _ => return Err(refused("round: method must be common, ceil or floor")),
    };
    // Python's `round(int, n)` is an integer.
    if value.is_integer()
        && method == "common"
        && value.kind() == ValueKind::Number
        && rounded.abs() < 9e15
    {
        return Ok(Value::from(rounded as i64));
    }
    Ok(Value::from(rounded))
}

/// `float(default=0.0)`: the default if the value is not a number.
fn float(value: &Value, arguments: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let Bound([default]) = Bound::new("float", &all(arguments, named), ["default"])?;
    let number = match value.as_str() {
        Some(text) => text.trim_matches(is_space).replace('_', "").parse().ok(),
        None => f64::try_from(value.clone()).ok(),
    };
    Ok(number.map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from))
}

/// `int(default=0, base=10)`: the default if the value is not a number.
fn int(value: &Value, arguments: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let names = ["default", "base"];
    let Bound([default, base]) = Bound::new("int", &all(arguments, named), names)?;
    let base = base.map_or(Ok(10), |base| integer("int", "base", &base))?;
    let found = match value.as_str() {
        Some(text) => {
            let text = text.trim_matches(is_space).replace('_', "").to_lowercase();
            let (sign, digits) = match text.strip_prefix(['+', '-']) {
                Some(digits) => (if text.starts_with('-') { "-" } else { "" }, digits),
                None => ("", text.as_str()),
            };
            let prefixes = [("0x", 16), ("0o", 8), ("0b", 2)];
            let prefix = prefixes.iter().find(|(prefix, _)| digits.starts_with(prefix));
            let (base, digits) = match prefix {
                Some((prefix, of)) if base == *of || base == 0 => (*of, &digits[prefix.len()..]),
                _ => (if base == 0 { 10 } else { base }, digits),
            };
            let parsed = match u32::try_from(base) {
                Ok(base @ 2..=36) => i128::from_str_radix(&format!("{sign}{digits}"), base).ok(),
                _ => None,
            };
            let float = || text.parse::<f64>().ok().filter(|float| float.abs() < 1e38);
            parsed.or_else(|| Some(float()? as i128))
        }
        None if value.kind() == ValueKind::Bool => Some(i128::from(value.is_true())),
        None if value.is_integer() => return Ok(value.clone()),
        None => {
            let float = f64::try_from(value.clone()).ok().filter(|float| float.abs() < 1e38);
            float.map(|float| float as i128)
        }
    };
    Ok(found.map_or_else(|| default.unwrap_or_else(|| Value::from(0)), Value::from))
}

/// `center(width=80)`.
fn center(state: &mut State, value: &Value, width: Option<Value>) -> Result<Value, Error> {
    let text = Value::from(python::text(value)?);
    methods::call(state, &text, "center", &[width.unwrap_or_else(|| Value::from(80))])
}

/// `escape` and `forceescape`: without automatic escaping both replace the special characters of
/// HTML.
fn escape(value: &Value) -> Result<String, Error> {
    let text = python::text(value)?.replace('&', "&amp;").replace('<', "&lt;");
    Ok(text.replace('>', "&gt;").replace('\'', "&#39;").replace('"', "&#34;"))
}

/// `left % right`: a format with its values, or the remainder of a division.
fn percent(state: &mut State, left: &Value, right: &Value) -> Result<Value, Error> {
    if left.as_str().is_some() {
        let mut arguments = vec![left.clone()];
        if right.is_tuple() {
            arguments.extend(right.try_iter()?);
        } else {
            arguments.push(right.clone());
        }
        return format(state, &arguments);
    }
    let zero = || refused("modulo by zero");
    let number = |value: &Value| match value.kind() {
        ValueKind::Number | ValueKind::Bool => Ok(value.clone()),
        other => Err(refused(format!("%: found a {other}, expected a number or a string"))),
    };
    let (left, right) = (number(left)?, number(right)?);
    if let (Ok(a), Ok(b)) = (i128::try_from(left.clone()), i128::try_from(right.clone()))
        && left.is_integer_like()
        && right.is_integer_like()
    {
        let remainder = if b == -1 { Some(0) } else { a.checked_rem(b) }.ok_or_else(zero)?;
        // The result has the sign of the divisor.
        let moved = remainder != 0 && (remainder < 0) != (b < 0);
        return Ok(Value::from(if moved { remainder + b } else { remainder }));
    }
    let (a, b) = (f64::try_from(left)?, f64::try_from(right)?);
    if b == 0.0 {
        return Err(zero());
    }
    let remainder = a % b;
    let moved = remainder != 0.0 && (remainder < 0.0) != (b < 0.0);
    Ok(Value::from(if moved { remainder + b } else { remainder.abs().copysign(b) }))
}

trait IntegerLike {
    fn is_integer_like(&self) -> bool;
}

impl IntegerLike for Value {
    /// Integers and truth values, which count as 0 and 1.
    fn is_integer_like(&self) -> bool {
        self.is_integer() || self.kind() == ValueKind::Bool
    }
}

/// Applies minijinja's format after printing the values that it prints in its own way.
fn format(state: &mut State, arguments: &[Value]) -> Result<Value, Error> {
    let printed = |value: &Value| match value.kind() {
        ValueKind::Number | ValueKind::Bool if value.is_integer_like() => Ok(value.clone()),
        ValueKind::String | ValueKind::Map => Ok(value.clone()),
        _ => python::string(value),
    };
    state.apply_filter("format", arguments).or_else(|error| {
        match arguments.iter().map(printed).collect::<Result<Vec<_>, _>>() {
            Ok(texts) => state.apply_filter("format", &texts),
            Err(_) => Err(error),
        }
    })
}

/// `indent(width=4, first=False, blank=False)`.
fn indent(value: &Value, arguments: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let names = ["width", "first", "blank"];
    let Bound([width, first, blank]) = Bound::new("indent", &all(arguments, named), names)?;
    let indent = match width {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => {
                let width = integer("indent", "width", &width)?.max(0);
                if width > 1 << 16 {
                    return Err(refused(format!("indent: the width is {width}")));
                }
                " ".repeat(width as usize)
            }
        },
    };
    let on = |flag: Option<Value>| flag.is_some_and(|flag| flag.is_true());
    let (first, blank) = (on(first), on(blank));
    let text = python::text(value)? + "\n";
    let mut out = String::new();
    for (i, line) in methods::lines(&text, false).enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&indent);
        }
        out.push_str(line);
        if out.len() > 16 << 20 {
            return Err(refused("indent: the text is longer than 16 MiB"));
        }
    }
    Ok(out)
}

/// `dictsort(case_sensitive=False, by='key', reverse=False)`, with arguments by position too.
fn dictsort(value: &Value, arguments: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let names = ["case_sensitive", "by", "reverse"];
    let bound = Bound::new("dictsort", &all(arguments, named), names)?;
    let given = names.iter().zip(bound.0).filter_map(|(name, value)| Some((*name, value?)));
    builtin::dictsort(value, Kwargs::from_iter(given))
}

/// `urlencode` of a string, or of the pairs of a mapping or list.
fn urlencode(value: &Value) -> Result<String, Error> {
    fn quote(text: &str, keep: &[u8]) -> String {
        let mut out = String::with_capacity(text.len());
        for byte in text.bytes() {
            if byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) || keep.contains(&byte) {
                out.push(char::from(byte));
            } else {
                out.push_str(&format!("%{byte:02X}"));
            }
        }
        out
    }
    let mut pairs = Vec::new();
    for item in match value.kind() {
        ValueKind::Map | ValueKind::Seq | ValueKind::Iterable => value.try_iter()?,
        _ => return Ok(quote(&python::text(value)?, b"/")),
    } {
        let (name, item) = match value.kind() {
            ValueKind::Map => (item.clone(), value.get_item(&item)?),
            _ => (item.get_item_by_index(0)?, item.get_item_by_index(1)?),
        };
        let (name, item) = (python::text(&name)?, python::text(&item)?);
        pairs.push(format!(
            "{}={}",
            quote(&name, b"").replace("%20", "+"),
            quote(&item, b"").replace("%20", "+")
        ));
    }
    Ok(pairs.join("&"))
}

/// `truncate(length=255, killwords=False, end='...', leeway=5)`.
fn truncate(value: &Value, arguments: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let names = ["length", "killwords", "end", "leeway"];
    let Bound([length, kill, end, leeway]) = Bound::new("truncate", &all(arguments, named), names)?;
    let number = |name, value: Option<Value>, default| {
        value.map_or(Ok(default), |value| integer("truncate", name, &value))
    };
    let (length, leeway) = (number("length", length, 255)?, number("leeway", leeway, 5)?);
    let end = end.as_ref().map_or(Ok("...".to_owned()), python::text)?;
    let text = python::text(value)?;
    let kept = length - end.chars().count() as i64;
    if kept < 0 || leeway < 0 {
        return Err(refused("truncate: the length must hold the end, and the leeway be positive"));
    }
    if text.chars().count() as i64 <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let cut: String = text.chars().take(kept as usize).collect();
    let cut = match kill.is_some_and(|kill| kill.is_true()) {
        true => cut.as_str(),
        false => cut.rsplit_once(' ').map_or(cut.as_str(), |(before, _)| before),
    };
    Ok(format!("{cut}{end}"))
}
