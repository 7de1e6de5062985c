//! Names and shapes of the tensors of a published Qwen3 checkpoint.

use std::path::Path;

use tensor::{Checkpoint, CheckpointError};

use crate::config::Config;
use crate::fields::ConfigError;

/// Rows of the vocabulary, `[vocab_size, hidden_size]`; also the head where the two are tied.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The norm after the last layer, `[hidden_size]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The head of an untied model, `[vocab_size, hidden_size]`.
pub const LM_HEAD: &str = "lm_head.weight";

/// The tensors of one decoder layer outside of its feed-forward block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerNames {
    /// Norm before attention, `[hidden_size]`.
    pub input_layernorm: String,
    /// Queries, `[num_attention_heads * head_dim, hidden_size]`.
    pub q_proj: String,
    /// Keys, `[num_key_value_heads * head_dim, hidden_size]`.
    pub k_proj: String,
    /// Values, `[num_key_value_heads * head_dim, hidden_size]`.
    pub v_proj: String,
    /// Back to the residual stream, `[hidden_size, num_attention_heads * head_dim]`.
    pub o_proj: String,
    /// Norm of each query head, `[head_dim]`.
    pub q_norm: String,
    /// Norm of each key head, `[head_dim]`.
    pub k_norm: String,
    /// Norm before the feed-forward block, `[hidden_size]`.
    pub post_attention_layernorm: String,
    layer: usize,
}

/// The matrices of a dense feed-forward block or of one expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MlpNames {
    /// `[columns, hidden_size]`
    pub gate_proj: String,
    /// `[columns, hidden_size]`
    pub up_proj: String,
    /// `[hidden_size, columns]`
    pub down_proj: String,
}

impl LayerNames {
    /// Names of the layer `layer`, counted from 0.
    pub fn new(layer: usize) -> Self {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        Self {
            input_layernorm: name("input_layernorm"),
            q_proj: name("self_attn.q_proj"),
            k_proj: name("self_attn.k_proj"),
            v_proj: name("self_attn.v_proj"),
            o_proj: name("self_attn.o_proj"),
            q_norm: name("self_attn.q_norm"),
            k_norm: name("self_attn.k_norm"),
            post_attention_layernorm: name("post_attention_layernorm"),
            layer,
        }
    }

    /// The feed-forward block of a dense layer.
    pub fn mlp(&self) -> MlpNames {
        MlpNames::new(&format!("model.layers.{}.mlp", self.layer))
    }

    /// The router of a sparse layer, `[num_experts, hidden_size]`.
    pub fn router(&self) -> String {
        format!("model.layers.{}.mlp.gate.weight", self.layer)
    }

    /// One expert of a sparse layer.
    pub fn expert(&self, expert: usize) -> MlpNames {
        MlpNames::new(&format!("model.layers.{}.mlp.experts.{expert}", self.layer))
    }
}

impl MlpNames {
    fn new(block: &str) -> Self {
        let name = |part: &str| format!("{block}.{part}.weight");
        Self { gate_proj: name("gate_proj"), up_proj: name("up_proj"), down_proj: name("down_proj") }
    }
}

/// What a tensor is for, as far as its storage depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorRole {
    /// A weight of a norm: a vector, never quantized.
    Norm,
    /// The router of a sparse layer: small, and its rounding would change which experts are visited.
    Router,
    /// Any other matrix.
    Matrix,
}

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// Its shape: one or two dimensions.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: TensorRole,
}

impl TensorSpec {
    /// Elements of the tensor.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// The weights in the folder `dir`, which must not have more layers than its configuration says: the answers of the first few would
/// look like answers. That nothing is missing shows when it is read.
pub fn open_weights<E: From<ConfigError> + From<CheckpointError>>(
    dir: &Path,
    config: &Config,
) -> Result<Checkpoint, E> {
    let checkpoint = Checkpoint::open(dir)?;
    let beyond = LayerNames::new(config.num_hidden_layers).input_layernorm;
    if let Some(file) = checkpoint.file(&beyond) {
        return Err(E::from(ConfigError::Contradiction {
            file: dir.join("config.json"),
            field: "num_hidden_layers".into(),
            found: config.num_hidden_layers.to_string(),
            other: format!("tensor {beyond} in {}", file.display()),
            expected: "the number of layers that the weights have".into(),
        }));
    }
    Ok(checkpoint)
}

/// All tensors of a model in reading order: embedding, layers, final norm, head.
pub fn tensor_specs(config: &Config) -> impl Iterator<Item = TensorSpec> + '_ {
    let hidden = config.hidden_size;
    let first = [matrix(EMBEDDING.into(), config.vocab_size, hidden)];
    let last = [norm(FINAL_NORM.into(), hidden)];
    let head = (!config.tie_word_embeddings).then(|| matrix(LM_HEAD.into(), config.vocab_size, hidden));
    let layers = (0..config.num_hidden_layers).flat_map(|layer| layer_specs(config, layer));
    first.into_iter().chain(layers).chain(last).chain(head)
}

fn layer_specs(config: &Config, layer: usize) -> Vec<TensorSpec> {
    let names = LayerNames::new(layer);
    let (hidden, queries, keys) = (config.hidden_size, config.query_size(), config.key_value_size());
    let mut specs = vec![
        norm(names.input_layernorm.clone(), hidden),
        matrix(names.q_proj.clone(), queries, hidden),
        matrix(names.k_proj.clone(), keys, hidden),
        matrix(names.v_proj.clone(), keys, hidden),
        matrix(names.o_proj.clone(), hidden, queries),
        norm(names.q_norm.clone(), config.head_dim),
        norm(names.k_norm.clone(), config.head_dim),
        norm(names.post_attention_layernorm.clone(), hidden),
    ];
    let mut block = |names: MlpNames, columns| {
        specs.push(matrix(names.gate_proj, columns, hidden));
        specs.push(matrix(names.up_proj, columns, hidden));
        specs.push(matrix(names.down_proj, hidden, columns));
    };
    match &config.moe {
        Some(moe) if config.is_sparse(layer) => {
            (0..moe.num_experts).for_each(|expert| block(names.expert(expert), moe.moe_intermediate_size));
            specs.push(TensorSpec {
                name: names.router(),
                shape: vec![moe.num_experts, hidden],
                role: TensorRole::Router,
            });
        }
        _ => block(names.mlp(), config.intermediate_size),
    }
    specs
}

fn matrix(name: String, rows: usize, cols: usize) -> TensorSpec {
    TensorSpec { name, shape: vec![rows, cols], role: TensorRole::Matrix }
}

fn norm(name: String, len: usize) -> TensorSpec {
    TensorSpec { name, shape: vec![len], role: TensorRole::Norm }
}
