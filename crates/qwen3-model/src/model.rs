//! The model as one rank holds it, and its one forward pass, which takes a batch of prompts and
//! generated tokens of any number of sequences.

use std::ops::Range;
use std::sync::Arc;

use checkpoint::Matrix;
use comm::{CommError, Communicator};
use ndarray::Axis;
use ops::attention::AttentionShape;
use ops::attention_sequence::PassPlan;
use ops::delta_rule::DeltaShape;
use ops::kernels::InputKind;
use ops::layout::TokenLayout;
use ops::linear::{gather_columns, reshape};
use ops::lm_head::wanted_rows;
use ops::{Context, Embedding, KvArena, Linear, Profile, StateArena, lm_head, rms_norm};
use tensor::{Activations, split_range};

use crate::arena::Arena;
use crate::batch::{Batch, BatchError, Bounds, Output, Wanted};
use crate::config::Config;
use crate::error::ModelError;
use crate::layer::{DecoderLayer, Pass};
use crate::options::{ModelOptions, pass_tokens};
use crate::overlap::Overlap;
use crate::rotary::RotaryTable;
use crate::workspace::Workspace;

/// A Qwen3 model, as far as this rank holds it.
pub struct Model {
    pub(crate) config: Config,
    pub(crate) options: ModelOptions,
    pub(crate) ctx: Context,
    pub(crate) shape: AttentionShape,
    /// The heads of layers with a gated delta rule.
    pub(crate) delta: DeltaShape,
    pub(crate) rotary: RotaryTable,
    pub(crate) embedding: Embedding<Matrix>,
    pub(crate) layers: Vec<DecoderLayer>,
    pub(crate) norm: Vec<f32>,
    pub(crate) lm_head: Linear,
    pub(crate) vocab: Range<usize>,
    pub(crate) weight_format: tensor::WeightFormat,
    pub(crate) rounding: tensor::Rounding,
}

/// Logits of some rows, as far as this rank has them.
#[derive(Clone, Debug)]
pub struct Logits {
    /// The tokens of the vocabulary that this rank scores.
    pub vocab: Range<usize>,
    /// [rows, vocab.len()]
    pub values: Activations,
}

impl Model {
    /// The model's `config.json`.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The ranks that share the model.
    pub fn comm(&self) -> &Arc<dyn Communicator> {
        &self.ctx.comm
    }

    /// What the model was loaded with.
    pub fn options(&self) -> &ModelOptions {
        &self.options
    }

    /// What the operations take, when it is recorded.
    pub fn profile(&self) -> &Profile {
        &self.ctx.profile
    }

    /// The surroundings of this rank's operations: its instruction set and its team.
    pub fn context(&self) -> &Context {
        &self.ctx
    }

    /// The format of the projection weights in memory.
    pub fn weight_format(&self) -> tensor::WeightFormat {
        self.weight_format
    }

    /// How the projections take activations, which decides the instruction of their arithmetic.
    pub fn product_input(&self) -> InputKind {
        self.layers.first().map_or(InputKind::Float, |layer| layer.in_proj.input_kind(&self.ctx))
    }

    /// What loading rounded of this rank's weights, because their format in memory does not
    /// represent the stored ones exactly.
    pub fn rounding(&self) -> tensor::Rounding {
        self.rounding
    }

    /// Which passes go through the layers in halves.
    fn overlap(&self) -> Overlap {
        Overlap { machines: self.ctx.heads.machines(), tokens: self.options.overlap }
    }

    /// Tokens of a pass that gives each rank at most `chunk` of them: that many for each rank of
    /// those that split positions.
    pub fn pass_tokens(&self, chunk: usize) -> usize {
        pass_tokens(chunk, self.ctx.positions.size())
    }

    /// Bytes of packed weights on this rank.
    pub fn weight_bytes(&self) -> usize {
        self.layers.iter().map(DecoderLayer::bytes).sum::<usize>() + self.lm_head.bytes()
    }

