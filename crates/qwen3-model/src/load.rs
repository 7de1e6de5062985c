//! Loading: which rows and columns of the checkpoint become this rank's share of the model.

use std::cell::Cell;
use std::iter;
use std::ops::Range;
use std::slice::from_ref;
use std::sync::Arc;

use checkpoint::{Checkpoint, CheckpointError, Matrix, ModelSource};
use comm::{Communicator, CommunicatorExt, Phase, digest};
use ops::attention::AttentionShape;
use ops::delta_rule::{DeltaShape, DeltaWeights};
use ops::mlp::{Expert, Mlp, SharedExpert};
use ops::routing::Router;
use ops::schedule::{ExpertSplit, MlpSchedule};
use ops::{ActivationFormat, Context, Embedding, Linear};
use tensor::{Rounding, WeightFormat, split_range};

use crate::config::Config;
use crate::error::ModelError;
use crate::fields::ConfigError;
use crate::formats::granularity;
use crate::heads::{BlockShape, BlockShare, DeltaPlan, HeadPlan};
use crate::hybrid_config::HybridConfig;
use crate::layer::{DecoderLayer, Mixer};
use crate::model::Model;
use crate::names::{
    DeltaNames, EMBEDDING, FINAL_NORM, LayerNames, MlpNames, TensorRole, TensorSpec, head,
    head_spec, open_weights, tensor_specs,
};
use crate::options::ModelOptions;
use crate::rotary::RotaryTable;
use crate::shape::{attention_shape, delta_shape};

/// By so many times the deadline of collectives is longer while the others load: one may have the
/// files in memory, and another a slow disk.
const LOADING: u32 = 15;

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Layers loaded.
    pub layers: usize,
    /// Layers in all.
    pub of: usize,
}

impl Model {
    /// Loads this rank's share of a model. All ranks call it; if one
    /// fails, all fail, and each says why.
    ///
    /// # Errors
    /// When the config or the weights cannot be read, contradict each other or those of another
    /// rank, or a rank is lost.
    pub fn load(
        source: &ModelSource,
        comm: Arc<dyn Communicator>,
        options: &ModelOptions,
        progress: &dyn Fn(LoadProgress),
    ) -> Result<Self, ModelError> {
        comm.ledger().set_phase(Phase::Load);
        let (tp, sp) = options.strategy.grid(comm.size());
        if tp.checked_mul(sp) != Some(comm.size()) {
            return Err(ModelError::Grid { tp, sp, ranks: comm.size() });
        }
        let schedule = options.schedule();
        if options.experts == ExpertSplit::Ranks && schedule != MlpSchedule::Fused {
            return Err(ModelError::ExpertSchedule { schedule });
        }
        let mut ctx =
            Context::new(options.isa, comm.clone(), tp, options.threads, options.placement)?;
        ctx.activations = options.activations;
        let loaded = load_share(source, ctx, options, progress);
        let own = match &loaded {
            Err(_) => [1, 0, 0, 0, 0],
            Ok((model, weights)) => {
                // Experts are chosen on each rank, by sums that other kernels round otherwise.
                // AVX-VNNI and AVX-512 round as AVX2 does, unless a router is quantized, which this
                // project does to none.
                let chooses = model.config.moe.is_some() && schedule != MlpSchedule::Local;
                let isa = options.isa.without_avx512().to_string();
                let isa = if chooses { isa.trim_end_matches("-vnni") } else { "" };
                let of = |text: &str| digest(text.bytes().map(u64::from));
                let dot = u64::from(options.isa.has_bf16_dot());
                let activations = 2 * options.activations as u64 + dot;
                [0, of(&format!("{:?}", model.config)), of(isa), *weights, activations]
            }
        };
        let mut all = vec![0u64; own.len() * comm.size()];
        let timeout = comm.timeout();
        comm.set_timeout(timeout.saturating_mul(LOADING));
        let gathered = comm.all_gather(&own, &mut all);
        comm.set_timeout(timeout);
        gathered?;
        comm.ledger().set_phase(Phase::Other);
        let all = all.as_chunks::<5>().0;
        let first = |differs: &dyn Fn(&[u64; 5]) -> bool| all.iter().position(differs);
        let (model, _) = match (loaded, first(&|[failed, ..]| *failed != 0)) {
            (Ok(_), Some(rank)) => return Err(ModelError::PeerLoad { rank }),
            (loaded, _) => loaded?,
        };
        let [_, config, isa, weights, activations] = all[0];
        if let Some(rank) = first(&|[_, other, ..]| *other != config) {
            return Err(ModelError::OtherConfig { rank });
        }
        if let Some(rank) = first(&|[.., other, _]| *other != weights) {
            return Err(ModelError::OtherWeights { rank });
        }
        if let Some(rank) = first(&|[.., other, _, _]| *other != isa) {
            return Err(ModelError::OtherIsa { rank });
        }
        if let Some(rank) = first(&|[.., other]| other / 2 != activations / 2) {
            return Err(ModelError::OtherActivations { rank });
        }
        let bf16 = options.activations == ActivationFormat::Bf16;
        if let Some(rank) = first(&|[.., other]| bf16 && other % 2 == 0) {
            return Err(ModelError::NoBf16Dot { rank });
        }
        Ok(model)
    }
}

