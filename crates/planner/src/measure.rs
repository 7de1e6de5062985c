//! Measuring how fast ranks work: the model's own operations on weights that mean nothing, with all
//! ranks at work at once, and sums between ranks.

use std::time::Instant;

use qwen3_model::comm::{CommError, Communicator, CommunicatorExt, Link, ReduceOp};
use qwen3_model::ops::attention::{
    AttentionAlgorithm, AttentionShape, AttentionSpec, QkNorm, Rotary,
};
use qwen3_model::ops::attention_headwise::{
    AttentionPlan, AttentionScratch, TokenSpan, attention_headwise,
};
use qwen3_model::ops::cost::Work;
use qwen3_model::ops::kernels::{Input, Store};
use qwen3_model::ops::layout::TokenLayout;
use qwen3_model::ops::linear::reshape;
use qwen3_model::ops::mlp::{Expert, Mlp, MlpScratch};
use qwen3_model::ops::norm::prepare;
use qwen3_model::ops::residual::Residual;
use qwen3_model::ops::schedule::MlpSchedule;
use qwen3_model::ops::{Context, KvArena, KvFormat, Linear, PAGE_POSITIONS, PageId, mlp, rms_norm};
use qwen3_model::tensor::{Activations, WeightFormat};

use crate::machine::Rate;

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
    /// Bytes of operands through which the ranks of a machine go in turn, and rounds of passes of
    /// one token and of many tokens, which take longer and vary less.
    fn values(self) -> (usize, usize, usize) {
        if self == Self::Quick { (48 << 20, 3, 1) } else { (384 << 20, 11, 3) }
    }
}

/// Payloads of the sums that are timed, in f32: 256 B to 4 MiB.
const SUM_LENGTHS: [usize; 8] = [64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1 << 20];
/// Hidden width and feed-forward columns of a layer of Qwen3-0.6B, and of next to nothing.
const USUAL: [usize; 2] = [1024, 3072];
const SMALL: [usize; 2] = [64, 64];
/// Heads of Qwen3-0.6B.
const KV_HEADS: usize = 8;
const GROUP: usize = 2;
const HEAD_DIM: usize = 128;
/// Tokens in caches: few, where starting costs most, a chunk's past, and many.
const DEPTHS: [usize; 3] = [128, 2048, 4095];

/// Tokens of a pass of many: fewer where arithmetic is not what the machine is made for.
fn many_tokens(ctx: &Context) -> usize {
    if ctx.isa.has_avx2() { 256 } else { 16 }
}

/// Times Allreduces of several sizes and fits the link between the ranks of `comm`; `None` where
/// there is one rank. All ranks call it and get the same figures: the medians of the slowest rank.
///
/// # Errors
/// When a rank is lost.
pub fn measure_link(comm: &dyn Communicator) -> Result<Option<Link>, CommError> {
    if comm.size() < 2 {
        return Ok(None);
    }
    let mut measured = Vec::new();
    for len in SUM_LENGTHS {
        let mut buf = vec![0.0f32; len];
        let rounds = (1 << 21 >> len.ilog2()).clamp(7, 201);
        let seconds = median(comm, rounds, || comm.all_reduce(&mut buf, ReduceOp::Sum))?;
        measured.push((comm.wire().encoded_bytes(len) as f64, seconds));
    }
    Ok(Link::fit(comm.size(), &measured))
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
    Ok(comm.all_gather_one(times[rounds / 2])?.into_iter().fold(0.0, f64::max))
}

/// `seconds` without those of `other` work, which was measured apart from it: at least one half.
/// With noise the other work may seem to take longer, and a rate of what is then left would be
/// infinite or negative.
fn without(seconds: f64, other: f64) -> f64 {
    (seconds - other).max(seconds / 2.0)
}

/// A decoder layer without attention.
struct Layer {
    norm: Vec<f32>,
    qkv: Linear,
    mlp: Mlp,
}

/// Buffers of passes through layers.
#[derive(Default)]
struct Buffers {
    normed: Activations,
    input: Input,
    qkv: Activations,
    mlp: MlpScratch,
    residual: Residual,
}

impl Layer {
    fn new(ctx: &Context, format: WeightFormat, [hidden, columns]: [usize; 2]) -> Self {
        let linear = |rows, cols| Linear::sample(ctx, format, rows, cols);
        let expert = Expert {
            gate: linear(columns, hidden),
            up: linear(columns, hidden),
            down: linear(hidden, columns),
        };
        Self {
            norm: vec![1.0; hidden],
            qkv: linear(4 * hidden, hidden),
            mlp: Mlp {
                schedule: MlpSchedule::Local,
                experts: vec![expert],
                own: 0..1,
                router: None,
                intermediate: vec![columns],
                hidden: Vec::new(),
                shared: None,
            },
        }
    }

    /// What a pass of `tokens` tokens has to do.
    fn work(&self, tokens: usize) -> Work {
        let Expert { gate, up, down } = &self.mlp.experts[0];
        [&self.qkv, gate, up, down].iter().map(|linear| linear.shape().work(tokens)).sum()
    }

