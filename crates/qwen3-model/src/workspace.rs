//! The memory that a forward pass works with, kept by the caller from pass to pass.

use ops::attention_headwise::AttentionScratch;
use ops::attention_sequence::PassPlan;
use ops::delta_rule::DeltaScratch;
use ops::kernels::Input;
use ops::mlp::MlpScratch;
use ops::residual::Residual;
use tensor::Activations;

use crate::batch::StateSpan;

/// Memory for the forward passes of a model, as large as the largest of them needed. A pass uses
/// one exclusively; nothing of it means anything between passes.
#[derive(Default)]
pub struct Workspace {
    /// The tokens that go through the layers together: all, or each half.
    pub(crate) parts: [Part; 2],
    /// Rows wanted of all parts, before and after the last norm, and those that the head scores.
    pub(crate) wanted: Activations,
    pub(crate) normed: Activations,
    pub(crate) scored: Activations,
    pub(crate) input: Input,
}

/// Tokens that go through the layers together: all of this rank's, or half of them.
#[derive(Default)]
pub(crate) struct Part {
    /// The residual stream, [tokens, hidden].
    pub x: Residual,
    /// Which of the pass's tokens these are, where they are stored and what they see.
    pub plan: Option<PassPlan>,
    /// The sequences of these tokens.
    pub states: Vec<StateSpan>,
    /// Rotary factors, each [tokens, head_dim / 2].
    pub cos: Activations,
    pub sin: Activations,
    pub layer: LayerBuffers,
    pub scratch: Scratch,
}

/// What one operation of a layer leaves for the next one.
#[derive(Default)]
pub(crate) struct LayerBuffers {
    /// [tokens, hidden]
    pub normed: Activations,
    /// Prepared for the products that come next.
    pub input: Input,
    /// What the mixer reads, [tokens, rows of `in_proj`].
    pub projected: Activations,
    /// [tokens, rows of `gates`]
    pub gates: Activations,
    /// The result of the mixer, [tokens, columns of `out_proj`].
    pub mixed: Activations,
}

/// What only single operations use.
#[derive(Default)]
pub(crate) struct Scratch {
    pub partial: Activations,
    pub attention: AttentionScratch,
    pub delta: DeltaScratch,
    pub mlp: MlpScratch,
}
