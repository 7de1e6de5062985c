//! Vectors and scores from the hidden state of a text's last token: embeddings, and the probability
//! that a document answers a query.

use std::path::{Path, PathBuf};

use checkpoint::{CheckpointError, ModelSource};
use serde_json::Value;

use crate::config::Config;
use crate::fields::{ConfigError, parse_json};
use crate::names::{head, open_weights};

/// The head of a sequence classification, `[1, hidden_size]`.
const SCORE: &str = "score.weight";

/// Why a model cannot embed or rank.
#[derive(Debug, thiserror::Error)]
pub enum PoolingError {
    /// A configuration file is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights of the scores cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model pools in another way, or transforms the pooled vector.
    #[error("{}: found {found}, expected pooling of the last token (lasttoken)", file.display())]
    Unsupported {
        /// The file that says so.
        file: PathBuf,
        /// The pooling mode or the module.
        found: String,
    },
    /// A cut to no numbers, or to more than there are.
    #[error("dimensions is {found}, expected 1 to {hidden_size}, the size of the model's vectors")]
    Dimensions {
        /// The number asked for.
        found: usize,
        /// The number there is.
        hidden_size: usize,
    },
    /// The model has neither a head over the vocabulary nor scores.
    #[error(
        "{}: the model has neither a head over the vocabulary nor score.weight, \
         expected a reranker", model.display()
    )]
    NoScores {
        /// The model.
        model: PathBuf,
    },
    /// The ids of the two answers are not known.
    #[error(
        "{}: the ids of \"yes\" and \"no\" are not known, expected a tokenizer (or rerank.json)",
        model.display()
    )]
    NoAnswers {
        /// The model.
        model: PathBuf,
    },
    /// The id of an answer is beyond the vocabulary.
    #[error("{}: \"{answer}\" has the id {id}, expected one below {vocab_size}", model.display())]
    AnswerOutOfRange {
        /// The model.
        model: PathBuf,
        /// `yes` or `no`.
        answer: &'static str,
        /// Its id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
}

/// Whether the model's files say that it embeds texts with the hidden state of the last token:
/// `modules.json` and the configuration of its pooling, as sentence-transformers writes them, or
/// the architecture `Qwen3Model`. Without such files the caller decides.
///
/// # Errors
/// When the files cannot be read, or ask for anything but pooling of the last token and
/// normalisation.
pub fn is_embedding_model(source: &ModelSource, config: &Config) -> Result<bool, PoolingError> {
    let Some(document) = source.document("modules.json").map_err(ConfigError::from)? else {
        return Ok(!config.has_head && !source.weights()?.contains(SCORE));
    };
    let unsupported = |file: &Path, found: &dyn std::fmt::Display| PoolingError::Unsupported {
        file: file.to_owned(),
        found: found.to_string().chars().take(80).collect(),
    };
    let modules = parse_json(&document)?;
    let Some(modules) = modules.as_array().filter(|own| !own.is_empty()) else {
        return Err(unsupported(&document.file, &"no list of modules"));
    };
    let mut pools = false;
    for module in modules {
        let kind = module["type"].as_str().unwrap_or_default();
        match kind.rsplit('.').next() {
            Some("Transformer" | "Normalize") => {}
            Some("Pooling") => {
                let path = module["path"].as_str().unwrap_or("1_Pooling");
                let own = source.document(&format!("{path}/config.json"));
                let Some(own) = own.map_err(ConfigError::from)? else {
                    return Err(unsupported(&document.file, &format!("no {path}/config.json")));
                };
                if let Some(found) = other_mode(&parse_json(&own)?) {
                    return Err(unsupported(&own.file, &found));
                }
                pools = true;
            }
            _ => return Err(unsupported(&document.file, &module["type"])),
        }
    }
    if pools { Ok(true) } else { Err(unsupported(&document.file, &"no module that pools")) }
}

/// The pooling mode of a `1_Pooling/config.json` if it is not that of the last token.
fn other_mode(config: &Value) -> Option<String> {
    if let Some(mode) = config.get("pooling_mode") {
        return (mode != "lasttoken").then(|| format!("pooling_mode {mode}"));
    }
    let none = serde_json::Map::new();
    let modes = config.as_object().unwrap_or(&none).iter();
    let modes: Vec<_> = modes
        .filter(|(name, on)| name.starts_with("pooling_mode_") && **on == true)
        .map(|(name, _)| name.as_str())
        .collect();
    (modes != ["pooling_mode_lasttoken"]).then(|| match modes[..] {
        [] => "no pooling mode".to_owned(),
        _ => modes.join(" and "),
    })
}

