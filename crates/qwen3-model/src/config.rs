//! `config.json` of a Qwen3 checkpoint (dense, mixture of experts or hybrid), read once and
//! validated as a whole.

use std::path::Path;

use checkpoint::ModelSource;
use serde_json::Value;

pub use crate::fields::ConfigError;
use crate::fields::{Fields, parse_json};
use crate::hybrid_config::{DeltaLayout, HybridConfig};
use crate::quantization_config::quantization_bits;
use crate::rope_config::{RopeConfig, RopeScaling};

/// Layers and experts of a layer that a configuration may state, several times those of the largest
/// published models: work before loading is proportional to them.
pub(crate) const MAX_LAYERS: usize = 1024;
const MAX_EXPERTS: usize = 8192;

/// What a Qwen3 checkpoint's `config.json` says; the names are that file's.
///
/// Every size is at least 1 and at most 2³¹ − 1, `num_attention_heads` is a multiple of
/// `num_key_value_heads`, `head_dim` is even, and the parameters in f32 fit in 63 bits of bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Columns of the dense feed-forward blocks (0 in a model that has none and does not state it).
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads of a layer.
    pub num_attention_heads: usize,
    /// Key and value heads of a layer.
    pub num_key_value_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Positions that the model states it can reach; see [`Config::context_length`].
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// The mixture of experts; `None` in a dense model.
    pub moe: Option<MoeConfig>,
    /// The layers with a gated delta rule; `None` in a model whose layers all have attention.
    pub hybrid: Option<HybridConfig>,
    /// Ids that end an answer, as far as this file says (`generation_config.json` says more).
    pub eos_token_ids: Vec<u32>,
    /// Whether the model has a head over the vocabulary. Without one the model gives hidden states
    /// only: `architectures` is `Qwen3Model` or a sequence classification, or `modules.json` says
    /// that the hidden states are pooled.
    pub has_head: bool,
    /// The id that begins a text.
    pub bos_token_id: Option<u32>,
    /// `dtype` or `torch_dtype`; the weights' own headers decide, this is what the file claims.
    pub dtype: Option<String>,
    /// Bits of the weights (8 or 4) where the checkpoint was quantized in groups of 32 by this
    /// project.
    pub quantization_bits: Option<u32>,
}

/// The feed-forward blocks of a mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    /// Experts of a layer (`num_experts` or `num_local_experts`).
    pub num_experts: usize,
    /// Experts that each token visits.
    pub num_experts_per_tok: usize,
    /// Columns of one expert.
    pub moe_intermediate_size: usize,
    /// Columns of the expert that every token visits; `None` in a model without one.
    pub shared_expert_intermediate_size: Option<usize>,
    /// Whether the weights of the visited experts are scaled to a sum of 1.
    pub norm_topk_prob: bool,
    /// Every how many layers one is sparse.
    pub decoder_sparse_step: usize,
    /// Layers that are dense all the same.
    pub mlp_only_layers: Vec<usize>,
}

impl Config {
    /// Reads the `config.json` of a model.
    ///
    /// # Errors
    /// When it is absent or does not describe a model that this crate runs.
    pub fn read(source: &ModelSource) -> Result<Self, ConfigError> {
        let document = source.config()?;
        let mut config = Self::from_json(&document.file, &parse_json(document)?)?;
        config.has_head &= source.document("modules.json")?.is_none();
        Ok(config)
    }

