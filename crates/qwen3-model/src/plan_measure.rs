//! Measuring how fast ranks work: the model's own kernels on weights that mean nothing, with all
//! ranks at work at once.

use std::sync::Arc;

use comm::{Collective, CommError, Communicator, Link, SoloComm};
use ops::{
    AttentionAlgorithm, AttentionScratch, AttentionShape, AttentionSpec, Context, Expert, Isa,
    KvFormat, LayerCache, Linear, Mlp, MlpSchedule, MlpScratch, Placement, QkNorm, Residual,
    Rotary, SequenceSpan, TokenLayout, attention_headwise, mlp,
};
use tensor::{Activations, WeightFormat};

use crate::layer::{DecoderLayer, Part, Pass};
use crate::plan_link::{Groups, measure_hidden, median};
use crate::plan_machine::{AttentionRate, FEW, HiddenSums, Rate};

/// How thoroughly speeds are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// A few seconds: through more weights, keys and values than caches hold.
    Thorough,
    /// An eighth of the memory and a third of the rounds. Where a cache holds most of that, memory
    /// looks faster than it is.
    Quick,
}

impl Effort {
    /// Bytes of weights, and of keys and values, through which ranks that share a memory go in
    /// turn. (Of 128 MiB of keys and values the last cache of a Xeon with 480 MiB kept so much that
    /// attention read them at 49 GB/s, in a model at 34.)
    fn bytes(self) -> [usize; 2] {
        let all = [320 << 20, 448 << 20];
        if self == Self::Quick { all.map(|bytes| bytes / 8) } else { all }
    }

    /// Rounds of passes of one token, and of many, which take longer and vary less.
    fn rounds(self) -> [usize; 2] {
        if self == Self::Quick { [3, 1] } else { [11, 3] }
    }
}

/// Tokens of a pass of many: fewer where arithmetic is not what the machine is made for.
fn tokens(isa: Isa) -> usize {
    if isa.has_avx2() { 256 } else { 16 }
}
/// Tokens in caches: few, where starting costs most, a chunk's past, and many, with the one that
/// joins them a power of two. Of few one begins a span, which has it filled with zeros: these few
/// keys are read from a cache of the processor here, in a model from memory, and that makes up for
/// it. (A layer of 0.6B on two threads: 25 us without, 37 us with it, 36 us in a model.)
const DEPTHS: [usize; 3] = [128, 2048, 4095];
/// The heads of Qwen3-0.6B.
const KV_HEADS: usize = 8;
const GROUP: usize = 2;
const HEAD_DIM: usize = 128;

/// What the kernels of the slowest rank reach.
#[derive(Clone, Debug)]
pub struct Speeds {
    /// Products with weights, for each weight format.
    pub rates: Vec<Rate>,
    /// Attention, for each format of the cache.
    pub attention: Vec<AttentionRate>,
    /// Sums between machines behind the work, on a rank that has a link between them.
    pub hidden: Option<HiddenSums>,
}

/// Runs decoder layers on all ranks at once, a few seconds in all. The ranks of a machine share the
/// layers, since what they wait for each other counts. All ranks call it and get the same rates.
///
/// # Errors
/// When a rank is lost.
pub fn measure_speeds(
    groups: &Groups,
    isa: Isa,
    threads: usize,
    placement: Placement,
    effort: Effort,
) -> Result<Speeds, CommError> {
    let Groups { all, here, inside, leaders, between } = groups;
    let formats = [
        WeightFormat::Bf16,
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::Q8,
        WeightFormat::Q4,
    ];
    // The thread that makes sums in the background is there before this one is bound to a core; the
    // ranks themselves work apart at first.
    let mut ctx = Context::new(isa, Arc::clone(all), 1, threads, placement)?;
    ctx.positions = Arc::new(SoloComm::new());
    let mut lab = Lab { comm: &**all, ctx, ranks: here.size(), effort };
    let starts = formats.map(|format| lab.start(format));
    let attention =
        [KvFormat::F16, KvFormat::F32, KvFormat::Q8].map(|format| lab.attention(format));
    let attention = attention.into_iter().collect::<Result<Vec<_>, _>>()?;
    // The same team goes on: this thread is bound to its core by now, and the threads of another
    // team would be bound to no other.
    lab.ctx.heads = Arc::clone(here);
    let products =
        |(format, start): (_, Result<_, _>)| lab.products(format, start?, *inside, &attention[0]);
    let rates = formats.into_iter().zip(starts).map(products).collect::<Result<_, _>>()?;
    let hidden = between.map(|link| measure_hidden(&lab.ctx, leaders, link)).transpose()?;
    Ok(Speeds { rates, attention, hidden })
}