    /// An arena of `pages` pages and of recurrent states for `sequences` sequences, for this rank's
    /// heads.
    ///
    /// # Errors
    /// When the system refuses so much memory.
    pub fn new_arena(&self, pages: usize, sequences: usize) -> Result<Arena, ModelError> {
        let AttentionShape { groups, head_dim } = &self.shape;
        let attention = self.config.attention_layers();
        let delta = self.layers.len() - attention;
        let slots = if delta > 0 { sequences } else { 0 };
        Ok(Arena {
            pages: KvArena::new(self.options.kv, attention, groups.len(), *head_dim, pages)?,
            states: StateArena::new(self.delta.state_len(), delta, slots)?,
        })
    }

    /// Bytes of a page on this rank.
    pub fn page_bytes(&self) -> usize {
        KvArena::bytes_of_page(
            self.options.kv,
            self.config.attention_layers(),
            self.shape.groups.len(),
            self.shape.head_dim,
        )
    }

    /// Bytes of the recurrent states of a sequence on this rank; 0 in a model that has attention
    /// everywhere.
    pub fn state_bytes(&self) -> usize {
        let delta = self.layers.len() - self.config.attention_layers();
        delta * self.delta.state_len() * size_of::<f32>()
    }

    /// Memory for forward passes.
    pub fn new_workspace(&self) -> Workspace {
        Workspace::default()
    }

    /// Runs the tokens of a batch through the model: stores their keys and values in the pages of
    /// `arena`, updates the recurrent states of their sequences, and gives the wanted rows. Of
    /// logits each rank has its part of the vocabulary. All ranks call it with the same batch.
    ///
    /// # Errors
    /// When the batch does not fit the model or the arena; nothing has been computed then. When the
    /// embedding cannot be read or a rank is lost; the pages and states that the batch writes are
    /// of no further use then.
    pub fn forward(
        &self,
        arena: &mut Arena,
        batch: &Batch,
        workspace: &mut Workspace,
    ) -> Result<Output, ModelError> {
        let ctx = &self.ctx;
        let (found, expected) = (arena.pages.page_bytes(), self.page_bytes());
        if found != expected {
            return Err(BatchError::Arena { found, expected }.into());
        }
        batch.check(&Bounds {
            vocab_size: self.config.vocab_size,
            has_head: self.config.has_head,
            context_length: self.config.context_length(),
            pages: arena.pages.pages(),
            ranks: ctx.positions.size(),
        })?;
        if self.config.hybrid.is_some() {
            batch.start_states(&mut arena.states)?;
        }
        let layout = self.start(batch, workspace)?;
        let pass = Pass {
            ctx,
            algorithm: self.options.attention,
            shape: &self.shape,
            delta: &self.delta,
            eps: self.config.rms_norm_eps,
        };
        let parts = if workspace.parts[1].plan.is_some() { 2 } else { 1 };
        let parts = &mut workspace.parts[..parts];
        if !batch.tokens.is_empty() {
            for (index, layer) in self.layers.iter().enumerate() {
                ctx.comm.ledger().set_layer(Some(index));
                layer.forward(&pass, arena, parts)?;
            }
            parts.iter_mut().try_for_each(|part| part.x.settle(ctx))?;
            ctx.comm.ledger().set_layer(None);
        }
        if self.config.hybrid.is_some() {
            batch.finish_states(&mut arena.states);
        }
        let output = self.output(batch, &layout, workspace)?;
        self.check_finite(batch, Wanted::Logits, &output.logits.values)?;
        self.check_finite(batch, Wanted::Hidden, &output.hidden)?;
        Ok(output)
    }

    /// Fills the parts of the workspace with the embeddings of the batch's tokens on this rank.
    fn start(&self, batch: &Batch, workspace: &mut Workspace) -> Result<TokenLayout, ModelError> {
        let ctx = &self.ctx;
        let (rank, ranks) = (ctx.positions.rank(), ctx.positions.size());
        let tokens = batch.tokens.len();
        let ranges = self.overlap().parts(&self.config, ranks, self.options.schedule(), tokens);
        let positions = batch.positions();
        let whole = PassPlan::new(ctx, &self.shape, &batch.token_spans(0..tokens));
        let layout = whole.layout().clone();
        let [first, second] = &mut workspace.parts;
        (first.plan, second.plan) = (Some(whole), None);
        if let [_, _] = &ranges[..] {
            let plans = ranges
                .iter()
                .map(|range| PassPlan::new(ctx, &self.shape, &batch.token_spans(range.clone())));
            let mut plans = plans.map(Some);
            first.plan = plans.next().flatten();
            second.plan = plans.next().flatten();
        }
        let overlap = ranges.len() > 1;
        for (part, range) in workspace.parts.iter_mut().zip(&ranges) {
            // Where ranks split positions there is one part, of which each has some tokens.
            let own: Vec<_> = layout.indices(rank).filter(|index| range.contains(index)).collect();
            (part.cos, part.sin) =
                self.rotary.rows(&own.iter().map(|index| positions[*index]).collect::<Vec<_>>());
            part.states = batch.state_spans(range.clone());
            let ids = own.iter().map(|index| batch.tokens[*index]);
            self.embedding.lookup(ids, part.x.start(overlap))?;
        }
        Ok(layout)
    }

