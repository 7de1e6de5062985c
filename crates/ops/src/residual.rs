//! The residual stream. The blocks of a layer add sums over the ranks to it, either at once or in
//! the background.

use std::sync::Arc;

use comm::{Collective, CommError, Communicator, ReduceOp, WIRE_GROUP, WireFormat};
use simd_kernels::{Input, Store};
use tensor::Activations;

use crate::background::Pending;
use crate::context::Context;
use crate::cost::{Call, Cost, F32, Group, Work};
use crate::linear::{Linear, MatrixShape, reshape, slice, slice_mut};

/// The residual stream of some tokens, [tokens, hidden].
#[derive(Default)]
pub struct Residual {
    tokens: Activations,
    overlap: bool,
    /// A sum in progress; its result returns the input buffer and the tokens.
    sum: Option<Pending<Result<(Activations, Activations), CommError>>>,
    /// The input buffer of the last sum, reused by the next one.
    spare: Activations,
}

impl Residual {
    /// Starts a new pass and returns the tokens to fill. With `overlap`, sums are computed in the
    /// background while the caller works on another part of the batch.
    pub fn start(&mut self, overlap: bool) -> &mut Activations {
        // A failed earlier pass may have left a sum; its result is discarded.
        self.sum = None;
        self.overlap = overlap;
        &mut self.tokens
    }

    /// The tokens. No sum may be in progress.
    pub fn tokens(&self) -> &Activations {
        assert!(self.sum.is_none(), "a sum that is on its way has the tokens");
        &self.tokens
    }

    /// The tokens, mutable. No sum may be in progress.
    pub fn tokens_mut(&mut self) -> &mut Activations {
        assert!(self.sum.is_none(), "a sum that is on its way has the tokens");
        &mut self.tokens
    }

    /// Adds the sum of `partial` [tokens, hidden] over the ranks: one Allreduce of tokens · hidden
    /// · 4 bytes. With overlap, the sum is complete only after [`settle`](Self::settle), and the
    /// contents of `partial` are unspecified afterwards.
    ///
    /// # Errors
    /// When the collective fails.
    pub fn add_sum(
        &mut self,
        ctx: &Context,
        comm: &Arc<dyn Communicator>,
        partial: &mut Activations,
    ) -> Result<(), CommError> {
        if !self.overlap {
            return add_sum_of_rows(&**comm, partial, &mut self.tokens);
        }
        assert!(self.sum.is_none(), "a sum is on its way already");
        let partial = std::mem::replace(partial, std::mem::take(&mut self.spare));
        let mut tokens = std::mem::take(&mut self.tokens);
        self.sum = Some(ctx.background.start(comm, move |comm| {
            add_sum_of_rows(comm, &partial, &mut tokens)?;
            Ok((partial, tokens))
        }));
        Ok(())
    }

    /// Waits for the sum in progress, if there is one.
    ///
    /// # Errors When the collective has failed. The tokens are lost then.
    pub fn settle(&mut self, ctx: &Context) -> Result<(), CommError> {
        if let Some(sum) = self.sum.take() {
            let _operation = ctx.profile.operation("wait for sums", Work::default());
            (self.spare, self.tokens) = sum.wait()?;
        }
        Ok(())
    }
}

/// Adds the sum of `partial` over the ranks to `rows`, both [rows, width]. With q8 on the wire,
/// rows are padded to whole groups. No group then spans two rows, and the result of a row does not
/// depend on other rows.
fn add_sum_of_rows(
    comm: &dyn Communicator,
    partial: &Activations,
    rows: &mut Activations,
) -> Result<(), CommError> {
    let (count, width) = rows.dim();
    if comm.wire() != WireFormat::Q8 || width % WIRE_GROUP == 0 {
        return comm.all_reduce_add(slice(partial), slice_mut(rows));
    }
    let stride = width.next_multiple_of(WIRE_GROUP);
    let mut padded = vec![0.0; count * stride];
    for (padded, row) in padded.chunks_mut(stride).zip(slice(partial).chunks(width)) {
        padded[..width].copy_from_slice(row);
    }
    comm.all_reduce(&mut padded, ReduceOp::Sum)?;
    for (row, sum) in slice_mut(rows).chunks_mut(width).zip(padded.chunks(stride)) {
        row.iter_mut().zip(sum).for_each(|(x, sum)| *x += sum);
    }
    Ok(())
}

/// A linear layer whose *input* features are split over the ranks that split heads: `residual += Σᵣ
/// xᵣ · Wᵣᵀ`. It calls one Allreduce of tokens · out · 4 bytes. `partial` is scratch.
///
/// # Errors
/// When the collective fails.
pub fn linear_mpi(
    ctx: &Context,
    weights: &Linear,
    x: &Input,
    partial: &mut Activations,
    residual: &mut Residual,
) -> Result<(), CommError> {
    if ctx.heads.size() == 1 {
        weights.apply(ctx, x, residual.tokens_mut(), Store::Add);
        return Ok(());
    }
    let (tokens, width) = residual.tokens().dim();
    reshape(partial, tokens, width);
    weights.apply(ctx, x, partial, Store::Set);
    residual.add_sum(ctx, &ctx.heads, partial)
}

/// The cost of [`linear_mpi`] on one of `ranks` ranks. `weights` is the rank's share. Each entry of
/// `parts` is the number of tokens of one call.
pub fn linear_mpi_cost(weights: MatrixShape, ranks: usize, parts: &[usize]) -> Cost {
    let cost = weights.cost(parts.iter().sum());
    if ranks == 1 { cost } else { cost + sums_cost(Group::Heads, parts, weights.rows) }
}

/// The cost of one [`Residual::add_sum`] per entry of `parts`, which is its number of tokens. A
/// token has `width` elements.
pub(crate) fn sums_cost(group: Group, parts: &[usize], width: usize) -> Cost {
    let call = |tokens: &usize| Call::new(group, Collective::Allreduce, tokens * width);
    // With sums in the background, two buffers alternate.
    let buffers = if parts.len() > 1 { 2 } else { 1 };
    Cost {
        scratch: buffers * F32 * width * parts.iter().sum::<usize>(),
        calls: parts.iter().map(call).collect(),
        ..Cost::default()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use comm::ThreadComm;

    use super::*;

    /// Rows of a width that is no multiple of the group of q8, on three ranks.
    #[test]
    fn the_sum_of_a_row_does_not_depend_on_the_other_rows() {
        const WIDTH: usize = 40;
        const ROWS: usize = 9;
        for wire in WireFormat::ALL {
            thread::scope(|scope| {
                for comm in ThreadComm::group(3) {
                    scope.spawn(move || {
                        comm.set_wire(wire);
                        let value = |i: usize| ((i * 37 + comm.rank() * 11) % 101) as f32 / 7.0;
                        let partial = Activations::from_shape_fn((ROWS, WIDTH), |(row, i)| {
                            (1 << row) as f32 * value(row * WIDTH + i)
                        });
                        let mut together = Activations::ones((ROWS, WIDTH));
                        add_sum_of_rows(&comm, &partial, &mut together).expect("all ranks call");
                        for (row, expected) in partial.outer_iter().zip(together.outer_iter()) {
                            let row = Activations::from_shape_fn((1, WIDTH), |(_, i)| row[i]);
                            let mut alone = Activations::ones((1, WIDTH));
                            add_sum_of_rows(&comm, &row, &mut alone).expect("all ranks call");
                            assert_eq!(alone.row(0), expected, "{wire}");
                        }
                    });
                }
            });
        }
    }
}
