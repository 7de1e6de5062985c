//! Plain elements: F32, BF16 and F16.

use std::{ops::Range, path::Path};

use half::{
    bf16, f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};
use tensor::WeightFormat;

use crate::{
    CheckpointError,
    matrix::{Scratch, Stored},
    region::Region,
};

/// A matrix of plain elements, row by row.
#[derive(Debug)]
pub(crate) struct Float {
    region: Region,
    format: WeightFormat,
    cols: usize,
}

impl Float {
    /// `region` holds rows of `cols` elements of `format`, which is not quantized.
    pub(crate) fn new(region: Region, format: WeightFormat, cols: usize) -> Self {
        assert_eq!(Some(region.row_bytes), format.stored_row_bytes(cols), "checked by the header");
        Self { region, format, cols }
    }

    /// Reads elements, and names the first one that is NaN or infinite: softmax and rounding to
    /// integers pass over a NaN, and the result looks like an answer.
    fn read(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [u8],
        merged: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        let size = self.format.element_bytes();
        let width = cols.len();
        self.region.read(rows.clone(), cols.start * size..cols.end * size, out, merged)?;
        match find_not_finite(self.format, out) {
            None => Ok(()),
            Some((index, found)) => Err(self.region.not_finite(rows.start + index / width, found)),
        }
    }
}

impl Stored for Float {
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

    fn exact_format(&self, _: &Range<usize>) -> WeightFormat {
        self.format
    }

    fn read_f32(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(), CheckpointError> {
        if self.format == WeightFormat::F32 {
            return self.read(rows, cols, bytemuck::cast_slice_mut(out), &mut scratch.merged);
        }
        let Scratch { merged, encoded, .. } = scratch;
        let bytes = encoded.bytes(out.len() * self.format.element_bytes());
        self.read(rows, cols, bytes, merged)?;
        let bits: &[u16] = bytemuck::cast_slice(bytes);
        match self.format {
            WeightFormat::Bf16 => bits.reinterpret_cast::<bf16>().convert_to_f32_slice(out),
            _ => bits.reinterpret_cast::<f16>().convert_to_f32_slice(out),
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
        self.read(rows, cols, out, &mut scratch.merged)
    }
}

/// The first element that is NaN or infinite, and its index.
fn find_not_finite(format: WeightFormat, stored: &[u8]) -> Option<(usize, f32)> {
    fn find<const N: usize>(stored: &[u8], value: impl Fn([u8; N]) -> f32) -> Option<(usize, f32)> {
        let mut values = stored.as_chunks::<N>().0.iter().map(|bytes| value(*bytes)).enumerate();
        values.find(|(_, value)| !value.is_finite())
    }
    // All ones in the exponent. Without an early end, because that is what becomes vector
    // instructions.
    let any_16 = |ones: u16| {
        let halves = stored.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
        halves.fold(false, |any, bits| any | (bits & ones == ones))
    };
    match format {
        WeightFormat::Bf16 => {
            any_16(0x7f80).then(|| find(stored, |bytes| bf16::from_le_bytes(bytes).to_f32()))?
        }
        WeightFormat::F16 => {
            any_16(0x7c00).then(|| find(stored, |bytes| f16::from_le_bytes(bytes).to_f32()))?
        }
        _ => {
            let bits = stored.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
            let any = bits.fold(false, |any, bits| any | (bits & 0x7f80_0000 == 0x7f80_0000));
            any.then(|| find(stored, f32::from_le_bytes))?
        }
    }
}
