//! A matrix in a file, or a rectangle of one: what a rank owns, read when asked for.

use std::{fmt, ops::Range, path::Path, sync::Arc};

use tensor::{EncodeError, MatrixSource, WeightFormat};

use crate::{CheckpointError, region::Buffer};

/// Rows that [`Matrix::read_rows`] decodes at once are at most about this many bytes as f32.
const PIECE: usize = 256 << 10;

/// Rows that are decoded at once of a matrix that is stored by columns.
const TILE: usize = 128;

/// A whole stored matrix in one of the formats of files. Each format is one implementation.
pub(crate) trait Stored: fmt::Debug + Send + Sync {
    /// The tensor's name, as the model asks for it.
    fn name(&self) -> &str;

    /// The file with the tensor, or with its largest part.
    fn file(&self) -> &Path;

    /// `[rows, cols]`
    fn shape(&self) -> [usize; 2];

    /// The packed format in which the matrix is kept unless the user chooses one: the
    /// exact one, or the nearest whose size is about that of the file.
    fn packed_format(&self) -> WeightFormat;

    /// The smallest packed format that represents the weights of the columns `cols` exactly.
    fn exact_format(&self, cols: &Range<usize>) -> WeightFormat;

    /// Whether the file stores columns one after the other, so that few rows are read about as
    /// slowly as many.
    fn by_columns(&self) -> bool {
        false
    }

    /// Reads a rectangle as f32, exactly as the format defines the weights.
    fn read_f32(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError>;

    /// Reads a rectangle in its exact format, unless that is F32. `out` has
    /// [`WeightFormat::stored_row_bytes`] for each row; the last group of a row may reach beyond
    /// the columns.
    fn read_encoded(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError>;
}

/// A rectangle of a stored matrix, `[rows, cols]`: a handle, cheap to clone and to slice; nothing
/// is read until asked.
#[derive(Clone, Debug)]
pub struct Matrix {
    stored: Arc<dyn Stored>,
    rows: Range<usize>,
    cols: Range<usize>,
}

/// Memory for reading, kept between reads.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Bytes of several rows, of which only some columns are wanted.
    pub(crate) merged: Vec<u8>,
    /// Bytes on their way to f32.
    pub(crate) encoded: Buffer,
    /// Weights of a row beyond the wanted columns.
    pub(crate) values: Vec<f32>,
    /// Rows of a matrix that is stored by columns.
    tile: Tile,
}

/// Some rows of a rectangle, decoded.
#[derive(Debug, Default)]
struct Tile {
    stored: Option<Arc<dyn Stored>>,
    rows: Range<usize>,
    cols: Range<usize>,
    values: Vec<f32>,
}

impl Matrix {
    pub(crate) fn new(stored: Arc<dyn Stored>) -> Self {
        let [rows, cols] = stored.shape();
        Self { stored, rows: 0..rows, cols: 0..cols }
    }

    /// Rows of this rectangle (outputs of a linear layer).
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Columns of this rectangle (inputs of a linear layer).
    pub fn cols(&self) -> usize {
        self.cols.len()
    }

    /// The packed format in which the matrix is kept unless the user chooses one: an exact one, or
    /// the nearest whose size is about that of the file.
    pub fn format(&self) -> WeightFormat {
        self.stored.packed_format()
    }

    /// The tensor's name.
    pub fn name(&self) -> &str {
        self.stored.name()
    }

    /// The file that holds the tensor.
    pub fn file(&self) -> &Path {
        self.stored.file()
    }

    /// The rectangle `rows` x `cols` of this one; indices count from this rectangle's corner.
    ///
    /// Columns may be cut anywhere. Where a cut goes through a quantization group, the weights of
    /// the rectangle are the same f32 values, but the stored codes may not fit a packed format.
    ///
    /// # Panics
    ///
    /// If a range runs backwards or beyond this rectangle.
    pub fn slice(&self, rows: Range<usize>, cols: Range<usize>) -> Self {
        Self {
            stored: Arc::clone(&self.stored),
            rows: narrow("rows", &self.rows, rows),
            cols: narrow("columns", &self.cols, cols),
        }
    }