/// A digest of the first rows of the head and of each layer's matrices (of the first expert), as
/// numbers: what tells one fine-tune or revision of a model from another.
fn first_rows(config: &Config, checkpoint: &Checkpoint) -> Result<u64, CheckpointError> {
    let head = TensorSpec { name: head(config, checkpoint).to_owned(), ..head_spec(config) };
    let wanted = |spec: &TensorSpec| {
        spec.role == TensorRole::Matrix
            && spec.name.starts_with("model.layers.")
            && spec.name.split_once(".experts.").is_none_or(|(_, expert)| expert.starts_with("0."))
    };
    let digests = std::iter::once(head).chain(tensor_specs(config).filter(wanted)).map(|spec| {
        let mut row = vec![0.0; spec.shape[1]];
        checkpoint.matrix(&spec.name, spec.shape[0], spec.shape[1])?.read_row(0, &mut row)?;
        Ok(digest(row.iter().map(|x| u64::from(x.to_bits()))))
    });
    Ok(digest(digests.collect::<Result<Vec<_>, CheckpointError>>()?))
}

fn load_share(
    source: &ModelSource,
    ctx: Context,
    options: &ModelOptions,
    progress: &dyn Fn(LoadProgress),
) -> Result<(Model, u64), ModelError> {
    let config = Config::read(source)?;
    if options.experts == ExpertSplit::Ranks && config.moe.is_none() {
        return Err(ModelError::NoExperts {
            file: source.config().map_err(ConfigError::from)?.file.clone(),
        });
    }
    if config.hybrid.is_some() && ctx.positions.size() > 1 {
        return Err(ModelError::HybridPositions {
            file: source.config().map_err(ConfigError::from)?.file.clone(),
            ranks: ctx.positions.size(),
        });
    }
    let checkpoint = open_weights::<ModelError>(source, &config)?;
    let embedding = checkpoint.matrix(EMBEDDING, config.vocab_size, config.hidden_size)?;
    let share = Share::new(&ctx, &config, checkpoint, options);

    let mut layers = Vec::with_capacity(config.num_hidden_layers);
    for index in 0..config.num_hidden_layers {
        layers.push(share.layer(index)?);
        progress(LoadProgress { layers: index + 1, of: config.num_hidden_layers });
    }
    let head =
        checkpoint.matrix(head(&config, checkpoint), config.vocab_size, config.hidden_size)?;
    let vocab = split_range(config.head_rows(), ctx.comm.size(), ctx.comm.rank());
    let lm_head = share.linear(&[head.slice(vocab.clone(), 0..config.hidden_size)])?;
    let norm = share.norm(FINAL_NORM, config.hidden_size)?;
    let weights = if ctx.comm.size() > 1 { first_rows(&config, checkpoint)? } else { 0 };
    let model = Model {
        rotary: RotaryTable::new(&config.rope, config.head_dim),
        embedding: Embedding::new(embedding),
        shape: share.shape,
        delta: share.delta,
        weight_format: lm_head.format(),
        rounding: share.rounding.get(),
        options: *options,
        config,
        ctx,
        layers,
        norm,
        lm_head,
        vocab,
    };
    Ok((model, weights))
}

