//! The files of a model that a GGUF file replaces: `config.json`, `tokenizer.json`,
//! `tokenizer_config.json` and chat templates, made from its metadata, and the names of its
//! tensors.

use std::{collections::HashMap, path::Path};

use serde_json::{Map, Value as Json, json};

use crate::{Document, DocumentError, gguf::Value};

/// How Qwen's tokenizers split text before merging (the `qwen2` of llama.cpp).
const SPLIT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| \
                     ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// The same of the tokenizers since Qwen3.5, which keep marks with their letters (`qwen35`).
const SPLIT_WITH_MARKS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\
                                \\p{N}| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\
                                \\s+(?!\\S)|\\s+";

/// Token types of llama.cpp.
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;

/// The metadata of a GGUF file.
#[derive(Debug)]
pub(crate) struct GgufModel<'a> {
    pub file: &'a Path,
    pub metadata: &'a HashMap<String, Value>,
}

impl GgufModel<'_> {
    /// `config.json`, as transformers would have it. `tied` tells whether the file has no head of
    /// its own, `vocabulary` is the number of rows of the embedding.
    pub(crate) fn config(&self, tied: bool, vocabulary: usize) -> Result<Document, DocumentError> {
        let architecture = self.text("general.architecture")?;
        // How the tensors of a delta rule lie in the file; `None` in a model without one.
        let (model_type, sparse, layout) = match architecture {
            "qwen3" => ("qwen3", false, None),
            "qwen3moe" => ("qwen3_moe", true, None),
            "qwen3next" => ("qwen3_next", true, Some("gguf-grouped")),
            "qwen35" => ("qwen3_5_text", false, Some("gguf-tiled")),
            "qwen35moe" => ("qwen3_5_moe_text", true, Some("gguf-tiled")),
            other => {
                let expected = "qwen3, qwen3moe, qwen3next, qwen35 or qwen35moe";
                return Err(self.wrong("general.architecture", other, expected));
            }
        };
        let key = |name: &str| format!("{architecture}.{name}");
        let size = |name: &str| self.size(&key(name));
        let heads = size("attention.head_count")?;
        // Layers that predict a second token come after the others.
        let further = self.optional_size(&key("nextn_predict_layers"))?.unwrap_or(0);
        let layers = size("block_count")?.saturating_sub(further);
        let mut config = json!({
            "model_type": model_type,
            "num_hidden_layers": layers,
            "hidden_size": size("embedding_length")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.optional_size(&key("attention.head_count_kv"))?
                .unwrap_or(heads),
            "max_position_embeddings": size("context_length")?,
            "rms_norm_eps": self.number(&key("attention.layer_norm_rms_epsilon"))?,
            "rope_theta": self.optional_number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            "tie_word_embeddings": tied,
            "vocab_size": vocabulary,
        });
        let mut set = |field: &str, value: Json| config[field] = value;
        match self.optional_size(&key("feed_forward_length"))? {
            Some(columns) => set("intermediate_size", json!(columns)),
            None if sparse => {}
            None => return Err(self.missing(&key("feed_forward_length"))),
        }
        if let Some(head_dim) = self.optional_size(&key("attention.key_length"))? {
            set("head_dim", json!(head_dim));
        }
        if sparse {
            set("num_experts", json!(size("expert_count")?));
            set("num_experts_per_tok", json!(size("expert_used_count")?));
            set("moe_intermediate_size", json!(size("expert_feed_forward_length")?));
            set("norm_topk_prob", json!(true));
        }
        if let Some(layout) = layout {
            self.add_delta_rule(&mut config, architecture, layout)?;
        }
        let mut set = |field: &str, value: Json| config[field] = value;
        match self.metadata.get(&key("rope.scaling.type")) {
            None => {}
            Some(Value::Text(kind)) if kind == "none" => {}
            Some(Value::Text(kind)) => {
                let mut scaling = json!({
                    "rope_type": kind,
                    "factor": self.number(&key("rope.scaling.factor"))?,
                });
                if let Some(length) =
                    self.optional_size(&key("rope.scaling.original_context_length"))?
                {
                    scaling["original_max_position_embeddings"] = json!(length);
                }
                set("rope_scaling", scaling);
            }
            Some(other) => return Err(self.mistyped(&key("rope.scaling.type"), other, "a text")),
        }
        let mut ends = Vec::new();
        for name in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            if let Some(id) = self.optional_size(name)?
                && !ends.contains(&id)
            {
                ends.push(id);
            }
        }
        set("eos_token_id", json!(ends));
        if let Some(id) = self.optional_size("tokenizer.ggml.bos_token_id")? {
            set("bos_token_id", json!(id));
        }
        Ok(self.document(&config))
    }

    /// The fields of `config.json` that only hybrid models have.
    fn add_delta_rule(
        &self,
        config: &mut Json,
        architecture: &str,
        layout: &str,
    ) -> Result<(), DocumentError> {
        let key = |name: &str| format!("{architecture}.{name}");
        let (key_heads, value_heads) =
            (self.size(&key("ssm.group_count"))?, self.size(&key("ssm.time_step_rank"))?);
        let inner = self.size(&key("ssm.inner_size"))?;
        if value_heads == 0 || !inner.is_multiple_of(value_heads) {
            let expected = format!("a multiple of {value_heads}, the number of value heads");
            return Err(self.wrong(&key("ssm.inner_size"), &inner.to_string(), &expected));
        }
        let head_dim = self.size(&key("attention.key_length"))?;
        let rotary = self.optional_size(&key("rope.dimension_count"))?.unwrap_or(head_dim / 4);
        let fields = json!({
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": value_heads,
            "linear_key_head_dim": self.size(&key("ssm.state_size"))?,
            "linear_value_head_dim": inner / value_heads,
            "linear_conv_kernel_dim": self.size(&key("ssm.conv_kernel"))?,
            "full_attention_interval":
                self.optional_size(&key("full_attention_interval"))?.unwrap_or(4),
            "partial_rotary_factor": rotary as f64 / head_dim.max(1) as f64,
            "delta_layout": layout,
        });
        for (field, value) in fields.as_object().into_iter().flatten() {
            config[field] = value.clone();
        }
        // Only in mixtures of experts.
        if let Some(columns) = self.optional_size(&key("expert_shared_feed_forward_length"))? {
            config["shared_expert_intermediate_size"] = json!(columns);
        }
        let recurrent = key("attention.recurrent_layers");
        match self.metadata.get(&recurrent) {
            None => {}
            Some(Value::Numbers(recurrent)) => {
                let layers = config["num_hidden_layers"].as_u64().unwrap_or(0) as usize;
                let kind = |recurrent: &f64| match *recurrent != 0.0 {
                    true => "linear_attention",
                    false => "full_attention",
                };
                config["layer_types"] = recurrent.iter().take(layers).map(kind).collect();
            }
            Some(other) => return Err(self.mistyped(&recurrent, other, "a list of booleans")),
        }
        Ok(())
    }

    /// Whether the file has a tokenizer.
    pub(crate) fn has_tokenizer(&self) -> bool {
        self.metadata.contains_key("tokenizer.ggml.tokens")
    }

    /// `tokenizer.json`, of the components that Qwen's tokenizers have.
    pub(crate) fn tokenizer(&self) -> Result<Document, DocumentError> {
        let expect = |key: &str, expected: &[&str]| match self.text(key)? {
            found if expected.contains(&found) => Ok(()),
            found => Err(self.wrong(key, found, &expected.join(" or "))),
        };
        expect("tokenizer.ggml.model", &["gpt2"])?;
        let mut pattern = SPLIT;
        if self.metadata.contains_key("tokenizer.ggml.pre") {
            expect("tokenizer.ggml.pre", &["qwen2", "qwen3", "qwen35"])?;
            if self.text("tokenizer.ggml.pre")? == "qwen35" {
                pattern = SPLIT_WITH_MARKS;
            }
        }
        let tokens = self.texts("tokenizer.ggml.tokens")?;
        let merges = self.texts("tokenizer.ggml.merges")?;
        let types = match self.metadata.get("tokenizer.ggml.token_type") {
            Some(Value::Numbers(types)) if types.len() == tokens.len() => types,
            Some(Value::Numbers(types)) => {
                let expected = format!("{}, one for each token", tokens.len());
                return Err(self.wrong(
                    "tokenizer.ggml.token_type",
                    &format!("{} entries", types.len()),
                    &expected,
                ));
            }
            Some(other) => {
                return Err(self.mistyped("tokenizer.ggml.token_type", other, "numbers"));
            }
            None => return Err(self.missing("tokenizer.ggml.token_type")),
        };
        let mut vocabulary = Map::new();
        let mut added = Vec::new();
        for (id, (token, kind)) in tokens.iter().zip(types).enumerate() {
            if *kind == CONTROL || *kind == USER_DEFINED {
                added.push(json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": *kind == CONTROL,
                }));
            } else if vocabulary.insert(token.clone(), json!(id)).is_some() {
                return Err(self.wrong("tokenizer.ggml.tokens", token, "each token once"));
            }
        }
        let mut pairs = Vec::with_capacity(merges.len());
        for merge in merges {
            let Some((left, right)) = merge.split_once(' ') else {
                return Err(self.wrong("tokenizer.ggml.merges", merge, "two tokens and a space"));
            };
            pairs.push(json!([left, right]));
        }
        let bytes = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
            "use_regex": false,
        });
        let split = json!({
            "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false,
        });
        Ok(self.document(&json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes]},
            "post_processor": bytes,
            "decoder": bytes,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null,
                "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false,
                "byte_fallback": false, "ignore_merges": false,
                "vocab": vocabulary, "merges": pairs,
            },
        })))
    }

    /// `tokenizer_config.json` with the special tokens that templates may name.
    pub(crate) fn tokenizer_config(&self) -> Result<Document, DocumentError> {
        let tokens = match self.metadata.get("tokenizer.ggml.tokens") {
            Some(_) => self.texts("tokenizer.ggml.tokens")?,
            None => &[],
        };
        let mut config = Map::new();
        for (key, field) in [
            ("tokenizer.ggml.bos_token_id", "bos_token"),
            ("tokenizer.ggml.eos_token_id", "eos_token"),
            ("tokenizer.ggml.padding_token_id", "pad_token"),
        ] {
            let Some(id) = self.optional_size(key)? else { continue };
            let Some(token) = tokens.get(id) else {
                let expected = format!("an id below {}, the number of tokens", tokens.len());
                return Err(self.wrong(key, &id.to_string(), &expected));
            };
            config.insert(field.to_owned(), json!(token));
        }
        Ok(self.document(&Json::Object(config)))
    }

    /// The chat templates: `tokenizer.chat_template` as `default`, then those with a name.
    pub(crate) fn templates(&self) -> Result<Vec<(String, Document)>, DocumentError> {
        const KEY: &str = "tokenizer.chat_template";
        let mut keys: Vec<&String> =
            self.metadata.keys().filter(|key| key.starts_with(KEY)).collect();
        keys.sort_unstable();
        let mut templates = Vec::new();
        for key in keys {
            let name = match key.strip_prefix(KEY).expect("the keys begin with it") {
                "" => "default",
                other => match other.strip_prefix('.') {
                    Some(name) => name,
                    None => continue,
                },
            };
            let bytes = self.text(key)?.as_bytes().to_vec();
            templates.push((name.to_owned(), Document { file: self.file.to_owned(), bytes }));
        }
        Ok(templates)
    }

    fn document(&self, json: &Json) -> Document {
        Document { file: self.file.to_owned(), bytes: json.to_string().into_bytes() }
    }

    fn text(&self, key: &str) -> Result<&str, DocumentError> {
        match self.metadata.get(key) {
            Some(Value::Text(text)) => Ok(text),
            Some(other) => Err(self.mistyped(key, other, "a text")),
            None => Err(self.missing(key)),
        }
    }

    fn texts(&self, key: &str) -> Result<&[String], DocumentError> {
        match self.metadata.get(key) {
            Some(Value::Texts(texts)) => Ok(texts),
            Some(other) => Err(self.mistyped(key, other, "a list of texts")),
            None => Err(self.missing(key)),
        }
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, DocumentError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(size)) => Ok(Some(*size as usize)),
            Some(Value::Signed(size)) if *size >= 0 => Ok(Some(*size as usize)),
            Some(other) => Err(self.mistyped(key, other, "a whole number from 0 on")),
        }
    }

    fn size(&self, key: &str) -> Result<usize, DocumentError> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    fn optional_number(&self, key: &str) -> Result<Option<f64>, DocumentError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(number)) if number.is_finite() => Ok(Some(shortest(*number))),
            Some(Value::Unsigned(number)) => Ok(Some(*number as f64)),
            Some(other) => Err(self.mistyped(key, other, "a finite number")),
        }
    }

    fn number(&self, key: &str) -> Result<f64, DocumentError> {
        self.optional_number(key)?.ok_or_else(|| self.missing(key))
    }

    fn missing(&self, key: &str) -> DocumentError {
        self.wrong(key, "absent", "a value")
    }

    fn mistyped(&self, key: &str, found: &Value, expected: &str) -> DocumentError {
        let text = format!("{found:?}");
        let cut = text.char_indices().nth(60).map_or(text.len(), |(index, _)| index);
        self.wrong(key, &text[..cut], expected)
    }

    fn wrong(&self, key: &str, found: &str, expected: &str) -> DocumentError {
        DocumentError::Metadata {
            file: self.file.to_owned(),
            key: key.to_owned(),
            found: found.escape_debug().to_string(),
            expected: expected.to_owned(),
        }
    }
}

