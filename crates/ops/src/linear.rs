//! Matrix products with this rank's packed weights, and the gathering of output columns from all
//! ranks.

use comm::{CommError, Communicator, CommunicatorExt};
use simd_kernels::{Input, InputKind, Isa, MatMut, PanelData, Panels, Store, matmul};
use tensor::{Activations, MatrixSource, PackedData, PackedMatrix, Rounding, WeightFormat};

use crate::context::{ActivationFormat, Context};
use crate::cost::{Cost, F32, Operand, Work};

// The crates `tensor` and `simd-kernels` do not depend on each other but share the layout of
// panels.
const _: () = assert!(tensor::PANEL == simd_kernels::PANEL && tensor::GROUP == simd_kernels::GROUP);

/// The shape of one rank's weights of a linear layer, [rows, cols].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixShape {
    /// Format in memory.
    pub format: WeightFormat,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

impl MatrixShape {
    /// Bytes that the packed weights occupy.
    pub fn bytes(self) -> usize {
        self.format.packed_bytes(self.rows, self.cols)
    }

    /// The work of a product with `tokens` tokens: one multiply-add per weight and token, and one
    /// reading of the weights.
    pub fn work(self, tokens: usize) -> Work {
        let flops = 2.0 * (self.rows * self.cols * tokens) as f64;
        Work { flops, bytes: if tokens > 0 { self.bytes() as f64 } else { 0.0 } }
    }

    /// The cost of preparing `tokens` tokens and multiplying them. A prepared element takes at most
    /// four bytes.
    pub fn cost(self, tokens: usize) -> Cost {
        Cost {
            work: vec![(Operand::Weights(self.format), self.work(tokens))],
            scratch: F32 * tokens * (self.rows + self.cols),
            calls: Vec::new(),
        }
    }
}

/// This rank's rows or columns of the weights of a linear layer, [out, in].
pub struct Linear {
    weights: PackedMatrix,
    rounding: Rounding,
}

impl Linear {
    /// Reads the vertically stacked matrices and packs them as `format`. Each thread of the team
    /// packs, and so touches first, the panels that it will read.
    ///
    /// # Errors
    /// When the stack cannot be read, or does not fit the format.
    pub fn load<M: MatrixSource>(
        ctx: &Context,
        format: WeightFormat,
        stack: &[M],
    ) -> Result<Self, M::Error> {
        let rows = stack.iter().map(M::rows).sum();
        let cols = stack.first().map_or(0, M::cols);
        let mut weights = PackedMatrix::allocate(format, rows, cols);
        let chunks = weights.split_panels(&ctx.team.panel_ranges(rows));
        let loaded = std::sync::Mutex::new(Ok(Rounding::default()));
        ctx.team.each(chunks, |chunk| {
            let part = chunk.load(stack);
            let mut loaded = loaded.lock().expect("no job panics while it holds the lock");
            match (&mut *loaded, part) {
                (Ok(sum), Ok(part)) => *sum += part,
                (Ok(_), Err(error)) => *loaded = Err(error),
                (Err(_), _) => {}
            }
        });
        let rounding = loaded.into_inner().expect("all jobs have returned")?;
        Ok(Self { weights, rounding })
    }

    /// Meaningless weights for measurements, in the memory layout of [`load`](Self::load).
    pub fn sample(ctx: &Context, format: WeightFormat, rows: usize, cols: usize) -> Self {
        let mut weights = PackedMatrix::allocate(format, rows, cols);
        let chunks = weights.split_panels(&ctx.team.panel_ranges(rows));
        // Read as f16, for example as the scale of a group, this byte twice is 0.08. Sums stay
        // small in every format.
        ctx.team.each(chunks, |chunk| chunk.fill(0x2d));
        Self { weights, rounding: Rounding::default() }
    }

    /// The rounding errors of loading.
    pub fn rounding(&self) -> Rounding {
        self.rounding
    }

    /// Output features of this share.
    pub fn rows(&self) -> usize {
        self.weights.rows()
    }

    /// Input features of this share.
    pub fn cols(&self) -> usize {
        self.weights.cols()
    }

    /// The format of the weights in memory.
    pub fn format(&self) -> WeightFormat {
        self.weights.format()
    }

    /// Bytes that the weights occupy.
    pub fn bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// The shape of this share.
    pub fn shape(&self) -> MatrixShape {
        MatrixShape { format: self.format(), rows: self.rows(), cols: self.cols() }
    }

    /// The form in which activations are prepared for these weights.
    pub fn input_kind(&self, ctx: &Context) -> InputKind {
        match (self.format(), ctx.activations) {
            (WeightFormat::Bf16, ActivationFormat::Bf16) => InputKind::Bf16,
            _ => self.exact_input_kind(ctx),
        }
    }

    /// Like [`input_kind`](Self::input_kind), but without regard to `ctx.activations`: f32
    /// activations if the format allows them.
    pub(crate) fn exact_input_kind(&self, ctx: &Context) -> InputKind {
        InputKind::of(ctx.isa, &self.panels().data())
    }

    /// The weights as an argument of kernels.
    pub fn panels(&self) -> Panels<'_> {
        panels(&self.weights)
    }

    /// `out = x · Wᵀ` (or `+=`), [tokens, out] of this share, without any collective.
    pub fn apply(&self, ctx: &Context, x: &Input, out: &mut Activations, store: Store) {
        let out = matrix(out);
        ctx.team.panels(self.rows(), out, |panels, block| {
            matmul(ctx.isa, self.panels(), panels, x, block, store);
        });
    }
}