/// What this rank owns of each layer.
struct Share<'a> {
    ctx: &'a Context,
    config: &'a Config,
    checkpoint: &'a Checkpoint,
    weights: Option<WeightFormat>,
    schedule: MlpSchedule,
    experts: ExpertSplit,
    /// Query heads and the KV heads that they need.
    heads: HeadPlan,
    shape: AttentionShape,
    delta: DeltaShape,
    rounding: Cell<Rounding>,
}

impl<'a> Share<'a> {
    fn new(
        ctx: &'a Context,
        config: &'a Config,
        checkpoint: &'a Checkpoint,
        options: &ModelOptions,
    ) -> Self {
        let (ranks, rank) = (ctx.heads.size(), ctx.heads.rank());
        Self {
            ctx,
            config,
            checkpoint,
            weights: options.weights,
            schedule: options.schedule(),
            experts: options.experts,
            heads: HeadPlan::new(config, ranks, rank),
            shape: attention_shape(config, ranks, rank),
            delta: config
                .hybrid
                .as_ref()
                .map_or(DeltaShape::default(), |hybrid| delta_shape(hybrid, ranks, rank)),
            rounding: Cell::default(),
        }
    }

    fn layer(&self, index: usize) -> Result<DecoderLayer, CheckpointError> {
        let hidden = self.config.hidden_size;
        let names = LayerNames::new(index);
        let attends = self.config.has_attention(index);
        let before = |layer: &usize| self.config.has_attention(*layer) == attends;
        let place = (0..index).filter(before).count();
        let MixerWeights { in_proj, gates, mixer, out_proj } = match self.config.delta_of(index) {
            Some(hybrid) => self.delta_rule(hybrid, place, &names.delta(hybrid))?,
            None => self.attention(place, &names)?,
        };
        Ok(DecoderLayer {
            input_norm: self.norm(&names.input_layernorm, hidden)?,
            in_proj,
            gates,
            mixer,
            out_proj,
            post_attention_norm: self.norm(&names.post_attention_layernorm, hidden)?,
            mlp: self.mlp(index, &names)?,
        })
    }

    /// The attention of a layer, the `index`th that has one.
    ///
    /// The kernels rotate a whole head, element i together with element i + head_dim / 2. Where
    /// only a part of a head rotates, the rows of queries and keys are put in an order in which its
    /// pairs lie like this; scores do not change, as both have the same order.
    fn attention(&self, index: usize, names: &LayerNames) -> Result<MixerWeights, CheckpointError> {
        let Config { hidden_size, head_dim, .. } = *self.config;
        let (queries, keys) = (&self.heads.query_heads, &self.heads.kv_heads);
        let order = rotary_order(head_dim, self.config.rope.rotary_dim(head_dim));
        let gated = self.config.hybrid.is_some();
        let query_stride = if gated { 2 * head_dim } else { head_dim };
        let kv_size = self.config.key_value_size();

        let mut qkv = Vec::new();
        let q_proj =
            self.checkpoint.matrix(&names.q_proj, self.config.query_rows(), hidden_size)?;
        qkv.extend(head_rows(&q_proj, queries, query_stride, &order));
        let k_proj = self.checkpoint.matrix(&names.k_proj, kv_size, hidden_size)?;
        qkv.extend(head_rows(&k_proj, keys, head_dim, &order));
        let v_proj = self.checkpoint.matrix(&names.v_proj, kv_size, hidden_size)?;
        qkv.extend(head_rows(&v_proj, keys, head_dim, from_ref(&(0..head_dim))));
        let gates =
            || head_rows(&q_proj, queries, query_stride, from_ref(&(head_dim..2 * head_dim)));
        let o_proj =
            self.checkpoint.matrix(&names.o_proj, hidden_size, self.config.query_size())?;
        let own_columns = queries.start * head_dim..queries.end * head_dim;
        let head_norm = |name| -> Result<Vec<f32>, CheckpointError> {
            let weights = self.norm(name, head_dim)?;
            Ok(order.iter().flat_map(|part| weights[part.clone()].to_vec()).collect())
        };
        Ok(MixerWeights {
            in_proj: self.linear(&qkv)?,
            gates: if gated { Some(self.linear(&gates())?) } else { None },
            mixer: Mixer::Attention {
                index,
                q_norm: head_norm(&names.q_norm)?,
                k_norm: head_norm(&names.k_norm)?,
            },
            out_proj: self.linear(&[o_proj.slice(0..hidden_size, own_columns)])?,
        })
    }

