//! One decoder layer: the formula of the architecture, for one rank of many.

use comm::CommError;
use ops::attention::{AttentionAlgorithm, AttentionShape, AttentionSpec, QkNorm, Rotary};
use ops::kernels::Store;
use ops::linear::reshape;
use ops::mlp::Mlp;
use ops::norm::prepare;
use ops::pages::LayerPages;
use ops::{Context, Linear, attention_sequence, linear_mpi, mlp, rms_norm};

use crate::workspace::{LayerBuffers, Part};

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
    pub eps: f32,
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
        pages: &mut LayerPages<'_>,
        parts: &mut [Part],
    ) -> Result<(), CommError> {
        let Pass { ctx, eps, .. } = *pass;
        for part in &mut *parts {
            part.x.settle(ctx)?;
            self.attention(pass, pages, part)?;
        }
        for part in parts {
            part.x.settle(ctx)?;
            let normed = &mut part.layer.normed;
            rms_norm(ctx, part.x.tokens(), &self.post_attention_norm, eps, normed);
            let layout = part.plan.as_ref().expect("a pass has a plan").layout();
            mlp(ctx, &self.mlp, normed, layout, &mut part.scratch.mlp, &mut part.x)?;
        }
        Ok(())
    }

    fn attention(
        &self,
        pass: &Pass<'_>,
        pages: &mut LayerPages<'_>,
        part: &mut Part,
    ) -> Result<(), CommError> {
        let Pass { ctx, eps, shape, algorithm } = *pass;
        let Part { x, plan, cos, sin, layer, scratch } = part;
        let LayerBuffers { normed, input, qkv, attended } = layer;
        let tokens = x.tokens().nrows();

        rms_norm(ctx, x.tokens(), &self.input_norm, eps, normed);
        prepare(ctx, &self.qkv_proj, normed, input);
        reshape(qkv, tokens, shape.qkv_width());
        {
            let _operation = ctx.profile.operation("qkv_proj", self.qkv_proj.shape().work(tokens));
            self.qkv_proj.apply(ctx, input, qkv, Store::Set);
        }

        let norm = QkNorm { q: &self.q_norm, k: &self.k_norm, eps };
        let spec = AttentionSpec { algorithm, shape, norm, rotary: Rotary { cos, sin } };
        let plan = plan.as_ref().expect("a pass has a plan");
        attention_sequence(ctx, &spec, plan, qkv, pages, &mut scratch.attention, attended)?;
        prepare(ctx, &self.o_proj, attended, input);
        let _operation = ctx.profile.operation("o_proj", self.o_proj.shape().work(tokens));
        linear_mpi(ctx, &self.o_proj, input, &mut scratch.partial, x)
    }
}