    /// Reads one row as f32: `out` has [`Self::cols`] elements. Only this row's columns are read
    /// from the file.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or a weight is NaN or infinite.
    ///
    /// # Panics
    ///
    /// If the row is out of range or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) -> Result<(), CheckpointError> {
        self.read_rows(row..row + 1, out)
    }

    /// Reads some rows as f32: `out` is `[rows, cols]`.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, or a weight is NaN or infinite.
    ///
    /// # Panics
    ///
    /// If the rows are out of range or `out` has another length.
    pub fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), CheckpointError> {
        let mut scratch = Scratch::default();
        // Some rows at a time, so that the bytes on their way to f32 take little memory.
        let batch = (PIECE / (4 * self.cols()).max(1)).max(1);
        for start in rows.clone().step_by(batch) {
            let part = start..(start + batch).min(rows.end);
            let place = start - rows.start..part.end - rows.start;
            let out = &mut out[place.start * self.cols()..place.end * self.cols()];
            self.read_f32(part, out, &mut scratch)?;
        }
        Ok(())
    }

    /// Reads rows out of a tile of more rows, which the next calls are likely to want.
    fn read_tiled(
        &self,
        rows: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        let mut tile = std::mem::take(&mut scratch.tile);
        let same = tile.stored.as_ref().is_some_and(|other| Arc::ptr_eq(other, &self.stored));
        if !(same
            && tile.cols == self.cols
            && tile.rows.start <= rows.start
            && rows.end <= tile.rows.end)
        {
            let end = (rows.start + TILE).min(self.rows.end);
            tile.stored = Some(Arc::clone(&self.stored));
            (tile.rows, tile.cols) = (rows.start..end, self.cols.clone());
            tile.values.resize(tile.rows.len() * self.cols(), 0.0);
            let (rows, cols) = (tile.rows.clone(), tile.cols.clone());
            self.stored.read_f32(rows, cols, &mut tile.values, scratch)?;
        }
        let first = (rows.start - tile.rows.start) * self.cols();
        out.copy_from_slice(&tile.values[first..][..out.len()]);
        scratch.tile = tile;
        Ok(())
    }

    fn stored_rows(&self, rows: Range<usize>, out: usize, expected: Option<usize>) -> Range<usize> {
        assert_eq!(Some(out), expected, "the output for rows {rows:?} of {}", self.name());
        narrow("rows", &self.rows, rows)
    }
}

impl MatrixSource for Matrix {
    type Error = CheckpointError;
    type Scratch = Scratch;

    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn cols(&self) -> usize {
        self.cols.len()
    }

    fn exact_format(&self) -> WeightFormat {
        self.stored.exact_format(&self.cols)
    }

    fn read_f32(
        &self,
        rows: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        let rows = self.stored_rows(rows.clone(), out.len(), rows.len().checked_mul(self.cols()));
        if out.is_empty() {
            return Ok(());
        }
        if self.stored.by_columns() && rows.len() < TILE {
            return self.read_tiled(rows, out, scratch);
        }
        self.stored.read_f32(rows, self.cols.clone(), out, scratch)
    }

    fn read_encoded(
        &self,
        rows: Range<usize>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        let format = self.exact_format();
        let row_bytes = format.stored_row_bytes(self.cols());
        let rows = self.stored_rows(
            rows.clone(),
            out.len(),
            row_bytes.and_then(|bytes| bytes.checked_mul(rows.len())),
        );
        if out.is_empty() {
            return Ok(());
        }
        self.stored.read_encoded(rows, self.cols.clone(), out, scratch)
    }

    fn not_representable(&self, error: EncodeError) -> CheckpointError {
        CheckpointError::NotRepresentable {
            file: self.file().to_owned(),
            tensor: self.name().to_owned(),
            row: self.rows.start + error.row,
            found: error.found,
            format: error.format,
        }
    }
}

fn narrow(what: &str, outer: &Range<usize>, inner: Range<usize>) -> Range<usize> {
    assert!(
        inner.start <= inner.end && inner.end <= outer.len(),
        "{what} {inner:?} of {}",
        outer.len()
    );
    outer.start + inner.start..outer.start + inner.end
}
