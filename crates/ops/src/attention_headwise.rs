//! Attention of a batch to the pages of this rank, without collectives. The pages hold all
//! positions if ranks split heads only, and this rank's positions if ranks split positions.

use std::ops::Range;

use simd_kernels::{AttentionArithmetic, KvSpanMut};
use tensor::Activations;

use crate::attention::{AttentionShape, AttentionSpec, norm_and_rotate};
use crate::attention_tasks::{
    AttentionTasks, Fresh, Partial, Queries, RowSpan, TaskScratch, attend,
};
use crate::context::Context;
use crate::linear::slice;
use crate::pages::{LayerPages, PAGE_POSITIONS, PageId, PageOwners};

/// Tokens of one sequence in a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSpan {
    /// Number of tokens.
    pub tokens: usize,
    /// Position of the first token. The pages hold the keys and values of all earlier positions.
    pub start: usize,
    /// Pages of the sequence in order, at least up to the last token. If ranks split positions, a
    /// page id counts in the arena of the rank that owns the page.
    pub pages: Vec<PageId>,
    /// The owner of the first page among the ranks that split positions; 0 if positions are not
    /// split.
    pub first_rank: usize,
    /// Whether a model has generated the tokens. The queries of generated tokens multiply a cache
    /// of 16 or 8 bits in f32, also when a preempted sequence computes several of them again. The
    /// queries of prompt tokens multiply it in int16, also a single one.
    pub generated: bool,
}

impl TokenSpan {
    /// The position after the last token.
    pub fn end(&self) -> usize {
        self.start + self.tokens
    }

    /// The arithmetic of products between the span's queries and keys of 16 or 8 bits.
    pub(crate) fn arithmetic(&self) -> AttentionArithmetic {
        if self.generated { AttentionArithmetic::Float } else { AttentionArithmetic::Int16 }
    }

    /// The rule for which of its pages `rank` owns, of `ranks` ranks that split positions.
    pub(crate) fn owners(&self, rank: usize, ranks: usize) -> PageOwners {
        PageOwners { first: self.first_rank, ranks, rank }
    }

    /// The pages on the owners' rank that hold the first `positions` positions.
    pub(crate) fn local_pages(&self, owners: PageOwners, positions: usize) -> Vec<PageId> {
        owners.pages(&self.pages[..positions.div_ceil(PAGE_POSITIONS)])
    }
}

/// The tasks of attention for a pass whose tokens are all on this rank. It is the same for all
/// layers.
pub struct AttentionPlan {
    tasks: AttentionTasks,
    /// Pages that spans of one token write to, ascending.
    written: Vec<PageId>,
    /// Rows of spans with several tokens. They are normalized, rotated and stored before attention.
    several: Vec<Range<usize>>,
    /// The places where these rows are stored, ascending by page.
    stores: Vec<Rows>,
}

/// Consecutive rows that are stored in one page.
struct Rows {
    page: PageId,
    /// Position of the first row within the page.
    position: usize,
    rows: Range<usize>,
}

impl AttentionPlan {
    /// The plan for spans whose tokens are, in order, the rows of the pass.
    ///
    /// # Panics
    /// When the pages of a span end before its last token.
    pub fn new(ctx: &Context, shape: &AttentionShape, spans: &[TokenSpan]) -> Self {
        let (rank, ranks) = (ctx.positions.rank(), ctx.positions.size());
        let (mut written, mut several, mut stores) = (Vec::new(), Vec::new(), Vec::new());
        let mut first = 0;
        let mut fresh = Vec::with_capacity(spans.len());
        for span in spans {
            let owners = span.owners(rank, ranks);
            let rows = first..first + span.tokens;
            first = rows.end;
            let runs = owners.runs(span.start..span.end()).map(|(page, run)| Rows {
                page: span.pages[page],
                position: run.start % PAGE_POSITIONS,
                rows: rows.start + run.start - span.start..rows.start + run.end - span.start,
            });
            let runs: Vec<_> = runs.collect();
            if span.tokens == 1 {
                let store = runs.first().map(|run| (run.page, run.position));
                written.extend(store.map(|(page, _)| page));
                fresh.push(Some(store));
            } else {
                several.push(rows);
                stores.extend(runs);
                fresh.push(None);
            }
        }
        written.sort_unstable();
        stores.sort_unstable_by_key(|rows: &Rows| rows.page);
        let mut first = 0;
        let rows = spans.iter().zip(fresh).map(|(span, fresh)| {
            let owners = span.owners(rank, ranks);
            let rows = first..first + span.tokens;
            first = rows.end;
            let place = |(page, position): (PageId, usize)| {
                (written.binary_search(&page).expect("a page that is written"), position)
            };
            RowSpan {
                rows,
                visible: (span.start + 1..=span.end()).map(|end| owners.positions(end)).collect(),
                pages: span.local_pages(owners, span.end()),
                arithmetic: span.arithmetic(),
                fresh: fresh.map(|store| Fresh { store: store.map(place) }),
            }
        });
        let tasks = AttentionTasks::new(shape, ctx.team.threads(), rows.collect());
        Self { tasks, written, several, stores }
    }
}

