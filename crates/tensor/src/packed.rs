//! Weights in memory, in the panel layout of the kernels, filled in parallel pieces.

use std::{fmt, ops::Range};

use half::{bf16, f16};

use crate::{
    DenseMatrix, EncodeError, MatrixSource, PANEL, Rounding, WeightFormat,
    buffer::HugeBuffer,
    packer::Packer,
    panel::{slot_bf16, weight_q4, weight_q8},
};

/// A `[rows, cols]` weight matrix in panels of [`PANEL`] rows. The last panel is filled with zero
/// rows.
///
/// Memory is in huge pages where they fit, and becomes resident when first written.
pub struct PackedMatrix {
    format: WeightFormat,
    rows: usize,
    cols: usize,
    buffer: HugeBuffer,
}

/// The panels of a [`PackedMatrix`], one after the other; per format as its kernels take them. The
/// bytes of the layouts are given in [`PackedMatrix::data`].
#[derive(Clone, Copy, Debug)]
pub enum PackedData<'a> {
    /// f32 weights.
    F32(&'a [f32]),
    /// bf16 bit patterns.
    Bf16(&'a [u16]),
    /// f16 bit patterns.
    F16(&'a [u16]),
    /// Blocks of 544 bytes, one per group of [`GROUP`](crate::GROUP) columns.
    Q8(&'a [u8]),
    /// Blocks of 288 bytes, one per group of [`GROUP`](crate::GROUP) columns.
    Q4(&'a [u8]),
}

/// Some consecutive panels of a matrix that is being loaded, for one thread.
#[derive(Debug)]
pub struct PanelChunk<'a> {
    format: WeightFormat,
    rows: usize,
    cols: usize,
    panels: Range<usize>,
    data: &'a mut [u8],
}

impl PackedMatrix {
    /// A zero matrix whose memory is not yet resident.
    pub fn allocate(format: WeightFormat, rows: usize, cols: usize) -> Self {
        Self { format, rows, cols, buffer: HugeBuffer::zeroed(format.packed_bytes(rows, cols)) }
    }

    /// Loads the matrices of `stack`, one below the other, on this thread.
    ///
    /// # Errors
    ///
    /// See [`PanelChunk::load`].
    ///
    /// # Panics
    ///
    /// If the matrices differ in their columns.
    pub fn load<M: MatrixSource>(format: WeightFormat, stack: &[M]) -> Result<Self, M::Error> {
        let rows = stack.iter().map(M::rows).sum();
        let cols = stack.first().map_or(0, M::cols);
        let mut packed = Self::allocate(format, rows, cols);
        packed.whole().load(stack)?;
        Ok(packed)
    }

    /// Packs row-major f32 weights `[rows, cols]`, rounded to `format`.
    ///
    /// # Errors
    ///
    /// If a weight is not finite, or too large for the format.
    ///
    /// # Panics
    ///
    /// If `weights` has another length than `rows * cols`.
    pub fn from_f32(
        format: WeightFormat,
        weights: &[f32],
        rows: usize,
        cols: usize,
    ) -> Result<Self, EncodeError> {
        Self::load(format, &[DenseMatrix::new(weights, rows, cols)])
    }

    /// The format in memory.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Rows (outputs).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (inputs).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Panels of [`PANEL`] rows, the last of which may be filled up with zero rows.
    pub fn panel_count(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Bytes of memory that the weights take.
    pub fn bytes(&self) -> usize {
        self.buffer.len()
    }

    /// The weights, panel by panel. Column k and row r of a panel are at
    ///
    /// - F32, F16: element `k·16 + r`;
    /// - Bf16: element `k·16 + 8·(r / 4 % 2) + 4·(r / 8) + r % 4`;
    /// - Q8: in block `k / 32` of 544 bytes: 16 f16 scales, then signed codes at byte `32 + (k/2 %
    ///   16)·32 + 2·r + k % 2`;
    /// - Q4: in block `k / 32` of 288 bytes: 16 words, then byte `32 + (k/4 % 8)·32 + 4·(r % 8) + k
    ///   % 4`, whose low nibble is for r < 8 and whose high nibble is for r ≥ 8. A word holds z =
    ///   0..=15 in the lowest 4 bits and above them bits 3..15 of the f16 scale, whose other bits
    ///   are 0; weight = scale · (nibble − 4 − z / 2).
    pub fn data(&self) -> PackedData<'_> {
        let bytes = self.buffer.bytes();
        match self.format {
            WeightFormat::F32 => PackedData::F32(bytemuck::cast_slice(bytes)),
            WeightFormat::Bf16 => PackedData::Bf16(bytemuck::cast_slice(bytes)),
            WeightFormat::F16 => PackedData::F16(bytemuck::cast_slice(bytes)),
            WeightFormat::Q8 => PackedData::Q8(bytes),
            WeightFormat::Q4 => PackedData::Q4(bytes),
        }
    }

    /// Writable pieces for the panel ranges `cuts`, which must be in order and apart; panels
    /// between them stay as they are.
    ///
    /// # Panics
    ///
    /// If the cuts overlap, run backwards or reach beyond the matrix.
    pub fn split_panels(&mut self, cuts: &[Range<usize>]) -> Vec<PanelChunk<'_>> {
        let (format, rows, cols, panels) = (self.format, self.rows, self.cols, self.panel_count());
        let panel_bytes = format.panel_bytes(cols);
        let mut rest = self.buffer.bytes_mut();
        let mut done = 0;
        cuts.iter()
            .map(|cut| {
                assert!(
                    done <= cut.start && cut.start <= cut.end,
                    "panels {cut:?} after panel {done}"
                );
                assert!(cut.end <= panels, "panels {cut:?} of {panels}");
                let (_, from) =
                    std::mem::take(&mut rest).split_at_mut((cut.start - done) * panel_bytes);
                let (data, after) = from.split_at_mut(cut.len() * panel_bytes);
                (rest, done) = (after, cut.end);
                PanelChunk { format, rows, cols, panels: cut.clone(), data }
            })
            .collect()
    }

    /// All panels in one piece.
    fn whole(&mut self) -> PanelChunk<'_> {
        let (format, rows, cols, panels) =
            (self.format, self.rows, self.cols, 0..self.panel_count());
        PanelChunk { format, rows, cols, panels, data: self.buffer.bytes_mut() }
    }

    /// Reads one row back as f32: `out` has [`Self::cols`] elements.
    ///
    /// # Panics
    ///
    /// If the row is out of range or `out` has another length.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        assert_eq!(out.len(), self.cols, "f32 values for a row of {} columns", self.cols);
        let bytes = self.format.panel_bytes(self.cols);
        let panel = &self.buffer.bytes()[row / PANEL * bytes..][..bytes];
        let r = row % PANEL;
        for (k, out) in out.iter_mut().enumerate() {
            *out = match self.format {
                WeightFormat::F32 => bytemuck::cast_slice::<u8, f32>(panel)[k * PANEL + r],
                WeightFormat::F16 => {
                    f16::from_bits(bytemuck::cast_slice::<u8, u16>(panel)[k * PANEL + r]).to_f32()
                }
                WeightFormat::Bf16 => bf16::from_bits(
                    bytemuck::cast_slice::<u8, u16>(panel)[k * PANEL + slot_bf16(r)],
                )
                .to_f32(),
                WeightFormat::Q8 => weight_q8(panel, k, r),
                WeightFormat::Q4 => weight_q4(panel, k, r),
            };
        }
    }
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedMatrix({} [{}, {}])", self.format, self.rows, self.cols)
    }
}

