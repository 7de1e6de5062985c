//! Groups of 32 weights in 8 or 4 bits: what `quantize` writes, and GGUF's Q8_0.

use std::{ops::Range, path::Path};

use half::f16;
use tensor::{GROUP, WeightFormat, decode_row};

use crate::{
    CheckpointError,
    matrix::{Scratch, Stored},
    region::Region,
};

/// A matrix of groups of 32 weights, in the encoding of [`tensor::encode_rows`].
#[derive(Debug)]
pub(crate) struct Group32 {
    region: Region,
    format: WeightFormat,
    cols: usize,
}

impl Group32 {
    /// `region` holds rows of whole groups that cover `cols` columns; `format` is quantized.
    pub(crate) fn new(region: Region, format: WeightFormat, cols: usize) -> Self {
        assert_eq!(Some(region.row_bytes), format.stored_row_bytes(cols), "checked by the header");
        Self { region, format, cols }
    }

    /// Reads the groups that cover the columns.
    fn read(
        &self,
        rows: Range<usize>,
        groups: Range<usize>,
        out: &mut [u8],
        merged: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let size = self.format.group_bytes().expect("a quantized format");
        let span = groups.start * size..groups.end * size;
        self.region.read(rows.clone(), span, out, merged)?;
        for (index, block) in out.chunks_exact(size).enumerate() {
            let word = u16::from_le_bytes([block[0], block[1]]);
            let scale = match self.format {
                WeightFormat::Q8 => f16::from_bits(word),
                // Above a q4 scale, which has no sign, lies the zero point's word.
                _ => f16::from_bits(word >> 1 & 0x7ff8),
            };
            if !scale.is_finite() {
                let row = rows.start + index / groups.len();
                return Err(self.region.not_finite(row, scale.to_f32()));
            }
        }
        Ok(())
    }
}

fn groups(cols: &Range<usize>) -> Range<usize> {
    cols.start / GROUP..cols.end.div_ceil(GROUP)
}

impl Stored for Group32 {
    fn name(&self) -> &str {
        &self.region.name
    }

    fn file(&self) -> &Path {
        self.region.path()
    }

    fn shape(&self) -> [usize; 2] {
        [self.region.rows, self.cols]
    }

    fn packed_format(&self) -> WeightFormat {
        self.format
    }

    /// Where the first column begins a group the stored codes are the weights; elsewhere weights
    /// would have to be quantized anew.
    fn exact_format(&self, cols: &Range<usize>) -> WeightFormat {
        if cols.start.is_multiple_of(GROUP) { self.format } else { WeightFormat::F32 }
    }

    fn read_f32(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        let groups = groups(&cols);
        let row_bytes = groups.len() * self.format.group_bytes().expect("a quantized format");
        let Scratch { merged, encoded, values, .. } = scratch;
        let bytes = encoded.bytes(rows.len() * row_bytes);
        self.read(rows, groups.clone(), bytes, merged)?;
        values.resize(groups.len() * GROUP, 0.0);
        let skipped = cols.start - groups.start * GROUP;
        for (bytes, out) in bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(cols.len())) {
            decode_row(self.format, bytes, values);
            out.copy_from_slice(&values[skipped..][..cols.len()]);
        }
        Ok(())
    }

    fn read_encoded(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [u8],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        self.read(rows, groups(&cols), out, &mut scratch.merged)
    }
}
