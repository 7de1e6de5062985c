//! Activations prepared once for many matmuls: packed into row tiles, as f32 or quantized per group.

use std::ops::Range;

use crate::isa::Isa;
use crate::pack::{pack_float, pack_int8, pack_int16};
use crate::panels::{GROUP, PanelData};

/// How activations are prepared; the weight format decides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InputKind {
    /// f32, for F32, Bf16 and F16 weights.
    Float,
    /// int16 in -32767..=32767 with an f32 scale per token and group of 32, for Q8 weights. The rounding error is
    /// 2^-16 of the group's largest value, far below that of the weights.
    Int16,
    /// int8 in -127..=127 with an f32 scale per token and group of 32, for Q4 weights.
    Int8,
}

impl InputKind {
    /// The kind that weights of this format multiply.
    pub fn of(data: &PanelData<'_>) -> InputKind {
        match data {
            PanelData::F32(_) | PanelData::Bf16(_) | PanelData::F16(_) => InputKind::Float,
            PanelData::Q8(_) => InputKind::Int16,
            PanelData::Q4(_) => InputKind::Int8,
        }
    }
}

/// Activations `[tokens, cols]` in the order in which the kernels read them. Reusable; owns its buffers.
///
/// Six tokens make a tile (the last one may be shorter, `m` tokens). A tile is contiguous:
/// - Float: `x[m k + i]` for column k and token i of the tile;
/// - Int16: column pairs, `x[2 (m (k / 2) + i) + k % 2]`;
/// - Int8: column quads, `x[4 (m (k / 4) + i) + k % 4]`;
///
/// and `scales[m (k / 32) + i]` for the quantized kinds. Their last group is filled up with zeros.
#[derive(Debug)]
pub struct Input {
    kind: InputKind,
    tokens: usize,
    cols: usize,
    float: Vec<f32>,
    int16: Vec<i16>,
    int8: Vec<i8>,
    scales: Vec<f32>,
    zeros: Vec<[i16; 2]>,
}

/// One tile of activations; all slices hold the whole tile.
#[derive(Clone, Copy)]
pub(crate) struct FloatTile<'a> {
    /// `[cols, m]`
    pub x: &'a [f32],
    /// Tokens, 1..=6.
    pub m: usize,
}

/// One tile of int16 activations.
#[derive(Clone, Copy)]
pub(crate) struct Int16Tile<'a> {
    /// `[groups, 16, m, 2]`
    pub x: &'a [i16],
    /// `[groups, m]`
    pub scales: &'a [f32],
    /// Tokens, 1..=6.
    pub m: usize,
}

/// One tile of int8 activations.
#[derive(Clone, Copy)]
pub(crate) struct Int8Tile<'a> {
    /// `[groups, 8, m, 4]`
    pub x: &'a [i8],
    /// `[groups, m]`
    pub scales: &'a [f32],
    /// `[groups, m]`: -8 times the sum of the columns with k % 4 in {0, 1}, and of those in {2, 3}. A sum of
    /// products with unsigned nibbles that starts from these is a sum of products with nibbles minus 8.
    pub zeros: &'a [[i16; 2]],
    /// Tokens, 1..=6.
    pub m: usize,
}

impl Default for Input {
    fn default() -> Input {
        Input::new()
    }
}

impl Input {
    /// Tokens of a full tile. Threads that fill one input together cut it at multiples of this.
    pub const TILE: usize = 6;

    /// No tokens yet.
    pub fn new() -> Input {
        Input {
            kind: InputKind::Float,
            tokens: 0,
            cols: 0,
            float: Vec::new(),
            int16: Vec::new(),
            int8: Vec::new(),
            scales: Vec::new(),
            zeros: Vec::new(),
        }
    }

    /// How the activations are held.
    pub fn kind(&self) -> InputKind {
        self.kind
    }

