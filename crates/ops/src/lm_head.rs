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
    /// None: the pass only fills the cache.
    None,
    /// The last token's.
    Last,
    /// All tokens'.
    All,
}

/// Gives every rank the wanted rows of `x` [own tokens, hidden], in token order.
///
/// Where the tokens are split: one Broadcast of a row, or one Allgatherv of all.
///
/// # Errors
/// When the collective fails.
pub fn wanted_rows(
    ctx: &Context,
    x: &Activations,
    layout: &TokenLayout,
    wanted: LogitRows,
    out: &mut Activations,
) -> Result<(), CommError> {
    let (tokens, width) = (layout.tokens(), x.ncols());
    match wanted {
        LogitRows::Last if tokens > 0 => {
            reshape(out, 1, width);
            let owner = (0..ctx.positions.size())
                .find(|rank| layout.indices(*rank).any(|index| index + 1 == tokens));
            let owner = owner.expect("the last token is on some rank");
            if !layout.is_split() || owner == ctx.positions.rank() {
                // Ascending order: a rank that holds the last token holds it as its last row.
                out.row_mut(0).assign(&x.row(x.nrows() - 1));
            }
            if layout.is_split() {
                ctx.positions.broadcast(owner, slice_mut(out))?;
            }
        }
        LogitRows::All if layout.is_split() => {
            let mut gathered = vec![0.0; tokens * width];
            ctx.positions.all_gather_v(
                slice(x),
                &layout.lengths(ctx.positions.size(), width),
                &mut gathered,
            )?;
            reshape(out, tokens, width);
            for (row, index) in gathered.chunks_exact(width).zip(layout.gathered_order()) {
                slice_mut(out)[index * width..(index + 1) * width].copy_from_slice(row);
            }
        }
        LogitRows::All => {
            reshape(out, tokens, width);
            slice_mut(out).copy_from_slice(slice(x));
        }
        LogitRows::None | LogitRows::Last => reshape(out, 0, width),
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