    /// The gated delta rule of a layer, the `index`th that has one.
    fn delta_rule(
        &self,
        hybrid: &HybridConfig,
        index: usize,
        names: &DeltaNames,
    ) -> Result<MixerWeights, CheckpointError> {
        let hidden = self.config.hidden_size;
        let plan = DeltaPlan::new(hybrid, self.ctx.heads.size(), self.ctx.heads.rank());
        let (keys, values) = (&plan.keys, &plan.values);
        let (key_dim, value_dim) = (hybrid.linear_key_head_dim, hybrid.linear_value_head_dim);
        let open = |(name, rows): &(String, usize)| self.checkpoint.matrix(name, *rows, hidden);
        let inputs = names.inputs.iter().map(open).collect::<Result<Vec<_>, _>>()?;

        // Rows of heads that lie one after another from row `first` on.
        let rows = |matrix: &Matrix, first: usize, heads: &[usize], dim: usize| {
            some_rows(matrix, heads.iter().map(|head| first + head * dim..first + (head + 1) * dim))
        };
        let own: Vec<_> = values.clone().collect();
        let group = hybrid.group_size();
        let large = match &inputs[..] {
            // Each key head has its query and key, then the values and the output gates of its
            // value heads.
            [qkvz, _] => {
                let stride = 2 * key_dim + 2 * group * value_dim;
                let key_rows = |first| {
                    keys.iter().map(move |key| key * stride + first..key * stride + first + key_dim)
                };
                let value_rows = |first| {
                    values.clone().map(move |head| {
                        let start = head / group * stride + first + head % group * value_dim;
                        start..start + value_dim
                    })
                };
                let queries = key_rows(0).chain(key_rows(key_dim));
                let gates = value_rows(2 * key_dim + group * value_dim);
                some_rows(qkvz, queries.chain(value_rows(2 * key_dim)).chain(gates))
            }
            [qkv, z, ..] => {
                let mut stack = rows(qkv, 0, keys, key_dim);
                stack.extend(rows(qkv, hybrid.key_size(), keys, key_dim));
                stack.extend(rows(qkv, 2 * hybrid.key_size(), &own, value_dim));
                stack.extend(rows(z, 0, &own, value_dim));
                stack
            }
            _ => unreachable!("every layout has two projections at least"),
        };
        let small = match &inputs[..] {
            // Each key head has the strengths of its value heads, then their decays.
            [_, ba] | [_, _, ba] => {
                let row = |first| {
                    values.clone().map(move |head| {
                        let row = head / group * 2 * group + first + head % group;
                        row..row + 1
                    })
                };
                some_rows(ba, row(0).chain(row(group)))
            }
            [.., b, a] => [rows(b, 0, &own, 1), rows(a, 0, &own, 1)].concat(),
            _ => unreachable!("every layout has two projections at least"),
        };
        let out_proj = self.checkpoint.matrix(&names.out_proj, hidden, hybrid.value_size())?;
        let own_columns = values.start * value_dim..values.end * value_dim;
        let own_heads = |name: &str| -> Result<Vec<f32>, CheckpointError> {
            let all = self.checkpoint.vector(name, hybrid.linear_num_value_heads)?;
            Ok(all[values.clone()].to_vec())
        };
        let rate = |stored: f32| if hybrid.layout.is_gguf() { -stored } else { stored.exp() };
        let weights = DeltaWeights {
            conv: self.convolution(hybrid, &plan, &names.conv1d)?,
            rate: own_heads(&names.a_log)?.into_iter().map(rate).collect(),
            dt_bias: own_heads(&names.dt_bias)?,
            norm: self.checkpoint.vector(&names.norm, value_dim)?,
            eps: self.config.rms_norm_eps,
        };
        Ok(MixerWeights {
            in_proj: self.linear(&large)?,
            gates: Some(self.stored_precision(&small)?),
            mixer: Mixer::DeltaRule { index, weights },
            out_proj: self.linear(&[out_proj.slice(0..hidden, own_columns)])?,
        })
    }

