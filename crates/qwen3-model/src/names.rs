//! Names and shapes of the tensors of a published Qwen3 checkpoint.

use checkpoint::{Checkpoint, CheckpointError, ModelSource};

use crate::config::Config;
use crate::fields::ConfigError;
use crate::hybrid_config::{DeltaLayout, HybridConfig};

/// Rows of the vocabulary, `[vocab_size, hidden_size]`; also the head where the two are tied.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The norm after the last layer, `[hidden_size]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The head of a model that has its own, `[vocab_size, hidden_size]`.
pub const LM_HEAD: &str = "lm_head.weight";

/// The tensors of one decoder layer outside of its feed-forward block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerNames {
    /// Norm before attention, `[hidden_size]`.
    pub input_layernorm: String,
    /// Queries, `[num_attention_heads * head_dim, hidden_size]`. In a hybrid model each head has
    /// the rows of its output gate after those of its query.
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

/// The tensors of a gated delta rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaNames {
    /// Matrices from the residual stream, each with its rows, in the order of the checkpoint:
    /// `in_proj_qkv`, `in_proj_z`, `in_proj_b` and `in_proj_a`, some of them fused as the layout of
    /// the checkpoint says.
    pub inputs: Vec<(String, usize)>,
    /// Convolution of queries, keys and values, [channels, 1, taps].
    pub conv1d: String,
    /// Logarithm of each value head's rate of decay, [value heads].
    pub a_log: String,
    /// Bias of each value head's decay, [value heads].
    pub dt_bias: String,
    /// Norm of each value head, [value head size].
    pub norm: String,
    /// Back to the residual stream, [hidden_size, all values].
    pub out_proj: String,
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

    /// The gated delta rule of a layer without attention.
    pub fn delta(&self, hybrid: &HybridConfig) -> DeltaNames {
        let part = |part: &str| format!("model.layers.{}.linear_attn.{part}", self.layer);
        let (channels, values) = (hybrid.conv_channels(), hybrid.value_size());
        let heads = hybrid.linear_num_value_heads;
        let inputs: &[_] = match hybrid.layout {
            DeltaLayout::Fused => &[("qkvz", channels + values), ("ba", 2 * heads)],
            DeltaLayout::GgufGrouped => &[("qkv", channels), ("z", values), ("ba", 2 * heads)],
            DeltaLayout::Split | DeltaLayout::GgufTiled => {
                &[("qkv", channels), ("z", values), ("b", heads), ("a", heads)]
            }
        };
        let input = |(name, rows): &(&str, usize)| (part(&format!("in_proj_{name}.weight")), *rows);
        DeltaNames {
            inputs: inputs.iter().map(input).collect(),
            conv1d: part("conv1d.weight"),
            a_log: part("A_log"),
            dt_bias: part("dt_bias"),
            norm: part("norm.weight"),
            out_proj: part("out_proj.weight"),
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

    /// The expert of a sparse layer that every token visits.
    pub fn shared_expert(&self) -> MlpNames {
        MlpNames::new(&format!("model.layers.{}.mlp.shared_expert", self.layer))
    }

    /// The gate of that expert, `[1, hidden_size]`.
    pub fn shared_expert_gate(&self) -> String {
        format!("model.layers.{}.mlp.shared_expert_gate.weight", self.layer)
    }

    /// One expert of a sparse layer.
    pub fn expert(&self, expert: usize) -> MlpNames {
        MlpNames::new(&format!("model.layers.{}.mlp.experts.{expert}", self.layer))
    }
}

impl MlpNames {
    fn new(block: &str) -> Self {
        let name = |part: &str| format!("{block}.{part}.weight");
        Self {
            gate_proj: name("gate_proj"),
            up_proj: name("up_proj"),
            down_proj: name("down_proj"),
        }
    }
}

/// What a tensor is for, as far as its storage depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorRole {
    /// A weight of a norm or of the convolution, or a number for each head: never quantized.
    Norm,
    /// The router of a sparse layer, or another small matrix that decides how much something
    /// counts at all: it keeps its stored precision.
    Router,
    /// Any other matrix.
    Matrix,
}

