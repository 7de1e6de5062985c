//! Where a packed matrix takes its weights from.

use std::ops::Range;

use crate::{EncodeError, WeightFormat};

/// A matrix `[rows, cols]` that gives its weights when asked: a rectangle of a file, or numbers in
/// memory.
pub trait MatrixSource: Sync {
    /// Why weights cannot be read or packed.
    type Error: Send;
    /// Memory that a thread keeps between two reads.
    type Scratch: Default;

    /// Rows (outputs of a linear layer).
    fn rows(&self) -> usize;

    /// Columns (inputs of a linear layer).
    fn cols(&self) -> usize;

    /// The smallest format that represents every weight exactly; [`read_encoded`] gives the weights
    /// in this format.
    ///
    /// [`read_encoded`]: Self::read_encoded
    fn exact_format(&self) -> WeightFormat;

    /// Reads rows as f32 into `out` `[rows.len(), cols]`.
    ///
    /// # Errors
    ///
    /// If the weights cannot be read or are not finite.
    fn read_f32(
        &self,
        rows: Range<usize>,
        out: &mut [f32],
        scratch: &mut Self::Scratch,
    ) -> Result<(), Self::Error>;

    /// Reads rows in [`exact_format`](Self::exact_format) into `out`, which has
    /// [`WeightFormat::stored_row_bytes`] for each row. What the last group of a row holds beyond
    /// the columns is arbitrary.
    ///
    /// # Errors
    ///
    /// If the weights cannot be read or are not finite.
    fn read_encoded(
        &self,
        rows: Range<usize>,
        out: &mut [u8],
        scratch: &mut Self::Scratch,
    ) -> Result<(), Self::Error>;

    /// The error for a weight that the wanted format cannot express.
    fn not_representable(&self, error: EncodeError) -> Self::Error;
}

/// Row-major f32 weights in memory.
#[derive(Clone, Copy, Debug)]
pub struct DenseMatrix<'a> {
    weights: &'a [f32],
    rows: usize,
    cols: usize,
}

impl<'a> DenseMatrix<'a> {
    /// Views `weights` as `[rows, cols]`.
    ///
    /// # Panics
    ///
    /// If `weights` has another length than `rows * cols`.
    pub fn new(weights: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(Some(weights.len()), rows.checked_mul(cols), "weights of [{rows}, {cols}]");
        Self { weights, rows, cols }
    }

    fn part(&self, rows: Range<usize>) -> &'a [f32] {
        &self.weights[rows.start * self.cols..rows.end * self.cols]
    }
}

impl MatrixSource for DenseMatrix<'_> {
    type Error = EncodeError;
    type Scratch = ();

    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn exact_format(&self) -> WeightFormat {
        WeightFormat::F32
    }

    fn read_f32(
        &self,
        rows: Range<usize>,
        out: &mut [f32],
        (): &mut (),
    ) -> Result<(), EncodeError> {
        let part = self.part(rows.clone());
        if let Some(index) = part.iter().position(|weight| !weight.is_finite()) {
            return Err(EncodeError {
                row: rows.start + index / self.cols,
                found: part[index],
                format: WeightFormat::F32,
            });
        }
        out.copy_from_slice(part);
        Ok(())
    }

    fn read_encoded(
        &self,
        rows: Range<usize>,
        out: &mut [u8],
        (): &mut (),
    ) -> Result<(), EncodeError> {
        self.read_f32(rows, bytemuck::cast_slice_mut(out), &mut ())
    }

    fn not_representable(&self, error: EncodeError) -> EncodeError {
        error
    }
}
