//! A matrix in a file, or a rectangle of one: what a rank owns, read when asked for.

use std::{ops::Range, path::Path, sync::Arc};

use half::{
    bf16, f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};

use crate::{
    CheckpointError, GROUP, WeightFormat,
    quantize::{GroupQ4, dequantize_q4, dequantize_q8},
    source::Source,
};

/// Rows that are cut narrower than the file's are read one by one, unless at most this many bytes
/// lie between two of them: then one read takes them all. A system call costs about what copying 2
/// KB costs; twice that would already read whole file pages that no one asked for.
const MERGE_GAP: usize = 1024;

/// A merged read is cut into pieces of at most about this size, which stay in the cache until they
/// are used.
const PIECE: usize = 256 << 10;

/// A whole tensor of the file.
#[derive(Debug)]
pub(crate) struct Stored {
    source: Arc<Source>,
    name: String,
    format: WeightFormat,
    /// Of the first byte, in the file.
    offset: u64,
    row_bytes: usize,
    rows: usize,
    cols: usize,
}

impl Stored {
    /// The header was checked: `rows` rows of the format's size lie in the file at `offset`.
    pub(crate) fn new(
        source: Arc<Source>,
        name: &str,
        format: WeightFormat,
        offset: u64,
        rows: usize,
        cols: usize,
    ) -> Self {
        let row_bytes = format.stored_row_bytes(cols).expect("checked with the header");
        Self { source, name: name.to_owned(), format, offset, row_bytes, rows, cols }
    }
}

/// A rectangle of a stored matrix, `[rows, cols]`: a handle, cheap to clone and to slice; nothing
/// is read until asked.
#[derive(Clone, Debug)]
pub struct Matrix {
    stored: Arc<Stored>,
    rows: Range<usize>,
    cols: Range<usize>,
}

/// Memory for reading, kept between reads.
#[derive(Default)]
pub(crate) struct Scratch {
    merged: Vec<u8>,
    bits: Vec<u16>,
    blocks: Vec<u8>,
}

impl Matrix {
    pub(crate) fn new(stored: Stored) -> Self {
        let (rows, cols) = (0..stored.rows, 0..stored.cols);
        Self { stored: Arc::new(stored), rows, cols }
    }

    /// Rows of this rectangle (outputs of a linear layer).
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Columns of this rectangle (inputs of a linear layer).
    pub fn cols(&self) -> usize {
        self.cols.len()
    }

    /// The stored format.
    pub fn format(&self) -> WeightFormat {
        self.stored.format
    }

    /// The tensor's name in the checkpoint.
    pub fn name(&self) -> &str {
        &self.stored.name
    }

    /// The file that holds the tensor.
    pub fn file(&self) -> &Path {
        self.stored.source.path()
    }

