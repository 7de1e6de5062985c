//! The output head: this rank's rows of the vocabulary.

use comm::{Collective, CommError, CommunicatorExt};
use simd_kernels::{Input, Store};
use tensor::Activations;

use crate::context::Context;
use crate::cost::{Call, Cost, F32, Group};
use crate::layout::TokenLayout;
use crate::linear::{Linear, reshape, slice, slice_mut};
use crate::norm::prepare;

/// The tokens of a pass whose logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// No logits: the pass only fills the cache.
    None,
    /// Those of the last token.
    Last,
    /// Those of all tokens.
    All,
}

/// Gives every rank the rows of `x` [own tokens, hidden] for the tokens `wanted`, which are
/// ascending indices into the pass; out [wanted, hidden].
///
/// If the tokens are split over ranks, it calls one Broadcast for a single row or one Allgatherv
/// for several.
///
/// # Errors
/// When the collective fails.
///
/// # Panics
/// When the pass has no such token.
pub fn wanted_rows(
    ctx: &Context,
    x: &Activations,
    layout: &TokenLayout,
    wanted: &[usize],
    out: &mut Activations,
) -> Result<(), CommError> {
    let (width, ranks) = (x.ncols(), ctx.positions.size());
    reshape(out, wanted.len(), width);
    if !layout.is_split() {
        for (row, index) in slice_mut(out).chunks_exact_mut(width).zip(wanted) {
            row.copy_from_slice(&slice(x)[index * width..(index + 1) * width]);
        }
        return Ok(());
    }
    // The wanted rows of a rank: (index among its own tokens, row of `out`).
    let own = |rank: usize| {
        let tokens = layout.indices(rank).enumerate();
        tokens.filter_map(|(row, index)| Some((row, wanted.binary_search(&index).ok()?)))
    };
    let rows: Vec<f32> = own(ctx.positions.rank())
        .flat_map(|(row, _)| &slice(x)[row * width..(row + 1) * width])
        .copied()
        .collect();
    match wanted {
        [] => {}
        [_] => {
            let owner = (0..ranks).find(|rank| own(*rank).next().is_some());
            let owner = owner.expect("each token is on some rank");
            if owner == ctx.positions.rank() {
                slice_mut(out).copy_from_slice(&rows);
            }
            ctx.positions.broadcast(owner, slice_mut(out))?;
        }
        _ => {
            let lengths: Vec<_> = (0..ranks).map(|rank| own(rank).count() * width).collect();
            let mut gathered = vec![0.0; wanted.len() * width];
            ctx.positions.all_gather_v(&rows, &lengths, &mut gathered)?;
            let places = (0..ranks).flat_map(own).map(|(_, place)| place);
            for (row, place) in gathered.chunks_exact(width).zip(places) {
                slice_mut(out)[place * width..(place + 1) * width].copy_from_slice(row);
            }
        }
    }
    Ok(())
}

/// The cost of [`wanted_rows`] for tokens `hidden` wide.
pub fn wanted_rows_cost(layout: &TokenLayout, wanted: LogitRows, hidden: usize) -> Cost {
    let (rows, collective) = match wanted {
        LogitRows::None => return Cost::default(),
        LogitRows::Last => (1, Collective::Broadcast),
        LogitRows::All => (layout.tokens(), Collective::Allgatherv),
    };
    let elements = rows * hidden;
    let call = Call::new(Group::Positions, collective, elements);
    Cost {
        scratch: F32 * elements,
        calls: if layout.is_split() { vec![call] } else { Vec::new() },
        ..Cost::default()
    }
}

/// Logits of normalized tokens `x` [tokens, hidden] for this rank's rows of the vocabulary:
/// [tokens, own rows].
pub fn lm_head(ctx: &Context, head: &Linear, x: &Activations, input: &mut Input) -> Activations {
    let mut logits = Activations::zeros((x.nrows(), head.rows()));
    if x.nrows() > 0 {
        let _operation = ctx.profile.operation("lm_head", head.shape().work(x.nrows()));
        prepare(ctx, head, x, input);
        head.apply(ctx, input, &mut logits, Store::Set);
    }
    logits
}
