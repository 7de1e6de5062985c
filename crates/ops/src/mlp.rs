//! The feed-forward block, dense or a mixture of experts, for each schedule.

use std::ops::Range;

use comm::{Collective, CommError, CommunicatorExt};
use simd_kernels::{Input, MatMut, Store, matmul, matmul_swiglu};
use tensor::Activations;

use crate::context::Context;
use crate::cost::{Call, Cost, F32, Group, Operand, Work};
use crate::layout::TokenLayout;
use crate::linear::{Linear, MatrixShape, gather_columns, matrix, reshape, slice, slice_mut};
use crate::norm::prepare;
use crate::residual::{Residual, sums_cost};
use crate::routing::{Router, Routing, route, visited_experts};
use crate::schedule::MlpSchedule;
use crate::team::{FEW_TOKENS, PIECES_PER_THREAD, cut_columns};

/// This rank's share of one expert's weights.
pub struct Expert {
    /// [own intermediate, hidden]
    pub gate: Linear,
    /// [own intermediate, hidden]
    pub up: Linear,
    /// [hidden, own intermediate]; under `Gathered` [own hidden, intermediate].
    pub down: Linear,
}

/// A feed-forward block: one expert and no router when it is dense.
pub struct Mlp {
    /// The schedule, which also decides how the weights are split.
    pub schedule: MlpSchedule,
    /// This rank's experts or parts of experts, all of equal shape.
    pub experts: Vec<Expert>,
    /// The indices of these experts in the router's order.
    pub own: Range<usize>,
    /// Selects experts for each token; `None` for a dense block.
    pub router: Option<Router>,
    /// Intermediate features that each rank owns.
    pub intermediate: Vec<usize>,
    /// Hidden features of the result that each rank computes under `Gathered`.
    pub hidden: Vec<usize>,
    /// An expert that every token visits beside those of the router.
    pub shared: Option<Box<SharedExpert>>,
}

/// An expert that every token visits. Its result is multiplied by sigmoid(x · gate) before it is
/// added to that of the other experts.
pub struct SharedExpert {
    /// The expert as a dense block, split over the same ranks.
    pub block: Mlp,
    /// [1, hidden]; every rank holds it.
    pub gate: Linear,
}

/// Working memory of the block, kept from layer to layer.
#[derive(Default)]
pub struct MlpScratch {
    tokens: Activations,
    visits: Activations,
    scores: Activations,
    inputs: Vec<Input>,
    gate: Activations,
    up: Activations,
    own: Activations,
    activation: Activations,
    result: Activations,
    partial: Activations,
    shared_gate: Activations,
}

/// `residual += mlp(x)` for normalized tokens `x`; x and residual [own tokens, hidden].
///
/// If the tokens are split over ranks, the schedules that split weights gather the tokens first.
///
/// # Errors
/// When a collective fails.
pub fn mlp(
    ctx: &Context,
    block: &Mlp,
    x: &Activations,
    layout: &TokenLayout,
    scratch: &mut MlpScratch,
    residual: &mut Residual,
) -> Result<(), CommError> {
    let mut tokens = std::mem::take(&mut scratch.tokens);
    let comm = ctx.mlp_ranks();
    // Ranks that split heads hold the same tokens. Only ranks that split positions have to gather.
    let gathers =
        layout.is_split() && block.schedule != MlpSchedule::Local && ctx.heads.size() == 1;
    if gathers {
        reshape(&mut tokens, layout.tokens(), x.ncols());
        comm.all_gather_v(
            slice(x),
            &layout.lengths(comm.size(), x.ncols()),
            slice_mut(&mut tokens),
        )?;
    }
    let result = block.forward(
        ctx,
        if gathers { &tokens } else { x },
        gathers.then_some(layout),
        scratch,
        residual,
    );
    scratch.tokens = tokens;
    result
}

impl Mlp {
    /// Bytes of this rank's weights.
    pub fn bytes(&self) -> usize {
        let experts =
            self.experts.iter().flat_map(|expert| [&expert.gate, &expert.up, &expert.down]);
        let router = self.router.iter().map(|router| &router.weights);
        let shared =
            self.shared.as_ref().map_or(0, |shared| shared.block.bytes() + shared.gate.bytes());
        experts.chain(router).map(Linear::bytes).sum::<usize>() + shared
    }

