//! Configurations of the published Qwen3 models, and two small ones of the same kind.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value, json};

/// A model whose shape is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Qwen3-0.6B
    Dense0_6B,
    /// Qwen3-1.7B
    Dense1_7B,
    /// Qwen3-4B
    Dense4B,
    /// Qwen3-8B
    Dense8B,
    /// Qwen3-14B
    Dense14B,
    /// Qwen3-32B
    Dense32B,
    /// Qwen3-30B-A3B
    Moe30B,
    /// A dense model of under a megabyte.
    Tiny,
    /// A mixture of 8 experts of under two megabytes.
    TinyMoe,
}

/// Layers, hidden, intermediate, heads, KV heads, tied.
type Shape = (usize, usize, usize, usize, usize, bool);

impl Preset {
    /// All presets, smallest published first.
    pub const ALL: [Self; 9] = [
        Self::Dense0_6B,
        Self::Dense1_7B,
        Self::Dense4B,
        Self::Dense8B,
        Self::Dense14B,
        Self::Dense32B,
        Self::Moe30B,
        Self::Tiny,
        Self::TinyMoe,
    ];

    /// The name on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense0_6B => "0.6b",
            Self::Dense1_7B => "1.7b",
            Self::Dense4B => "4b",
            Self::Dense8B => "8b",
            Self::Dense14B => "14b",
            Self::Dense32B => "32b",
            Self::Moe30B => "30b-a3b",
            Self::Tiny => "tiny",
            Self::TinyMoe => "tiny-moe",
        }
    }

    /// The `config.json` of the model, with the published fields and values; `layers` replaces the
    /// number of layers.
    pub fn config(self, layers: Option<usize>) -> Value {
        let (published, hidden, intermediate, heads, kv_heads, tied) = self.shape();
        let layers = layers.unwrap_or(published);
        let tiny = self.is_tiny();
        let (bos, eos) = if tiny { (0, 1) } else { (151_643, 151_645) };
        let mut config = Map::new();
        let mut set = |field: &str, value: Value| config.insert(field.into(), value);
        let architecture = if self.is_moe() { "Qwen3MoeForCausalLM" } else { "Qwen3ForCausalLM" };
        set("architectures", json!([architecture]));
        set("attention_bias", json!(false));
        set("attention_dropout", json!(0.0));
        set("bos_token_id", json!(bos));
        if self.is_moe() {
            set("decoder_sparse_step", json!(1));
        }
        set("eos_token_id", json!(eos));
        set("head_dim", json!(if tiny { 32 } else { 128 }));
        set("hidden_act", json!("silu"));
        set("hidden_size", json!(hidden));
        set("initializer_range", json!(0.02));
        set("intermediate_size", json!(intermediate));
        set("max_position_embeddings", json!(40_960));
        set("max_window_layers", json!(layers));
        if self.is_moe() {
            let (experts, active, columns) = if tiny { (8, 2, 64) } else { (128, 8, 768) };
            set("mlp_only_layers", json!([]));
            set("model_type", json!("qwen3_moe"));
            set("moe_intermediate_size", json!(columns));
            set("norm_topk_prob", json!(true));
            set("num_attention_heads", json!(heads));
            set("num_experts", json!(experts));
            set("num_experts_per_tok", json!(active));
        } else {
            set("model_type", json!("qwen3"));
            set("num_attention_heads", json!(heads));
        }
        set("num_hidden_layers", json!(layers));
        set("num_key_value_heads", json!(kv_heads));
        if self.is_moe() {
            set("output_router_logits", json!(false));
        }
        set("rms_norm_eps", json!(1e-6));
        set("rope_scaling", Value::Null);
        set("rope_theta", json!(1_000_000));
        if self.is_moe() {
            set("router_aux_loss_coef", json!(0.001));
        }
        set("sliding_window", Value::Null);
        set("tie_word_embeddings", json!(tied));
        set("torch_dtype", json!("bfloat16"));
        set("transformers_version", json!("4.51.0"));
        set("use_cache", json!(true));
        set("use_sliding_window", json!(false));
        set("vocab_size", json!(if tiny { 512 } else { 151_936 }));
        Value::Object(config)
    }

    /// The `generation_config.json` of the model.
    pub fn generation_config(self) -> Value {
        let (bos, eos) =
            if self.is_tiny() { (0, json!([1, 0])) } else { (151_643, json!([151_645, 151_643])) };
        json!({
            "bos_token_id": bos, "do_sample": true, "eos_token_id": eos, "pad_token_id": bos, "temperature": 0.6,
            "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0"
        })
    }

    fn shape(self) -> Shape {
        match self {
            Self::Dense0_6B => (28, 1024, 3072, 16, 8, true),
            Self::Dense1_7B => (28, 2048, 6144, 16, 8, true),
            Self::Dense4B => (36, 2560, 9728, 32, 8, true),
            Self::Dense8B => (36, 4096, 12_288, 32, 8, false),
            Self::Dense14B => (40, 5120, 17_408, 40, 8, false),
            Self::Dense32B => (64, 5120, 25_600, 64, 8, false),
            Self::Moe30B => (48, 2048, 6144, 32, 4, false),
            Self::Tiny => (3, 96, 224, 6, 2, true),
            Self::TinyMoe => (3, 96, 224, 6, 2, false),
        }
    }

    fn is_moe(self) -> bool {
        matches!(self, Self::Moe30B | Self::TinyMoe)
    }

    fn is_tiny(self) -> bool {
        matches!(self, Self::Tiny | Self::TinyMoe)
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no preset has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("found `{found}`, expected {}", Preset::ALL.map(Preset::name).join(", "))]
pub struct UnknownPreset {
    /// The name.
    pub found: String,
}

impl FromStr for Preset {
    type Err = UnknownPreset;

    fn from_str(text: &str) -> Result<Self, UnknownPreset> {
        let preset = Self::ALL.into_iter().find(|preset| preset.name() == text);
        preset.ok_or_else(|| UnknownPreset { found: text.to_owned() })
    }
}
