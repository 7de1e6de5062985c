//! From a request's fields to what the engine computes.

use engine::Request;
use engine::qwen3_model::SamplingParams;

use crate::access::Permit;
use crate::config::Limits;
use crate::error::ApiError;
use crate::protocol::sampling::SamplingFields;
use crate::service::ServedModel;

/// Most of the best tokens whose log-probabilities are returned.
const MOST_LOGPROBS: usize = 20;
/// Most forbidden texts.
const MOST_BAD_WORDS: usize = 64;
/// Largest magnitude of a logit bias.
const LARGEST_BIAS: f32 = 100.0;

/// Checks the fields and fills in defaults. Returns the engine's request and the stop texts.
pub fn request(
    model: &ServedModel,
    limits: &Limits,
    permit: Option<&Permit>,
    fields: &SamplingFields,
    prompt: Vec<u32>,
) -> Result<(Request, Vec<String>), ApiError> {
    let sizes = model.limits();
    let context = sizes.context_length;
    if prompt.len() >= context {
        let message = format!(
            "the prompt has {} tokens, expected fewer than {context}, the length of the context",
            prompt.len(),
        );
        return Err(ApiError::too_long(message));
    }
    let expected = sizes.vocab_size;
    if let Some(id) = prompt.iter().find(|id| **id as usize >= expected) {
        let message = format!("found token id {id}, expected an id below {expected}");
        return Err(ApiError::param("prompt", message));
    }
    let n = fields.n.unwrap_or(1);
    let most = limits.n.min(sizes.sequences);
    if n == 0 || n > most {
        let message = format!("n is {n}, expected a number from 1 to {most}");
        return Err(ApiError::param("n", message));
    }
    // An answer without a limit takes what is left of the context, or of the cache if that is
    // smaller.
    let room = context.min(sizes.pages * sizes.page_positions).saturating_sub(prompt.len()).max(1);
    let max_tokens = match fields.max_tokens {
        Some(0) if fields.echo => 0,
        Some(0) => {
            return Err(ApiError::param("max_tokens", "max_tokens is 0, expected at least 1"));
        }
        Some(tokens) => tokens.min(limits.max_tokens).min(context - prompt.len()),
        None => room.min(limits.max_tokens),
    };
    if let Some(least) = fields.min_tokens.filter(|least| *least > max_tokens) {
        let message = format!(
            "min_tokens is {least}, expected at most {max_tokens}, the most tokens that the answer \
             may have"
        );
        return Err(ApiError::param("min_tokens", message));
    }
    let stops = stops(limits, &fields.stop)?;
    let mut salt = permit.map_or_else(Vec::new, |permit| permit.key().salt().to_vec());
    salt.extend(fields.cache_salt.iter().flat_map(|salt| salt.bytes()));
    let request = Request {
        sampling: sampling(model, limits, fields)?,
        eos_token_ids: model.eos_token_ids.clone(),
        ignore_eos: fields.ignore_eos,
        n,
        priority: fields.priority.unwrap_or(0),
        cache_salt: salt,
        ..Request::new(prompt, max_tokens)
    };
    Ok((request, stops))
}

fn stops(limits: &Limits, stops: &[String]) -> Result<Vec<String>, ApiError> {
    if stops.len() > limits.stop_strings {
        let message =
            format!("stop has {} texts, expected at most {}", stops.len(), limits.stop_strings);
        return Err(ApiError::param("stop", message));
    }
    for stop in stops {
        check_text("stop", stop, limits)?;
    }
    Ok(stops.to_vec())
}

fn check_text(param: &str, text: &str, limits: &Limits) -> Result<(), ApiError> {
    if text.is_empty() || text.len() > limits.stop_bytes {
        let message = format!(
            "{param} has a text of {} bytes, expected 1 to {}",
            text.len(),
            limits.stop_bytes
        );
        return Err(ApiError::param(param, message));
    }
    Ok(())
}

