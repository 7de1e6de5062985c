//! Loading: which rows and columns of the checkpoint become this rank's share of the model.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use checkpoint::{Checkpoint, CheckpointError, Matrix, ModelSource};
use comm::{Communicator, CommunicatorExt, Phase, digest};
use ops::attention::AttentionShape;
use ops::mlp::{Expert, Mlp};
use ops::routing::Router;
use ops::schedule::{ExpertSplit, MlpSchedule};
use ops::{ActivationFormat, Context, Embedding, Linear};
use tensor::{GROUP, Rounding, WeightFormat, split_range};

use crate::config::Config;
use crate::error::ModelError;
use crate::fields::ConfigError;
use crate::heads::{BlockShape, BlockShare, HeadPlan};
use crate::layer::DecoderLayer;
use crate::model::Model;
use crate::names::{
    EMBEDDING, FINAL_NORM, LayerNames, MlpNames, TensorRole, TensorSpec, head, head_spec,
    open_weights, tensor_specs,
};
use crate::options::ModelOptions;
use crate::rotary::RotaryTable;

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
    let norm = checkpoint.vector(FINAL_NORM, config.hidden_size)?;
    let weights = if ctx.comm.size() > 1 { first_rows(&config, checkpoint)? } else { 0 };
    let model = Model {
        rotary: RotaryTable::new(&config.rope, config.head_dim),
        embedding: Embedding::new(embedding),
        shape: share.shape,
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
    queries: Range<usize>,
    keys: Range<usize>,
    shape: AttentionShape,
    rounding: Cell<Rounding>,
}

impl<'a> Share<'a> {
    fn new(
        ctx: &'a Context,
        config: &'a Config,
        checkpoint: &'a Checkpoint,
        options: &ModelOptions,
    ) -> Self {
        let plan = HeadPlan::new(config, ctx.heads.size(), ctx.heads.rank());
        Self {
            ctx,
            config,
            checkpoint,
            weights: options.weights,
            schedule: options.schedule(),
            experts: options.experts,
            shape: AttentionShape { groups: plan.groups, head_dim: config.head_dim },
            queries: plan.query_heads,
            keys: plan.kv_heads,
            rounding: Cell::default(),
        }
    }

    fn layer(&self, index: usize) -> Result<DecoderLayer, CheckpointError> {
        let Config { hidden_size, head_dim, .. } = *self.config;
        let names = LayerNames::new(index);
        let elements = |heads: &Range<usize>| heads.start * head_dim..heads.end * head_dim;
        let (queries, keys) = (elements(&self.queries), elements(&self.keys));
        let (query_size, kv_size) = (self.config.query_size(), self.config.key_value_size());
        let rows = |name, size, own: &Range<usize>| -> Result<Matrix, CheckpointError> {
            Ok(self.checkpoint.matrix(name, size, hidden_size)?.slice(own.clone(), 0..hidden_size))
        };
        let qkv = [
            rows(&names.q_proj, query_size, &queries)?,
            rows(&names.k_proj, kv_size, &keys)?,
            rows(&names.v_proj, kv_size, &keys)?,
        ];
        let o_proj = self
            .checkpoint
            .matrix(&names.o_proj, hidden_size, query_size)?
            .slice(0..hidden_size, queries);
        Ok(DecoderLayer {
            input_norm: self.checkpoint.vector(&names.input_layernorm, hidden_size)?,
            qkv_proj: self.linear(&qkv)?,
            q_norm: self.checkpoint.vector(&names.q_norm, head_dim)?,
            k_norm: self.checkpoint.vector(&names.k_norm, head_dim)?,
            o_proj: self.linear(&[o_proj])?,
            post_attention_norm: self
                .checkpoint
                .vector(&names.post_attention_layernorm, hidden_size)?,
            mlp: self.mlp(index, &names)?,
        })
    }

    fn mlp(&self, layer: usize, names: &LayerNames) -> Result<Mlp, CheckpointError> {
        let hidden_size = self.config.hidden_size;
        let moe = self.config.moe_of(layer);
        let expert_names = |expert| if moe.is_some() { names.expert(expert) } else { names.mlp() };
        let router = match moe {
            Some(moe) => {
                // The router decides which weights count at all: it keeps its stored precision.
                let weights =
                    self.checkpoint.matrix(&names.router(), moe.num_experts, hidden_size)?;
                Some(Router {
                    weights: Linear::load(self.ctx, weights.format(), &[weights])?,
                    experts_per_token: moe.num_experts_per_tok,
                    normalize: moe.norm_topk_prob,
                })
            }
            None => None,
        };
        let stored = || self.checkpoint.stored_format(&expert_names(0).down_proj);
        let format = self.weights.map_or_else(stored, Ok)?;
        let shape =
            BlockShape::new(self.config, layer, if format.is_quantized() { GROUP } else { 1 });
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
                .map(|index| expert(expert_names(index)))
                .collect::<Result<_, _>>()?,
            own: own.experts.clone(),
            router,
            intermediate: shares.iter().map(|share| share.inner.len()).collect(),
            hidden: shares.iter().map(|share| share.down.0.len()).collect(),
        })
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