    /// Reads a parsed `config.json`; errors name `file`.
    pub fn from_json(file: &Path, value: &Value) -> Result<Self, ConfigError> {
        let top = Fields::top(file, value)?;
        let kind = ModelKind::parse(&top)?;
        // A model that also reads images has the fields of its decoder in an object of their own.
        let text = if kind.hybrid { top.object("text_config")? } else { None };
        let fields = text.as_ref().unwrap_or(&top);
        let sparse = kind.sparse;
        reject_variants(fields)?;

        let hidden_size = fields.size("hidden_size")?;
        let num_hidden_layers = fields.size_up_to("num_hidden_layers", MAX_LAYERS)?;
        let num_attention_heads = fields.size("num_attention_heads")?;
        // As in transformers, `null` stands for as many as query heads.
        let num_key_value_heads = match fields.count("num_key_value_heads", 1)? {
            None if fields.has("num_key_value_heads") => num_attention_heads,
            Some(heads) => heads,
            None => return Err(fields.missing("num_key_value_heads", "a whole number, at least 1")),
        };
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(fields.contradiction(
                ("num_attention_heads", num_attention_heads),
                ("num_key_value_heads", num_key_value_heads),
                "a multiple of it",
            ));
        }
        let head_dim = head_dim(fields, &kind, hidden_size, num_attention_heads)?;
        let max_position_embeddings = fields.size("max_position_embeddings")?;
        let rope = RopeConfig::parse(fields, max_position_embeddings, kind.hybrid)?;
        rope.check_rotary_dim(fields, head_dim)?;
        let moe = if sparse { Some(MoeConfig::parse(fields, &kind)?) } else { None };
        let hybrid = match kind.hybrid {
            true => Some(HybridConfig::parse(fields, num_hidden_layers, kind.layout)?),
            false => None,
        };

        let mut config = Self {
            hidden_size,
            intermediate_size: 0,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: fields.size("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: rms_norm_eps(fields)?,
            tie_word_embeddings: match top.has("tie_word_embeddings") {
                true => top.boolean("tie_word_embeddings", false)?,
                false => fields.boolean("tie_word_embeddings", false)?,
            },
            rope,
            moe,
            hybrid,
            has_head: has_head(&top)?,
            eos_token_ids: fields.token_ids("eos_token_id")?,
            bos_token_id: fields.token_ids("bos_token_id")?.first().copied(),
            dtype: dtype(fields)?,
            quantization_bits: quantization_bits(&top)?,
        };
        // A model whose layers are all sparse may leave the dense size out, or state it without
        // using it.
        config.intermediate_size = if config.any_dense() {
            fields.size("intermediate_size")?
        } else {
            fields.count("intermediate_size", 0)?.unwrap_or(0)
        };
        if config.hybrid.is_none() {
            config.check_sliding_window(fields, sparse)?;
        }
        config.check_dual_chunk(fields)?;
        config.check_total(fields)?;
        Ok(config)
    }

    /// Whether the feed-forward block of `layer` is a mixture of experts.
    pub fn is_sparse(&self, layer: usize) -> bool {
        self.moe_of(layer).is_some()
    }

    /// The mixture of experts of `layer`; `None` where its feed-forward block is dense.
    pub(crate) fn moe_of(&self, layer: usize) -> Option<&MoeConfig> {
        self.moe.as_ref().filter(|moe| {
            (layer + 1).is_multiple_of(moe.decoder_sparse_step)
                && !moe.mlp_only_layers.contains(&layer)
        })
    }

    /// Whether `layer` has attention; the other layers of a hybrid model have a gated delta rule.
    pub fn has_attention(&self, layer: usize) -> bool {
        self.delta_of(layer).is_none()
    }

    /// The gated delta rule of `layer`; `None` where the layer has attention.
    pub(crate) fn delta_of(&self, layer: usize) -> Option<&HybridConfig> {
        self.hybrid.as_ref().filter(|hybrid| !hybrid.attention_layers[layer])
    }

    /// Layers with attention, and so with pages of keys and values.
    pub fn attention_layers(&self) -> usize {
        (0..self.num_hidden_layers).filter(|layer| self.has_attention(*layer)).count()
    }

    /// Rows of `q_proj`: the queries, and in a hybrid model as many rows of the output gate.
    pub fn query_rows(&self) -> usize {
        if self.hybrid.is_some() { 2 * self.query_size() } else { self.query_size() }
    }

