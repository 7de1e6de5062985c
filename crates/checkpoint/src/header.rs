//! The header of a safetensors file, fully checked: after this, no tensor of the file can reach
//! outside it.
//!
//! Layout (<https://huggingface.co/docs/safetensors>): 8 bytes of little-endian header length N, N
//! bytes of JSON that maps names to `{dtype, shape, data_offsets}`, then the data that the offsets
//! count into. The data must be covered exactly.

use std::{collections::HashMap, fmt, marker::PhantomData, path::Path};

use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Value, value::RawValue};

use crate::{CheckpointError, file::WeightFile};

/// The format's own limit for headers (safetensors `MAX_HEADER_SIZE`).
const MAX_HEADER: u64 = 100_000_000;

/// Tensors of one file, several times those of the largest mixture of experts in 4 bits.
const MAX_TENSORS: usize = 1 << 18;

/// Where a tensor lies in its file.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// From the start of the file.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// What a file says about itself.
#[derive(Debug)]
pub(crate) struct Header {
    /// In order of their data.
    pub(crate) tensors: Vec<(String, Entry)>,
    pub(crate) metadata: HashMap<String, String>,
}

/// Reads and checks the header of `source`.
pub(crate) fn read_header(source: &WeightFile) -> Result<Header, CheckpointError> {
    let file = source.path();
    if source.len() < 8 {
        return Err(CheckpointError::NoHeader { file: file.to_owned(), found: source.len() });
    }
    let mut length = [0; 8];
    source.read_at("the header's length", 0, &mut length)?;
    if &length == b"version " {
        return Err(CheckpointError::LfsPointer { file: file.to_owned() });
    }
    let length = u64::from_le_bytes(length);
    let max = (source.len() - 8).min(MAX_HEADER);
    if length > max {
        return Err(CheckpointError::HeaderLength { file: file.to_owned(), found: length, max });
    }
    let mut json = vec![0; length as usize];
    source.read_at("the header", 8, &mut json)?;
    parse_header(file, &json, source.len() - 8 - length)
}

/// Checks the JSON of a header whose file has `available` bytes of data behind it.
fn parse_header(file: &Path, json: &[u8], available: u64) -> Result<Header, CheckpointError> {
    let wrong = |error: serde_json::Error| CheckpointError::HeaderJson {
        file: file.to_owned(),
        reason: error.to_string(),
    };
    let Fields { fields, complete } = serde_json::from_slice(json).map_err(wrong)?;
    if !complete {
        return Err(CheckpointError::TooManyTensors { file: file.to_owned(), limit: MAX_TENSORS });
    }
    let mut metadata = HashMap::new();
    let mut tensors = Vec::with_capacity(fields.len());
    let mut end = 0;
    for (name, text) in fields {
        // One value at a time: the text is compact, and its tree is not.
        let text: &RawValue = text;
        let value = serde_json::from_str(text.get()).map_err(wrong)?;
        if name == "__metadata__" {
            metadata = parse_metadata(file, value)?;
            continue;
        }
        let entry = parse_entry(file, &name, &value, 8 + json.len() as u64)?;
        end = end.max(entry.offset.saturating_add(entry.bytes));
        tensors.push((name, entry));
    }
    let len = 8 + json.len() as u64 + available;
    if end > len {
        return Err(CheckpointError::Truncated {
            file: file.to_owned(),
            found: len,
            expected: end,
        });
    }
    // Before the cover: a repeated name is also an overlap, and the less telling message.
    let mut names: Vec<&str> =
        tensors.iter().map(|(name, _): &(String, Entry)| name.as_str()).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(CheckpointError::RepeatedTensor {
            file: file.to_owned(),
            tensor: pair[0].to_owned(),
        });
    }
    tensors.sort_by(|(a_name, a), (b_name, b)| {
        (a.offset, a.bytes, a_name).cmp(&(b.offset, b.bytes, b_name))
    });
    check_cover(file, &tensors, 8 + json.len() as u64, available)?;
    Ok(Header { tensors, metadata })
}

fn parse_metadata(file: &Path, value: Value) -> Result<HashMap<String, String>, CheckpointError> {
    serde_json::from_value(value.clone()).map_err(|_| CheckpointError::HeaderField {
        file: file.to_owned(),
        tensor: "__metadata__".to_owned(),
        field: "__metadata__",
        found: excerpt(Some(&value)),
        expected: "an object of strings",
    })
}