    /// The weights of the convolution in the order of [`DeltaWeights::conv`].
    fn convolution(
        &self,
        hybrid: &HybridConfig,
        plan: &DeltaPlan,
        name: &str,
    ) -> Result<Vec<f32>, CheckpointError> {
        let taps = hybrid.linear_conv_kernel_dim;
        let all = self.checkpoint.values(name, &[hybrid.conv_channels(), 1, taps])?;
        let mut own = Vec::new();
        let values: Vec<_> = plan.values.clone().collect();
        for (first, heads, dim) in [
            (0, &plan.keys, hybrid.linear_key_head_dim),
            (hybrid.key_size(), &plan.keys, hybrid.linear_key_head_dim),
            (2 * hybrid.key_size(), &values, hybrid.linear_value_head_dim),
        ] {
            for head in heads {
                let channels = first + head * dim..first + (head + 1) * dim;
                for tap in 0..taps {
                    own.extend(channels.clone().map(|channel| all[channel * taps + tap]));
                }
            }
        }
        Ok(own)
    }

    /// The weight of a norm of the residual stream, or of queries and keys. Folders of hybrid
    /// models store it less one.
    fn norm(&self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let mut weights = self.checkpoint.vector(name, len)?;
        if self.config.hybrid.as_ref().is_some_and(|hybrid| !hybrid.layout.is_gguf()) {
            weights.iter_mut().for_each(|weight| *weight += 1.0);
        }
        Ok(weights)
    }

    fn mlp(&self, layer: usize, names: &LayerNames) -> Result<Mlp, CheckpointError> {
        let hidden_size = self.config.hidden_size;
        let Some(moe) = self.config.moe_of(layer) else {
            let dense = |granularity| BlockShape::new(self.config, layer, granularity);
            return self.block(dense, |_| names.mlp());
        };
        // The router decides which weights count at all: it keeps its stored precision.
        let router = self.checkpoint.matrix(&names.router(), moe.num_experts, hidden_size)?;
        let shared = match moe.shared_expert_intermediate_size {
            None => None,
            Some(_) => {
                let shape = |granularity| {
                    let shape = BlockShape::shared(self.config, layer, granularity);
                    shape.expect("a layer with a shared expert")
                };
                let gate = self.checkpoint.matrix(&names.shared_expert_gate(), 1, hidden_size)?;
                Some(Box::new(SharedExpert {
                    block: self.block(shape, |_| names.shared_expert())?,
                    gate: self.stored_precision(&[gate])?,
                }))
            }
        };
        let block = self.block(
            |granularity| BlockShape::new(self.config, layer, granularity),
            |expert| names.expert(expert),
        )?;
        Ok(Mlp {
            router: Some(Router {
                weights: self.stored_precision(&[router])?,
                experts_per_token: moe.num_experts_per_tok,
                normalize: moe.norm_topk_prob,
            }),
            shared,
            ..block
        })
    }

