//! The memory that a rank works with in a pass: the buffers of a [`Part`](crate::layer) and of the
//! operations, by their shapes.

use ops::{
    AttentionMemory, AttentionShape, Bytes, ExpertsMemory, InputMemory, MlpMemory, MlpSchedule,
    TokenLayout,
};
use tensor::split_range;

use crate::heads::{BlockShape, BlockShare, HeadPlan};
use crate::options::{Division, OVERLAP_TOKENS, pass_tokens};
use crate::overlap::Overlap;
use crate::plan_input::PlanInput;
use crate::plan_machine::Machine;
use crate::traffic::column_machines;

/// Bytes of an f32.
const F32: usize = size_of::<f32>();
/// Bytes that the kernels of a thread keep for sums and widened weights
/// (`simd-kernels/src/matmul/avx2.rs`).
const KERNELS: usize = 324 << 10;

/// Bytes that `rank` allocates for the prompt's longest pass, beside weights and cache, without
/// what MPI keeps of messages.
pub(crate) fn activation_bytes(input: &PlanInput<'_>, division: Division, rank: usize) -> usize {
    let PlanInput { config, weights, machine, prompt, chunk, kv, .. } = *input;
    let Machine { ranks, nodes, threads, .. } = *machine;
    let (tp, sp) = division.strategy.grid(ranks);
    let tokens = pass_tokens(chunk, sp).min(prompt);
    let layout = TokenLayout::balanced(tokens, sp);
    let own = layout.count(rank / tp);
    let heads = HeadPlan::new(config, tp, rank % tp);
    let shape = AttentionShape { groups: heads.groups, head_dim: config.head_dim };
    let overlap = Overlap { machines: nodes, tokens: OVERLAP_TOKENS };
    let parts = overlap.parts(config, sp, division.schedule, own);
    let hidden = config.hidden_size;

    let attention = AttentionMemory {
        shape: &shape,
        kv,
        threads,
        layout: &layout,
        rank: rank / tp,
        machines: column_machines(tp, sp, rank, nodes),
        past: tokens < prompt,
    };
    let attention = attention.bytes();
    let part = |own: usize| {
        // The residual stream, its norm, what joins it, and the memory that sums in the background
        // bring back.
        let streams = 2 + usize::from(tp > 1) + usize::from(parts.len() > 1);
        let row = streams * hidden + shape.head_dim + shape.qkv_width() + shape.query_width();
        let inputs = weights.layers().iter().fold(InputMemory::default(), |input, layer| {
            input.prepare(layer.qkv, own, hidden).prepare(layer.output, own, shape.query_width())
        });
        let mlps = (0..config.num_hidden_layers)
            .map(|layer| mlp(input, division, rank, layer, own, &layout));
        let mlp = mlps.max_by_key(|mlp| mlp.kept).unwrap_or_default();
        let kept = F32 * own * row + inputs.bytes() + attention.kept + mlp.kept;
        Bytes { kept, passing: attention.passing.max(mlp.passing) }
    };
    // At the end the first part takes in the tokens of the other, and the head scores the last one.
    let joined = (own - parts[0].len()) * hidden;
    let logits = split_range(config.vocab_size, ranks, rank).len();
    let parts: Vec<Bytes> = parts.iter().map(|range| part(range.len())).collect();
    let passing =
        parts.iter().map(|part| part.passing).max().unwrap_or(0).max(F32 * (joined + logits));
    threads * KERNELS + parts.iter().map(|part| part.kept).sum::<usize>() + passing
}

fn mlp(
    input: &PlanInput<'_>,
    division: Division,
    rank: usize,
    layer: usize,
    own: usize,
    layout: &TokenLayout,
) -> Bytes {
    let PlanInput { config, weights, machine: &Machine { ranks, .. }, .. } = *input;
    let (tp, _) = division.strategy.grid(ranks);
    let formats = &weights.layers()[layer];
    let shape = BlockShape::new(config, layer, formats.granule);
    let parts = division.block_ranks(ranks);
    let share = BlockShare::new(shape, division.schedule, division.experts, parts, rank % parts);
    let gathers = layout.is_split() && division.schedule != MlpSchedule::Local && tp == 1;
    let moe = config.moe_of(layer);
    let ([gate, _, down], _) = formats.experts[0];
    let memory = MlpMemory {
        schedule: division.schedule,
        ranks: parts,
        tokens: if gathers { layout.tokens() } else { own },
        own,
        hidden: config.hidden_size,
        columns: shape.columns,
        inner: share.inner.len(),
        down: (share.down.0.len(), share.down.1.len()),
        formats: [gate, down],
        experts: moe.map(|moe| ExpertsMemory {
            all: moe.num_experts,
            here: share.experts.len(),
            visits: moe.num_experts_per_tok,
            router: formats.router.unwrap_or(gate),
        }),
    };
    memory.bytes()
}