    /// The wanted rows.
    fn output(
        &self,
        batch: &Batch,
        layout: &TokenLayout,
        workspace: &mut Workspace,
    ) -> Result<Output, CommError> {
        let (ctx, vocab) = (&self.ctx, self.vocab.clone());
        let Workspace { parts: [first, second], wanted, normed, scored, input } = workspace;
        if second.plan.is_some() {
            let tokens = second.x.tokens().view();
            first.x.tokens_mut().append(Axis(0), tokens).expect("parts are equally wide");
        }
        let (tokens, kinds): (Vec<_>, Vec<_>) = batch.wanted().unzip();
        wanted_rows(ctx, first.x.tokens(), layout, &tokens, wanted)?;
        rms_norm(ctx, wanted, &self.norm, self.config.rms_norm_eps, normed);
        let rows = |wanted| -> Vec<usize> {
            (0..kinds.len()).filter(|row| kinds[*row] == wanted).collect()
        };
        let hidden = rows(Wanted::Hidden);
        let hidden = normed.select(Axis(0), &hidden);
        let normed = if hidden.nrows() == 0 {
            &*normed
        } else {
            let rows = rows(Wanted::Logits);
            reshape(scored, rows.len(), normed.ncols());
            scored.assign(&normed.select(Axis(0), &rows));
            &*scored
        };
        let values = lm_head(ctx, &self.lm_head, normed, input);
        Ok(Output { logits: Logits { vocab, values }, hidden })
    }

    /// An answer that is chosen from NaN looks like an answer, so the pass fails instead.
    fn check_finite(
        &self,
        batch: &Batch,
        kind: Wanted,
        values: &Activations,
    ) -> Result<(), ModelError> {
        // NaN and infinity times 0 are NaN, which no sum loses.
        let finite = |row: &[f32]| row.iter().map(|value| value * 0.0).sum::<f32>() == 0.0;
        let rows = values.rows().into_iter();
        let found = rows.map(|row| row.to_slice().is_none_or(finite)).position(|finite| !finite);
        let Some(found) = found else { return Ok(()) };
        let mut wanted = batch.wanted().filter(|(_, wanted)| *wanted == kind);
        let (token, _) = wanted.nth(found).expect("each row is a wanted one");
        let span = batch.spans.iter().find(|span| span.tokens.contains(&token));
        let span = span.expect("each token belongs to a span");
        Err(ModelError::NotFinite {
            sequence: span.sequence,
            token: span.start + token - span.tokens.start,
            cause: match self.options.kv {
                ops::KvFormat::F32 => "a sum overflows f32, so the weights may be damaged",
                _ => {
                    "a key or value may not fit the format of the cache, whose numbers end at \
                     65504 (try f32), or a sum overflows f32"
                }
            },
        })
    }

    /// The logits of all the vocabulary, [rows, vocab_size], on every rank: rows · vocab_size · 4
    /// bytes of Allgather(v). For inspection; sampling exchanges candidates instead.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn gather_logits(&self, logits: &Logits) -> Result<Activations, ModelError> {
        let ranks = self.ctx.comm.size();
        let counts: Vec<_> =
            (0..ranks).map(|rank| split_range(self.config.vocab_size, ranks, rank).len()).collect();
        let mut whole = Activations::default((0, 0));
        gather_columns(&*self.ctx.comm, &logits.values, &counts, false, &mut whole)?;
        Ok(whole)
    }
}
