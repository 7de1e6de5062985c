//! The part of `config.json` that only hybrid models have: which layers have attention, and the
//! heads of the gated delta rule in the others.

use crate::fields::{ConfigError, Fields};

/// Layers with a gated delta rule (Yang et al., "Gated Delta Networks", 2024) instead of attention;
/// the names are those of `config.json`.
///
/// `linear_num_value_heads` is a multiple of `linear_num_key_heads`, and at least one layer has
/// attention.
#[derive(Clone, Debug, PartialEq)]
pub struct HybridConfig {
    /// For each layer, whether it has attention.
    pub attention_layers: Vec<bool>,
    /// Key heads of the delta rule; there are as many query heads.
    pub linear_num_key_heads: usize,
    /// Value heads of the delta rule. Several consecutive ones may share a key head.
    pub linear_num_value_heads: usize,
    /// Elements of a key and of a query.
    pub linear_key_head_dim: usize,
    /// Elements of a value.
    pub linear_value_head_dim: usize,
    /// Tokens that the causal convolution before the delta rule covers.
    pub linear_conv_kernel_dim: usize,
    /// How the checkpoint stores the tensors of the delta rule.
    pub layout: DeltaLayout,
}

/// How a checkpoint stores the tensors of the delta rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaLayout {
    /// Qwen3.5: `in_proj_qkv`, `in_proj_z`, `in_proj_b` and `in_proj_a`.
    Split,
    /// Qwen3-Next: `in_proj_qkvz` and `in_proj_ba`, ordered by key head.
    Fused,
    /// GGUF files of Qwen3.5: as `Split`, but the value heads of a key head are not consecutive:
    /// value head i uses key head i modulo their number.
    GgufTiled,
    /// GGUF files of Qwen3-Next: as `Split`, but `in_proj_ba` is one matrix, ordered by key head.
    GgufGrouped,
}

impl DeltaLayout {
    /// Whether the tensors are as llama.cpp's converter writes them: norms with the one added that
    /// other files leave out, and −e^A_log in place of A_log.
    pub fn is_gguf(self) -> bool {
        matches!(self, Self::GgufTiled | Self::GgufGrouped)
    }
}

impl HybridConfig {
    pub(crate) fn parse(
        fields: &Fields<'_>,
        num_hidden_layers: usize,
        layout: DeltaLayout,
    ) -> Result<Self, ConfigError> {
        let layout = match fields.string("delta_layout")? {
            None => layout,
            Some("gguf-tiled") => DeltaLayout::GgufTiled,
            Some("gguf-grouped") => DeltaLayout::GgufGrouped,
            Some(other) => {
                let expected = "\"gguf-tiled\" or \"gguf-grouped\"";
                return Err(fields.unsupported("delta_layout", format!("{other:?}"), expected));
            }
        };
        let hybrid = Self {
            attention_layers: attention_layers(fields, num_hidden_layers)?,
            linear_num_key_heads: fields.size("linear_num_key_heads")?,
            linear_num_value_heads: fields.size("linear_num_value_heads")?,
            linear_key_head_dim: fields.size_up_to("linear_key_head_dim", MAX_HEAD_DIM)?,
            linear_value_head_dim: fields.size_up_to("linear_value_head_dim", MAX_HEAD_DIM)?,
            linear_conv_kernel_dim: fields.size_up_to("linear_conv_kernel_dim", MAX_TAPS)?,
            layout,
        };
        if !hybrid.linear_num_value_heads.is_multiple_of(hybrid.linear_num_key_heads) {
            return Err(fields.contradiction(
                ("linear_num_value_heads", hybrid.linear_num_value_heads),
                ("linear_num_key_heads", hybrid.linear_num_key_heads),
                "a multiple of it",
            ));
        }
        if !fields.boolean("attn_output_gate", true)? {
            return Err(fields.unsupported("attn_output_gate", false, "true"));
        }
        // The gate of the delta rule's result; later models may have another.
        match fields.string("output_gate_type")? {
            None | Some("swish" | "silu") => Ok(hybrid),
            Some(other) => {
                Err(fields.unsupported("output_gate_type", format!("{other:?}"), "\"swish\""))
            }
        }
    }

    /// Whether an input projection of so many rows only has the strength or the decay of heads:
    /// it is small and keeps its stored precision.
    pub(crate) fn is_small(&self, rows: usize) -> bool {
        rows <= 2 * self.linear_num_value_heads
    }

    /// The key head of a value head.
    pub fn key_head(&self, value_head: usize) -> usize {
        match self.layout {
            DeltaLayout::GgufTiled => value_head % self.linear_num_key_heads,
            _ => value_head / self.group_size(),
        }
    }

    /// Value heads that share a key head.
    pub fn group_size(&self) -> usize {
        self.linear_num_value_heads / self.linear_num_key_heads
    }

    /// Elements of all keys of a token; its queries have as many.
    pub fn key_size(&self) -> usize {
        self.linear_num_key_heads * self.linear_key_head_dim
    }

    /// Elements of all values of a token.
    pub fn value_size(&self) -> usize {
        self.linear_num_value_heads * self.linear_value_head_dim
    }

    /// Channels of the convolution: queries, keys and values.
    pub fn conv_channels(&self) -> usize {
        2 * self.key_size() + self.value_size()
    }

    /// Rows of all input projections: queries, keys, values, the output gate, and two numbers a
    /// value head.
    pub fn projection_rows(&self) -> usize {
        self.conv_channels() + self.value_size() + 2 * self.linear_num_value_heads
    }
}

/// Elements of a head and tokens of the convolution that a configuration may state, several times
/// those of the published models (128 and 4): a state has as many numbers as the product of two
/// heads.
const MAX_HEAD_DIM: usize = 4096;
const MAX_TAPS: usize = 64;

/// From `layer_types`, or from `full_attention_interval`: every so many layers the last one has
/// attention.
fn attention_layers(fields: &Fields<'_>, layers: usize) -> Result<Vec<bool>, ConfigError> {
    let field = "layer_types";
    let attention: Vec<bool> = match fields.value(field) {
        None => {
            let interval = fields.count("full_attention_interval", 1)?.unwrap_or(4);
            (0..layers).map(|layer| (layer + 1).is_multiple_of(interval)).collect()
        }
        Some(value) => {
            let kinds = value
                .as_array()
                .ok_or_else(|| fields.mistyped(field, value, "a list of strings"))?;
            if kinds.len() != layers {
                return Err(fields.contradiction(
                    (field, format!("a list of {}", kinds.len())),
                    ("num_hidden_layers", layers),
                    "one entry for each layer",
                ));
            }
            let expected = "\"full_attention\" or \"linear_attention\" for each layer";
            let kind = |kind: &serde_json::Value| match kind.as_str() {
                Some("full_attention") => Ok(true),
                Some("linear_attention") => Ok(false),
                _ => Err(fields.unsupported(field, kind, expected)),
            };
            kinds.iter().map(kind).collect::<Result<_, _>>()?
        }
    };
    if !attention.contains(&true) {
        return Err(fields.unsupported(
            if fields.value(field).is_some() { field } else { "full_attention_interval" },
            format!("none of {layers} layers with attention"),
            "at least one layer with full attention",
        ));
    }
    Ok(attention)
}
