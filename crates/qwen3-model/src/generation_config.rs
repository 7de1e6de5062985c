//! `generation_config.json`: what the publisher of a checkpoint recommends for sampling.

use std::path::Path;

use checkpoint::ModelSource;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::Config;
use crate::fields::{ConfigError, Fields, parse_json};

/// The publisher's recommendation; what the file leaves out is `None` or empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GenerationConfig {
    /// Ids that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Whether to sample at all.
    pub do_sample: Option<bool>,
    /// Divisor of the logits, at least 0.
    pub temperature: Option<f32>,
    /// How many candidates are kept; 0 keeps all.
    pub top_k: Option<usize>,
    /// Probability mass that is kept, above 0 and at most 1.
    pub top_p: Option<f32>,
    /// Least probability that is kept, relative to the largest, in 0..=1.
    pub min_p: Option<f32>,
    /// Divisor of the positive logits of tokens that occurred, above 0.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads the `generation_config.json` of a model; one without it recommends nothing.
    ///
    /// # Errors
    /// When the file is there and is not valid.
    pub fn read(source: &ModelSource) -> Result<Self, ConfigError> {
        read_if_there(source, Self::from_json)
    }

    /// Reads a parsed `generation_config.json`; errors name `file`.
    pub fn from_json(file: &Path, value: &Value) -> Result<Self, ConfigError> {
        let fields = Fields::top(file, value)?;
        let number =
            |field: &str, valid: fn(f64) -> bool, expected: &str| match fields.number(field)? {
                None => Ok(None),
                Some(number) if valid(number) => Ok(Some(number as f32)),
                Some(number) => Err(fields.range(field, number, expected)),
            };
        let do_sample = match fields.value("do_sample") {
            None => None,
            Some(_) => Some(fields.boolean("do_sample", false)?),
        };
        Ok(Self {
            eos_token_ids: fields.token_ids("eos_token_id")?,
            do_sample,
            temperature: number(
                "temperature",
                |t| (0.0..=1e6).contains(&t),
                "a number in 0..=1e6",
            )?,
            top_k: fields.count("top_k", 0)?,
            top_p: number("top_p", |p| p > 0.0 && p <= 1.0, "a number above 0, at most 1")?,
            min_p: number("min_p", |p| (0.0..=1.0).contains(&p), "a number in 0..=1")?,
            repetition_penalty: number(
                "repetition_penalty",
                |r| r > 0.0 && r <= 1e6,
                "a number above 0, at most 1e6",
            )?,
        })
    }
}

/// What `parse` makes of the file; without a file, the default.
fn read_if_there<T: Default>(
    source: &ModelSource,
    parse: impl FnOnce(&Path, &Value) -> Result<T, ConfigError>,
) -> Result<T, ConfigError> {
    match source.generation_config()? {
        Some(document) => parse(&document.file, &parse_json(document)?),
        None => Ok(T::default()),
    }
}

/// Ids that end an answer: those of `generation_config.json`, else of the model's `config`.
///
/// # Errors
/// When the file is there and its ids cannot be read, or an id is beyond the vocabulary: an answer
/// would go on past its end. Its other fields are for those who sample.
pub fn eos_token_ids(source: &ModelSource, config: &Config) -> Result<Vec<u32>, ConfigError> {
    let checked = |file: &Path, ids: Vec<u32>| match ids.iter().max() {
        Some(id) if *id as usize >= config.vocab_size => Err(ConfigError::Contradiction {
            file: file.to_owned(),
            field: "eos_token_id".into(),
            found: id.to_string(),
            other: format!("vocab_size = {} of config.json", config.vocab_size),
            expected: "ids below it".into(),
        }),
        _ => Ok(ids),
    };
    let ids = read_if_there(source, |file, value| {
        checked(file, Fields::top(file, value)?.token_ids("eos_token_id")?)
    })?;
    if !ids.is_empty() {
        return Ok(ids);
    }
    checked(&source.config()?.file, config.eos_token_ids.clone())
}
