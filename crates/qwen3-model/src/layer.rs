//! One decoder layer: the formula of the architecture, for one rank of many.

use comm::CommError;
use ops::attention::{AttentionAlgorithm, AttentionShape, AttentionSpec, QkNorm, Rotary, gate};
use ops::delta_rule::{DeltaShape, DeltaSpan, DeltaWeights};
use ops::kernels::{Input, Store};
use ops::linear::reshape;
use ops::mlp::Mlp;
use ops::norm::prepare;
use ops::{Context, Linear, attention_sequence, delta_rule, linear_mpi, mlp, rms_norm};
use tensor::Activations;

use crate::arena::Arena;
use crate::batch::StateSpan;
use crate::workspace::{LayerBuffers, Part};

/// The weights of one layer that this rank owns.
pub(crate) struct DecoderLayer {
    pub input_norm: Vec<f32>,
    /// What the mixer reads of this rank's heads: queries over keys over values, and in a gated
    /// delta rule over output gates.
    pub in_proj: Linear,
    /// The output gates of attention, or strength and decay of a delta rule.
    pub gates: Option<Linear>,
    pub mixer: Mixer,
    /// The columns of this rank's heads.
    pub out_proj: Linear,
    pub post_attention_norm: Vec<f32>,
    pub mlp: Mlp,
}

/// How the tokens of a sequence see each other. `index` counts the layers of the same kind, which
/// have their memory in one arena.
pub(crate) enum Mixer {
    Attention { index: usize, q_norm: Vec<f32>, k_norm: Vec<f32> },
    DeltaRule { index: usize, weights: DeltaWeights },
}

impl Mixer {
    /// What reports call the products with `gates`, `in_proj` and `out_proj`.
    fn product_names(&self) -> [&'static str; 3] {
        match self {
            Self::Attention { .. } => ["gate_proj", "qkv_proj", "o_proj"],
            Self::DeltaRule { .. } => ["ba_proj", "qkvz_proj", "out_proj"],
        }
    }
}

/// What is the same for all layers of a forward pass.
pub(crate) struct Pass<'a> {
    pub ctx: &'a Context,
    pub algorithm: AttentionAlgorithm,
    pub shape: &'a AttentionShape,
    /// The heads of layers with a delta rule.
    pub delta: &'a DeltaShape,
    pub eps: f32,
}

impl DecoderLayer {
    /// Bytes of this rank's weights.
    pub fn bytes(&self) -> usize {
        let gates = self.gates.as_ref().map_or(0, Linear::bytes);
        self.in_proj.bytes() + gates + self.out_proj.bytes() + self.mlp.bytes()
    }

    /// Adds the mixer and the feed-forward block to the residual stream of each part. With two
    /// parts, the sums of one travel while the other is computed; at the end those of the
    /// feed-forward block still do.
    pub fn forward(
        &self,
        pass: &Pass<'_>,
        arena: &mut Arena,
        parts: &mut [Part],
    ) -> Result<(), CommError> {
        let Pass { ctx, eps, .. } = *pass;
        for part in &mut *parts {
            part.x.settle(ctx)?;
            self.mix(pass, arena, part)?;
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

    /// Adds attention, or the gated delta rule, to the residual stream.
    fn mix(&self, pass: &Pass<'_>, arena: &mut Arena, part: &mut Part) -> Result<(), CommError> {
        let Pass { ctx, eps, shape, algorithm, .. } = *pass;
        let Part { x, plan, states, cos, sin, layer, scratch } = part;
        let LayerBuffers { normed, input, projected, gates, mixed } = layer;
        let tokens = x.tokens().nrows();
        let [gates_name, in_name, out_name] = self.mixer.product_names();

        rms_norm(ctx, x.tokens(), &self.input_norm, eps, normed);
        if let Some(linear) = &self.gates {
            prepare(ctx, linear, normed, input);
            product(ctx, gates_name, linear, input, tokens, gates);
        }
        prepare(ctx, &self.in_proj, normed, input);
        product(ctx, in_name, &self.in_proj, input, tokens, projected);
        match &self.mixer {
            Mixer::Attention { index, q_norm, k_norm } => {
                let norm = QkNorm { q: q_norm, k: k_norm, eps };
                let spec = AttentionSpec { algorithm, shape, norm, rotary: Rotary { cos, sin } };
                let plan = plan.as_ref().expect("a pass has a plan");
                let (pages, scratch) = (&mut arena.pages.layer(*index), &mut scratch.attention);
                attention_sequence(ctx, &spec, plan, projected, pages, scratch, mixed)?;
                if self.gates.is_some() {
                    gate(ctx, gates, mixed);
                }
            }
            Mixer::DeltaRule { index, weights } => {
                let slots: Vec<_> = states.iter().map(|span| span.slot).collect();
                let layer = arena.states.layer(*index, &slots).into_iter();
                let span =
                    |(state, &StateSpan { start, tokens, .. })| DeltaSpan { start, tokens, state };
                let mut spans: Vec<_> = layer.zip(states.iter()).map(span).collect();
                let input = (&*projected, &*gates);
                delta_rule(ctx, pass.delta, weights, input, &mut spans, &mut scratch.delta, mixed);
            }
        }
        prepare(ctx, &self.out_proj, mixed, input);
        let _operation = ctx.profile.operation(out_name, self.out_proj.shape().work(tokens));
        linear_mpi(ctx, &self.out_proj, input, &mut scratch.partial, x)
    }
}

/// `out = x · Wᵀ` for the prepared tokens, recorded under `name`.
fn product(
    ctx: &Context,
    name: &'static str,
    weights: &Linear,
    input: &Input,
    tokens: usize,
    out: &mut Activations,
) {
    reshape(out, tokens, weights.rows());
    let _operation = ctx.profile.operation(name, weights.shape().work(tokens));
    weights.apply(ctx, input, out, Store::Set);
}