/// A tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the file.
    pub name: String,
    /// Its shape: one to three dimensions.
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

/// The parts of a checkpoint that this crate does not run, with their numbers of tensors: the
/// vision encoder of a model that also reads images, and the layers that predict further tokens.
pub fn unused_parts(checkpoint: &Checkpoint) -> Vec<(&'static str, usize)> {
    let parts = [
        ("vision encoder", &["model.visual.", "visual."][..]),
        ("multi-token prediction", &["mtp.", "model.mtp."]),
    ];
    let names = checkpoint.names();
    let count = |prefixes: &[&str]| {
        let inside = |name: &&&str| prefixes.iter().any(|prefix| name.starts_with(prefix));
        names.iter().filter(inside).count()
    };
    let counts = parts.map(|(part, prefixes)| (part, count(prefixes)));
    counts.into_iter().filter(|(_, count)| *count > 0).collect()
}

/// The weights of a model, if they are those of its configuration: all tensors are there in their
/// shapes, so that whatever is sized by the configuration afterwards is no larger than the files,
/// and there are no more layers, since the answers of the first few would look like answers. Only
/// headers are read.
///
/// # Errors
/// When the headers cannot be read, or contradict the configuration.
pub fn open_weights<'a, E: From<ConfigError> + From<CheckpointError>>(
    source: &'a ModelSource,
    config: &Config,
) -> Result<&'a Checkpoint, E> {
    let checkpoint = source.weights()?;
    let beyond = LayerNames::new(config.num_hidden_layers).input_layernorm;
    if let Some(file) = checkpoint.file(&beyond) {
        return Err(E::from(ConfigError::Contradiction {
            file: source.config().map_err(ConfigError::from)?.file.clone(),
            field: "num_hidden_layers".into(),
            found: config.num_hidden_layers.to_string(),
            other: format!("tensor {beyond} in {}", file.display()),
            expected: "the number of layers that the weights have".into(),
        }));
    }
    for spec in tensor_specs(config) {
        checkpoint.expect_shape(&spec.name, &spec.shape)?;
    }
    reject_biases::<E>(source, config, checkpoint)?;
    Ok(checkpoint)
}

/// Biases would change every answer, and no Qwen3 has them. Some programs write biases of zeros.
fn reject_biases<E: From<ConfigError> + From<CheckpointError>>(
    source: &ModelSource,
    config: &Config,
    checkpoint: &Checkpoint,
) -> Result<(), E> {
    let matrices = tensor_specs(config).filter(|spec| spec.role != TensorRole::Norm);
    for spec in matrices {
        let Some(bias) = spec.name.strip_suffix("weight").map(|name| format!("{name}bias")) else {
            continue;
        };
        let Some(file) = checkpoint.file(&bias) else { continue };
        let values = checkpoint.vector(&bias, spec.shape[0])?;
        if values.iter().any(|value| *value != 0.0) {
            return Err(E::from(ConfigError::Contradiction {
                file: source.config().map_err(ConfigError::from)?.file.clone(),
                field: "attention_bias".into(),
                found: "false or absent".into(),
                other: format!("tensor {bias} in {}", file.display()),
                expected: "weights without biases".into(),
            }));
        }
    }
    Ok(())
}

/// The tensor that is the head. A tied model may have a head that was trained apart all the same;
/// transformers, from version 5 on, uses it, and where the two are equal it is all one.
pub(crate) fn head(config: &Config, checkpoint: &Checkpoint) -> &'static str {
    let shared = config.tie_word_embeddings && !checkpoint.contains(LM_HEAD);
    if shared || !config.has_head { EMBEDDING } else { LM_HEAD }
}

/// All tensors of a model in reading order: embedding, layers, final norm, head.
pub fn tensor_specs(config: &Config) -> impl Iterator<Item = TensorSpec> + '_ {
    let hidden = config.hidden_size;
    let first = [matrix(EMBEDDING.into(), config.vocab_size, hidden)];
    let last = [norm(FINAL_NORM.into(), hidden)];
    let own_head = config.has_head && !config.tie_word_embeddings;
    let head = own_head.then(|| head_spec(config));
    let layers = (0..config.num_hidden_layers).flat_map(|layer| layer_specs(config, layer));
    first.into_iter().chain(layers).chain(last).chain(head)
}