/// Working memory of attention, kept from layer to layer.
#[derive(Default)]
pub struct AttentionScratch {
    pub(crate) tasks: TaskScratch,
    pub(crate) partial: Partial,
    pub(crate) past: Activations,
    pub(crate) message: Vec<f32>,
    pub(crate) gathered: Vec<f32>,
    pub(crate) block: Option<simd_kernels::KvMemory>,
}

/// Attention of this rank's heads to this rank's pages. First it stores the keys and values of the
/// rows whose positions this rank owns in `pages`. qkv [tokens, `qkv_width`] is normalized and
/// rotated (in place for spans of several tokens); out [tokens, heads * head_dim].
pub fn attention_headwise(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    plan: &AttentionPlan,
    qkv: &mut Activations,
    pages: &mut LayerPages<'_>,
    scratch: &mut AttentionScratch,
    out: &mut Activations,
) {
    attend_own(ctx, spec, plan, qkv, pages, &mut scratch.tasks, (out, None));
}

/// Like [`attention_headwise`]. With a [`Partial`], `out` is not divided by the sum of
/// exponentials.
pub(crate) fn attend_own(
    ctx: &Context,
    spec: &AttentionSpec<'_>,
    plan: &AttentionPlan,
    qkv: &mut Activations,
    pages: &mut LayerPages<'_>,
    scratch: &mut TaskScratch,
    out: (&mut Activations, Option<&mut Partial>),
) {
    assert_eq!(qkv.ncols(), spec.shape.qkv_width(), "the projection's width against the shape's");
    if !plan.several.is_empty() {
        norm_and_rotate(ctx, spec, qkv, &plan.several);
        store(ctx, spec.shape, &plan.stores, slice(qkv), pages);
    }
    let (written, keys) = pages.split(&plan.written);
    let queries = Queries { rows: slice(qkv), stride: qkv.ncols() };
    attend(ctx, spec, &plan.tasks, queries, (&keys, written), scratch, out);
}

/// Stores the keys and values of `qkv` [tokens, `qkv_width`] in the pages.
fn store(
    ctx: &Context,
    shape: &AttentionShape,
    stores: &[Rows],
    qkv: &[f32],
    pages: &mut LayerPages<'_>,
) {
    if shape.groups.is_empty() {
        return;
    }
    let (width, size) = (shape.qkv_width(), shape.head_dim);
    let written: Vec<_> = stores.iter().map(|rows| rows.page).collect();
    let (spans, _) = pages.split(&written);
    let targets =
        stores.iter().flat_map(|rows| (0..shape.groups.len()).map(move |head| (rows, head)));
    let parts: Vec<_> = targets.zip(spans).collect();
    ctx.team.each(parts, |((rows, head), mut span): ((&Rows, usize), KvSpanMut<'_>)| {
        let keys = &qkv[rows.rows.start * width + shape.query_width() + head * size..];
        let values = &keys[shape.kv_width()..];
        span.store_many(ctx.isa, rows.position, rows.rows.len(), (keys, values), width);
    });
}
