//! The last step of the vector products: the sums of a token and a panel go to the output.

use std::arch::x86_64::*;

use super::Store;
use crate::lanes::{load, store};
use crate::panels::PANEL;
use crate::swiglu::gated256;

/// What becomes of the sums of N matrices.
#[derive(Clone, Copy)]
pub(super) enum Finish {
    /// The sums of the one matrix are stored.
    Store(Store),
    /// `silu(first) * second` is stored.
    SwiGlu,
}

/// Finishes the sums of one token and panel into `out_row[at..]`, as many as the row has left.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn finish_row<const N: usize>(
    finish: Finish,
    sums: [&[f32; PANEL]; N],
    out_row: &mut [f32],
    at: usize,
) {
    let out = &mut out_row[at..];
    if let Some(out) = out.first_chunk_mut::<PANEL>() {
        finish_whole(finish, sums, out);
    } else {
        let mut whole = [0.0; PANEL];
        whole[..out.len()].copy_from_slice(out);
        finish_whole(finish, sums, &mut whole);
        out.copy_from_slice(&whole[..out.len()]);
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn finish_whole<const N: usize>(finish: Finish, sums: [&[f32; PANEL]; N], out: &mut [f32; PANEL]) {
    for (half, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
        let sum = |n: usize| load(&sums[n].as_chunks().0[half]);
        let result = match finish {
            Finish::Store(Store::Set) => sum(0),
            Finish::Store(Store::Add) => _mm256_add_ps(load(out), sum(0)),
            Finish::SwiGlu => gated256(sum(0), sum(1)),
        };
        store(out, result);
    }
}
