//! One decoder layer: the formula of the architecture, for one rank of many.

use comm::CommError;
use ops::{
    AttentionAlgorithm, AttentionScratch, AttentionShape, AttentionSpec, Context, Input, LayerCache, Linear, Mlp,
    MlpScratch, QkNorm, Rotary, SequenceSpan, Store, attention_headwise, attention_sequence, linear_mpi, mlp, prepare,
    reshape, rms_norm,
};
use tensor::Activations;

/// The weights of one layer that this rank owns.
pub(crate) struct DecoderLayer {
    pub input_norm: Vec<f32>,
    /// Queries over keys over values of this rank's heads.
    pub qkv_proj: Linear,
    pub q_norm: Vec<f32>,
    pub k_norm: Vec<f32>,
    /// The columns of this rank's query heads.
    pub o_proj: Linear,
    pub post_attention_norm: Vec<f32>,
    pub mlp: Mlp,
}

/// What is the same for all layers of a forward pass.
pub(crate) struct Pass<'a> {
    pub ctx: &'a Context,
    pub algorithm: AttentionAlgorithm,
    pub shape: &'a AttentionShape,
    pub rotary: Rotary<'a>,
    pub span: SequenceSpan<'a>,
    pub eps: f32,
}

/// Working memory of a forward pass, kept from pass to pass.
#[derive(Default)]
pub(crate) struct Scratch {
    pub x: Activations,
    pub normed: Activations,
    pub wanted: Activations,
    pub input: Input,
    qkv: Activations,
    attended: Activations,
    partial: Activations,
    attention: AttentionScratch,
    mlp: MlpScratch,
}

impl DecoderLayer {
    /// Bytes of this rank's weights.
    pub fn bytes(&self) -> usize {
        let experts = self.mlp.experts.iter().flat_map(|expert| [&expert.gate, &expert.up, &expert.down]);
        let router = self.mlp.router.iter().map(|router| &router.weights);
        [&self.qkv_proj, &self.o_proj].into_iter().chain(experts).chain(router).map(Linear::bytes).sum()
    }

    /// Adds the attention and the feed-forward block to the residual stream `scratch.x` [own tokens, hidden].
    pub fn forward(&self, pass: &Pass<'_>, cache: &mut LayerCache, scratch: &mut Scratch) -> Result<(), CommError> {
        let Pass { ctx, eps, .. } = *pass;
        let Scratch { x, normed, input, qkv, attended, partial, attention, mlp: mlp_scratch, .. } = scratch;

        rms_norm(ctx, x, &self.input_norm, eps, normed);
        prepare(ctx, self.qkv_proj.input_kind(), normed, input);
        reshape(qkv, x.nrows(), pass.shape.qkv_width());
        {
            let _operation = ctx.profile.operation("qkv_proj", self.qkv_proj.work(x.nrows()));
            self.qkv_proj.apply(ctx, input, qkv, Store::Set);
        }

        let spec = AttentionSpec {
            algorithm: pass.algorithm,
            shape: pass.shape,
            norm: QkNorm { q: &self.q_norm, k: &self.k_norm, eps },
            rotary: pass.rotary,
        };
        if ctx.positions.size() == 1 {
            attention_headwise(ctx, &spec, qkv, cache, attention, attended);
        } else {
            attention_sequence(ctx, &spec, &pass.span, qkv, cache, attention, attended)?;
        }
        prepare(ctx, self.o_proj.input_kind(), attended, input);
        {
            let _operation = ctx.profile.operation("o_proj", self.o_proj.work(x.nrows()));
            linear_mpi(ctx, &self.o_proj, input, partial, x)?;
        }

        rms_norm(ctx, x, &self.post_attention_norm, eps, normed);
        mlp(ctx, &self.mlp, normed, pass.span.layout, mlp_scratch, x)
    }
}