/// One tensor's entry; `data_start` is where the file's data begins.
fn parse_entry(
    file: &Path,
    tensor: &str,
    value: &Value,
    data_start: u64,
) -> Result<Entry, CheckpointError> {
    let field = |field: &'static str, expected: &'static str| CheckpointError::HeaderField {
        file: file.to_owned(),
        tensor: tensor.to_owned(),
        field,
        found: excerpt(value.get(field)),
        expected,
    };
    let dtype_name =
        value.get("dtype").and_then(Value::as_str).ok_or_else(|| field("dtype", "a string"))?;
    let dtype: Dtype = serde_json::from_value(Value::from(dtype_name)).map_err(|_| {
        CheckpointError::UnknownDtype {
            file: file.to_owned(),
            tensor: tensor.to_owned(),
            found: dtype_name.to_owned(),
        }
    })?;
    let shape =
        whole_numbers(value.get("shape")).ok_or_else(|| field("shape", "a list of sizes"))?;
    let (start, end) = match whole_numbers(value.get("data_offsets")).as_deref() {
        Some(&[start, end]) => (start as u64, end as u64),
        _ => return Err(field("data_offsets", "two byte offsets")),
    };
    if start > end || data_start.checked_add(end).is_none() {
        let (file, tensor) = (file.to_owned(), tensor.to_owned());
        return Err(CheckpointError::OutOfRange { file, tensor, start, end });
    }
    // A zero would hide that the size of a row does not fit.
    let product = shape
        .iter()
        .filter(|size| **size > 0)
        .try_fold(dtype.bitsize() as u64, |product, &size| product.checked_mul(size as u64))
        .ok_or_else(|| CheckpointError::SizeOverflow {
            file: file.to_owned(),
            tensor: tensor.to_owned(),
            dtype: dtype.to_string(),
            shape: shape.clone(),
        })?;
    let expected = if shape.contains(&0) { 0 } else { product.div_ceil(8) };
    if end - start != expected {
        return Err(CheckpointError::SizeMismatch {
            file: file.to_owned(),
            tensor: tensor.to_owned(),
            dtype: dtype.to_string(),
            shape,
            found: end - start,
            expected,
        });
    }
    Ok(Entry { dtype, shape, offset: data_start + start, bytes: expected })
}

/// Sorted tensors must follow each other without a gap and fill the data.
fn check_cover(
    file: &Path,
    tensors: &[(String, Entry)],
    data_start: u64,
    available: u64,
) -> Result<(), CheckpointError> {
    let mut covered = 0;
    let mut previous = "";
    for (name, entry) in tensors {
        let start = entry.offset - data_start;
        if start < covered {
            return Err(CheckpointError::Overlap {
                file: file.to_owned(),
                tensor: name.clone(),
                other: previous.to_owned(),
                start,
                end: covered,
            });
        }
        if start > covered {
            return Err(CheckpointError::Hole {
                file: file.to_owned(),
                start: covered,
                end: start,
            });
        }
        covered = start + entry.bytes;
        previous = name;
    }
    if covered != available {
        return Err(CheckpointError::Hole {
            file: file.to_owned(),
            start: covered,
            end: available,
        });
    }
    Ok(())
}

fn whole_numbers(value: Option<&Value>) -> Option<Vec<usize>> {
    value?
        .as_array()?
        .iter()
        .map(|item| item.as_u64().and_then(|item| usize::try_from(item).ok()))
        .collect()
}

/// A JSON value for a message, not longer than a line.
pub(crate) fn excerpt(value: Option<&Value>) -> String {
    let Some(value) = value else {
        return "absent".to_owned();
    };
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}

/// A JSON object with its repeated keys, which a map would silently drop, up to [`MAX_TENSORS`].
pub(crate) struct Fields<T> {
    pub(crate) fields: Vec<(String, T)>,
    /// Whether these are all of them.
    pub(crate) complete: bool,
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Fields<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Pairs<T> {
            type Value = Fields<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<T>, A::Error> {
                let mut fields = Vec::new();
                while fields.len() < MAX_TENSORS
                    && let Some(field) = map.next_entry()?
                {
                    fields.push(field);
                }
                let mut complete = true;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    complete = false;
                }
                Ok(Fields { fields, complete })
            }
        }
        deserializer.deserialize_map(Pairs(PhantomData))
    }
}
