//! Fills one panel at a time: read 16 rows, round them if need be, interleave.

use half::{
    bf16, f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};

use crate::{
    EncodeError, GROUP, MatrixSource, PANEL, Rounding, WeightFormat,
    panel::{BLOCK_Q4, BLOCK_Q8, interleave, interleave_bf16, pack_q4, pack_q8},
    quantize::{GroupQ4, GroupQ8, load_q4, load_q8, quantize_group_q4, quantize_group_q8},
};

/// One thread's way from the rows of a source to panels. Its memory is that of one panel, in two or
/// three forms.
pub(crate) struct Packer<'a, M: MatrixSource> {
    format: WeightFormat,
    cols: usize,
    stack: &'a [M],
    /// Whether every matrix represents its weights exactly in `format`; then they are copied in
    /// their encoded form.
    exact: bool,
    scratch: M::Scratch,
    /// `[16, cols]`, unless all are exact.
    floats: Vec<f32>,
    /// `[16, cols]` 16-bit patterns.
    bits: Vec<u16>,
    /// `[16, groups]` encoded groups.
    blocks: Vec<u8>,
    rounding: Rounding,
}

impl<'a, M: MatrixSource> Packer<'a, M> {
    /// For panels in `format` of the rows of `stack`, which all have `cols` columns.
    pub(crate) fn new(format: WeightFormat, cols: usize, stack: &'a [M]) -> Self {
        let exact = format != WeightFormat::F32
            && stack.iter().all(|matrix| matrix.exact_format() == format);
        let mut packer = Self {
            format,
            cols,
            stack,
            exact,
            scratch: M::Scratch::default(),
            floats: Vec::new(),
            bits: Vec::new(),
            blocks: Vec::new(),
            rounding: Rounding::default(),
        };
        match (exact, format.is_quantized()) {
            (true, false) => packer.bits = vec![0; PANEL * cols],
            (true, true) => packer.blocks = vec![0; format.panel_bytes(cols)],
            (false, _) => packer.floats = vec![0.0; PANEL * cols],
        }
        packer
    }

    /// What was rounded so far.
    pub(crate) fn rounding(&self) -> Rounding {
        self.rounding
    }

    /// Reads the rows of panel `panel` and writes `data`, the panel's bytes.
    pub(crate) fn pack(&mut self, panel: usize, data: &mut [u8]) -> Result<(), M::Error> {
        self.read(panel)?;
        let cols = self.cols;
        match (self.exact, self.format) {
            (_, WeightFormat::F32) => {
                interleave(&self.floats, cols, bytemuck::cast_slice_mut(data));
            }
            (exact, WeightFormat::Bf16 | WeightFormat::F16) => {
                if !exact {
                    self.round(panel)?;
                }
                let panel = bytemuck::cast_slice_mut(data);
                match self.format {
                    WeightFormat::Bf16 => interleave_bf16(&self.bits, cols, panel),
                    _ => interleave(&self.bits, cols, panel),
                }
            }
            (true, WeightFormat::Q8) => {
                for (g, block) in data.chunks_exact_mut(BLOCK_Q8).enumerate() {
                    let group = |r| mask_q8(load_q8(self.block(r, g)), cols - g * GROUP);
                    pack_q8(&std::array::from_fn(group), block);
                }
            }
            (true, WeightFormat::Q4) => {
                for (g, block) in data.chunks_exact_mut(BLOCK_Q4).enumerate() {
                    pack_q4(&std::array::from_fn(|r| load_q4(self.block(r, g))), block);
                }
            }
            (false, WeightFormat::Q8) => {
                for (g, block) in data.chunks_exact_mut(BLOCK_Q8).enumerate() {
                    let groups = self.quantize(panel, g, quantize_group_q8, |group| {
                        let scale = group.scale.to_f32();
                        group.codes.map(|code| scale * f32::from(code))
                    })?;
                    pack_q8(&groups, block);
                }
            }
            (false, WeightFormat::Q4) => {
                for (g, block) in data.chunks_exact_mut(BLOCK_Q4).enumerate() {
                    pack_q4(&self.quantize(panel, g, quantize_group_q4, GroupQ4::weights)?, block);
                }
            }
        }
        Ok(())
    }

