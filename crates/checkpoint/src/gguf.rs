//! GGUF files: the header with its metadata, fully checked.
//!
//! Layout (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>): the magic `GGUF`, a
//! version, the numbers of tensors and of keys, the keys with typed values, the tensors' names,
//! shapes (columns first), types and offsets, padding, and the data.

use std::collections::HashMap;

use crate::{CheckpointError, file::WeightFile, stored::GgmlType};

/// Keys of a file's metadata; published files have below 100.
const MAX_KEYS: u64 = 4096;
/// Tensors of a file.
const MAX_TENSORS: u64 = 1 << 18;
/// Entries of an array, several times a vocabulary.
const MAX_ARRAY: u64 = 1 << 21;
/// Bytes of a header, tokenizer included.
const MAX_HEADER: u64 = 256 << 20;
/// Bytes read at once.
const PIECE: usize = 1 << 20;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Numbers(Vec<f64>),
}

/// A tensor of the file.
#[derive(Clone, Debug)]
pub(crate) struct GgufTensor {
    pub name: String,
    pub kind: GgmlType,
    /// Outermost first.
    pub shape: Vec<usize>,
    /// From the start of the file.
    pub offset: u64,
}

/// What a file says about itself.
#[derive(Debug)]
pub(crate) struct Gguf {
    pub metadata: HashMap<String, Value>,
    pub tensors: Vec<GgufTensor>,
}

/// Reads and checks the header of `file`.
pub(crate) fn read(file: &WeightFile) -> Result<Gguf, CheckpointError> {
    let mut reader = Reader { file, offset: 0, piece: Vec::new(), start: 0 };
    let magic = reader.bytes::<4>("the magic")?;
    if &magic != b"GGUF" {
        return Err(reader.wrong("the magic", format!("{magic:?}"), "GGUF"));
    }
    let version = reader.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(reader.wrong("the version", version, "2 or 3"));
    }
    let tensors = reader.count("the number of tensors", MAX_TENSORS)?;
    let keys = reader.count("the number of keys", MAX_KEYS)?;
    let mut metadata = HashMap::new();
    for _ in 0..keys {
        let key = reader.text("a key")?;
        let kind = reader.u32(&key)?;
        let value = reader.value(&key, kind)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(reader.wrong(&key, "there twice", "each key once"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Unsigned(size)) if size.is_power_of_two() && *size <= 1 << 20 => *size,
        Some(other) => {
            let found = format!("{other:?}");
            return Err(reader.wrong("general.alignment", found, "a power of two up to 2^20"));
        }
    };
    let mut found = Vec::new();
    for _ in 0..tensors {
        found.push(reader.tensor()?);
    }
    let start = reader.offset.next_multiple_of(alignment);
    let mut end = start;
    for tensor in &mut found {
        if !tensor.offset.is_multiple_of(alignment) {
            let expected = format!("a multiple of {alignment}");
            return Err(reader.wrong(&tensor.name, format!("offset {}", tensor.offset), &expected));
        }
        let bytes = size(&tensor.shape, tensor.kind).expect("checked with the tensor");
        let last = start.checked_add(tensor.offset).and_then(|first| first.checked_add(bytes));
        let Some(last) = last else {
            let found = format!("offset {}", tensor.offset);
            return Err(reader.wrong(&tensor.name, found, "an offset in the file"));
        };
        tensor.offset += start;
        end = end.max(last);
    }
    if end > file.len() && !found.is_empty() {
        return Err(CheckpointError::Truncated {
            file: file.path().to_owned(),
            found: file.len(),
            expected: end,
        });
    }
    Ok(Gguf { metadata, tensors: found })
}

/// Bytes of a tensor; `None` if rows are no whole blocks or the size overflows.
fn size(shape: &[usize], kind: GgmlType) -> Option<u64> {
    let (weights, bytes) = kind.block();
    let cols = *shape.last()?;
    if !cols.is_multiple_of(weights) {
        return None;
    }
    let row = (cols / weights).checked_mul(bytes)? as u64;
    shape[..shape.len() - 1].iter().try_fold(row, |size, rows| size.checked_mul(*rows as u64))
}

struct Reader<'a> {
    file: &'a WeightFile,
    /// Of the next byte, in the file.
    offset: u64,
    piece: Vec<u8>,
    /// Of the piece, in the file.
    start: u64,
}