fn layer_specs(config: &Config, layer: usize) -> impl Iterator<Item = TensorSpec> + use<> {
    let names = LayerNames::new(layer);
    let hidden = config.hidden_size;
    let mut mixer = vec![norm(names.input_layernorm.clone(), hidden)];
    match config.delta_of(layer) {
        Some(hybrid) => mixer.extend(delta_specs(hybrid, names.delta(hybrid), hidden)),
        None => mixer.extend(attention_specs(config, &names)),
    }
    mixer.push(norm(names.post_attention_layernorm.clone(), hidden));

    let moe = config.moe_of(layer);
    let (experts, columns) = moe.map_or((None, config.intermediate_size), |moe| {
        (Some(moe.num_experts), moe.moe_intermediate_size)
    });
    let router = experts.map(|experts| small(names.router(), experts, hidden));
    let block = move |names: MlpNames, columns| {
        [
            matrix(names.gate_proj, columns, hidden),
            matrix(names.up_proj, columns, hidden),
            matrix(names.down_proj, hidden, columns),
        ]
    };
    let shared = moe.and_then(|moe| moe.shared_expert_intermediate_size).map(|columns| {
        let gate = small(names.shared_expert_gate(), 1, hidden);
        block(names.shared_expert(), columns).into_iter().chain([gate])
    });
    let blocks = (0..experts.unwrap_or(1)).flat_map(move |expert| {
        block(if experts.is_some() { names.expert(expert) } else { names.mlp() }, columns)
    });
    mixer.into_iter().chain(blocks).chain(router).chain(shared.into_iter().flatten())
}

fn attention_specs(config: &Config, names: &LayerNames) -> [TensorSpec; 6] {
    let (hidden, keys) = (config.hidden_size, config.key_value_size());
    [
        matrix(names.q_proj.clone(), config.query_rows(), hidden),
        matrix(names.k_proj.clone(), keys, hidden),
        matrix(names.v_proj.clone(), keys, hidden),
        matrix(names.o_proj.clone(), hidden, config.query_size()),
        norm(names.q_norm.clone(), config.head_dim),
        norm(names.k_norm.clone(), config.head_dim),
    ]
}

fn delta_specs(
    hybrid: &HybridConfig,
    names: DeltaNames,
    hidden: usize,
) -> impl Iterator<Item = TensorSpec> + use<> {
    let (heads, small_inputs) = (hybrid.linear_num_value_heads, hybrid.clone());
    let conv = vec![hybrid.conv_channels(), 1, hybrid.linear_conv_kernel_dim];
    let rest = [
        TensorSpec { name: names.conv1d, shape: conv, role: TensorRole::Norm },
        norm(names.a_log, heads),
        norm(names.dt_bias, heads),
        norm(names.norm, hybrid.linear_value_head_dim),
        matrix(names.out_proj, hidden, hybrid.value_size()),
    ];
    let input = move |(name, rows): (String, usize)| match small_inputs.is_small(rows) {
        true => small(name, rows, hidden),
        false => matrix(name, rows, hidden),
    };
    names.inputs.into_iter().map(input).chain(rest)
}

/// A head of its own.
pub(crate) fn head_spec(config: &Config) -> TensorSpec {
    matrix(LM_HEAD.into(), config.vocab_size, config.hidden_size)
}

fn matrix(name: String, rows: usize, cols: usize) -> TensorSpec {
    TensorSpec { name, shape: vec![rows, cols], role: TensorRole::Matrix }
}

fn small(name: String, rows: usize, cols: usize) -> TensorSpec {
    TensorSpec { name, shape: vec![rows, cols], role: TensorRole::Router }
}

fn norm(name: String, len: usize) -> TensorSpec {
    TensorSpec { name, shape: vec![len], role: TensorRole::Norm }
}
