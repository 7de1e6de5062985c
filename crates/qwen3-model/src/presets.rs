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
    /// Qwen3.5-0.8B
    Hybrid0_8B,
    /// Qwen3.5-4B
    Hybrid4B,
    /// Qwen3.5-27B; Qwen3.6-27B and Qwen3.8-27B have the same shape.
    Hybrid27B,
    /// Qwen3.5-35B-A3B
    Hybrid35BA3B,
    /// Qwen3-Next-80B-A3B and Qwen3-Coder-Next
    Next80B,
    /// A dense model of under a megabyte.
    Tiny,
    /// A mixture of 8 experts of under two megabytes.
    TinyMoe,
    /// A hybrid model of under two megabytes with a mixture of 8 experts and a shared one.
    TinyHybrid,
}

/// Layers, hidden, intermediate, heads, KV heads, tied.
type Shape = (usize, usize, usize, usize, usize, bool);

/// What a hybrid model has beside its [`Shape`].
struct HybridShape {
    model_type: &'static str,
    architecture: &'static str,
    head_dim: usize,
    vocab_size: usize,
    eos: usize,
    /// Key heads and value heads of the delta rule, and the elements of each.
    linear: (usize, usize, usize),
    /// Experts, those that a token visits, and the columns of each; the shared one has as many.
    experts: Option<(usize, usize, usize)>,
}

impl Preset {
    /// All presets, smallest published first.
    pub const ALL: [Self; 15] = [
        Self::Dense0_6B,
        Self::Dense1_7B,
        Self::Dense4B,
        Self::Dense8B,
        Self::Dense14B,
        Self::Dense32B,
        Self::Moe30B,
        Self::Hybrid0_8B,
        Self::Hybrid4B,
        Self::Hybrid27B,
        Self::Hybrid35BA3B,
        Self::Next80B,
        Self::Tiny,
        Self::TinyMoe,
        Self::TinyHybrid,
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
            Self::Hybrid0_8B => "qwen3.5-0.8b",
            Self::Hybrid4B => "qwen3.5-4b",
            Self::Hybrid27B => "qwen3.5-27b",
            Self::Hybrid35BA3B => "qwen3.5-35b-a3b",
            Self::Next80B => "qwen3-next-80b-a3b",
            Self::Tiny => "tiny",
            Self::TinyMoe => "tiny-moe",
            Self::TinyHybrid => "tiny-hybrid",
        }
    }

    /// The `config.json` of the model, with the published fields and values; `layers` replaces the
    /// number of layers.
    pub fn config(self, layers: Option<usize>) -> Value {
        if let Some(hybrid) = self.hybrid() {
            return self.hybrid_config(&hybrid, layers);
        }
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

    /// The `config.json` of the text part of a hybrid model.
    fn hybrid_config(self, hybrid: &HybridShape, layers: Option<usize>) -> Value {
        let (published, hidden, intermediate, heads, kv_heads, tied) = self.shape();
        let layers = layers.unwrap_or(published);
        let (key_heads, value_heads, dim) = hybrid.linear;
        let kind = |layer: usize| match (layer + 1).is_multiple_of(4) {
            true => "full_attention",
            false => "linear_attention",
        };
        let mut config = json!({
            "architectures": [hybrid.architecture],
            "attention_bias": false,
            "attn_output_gate": true,
            "dtype": "bfloat16",
            "eos_token_id": hybrid.eos,
            "full_attention_interval": 4,
            "head_dim": hybrid.head_dim,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "layer_types": (0..layers).map(kind).collect::<Vec<_>>(),
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": dim,
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": value_heads,
            "linear_value_head_dim": dim,
            "max_position_embeddings": 262_144,
            "model_type": hybrid.model_type,
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "partial_rotary_factor": 0.25, "rope_theta": 10_000_000, "rope_type": "default"
            },
            "tie_word_embeddings": tied,
            "vocab_size": hybrid.vocab_size
        });
        if intermediate > 0 {
            config["intermediate_size"] = json!(intermediate);
        }
        if let Some((experts, active, columns)) = hybrid.experts {
            config["moe_intermediate_size"] = json!(columns);
            config["norm_topk_prob"] = json!(true);
            config["num_experts"] = json!(experts);
            config["num_experts_per_tok"] = json!(active);
            config["shared_expert_intermediate_size"] = json!(columns);
        }
        config
    }

    fn hybrid(self) -> Option<HybridShape> {
        let dense = |linear, experts| HybridShape {
            model_type: if experts { "qwen3_5_moe_text" } else { "qwen3_5_text" },
            architecture: if experts { "Qwen3_5MoeForCausalLM" } else { "Qwen3_5ForCausalLM" },
            head_dim: 256,
            vocab_size: 248_320,
            eos: 248_044,
            linear,
            experts: experts.then_some((256, 8, 512)),
        };
        match self {
            Self::Hybrid0_8B => Some(dense((16, 16, 128), false)),
            Self::Hybrid4B => Some(dense((16, 32, 128), false)),
            Self::Hybrid27B => Some(dense((16, 48, 128), false)),
            Self::Hybrid35BA3B => Some(dense((16, 32, 128), true)),
            Self::Next80B => Some(HybridShape {
                model_type: "qwen3_next",
                architecture: "Qwen3NextForCausalLM",
                vocab_size: 151_936,
                eos: 151_645,
                experts: Some((512, 10, 512)),
                ..dense((16, 32, 128), true)
            }),
            Self::TinyHybrid => Some(HybridShape {
                head_dim: 32,
                vocab_size: 512,
                eos: 1,
                experts: Some((8, 2, 64)),
                ..dense((2, 6, 16), true)
            }),
            _ => None,
        }
    }

    /// The `generation_config.json` of the model.
    pub fn generation_config(self) -> Value {
        let (bos, eos) = match self.hybrid().map(|hybrid| hybrid.eos) {
            _ if self.is_tiny() => (0, json!([1, 0])),
            Some(248_044) => (248_044, json!([248_046, 248_044])),
            _ => (151_643, json!([151_645, 151_643])),
        };
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
            Self::Hybrid0_8B => (24, 1024, 3584, 8, 2, true),
            Self::Hybrid4B => (32, 2560, 9216, 16, 4, true),
            Self::Hybrid27B => (64, 5120, 17_408, 24, 4, false),
            Self::Hybrid35BA3B => (40, 2048, 0, 16, 2, false),
            Self::Next80B => (48, 2048, 5120, 16, 2, false),
            Self::TinyHybrid => (4, 96, 0, 6, 2, false),
            Self::Tiny => (3, 96, 224, 6, 2, true),
            Self::TinyMoe => (3, 96, 224, 6, 2, false),
        }
    }

    fn is_moe(self) -> bool {
        matches!(self, Self::Moe30B | Self::TinyMoe)
    }

    fn is_tiny(self) -> bool {
        matches!(self, Self::Tiny | Self::TinyMoe | Self::TinyHybrid)
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
