//! One decoder layer: the formula of the architecture, for one rank of many.

use comm::CommError;
use ops::attention::{
    AttentionAlgorithm, AttentionScratch, AttentionShape, AttentionSpec, QkNorm, Rotary,
};
use ops::attention_sequence::{SequenceSpan, SequenceSpec};
use ops::kernels::{Input, Store};
use ops::linear::reshape;
use ops::mlp::{Mlp, MlpScratch};
use ops::norm::prepare;
use ops::residual::Residual;
use ops::{Context, LayerCache, Linear, attention_sequence, linear_mpi, mlp, rms_norm};
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
    pub span: SequenceSpan<'a>,
    pub eps: f32,
}

/// Tokens that go through the layers together: all of this rank's, or half of them. Kept from pass
/// to pass for its memory.
#[derive(Default)]
pub(crate) struct Part {
    /// [tokens, hidden]
    pub x: Residual,
    /// Rotary factors, each [tokens, head_dim / 2].
    pub cos: Activations,
    pub sin: Activations,
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
        self.qkv_proj.bytes() + self.o_proj.bytes() + self.mlp.bytes()
    }

    /// Adds the attention and the feed-forward block to the residual stream of each part. Where
    /// there are two, the sums of one are on their way while the other is computed; those of the
    /// feed-forward block still are at the end.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        cache: &mut LayerCache,
        parts: &mut [Part],
    ) -> Result<(), CommError> {
        for part in &mut *parts {
            part.x.settle(pass.ctx)?;
            self.attention(pass, cache, part)?;
        }
        for part in parts {
            part.x.settle(pass.ctx)?;
            rms_norm(
                pass.ctx,
                part.x.tokens(),
                &self.post_attention_norm,
                pass.eps,
                &mut part.normed,
            );
            mlp(pass.ctx, &self.mlp, &part.normed, pass.span.layout, &mut part.mlp, &mut part.x)?;
        }
        Ok(())
    }

    fn attention(
        &self,
        pass: &Pass<'_>,
        cache: &mut LayerCache,
        part: &mut Part,
    ) -> Result<(), CommError> {
        let Pass { ctx, eps, .. } = *pass;
        let Part { x, cos, sin, normed, input, qkv, attended, partial, attention, .. } = part;
        let tokens = x.tokens().nrows();

        rms_norm(ctx, x.tokens(), &self.input_norm, eps, normed);
        prepare(ctx, &self.qkv_proj, normed, input);
        reshape(qkv, tokens, pass.shape.qkv_width());
        {
            let _operation = ctx.profile.operation("qkv_proj", self.qkv_proj.shape().work(tokens));
            self.qkv_proj.apply(ctx, input, qkv, Store::Set);
        }

        let spec = AttentionSpec {
            algorithm: pass.algorithm,
            shape: pass.shape,
            norm: QkNorm { q: &self.q_norm, k: &self.k_norm, eps },
            rotary: Rotary { cos, sin },
        };
        let spec = SequenceSpec { attention: spec, span: pass.span };
        attention_sequence(ctx, &spec, qkv, cache, attention, attended)?;
        prepare(ctx, &self.o_proj, attended, input);
        let _operation = ctx.profile.operation("o_proj", self.o_proj.shape().work(tokens));
        linear_mpi(ctx, &self.o_proj, input, partial, x)
    }
}