impl Reader<'_> {
    fn wrong(
        &self,
        what: &str,
        found: impl std::fmt::Display,
        expected: impl std::fmt::Display,
    ) -> CheckpointError {
        let what: String = what.chars().flat_map(char::escape_debug).take(100).collect();
        CheckpointError::Gguf {
            file: self.file.path().to_owned(),
            what,
            found: found.to_string(),
            expected: expected.to_string(),
        }
    }

    fn fill(&mut self, what: &str, mut out: &mut [u8]) -> Result<(), CheckpointError> {
        let end = self.offset.saturating_add(out.len() as u64);
        if end > self.file.len() {
            return Err(CheckpointError::Truncated {
                file: self.file.path().to_owned(),
                found: self.file.len(),
                expected: end,
            });
        }
        if end > MAX_HEADER {
            return Err(self.wrong(what, format!("at byte {end}"), "a header of at most 256 MiB"));
        }
        while !out.is_empty() {
            let at = (self.offset - self.start) as usize;
            if at >= self.piece.len() {
                let left = (self.file.len() - self.offset).min(PIECE as u64) as usize;
                self.piece.resize(left, 0);
                self.start = self.offset;
                self.file.read_at("the header", self.start, &mut self.piece)?;
                continue;
            }
            let count = out.len().min(self.piece.len() - at);
            out[..count].copy_from_slice(&self.piece[at..at + count]);
            out = &mut out[count..];
            self.offset += count as u64;
        }
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], CheckpointError> {
        let mut bytes = [0; N];
        self.fill(what, &mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, CheckpointError> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    fn count(&mut self, what: &str, limit: u64) -> Result<u64, CheckpointError> {
        let count = u64::from_le_bytes(self.bytes(what)?);
        if count > limit {
            return Err(self.wrong(what, count, format!("at most {limit}")));
        }
        Ok(count)
    }

    fn text(&mut self, what: &str) -> Result<String, CheckpointError> {
        let len = self.count(what, self.file.len())?;
        if self.offset.saturating_add(len) > self.file.len().min(MAX_HEADER) {
            return Err(self.wrong(what, format!("{len} bytes of text"), "text in the file"));
        }
        let mut bytes = vec![0; len as usize];
        self.fill(what, &mut bytes)?;
        String::from_utf8(bytes).map_err(|_| self.wrong(what, "not UTF-8", "text"))
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value, CheckpointError> {
        Ok(match kind {
            8 => Value::Text(self.text(key)?),
            9 => {
                let kind = self.u32(key)?;
                let len = self.count(key, MAX_ARRAY)?;
                if kind == 8 {
                    let mut texts = Vec::new();
                    for _ in 0..len {
                        texts.push(self.text(key)?);
                    }
                    Value::Texts(texts)
                } else {
                    let mut numbers = Vec::new();
                    for _ in 0..len {
                        numbers.push(match self.number(key, kind)? {
                            Value::Unsigned(value) => value as f64,
                            Value::Signed(value) => value as f64,
                            Value::Float(value) => value,
                            other => f64::from(u8::from(other == Value::Bool(true))),
                        });
                    }
                    Value::Numbers(numbers)
                }
            }
            _ => self.number(key, kind)?,
        })
    }

    fn number(&mut self, key: &str, kind: u32) -> Result<Value, CheckpointError> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.bytes::<1>(key)?[0])),
            1 => Value::Signed(i64::from(self.bytes::<1>(key)?[0] as i8)),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.bytes(key)?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.bytes(key)?))),
            4 => Value::Unsigned(u64::from(self.u32(key)?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.bytes(key)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.bytes(key)?))),
            7 => match self.bytes::<1>(key)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.wrong(key, other, "0 or 1")),
            },
            10 => Value::Unsigned(u64::from_le_bytes(self.bytes(key)?)),
            11 => Value::Signed(i64::from_le_bytes(self.bytes(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.bytes(key)?)),
            other => {
                return Err(self.wrong(key, format!("a value of type {other}"), "types 0 to 12"));
            }
        })
    }

    fn tensor(&mut self) -> Result<GgufTensor, CheckpointError> {
        let name = self.text("a tensor's name")?;
        let dimensions = self.u32(&name)?;
        if !(1..=4).contains(&dimensions) {
            return Err(self.wrong(&name, format!("{dimensions} dimensions"), "1 to 4"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(u64::from_le_bytes(self.bytes(&name)?) as usize);
        }
        shape.reverse();
        let number = self.u32(&name)?;
        let offset = u64::from_le_bytes(self.bytes(&name)?);
        let Some(kind) = GgmlType::from_number(number) else {
            let expected = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, \
                            IQ4_XS or MXFP4";
            return Err(self.wrong(&name, format!("ggml type {number}"), expected));
        };
        if size(&shape, kind).is_none() {
            let found = format!("{kind:?} {shape:?}");
            return Err(self.wrong(&name, found, "rows of whole blocks"));
        }
        Ok(GgufTensor { name, kind, shape, offset })
    }
}
