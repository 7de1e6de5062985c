//! Measuring what ranks can do: the model's own kernels on weights that mean nothing, and sums, with all ranks at work at once.

use std::sync::Arc;
use std::time::Instant;

use comm::{Collective, CommError, Communicator, CommunicatorExt, Link, ReduceOp, SoloComm};
use ops::{
    AttentionAlgorithm, AttentionScratch, AttentionShape, AttentionSpec, Context, Expert, Isa, KvFormat, LayerCache,
    Linear, Mlp, MlpSchedule, Placement, QkNorm, Rotary, SequenceSpan, TokenLayout, attention_headwise,
};
use tensor::{Activations, WeightFormat};

use crate::layer::{DecoderLayer, Part, Pass};
use crate::plan_machine::Rate;

/// Payloads of the sums that are timed, in f32: 256 B to 4 MiB.
const SIZES: [usize; 8] = [64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1 << 20];
/// Bytes of weights, and of caches, through which ranks that share a memory go in turn: more than a cache keeps for them.
const WEIGHT_BYTES: usize = 320 << 20;
const CACHE_BYTES: usize = 128 << 20;
/// Tokens of a pass of many: fewer where arithmetic is not what the machine is made for.
fn tokens(isa: Isa) -> usize {
    if isa.has_avx2() { 256 } else { 16 }
}
/// Tokens in caches: few, where starting costs most, and many.
const DEPTHS: [usize; 2] = [128, 2048];
/// Rounds of passes of one token, and of many, which take longer and vary less.
const ROUNDS: [usize; 2] = [11, 3];
/// The heads of Qwen3-0.6B.
const KV_HEADS: usize = 8;
const GROUP: usize = 2;
const HEAD_DIM: usize = 128;

/// Times Allreduces of several sizes and fits the link between the ranks of `comm`; `None` where there is one rank. All ranks call it
/// and get the same figures: the medians of the slowest rank.
///
/// # Errors
/// When a rank is lost.
pub fn measure_link(comm: &dyn Communicator) -> Result<Option<Link>, CommError> {
    if comm.size() < 2 {
        return Ok(None);
    }
    let mut measured = Vec::new();
    for len in SIZES {
        let mut buf = vec![0.0f32; len];
        let rounds = (1 << 21 >> len.ilog2()).clamp(7, 201);
        let seconds = median(comm, rounds, || comm.all_reduce(&mut buf, ReduceOp::Sum))?;
        measured.push((comm.wire().encoded_bytes(len) as f64, seconds));
    }
    Ok(Link::fit(comm.size(), &measured))
}

/// What the kernels of the slowest rank reach.
#[derive(Clone, Debug)]
pub struct Speeds {
    /// Products with weights, for each weight format.
    pub rates: Vec<Rate>,
    /// Attention, for each format of the cache.
    pub attention: Vec<Rate>,
}

/// Runs decoder layers on all ranks at once, a few seconds in all. The ranks of `here` share a machine, over the link `inside` of
/// [`measure_link`]: they share the layers too, since what they wait for each other counts. All ranks call it and get the same figures.
///
/// # Errors
/// When a rank is lost.
pub fn measure_speeds(
    comm: &dyn Communicator,
    here: Arc<dyn Communicator>,
    inside: Option<Link>,
    isa: Isa,
    threads: usize,
    placement: Placement,
) -> Result<Speeds, CommError> {
    let formats = [WeightFormat::Bf16, WeightFormat::F32, WeightFormat::F16, WeightFormat::Q8, WeightFormat::Q4];
    let (ctx, ranks) = (Context::new(isa, Arc::new(SoloComm::new()), 1, threads, placement)?, here.size());
    let mut lab = Lab { comm, ctx, ranks };
    let starts = formats.map(|format| lab.start(format));
    let attention = [KvFormat::F16, KvFormat::F32, KvFormat::Q8].map(|format| lab.attention(format));
    let attention = attention.into_iter().collect::<Result<Vec<_>, _>>()?;
    // The same team goes on: this thread is bound to its core by now, and the threads of another team would be bound to no other.
    lab.ctx.heads = here;
    let products = |(format, start): (_, Result<_, _>)| lab.products(format, start?, inside, &attention[0]);
    let rates = formats.into_iter().zip(starts).map(products).collect::<Result<_, _>>()?;
    Ok(Speeds { rates, attention })
}