    /// Runs the block on tokens that all ranks hold, or that only this rank holds (`Local`). If the
    /// tokens were gathered, `split` is their layout, and the residual has this rank's tokens only.
    fn forward(
        &self,
        ctx: &Context,
        x: &Activations,
        split: Option<&TokenLayout>,
        scratch: &mut MlpScratch,
        residual: &mut Residual,
    ) -> Result<(), CommError> {
        let comm = ctx.mlp_ranks();
        // The width cannot come from an expert: a rank may have none, and its part of the sum is
        // then 0.
        let width = if self.schedule == MlpSchedule::Gathered {
            self.hidden[comm.rank()]
        } else {
            residual.tokens().ncols()
        };
        let whole = self.schedule == MlpSchedule::Local || comm.size() == 1;
        let mut partial = std::mem::take(&mut scratch.partial);
        let (out, store) =
            if whole { (residual.tokens_mut(), Store::Add) } else { (&mut partial, Store::Set) };
        if !whole {
            reshape(out, x.nrows(), width);
        }
        self.experts(ctx, x, None, scratch, (out, store))?;
        if let Some(shared) = &self.shared {
            let mut gate = std::mem::take(&mut scratch.shared_gate);
            reshape(&mut gate, x.nrows(), 1);
            prepare(ctx, &shared.gate, x, &mut scratch.inputs[0]);
            shared.gate.apply(ctx, &scratch.inputs[0], &mut gate, Store::Set);
            gate.mapv_inplace(|x| 1.0 / (1.0 + (-x).exp()));
            shared.block.experts(ctx, x, Some(&gate), scratch, (out, Store::Add))?;
            scratch.shared_gate = gate;
        }
        let result = self.exchange(ctx, whole, split, &mut partial, scratch, residual);
        scratch.partial = partial;
        result
    }

    /// Writes this rank's part of the experts' results to `out`, or adds it; if there are factors
    /// [tokens, 1], each token's result is multiplied by its factor.
    fn experts(
        &self,
        ctx: &Context,
        x: &Activations,
        factors: Option<&Activations>,
        scratch: &mut MlpScratch,
        (out, store): (&mut Activations, Store),
    ) -> Result<(), CommError> {
        scratch.inputs.resize_with(self.experts.len().max(1), Input::new);
        let routing = match &self.router {
            Some(router) => {
                route(ctx, router, &self.own, x, &mut scratch.inputs[0], &mut scratch.scores)
            }
            None => Routing::dense(x.nrows()),
        };
        self.activate(ctx, &routing, x, scratch)?;
        let MlpScratch { inputs, activation, visits, .. } = scratch;
        if let Some(factors) = factors {
            for (mut row, factor) in activation.outer_iter_mut().zip(factors) {
                row *= *factor;
            }
        }
        self.prepare_groups(ctx, &routing, (activation, None), inputs, |expert| &expert.down);
        if self.router.is_some() {
            // The rows of visits are combined into rows of tokens before the exchange.
            reshape(visits, routing.rows(), out.ncols());
            self.down(ctx, &routing, inputs, visits, Store::Set);
            routing.combine(ctx, visits, out, store);
        } else {
            self.down(ctx, &routing, inputs, out, store);
        }
        Ok(())
    }

    /// Adds the sum of all ranks' parts to the residual stream, which already has it if this rank's
    /// part is the `whole`.
    fn exchange(
        &self,
        ctx: &Context,
        whole: bool,
        split: Option<&TokenLayout>,
        partial: &mut Activations,
        scratch: &mut MlpScratch,
        residual: &mut Residual,
    ) -> Result<(), CommError> {
        let comm = ctx.mlp_ranks();
        let MlpScratch { result, own, .. } = scratch;
        if whole {
            return Ok(());
        }
        match (self.schedule, split) {
            (MlpSchedule::Gathered, _) => {
                let residual = residual.tokens_mut();
                gather_columns(&**comm, partial, &self.hidden, false, result)?;
                let first =
                    split.map_or(0, |layout| (0..comm.rank()).map(|rank| layout.count(rank)).sum());
                let start = first * residual.ncols();
                let end = start + residual.len();
                simd_kernels::add(ctx.isa, slice_mut(residual), &slice(result)[start..end]);
            }
            (_, None) => residual.add_sum(ctx, comm, partial)?,
            (_, Some(layout)) => {
                let residual = residual.tokens_mut();
                reshape(own, residual.nrows(), residual.ncols());
                let counts = layout.lengths(comm.size(), residual.ncols());
                comm.reduce_scatter(slice(partial), &counts, slice_mut(own))?;
                simd_kernels::add(ctx.isa, slice_mut(residual), slice(own));
            }
        }
        Ok(())
    }