/// Checks a number of dimensions.
///
/// # Errors
/// When it is 0 or above `hidden_size`.
pub fn check_dimensions(found: usize, hidden_size: usize) -> Result<(), PoolingError> {
    if (1..=hidden_size).contains(&found) {
        Ok(())
    } else {
        Err(PoolingError::Dimensions { found, hidden_size })
    }
}

/// The embedding of a text: the first `dimensions` numbers (all of them with `None`) of the last
/// token's hidden state, divided by their Euclidean norm. A vector of zeros stays as it is.
pub fn embedding(mut hidden: Vec<f32>, dimensions: Option<usize>) -> Vec<f32> {
    hidden.truncate(dimensions.unwrap_or(usize::MAX));
    let norm = hidden.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
    if norm > 0.0 {
        hidden.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
    }
    hidden
}

/// Scores the last token's hidden state of a reranker's prompt.
#[derive(Clone, Debug)]
pub struct Scorer {
    /// `score.weight`, or the row of "yes" less the row of "no": `[hidden_size]`.
    weights: Vec<f32>,
}

impl Scorer {
    /// Reads `score.weight` of a sequence classification, or else the two rows of the head that
    /// belong to "yes" and "no". `rerank.json` of the model, an object with the ids `yes` and `no`,
    /// comes before `answers`, which holds the tokenizer's ids of `["yes", "no"]`.
    ///
    /// # Errors
    /// When the model has no such weights, or the ids are unknown or beyond the vocabulary.
    pub fn read(
        source: &ModelSource,
        config: &Config,
        answers: Option<[u32; 2]>,
    ) -> Result<Self, PoolingError> {
        let checkpoint = open_weights::<LoadError>(source, config).map_err(|error| error.0)?;
        let (rows, width) = (config.vocab_size, config.hidden_size);
        if checkpoint.contains(SCORE) {
            let mut weights = vec![0.0; width];
            checkpoint.matrix(SCORE, 1, width)?.read_row(0, &mut weights)?;
            return Ok(Self { weights });
        }
        let model = || source.path().to_owned();
        if !config.has_head {
            return Err(PoolingError::NoScores { model: model() });
        }
        let ids = match source.document("rerank.json").map_err(ConfigError::from)? {
            Some(document) => {
                let own = parse_json(&document)?;
                let id = |answer: &str| {
                    own[answer].as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(|| {
                        ConfigError::Missing {
                            file: document.file.clone(),
                            field: answer.to_owned(),
                            expected: "the id of a token".to_owned(),
                        }
                    })
                };
                Some([id("yes")?, id("no")?])
            }
            None => answers,
        };
        let ids = ids.ok_or_else(|| PoolingError::NoAnswers { model: model() })?;
        let matrix = checkpoint.matrix(head(config, checkpoint), rows, width)?;
        let mut pair = [vec![0.0; width], vec![0.0; width]];
        for ((id, answer), row) in ids.into_iter().zip(["yes", "no"]).zip(&mut pair) {
            if id as usize >= rows {
                let (model, vocab_size) = (model(), rows);
                return Err(PoolingError::AnswerOutOfRange { model, answer, id, vocab_size });
            }
            matrix.read_row(id as usize, row)?;
        }
        let [yes, no] = pair;
        Ok(Self { weights: yes.iter().zip(&no).map(|(yes, no)| yes - no).collect() })
    }

    /// The probability in 0..=1 that the document answers the query: the softmax over the logits of
    /// "yes" and "no", or the sigmoid of the score. `hidden` has `hidden_size` numbers.
    pub fn probability(&self, hidden: &[f32]) -> f32 {
        let products = self.weights.iter().zip(hidden).map(|(w, x)| f64::from(*w) * f64::from(*x));
        (1.0 / (1.0 + (-products.sum::<f64>()).exp())) as f32
    }
}

/// An error of [`open_weights`] as one of this module.
struct LoadError(PoolingError);

impl<E: Into<PoolingError>> From<E> for LoadError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}