/// The median time of `rounds` rounds after one that does not count, that of the slowest rank.
fn median(
    comm: &dyn Communicator,
    rounds: usize,
    mut round: impl FnMut() -> Result<(), CommError>,
) -> Result<f64, CommError> {
    let mut times = Vec::with_capacity(rounds);
    round()?;
    comm.barrier()?;
    for _ in 0..rounds {
        let start = Instant::now();
        round()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let mut all = vec![0.0f64; comm.size()];
    comm.all_gather(&[times[rounds / 2]], &mut all)?;
    Ok(all.into_iter().fold(0.0, f64::max))
}

struct Lab<'a> {
    comm: &'a dyn Communicator,
    /// This rank alone, or with those of its machine as `heads`.
    ctx: Context,
    /// Ranks of the machine.
    ranks: usize,
}

/// A rank's share of a dense layer.
#[derive(Clone, Copy)]
struct Sizes {
    hidden: usize,
    columns: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Sizes {
    fn shape(self) -> AttentionShape {
        let groups = (0..self.kv_heads).map(|head| head * GROUP..(head + 1) * GROUP).collect();
        AttentionShape { groups, head_dim: self.head_dim }
    }

    /// Of all matrices.
    fn elements(self) -> usize {
        let shape = self.shape();
        self.hidden * (shape.qkv_width() + shape.query_width() + 3 * self.columns)
    }

    /// Operations of attention of `tokens` tokens after `past` others.
    fn attention_flops(self, tokens: usize, past: usize) -> f64 {
        let keys = tokens * past + tokens * (tokens + 1) / 2;
        (4 * keys * self.shape().query_width()) as f64
    }

    fn layer(self, ctx: &Context, format: WeightFormat) -> DecoderLayer {
        let Self { hidden, columns, head_dim, .. } = self;
        let linear = |rows, cols| Linear::sample(ctx, format, rows, cols);
        DecoderLayer {
            input_norm: vec![1.0; hidden],
            qkv_proj: linear(self.shape().qkv_width(), hidden),
            q_norm: vec![1.0; head_dim],
            k_norm: vec![1.0; head_dim],
            o_proj: linear(hidden, self.shape().query_width()),
            post_attention_norm: vec![1.0; hidden],
            mlp: Mlp {
                schedule: MlpSchedule::Fused,
                experts: vec![Expert {
                    gate: linear(columns, hidden),
                    up: linear(columns, hidden),
                    down: linear(hidden, columns),
                }],
                own: 0..1,
                router: None,
                intermediate: vec![columns; ctx.heads.size()],
                hidden: Vec::new(),
            },
        }
    }
}

/// A layer of next to nothing.
const SMALL: Sizes = Sizes { hidden: 64, columns: 64, kv_heads: 1, head_dim: 32 };
/// A layer of Qwen3-0.6B.
const USUAL: Sizes = Sizes { hidden: 1024, columns: 3072, kv_heads: KV_HEADS, head_dim: HEAD_DIM };
/// Half of it: what several ranks have each.
const HALF: Sizes = Sizes { hidden: 1024, columns: 1536, kv_heads: KV_HEADS / 2, head_dim: HEAD_DIM };

impl Lab<'_> {
    /// Seconds of a pass of `tokens` tokens through `layers` with empty caches, sums included.
    fn pass(&self, sizes: Sizes, layers: &[DecoderLayer], tokens: usize, rounds: usize) -> Result<f64, CommError> {
        let (shape, layout) = (sizes.shape(), TokenLayout::balanced(tokens, 1));
        let angles = Activations::zeros((tokens, sizes.head_dim / 2));
        let pass = Pass {
            ctx: &self.ctx,
            algorithm: AttentionAlgorithm::Streaming,
            shape: &shape,
            span: SequenceSpan { layout: &layout, start: 0, held: &[] },
            eps: 1e-6,
        };
        let mut part = Part::default();
        (part.cos, part.sin) = (angles.clone(), angles);
        *part.x.start(false) = Activations::ones((tokens, sizes.hidden));
        let mut cache = LayerCache::new(KvFormat::F16, sizes.kv_heads, sizes.head_dim);
        median(self.comm, rounds, || {
            for layer in layers {
                cache.truncate(0);
                layer.forward(&pass, &mut cache, std::slice::from_mut(&mut part))?;
            }
            Ok(())
        })
    }

