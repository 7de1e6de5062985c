//! Fills one panel at a time from the file: read 16 rows, convert them if need be, interleave.

use half::{
    bf16, f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};

use crate::{
    CheckpointError, GROUP, Matrix, PANEL, WeightFormat,
    matrix::Scratch,
    panel::{BLOCK_Q4, BLOCK_Q8, interleave, interleave_bf16, pack_q4, pack_q8},
    quantize::{GroupQ8, load_q4, load_q8, quantize_group_q4, quantize_group_q8},
};

/// One thread's way from stored rows to panels. Its memory is that of one panel, in two or three
/// forms.
pub(crate) struct Packer<'a> {
    format: WeightFormat,
    cols: usize,
    stack: &'a [Matrix],
    route: Route,
    scratch: Scratch,
    /// `[16, cols]` in the form that the route needs.
    floats: Vec<f32>,
    bits: Vec<u16>,
    /// `[16, groups]` stored groups.
    blocks: Vec<u8>,
}

/// What a panel goes through.
#[derive(Clone, Copy)]
enum Route {
    /// 16-bit patterns, kept as they are.
    Bits,
    /// Stored groups, kept as they are.
    Groups,
    /// f32, converted where the format asks for it.
    Floats,
}

impl<'a> Packer<'a> {
    /// For panels in `format` of the rows of `stack`, which all have `cols` columns.
    pub(crate) fn new(format: WeightFormat, cols: usize, stack: &'a [Matrix]) -> Self {
        let same = stack.iter().all(|matrix| matrix.format() == format);
        let route = match format {
            WeightFormat::Bf16 | WeightFormat::F16 if same => Route::Bits,
            WeightFormat::Q8 | WeightFormat::Q4
                if same && stack.iter().all(Matrix::starts_on_group) =>
            {
                Route::Groups
            }
            _ => Route::Floats,
        };
        let mut packer = Self {
            format,
            cols,
            stack,
            route,
            scratch: Scratch::default(),
            floats: Vec::new(),
            bits: Vec::new(),
            blocks: Vec::new(),
        };
        match route {
            Route::Bits => packer.bits = vec![0; PANEL * cols],
            Route::Groups => packer.blocks = vec![0; format.panel_bytes(cols)],
            Route::Floats => packer.floats = vec![0.0; PANEL * cols],
        }
        packer
    }

    /// Reads the rows of panel `panel` and writes `data`, the panel's bytes.
    pub(crate) fn pack(&mut self, panel: usize, data: &mut [u8]) -> Result<(), CheckpointError> {
        self.read(panel)?;
        let cols = self.cols;
        match (self.route, self.format) {
            (_, WeightFormat::F32) => {
                interleave(&self.floats, cols, bytemuck::cast_slice_mut(data))
            }
            (Route::Bits, _) => self.interleave_bits(data),
            (Route::Groups, WeightFormat::Q8) => {
                for (g, block) in data.chunks_exact_mut(BLOCK_Q8).enumerate() {
                    pack_q8(
                        &std::array::from_fn(|r| {
                            mask_q8(load_q8(self.block(r, g)), cols - g * GROUP)
                        }),
                        block,
                    );
                }
            }
            (Route::Groups, _) => {
                for (g, block) in data.chunks_exact_mut(BLOCK_Q4).enumerate() {
                    pack_q4(&std::array::from_fn(|r| load_q4(self.block(r, g))), block);
                }
            }
            (Route::Floats, WeightFormat::Bf16 | WeightFormat::F16) => {
                self.round(panel)?;
                self.interleave_bits(data);
            }
            (Route::Floats, WeightFormat::Q8) => {
                for (g, block) in data.chunks_exact_mut(BLOCK_Q8).enumerate() {
                    pack_q8(&self.quantize(panel, g, quantize_group_q8)?, block);
                }
            }
            (Route::Floats, WeightFormat::Q4) => {
                for (g, block) in data.chunks_exact_mut(BLOCK_Q4).enumerate() {
                    pack_q4(&self.quantize(panel, g, quantize_group_q4)?, block);
                }
            }
        }
        Ok(())
    }

    /// Reads the panel's rows into the tile of the route; rows beyond the stack become zero
    /// weights.
    fn read(&mut self, panel: usize) -> Result<(), CheckpointError> {
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
            match self.route {
                Route::Bits => {
                    let tile = &mut self.bits[tile.start * self.cols..tile.end * self.cols];
                    matrix.read_bits(start..end, tile, &mut self.scratch)?;
                }
                Route::Groups => {
                    let bytes = self.blocks.len() / PANEL;
                    let tile = &mut self.blocks[tile.start * bytes..tile.end * bytes];
                    matrix.read_groups(start..end, tile, &mut self.scratch)?;
                }
                Route::Floats => {
                    let tile = &mut self.floats[tile.start * self.cols..tile.end * self.cols];
                    matrix.read_f32(start..end, tile, &mut self.scratch)?;
                }
            }
        }
        if filled < PANEL {
            let row_bytes = self.blocks.len() / PANEL;
            match self.route {
                Route::Bits => self.bits[filled * self.cols..].fill(0),
                Route::Floats => self.floats[filled * self.cols..].fill(0.0),
                // Scales of 0.
                Route::Groups => self.blocks[filled * row_bytes..].fill(0),
            }
        }
        Ok(())
    }

    fn interleave_bits(&self, data: &mut [u8]) {
        let panel = bytemuck::cast_slice_mut(data);
        match self.format {
            WeightFormat::Bf16 => interleave_bf16(&self.bits, self.cols, panel),
            _ => interleave(&self.bits, self.cols, panel),
        }
    }

    /// The f32 tile to 16-bit patterns.
    fn round(&mut self, panel: usize) -> Result<(), CheckpointError> {
        self.bits.resize(self.floats.len(), 0);
        if self.format == WeightFormat::Bf16 {
            self.bits.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(&self.floats);
            return Ok(());
        }
        self.bits.reinterpret_cast_mut::<f16>().convert_from_f32_slice(&self.floats);
        // A bf16 or f32 weight beyond 65504 would silently become infinite.
        let lost =
            |(&from, &to): (&f32, &u16)| from.is_finite() && f16::from_bits(to).is_infinite();
        match self.floats.iter().zip(&self.bits).position(lost) {
            Some(index) => {
                Err(self.not_representable(panel, index / self.cols, self.floats[index]))
            }
            None => Ok(()),
        }
    }

    /// Quantizes group `g` of the 16 rows of the f32 tile.
    fn quantize<G: Copy + Default>(
        &self,
        panel: usize,
        g: usize,
        quantize_group: impl Fn(&[f32; GROUP]) -> Option<G>,
    ) -> Result<[G; PANEL], CheckpointError> {
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
        }
        Ok(groups)
    }

    fn block(&self, r: usize, g: usize) -> &[u8] {
        let group = self.format.group_bytes().expect("a quantized format");
        let row_bytes = self.blocks.len() / PANEL;
        &self.blocks[r * row_bytes + g * group..][..group]
    }

    fn not_representable(&self, panel: usize, r: usize, found: f32) -> CheckpointError {
        let mut row = panel * PANEL + r;
        for matrix in self.stack {
            if row < matrix.rows() {
                return CheckpointError::NotRepresentable {
                    file: matrix.file().to_owned(),
                    tensor: matrix.name().to_owned(),
                    row: matrix.stored_row(row),
                    found,
                    format: self.format,
                };
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