fn sampling(
    model: &ServedModel,
    limits: &Limits,
    fields: &SamplingFields,
) -> Result<SamplingParams, ApiError> {
    let defaults = model.defaults;
    let within = |param: &str, value: Option<f32>, least: f32, most: f32, default: f32| match value
    {
        Some(value) if !(least..=most).contains(&value) => Err(ApiError::param(
            param,
            format!("{param} is {value}, expected a number from {least} to {most}"),
        )),
        value => Ok(value.unwrap_or(default)),
    };
    let top_k = match fields.top_k {
        None => defaults.top_k,
        Some(-1) => 0,
        Some(k) => usize::try_from(k)
            .map_err(|_| ApiError::param("top_k", format!("top_k is {k}, expected at least -1")))?,
    };
    let top_p = within("top_p", fields.top_p, 0.0, 1.0, defaults.top_p)?;
    let logprobs = fields.logprobs;
    if let Some(found) = logprobs.filter(|found| *found > MOST_LOGPROBS) {
        let message = format!("{found} were asked for, expected at most {MOST_LOGPROBS}");
        return Err(ApiError::param("top_logprobs", message));
    }
    let in_vocabulary = |param: &str, id: u32| {
        let size = model.limits().vocab_size;
        if (id as usize) < size {
            return Ok(id);
        }
        Err(ApiError::param(param, format!("{param} has id {id}, expected an id below {size}")))
    };
    let mut logit_bias = Vec::with_capacity(fields.logit_bias.len());
    for (id, bias) in &fields.logit_bias {
        let parsed = id.parse().map_err(|_| {
            ApiError::param("logit_bias", format!("found key {id:?}, expected a token id"))
        })?;
        let bias = within("logit_bias", Some(*bias), -LARGEST_BIAS, LARGEST_BIAS, 0.0)?;
        logit_bias.push((in_vocabulary("logit_bias", parsed)?, bias));
    }
    let stop_token_ids = fields.stop_token_ids.iter();
    let stop_token_ids: Result<Vec<u32>, ApiError> =
        stop_token_ids.map(|id| in_vocabulary("stop_token_ids", *id)).collect();
    Ok(SamplingParams {
        temperature: within("temperature", fields.temperature, 0.0, 2.0, defaults.temperature)?,
        top_k,
        // No mass at all means the most probable token.
        top_p: if top_p > 0.0 { top_p } else { f32::MIN_POSITIVE },
        min_p: within("min_p", fields.min_p, 0.0, 1.0, defaults.min_p)?,
        repetition_penalty: within(
            "repetition_penalty",
            fields.repetition_penalty,
            0.01,
            100.0,
            defaults.repetition_penalty,
        )?,
        presence_penalty: within("presence_penalty", fields.presence_penalty, -2.0, 2.0, 0.0)?,
        frequency_penalty: within("frequency_penalty", fields.frequency_penalty, -2.0, 2.0, 0.0)?,
        logit_bias,
        min_tokens: fields.min_tokens.unwrap_or(0),
        stop_token_ids: stop_token_ids?,
        bad_words: bad_words(model, limits, &fields.bad_words)?,
        logprobs,
        seed: fields.seed.map_or_else(rand::random, i64::cast_unsigned),
    })
}

/// The ids of forbidden texts, each at the beginning of a text and after a space.
fn bad_words(
    model: &ServedModel,
    limits: &Limits,
    words: &[String],
) -> Result<Vec<Vec<u32>>, ApiError> {
    if words.len() > MOST_BAD_WORDS {
        let message =
            format!("bad_words has {} texts, expected at most {MOST_BAD_WORDS}", words.len());
        return Err(ApiError::param("bad_words", message));
    }
    let mut ids = Vec::new();
    for word in words {
        check_text("bad_words", word, limits)?;
        for text in [word.clone(), format!(" {word}")] {
            let encoded = model.tokenizer.encode_rendered(&text);
            ids.push(encoded.map_err(|error| ApiError::param("bad_words", error.to_string()))?);
        }
    }
    ids.sort();
    ids.dedup();
    Ok(ids)
}
