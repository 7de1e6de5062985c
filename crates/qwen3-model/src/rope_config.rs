//! Rotary position parameters of a configuration: `rope_theta` and `rope_scaling`, or the newer
//! `rope_parameters`.

use crate::fields::{ConfigError, Fields};

/// Parameters of the rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// The part of a head's elements that positions rotate; the others stay as they are.
    pub partial_rotary_factor: f64,
    /// How positions beyond the training window are reached.
    pub scaling: RopeScaling,
}

/// How positions beyond the training window are reached.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// YaRN (<https://arxiv.org/abs/2309.00071>).
    Yarn(Yarn),
}

/// Parameters of YaRN, with the defaults of Hugging Face transformers filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// Ratio of the reachable to the original window, at least 1.
    pub factor: f64,
    /// The window that the model was trained on.
    pub original_max_position_embeddings: usize,
    /// What cos and sin are multiplied by.
    pub attention_factor: f64,
    /// Dimensions that turn more often than this within the original window keep their frequency.
    pub beta_fast: f64,
    /// Dimensions that turn less often than this are interpolated fully.
    pub beta_slow: f64,
    /// Whether the borders between the two are rounded to whole dimensions.
    pub truncate: bool,
}

impl RopeConfig {
    /// Reads either form. Where both are present they must agree on theta, and on the scaling if
    /// both have one: who follows older instructions adds `rope_scaling` to a file that has
    /// `rope_parameters` without any.
    pub(crate) fn parse(
        fields: &Fields<'_>,
        max_position_embeddings: usize,
        hybrid: bool,
    ) -> Result<Self, ConfigError> {
        let newer = fields.object("rope_parameters")?;
        let older = fields.object("rope_scaling")?;
        let theta = read_theta(fields, [newer.as_ref(), older.as_ref()])?;
        let partial_rotary_factor = read_partial(fields, [newer.as_ref(), older.as_ref()], hybrid)?;
        let scaling = |parameters: Option<&Fields<'_>>| {
            parameters.map_or(Ok(RopeScaling::Default), |part| {
                parse_scaling(part, max_position_embeddings)
            })
        };
        match (scaling(newer.as_ref())?, scaling(older.as_ref())?) {
            (scaling, RopeScaling::Default) | (RopeScaling::Default, scaling) => {
                Ok(Self { theta, partial_rotary_factor, scaling })
            }
            (newer, older) if newer == older => {
                Ok(Self { theta, partial_rotary_factor, scaling: newer })
            }
            (newer, older) => Err(fields.contradiction(
                ("rope_scaling", format!("{older:?}")),
                ("rope_parameters", format!("{newer:?}")),
                "the same values in both",
            )),
        }
    }

    /// Elements of a head of `head_dim` elements that positions rotate.
    pub fn rotary_dim(&self, head_dim: usize) -> usize {
        (head_dim as f64 * self.partial_rotary_factor) as usize
    }

    /// Positions rotate pairs, so their elements must be even in number.
    pub(crate) fn check_rotary_dim(
        &self,
        fields: &Fields<'_>,
        head_dim: usize,
    ) -> Result<(), ConfigError> {
        let rotary = self.rotary_dim(head_dim);
        if rotary >= 2 && rotary.is_multiple_of(2) {
            return Ok(());
        }
        Err(fields.range(
            "partial_rotary_factor",
            format!("{} and head_dim is {head_dim}", self.partial_rotary_factor),
            "a part of the head that is an even number of elements, at least 2",
        ))
    }
}