    /// Rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Columns: the `cols` of the weights.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Packs `x [tokens, cols]` on this thread.
    ///
    /// # Panics
    /// When the length of `x` is not `tokens * cols`.
    pub fn prepare(&mut self, isa: Isa, kind: InputKind, x: &[f32], tokens: usize, cols: usize) {
        self.reset(kind, tokens, cols);
        self.part(0..tokens).0.fill(isa, x);
    }

    /// Makes room for `[tokens, cols]`; the contents are unspecified until all parts of a [`Input::split`] are filled.
    pub fn reset(&mut self, kind: InputKind, tokens: usize, cols: usize) {
        (self.kind, self.tokens, self.cols) = (kind, tokens, cols);
        let groups = tokens * cols.div_ceil(GROUP);
        match kind {
            InputKind::Float => self.float.resize(tokens * cols, 0.0),
            InputKind::Int16 => {
                self.int16.resize(groups * GROUP, 0);
                self.scales.resize(groups, 0.0);
            }
            InputKind::Int8 => {
                self.int8.resize(groups * GROUP, 0);
                self.scales.resize(groups, 0.0);
                self.zeros.resize(groups, [0; 2]);
            }
        }
    }

    /// Cuts the tokens into parts that different threads fill.
    ///
    /// # Panics
    /// When `cuts` do not cover `0..tokens` in order, or a cut is not at a multiple of [`Input::TILE`].
    pub fn split(&mut self, cuts: &[Range<usize>]) -> Vec<InputPart<'_>> {
        let tokens = self.tokens;
        let mut parts = Vec::with_capacity(cuts.len());
        let (_, mut rest) = self.part(0..0);
        let mut next = 0;
        for cut in cuts {
            assert!(
                cut.start == next && cut.end >= next && cut.end <= tokens,
                "cut {cut:?} does not continue at token {next} of {tokens}"
            );
            assert!(
                cut.end % Input::TILE == 0 || cut.end == tokens,
                "cut at token {}, which is neither a multiple of {} nor the last of {tokens}",
                cut.end,
                Input::TILE
            );
            let (part, after) = rest.split_at(cut.len());
            parts.push(part);
            (rest, next) = (after, cut.end);
        }
        assert!(next == tokens, "the cuts end at token {next} of {tokens}");
        parts
    }

    fn part(&mut self, tokens: Range<usize>) -> (InputPart<'_>, InputPart<'_>) {
        let groups = self.tokens * self.cols.div_ceil(GROUP);
        let data = match self.kind {
            InputKind::Float => PartData::Float(&mut self.float[..self.tokens * self.cols]),
            InputKind::Int16 => PartData::Int16(
                &mut self.int16[..groups * GROUP],
                &mut self.scales[..groups],
            ),
            InputKind::Int8 => PartData::Int8(
                &mut self.int8[..groups * GROUP],
                &mut self.scales[..groups],
                &mut self.zeros[..groups],
            ),
        };
        InputPart {
            tokens: self.tokens,
            cols: self.cols,
            data,
        }
        .split_at(tokens.end)
    }

    /// Tiles: `ceil(tokens / 6)`.
    pub(crate) fn tiles(&self) -> usize {
        self.tokens.div_ceil(Input::TILE)
    }

    /// Tokens of tile `tile`.
    pub(crate) fn tile_tokens(&self, tile: usize) -> Range<usize> {
        tile * Input::TILE..((tile + 1) * Input::TILE).min(self.tokens)
    }

    pub(crate) fn float_tile(&self, tile: usize) -> FloatTile<'_> {
        debug_assert_eq!(self.kind, InputKind::Float);
        let t = self.tile_tokens(tile);
        FloatTile {
            x: &self.float[t.start * self.cols..t.end * self.cols],
            m: t.len(),
        }
    }

    pub(crate) fn int16_tile(&self, tile: usize) -> Int16Tile<'_> {
        debug_assert_eq!(self.kind, InputKind::Int16);
        let (t, groups) = (self.tile_tokens(tile), self.cols.div_ceil(GROUP));
        let range = t.start * groups..t.end * groups;
        Int16Tile {
            x: &self.int16[range.start * GROUP..range.end * GROUP],
            scales: &self.scales[range],
            m: t.len(),
        }
    }

    pub(crate) fn int8_tile(&self, tile: usize) -> Int8Tile<'_> {
        debug_assert_eq!(self.kind, InputKind::Int8);
        let (t, groups) = (self.tile_tokens(tile), self.cols.div_ceil(GROUP));
        let range = t.start * groups..t.end * groups;
        Int8Tile {
            x: &self.int8[range.start * GROUP..range.end * GROUP],
            scales: &self.scales[range.clone()],
            zeros: &self.zeros[range],
            m: t.len(),
        }
    }
}

