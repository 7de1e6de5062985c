//! Matrix products with packed weights: the entry points and the choice of the kernel.

use std::ops::Range;

use crate::input::{Input, InputKind};
use crate::isa::{Isa, dispatch};
use crate::matrix::MatMut;
use crate::panels::{PanelData, Panels};

#[cfg(target_arch = "x86_64")]
mod finish;
#[cfg(target_arch = "x86_64")]
mod formats;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

/// What happens to the old contents of an output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Store {
    /// The result replaces them.
    Set,
    /// The result is added to them.
    Add,
}

/// `out[t, c] = Σ_k w[16 panels.start + c, k] x[t, k]`, or `+=` with [`Store::Add`].
///
/// `out` is `[x.tokens(), rows that the panels cover]`; the last panel of the matrix may be short.
///
/// The bits of a row of `out` depend on the row of `x`, the weights and the instruction set, and
/// not on the other rows: with float weights, sums are formed in parts of 256 columns, each in the
/// order of columns, and the parts are added in order; with Q8 and Q4, sums within a group are
/// exact, and groups are added in order. AVX2 and AVX-512 give the same bits from the same
/// activations (see [`InputKind::of`]).
///
/// # Panics
/// When shapes differ, or `x` was prepared for another kind of weights.
pub fn matmul(
    isa: Isa,
    w: Panels<'_>,
    panels: Range<usize>,
    x: &Input,
    out: MatMut<'_>,
    store: Store,
) {
    check(isa, w, &panels, x, &out);
    if out.rows() == 0 || out.cols() == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() && !streams_f32(w, x) {
        // SAFETY: the instruction set proves the target features.
        return unsafe { avx512::matmul(w, panels, x, out, store) };
    }
    let general = isa.has_matrixmultiply();
    dispatch!(isa, avx2::matmul, scalar::matmul, (w, panels, x, out, store), avx2: (isa), scalar: (general))
}

/// `out[t, c] = silu(gate[c] · x[t]) * (up[c] · x[t])` for the rows that `panels` of both matrices
/// cover.
///
/// # Panics
/// When shapes or formats of the matrices differ, or `x` was prepared for another kind of weights.
pub fn matmul_swiglu(
    isa: Isa,
    gate: Panels<'_>,
    up: Panels<'_>,
    panels: Range<usize>,
    x: &Input,
    out: MatMut<'_>,
) {
    check(isa, gate, &panels, x, &out);
    check(isa, up, &panels, x, &out);
    assert!(gate.rows() == up.rows(), "gate has {} rows, up has {}", gate.rows(), up.rows());
    let formats = [gate, up].map(|w| w.data().name());
    assert!(formats[0] == formats[1], "gate is {}, up is {}", formats[0], formats[1]);
    if out.rows() == 0 || out.cols() == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() && !streams_f32(gate, x) {
        // SAFETY: the instruction set proves the target features.
        return unsafe { avx512::matmul_swiglu(gate, up, panels, x, out) };
    }
    let general = isa.has_matrixmultiply();
    dispatch!(isa, avx2::matmul_swiglu, scalar::matmul_swiglu, (gate, up, panels, x, out), avx2: (isa), scalar: (general))
}

/// Whether one token meets f32 weights, which AVX2 reads faster from memory than AVX-512. The bits
/// are the same.
#[cfg(target_arch = "x86_64")]
fn streams_f32(w: Panels<'_>, x: &Input) -> bool {
    x.tokens() == 1 && matches!(w.data(), PanelData::F32(_))
}

fn check(isa: Isa, w: Panels<'_>, panels: &Range<usize>, x: &Input, out: &MatMut<'_>) {
    let (rows, kind) = (w.rows_in(panels), InputKind::of(isa, &w.data()));
    let pairs = matches!(w.data(), PanelData::Bf16(_)) && isa.has_bf16_dot();
    assert!(
        x.kind() == kind || pairs && x.kind() == InputKind::Bf16,
        "the weights take {kind:?} activations, got {:?}",
        x.kind()
    );
    assert!(w.cols() == x.cols(), "weights of {} columns, activations of {}", w.cols(), x.cols());
    assert!(
        out.rows() == x.tokens() && out.cols() == rows,
        "{} tokens and {rows} rows into an output of [{}, {}]",
        x.tokens(),
        out.rows(),
        out.cols()
    );
}

#[cfg(test)]
mod tests;