/// The newer form has it among the parameters, the older one at the top. Only hybrid models may
/// rotate a part: transformers ignores or rejects the field in the others.
fn read_partial(
    fields: &Fields<'_>,
    parameters: [Option<&Fields<'_>>; 2],
    hybrid: bool,
) -> Result<f64, ConfigError> {
    let mut found = None;
    for owner in parameters.into_iter().flatten().chain([fields]) {
        let part = owner.number("partial_rotary_factor")?;
        found = found.or(part.map(|part| (owner, part)));
    }
    // What transformers takes where nothing is stated.
    let Some((owner, part)) = found else { return Ok(if hybrid { 0.25 } else { 1.0 }) };
    if !hybrid && part != 1.0 {
        return Err(owner.unsupported("partial_rotary_factor", part, "1"));
    }
    if !(part > 0.0 && part <= 1.0) {
        return Err(owner.range("partial_rotary_factor", part, "a number above 0, at most 1"));
    }
    Ok(part)
}

fn read_theta(fields: &Fields<'_>, inner: [Option<&Fields<'_>>; 2]) -> Result<f64, ConfigError> {
    let expected = "a number above 1";
    let mut theta = fields.number("rope_theta")?;
    for parameters in inner.into_iter().flatten() {
        let Some(own) = parameters.number("rope_theta")? else { continue };
        if let Some(other) = theta.filter(|other| *other != own) {
            let name = parameters.name("rope_theta");
            return Err(fields.contradiction(
                ("rope_theta", other),
                (&name, own),
                "the same value in both",
            ));
        }
        theta = Some(own);
    }
    match theta {
        None => Err(fields.missing("rope_theta", expected)),
        // A base of 1 has no wavelengths and divides by its logarithm, which is 0.
        Some(theta) if theta <= 1.0 || theta > f64::from(f32::MAX) => {
            Err(fields.range("rope_theta", theta, expected))
        }
        Some(theta) => Ok(theta),
    }
}

fn parse_scaling(
    parameters: &Fields<'_>,
    max_position_embeddings: usize,
) -> Result<RopeScaling, ConfigError> {
    let kind = match parameters.string("rope_type")? {
        Some(kind) => Some(kind),
        None => parameters.string("type")?,
    };
    match kind {
        None | Some("default") => Ok(RopeScaling::Default),
        Some("yarn") => Ok(RopeScaling::Yarn(parse_yarn(parameters, max_position_embeddings)?)),
        Some(other) => Err(parameters.unsupported("rope_type", other, "\"default\" or \"yarn\"")),
    }
}

fn parse_yarn(
    parameters: &Fields<'_>,
    max_position_embeddings: usize,
) -> Result<Yarn, ConfigError> {
    let original = parameters
        .count_or_float("original_max_position_embeddings", 1)?
        .unwrap_or(max_position_embeddings);
    let factor = parameters
        .number("factor")?
        .ok_or_else(|| parameters.missing("factor", "a number, at least 1"))?;
    if !(1.0..=1e6).contains(&factor) {
        return Err(parameters.range("factor", factor, "a number in 1..=1e6"));
    }
    let positive = |field: &str, default: f64| match parameters.number(field)? {
        // Transformers writes `get(field) or default`, so that a 0 means the default there too.
        None | Some(0.0) => Ok(default),
        Some(value) if value > 0.0 => Ok(value),
        Some(value) => Err(parameters.range(field, value, "a number above 0")),
    };
    let (beta_fast, beta_slow) = (positive("beta_fast", 32.0)?, positive("beta_slow", 1.0)?);
    if beta_fast < beta_slow {
        return Err(parameters.contradiction(
            ("beta_fast", beta_fast),
            ("beta_slow", beta_slow),
            "beta_fast at least as large as beta_slow",
        ));
    }
    let mscale = parameters.number("mscale")?.filter(|&scale| scale != 0.0);
    let mscale_all_dim = parameters.number("mscale_all_dim")?.filter(|&scale| scale != 0.0);
    let attention_factor = match (parameters.number("attention_factor")?, mscale, mscale_all_dim) {
        (Some(given), _, _) => given,
        (None, Some(mscale), Some(all_dim)) => {
            attention_scale(factor, mscale) / attention_scale(factor, all_dim)
        }
        (None, _, _) => attention_scale(factor, 1.0),
    };
    if !(attention_factor > 0.0 && attention_factor.is_finite()) {
        return Err(parameters.range(
            "attention_factor",
            attention_factor,
            "a finite number above 0",
        ));
    }
    let truncate = parameters.boolean("truncate", true)?;
    Ok(Yarn {
        factor,
        original_max_position_embeddings: original,
        attention_factor,
        beta_fast,
        beta_slow,
        truncate,
    })
}

/// `get_mscale` of transformers' `_compute_yarn_parameters`.
fn attention_scale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}
