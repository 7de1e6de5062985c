//! Methods of Python's strings, lists and dictionaries that `minijinja_contrib` lacks or has in
//! another form.

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::arguments::{Bound, integer, refused};

/// Calls a method of a value as Python does.
pub(super) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let found = match (value.kind(), value.as_str()) {
        (_, Some(text)) => of_string(text, method, arguments)?,
        (ValueKind::Seq, _) => of_list(value, method, arguments)?,
        (ValueKind::Map, _) if method == "copy" => Some(value.clone()),
        _ => None,
    };
    match found {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

/// Python's white space: Unicode's, and four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn string_argument(method: &str, value: Option<&Value>) -> Result<String, Error> {
    match value.and_then(|value| value.as_str()) {
        Some(text) => Ok(text.to_owned()),
        None => Err(refused(format!("{method}: expected a string"))),
    }
}

/// `None` for a method that is left to `minijinja_contrib`.
fn of_string(text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => {
            let Bound([chars]) = Bound::new(method, arguments, ["chars"])?;
            let chars = match chars.filter(|chars| !chars.is_none()) {
                Some(chars) => Some(string_argument(method, Some(&chars))?),
                None => None,
            };
            let strip = |c: char| chars.as_ref().map_or(is_space(c), |set| set.contains(c));
            Value::from(match method {
                "strip" => text.trim_matches(strip),
                "lstrip" => text.trim_start_matches(strip),
                _ => text.trim_end_matches(strip),
            })
        }
        "partition" | "rpartition" => {
            let Bound([separator]) = Bound::new(method, arguments, ["sep"])?;
            let separator = string_argument(method, separator.as_ref())?;
            if separator.is_empty() {
                return Err(refused(format!("{method}: empty separator")));
            }
            let first = method == "partition";
            let found =
                if first { text.split_once(&separator) } else { text.rsplit_once(&separator) };
            let parts = match found {
                Some((before, after)) => [before, &separator, after],
                None if first => [text, "", ""],
                None => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" | "removesuffix" => {
            let Bound([part]) = Bound::new(method, arguments, ["part"])?;
            let part = string_argument(method, part.as_ref())?;
            let rest = match method {
                "removeprefix" => text.strip_prefix(&part),
                _ => text.strip_suffix(&part),
            };
            Value::from(rest.unwrap_or(text))
        }
        "split" | "rsplit" => {
            let Bound([separator, most]) = Bound::new(method, arguments, ["sep", "maxsplit"])?;
            let most = match most {
                Some(most) => usize::try_from(integer(method, "maxsplit", &most)?).ok(),
                None => None,
            };
            let parts = match separator.filter(|separator| !separator.is_none()) {
                Some(separator) => {
                    let separator = string_argument(method, Some(&separator))?;
                    if separator.is_empty() {
                        return Err(refused(format!("{method}: empty separator")));
                    }
                    let most = most.map_or(usize::MAX, |most| most.saturating_add(1));
                    if method == "split" {
                        text.splitn(most, &separator).map(Value::from).collect()
                    } else {
                        let mut parts: Vec<Value> =
                            text.rsplitn(most, &separator).map(Value::from).collect();
                        parts.reverse();
                        parts
                    }
                }
                None => words(text, most.unwrap_or(usize::MAX), method == "rsplit"),
            };
            Value::from(parts)
        }
        "splitlines" => {
            let Bound([keep]) = Bound::new(method, arguments, ["keepends"])?;
            lines(text, keep.is_some_and(|keep| keep.is_true())).map(Value::from).collect()
        }
        "title" => {
            let mut inside = false;
            let letter = |c: char| {
                let upper = !std::mem::replace(&mut inside, c.is_alphabetic());
                if upper { c.to_uppercase().to_string() } else { c.to_lowercase().to_string() }
            };
            text.chars().map(letter).collect::<String>().into()
        }
        "swapcase" => text
            .chars()
            .map(|c| {
                if c.is_uppercase() {
                    c.to_lowercase().to_string()
                } else {
                    c.to_uppercase().to_string()
                }
            })
            .collect::<String>()
            .into(),
        // Full case folding differs from lower case in few letters, of which one is frequent.
        "casefold" => text.to_lowercase().replace('ß', "ss").replace('ς', "σ").into(),
        "find" | "rfind" | "index" | "rindex" | "count" | "startswith" | "endswith" => {
            search(text, method, arguments)?
        }
        "zfill" => {
            let Bound([width]) = Bound::new(method, arguments, ["width"])?;
            let (sign, digits) = match text.strip_prefix(['+', '-']) {
                Some(digits) => text.split_at(text.len() - digits.len()),
                None => ("", text),
            };
            let missing = missing(text, method, width.as_ref())?;
            format!("{sign}{}{digits}", "0".repeat(missing)).into()
        }
        "ljust" | "rjust" | "center" => {
            let Bound([width, fill]) = Bound::new(method, arguments, ["width", "fillchar"])?;
            let fill = match fill {
                Some(fill) => string_argument(method, Some(&fill))?,
                None => " ".to_owned(),
            };
            if fill.chars().count() != 1 {
                return Err(refused(format!("{method}: fillchar: expected one character")));
            }
            let missing = missing(text, method, width.as_ref())?;
            let width = missing + text.chars().count();
            let left = match method {
                "ljust" => 0,
                "rjust" => missing,
                // CPython puts the odd character on the left if the width is odd.
                _ => missing / 2 + (missing & width & 1),
            };
            format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left)).into()
        }
        "expandtabs" => {
            let Bound([size]) = Bound::new(method, arguments, ["tabsize"])?;
            let size = match size {
                Some(size) => integer(method, "tabsize", &size)?.clamp(0, 1024) as usize,
                None => 8,
            };
            let (mut out, mut column) = (String::new(), 0);
            for c in text.chars() {
                match c {
                    '\t' if size > 0 => {
                        let blanks = size - column % size;
                        out.extend(std::iter::repeat_n(' ', blanks));
                        column += blanks;
                    }
                    '\t' => {}
                    '\n' | '\r' => {
                        out.push(c);
                        column = 0;
                    }
                    _ => {
                        out.push(c);
                        column += 1;
                    }
                }
            }
            out.into()
        }
        "isidentifier" => {
            let mut chars = text.chars();
            let start = |c: char| c == '_' || c.is_alphabetic();
            let first = chars.next().is_some_and(start);
            Value::from(first && chars.all(|c| c == '_' || c.is_alphanumeric()))
        }
        "isdecimal" => Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())),
        "isprintable" => Value::from(!text.chars().any(char::is_control)),
        "istitle" => {
            let (mut previous, mut any) = (false, false);
            let ok = text.chars().all(|c| {
                let cased = c.is_uppercase() || c.is_lowercase();
                let ok = !cased || c.is_uppercase() != previous;
                any |= cased;
                previous = cased;
                ok
            });
            Value::from(ok && any)
        }
        "join" => {
            let Bound([items]) = Bound::new(method, arguments, ["iterable"])?;
            let items = items.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
            let mut out = String::new();
            for (i, item) in items.try_iter()?.enumerate() {
                let Some(item) = item.as_str() else {
                    let found = item.kind();
                    return Err(refused(format!(
                        "join: item {i}: expected a string, found {found}"
                    )));
                };
                if i > 0 {
                    out.push_str(text);
                }
                out.push_str(item);
            }
            out.into()
        }
        _ => return Ok(None),
    }))
}