    /// Reads the panel's rows; rows beyond the stack become zero weights.
    fn read(&mut self, panel: usize) -> Result<(), M::Error> {
        let (cols, row_bytes) = (self.cols, self.blocks.len() / PANEL);
        let mut filled = 0;
        let mut above = 0;
        for matrix in self.stack {
            // Rows of this matrix in the panel, counted from the matrix' first row.
            let start = (panel * PANEL).max(above) - above;
            let end = ((panel + 1) * PANEL).min(above + matrix.rows()).saturating_sub(above);
            above += matrix.rows();
            if start >= end {
                continue;
            }
            let tile = filled..filled + end - start;
            filled = tile.end;
            let scratch = &mut self.scratch;
            if !self.exact {
                let tile = &mut self.floats[tile.start * cols..tile.end * cols];
                matrix.read_f32(start..end, tile, scratch)?;
            } else if self.format.is_quantized() {
                let tile = &mut self.blocks[tile.start * row_bytes..tile.end * row_bytes];
                matrix.read_encoded(start..end, tile, scratch)?;
            } else {
                let tile = &mut self.bits[tile.start * cols..tile.end * cols];
                matrix.read_encoded(start..end, bytemuck::cast_slice_mut(tile), scratch)?;
            }
        }
        if filled < PANEL {
            // Encoded groups of zero bytes have scale 0.
            self.blocks[filled * row_bytes..].fill(0);
            let elements = |len: usize| (filled * cols).min(len);
            let (bits, floats) = (elements(self.bits.len()), elements(self.floats.len()));
            self.bits[bits..].fill(0);
            self.floats[floats..].fill(0.0);
        }
        Ok(())
    }

    /// Rounds the f32 tile to 16-bit patterns.
    fn round(&mut self, panel: usize) -> Result<(), M::Error> {
        self.bits.resize(self.floats.len(), 0);
        if self.format == WeightFormat::Bf16 {
            self.bits.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(&self.floats);
        } else {
            self.bits.reinterpret_cast_mut::<f16>().convert_from_f32_slice(&self.floats);
        }
        match self.format {
            WeightFormat::Bf16 => {
                let values = self.bits.iter().map(|bits| bf16::from_bits(*bits).to_f32());
                self.rounding.add(&self.floats, values);
            }
            _ => {
                let values = self.bits.iter().map(|bits| f16::from_bits(*bits).to_f32());
                self.rounding.add(&self.floats, values);
            }
        }
        // A weight beyond the format's range would silently become infinite.
        let infinite = if self.format == WeightFormat::Bf16 { 0x7f80 } else { 0x7c00 };
        match self.bits.iter().position(|bits| bits & 0x7fff == infinite) {
            Some(index) => {
                Err(self.not_representable(panel, index / self.cols, self.floats[index]))
            }
            None => Ok(()),
        }
    }

    /// Quantizes group `g` of the 16 rows of the f32 tile.
    fn quantize<G: Copy + Default>(
        &mut self,
        panel: usize,
        g: usize,
        quantize_group: impl Fn(&[f32; GROUP]) -> Option<G>,
        weights_of: impl Fn(&G) -> [f32; GROUP],
    ) -> Result<[G; PANEL], M::Error> {
        let cols = g * GROUP..((g + 1) * GROUP).min(self.cols);
        let mut groups = [G::default(); PANEL];
        for (r, group) in groups.iter_mut().enumerate() {
            let row = &self.floats[r * self.cols..][cols.clone()];
            let mut weights = [0.0; GROUP];
            weights[..row.len()].copy_from_slice(row);
            *group = quantize_group(&weights).ok_or_else(|| {
                let largest = row.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs()));
                self.not_representable(panel, r, largest.unwrap_or_default())
            })?;
            let rounded = weights_of(group);
            self.rounding.add(row, rounded.into_iter());
            if rounded == [0.0; GROUP] && weights != rounded {
                self.rounding.vanished += 1;
            }
        }
        Ok(groups)
    }

    fn block(&self, r: usize, g: usize) -> &[u8] {
        let group = self.format.group_bytes().expect("a quantized format");
        let row_bytes = self.blocks.len() / PANEL;
        &self.blocks[r * row_bytes + g * group..][..group]
    }

    fn not_representable(&self, panel: usize, r: usize, found: f32) -> M::Error {
        let mut row = panel * PANEL + r;
        for matrix in self.stack {
            if row < matrix.rows() {
                let format = self.format;
                return matrix.not_representable(EncodeError { row, found, format });
            }
            row -= matrix.rows();
        }
        unreachable!("row {} of a panel beyond the stack is zero", panel * PANEL + r)
    }
}

/// Codes beyond the columns of a rectangle belong to its neighbour.
fn mask_q8(mut group: GroupQ8, cols: usize) -> GroupQ8 {
    group.codes[cols.min(GROUP)..].fill(0);
    group
}