    /// Computes the activation that this rank's part of `down` multiplies: [rows, own
    /// intermediate], or all columns under `Gathered`.
    fn activate(
        &self,
        ctx: &Context,
        routing: &Routing,
        x: &Activations,
        scratch: &mut MlpScratch,
    ) -> Result<(), CommError> {
        let comm = ctx.mlp_ranks();
        let MlpScratch { inputs, gate, up, own, activation, .. } = scratch;
        self.prepare_groups(ctx, routing, (x, Some(&routing.tokens)), inputs, |expert| {
            &expert.gate
        });
        let _operation = ctx
            .profile
            .operation("gate_up", self.work(routing, |expert| [&expert.gate, &expert.up]));
        let (rows, width) =
            (routing.rows(), self.experts.first().map_or(0, |expert| expert.gate.rows()));
        if matches!(self.schedule, MlpSchedule::Fused | MlpSchedule::Local) {
            reshape(activation, rows, width);
            self.each_group(ctx, routing, inputs, activation, |expert, panels, input, out| {
                matmul_swiglu(
                    ctx.isa,
                    expert.gate.panels(),
                    expert.up.panels(),
                    panels,
                    input,
                    out,
                );
            });
            return Ok(());
        }
        for (out, pick) in [
            (&mut *gate, (|expert| &expert.gate) as fn(&Expert) -> &Linear),
            (&mut *up, |expert| &expert.up),
        ] {
            reshape(own, rows, width);
            self.each_group(ctx, routing, inputs, own, |expert, panels, input, out| {
                matmul(ctx.isa, pick(expert).panels(), panels, input, out, Store::Set);
            });
            gather_columns(
                &**comm,
                own,
                &self.intermediate,
                self.schedule == MlpSchedule::Naive,
                out,
            )?;
        }
        let start: usize = self.intermediate[..comm.rank()].iter().sum();
        let columns = start..start + self.intermediate[comm.rank()];
        if self.schedule == MlpSchedule::Naive {
            // The schedule computes the whole activation on every rank and then takes this rank's
            // part.
            let whole = &mut *own;
            reshape(whole, rows, gate.ncols());
            simd_kernels::swiglu(ctx.isa, slice(gate), slice(up), slice_mut(whole));
            reshape(activation, rows, columns.len());
            let (width, part) = (gate.ncols(), columns.len());
            for (part, row) in slice_mut(activation)
                .chunks_exact_mut(part.max(1))
                .zip(slice(whole).chunks_exact(width))
            {
                part.copy_from_slice(&row[columns.clone()]);
            }
            return Ok(());
        }
        reshape(own, rows, columns.len());
        let (width, part) = (gate.ncols(), columns.len());
        let whole = slice(gate).chunks_exact(width).zip(slice(up).chunks_exact(width));
        for (part, (gate, up)) in slice_mut(own).chunks_exact_mut(part.max(1)).zip(whole) {
            simd_kernels::swiglu(ctx.isa, &gate[columns.clone()], &up[columns.clone()], part);
        }
        gather_columns(&**comm, own, &self.intermediate, false, activation)
    }

    fn down(
        &self,
        ctx: &Context,
        routing: &Routing,
        inputs: &[Input],
        out: &mut Activations,
        store: Store,
    ) {
        let _operation =
            ctx.profile.operation("down_proj", self.work(routing, |expert| [&expert.down]));
        self.each_group(ctx, routing, inputs, out, |expert, panels, input, out| {
            matmul(ctx.isa, expert.down.panels(), panels, input, out, store);
        });
    }

    /// The work of the products with the given matrices of the visited experts.
    fn work<const N: usize>(
        &self,
        routing: &Routing,
        weights: impl Fn(&Expert) -> [&Linear; N],
    ) -> Work {
        let visited = routing.groups.iter().flat_map(|(expert, rows)| {
            weights(&self.experts[*expert]).map(|linear| linear.shape().work(rows.len()))
        });
        visited.sum()
    }