/// How many characters `text` lacks to a width that a template asks for.
fn missing(text: &str, method: &str, width: Option<&Value>) -> Result<usize, Error> {
    let width = width.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
    let width = integer(method, "width", width)?;
    let missing = width.saturating_sub(text.chars().count() as i64).max(0) as usize;
    if missing > 1 << 20 {
        return Err(refused(format!("{method}: the width is {width}")));
    }
    Ok(missing)
}

/// Words between white space, with at most `most` cuts from the left or the right.
fn words(text: &str, most: usize, from_right: bool) -> Vec<Value> {
    let mut parts = Vec::new();
    let mut rest = if from_right {
        text.trim_end_matches(is_space)
    } else {
        text.trim_start_matches(is_space)
    };
    while !rest.is_empty() {
        let cut = if from_right {
            rest.rsplit_once(is_space)
                .map(|(before, word)| (word, before.trim_end_matches(is_space)))
        } else {
            rest.split_once(is_space)
                .map(|(word, after)| (word, after.trim_start_matches(is_space)))
        };
        match cut {
            Some((word, after)) if parts.len() < most => {
                parts.push(Value::from(word));
                rest = after;
            }
            Some(_) => {
                let last = if from_right { rest } else { rest.trim_end_matches(|_| false) };
                parts.push(Value::from(last));
                break;
            }
            None => {
                parts.push(Value::from(rest));
                break;
            }
        }
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// Lines at every boundary that Python knows.
pub(super) fn lines(text: &str, keep: bool) -> impl Iterator<Item = &str> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (line, end) = match rest.find(is_end) {
            Some(at) if rest[at..].starts_with("\r\n") => (at, at + 2),
            Some(at) => (at, at + rest[at..].chars().next().map_or(1, char::len_utf8)),
            None => (rest.len(), rest.len()),
        };
        let found = &rest[..if keep { end } else { line }];
        rest = &rest[end..];
        Some(found)
    })
}