    fn run(&self, ctx: &Context, tokens: usize, buffers: &mut Buffers) -> Result<(), CommError> {
        let Buffers { normed, input, qkv, mlp: scratch, residual } = buffers;
        rms_norm(ctx, residual.tokens(), &self.norm, 1e-6, normed);
        prepare(ctx, &self.qkv, normed, input);
        reshape(qkv, tokens, self.qkv.rows());
        self.qkv.apply(ctx, input, qkv, Store::Set);
        rms_norm(ctx, residual.tokens(), &self.norm, 1e-6, normed);
        let layout = TokenLayout::balanced(tokens, 1);
        mlp(ctx, &self.mlp, normed, &layout, scratch, residual)
    }
}

/// The rate of products with weights of `format`. `ctx` is that of a rank alone; the ranks of
/// `comm`, of which `here` share a memory, work at the same time and get the same rate, that of the
/// slowest one.
///
/// # Errors
/// When a rank is lost.
pub fn measure_products(
    comm: &dyn Communicator,
    ctx: &Context,
    here: usize,
    format: WeightFormat,
    effort: Effort,
) -> Result<Rate, CommError> {
    let (memory, rounds, few) = effort.values();
    let mut buffers = Buffers::default();
    let mut seconds = |layers: &[Layer], tokens: usize, rounds| {
        *buffers.residual.start(false) = Activations::ones((tokens, layers[0].norm.len()));
        let pass = || layers.iter().try_for_each(|layer| layer.run(ctx, tokens, &mut buffers));
        Ok::<_, CommError>(median(comm, rounds, pass)? / layers.len() as f64)
    };
    let small: Vec<_> = (0..32).map(|_| Layer::new(ctx, format, SMALL)).collect();
    let start = seconds(&small, 1, rounds)?;
    let mut layers = vec![Layer::new(ctx, format, USUAL)];
    let (one, tokens) = (layers[0].work(1), many_tokens(ctx));
    let count = (memory / here).div_ceil(one.bytes as usize);
    layers.resize_with(count, || Layer::new(ctx, format, USUAL));
    let read = without(seconds(&layers, 1, rounds)?, start);
    let multiply = without(seconds(&layers[..1], tokens, few)?, start);
    Ok(Rate {
        format: format.name().to_owned(),
        start_us: start * 1e6,
        read_gb_s: one.bytes / read * 1e-9,
        gflops: layers[0].work(tokens).flops / multiply * 1e-9,
    })
}

/// The rate of attention to a cache of `format`, measured as [`measure_products`] does.
///
/// # Errors
/// When a rank is lost.
pub fn measure_attention(
    comm: &dyn Communicator,
    ctx: &Context,
    here: usize,
    format: KvFormat,
    effort: Effort,
) -> Result<Rate, CommError> {
    let ([shallow, middle, deep], tokens) = (DEPTHS, many_tokens(ctx));
    let groups = (0..KV_HEADS).map(|head| head * GROUP..(head + 1) * GROUP).collect();
    let shape = AttentionShape { groups, head_dim: HEAD_DIM };
    let (mut scratch, mut out) = (AttentionScratch::default(), Activations::default((0, 0)));
    let ones = vec![1.0; HEAD_DIM];
    // The layers of one arena in turn: of each the same pages.
    let pages = (deep + 1).max(middle + tokens).div_ceil(PAGE_POSITIONS);
    let mut seconds = |arena: &mut KvArena, layers, depth, tokens: usize, rounds| {
        let angles = Activations::zeros((tokens, HEAD_DIM / 2));
        let spec = AttentionSpec {
            algorithm: AttentionAlgorithm::Streaming,
            shape: &shape,
            norm: QkNorm { q: &ones, k: &ones, eps: 1e-6 },
            rotary: Rotary { cos: &angles, sin: &angles },
        };
        let span = TokenSpan {
            tokens,
            start: depth,
            pages: (0..pages as u32).map(PageId).collect(),
            first_rank: 0,
            generated: tokens == 1,
        };
        let plan = AttentionPlan::new(ctx, &shape, &[span]);
        let mut qkv = Activations::ones((tokens, shape.qkv_width()));
        let pass = || {
            for layer in 0..layers {
                let pages = &mut arena.layer(layer);
                attention_headwise(ctx, &spec, &plan, &mut qkv, pages, &mut scratch, &mut out);
            }
            Ok(())
        };
        Ok::<_, CommError>(median(comm, rounds, pass)? / layers as f64)
    };
    let (memory, rounds, few) = effort.values();
    let bytes = |keys| shape.work(format, 0, keys).bytes;
    let layers = (memory / here).div_ceil(bytes(deep) as usize);
    let mut arena =
        KvArena::new(format, layers, KV_HEADS, HEAD_DIM, pages).expect("memory for a measurement");
    arena.touch(ctx);
    let long = seconds(&mut arena, layers, deep, 1, rounds)?;
    let many = seconds(&mut arena, 1, middle, tokens, few)?;
    let short = seconds(&mut arena, layers, shallow, 1, rounds)?;
    // The line through both, unless with noise starting seems to take less than nothing.
    let (all, part) = (bytes(deep + 1), bytes(shallow + 1));
    let rate = ((all - part) / (long - short).max(1e-9)).min(all / long * 2.0);
    let pairs = tokens * middle + tokens * (tokens + 1) / 2;
    Ok(Rate {
        format: format.to_string(),
        start_us: (short - part / rate).max(0.0) / KV_HEADS as f64 * 1e6,
        read_gb_s: rate * 1e-9,
        gflops: shape.work(format, pairs, 0).flops / many * 1e-9,
    })
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