    /// Seconds that a layer takes however little there is of it.
    fn start(&self, format: WeightFormat) -> Result<f64, CommError> {
        let layers: Vec<_> = (0..32).map(|_| SMALL.layer(&self.ctx, format)).collect();
        Ok(self.pass(SMALL, &layers, 1, ROUNDS[0])? / layers.len() as f64)
    }

    fn products(
        &self,
        format: WeightFormat,
        start: f64,
        inside: Option<Link>,
        attention: &Rate,
    ) -> Result<Rate, CommError> {
        let tokens = tokens(self.ctx.isa);
        let sizes = if self.ranks > 1 { HALF } else { USUAL };
        let first = sizes.layer(&self.ctx, format);
        let bytes = first.bytes();
        let count = (WEIGHT_BYTES / self.ranks).div_ceil(bytes);
        let mut layers = vec![first];
        layers.resize_with(count, || sizes.layer(&self.ctx, format));
        // Two sums a layer are the link's.
        let sums = |tokens: usize| {
            let bytes = self.ctx.heads.wire().encoded_bytes(tokens * sizes.hidden) as f64;
            inside.map_or(0.0, |link| 2.0 * link.seconds(Collective::Allreduce, self.ranks, bytes))
        };
        let one = self.pass(sizes, &layers, 1, ROUNDS[0])? - count as f64 * (start + sums(1));
        let scores = sizes.attention_flops(tokens, 0) / (attention.gflops * 1e9);
        let many = self.pass(sizes, &layers[..1], tokens, ROUNDS[1])? - start - sums(tokens) - scores;
        Ok(Rate {
            format: format.name().to_owned(),
            start_us: start * 1e6,
            read_gb_s: (count * bytes) as f64 / one * 1e-9,
            gflops: (2 * sizes.elements() * tokens) as f64 / many * 1e-9,
        })
    }

    /// Seconds of attention of `tokens` tokens after `depth` others, for a layer, and the bytes of its cache.
    fn attend(&self, format: KvFormat, depth: usize, tokens: usize, rounds: usize) -> Result<(f64, f64), CommError> {
        let shape = USUAL.shape();
        let past = Activations::ones((depth, shape.qkv_width()));
        let cache = || {
            let mut cache = LayerCache::new(format, KV_HEADS, HEAD_DIM);
            cache.reserve(depth + tokens);
            cache.push(&self.ctx, past.as_slice().expect("rows are contiguous"), &shape, 0..depth);
            cache
        };
        let mut caches = vec![cache()];
        let bytes = caches[0].bytes();
        // Arithmetic does not ask where its operands come from.
        let count = if tokens > 1 { 1 } else { (CACHE_BYTES / self.ranks).div_ceil(bytes) };
        caches.resize_with(count, cache);
        let (ones, angles) = (vec![1.0; HEAD_DIM], Activations::zeros((tokens, HEAD_DIM / 2)));
        let spec = AttentionSpec {
            algorithm: AttentionAlgorithm::Streaming,
            shape: &shape,
            norm: QkNorm { q: &ones, k: &ones, eps: 1e-6 },
            rotary: Rotary { cos: &angles, sin: &angles },
        };
        let mut qkv = Activations::ones((tokens, shape.qkv_width()));
        let (mut scratch, mut out) = (AttentionScratch::default(), Activations::default((0, 0)));
        let seconds = median(self.comm, rounds, || {
            for cache in &mut caches {
                cache.truncate(depth);
                attention_headwise(&self.ctx, &spec, &mut qkv, cache, &mut scratch, &mut out);
            }
            Ok(())
        })?;
        Ok((seconds / count as f64, bytes as f64))
    }

    fn attention(&self, format: KvFormat) -> Result<Rate, CommError> {
        let ([shallow, deep], tokens) = (DEPTHS, tokens(self.ctx.isa));
        let (short, few) = self.attend(format, shallow, 1, ROUNDS[0])?;
        let (long, all) = self.attend(format, deep, 1, ROUNDS[0])?;
        let (many, _) = self.attend(format, deep, tokens, ROUNDS[1])?;
        // The line through both, unless noise has it that starting takes less than nothing.
        let rate = ((all - few) / (long - short).max(1e-9)).min(all / long * 2.0);
        Ok(Rate {
            format: format.to_string(),
            start_us: (short - few / rate).max(0.0) / KV_HEADS as f64 * 1e6,
            read_gb_s: rate * 1e-9,
            gflops: USUAL.attention_flops(tokens, deep) / many * 1e-9,
        })
    }
}