/// Methods that look for a text between two positions, which count characters.
fn search(text: &str, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let Bound([what, start, end]) = Bound::new(method, arguments, ["sub", "start", "end"])?;
    let what = what.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
    let length = text.chars().count() as i64;
    let position = |value: Option<Value>, default: i64| match value.filter(|v| !v.is_none()) {
        Some(value) => {
            let at = integer(method, "position", &value)?;
            Ok(if at < 0 { at.saturating_add(length).max(0) } else { at })
        }
        None => Ok::<_, Error>(default),
    };
    let (start, end) = (position(start, 0)?, position(end, length)?.min(length));
    let inside = start <= end;
    let range: String = match inside {
        true => text.chars().skip(start as usize).take((end - start) as usize).collect(),
        false => String::new(),
    };
    if matches!(method, "startswith" | "endswith") {
        let matches = |part: &Value| match part.as_str() {
            Some(part) if method == "startswith" => Ok(inside && range.starts_with(part)),
            Some(part) => Ok(inside && range.ends_with(part)),
            None => Err(refused(format!("{method}: expected a string or a tuple of strings"))),
        };
        if !what.is_tuple() {
            return matches(&what).map(Value::from);
        }
        for part in what.try_iter()? {
            if matches(&part)? {
                return Ok(Value::from(true));
            }
        }
        return Ok(Value::from(false));
    }
    let what = string_argument(method, Some(&what))?;
    if method == "count" {
        return Ok(Value::from(if inside { range.matches(&what).count() } else { 0 }));
    }
    let found = if method.starts_with('r') { range.rfind(&what) } else { range.find(&what) };
    match found.filter(|_| inside) {
        Some(at) => Ok(Value::from(start + range[..at].chars().count() as i64)),
        None if method.ends_with("find") => Ok(Value::from(-1)),
        None => Err(refused(format!("{method}: substring not found"))),
    }
}

fn of_list(value: &Value, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "index" => {
            let Bound([what]) = Bound::new(method, arguments, ["value"])?;
            let what = what.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
            match value.try_iter()?.position(|item| item == what) {
                Some(at) => Ok(Some(Value::from(at))),
                None => Err(refused("index: the value is not in the list")),
            }
        }
        "copy" => Ok(Some(value.clone())),
        _ => Ok(None),
    }
}