/// The decimal number that an f32 of the file was written from: 1e-6 instead of
/// 9.99999997475e-7.
fn shortest(number: f64) -> f64 {
    let single = number as f32;
    if f64::from(single) == number { single.to_string().parse().unwrap_or(number) } else { number }
}

/// The name in transformers of the tensor that GGUF files call `name`. Stacked experts have the
/// name of one expert's matrix without its number.
pub(crate) fn tensor_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    layer.parse::<usize>().ok()?;
    let delta = match part {
        "ssm_a" => Some("A_log"),
        "ssm_dt.bias" => Some("dt_bias"),
        _ => None,
    };
    if let Some(own) = delta {
        return Some(format!("model.layers.{layer}.linear_attn.{own}"));
    }
    let (part, field) = part.rsplit_once('.')?;
    let own = match part {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_norm" | "post_attention_norm" => "post_attention_layernorm",
        "attn_qkv" => "linear_attn.in_proj_qkv",
        "attn_gate" => "linear_attn.in_proj_z",
        "ssm_beta" => "linear_attn.in_proj_b",
        "ssm_alpha" => "linear_attn.in_proj_a",
        "ssm_ba" => "linear_attn.in_proj_ba",
        "ssm_conv1d" => "linear_attn.conv1d",
        "ssm_norm" => "linear_attn.norm",
        "ssm_out" => "linear_attn.out_proj",
        "ffn_gate_shexp" => "mlp.shared_expert.gate_proj",
        "ffn_up_shexp" => "mlp.shared_expert.up_proj",
        "ffn_down_shexp" => "mlp.shared_expert.down_proj",
        "ffn_gate_inp_shexp" => "mlp.shared_expert_gate",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        "ffn_gate_inp" => "mlp.gate",
        "ffn_gate_exps" => "mlp.experts.gate_proj",
        "ffn_up_exps" => "mlp.experts.up_proj",
        "ffn_down_exps" => "mlp.experts.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{own}.{field}"))
}

/// The layers of these tensors that only predict further tokens.
pub(crate) fn further_layers<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let layer = |name: &'a str| {
        let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
        part.starts_with("nextn.").then_some(layer)
    };
    names.filter_map(layer).collect()
}

/// The shape in transformers of a tensor with the given name there. GGUF files leave out
/// dimensions of 1.
pub(crate) fn tensor_shape(name: &str, shape: &[usize]) -> Vec<usize> {
    match *shape {
        [channels, taps] if name.ends_with(".linear_attn.conv1d.weight") => vec![channels, 1, taps],
        [hidden] if name.ends_with(".mlp.shared_expert_gate.weight") => vec![1, hidden],
        _ => shape.to_vec(),
    }
}