    /// Positions that a cache may hold: the stated ones, or more where YaRN extends the original
    /// window further.
    pub fn context_length(&self) -> usize {
        match &self.rope.scaling {
            RopeScaling::Default => self.max_position_embeddings,
            RopeScaling::Yarn(yarn) => {
                let extended = yarn.factor * yarn.original_max_position_embeddings as f64;
                self.max_position_embeddings.max(extended as usize)
            }
        }
    }

    /// Rows of the head: `vocab_size`, or 0 without a head.
    pub fn head_rows(&self) -> usize {
        if self.has_head { self.vocab_size } else { 0 }
    }

    /// Query heads that share a KV head.
    pub fn group_size(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Rows of `q_proj`: `num_attention_heads * head_dim`.
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Rows of `k_proj` and of `v_proj`: `num_key_value_heads * head_dim`.
    pub fn key_value_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    fn any_dense(&self) -> bool {
        match &self.moe {
            None => true,
            // Layer 0 decides for steps above 1; looking at each layer costs nothing either.
            Some(_) => (0..self.num_hidden_layers).any(|layer| !self.is_sparse(layer)),
        }
    }

    /// Sliding windows are refused where they would change an answer.
    fn check_sliding_window(&self, fields: &Fields<'_>, sparse: bool) -> Result<(), ConfigError> {
        let supported = "full attention in every layer";
        if let Some(value) = fields.value("layer_types") {
            let kinds = value
                .as_array()
                .ok_or_else(|| fields.mistyped("layer_types", value, "a list of strings"))?;
            if kinds.len() != self.num_hidden_layers {
                return Err(fields.contradiction(
                    ("layer_types", format!("a list of {}", kinds.len())),
                    ("num_hidden_layers", self.num_hidden_layers),
                    "one entry for each layer",
                ));
            }
            if let Some(other) = kinds.iter().find(|kind| kind.as_str() != Some("full_attention")) {
                return Err(fields.unsupported("layer_types", other, supported));
            }
            // The mixture of experts has a window in every layer, whatever they are called.
            if !sparse {
                return Ok(());
            }
        }
        if !fields.boolean("use_sliding_window", false)? {
            return Ok(());
        }
        // As transformers have it: `null` is no window, and what is not there at all has a default.
        let window = if fields.has("sliding_window") {
            fields.count("sliding_window", 0)?
        } else {
            Some(4096)
        };
        let Some(window) = window else { return Ok(()) };
        // Dense Qwen3 slides from layer `max_window_layers` on; the mixture of experts slides
        // everywhere.
        let first = if sparse { 0 } else { fields.count("max_window_layers", 0)?.unwrap_or(28) };
        if window < self.context_length() && first < self.num_hidden_layers {
            return Err(fields.unsupported(
                "use_sliding_window",
                format!("true (a window of {window})"),
                supported,
            ));
        }
        Ok(())
    }

    /// Beyond a chunk such a model rotates positions otherwise: refused where the context reaches
    /// there.
    fn check_dual_chunk(&self, fields: &Fields<'_>) -> Result<(), ConfigError> {
        let field = "dual_chunk_attention_config";
        let Some(dual) = fields.object(field)? else { return Ok(()) };
        // The default of the programs that know the field.
        let chunk = dual.count("chunk_size", 1)?.unwrap_or(8192);
        if chunk >= self.context_length() {
            return Ok(());
        }
        let found = format!("chunks of {chunk} in a context of {}", self.context_length());
        Err(fields.unsupported(field, found, "no such field, or a context of one chunk"))
    }

    /// The parameters must be countable: later arithmetic on sizes relies on it.
    fn check_total(&self, fields: &Fields<'_>) -> Result<(), ConfigError> {
        let product = |a: usize, b: usize| (a as u128).saturating_mul(b as u128);
        let hidden = self.hidden_size as u128;
        let query_heads = self.num_attention_heads * if self.hybrid.is_some() { 2 } else { 1 };
        let attention = product(query_heads + self.num_key_value_heads, self.head_dim);
        let delta = self
            .hybrid
            .as_ref()
            .map_or(0, |hybrid| hybrid.projection_rows() as u128 + hybrid.value_size() as u128);
        let heads = attention.saturating_mul(2).max(delta).saturating_mul(hidden);
        let experts = self.moe.as_ref().map_or(0, |moe| {
            let shared = moe.shared_expert_intermediate_size.unwrap_or(0) as u128;
            product(moe.num_experts, moe.moe_intermediate_size).saturating_add(shared)
        });
        let columns =
            experts.saturating_add(self.intermediate_size as u128).saturating_mul(3 * hidden);
        let layers = heads.saturating_add(columns).saturating_mul(self.num_hidden_layers as u128);
        let total = layers.saturating_add(2 * product(self.vocab_size, self.hidden_size));
        if total.saturating_mul(4) > i64::MAX as u128 {
            return Err(fields.range(
                "hidden_size",
                format!("{} and the model has about {total} parameters", self.hidden_size),
                "at most 2^61 parameters",
            ));
        }
        Ok(())
    }
}

impl MoeConfig {
    fn parse(fields: &Fields<'_>, kind: &ModelKind) -> Result<Self, ConfigError> {
        let num_experts =
            match (fields.count("num_experts", 1)?, fields.count("num_local_experts", 1)?) {
                (Some(older), Some(newer)) if older != newer => {
                    return Err(fields.contradiction(
                        ("num_experts", older),
                        ("num_local_experts", newer),
                        "the same value in both",
                    ));
                }
                (older, newer) => older
                    .or(newer)
                    .ok_or_else(|| fields.missing("num_experts", "a whole number, at least 1"))?,
            };
        if num_experts > MAX_EXPERTS {
            let expected = format!("a whole number in 1..={MAX_EXPERTS}");
            return Err(fields.range("num_experts", num_experts, &expected));
        }
        let num_experts_per_tok = fields.size("num_experts_per_tok")?;
        if num_experts_per_tok > num_experts {
            return Err(fields.contradiction(
                ("num_experts_per_tok", num_experts_per_tok),
                ("num_experts", num_experts),
                "at most as many",
            ));
        }
        let mlp_only_layers = match fields.value("mlp_only_layers") {
            None => Vec::new(),
            Some(value) => {
                let expected = "a list of layer numbers";
                let list = value
                    .as_array()
                    .ok_or_else(|| fields.mistyped("mlp_only_layers", value, expected))?;
                if list.len() > MAX_LAYERS {
                    let found = format!("a list of {}", list.len());
                    let expected = format!("at most {MAX_LAYERS} layer numbers");
                    return Err(fields.range("mlp_only_layers", found, &expected));
                }
                let layer = |value: &Value| {
                    let number = value.as_u64().and_then(|layer| usize::try_from(layer).ok());
                    number.ok_or_else(|| fields.mistyped("mlp_only_layers", value, expected))
                };
                list.iter().map(layer).collect::<Result<_, _>>()?
            }
        };
        Ok(Self {
            num_experts,
            num_experts_per_tok,
            moe_intermediate_size: fields.size("moe_intermediate_size")?,
            shared_expert_intermediate_size: match kind.hybrid {
                true => Some(fields.size("shared_expert_intermediate_size")?),
                false => None,
            },
            // In transformers the hybrid models scale the weights unless told otherwise.
            norm_topk_prob: fields.boolean("norm_topk_prob", kind.hybrid)?,
            decoder_sparse_step: fields.count("decoder_sparse_step", 1)?.unwrap_or(1),
            mlp_only_layers,
        })
    }
}

/// What `model_type` says of the architecture.
struct ModelKind {
    /// A mixture of experts.
    sparse: bool,
    /// Most layers have a gated delta rule instead of attention.
    hybrid: bool,
    /// How a folder stores the tensors of the delta rule.
    layout: DeltaLayout,
}

impl ModelKind {
    fn parse(fields: &Fields<'_>) -> Result<Self, ConfigError> {
        let expected = "\"qwen3\", \"qwen3_moe\", \"qwen3_next\", \"qwen3_5\" or \"qwen3_5_moe\"";
        use DeltaLayout::{Fused, Split};
        let kind = |sparse, hybrid, layout| Self { sparse, hybrid, layout };
        match fields.string("model_type")? {
            Some("qwen3") => Ok(kind(false, false, Split)),
            Some("qwen3_moe") => Ok(kind(true, false, Split)),
            // Its feed-forward blocks are sparse unless the file states that there are no experts.
            Some("qwen3_next") => Ok(kind(fields.count("num_experts", 0)? != Some(0), true, Fused)),
            Some("qwen3_5" | "qwen3_5_text") => Ok(kind(false, true, Split)),
            Some("qwen3_5_moe" | "qwen3_5_moe_text") => Ok(kind(true, true, Split)),
            Some(other) => Err(fields.unsupported("model_type", format!("{other:?}"), expected)),
            None => Err(fields.missing("model_type", expected)),
        }
    }
}

/// Valid variants of the architecture that no published Qwen3 uses.
fn reject_variants(fields: &Fields<'_>) -> Result<(), ConfigError> {
    if fields.boolean("attention_bias", false)? {
        return Err(fields.unsupported("attention_bias", true, "false"));
    }
    match fields.string("hidden_act")? {
        None | Some("silu") => Ok(()),
        Some(other) => Err(fields.unsupported("hidden_act", format!("{other:?}"), "\"silu\"")),
    }
}

/// Where it is not stated, what transformers take: a fixed size for dense and hybrid models, an
/// equal share of the width for mixtures of experts.
fn head_dim(
    fields: &Fields<'_>,
    kind: &ModelKind,
    hidden_size: usize,
    heads: usize,
) -> Result<usize, ConfigError> {
    let head_dim = match fields.count("head_dim", 1)? {
        Some(head_dim) => head_dim,
        None if kind.hybrid => 256,
        None if !kind.sparse => 128,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            return Err(fields.missing(
                "head_dim",
                "an even number, as hidden_size does not divide by the heads",
            ));
        }
    };
    // Rotary positions turn pairs of elements.
    if !head_dim.is_multiple_of(2) {
        return Err(fields.range("head_dim", head_dim, "an even number"));
    }
    Ok(head_dim)
}

/// Whether one of `architectures` predicts tokens. A file without this field describes a model that
/// does.
fn has_head(fields: &Fields<'_>) -> Result<bool, ConfigError> {
    let Some(value) = fields.value("architectures") else { return Ok(true) };
    let names = value.as_array().and_then(|own| own.iter().map(Value::as_str).collect());
    let names: Vec<&str> =
        names.ok_or_else(|| fields.mistyped("architectures", value, "a list of strings"))?;
    let headless = |name: &&str| name.ends_with("Model") || name.contains("SequenceClassification");
    Ok(!names.iter().any(headless))
}

fn rms_norm_eps(fields: &Fields<'_>) -> Result<f32, ConfigError> {
    let expected = "a number in 0..=1";
    match fields.number("rms_norm_eps")? {
        None => Err(fields.missing("rms_norm_eps", expected)),
        Some(eps) if (0.0..=1.0).contains(&eps) => Ok(eps as f32),
        Some(eps) => Err(fields.range("rms_norm_eps", eps, expected)),
    }
}

fn dtype(fields: &Fields<'_>) -> Result<Option<String>, ConfigError> {
    let newer = fields.string("dtype")?;
    let older = fields.string("torch_dtype")?;
    Ok(newer.or(older).map(str::to_owned))
}