impl PanelChunk<'_> {
    /// The panels of this chunk.
    pub fn panels(&self) -> Range<usize> {
        self.panels.clone()
    }

    /// Sets every byte of the panels, which makes their memory resident, near the thread that
    /// calls.
    pub fn fill(self, byte: u8) {
        self.data.fill(byte);
    }

    /// Fills the panels with their rows of `stack`, matrices one below the other that together are
    /// the packed matrix; reads only those rows, converts them if they are stored in another
    /// format, and needs the memory of about one panel. Returns what was rounded.
    ///
    /// # Errors
    ///
    /// If weights cannot be read, are not finite, or are too large for the format.
    ///
    /// # Panics
    ///
    /// If the matrices of `stack` do not have the packed matrix's columns, or not its rows in all.
    pub fn load<M: MatrixSource>(self, stack: &[M]) -> Result<Rounding, M::Error> {
        let rows: usize = stack.iter().map(M::rows).sum();
        assert_eq!(rows, self.rows, "rows of the stack, rows of the packed matrix");
        for matrix in stack {
            assert_eq!(matrix.cols(), self.cols, "columns of the stack, of the packed matrix");
        }
        if self.data.is_empty() {
            return Ok(Rounding::default());
        }
        let mut packer = Packer::new(self.format, self.cols, stack);
        let panel_bytes = self.format.panel_bytes(self.cols);
        for (panel, data) in self.panels.zip(self.data.chunks_exact_mut(panel_bytes)) {
            packer.pack(panel, data)?;
        }
        Ok(packer.rounding())
    }
}