/// Some tokens of an [`Input`], to be filled by one thread.
#[derive(Debug)]
pub struct InputPart<'a> {
    tokens: usize,
    cols: usize,
    data: PartData<'a>,
}

#[derive(Debug)]
enum PartData<'a> {
    Float(&'a mut [f32]),
    Int16(&'a mut [i16], &'a mut [f32]),
    Int8(&'a mut [i8], &'a mut [f32], &'a mut [[i16; 2]]),
}

impl<'a> InputPart<'a> {
    /// Tokens of this part.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Packs `x [tokens of this part, cols]`.
    ///
    /// # Panics
    /// When the length of `x` differs.
    pub fn fill(self, isa: Isa, x: &[f32]) {
        let (tokens, cols) = (self.tokens, self.cols);
        assert!(
            x.len() == tokens * cols,
            "[{tokens}, {cols}] activations, got {} numbers",
            x.len()
        );
        if x.is_empty() {
            return;
        }
        let (rows, groups) = (
            x.chunks(Input::TILE * cols),
            Input::TILE * cols.div_ceil(GROUP),
        );
        match self.data {
            PartData::Float(out) => {
                for (rows, out) in rows.zip(out.chunks_mut(Input::TILE * cols)) {
                    pack_float(isa, rows, cols, out);
                }
            }
            PartData::Int16(out, scales) => {
                let tiles = out
                    .chunks_mut(groups * GROUP)
                    .zip(scales.chunks_mut(groups));
                for (rows, (out, scales)) in rows.zip(tiles) {
                    pack_int16(isa, rows, cols, out, scales);
                }
            }
            PartData::Int8(out, scales, zeros) => {
                let tiles = out
                    .chunks_mut(groups * GROUP)
                    .zip(scales.chunks_mut(groups));
                for (rows, ((out, scales), zeros)) in rows.zip(tiles.zip(zeros.chunks_mut(groups)))
                {
                    pack_int8(isa, rows, cols, out, scales, zeros);
                }
            }
        }
    }

    fn split_at(self, tokens: usize) -> (InputPart<'a>, InputPart<'a>) {
        let cols = self.cols;
        let groups = tokens * cols.div_ceil(GROUP);
        let (left, right) = match self.data {
            PartData::Float(x) => {
                let (a, b) = x.split_at_mut(tokens * cols);
                (PartData::Float(a), PartData::Float(b))
            }
            PartData::Int16(x, scales) => {
                let ((a, b), (s, t)) =
                    (x.split_at_mut(groups * GROUP), scales.split_at_mut(groups));
                (PartData::Int16(a, s), PartData::Int16(b, t))
            }
            PartData::Int8(x, scales, zeros) => {
                let ((a, b), (s, t)) =
                    (x.split_at_mut(groups * GROUP), scales.split_at_mut(groups));
                let (y, z) = zeros.split_at_mut(groups);
                (PartData::Int8(a, s, y), PartData::Int8(b, t, z))
            }
        };
        (
            InputPart {
                tokens,
                cols,
                data: left,
            },
            InputPart {
                tokens: self.tokens - tokens,
                cols,
                data: right,
            },
        )
    }
}