    /// The rectangle `rows` x `cols` of this one; indices count from this rectangle's corner.
    ///
    /// Of a quantized matrix, columns may be cut anywhere. Where the first column begins a group of
    /// 32 the stored codes are used as they are; elsewhere weights are dequantized, and quantized
    /// anew if a quantized copy is wanted.
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
        assert_eq!(
            out.len(),
            rows.len() * self.cols(),
            "f32 values for {} x {} weights",
            rows.len(),
            self.cols()
        );
        if out.is_empty() {
            return Ok(());
        }
        let mut scratch = Scratch::default();
        // Whole rows at a time, so that the bytes on their way to f32 take little memory.
        let batch = (PIECE / self.stored.row_bytes.max(1)).max(1);
        for (start, out) in rows.clone().step_by(batch).zip(out.chunks_mut(batch * self.cols())) {
            self.read_f32(start..(start + batch).min(rows.end), out, &mut scratch)?;
        }
        Ok(())
    }

    /// As [`Self::read_rows`], in one piece.
    pub(crate) fn read_f32(
        &self,
        rows: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        match self.format() {
            WeightFormat::F32 => self.read_span(
                rows,
                self.element_span(),
                bytemuck::cast_slice_mut(out),
                &mut scratch.merged,
            ),
            format @ (WeightFormat::Bf16 | WeightFormat::F16) => {
                let mut bits = std::mem::take(&mut scratch.bits);
                bits.resize(out.len(), 0);
                let read = self.read_bits(rows, &mut bits, scratch);
                if format == WeightFormat::Bf16 {
                    bits.reinterpret_cast::<bf16>().convert_to_f32_slice(out);
                } else {
                    bits.reinterpret_cast::<f16>().convert_to_f32_slice(out);
                }
                scratch.bits = bits;
                read
            }
            WeightFormat::Q8 | WeightFormat::Q4 => self.read_dequantized(rows, out, scratch),
        }
    }

    /// The 16-bit patterns of a Bf16 or F16 matrix: `out` is `[rows, cols]`.
    pub(crate) fn read_bits(
        &self,
        rows: Range<usize>,
        out: &mut [u16],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        self.read_span(
            rows,
            self.element_span(),
            bytemuck::cast_slice_mut(out),
            &mut scratch.merged,
        )
    }

    /// Whether the first column begins a group, so that [`Self::read_groups`] gives this
    /// rectangle's own codes.
    pub(crate) fn starts_on_group(&self) -> bool {
        self.cols.start.is_multiple_of(GROUP)
    }

    /// The stored groups of a quantized matrix that cover the columns: `out` is `[rows, groups]`
    /// blocks. The last group may reach beyond the columns.
    pub(crate) fn read_groups(
        &self,
        rows: Range<usize>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        self.read_span(rows, self.group_span(), out, &mut scratch.merged)
    }

    fn read_dequantized(
        &self,
        rows: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        let span = self.group_span();
        let mut blocks = std::mem::take(&mut scratch.blocks);
        blocks.resize(rows.len() * span.len(), 0);
        let read = self.read_groups(rows, &mut blocks, scratch);
        let block_bytes = self.format().group_bytes().expect("a quantized format");
        let skipped = self.cols.start % GROUP;
        if !out.is_empty() {
            for (row, out) in blocks.chunks_exact(span.len()).zip(out.chunks_exact_mut(self.cols()))
            {
                for (group, block) in row.chunks_exact(block_bytes).enumerate() {
                    let values = match self.format() {
                        WeightFormat::Q8 => dequantize_q8(block),
                        _ => dequantize_q4(block),
                    };
                    // Columns of this rectangle that the group holds; the first one may begin
                    // inside the group.
                    let start = (group * GROUP).max(skipped) - skipped;
                    let end = ((group + 1) * GROUP - skipped).min(out.len());
                    let first = start + skipped - group * GROUP;
                    out[start..end].copy_from_slice(&values[first..first + end - start]);
                }
            }
        }
        scratch.blocks = blocks;
        read
    }

    /// Bytes of a stored row that hold the columns of an unquantized matrix.
    fn element_span(&self) -> Range<usize> {
        let bytes = self.format().element_bytes();
        self.cols.start * bytes..self.cols.end * bytes
    }

    /// Bytes of a stored row that hold the groups of the columns.
    fn group_span(&self) -> Range<usize> {
        let bytes = self.format().group_bytes().expect("a quantized format");
        if self.cols.is_empty() {
            return 0..0;
        }
        self.cols.start / GROUP * bytes..self.cols.end.div_ceil(GROUP) * bytes
    }

    /// Reads the bytes `span` of each of `rows` into `out`, `[rows, span]`, and checks that they
    /// stand for finite weights.
    fn read_span(
        &self,
        rows: Range<usize>,
        span: Range<usize>,
        out: &mut [u8],
        merged: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let (first, width) = (rows.start, span.len());
        self.read_bytes(rows, span, out, merged)?;
        // A damaged file, or a training that diverged. Softmax and rounding to integers pass over a
        // NaN, and what comes of it looks like an answer; here it is named before it is.
        match find_not_finite(self.format(), out) {
            None => Ok(()),
            Some((offset, found)) => Err(CheckpointError::NotFinite {
                file: self.file().to_owned(),
                tensor: self.name().to_owned(),
                row: self.stored_row(first + offset / width),
                found,
            }),
        }
    }

    fn read_bytes(
        &self,
        rows: Range<usize>,
        span: Range<usize>,
        out: &mut [u8],
        merged: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let stored = &*self.stored;
        assert!(rows.end <= self.rows(), "rows {rows:?} of {}", self.rows());
        assert_eq!(
            out.len(),
            rows.len() * span.len(),
            "bytes for {} rows of {}",
            rows.len(),
            span.len()
        );
        if out.is_empty() {
            return Ok(());
        }
        let read = |row: usize, out: &mut [u8]| {
            let offset =
                stored.offset + ((self.rows.start + row) * stored.row_bytes + span.start) as u64;
            stored.source.read_at(&stored.name, offset, out)
        };
        let gap = stored.row_bytes - span.len();
        if gap == 0 {
            return read(rows.start, out);
        }
        if gap > MERGE_GAP {
            for (row, out) in rows.zip(out.chunks_exact_mut(span.len())) {
                read(row, out)?;
            }
            return Ok(());
        }
        let batch = (PIECE / stored.row_bytes).max(1);
        for (row, out) in rows.step_by(batch).zip(out.chunks_mut(batch * span.len())) {
            let count = out.len() / span.len();
            merged.resize((count - 1) * stored.row_bytes + span.len(), 0);
            read(row, merged)?;
            for (from, to) in merged.chunks(stored.row_bytes).zip(out.chunks_exact_mut(span.len()))
            {
                to.copy_from_slice(&from[..span.len()]);
            }
        }
        Ok(())
    }

    /// Row of the stored tensor, for messages.
    pub(crate) fn stored_row(&self, row: usize) -> usize {
        self.rows.start + row
    }
}

