//! The operations on any group of ranks, against plain formulas in f64: run by threads and by MPI
//! processes.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use checkpoint::{Checkpoint, CheckpointWriter, Matrix, TensorSpec};
use comm::Communicator;
use ops::attention::{AttentionAlgorithm, AttentionShape, AttentionSpec, QkNorm, Rotary};
use ops::attention_headwise::{AttentionPlan, AttentionScratch, TokenSpan, attention_headwise};
use ops::attention_sequence::PassPlan;
use ops::kernels::Input;
use ops::layout::TokenLayout;
use ops::lm_head::wanted_rows;
use ops::mlp::{Expert, Mlp, MlpScratch};
use ops::norm::prepare;
use ops::residual::Residual;
use ops::routing::Router;
use ops::schedule::{ExpertSplit, MlpSchedule};
use ops::{
    Context, Isa, KvArena, KvFormat, Linear, PAGE_POSITIONS, PageId, Placement, attention_sequence,
    linear_mpi, lm_head, mlp, rms_norm,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tensor::{Activations, WeightFormat, split_range};

/// Sums of f32 products differ by their order: a few times the length times the rounding unit, for
/// inputs within ±1, is far below this, and a wrong element is far above.
const TOLERANCE: f64 = 2e-4;

pub const HIDDEN: usize = 40;
const INTERMEDIATE: usize = 56;
const EXPERTS: usize = 5;
const HEADS: usize = 6;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 8;

/// A check's name, whether it splits heads (or else positions), and what it does.
type Check = (&'static str, bool, fn(&Rank));

const CHECKS: &[Check] = &[
    ("linear_mpi", true, linear_is_the_whole_product),
    ("mlp, dense, heads", true, |rank| every_schedule_gives_the_formula(rank, false)),
    ("mlp, experts, heads", true, |rank| every_schedule_gives_the_formula(rank, true)),
    ("mlp, dense, positions", false, |rank| every_schedule_gives_the_formula(rank, false)),
    ("mlp, experts, positions", false, |rank| every_schedule_gives_the_formula(rank, true)),
    ("attention_headwise", true, heads_match_the_formula),
    ("attention_sequence", false, sequence_matches_the_formula),
    ("lm_head", false, head_scores_the_wanted_rows),
];

/// Runs each check on all ranks, in the same order; returns how many there were.
pub fn run(comm: &Arc<dyn Communicator>, isa: Isa, threads: usize, dir: &Path) -> usize {
    for (name, heads, check) in CHECKS {
        let rank = Rank::new(comm.clone(), isa, threads, *heads, dir);
        if comm.rank() == 0 {
            eprintln!("{name}: {} ranks, {}, {threads} threads", comm.size(), isa.name());
        }
        check(&rank);
    }
    CHECKS.len()
}

/// What a check runs on.
struct Rank {
    ctx: Context,
    checkpoint: Checkpoint,
}

impl Rank {
    /// A rank of a grid of one row (`heads`) or one column.
    fn new(comm: Arc<dyn Communicator>, isa: Isa, threads: usize, heads: bool, dir: &Path) -> Self {
        let columns = if heads { comm.size() } else { 1 };
        let ctx =
            Context::new(isa, comm, columns, threads, Placement::Free).expect("the grid forms");
        Self { ctx, checkpoint: Checkpoint::open(dir).expect("the suite's checkpoint opens") }
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Matrix {
        self.checkpoint.matrix(name, rows, cols).expect(name)
    }

    fn linear(&self, part: Matrix) -> Linear {
        Linear::load(&self.ctx, WeightFormat::F32, &[part]).expect("the suite's weights load")
    }

    fn whole(&self, name: &str, rows: usize, cols: usize) -> Vec<f64> {
        let mut values = vec![0.0; rows * cols];
        self.matrix(name, rows, cols).read_rows(0..rows, &mut values).expect(name);
        values.into_iter().map(f64::from).collect()
    }

    fn share(&self, n: usize) -> Range<usize> {
        split_range(n, self.ctx.comm.size(), self.ctx.comm.rank())
    }

    fn counts(&self, n: usize) -> Vec<usize> {
        (0..self.ctx.comm.size())
            .map(|rank| split_range(n, self.ctx.comm.size(), rank).len())
            .collect()
    }
}

/// The matrices that the checks use: name, rows, columns.
fn tensors() -> Vec<(String, usize, usize)> {
    let mut tensors =
        vec![("linear".to_owned(), HIDDEN, INTERMEDIATE), ("router".to_owned(), EXPERTS, HIDDEN)];
    for expert in 0..EXPERTS {
        tensors.push((format!("gate.{expert}"), INTERMEDIATE, HIDDEN));
        tensors.push((format!("up.{expert}"), INTERMEDIATE, HIDDEN));
        tensors.push((format!("down.{expert}"), HIDDEN, INTERMEDIATE));
    }
    tensors
}

/// Writes the checkpoint that the checks read.
pub fn write_checkpoint(dir: &Path) {
    let spec = |(name, rows, cols)| TensorSpec {
        name,
        format: WeightFormat::F32,
        shape: vec![rows, cols],
    };
    let specs: Vec<_> = tensors().into_iter().map(spec).collect();
    let mut file =
        CheckpointWriter::create(dir.join("model.safetensors"), &specs, &[]).expect("a new file");
    for (index, spec) in specs.iter().enumerate() {
        let values = random(100 + index as u64, spec.shape.iter().product());
        file.write(&spec.name, &values).expect(&spec.name);
    }
    file.finish().expect("all tensors are written");
}

/// Values within ±1, the same for the same seed.
pub fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn activations(seed: u64, rows: usize, cols: usize) -> Activations {
    Activations::from_shape_vec((rows, cols), random(seed, rows * cols))
        .expect("length is rows times columns")
}

fn rows_of(x: &Activations, rows: impl Iterator<Item = usize>) -> Activations {
    x.select(ndarray::Axis(0), &rows.collect::<Vec<_>>()).as_standard_layout().into_owned()
}

/// y [rows] = w [rows, cols] · x [cols]
fn product(w: &[f64], x: &[f64]) -> Vec<f64> {
    w.chunks_exact(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
}

fn wide(row: &[f32]) -> Vec<f64> {
    row.iter().map(|x| f64::from(*x)).collect()
}

#[track_caller]
fn assert_close(what: &str, found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let scale = expected.iter().fold(1.0f64, |max, x| max.max(x.abs()));
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let off = (f64::from(*found) - expected).abs();
        assert!(
            off <= TOLERANCE * scale,
            "{what}, element {index}: found {found}, expected {expected}"
        );
    }
}

fn linear_is_the_whole_product(rank: &Rank) {
    let ctx = &rank.ctx;
    for tokens in [0, 1, 2, 11] {
        let x = activations(1, tokens, INTERMEDIATE);
        let residual = activations(2, tokens, HIDDEN);
        let w = rank.whole("linear", HIDDEN, INTERMEDIATE);
        let expected: Vec<f64> = (0..tokens)
            .flat_map(|t| {
                let before = wide(residual.row(t).as_slice().unwrap());
                let y = product(&w, &wide(x.row(t).as_slice().unwrap()));
                before.into_iter().zip(y).map(|(a, b)| a + b).collect::<Vec<_>>()
            })
            .collect();
        let own = rank.share(INTERMEDIATE);
        let weights =
            rank.linear(rank.matrix("linear", HIDDEN, INTERMEDIATE).slice(0..HIDDEN, own.clone()));
        let own_x = x.slice(ndarray::s![.., own]).as_standard_layout().into_owned();
        let (mut input, mut partial) = (Input::new(), Activations::default((0, 0)));
        prepare(ctx, &weights, &own_x, &mut input);
        for overlap in [false, true] {
            let mut sum = Residual::default();
            *sum.start(overlap) = residual.clone();
            linear_mpi(ctx, &weights, &input, &mut partial, &mut sum).unwrap();
            sum.settle(ctx).unwrap();
            assert_close(&format!("{tokens} tokens"), sum.tokens().as_slice().unwrap(), &expected);
        }
    }
}

/// The block on one token, in f64.
fn mlp_formula(rank: &Rank, experts: bool, x: &[f64]) -> Vec<f64> {
    let visits: Vec<(usize, f64)> = if experts {
        let scores = product(&rank.whole("router", EXPERTS, HIDDEN), x);
        let sum: f64 = scores.iter().map(|s| s.exp()).sum();
        let mut chosen: Vec<_> = scores.iter().map(|s| s.exp() / sum).enumerate().collect();
        chosen.sort_by(|a, b| b.1.total_cmp(&a.1));
        chosen.truncate(2);
        let kept: f64 = chosen.iter().map(|(_, p)| p).sum();
        chosen.into_iter().map(|(e, p)| (e, p / kept)).collect()
    } else {
        vec![(0, 1.0)]
    };
    let mut out = vec![0.0; HIDDEN];
    for (expert, weight) in visits {
        let gate = product(&rank.whole(&format!("gate.{expert}"), INTERMEDIATE, HIDDEN), x);
        let up = product(&rank.whole(&format!("up.{expert}"), INTERMEDIATE, HIDDEN), x);
        let hidden: Vec<f64> =
            gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
        let y = product(&rank.whole(&format!("down.{expert}"), HIDDEN, INTERMEDIATE), &hidden);
        out.iter_mut().zip(y).for_each(|(out, y)| *out += weight * y);
    }
    out
}

fn every_schedule_gives_the_formula(rank: &Rank, experts: bool) {
    let ctx = &rank.ctx;
    let whole = experts.then_some((MlpSchedule::Fused, ExpertSplit::Ranks));
    let inside =
        [MlpSchedule::Fused, MlpSchedule::Naive, MlpSchedule::Gathered, MlpSchedule::Local];
    for (schedule, split) in
        inside.map(|schedule| (schedule, ExpertSplit::Inside)).into_iter().chain(whole)
    {
        let own = if split == ExpertSplit::Ranks {
            rank.share(EXPERTS)
        } else {
            0..if experts { EXPERTS } else { 1 }
        };
        let (inner, outer) = (rank.share(INTERMEDIATE), rank.share(HIDDEN));
        let (inner, down_rows, down_cols) = match schedule {
            _ if split == ExpertSplit::Ranks => (0..INTERMEDIATE, 0..HIDDEN, 0..INTERMEDIATE),
            MlpSchedule::Local => (0..INTERMEDIATE, 0..HIDDEN, 0..INTERMEDIATE),
            MlpSchedule::Gathered => (inner, outer, 0..INTERMEDIATE),
            _ => (inner.clone(), 0..HIDDEN, inner),
        };
        let part = |name: String, rows, cols| rank.matrix(&name, rows, cols);
        let expert = |e: usize| Expert {
            gate: rank.linear(
                part(format!("gate.{e}"), INTERMEDIATE, HIDDEN).slice(inner.clone(), 0..HIDDEN),
            ),
            up: rank.linear(
                part(format!("up.{e}"), INTERMEDIATE, HIDDEN).slice(inner.clone(), 0..HIDDEN),
            ),
            down: rank.linear(
                part(format!("down.{e}"), HIDDEN, INTERMEDIATE)
                    .slice(down_rows.clone(), down_cols.clone()),
            ),
        };
        let block = Mlp {
            shared: None,
            schedule,
            experts: own.clone().map(expert).collect(),
            own,
            router: experts.then(|| Router {
                weights: rank.linear(rank.matrix("router", EXPERTS, HIDDEN)),
                experts_per_token: 2,
                normalize: true,
            }),
            intermediate: rank.counts(INTERMEDIATE),
            hidden: rank.counts(HIDDEN),
        };
        let mut scratch = MlpScratch::default();
        for tokens in [1, 3, 17] {
            for layout in [
                TokenLayout::Replicated { tokens },
                TokenLayout::balanced(tokens, ctx.positions.size()),
            ] {
                let (x, before) = (activations(3, tokens, HIDDEN), activations(4, tokens, HIDDEN));
                let own = rows_of(&x, layout.indices(ctx.positions.rank()));
                let expected: Vec<f64> = layout
                    .indices(ctx.comm.rank())
                    .flat_map(|t| {
                        let y = mlp_formula(rank, experts, &wide(x.row(t).as_slice().unwrap()));
                        before
                            .row(t)
                            .iter()
                            .zip(y)
                            .map(|(b, y)| f64::from(*b) + y)
                            .collect::<Vec<_>>()
                    })
                    .collect();
                for overlap in [false, true] {
                    let mut residual = Residual::default();
                    *residual.start(overlap) =
                        rows_of(&before, layout.indices(ctx.positions.rank()));
                    mlp(ctx, &block, &own, &layout, &mut scratch, &mut residual).unwrap();
                    residual.settle(ctx).unwrap();
                    let found = residual.tokens().as_slice().unwrap();
                    assert_close(
                        &format!("{schedule}, experts {split}, {layout:?}, overlap {overlap}"),
                        found,
                        &expected,
                    );
                }
            }
        }
    }
}

/// Fused projections of all tokens and heads, and the weights around them.
struct AttentionData {
    qkv: Activations,
    norm: Vec<f32>,
    cos: Activations,
    sin: Activations,
}

const EPS: f32 = 1e-6;

impl AttentionData {
    fn new(tokens: usize, seed: u64) -> Self {
        let angles = activations(seed + 6, tokens, HEAD_DIM / 2);
        Self {
            qkv: activations(seed + 5, tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
            norm: random(7, HEAD_DIM),
            cos: angles.mapv(f32::cos),
            sin: angles.mapv(f32::sin),
        }
    }

    /// A head of a token, normalized and rotated.
    fn head(&self, token: usize, head: usize) -> Vec<f64> {
        let row = &self.qkv.row(token).to_vec()[head * HEAD_DIM..(head + 1) * HEAD_DIM];
        let x = wide(row);
        let mean: f64 = x.iter().map(|x| x * x).sum::<f64>() / HEAD_DIM as f64;
        let x: Vec<f64> = x
            .iter()
            .zip(&self.norm)
            .map(|(x, w)| x / (mean + f64::from(EPS)).sqrt() * f64::from(*w))
            .collect();
        let half = HEAD_DIM / 2;
        (0..HEAD_DIM)
            .map(|i| {
                let (cos, sin) = (
                    f64::from(self.cos[[token, i % half]]),
                    f64::from(self.sin[[token, i % half]]),
                );
                if i < half {
                    x[i] * cos - x[i + half] * sin
                } else {
                    x[i] * cos + x[i - half] * sin
                }
            })
            .collect()
    }

    /// The output of a token's head over all tokens up to it.
    fn output(&self, token: usize, head: usize) -> Vec<f64> {
        let kv = HEADS + head / (HEADS / KV_HEADS);
        let q = self.head(token, head);
        let scores: Vec<f64> = (0..=token)
            .map(|t| {
                let k = self.head(t, kv);
                (q.iter().zip(&k).map(|(a, b)| a * b).sum::<f64>() / (HEAD_DIM as f64).sqrt()).exp()
            })
            .collect();
        let sum: f64 = scores.iter().sum();
        let mut out = vec![0.0; HEAD_DIM];
        for (t, score) in scores.iter().enumerate() {
            let first = (kv + KV_HEADS) * HEAD_DIM;
            for (out, i) in out.iter_mut().zip(first..) {
                *out += score / sum * f64::from(self.qkv[[t, i]]);
            }
        }
        out
    }

    fn spec<'a>(
        &'a self,
        algorithm: AttentionAlgorithm,
        shape: &'a AttentionShape,
        rotary: Rotary<'a>,
    ) -> AttentionSpec<'a> {
        AttentionSpec {
            algorithm,
            shape,
            norm: QkNorm { q: &self.norm, k: &self.norm, eps: EPS },
            rotary,
        }
    }
}

const ALGORITHMS: [AttentionAlgorithm; 2] =
    [AttentionAlgorithm::Materialized, AttentionAlgorithm::Streaming];

/// The spans of a batch: of each the sequence and how many tokens follow its earlier ones.
type Spans = &'static [(usize, usize)];

/// Batches, one after the other: of one sequence, and of several that join, go on and pause.
const PASSES: [&[Spans]; 5] = [
    &[&[(0, 23)]],
    &[&[(0, 1)], &[(0, 1)], &[(0, 1)]],
    &[&[(0, 16)], &[(0, 1)], &[(0, 9)], &[(0, 1)]],
    &[&[(0, 7), (1, 1), (2, 30)], &[(2, 1), (0, 2), (1, 1)], &[(1, 1)], &[(0, 1), (3, 4), (2, 1)]],
    // Across pages.
    &[&[(0, 125), (1, 127)], &[(0, 2), (1, 1)], &[(0, 1), (1, 1)], &[(1, 140), (0, 1)]],
];

/// Passes, for each algorithm. Long ones, which take their time, only where threads share the cache
/// of a head then, and on three ranks.
fn passes(ctx: &Context) -> impl Iterator<Item = (AttentionAlgorithm, &'static [Spans])> {
    let long: &[&[Spans]] = match (ctx.positions.size(), ctx.team.threads()) {
        (1, 2 | 16) if ctx.comm.size() == 1 => {
            &[&[&[(0, 1100), (1, 3)], &[(1, 1), (0, 1)], &[(0, 1)], &[(0, 3)]]]
        }
        (3, 2) => &[&[&[(0, 1600)], &[(0, 1), (1, 300)], &[(1, 2)], &[(0, 2), (1, 1)]]],
        _ => &[],
    };
    let long = if ctx.isa == Isa::detect() { long } else { &[] };
    ALGORITHMS
        .into_iter()
        .flat_map(move |a| PASSES.iter().chain(long).map(move |passes| (a, *passes)))
}

/// Sequences whose pages lie mixed in the arenas of ranks that split positions.
struct Sequences {
    data: Vec<AttentionData>,
    lengths: Vec<usize>,
    ranks: usize,
}

impl Sequences {
    fn new(passes: &[Spans], ranks: usize) -> Self {
        let count = passes.iter().copied().flatten().map(|(sequence, _)| sequence + 1).max();
        let tokens = |sequence| -> usize {
            let spans = passes.iter().copied().flatten();
            spans.filter(|span| span.0 == sequence).map(|span| span.1).sum()
        };
        let data = (0..count.unwrap_or(0))
            .map(|sequence| AttentionData::new(tokens(sequence), 10 * sequence as u64));
        let data: Vec<_> = data.collect();
        Self { lengths: vec![0; data.len()], data, ranks }
    }

    /// An arena that holds all of their pages.
    fn arena(&self, heads: usize) -> KvArena {
        let most = self.data.iter().map(|data| data.qkv.nrows()).max().unwrap_or(0);
        let pages = (most.div_ceil(PAGE_POSITIONS) + 1) * self.data.len();
        KvArena::new(KvFormat::F32, 2, heads, HEAD_DIM, pages).expect("memory")
    }

    /// The next batch as attention sees it, and the sequence and the position of each token.
    fn next(&mut self, spans: Spans) -> (Vec<TokenSpan>, Vec<(usize, usize)>) {
        let mut tokens = Vec::new();
        let span = |&(sequence, count): &(usize, usize)| {
            let start = self.lengths[sequence];
            self.lengths[sequence] += count;
            tokens.extend((start..start + count).map(|position| (sequence, position)));
            let pages = (start + count).div_ceil(PAGE_POSITIONS);
            // Page i of a sequence that starts on rank f is the ⌊i / ranks⌋-th one there.
            let page =
                |index: usize| PageId((index / self.ranks * self.data.len() + sequence) as u32);
            TokenSpan {
                tokens: count,
                start,
                pages: (0..pages).map(page).collect(),
                first_rank: sequence % self.ranks,
                generated: count == 1,
            }
        };
        (spans.iter().map(span).collect(), tokens)
    }

    /// The given tokens' rows of projections, cosines and sines.
    fn rows(&self, tokens: &[(usize, usize)]) -> [Activations; 3] {
        let pick = |of: fn(&AttentionData) -> &Activations| {
            let rows: Vec<_> =
                tokens.iter().map(|(sequence, at)| of(&self.data[*sequence]).row(*at)).collect();
            ndarray::stack(ndarray::Axis(0), &rows).unwrap_or_default()
        };
        [pick(|data| &data.qkv), pick(|data| &data.cos), pick(|data| &data.sin)]
    }
}

fn heads_match_the_formula(rank: &Rank) {
    let ctx = &rank.ctx;
    let group = HEADS / KV_HEADS;
    let own = rank.share(HEADS);
    let kv = if own.is_empty() { 0..0 } else { own.start / group..(own.end - 1) / group + 1 };
    let groups = kv
        .clone()
        .map(|k| (k * group).max(own.start) - own.start..((k + 1) * group).min(own.end) - own.start)
        .collect();
    let shape = AttentionShape { groups, head_dim: HEAD_DIM };
    for (algorithm, passes) in passes(ctx) {
        let mut sequences = Sequences::new(passes, 1);
        let mut arena = sequences.arena(kv.len());
        let mut scratch = AttentionScratch::default();
        for &spans in passes {
            let (k, v) = (HEADS, HEADS + KV_HEADS);
            let columns: Vec<usize> =
                [own.clone(), k + kv.start..k + kv.end, v + kv.start..v + kv.end]
                    .into_iter()
                    .flat_map(|heads| heads.start * HEAD_DIM..heads.end * HEAD_DIM)
                    .collect();
            let (batch, tokens) = sequences.next(spans);
            let [qkv, cos, sin] = sequences.rows(&tokens);
            let mut qkv = qkv.select(ndarray::Axis(1), &columns).as_standard_layout().into_owned();
            let rotary = Rotary { cos: &cos, sin: &sin };
            let spec = sequences.data[0].spec(algorithm, &shape, rotary);
            let plan = AttentionPlan::new(ctx, &shape, &batch);
            let (pages, mut out) = (&mut arena.layer(1), Activations::default((0, 0)));
            attention_headwise(ctx, &spec, &plan, &mut qkv, pages, &mut scratch, &mut out);
            let expected: Vec<f64> = tokens
                .iter()
                .flat_map(|(s, t)| own.clone().flat_map(|h| sequences.data[*s].output(*t, h)))
                .collect();
            let found = out.as_slice().unwrap();
            assert_close(&format!("{algorithm}, {passes:?} at {spans:?}"), found, &expected);
        }
    }
}

fn sequence_matches_the_formula(rank: &Rank) {
    let ctx = &rank.ctx;
    let group = HEADS / KV_HEADS;
    let groups = (0..KV_HEADS).map(|k| k * group..(k + 1) * group).collect();
    let shape = AttentionShape { groups, head_dim: HEAD_DIM };
    for (algorithm, passes) in passes(ctx) {
        let mut sequences = Sequences::new(passes, ctx.positions.size());
        let mut arena = sequences.arena(KV_HEADS);
        let mut scratch = AttentionScratch::default();
        for &spans in passes {
            let (batch, tokens) = sequences.next(spans);
            let plan = PassPlan::new(ctx, &shape, &batch);
            let own: Vec<_> =
                plan.layout().indices(ctx.positions.rank()).map(|index| tokens[index]).collect();
            let [mut qkv, cos, sin] = sequences.rows(&own);
            let rotary = Rotary { cos: &cos, sin: &sin };
            let spec = sequences.data[0].spec(algorithm, &shape, rotary);
            let (pages, mut out) = (&mut arena.layer(1), Activations::default((0, 0)));
            attention_sequence(ctx, &spec, &plan, &mut qkv, pages, &mut scratch, &mut out).unwrap();
            let expected: Vec<f64> = own
                .iter()
                .flat_map(|(s, t)| (0..HEADS).flat_map(|h| sequences.data[*s].output(*t, h)))
                .collect();
            let found = out.as_slice().unwrap();
            assert_close(&format!("{algorithm}, {passes:?} at {spans:?}"), found, &expected);
        }
    }
}

fn head_scores_the_wanted_rows(rank: &Rank) {
    let ctx = &rank.ctx;
    let own = rank.share(INTERMEDIATE);
    let head =
        rank.linear(rank.matrix("gate.0", INTERMEDIATE, HIDDEN).slice(own.clone(), 0..HIDDEN));
    let w = rank.whole("gate.0", INTERMEDIATE, HIDDEN);
    let wanted: [(usize, &[usize]); 6] = [
        (1, &[0]),
        (13, &[12]),
        (13, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (13, &[]),
        (13, &[2, 3, 11]),
        (13, &[5]),
    ];
    for (tokens, wanted) in wanted {
        for layout in [
            TokenLayout::Replicated { tokens },
            TokenLayout::balanced(tokens, ctx.positions.size()),
        ] {
            let x = activations(8, tokens, HIDDEN);
            let (mut rows, mut normed) =
                (Activations::default((0, 0)), Activations::default((0, 0)));
            wanted_rows(
                ctx,
                &rows_of(&x, layout.indices(ctx.positions.rank())),
                &layout,
                wanted,
                &mut rows,
            )
            .unwrap();
            rms_norm(ctx, &rows, &[1.0; HIDDEN], EPS, &mut normed);
            let logits = lm_head(ctx, &head, &normed, &mut Input::new());
            let expected: Vec<f64> = wanted
                .iter()
                .flat_map(|t| {
                    let x = wide(x.row(*t).as_slice().unwrap());
                    let mean: f64 = x.iter().map(|x| x * x).sum::<f64>() / HIDDEN as f64;
                    let x: Vec<f64> =
                        x.iter().map(|x| x / (mean + f64::from(EPS)).sqrt()).collect();
                    product(&w[own.start * HIDDEN..own.end * HIDDEN], &x)
                })
                .collect();
            assert_close(&format!("{wanted:?}, {layout:?}"), logits.as_slice().unwrap(), &expected);
        }
    }
}