    /// The experts of a block whose shape depends on the columns that are never cut apart.
    fn block(
        &self,
        shape: impl Fn(usize) -> BlockShape,
        names: impl Fn(usize) -> MlpNames,
    ) -> Result<Mlp, CheckpointError> {
        let hidden_size = self.config.hidden_size;
        let stored = || self.checkpoint.stored_format(&names(0).down_proj);
        let shape = shape(granularity(self.weights.map_or_else(stored, Ok)?));
        let ranks = self.ctx.mlp_ranks().size();
        let share = |rank| BlockShare::new(shape, self.schedule, self.experts, ranks, rank);
        let shares: Vec<_> = (0..ranks).map(share).collect();
        let own = &shares[self.ctx.mlp_ranks().rank()];
        let expert = |names: MlpNames| -> Result<Expert, CheckpointError> {
            let own_rows = |name| -> Result<Matrix, CheckpointError> {
                let whole = self.checkpoint.matrix(name, shape.columns, hidden_size)?;
                Ok(whole.slice(own.inner.clone(), 0..hidden_size))
            };
            let (gate, up) = (own_rows(&names.gate_proj)?, own_rows(&names.up_proj)?);
            // One kernel takes both.
            let pair = self.weights.unwrap_or(WeightFormat::common([gate.format(), up.format()]));
            let down = self.checkpoint.matrix(&names.down_proj, hidden_size, shape.columns)?;
            Ok(Expert {
                gate: self.pack(pair, &[gate])?,
                up: self.pack(pair, &[up])?,
                down: self.linear(&[down.slice(own.down.0.clone(), own.down.1.clone())])?,
            })
        };
        Ok(Mlp {
            schedule: self.schedule,
            experts: own
                .experts
                .clone()
                .map(|index| expert(names(index)))
                .collect::<Result<_, _>>()?,
            own: own.experts.clone(),
            router: None,
            intermediate: shares.iter().map(|share| share.inner.len()).collect(),
            hidden: shares.iter().map(|share| share.down.0.len()).collect(),
            shared: None,
        })
    }

    /// Packs stacked small matrices in their stored precision.
    fn stored_precision(&self, stack: &[Matrix]) -> Result<Linear, CheckpointError> {
        Linear::load(self.ctx, WeightFormat::common(stack.iter().map(Matrix::format)), stack)
    }

    /// Packs stacked matrices in the chosen format, or one that keeps the stored weights.
    fn linear(&self, stack: &[Matrix]) -> Result<Linear, CheckpointError> {
        let stored = || WeightFormat::common(stack.iter().map(Matrix::format));
        self.pack(self.weights.unwrap_or_else(stored), stack)
    }

    fn pack(&self, format: WeightFormat, stack: &[Matrix]) -> Result<Linear, CheckpointError> {
        let linear = Linear::load(self.ctx, format, stack)?;
        let mut rounding = self.rounding.get();
        rounding += linear.rounding();
        self.rounding.set(rounding);
        Ok(linear)
    }
}

/// The matrices of a layer's mixer, as [`DecoderLayer`] has them.
struct MixerWeights {
    in_proj: Linear,
    gates: Option<Linear>,
    mixer: Mixer,
    out_proj: Linear,
}

/// The order of the elements of a head in which each of the first `rotary / 2` elements lies half a
/// head before its partner, as parts of the stored order. Stored, the partners are `rotary / 2`
/// apart.
fn rotary_order(head_dim: usize, rotary: usize) -> Vec<Range<usize>> {
    let (half, pairs) = (head_dim / 2, rotary / 2);
    let rest = rotary + half - pairs;
    let parts = [0..pairs, rotary..rest, pairs..rotary, rest..head_dim];
    if rotary == head_dim { iter::once(0..head_dim).collect() } else { parts.to_vec() }
}

/// Some rows of each of some heads: head i begins at row `i * stride`, and `parts` are ranges of
/// rows within a head.
fn head_rows(
    matrix: &Matrix,
    heads: &Range<usize>,
    stride: usize,
    parts: &[Range<usize>],
) -> Vec<Matrix> {
    some_rows(
        matrix,
        heads.clone().flat_map(|head| {
            parts.iter().map(move |part| head * stride + part.start..head * stride + part.end)
        }),
    )
}

/// Slices of some rows, adjacent ones as one slice. Without any there is a slice without rows,
/// which still has columns.
fn some_rows(matrix: &Matrix, rows: impl Iterator<Item = Range<usize>>) -> Vec<Matrix> {
    let mut joined: Vec<Range<usize>> = Vec::new();
    for rows in rows {
        match joined.last_mut() {
            Some(last) if last.end == rows.start => last.end = rows.end,
            _ => joined.push(rows),
        }
    }
    if joined.is_empty() {
        joined.push(0..0);
    }
    joined.into_iter().map(|rows| matrix.slice(rows, 0..matrix.cols())).collect()
}
