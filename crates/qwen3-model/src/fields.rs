//! The fields of a JSON configuration file, read one by one, with errors that name the file and the
//! field.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use checkpoint::{Document, DocumentError};
use serde_json::{Map, Value};

/// The largest size or count that a configuration may state: 2³¹ − 1, so that the product of two of
/// them fits in 64 bits.
pub(crate) const MAX_SIZE: usize = i32::MAX as usize;

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is missing or unreadable.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The file is not JSON.
    #[error("{}: is not JSON: {source}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Where the text stops being JSON.
        source: serde_json::Error,
    },
    /// A field that has no default is absent.
    #[error("{}: field {field} is missing, expected {expected}", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
        /// The field's name, with dots between levels.
        field: String,
        /// What belongs there.
        expected: String,
    },
    /// A field holds a value of the wrong JSON type.
    #[error("{}: field {field} is {found}, expected {expected}", file.display())]
    Type {
        /// The file.
        file: PathBuf,
        /// The field's name, with dots between levels.
        field: String,
        /// The value, shortened.
        found: String,
        /// What belongs there.
        expected: String,
    },
    /// A field holds a value outside of its range.
    #[error("{}: field {field} is {found}, expected {expected}", file.display())]
    Range {
        /// The file.
        file: PathBuf,
        /// The field's name, with dots between levels.
        field: String,
        /// The value.
        found: String,
        /// The range.
        expected: String,
    },
    /// Two fields exclude each other.
    #[error("{}: field {field} is {found}, which contradicts {other}, expected {expected}", file.display())]
    Contradiction {
        /// The file.
        file: PathBuf,
        /// The field's name, with dots between levels.
        field: String,
        /// Its value.
        found: String,
        /// The field that it contradicts, and that one's value: `name = value`.
        other: String,
        /// What would agree.
        expected: String,
    },
    /// A field asks for something valid that this runtime does not do.
    #[error("{}: field {field} is {found}, which is not supported, expected {expected}", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The field's name, with dots between levels.
        field: String,
        /// Its value.
        found: String,
        /// What is supported.
        expected: String,
    },
}

/// Parses a document as JSON.
pub(crate) fn parse_json(document: &Document) -> Result<Value, ConfigError> {
    serde_json::from_slice(&document.bytes)
        .map_err(|source| ConfigError::Json { file: document.file.clone(), source })
}