/// The first weight (of a quantized format: scale) among stored ones that is NaN or infinite, and
/// at which byte.
fn find_not_finite(format: WeightFormat, stored: &[u8]) -> Option<(usize, f32)> {
    fn find<const N: usize>(
        stored: &[u8],
        step: usize,
        value: impl Fn([u8; N]) -> f32,
    ) -> Option<(usize, f32)> {
        let at = |offset: usize| value(*stored[offset..].first_chunk().expect("whole weights"));
        let offset = (0..stored.len()).step_by(step).find(|&offset| !at(offset).is_finite())?;
        Some((offset, at(offset)))
    }
    // All ones in the exponent. Without an early end, because that is what becomes vector
    // instructions.
    let any_16 = |ones: u16| {
        let halves = stored.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
        halves.fold(false, |any, bits| any | (bits & ones == ones))
    };
    match format {
        WeightFormat::F32 => {
            let bits = stored.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
            let any = bits.fold(false, |any, bits| any | (bits & 0x7f80_0000 == 0x7f80_0000));
            any.then(|| find(stored, 4, f32::from_le_bytes)).flatten()
        }
        WeightFormat::Bf16 if any_16(0x7f80) => {
            find(stored, 2, |bytes| bf16::from_le_bytes(bytes).to_f32())
        }
        WeightFormat::F16 if any_16(0x7c00) => {
            find(stored, 2, |bytes| f16::from_le_bytes(bytes).to_f32())
        }
        WeightFormat::Bf16 | WeightFormat::F16 => None,
        WeightFormat::Q8 | WeightFormat::Q4 => {
            let step = format.group_bytes().expect("a quantized format");
            let scale = |word| {
                if format == WeightFormat::Q4 {
                    GroupQ4::from_word(word).0
                } else {
                    f16::from_bits(word)
                }
            };
            find(stored, step, |bytes| scale(u16::from_le_bytes(bytes)).to_f32())
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