    /// Calls `job(expert, panels, input, out)` for each visited expert and each thread's panels, or
    /// pieces of them. All experts share one parallel section, so that a decoded token wakes the
    /// team once instead of once per expert.
    fn each_group(
        &self,
        ctx: &Context,
        routing: &Routing,
        inputs: &[Input],
        out: &mut Activations,
        job: impl Fn(&Expert, Range<usize>, &Input, MatMut<'_>) + Sync,
    ) {
        // Several experts provide several pieces already.
        let few = routing.rows() <= FEW_TOKENS * routing.groups.len();
        let (owners, ranges) = ctx.team.panel_pieces(
            out.ncols(),
            if few { 1 } else { PIECES_PER_THREAD.div_ceil(routing.groups.len()) },
        );
        let mut threads: Vec<Vec<_>> =
            (0..owners.last().map_or(0, |last| last + 1)).map(|_| Vec::new()).collect();
        let mut rest = matrix(out);
        for (index, (expert, rows)) in routing.groups.iter().enumerate() {
            let block;
            (block, rest) = rest.split_rows(rows.len());
            for (thread, (panels, block)) in owners.iter().zip(cut_columns(block, &ranges)) {
                threads[*thread].push((&self.experts[*expert], panels, &inputs[index], block));
            }
        }
        let run = |(expert, panels, input, block): (&Expert, _, &Input, _)| {
            job(expert, panels, input, block)
        };
        if few {
            ctx.team.each(threads, |jobs| jobs.into_iter().for_each(run));
        } else {
            ctx.team.share(threads, run);
        }
    }

    /// Prepares each group's rows as the input of its expert. The whole team works on the single
    /// group of a dense block; groups of a mixture are prepared in parallel. Row i of the sorted
    /// order is row `tokens[i]` of `x`, or row i without `tokens`.
    fn prepare_groups(
        &self,
        ctx: &Context,
        routing: &Routing,
        (x, tokens): (&Activations, Option<&[usize]>),
        inputs: &mut [Input],
        weights: impl Fn(&Expert) -> &Linear + Sync,
    ) {
        if self.router.is_none() {
            return prepare(ctx, weights(&self.experts[0]), x, &mut inputs[0]);
        }
        let width = x.ncols();
        let parts: Vec<_> = routing.groups.iter().zip(inputs).collect();
        ctx.team.each(parts, |((expert, rows), input)| {
            let kind = weights(&self.experts[*expert]).input_kind(ctx);
            match tokens {
                Some(tokens) => {
                    input.prepare_rows(ctx.isa, kind, slice(x), &tokens[rows.clone()], width)
                }
                None => {
                    input.prepare(
                        ctx.isa,
                        kind,
                        &slice(x)[rows.start * width..rows.end * width],
                        rows.len(),
                        width,
                    );
                }
            }
        });
    }
}

/// The shape of one rank's share of a feed-forward block.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpShape {
    /// The schedule.
    pub schedule: MlpSchedule,
    /// The ranks that split the block.
    pub group: Group,
    /// The number of these ranks.
    pub ranks: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Columns of the block, or of each expert, on all ranks together.
    pub columns: usize,
    /// Whether all ranks own the same number of columns, and under `Gathered` the same number of
    /// columns of the result.
    pub even: [bool; 2],
    /// Gate, up and down of this rank's experts, as runs of experts with equal formats: (number of
    /// experts, shapes).
    pub experts: Vec<(usize, [MatrixShape; 3])>,
    /// The router and the experts that each token visits.
    pub router: Option<(MatrixShape, usize)>,
    /// The expert that every token visits, as a dense block, and its gate.
    pub shared: Option<(Box<MlpShape>, MatrixShape)>,
}

impl MlpShape {
    /// Bytes of this rank's weights.
    pub fn bytes(&self) -> usize {
        let expert = |(count, matrices): &(usize, [MatrixShape; 3])| {
            count * matrices.iter().map(|matrix| matrix.bytes()).sum::<usize>()
        };
        self.experts.iter().map(expert).sum::<usize>()
            + self.router.map_or(0, |(router, _)| router.bytes())
            + self.shared.as_ref().map_or(0, |(block, gate)| block.bytes() + gate.bytes())
    }