/// What is left of `seconds` without those of `other` work, which were measured apart from it: at
/// least one half. Noise may have it that the other work took as long or longer; a rate of what is
/// then left would be infinite or negative, and no plan could use it.
fn without(seconds: f64, other: f64) -> f64 {
    (seconds - other).max(seconds / 2.0)
}

struct Lab<'a> {
    comm: &'a dyn Communicator,
    /// This rank alone, or with those of its machine as `heads`.
    ctx: Context,
    /// Ranks of the machine.
    ranks: usize,
    effort: Effort,
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
const HALF: Sizes =
    Sizes { hidden: 1024, columns: 1536, kv_heads: KV_HEADS / 2, head_dim: HEAD_DIM };

impl Lab<'_> {
    /// Seconds of a pass of `tokens` tokens through `layers` with empty caches, sums included.
    fn pass(
        &self,
        sizes: Sizes,
        layers: &[DecoderLayer],
        tokens: usize,
        rounds: usize,
    ) -> Result<f64, CommError> {
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
        let [rounds, _] = self.effort.rounds();
        Ok(self.pass(SMALL, &layers, 1, rounds)? / layers.len() as f64)
    }

    fn products(
        &self,
        format: WeightFormat,
        start: f64,
        inside: Option<Link>,
        attention: &AttentionRate,
    ) -> Result<Rate, CommError> {
        let tokens = tokens(self.ctx.isa);
        let sizes = if self.ranks > 1 { HALF } else { USUAL };
        let first = sizes.layer(&self.ctx, format);
        let bytes = first.bytes();
        let ([all, _], [rounds, long]) = (self.effort.bytes(), self.effort.rounds());
        let count = (all / self.ranks).div_ceil(bytes);
        let mut layers = vec![first];
        layers.resize_with(count, || sizes.layer(&self.ctx, format));
        // Two sums a layer are the link's.
        let sums = |tokens: usize| {
            let bytes = self.ctx.heads.wire().encoded_bytes(tokens * sizes.hidden) as f64;
            inside.map_or(0.0, |link| 2.0 * link.seconds(Collective::Allreduce, self.ranks, bytes))
        };
        let scores = |tokens| sizes.attention_flops(tokens, 0) / (attention.gflops * 1e9);
        let layer = |layers: &[_], tokens, rounds| -> Result<f64, CommError> {
            let seconds = self.pass(sizes, layers, tokens, rounds)? / layers.len() as f64;
            Ok(without(seconds, start + sums(tokens) + scores(tokens)))
        };
        let one = layer(&layers, 1, rounds)?;
        let many = layer(&layers[..1], tokens, long)?;
        // Of what starting and sums take, the block has one half.
        let block = self.feed_forward(sizes.hidden, &layers, rounds)?;
        let block = without(block, (start + sums(FEW)) / 2.0);
        let few_gb_s = layers[0].mlp.bytes() as f64 / block * 1e-9;
        let more = without(many, bytes as f64 / few_gb_s * 1e-9);
        Ok(Rate {
            format: format.name().to_owned(),
            start_us: start * 1e6,
            read_gb_s: bytes as f64 / one * 1e-9,
            few_gb_s,
            gflops: (2 * sizes.elements() * (tokens - FEW)) as f64 / more * 1e-9,
        })
    }

    /// Seconds of the feed-forward block of a layer for a few tokens, its sum included: what an
    /// expert does. With the rest of a layer, of which experts have nothing, the rate of Q8 and Q4
    /// came out an eighth lower.
    fn feed_forward(
        &self,
        hidden: usize,
        layers: &[DecoderLayer],
        rounds: usize,
    ) -> Result<f64, CommError> {
        let (x, layout) = (Activations::ones((FEW, hidden)), TokenLayout::balanced(FEW, 1));
        let (mut scratch, mut residual) = (MlpScratch::default(), Residual::default());
        *residual.start(false) = x.clone();
        let seconds = median(self.comm, rounds, || {
            layers.iter().try_for_each(|layer| {
                mlp(&self.ctx, &layer.mlp, &x, &layout, &mut scratch, &mut residual)
            })
        })?;
        Ok(seconds / layers.len() as f64)
    }

    /// Median seconds of attention of `tokens` tokens after `depth` others, for each of `caches`,
    /// which hold at least as many.
    fn attend(
        &self,
        caches: &mut [LayerCache],
        depth: usize,
        tokens: usize,
        rounds: usize,
    ) -> Result<f64, CommError> {
        let shape = USUAL.shape();
        let (ones, angles) = (vec![1.0; HEAD_DIM], Activations::zeros((tokens, HEAD_DIM / 2)));
        let spec = AttentionSpec {
            algorithm: AttentionAlgorithm::Streaming,
            shape: &shape,
            norm: QkNorm { q: &ones, k: &ones, eps: 1e-6 },
            rotary: Rotary { cos: &angles, sin: &angles },
        };
        let mut qkv = Activations::ones((tokens, shape.qkv_width()));
        let (mut scratch, mut out) = (AttentionScratch::default(), Activations::default((0, 0)));
        let count = caches.len() as f64;
        let seconds = median(self.comm, rounds, || {
            for cache in &mut *caches {
                cache.truncate(depth);
                attention_headwise(&self.ctx, &spec, &mut qkv, cache, &mut scratch, &mut out);
            }
            Ok(())
        })?;
        Ok(seconds / count)
    }

    fn attention(&self, format: KvFormat) -> Result<AttentionRate, CommError> {
        let ([shallow, middle, deep], tokens, shape) =
            (DEPTHS, tokens(self.ctx.isa), USUAL.shape());
        let past = Activations::ones((deep, shape.qkv_width()));
        // Each by the team, whose threads first touch it, as in a model.
        let cache = || {
            let mut cache = LayerCache::new(format, KV_HEADS, HEAD_DIM);
            cache.reserve(deep + 1);
            cache.push(&self.ctx, past.as_slice().expect("rows are contiguous"), &shape, 0..deep);
            cache
        };
        let ([_, bytes], [rounds, few]) = (self.effort.bytes(), self.effort.rounds());
        let mut caches = vec![cache()];
        let all = caches[0].bytes();
        caches.resize_with((bytes / self.ranks).div_ceil(all), cache);
        let long = self.attend(&mut caches, deep, 1, rounds)?;
        // Arithmetic does not ask where its operands come from.
        let many = self.attend(&mut caches[..1], middle, tokens, few)?;
        let short = self.attend(&mut caches, shallow, 1, rounds)?;
        // The line through both, unless noise has it that starting takes less than nothing.
        let (all, few) = (all as f64, caches[0].bytes() as f64);
        let rate = ((all - few) / (long - short).max(1e-9)).min(all / long * 2.0);
        Ok(AttentionRate {
            format: format.to_string(),
            start_us: (short - few / rate).max(0.0) / KV_HEADS as f64 * 1e6,
            read_gb_s: rate * 1e-9,
            gflops: USUAL.attention_flops(tokens, middle) / many * 1e-9,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_takes_at_most_half_of_the_time() {
        assert_eq!(
            [0.0, 1.0, 3.0, 4.0, 9.0, f64::INFINITY, f64::NAN].map(|other| without(4.0, other)),
            [4.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0]
        );
    }
}