/// A view of a packed matrix as an argument of kernels; no copy.
pub fn panels(weights: &PackedMatrix) -> Panels<'_> {
    let data = match weights.data() {
        PackedData::F32(data) => PanelData::F32(data),
        PackedData::Bf16(data) => PanelData::Bf16(data),
        PackedData::F16(data) => PanelData::F16(data),
        PackedData::Q8(data) => PanelData::Q8(data),
        PackedData::Q4(data) => PanelData::Q4(data),
    };
    Panels::new(data, weights.rows(), weights.cols())
}

/// `y = W · x` on the calling thread; W `[rows, cols]`, x `[cols]`, y `[rows]`. Activations are
/// rounded as the format of the weights asks ([`InputKind::of`]).
///
/// # Panics
/// When `x` has another length than the columns, or `y` than the rows.
///
/// ```
/// use ops::{Isa, linear::gemv, tensor::{PackedMatrix, WeightFormat}};
///
/// let weights = PackedMatrix::from_f32(WeightFormat::Bf16, &[1.0, 2.0, 3.0, 4.0], 2, 2)?;
/// let mut y = [0.0; 2];
/// gemv(Isa::detect(), &weights, &[1.0, 10.0], &mut y);
/// assert_eq!(y, [21.0, 43.0]);
/// # Ok::<(), ops::tensor::EncodeError>(())
/// ```
pub fn gemv(isa: Isa, weights: &PackedMatrix, x: &[f32], y: &mut [f32]) {
    let (w, rows) = (panels(weights), weights.rows());
    assert!(y.len() == rows, "{rows} rows of weights into {} numbers", y.len());
    let mut input = Input::new();
    input.prepare(isa, InputKind::of(isa, &w.data()), x, 1, weights.cols());
    matmul(isa, w, 0..w.count(), &input, MatMut::new(y, 1, rows, rows), Store::Set);
}

/// Gathers `[tokens, n]` on every rank from each rank's `[tokens, counts[rank]]` columns, n = Σ
/// counts. It calls one Allgather if the counts are equal and `vector` is false, otherwise one
/// Allgatherv, of tokens · n · 4 bytes.
///
/// # Errors
/// When the collective fails.
pub fn gather_columns(
    comm: &dyn Communicator,
    own: &Activations,
    counts: &[usize],
    vector: bool,
    out: &mut Activations,
) -> Result<(), CommError> {
    let tokens = own.nrows();
    let width: usize = counts.iter().sum();
    assert_eq!(own.ncols(), counts[comm.rank()], "own columns against this rank's count");
    let mut gathered = vec![0.0f32; tokens * width];
    if !vector && counts.iter().all(|count| *count == counts[0]) {
        comm.all_gather(slice(own), &mut gathered)?;
    } else {
        let lengths: Vec<_> = counts.iter().map(|count| count * tokens).collect();
        comm.all_gather_v(slice(own), &lengths, &mut gathered)?;
    }
    reshape(out, tokens, width);
    let (mut block, mut column) = (&gathered[..], 0);
    for &count in counts {
        let (own, rest) = block.split_at(count * tokens);
        for (row, piece) in out.outer_iter_mut().zip(own.chunks_exact(count.max(1))) {
            row.into_slice().expect("rows of activations are contiguous")[column..column + count]
                .copy_from_slice(piece);
        }
        (block, column) = (rest, column + count);
    }
    Ok(())
}

/// Gives `activations` the shape [rows, cols] and reuses its memory. The contents are unspecified.
pub fn reshape(activations: &mut Activations, rows: usize, cols: usize) {
    if activations.dim() == (rows, cols) {
        return;
    }
    let (mut data, _) = std::mem::take(activations).into_raw_vec_and_offset();
    data.resize(rows * cols, 0.0);
    *activations =
        Activations::from_shape_vec((rows, cols), data).expect("the length is rows times columns");
}

/// The elements of row-major activations.
pub(crate) fn slice(activations: &Activations) -> &[f32] {
    activations.as_slice().expect("activations are row-major and contiguous")
}

/// The elements of row-major activations.
pub(crate) fn slice_mut(activations: &mut Activations) -> &mut [f32] {
    activations.as_slice_mut().expect("activations are row-major and contiguous")
}

/// The whole of `activations` as a kernel's output.
pub(crate) fn matrix(activations: &mut Activations) -> MatMut<'_> {
    let (rows, cols) = activations.dim();
    MatMut::new(slice_mut(activations), rows, cols, cols)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums of small whole numbers, exact in every float format.
    #[test]
    fn a_vector_times_packed_weights() {
        let (rows, cols) = (37, 50);
        let value = |i: usize| (i * 7 % 11) as f32 - 5.0;
        let weights: Vec<f32> = (0..rows * cols).map(value).collect();
        let x: Vec<f32> = (3..cols + 3).map(value).collect();
        for isa in Isa::all() {
            for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::F16] {
                let packed = PackedMatrix::from_f32(format, &weights, rows, cols).expect("finite");
                let mut y = vec![f32::NAN; rows];
                gemv(isa, &packed, &x, &mut y);
                for (row, y) in weights.chunks(cols).zip(y) {
                    let expected: f32 = row.iter().zip(&x).map(|(w, x)| w * x).sum();
                    assert_eq!(y, expected, "{isa} {format}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "2 rows of weights into 3 numbers")]
    fn a_result_of_another_length_is_refused() {
        let weights = PackedMatrix::from_f32(WeightFormat::F32, &[1.0; 4], 2, 2).expect("finite");
        gemv(Isa::scalar(), &weights, &[1.0; 2], &mut [0.0; 3]);
    }
}
