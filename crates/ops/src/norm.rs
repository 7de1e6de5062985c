//! RMSNorm, and the preparation of activations as the input of a product.

use simd_kernels::{Input, InputKind};
use tensor::Activations;

use crate::context::Context;
use crate::cost::Work;
use crate::linear::{Linear, reshape, slice, slice_mut};

/// Below this number of tokens, waking the team costs more time than it saves.
pub(crate) const SERIAL_TOKENS: usize = 8;

/// `out[t] = x[t] / sqrt(mean(x[t]²) + eps) · weight` for each token (Zhang & Sennrich 2019); x and
/// out [tokens, hidden].
pub fn rms_norm(ctx: &Context, x: &Activations, weight: &[f32], eps: f32, out: &mut Activations) {
    let (tokens, cols) = x.dim();
    reshape(out, tokens, cols);
    let _operation = ctx.profile.operation("rms_norm", Work::default());
    let norm_rows = |x: &[f32], out: &mut [f32]| {
        for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
            simd_kernels::rms_norm(ctx.isa, x, weight, eps, out);
        }
    };
    if tokens < SERIAL_TOKENS {
        return norm_rows(slice(x), slice_mut(out));
    }
    let rows = tokens.div_ceil(ctx.team.threads()) * cols;
    let parts = slice(x).chunks(rows).zip(slice_mut(out).chunks_mut(rows)).collect();
    ctx.team.each(parts, |(x, out)| norm_rows(x, out));
}

/// Prepares `x` [tokens, features] as the input of products with `weights` and with other weights
/// of the same format: it packs or quantizes.
pub fn prepare(ctx: &Context, weights: &Linear, x: &Activations, input: &mut Input) {
    prepare_as(ctx, weights.input_kind(ctx), x, input);
}

/// Like [`prepare`], for the given kind.
pub(crate) fn prepare_as(ctx: &Context, kind: InputKind, x: &Activations, input: &mut Input) {
    let (tokens, cols) = x.dim();
    let _operation = ctx.profile.operation("prepare", Work::default());
    if tokens < SERIAL_TOKENS {
        return input.prepare(ctx.isa, kind, slice(x), tokens, cols);
    }
    input.reset(kind, tokens, cols);
    let cuts = ctx.team.ranges(tokens, Input::TILE);
    let rows: Vec<_> = cuts.iter().map(|cut| &slice(x)[cut.start * cols..cut.end * cols]).collect();
    let parts = input.split(&cuts).into_iter().zip(rows).collect();
    ctx.team.each(parts, |(part, rows)| part.fill(ctx.isa, rows));
}