/// One JSON object of a file. An absent field and a `null` are the same, as in the configurations
/// that Hugging Face writes.
pub(crate) struct Fields<'a> {
    file: &'a Path,
    /// Names of the objects around this one, each followed by a dot.
    prefix: String,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The whole file, which must be an object.
    pub fn top(file: &'a Path, value: &'a Value) -> Result<Self, ConfigError> {
        match value {
            Value::Object(object) => Ok(Self { file, prefix: String::new(), object }),
            other => Err(ConfigError::Type {
                file: file.to_owned(),
                field: "(the whole file)".into(),
                found: shown(other),
                expected: "an object".into(),
            }),
        }
    }

    /// Whether the field is there, be it `null`.
    pub fn has(&self, field: &str) -> bool {
        self.object.contains_key(field)
    }

    /// The field's value unless it is absent or `null`.
    pub fn value(&self, field: &str) -> Option<&'a Value> {
        self.object.get(field).filter(|value| !value.is_null())
    }

    /// An object within this one.
    pub fn object(&self, field: &str) -> Result<Option<Fields<'a>>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields {
                file: self.file,
                prefix: format!("{}{field}.", self.prefix),
                object,
            })),
            Some(other) => Err(self.mistyped(field, other, "an object")),
        }
    }

    pub fn string(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.mistyped(field, other, "a string")),
        }
    }

    pub fn boolean(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        match self.value(field) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(other) => Err(self.mistyped(field, other, "true or false")),
        }
    }

    /// A finite number.
    pub fn number(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        match self.value(field) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|number| number.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.mistyped(field, value, "a finite number")),
            },
        }
    }

    /// A whole number in `low..=`[`MAX_SIZE`].
    pub fn count(&self, field: &str, low: usize) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.value(field) else {
            return Ok(None);
        };
        let expected = format!("a whole number in {low}..={MAX_SIZE}");
        if !(value.is_u64() || value.is_i64()) {
            return Err(self.mistyped(field, value, &expected));
        }
        match value.as_u64().and_then(|number| usize::try_from(number).ok()) {
            Some(number) if (low..=MAX_SIZE).contains(&number) => Ok(Some(number)),
            _ => Err(self.range(field, value, &expected)),
        }
    }

    /// Whether the object has no fields.
    pub fn is_empty(&self) -> bool {
        self.object.is_empty()
    }

    /// A size in `1..=high` that must be stated.
    pub fn size_up_to(&self, field: &str, high: usize) -> Result<usize, ConfigError> {
        let size = self.size(field)?;
        if size > high {
            return Err(self.range(field, size, &format!("a whole number in 1..={high}")));
        }
        Ok(size)
    }

    /// As [`count`](Self::count), also of a number such as `64.0`, which some programs write.
    pub fn count_or_float(&self, field: &str, low: usize) -> Result<Option<usize>, ConfigError> {
        match self.value(field).and_then(Value::as_f64) {
            Some(number) if self.object[field].is_f64() && number.fract() == 0.0 => {
                let whole = (low as f64..=MAX_SIZE as f64).contains(&number);
                let expected = format!("a whole number in {low}..={MAX_SIZE}");
                if whole {
                    Ok(Some(number as usize))
                } else {
                    Err(self.range(field, number, &expected))
                }
            }
            _ => self.count(field, low),
        }
    }

    /// A size that must be stated and cannot be zero.
    pub fn size(&self, field: &str) -> Result<usize, ConfigError> {
        match self.count(field, 1)? {
            Some(size) => Ok(size),
            None => Err(self.missing(field, "a whole number, at least 1")),
        }
    }

    /// One token id or a list of them; empty when absent.
    pub fn token_ids(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let Some(value) = self.value(field) else {
            return Ok(Vec::new());
        };
        let expected = "a token id or a list of token ids";
        let id = |value: &Value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| self.mistyped(field, value, expected))
        };
        match value {
            Value::Array(list) => list.iter().map(id).collect(),
            one => Ok(vec![id(one)?]),
        }
    }

    pub fn missing(&self, field: &str, expected: &str) -> ConfigError {
        ConfigError::Missing {
            file: self.file.to_owned(),
            field: self.name(field),
            expected: expected.into(),
        }
    }

    pub fn mistyped(&self, field: &str, found: &Value, expected: &str) -> ConfigError {
        ConfigError::Type {
            file: self.file.to_owned(),
            field: self.name(field),
            found: shown(found),
            expected: expected.into(),
        }
    }

    pub fn range(&self, field: &str, found: impl Display, expected: &str) -> ConfigError {
        ConfigError::Range {
            file: self.file.to_owned(),
            field: self.name(field),
            found: found.to_string(),
            expected: expected.into(),
        }
    }

    pub fn contradiction(
        &self,
        (field, found): (&str, impl Display),
        (other, other_found): (&str, impl Display),
        expected: &str,
    ) -> ConfigError {
        ConfigError::Contradiction {
            file: self.file.to_owned(),
            field: self.name(field),
            found: found.to_string(),
            other: format!("{} = {other_found}", self.name(other)),
            expected: expected.into(),
        }
    }

    pub fn unsupported(&self, field: &str, found: impl Display, expected: &str) -> ConfigError {
        ConfigError::Unsupported {
            file: self.file.to_owned(),
            field: self.name(field),
            found: found.to_string(),
            expected: expected.into(),
        }
    }

    /// The field's name with those of the objects around it, for messages.
    pub fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }
}

/// A value as text, cut where a long one would hide the message.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