    /// The expected number of this rank's experts that `tokens` tokens visit, and of rows per
    /// visited expert, if all choices are equally likely. With whole experts on ranks it is the
    /// value of a busy rank: one standard deviation above the mean.
    fn visits(&self, tokens: usize) -> (f64, f64) {
        let here: usize = self.experts.iter().map(|(count, _)| count).sum();
        let Some((router, visits)) = self.router else { return (here as f64, tokens as f64) };
        let visited = visited_experts(router.rows, visits, tokens);
        let here = here as f64;
        let share = here / router.rows as f64;
        let most = visited * share + (visited * share * (1.0 - share)).sqrt();
        (most.min(here), (tokens * visits) as f64 / visited.max(1.0))
    }

    /// The cost of [`mlp`], called once per entry of `parts`, which is a number of this rank's
    /// tokens.
    pub fn cost(&self, layout: &TokenLayout, parts: &[usize]) -> Cost {
        let Self { schedule, group, ranks, hidden, even, .. } = *self;
        let own = parts.iter().sum();
        let gathers =
            layout.is_split() && schedule != MlpSchedule::Local && group == Group::Positions;
        let tokens = if gathers { layout.tokens() } else { own };
        let call = |collective| Cost {
            calls: vec![Call::new(group, collective, tokens * hidden)],
            ..Cost::default()
        };
        let mut cost = if gathers { call(Collective::Allgatherv) } else { Cost::default() };
        cost = cost + self.experts_cost(tokens);
        if let Some((block, gate)) = &self.shared {
            cost = cost + gate.cost(tokens) + block.experts_cost(tokens);
        }
        cost = match schedule {
            _ if ranks == 1 || schedule == MlpSchedule::Local => cost,
            MlpSchedule::Gathered => cost + call(gather(even[1])),
            _ if gathers => cost + call(Collective::ReduceScatter),
            _ => cost + sums_cost(group, parts, hidden),
        };
        if gathers {
            cost.scratch += F32 * (2 * tokens + own) * hidden;
        }
        cost
    }

    /// The cost of everything between the tokens and the exchange of the result.
    fn experts_cost(&self, tokens: usize) -> Cost {
        let Self { schedule, group, hidden, columns, even, .. } = *self;
        let mut cost = self.router.map_or(Cost::default(), |(router, _)| router.cost(tokens));
        let (visited, rows) = self.visits(tokens);
        let here = self.experts.iter().map(|(count, _)| count).sum::<usize>() as f64;
        for (count, matrices) in &self.experts {
            let visited = visited / here * *count as f64;
            for matrix in matrices {
                let Work { flops, bytes } = matrix.work(1);
                let work = Work { flops: flops * rows, bytes } * visited;
                cost.work.push((Operand::Weights(matrix.format), work));
            }
        }
        // Until the experts' results are combined, each visit to an expert has a row.
        let inner = tokens * columns * self.router.map_or(1, |(_, visits)| visits);
        let (count, collective) = match schedule {
            MlpSchedule::Fused | MlpSchedule::Local => (0, Collective::Allgather),
            MlpSchedule::Naive => (2, Collective::Allgatherv),
            MlpSchedule::Gathered => (3, gather(even[0])),
        };
        cost.calls.extend((0..count).map(|_| Call::new(group, collective, inner)));
        // The inputs and the activation of this rank's rows, their results in a mixture, and the
        // gathered buffers.
        let rows = (visited * rows).ceil() as usize;
        let [gate, _, down] = self
            .experts
            .first()
            .map_or([(0, 0); 3], |(_, matrices)| matrices.map(|matrix| (matrix.rows, matrix.cols)));
        let results = if self.router.is_some() { 2 * hidden } else { 0 };
        let whole = if count > 0 { 4 * inner + tokens * hidden } else { 0 };
        cost.scratch += F32 * (tokens * hidden + rows * (gate.0 + down.1 + results) + whole);
        cost
    }
}

/// The collective that gathers columns: all ranks own equally many, or not.
fn gather(even: bool) -> Collective {
    if even { Collective::Allgather } else { Collective::Allgatherv }
}
