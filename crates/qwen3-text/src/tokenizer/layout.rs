//! Which `tokenizer.json` is accepted, before a library parses it.
//!
//! The library has many components; some panic on unusual settings or take memory without limit.
//! Qwen3's tokenizers consist of few of them.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// Largest id plus one, and most entries of the vocabulary and of the merges.
const MAX_TOKENS: u64 = 1 << 20;
/// Longest token, in bytes.
pub(super) const MAX_TOKEN: usize = 4096;
/// Most added tokens.
pub(super) const MAX_ADDED: usize = 4096;

/// The regular expressions that split a text into words: that of Qwen2 and Qwen3, and that of
/// Qwen3.5, which keeps marks with their letters.
const SPLITS: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

#[derive(Deserialize)]
struct Layout {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    added_tokens: Vec<AddedLayout>,
    model: ModelLayout,
}

#[derive(Deserialize)]
struct AddedLayout {
    id: u64,
    content: String,
}

#[derive(Deserialize)]
struct ModelLayout {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    dropout: Value,
    #[serde(default)]
    unk_token: Value,
    #[serde(default)]
    continuing_subword_prefix: Value,
    #[serde(default)]
    end_of_word_suffix: Value,
    #[serde(default)]
    byte_fallback: Value,
    #[serde(rename = "vocab")]
    _vocab: Bounded,
    #[serde(rename = "merges")]
    _merges: Bounded,
}

/// A vocabulary or a list of merges within the limits.
struct Bounded;

impl<'de> Deserialize<'de> for Bounded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Limits;
        impl<'de> Visitor<'de> for Limits {
            type Value = Bounded;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("a vocabulary or merges")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Bounded, A::Error> {
                let mut count = 0;
                while let Some((token, id)) = map.next_entry::<std::borrow::Cow<'_, str>, u64>()? {
                    count += 1;
                    if token.len() > MAX_TOKEN || id >= MAX_TOKENS || count > MAX_TOKENS {
                        return Err(serde::de::Error::custom(format!(
                            "vocab: a token of {} bytes with id {id}; expected at most \
                             {MAX_TOKEN} bytes and ids below {MAX_TOKENS}",
                            token.len()
                        )));
                    }
                }
                Ok(Bounded)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Bounded, A::Error> {
                let mut count = 0;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    count += 1;
                    if count > MAX_TOKENS {
                        let problem = format!("merges: more than {MAX_TOKENS}");
                        return Err(serde::de::Error::custom(problem));
                    }
                }
                Ok(Bounded)
            }
        }
        deserializer.deserialize_any(Limits)
    }
}

/// Checks a `tokenizer.json`; the error says what was found and what was expected.
pub(super) fn check(json: &[u8]) -> Result<(), String> {
    let layout: Layout = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let model = &layout.model;
    // Old files leave the type out.
    if model.kind.as_deref().is_some_and(|kind| kind != "BPE") {
        return Err(format!("model: found type {:?}, expected BPE", model.kind));
    }
    let empty = |value: &Value| value.is_null() || value.as_str() == Some("");
    let off = |value: &Value| value.is_null() || value == &Value::Bool(false);
    for (name, ok) in [
        ("dropout", model.dropout.is_null() || model.dropout.as_f64() == Some(0.0)),
        ("unk_token", empty(&model.unk_token)),
        ("continuing_subword_prefix", empty(&model.continuing_subword_prefix)),
        ("end_of_word_suffix", empty(&model.end_of_word_suffix)),
        ("byte_fallback", off(&model.byte_fallback)),
    ] {
        if !ok {
            return Err(format!("model: field {name} is set; expected byte-level BPE without it"));
        }
    }
    if layout.added_tokens.len() > MAX_ADDED {
        let found = layout.added_tokens.len();
        return Err(format!("added_tokens: found {found}, expected at most {MAX_ADDED}"));
    }
    for token in &layout.added_tokens {
        if token.id >= MAX_TOKENS || token.content.is_empty() || token.content.len() > MAX_TOKEN {
            return Err(format!(
                "added_tokens: a token of {} bytes with id {}; expected 1 to {MAX_TOKEN} bytes \
                 and an id below {MAX_TOKENS}",
                token.content.len(),
                token.id
            ));
        }
    }
    each("normalizer", &layout.normalizer, "normalizers", |kind, _| match kind {
        "NFC" => Ok(()),
        _ => Err("NFC"),
    })?;
    let mut byte_level = false;
    each("pre_tokenizer", &layout.pre_tokenizer, "pretokenizers", |kind, item| match kind {
        "ByteLevel" => {
            byte_level = true;
            Ok(())
        }
        "Split" => {
            let pattern = item.pointer("/pattern/Regex").and_then(Value::as_str);
            let known = pattern.is_some_and(|pattern| SPLITS.contains(&pattern));
            let isolated = item.get("behavior").and_then(Value::as_str) == Some("Isolated");
            let straight = item.get("invert").is_none_or(|invert| invert == &Value::Bool(false));
            if known && isolated && straight {
                Ok(())
            } else {
                Err("the isolated split of Qwen2, Qwen3 or Qwen3.5")
            }
        }
        _ => Err("Split and ByteLevel"),
    })?;
    if !byte_level {
        return Err("pre_tokenizer: found none that is ByteLevel".to_owned());
    }
    each("post_processor", &layout.post_processor, "processors", |kind, _| match kind {
        "ByteLevel" | "TemplateProcessing" => Ok(()),
        _ => Err("ByteLevel and TemplateProcessing"),
    })?;
    let mut decoder = false;
    each("decoder", &layout.decoder, "decoders", |kind, _| match kind {
        "ByteLevel" => {
            decoder = true;
            Ok(())
        }
        _ => Err("ByteLevel"),
    })?;
    if decoder { Ok(()) } else { Err("decoder: found none, expected ByteLevel".to_owned()) }
}

/// Calls `accept` with each component of a part of the file: itself, or the items of a sequence.
fn each(
    part: &str,
    value: &Value,
    list: &str,
    mut accept: impl FnMut(&str, &Value) -> Result<(), &'static str>,
) -> Result<(), String> {
    if value.is_null() {
        return Ok(());
    }
    let kind = |value: &Value| value.get("type").and_then(Value::as_str).map(str::to_owned);
    let items = match kind(value).as_deref() {
        Some("Sequence") => match value.get(list).and_then(Value::as_array) {
            Some(items) if items.len() <= 8 => items.iter().collect(),
            _ => return Err(format!("{part}: expected at most 8 {list}")),
        },
        _ => vec![value],
    };
    for item in items {
        let kind = kind(item).ok_or_else(|| format!("{part}: a component without a type"))?;
        if let Err(expected) = accept(&kind, item) {
            return Err(format!("{part}: found {kind}, expected {expected}"));
        }
    }
    Ok(())
}
