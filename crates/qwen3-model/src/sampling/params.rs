//! How tokens are chosen: the parameters of one sequence and their ranges.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::SamplingError;
use crate::generation_config::GenerationConfig;

/// Below this value a temperature means greedy: the distribution is a single point in f32
/// precision, and a division by a smaller number could overflow.
pub(super) const MIN_TEMPERATURE: f32 = 1e-5;
/// Largest magnitude of a temperature, penalty or bias.
const LIMIT: f32 = 1e6;

/// How the next token of a sequence is chosen.
///
/// The logits are changed in this order: `repetition_penalty`, `frequency_penalty` and
/// `presence_penalty`, `logit_bias`, exclusion of tokens (masks, `bad_words`, and the stop tokens
/// while there are fewer than `min_tokens`), `temperature`. Then `top_k`, `top_p` and `min_p`
/// filter the tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// Divides the logits. Below 1e-5 the largest logit is taken and the filters are ignored.
    pub temperature: f32,
    /// Keeps the k most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most probable tokens until their mass reaches this value; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this probable relative to the most probable one; 0 keeps all.
    pub min_p: f32,
    /// Divides the positive logits of tokens that occurred in the prompt or the answer, and
    /// multiplies the negative ones; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that occurred in the answer.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once for each time it occurred in the answer.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens, each listed at most once.
    pub logit_bias: Vec<(u32, f32)>,
    /// Number of tokens before which none of `stop_token_ids` is chosen.
    pub min_tokens: usize,
    /// Tokens that end the sequence. The sampler only excludes them while there are fewer than
    /// `min_tokens`; the caller ends the sequence.
    pub stop_token_ids: Vec<u32>,
    /// Sequences of tokens that never occur: the last token of each is excluded where the tokens
    /// before it, in prompt and answer, are those of the sequence.
    pub bad_words: Vec<Vec<u32>>,
    /// Returns the log-probability of the chosen token, and of so many of the most probable ones.
    pub logprobs: Option<usize>,
    /// Seed of the random draws.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            bad_words: Vec::new(),
            logprobs: None,
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// The publisher's recommendation for the checkpoint, at `temperature` if it is given.
    ///
    /// Without a recommendation, or if the file says not to sample, the result is greedy. If it
    /// samples and names no `top_k`, 50 is used, as in Hugging Face transformers.
    pub fn recommended(config: &GenerationConfig, temperature: Option<f32>, seed: u64) -> Self {
        let temperature = temperature.unwrap_or_else(|| {
            let samples = config.do_sample.unwrap_or(config.temperature.is_some());
            if samples { config.temperature.unwrap_or(1.0) } else { 0.0 }
        });
        let greedy = Self::default();
        Self {
            temperature,
            top_k: config.top_k.unwrap_or(if temperature > 0.0 { 50 } else { greedy.top_k }),
            top_p: config.top_p.unwrap_or(greedy.top_p),
            min_p: config.min_p.unwrap_or(greedy.min_p),
            repetition_penalty: config.repetition_penalty.unwrap_or(greedy.repetition_penalty),
            seed,
            ..greedy
        }
    }

    /// Checks the range of every parameter.
    ///
    /// # Errors
    ///
    /// [`SamplingError::Parameter`], [`SamplingError::TokenId`], [`SamplingError::DuplicateBias`]
    /// or [`SamplingError::EmptyBadWord`] for the first parameter that is out of range.
    pub fn validate(&self, vocab_size: usize) -> Result<(), SamplingError> {
        let check = |valid: bool, name, found: f32, expected| match valid {
            true => Ok(()),
            false => Err(SamplingError::Parameter { name, found, expected }),
        };
        let symmetric = -LIMIT..=LIMIT;
        let (temperature, penalty) = (self.temperature, self.repetition_penalty);
        let in_range = (0.0..=LIMIT).contains(&temperature);
        check(in_range, "temperature", temperature, "a number in 0..=1e6")?;
        let in_range = self.top_p > 0.0 && self.top_p <= 1.0;
        check(in_range, "top_p", self.top_p, "a number above 0, at most 1")?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p, "a number in 0..=1")?;
        let in_range = penalty > 0.0 && penalty <= LIMIT;
        check(in_range, "repetition_penalty", penalty, "a number above 0, at most 1e6")?;
        for (name, found) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            check(symmetric.contains(&found), name, found, "a number in -1e6..=1e6")?;
        }
        let mut biased = HashSet::new();
        for &(id, bias) in &self.logit_bias {
            check(symmetric.contains(&bias), "logit_bias", bias, "numbers in -1e6..=1e6")?;
            if !biased.insert(id) {
                return Err(SamplingError::DuplicateBias { id });
            }
        }
        if let Some(index) = self.bad_words.iter().position(Vec::is_empty) {
            return Err(SamplingError::EmptyBadWord { index });
        }
        let lists = [
            ("logit_bias", biased.into_iter().collect::<Vec<_>>()),
            ("stop_token_ids", self.stop_token_ids.clone()),
            ("bad_words", self.bad_words.concat()),
        ];
        for (name, ids) in lists {
            if let Some(&id) = ids.iter().find(|id| **id as usize >= vocab_size) {
                return Err(SamplingError::TokenId { name, id, vocab_size });
            }
        }
        Ok(())
    }

    /// Whether the token with the largest logit is taken.
    pub(super) fn is_greedy(&self) -> bool {
        self.temperature < MIN_TEMPERATURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_checked() {
        let base = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        for (name, params) in [
            ("temperature", SamplingParams { temperature: -0.1, ..base.clone() }),
            ("temperature", SamplingParams { temperature: f32::NAN, ..base.clone() }),
            ("temperature", SamplingParams { temperature: f32::INFINITY, ..base.clone() }),
            ("top_p", SamplingParams { top_p: 0.0, ..base.clone() }),
            ("top_p", SamplingParams { top_p: 1.01, ..base.clone() }),
            ("top_p", SamplingParams { top_p: f32::NAN, ..base.clone() }),
            ("min_p", SamplingParams { min_p: -0.1, ..base.clone() }),
            ("min_p", SamplingParams { min_p: 1.1, ..base.clone() }),
            ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..base.clone() }),
            (
                "repetition_penalty",
                SamplingParams { repetition_penalty: f32::INFINITY, ..base.clone() },
            ),
            ("presence_penalty", SamplingParams { presence_penalty: f32::NAN, ..base.clone() }),
            ("frequency_penalty", SamplingParams { frequency_penalty: 2e6, ..base.clone() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(1, f32::INFINITY)], ..base.clone() }),
        ] {
            let error = params.validate(10).expect_err("out of range");
            assert!(
                matches!(&error, SamplingError::Parameter { name: found, .. } if *found == name),
                "{error}"
            );
            assert!(
                error.to_string().starts_with(&format!("sampling parameter {name} is ")),
                "{error}"
            );
        }
        let stop_token_ids = vec![3, 10];
        let cases = [
            ("stop_token_ids", SamplingParams { stop_token_ids, ..base.clone() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(10, 1.0)], ..base.clone() }),
            ("bad_words", SamplingParams { bad_words: vec![vec![1], vec![2, 10]], ..base.clone() }),
        ];
        for (name, params) in cases {
            let error = params.validate(10).expect_err("an id outside the vocabulary");
            assert_eq!(error, SamplingError::TokenId { name, id: 10, vocab_size: 10 });
            assert_eq!(params.validate(11), Ok(()));
        }
        let twice = SamplingParams { logit_bias: vec![(1, 1.0), (1, 2.0)], ..base.clone() };
        assert_eq!(twice.validate(10), Err(SamplingError::DuplicateBias { id: 1 }));
        let empty = SamplingParams { bad_words: vec![vec![1], vec![]], ..base };
        assert_eq!(empty.validate(10), Err(SamplingError::EmptyBadWord { index: 1 }));
    }

    #[test]
    fn recommended_parameters() {
        let config = GenerationConfig {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.95),
            ..GenerationConfig::default()
        };
        let found = SamplingParams::recommended(&config, None, 9);
        assert_eq!((found.temperature, found.top_k, found.top_p, found.seed), (0.6, 20, 0.95, 9));
        // Hugging Face's default; of its own accord nobody samples.
        assert_eq!(
            SamplingParams::recommended(
                &GenerationConfig { top_k: None, ..config.clone() },
                None,
                9
            )
            .top_k,
            50
        );
        let greedy = GenerationConfig { do_sample: Some(false), top_k: None, ..config };
        assert_eq!(SamplingParams::recommended(&greedy, None, 0).temperature, 0.0);
        let nothing = GenerationConfig::default();
        assert_eq!(SamplingParams::recommended(&nothing, None, 0), SamplingParams::default());
        // Whoever has it sample all the same samples as it does.
        for config in [&greedy, &nothing] {
            let found = SamplingParams::recommended(config, Some(0.8), 9);
            assert_eq!((found.temperature, found.top_k), (0.8, 50));
        }
        assert_eq!(SamplingParams::recommended(&nothing, Some(0.0), 0), SamplingParams::default());
    }
}
