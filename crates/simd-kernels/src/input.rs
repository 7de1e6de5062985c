//! Activations prepared once for many matmuls: packed into row tiles, as f32 or quantized per
//! group.

use std::ops::Range;

use crate::isa::Isa;
use crate::pack::{pack_bf16, pack_float, pack_int8, pack_int16};
use crate::panels::{GROUP, PanelData};

/// How activations are prepared. The weight format and the instruction set decide, and never the
/// number of tokens: the result for a token does not depend on the tokens beside it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InputKind {
    /// f32, for F32, Bf16 and F16 weights.
    Float,
    /// bf16, the nearest even of two, for Bf16 weights where AVX512-BF16 multiplies pairs of them
    /// ([`Isa::has_bf16_dot`]), by choice of the caller. The rounding error is 2^-9 of each
    /// activation.
    Bf16,
    /// int16 in -32767..=32767 with an f32 scale per token and group of 32, for Q8 weights without
    /// AVX-512. The rounding error is 2^-16 of the group's largest value, far below that of the
    /// weights.
    Int16,
    /// int8 in -127..=127 with an f32 scale per token and group of 32, for Q4 weights, and for Q8
    /// weights with AVX-512, which multiplies twice as many of them. The rounding error is that of
    /// Q8 weights.
    Int8,
}

impl InputKind {
    /// The kind that weights of this format multiply, unless the caller chooses
    /// [`InputKind::Bf16`].
    pub fn of(isa: Isa, data: &PanelData<'_>) -> InputKind {
        match data {
            PanelData::F32(_) | PanelData::Bf16(_) | PanelData::F16(_) => InputKind::Float,
            PanelData::Q8(_) if isa.has_avx512() => InputKind::Int8,
            PanelData::Q8(_) => InputKind::Int16,
            PanelData::Q4(_) => InputKind::Int8,
        }
    }

    /// 32-bit words of one token and group.
    pub(crate) fn words_per_group(self) -> usize {
        match self {
            InputKind::Float => 0,
            InputKind::Int16 | InputKind::Bf16 => GROUP / 2,
            InputKind::Int8 => GROUP / 4,
        }
    }
}

/// Activations `[tokens, cols]` in the order in which the kernels read them. Reusable; owns its
/// buffers.
///
/// Six tokens make a tile (the last one may be shorter, `m` tokens). A tile is contiguous:
/// - Float: `x[m k + i]` for column k and token i of the tile;
/// - Bf16: as Float, where the bits of each number are those of columns `2 k` and `2 k + 1`, the
///   lower one in the low half; the last group is filled up with zeros;
/// - quantized: words of 32 bits, which the kernels broadcast: `words[m (k / 2) + i]` holds the
///   int16 of columns `k` and `k + 1` (the lower one in the low half), `words[m (k / 4) + i]` the
///   int8 of four columns; and `scales[m (k / 32) + i]`. The last group is filled up with zeros.
#[derive(Debug)]
pub struct Input {
    kind: InputKind,
    tokens: usize,
    cols: usize,
    float: Vec<f32>,
    words: Vec<i32>,
    scales: Vec<f32>,
    starts: Vec<f32>,
}

/// One tile of f32 activations.
#[derive(Clone, Copy)]
pub(crate) struct FloatTile<'a> {
    /// `[cols, m]`
    pub x: &'a [f32],
    /// Tokens, 1..=6.
    pub m: usize,
}

/// One tile of quantized activations.
#[derive(Clone, Copy)]
pub(crate) struct IntTile<'a> {
    /// `[groups, 16, m]` pairs of int16 or `[groups, 8, m]` quads of int8.
    pub words: &'a [i32],
    /// `[groups, m]`
    pub scales: &'a [f32],
    /// `[groups, m]`, for int8 only: minus [`EXCESS`](crate::pack::EXCESS) times the sum of the
    /// group's integers.
    pub starts: &'a [f32],
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
            words: Vec::new(),
            scales: Vec::new(),
            starts: Vec::new(),
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
        self.part(tokens).0.fill(isa, x);
    }

    /// Packs some rows of `x [_, cols]` on this thread: token i is row `rows[i]`.
    ///
    /// # Panics
    /// When `x` has no such row.
    pub fn prepare_rows(
        &mut self,
        isa: Isa,
        kind: InputKind,
        x: &[f32],
        rows: &[usize],
        cols: usize,
    ) {
        self.reset(kind, rows.len(), cols);
        let (_, mut rest) = self.part(0);
        // A tile at a time, which stays in the L2 cache until it is packed.
        let mut tile = Vec::with_capacity(Self::TILE * cols);
        for rows in rows.chunks(Self::TILE) {
            tile.clear();
            rows.iter()
                .for_each(|row| tile.extend_from_slice(&x[row.saturating_mul(cols)..][..cols]));
            let (part, after) = rest.split_at(rows.len());
            part.fill(isa, &tile);
            rest = after;
        }
    }

    /// Makes room for `[tokens, cols]`; the contents are unspecified until all parts of a
    /// [`Input::split`] are filled.
    ///
    /// # Panics
    /// When so many activations exceed the address space.
    pub fn reset(&mut self, kind: InputKind, tokens: usize, cols: usize) {
        // Whole groups: no buffer has more numbers or words.
        let most = cols.checked_next_multiple_of(GROUP).and_then(|cols| cols.checked_mul(tokens));
        assert!(most.is_some(), "[{tokens}, {cols}] activations exceed the address space");
        (self.kind, self.tokens, self.cols) = (kind, tokens, cols);
        let groups = tokens * cols.div_ceil(GROUP);
        match kind {
            InputKind::Float => self.float.resize(tokens * cols, 0.0),
            InputKind::Bf16 => self.float.resize(groups * kind.words_per_group(), 0.0),
            InputKind::Int16 | InputKind::Int8 => {
                self.words.resize(groups * kind.words_per_group(), 0);
                self.scales.resize(groups, 0.0);
                if kind == InputKind::Int8 {
                    self.starts.resize(groups, 0.0);
                }
            }
        }
    }

    /// Cuts the tokens into parts that different threads fill.
    ///
    /// # Panics
    /// When `cuts` do not cover `0..tokens` in order, or a cut is not at a multiple of
    /// [`Input::TILE`].
    pub fn split(&mut self, cuts: &[Range<usize>]) -> Vec<InputPart<'_>> {
        let tokens = self.tokens;
        let mut parts = Vec::with_capacity(cuts.len());
        let (_, mut rest) = self.part(0);
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

    /// The first `tokens` tokens and the rest.
    fn part(&mut self, tokens: usize) -> (InputPart<'_>, InputPart<'_>) {
        let groups = self.tokens * self.cols.div_ceil(GROUP);
        let words = groups * self.kind.words_per_group();
        let data = match self.kind {
            InputKind::Float => PartData::Float(&mut self.float[..self.tokens * self.cols]),
            InputKind::Bf16 => PartData::Bf16(&mut self.float[..words]),
            InputKind::Int16 => {
                PartData::Int16(&mut self.words[..words], &mut self.scales[..groups])
            }
            InputKind::Int8 => {
                let (words, scales) = (&mut self.words[..words], &mut self.scales[..groups]);
                PartData::Int8(words, scales, &mut self.starts[..groups])
            }
        };
        InputPart { tokens: self.tokens, cols: self.cols, data }.split_at(tokens)
    }

    /// Tiles: `ceil(tokens / 6)`.
    pub(crate) fn tiles(&self) -> usize {
        self.tokens.div_ceil(Input::TILE)
    }

    /// Tokens of tile `tile`.
    pub(crate) fn tile_tokens(&self, tile: usize) -> Range<usize> {
        tile * Input::TILE..((tile + 1) * Input::TILE).min(self.tokens)
    }

    /// A tile of f32 activations.
    pub(crate) fn float_tile(&self, tile: usize) -> FloatTile<'_> {
        debug_assert_eq!(self.kind, InputKind::Float);
        self.float_part(tile, &(0..self.cols))
    }

    /// A tile of quantized activations.
    pub(crate) fn int_tile(&self, tile: usize) -> IntTile<'_> {
        self.int_part(tile, &(0..self.cols))
    }

    /// Some columns of a tile, from the first column of a group on; of bf16 pairs of them.
    #[inline]
    pub(crate) fn float_part(&self, tile: usize, columns: &Range<usize>) -> FloatTile<'_> {
        let (t, m) = (tile * Input::TILE, Input::TILE.min(self.tokens - tile * Input::TILE));
        let (start, columns) = match self.kind {
            InputKind::Bf16 => {
                let words = self.cols.div_ceil(GROUP) * self.kind.words_per_group();
                (t * words, columns.start / 2..columns.end.div_ceil(2))
            }
            _ => (t * self.cols, columns.clone()),
        };
        FloatTile { x: &self.float[start + m * columns.start..start + m * columns.end], m }
    }

    /// The address of some columns of a tile.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(crate) fn start(&self, tile: usize, columns: &Range<usize>) -> *const u8 {
        match self.kind {
            InputKind::Float | InputKind::Bf16 => self.float_part(tile, columns).x.as_ptr().cast(),
            InputKind::Int16 | InputKind::Int8 => {
                self.int_part(tile, columns).words.as_ptr().cast()
            }
        }
    }

    /// Some columns of a quantized tile, from the first column of a group on.
    #[inline]
    pub(crate) fn int_part(&self, tile: usize, columns: &Range<usize>) -> IntTile<'_> {
        debug_assert_ne!(self.kind, InputKind::Float);
        let (t, m) = (tile * Input::TILE, Input::TILE.min(self.tokens - tile * Input::TILE));
        let (start, size) = (t * self.cols.div_ceil(GROUP), self.kind.words_per_group());
        let range = start + m * (columns.start / GROUP)..start + m * columns.end.div_ceil(GROUP);
        IntTile {
            words: &self.words[range.start * size..range.end * size],
            scales: &self.scales[range.clone()],
            starts: if self.kind == InputKind::Int8 { &self.starts[range] } else { &[] },
            m,
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
    Bf16(&'a mut [f32]),
    Int16(&'a mut [i32], &'a mut [f32]),
    Int8(&'a mut [i32], &'a mut [f32], &'a mut [f32]),
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
        let (rows, groups) = (x.chunks(Input::TILE * cols), Input::TILE * cols.div_ceil(GROUP));
        match self.data {
            PartData::Float(out) => {
                for (rows, out) in rows.zip(out.chunks_mut(Input::TILE * cols)) {
                    pack_float(isa, rows, cols, out);
                }
            }
            PartData::Bf16(out) => {
                let out = out.chunks_mut(groups * InputKind::Bf16.words_per_group());
                for (rows, out) in rows.zip(out) {
                    pack_bf16(isa, rows, cols, out);
                }
            }
            PartData::Int16(words, scales) => {
                let words = words.chunks_mut(groups * InputKind::Int16.words_per_group());
                for (rows, (words, scales)) in rows.zip(words.zip(scales.chunks_mut(groups))) {
                    pack_int16(isa, rows, cols, words, scales);
                }
            }
            PartData::Int8(words, scales, starts) => {
                let words = words.chunks_mut(groups * InputKind::Int8.words_per_group());
                let scales = scales.chunks_mut(groups).zip(starts.chunks_mut(groups));
                for (rows, (words, (scales, starts))) in rows.zip(words.zip(scales)) {
                    pack_int8(isa, rows, cols, words, scales, starts);
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
            PartData::Bf16(x) => {
                let (a, b) = x.split_at_mut(groups * InputKind::Bf16.words_per_group());
                (PartData::Bf16(a), PartData::Bf16(b))
            }
            PartData::Int16(words, scales) => {
                let (a, b) = words.split_at_mut(groups * InputKind::Int16.words_per_group());
                let (s, t) = scales.split_at_mut(groups);
                (PartData::Int16(a, s), PartData::Int16(b, t))
            }
            PartData::Int8(words, scales, starts) => {
                let (a, b) = words.split_at_mut(groups * InputKind::Int8.words_per_group());
                let ((s, t), (y, z)) = (scales.split_at_mut(groups), starts.split_at_mut(groups));
                (PartData::Int8(a, s, y), PartData::Int8(b, t, z))
            }
        };
        (
            InputPart { tokens, cols, data: left },
            InputPart { tokens: self.tokens - tokens, cols, data: right },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guarded::noise;

    #[test]
    fn parts_filled_side_by_side_equal_the_whole() {
        let cols = 50;
        for isa in Isa::all() {
            for kind in [InputKind::Float, InputKind::Bf16, InputKind::Int16, InputKind::Int8] {
                for tokens in [0, 1, 5, 6, 7, 12, 13, 40] {
                    let x = noise(tokens * cols, 6);
                    let (mut whole, mut parts) = (Input::new(), Input::new());
                    whole.prepare(isa, kind, &x, tokens, cols);
                    // What an earlier use has left must not show.
                    parts.prepare(isa, kind, &vec![9.0; 64 * 70], 64, 70);
                    parts.reset(kind, tokens, cols);
                    let cut = (tokens / 2).next_multiple_of(Input::TILE).min(tokens);
                    for (part, cut) in
                        parts.split(&[0..cut, cut..tokens]).into_iter().zip([0..cut, cut..tokens])
                    {
                        assert_eq!(part.tokens(), cut.len());
                        part.fill(isa, &x[cut.start * cols..cut.end * cols]);
                    }
                    assert_same(&whole, &parts);
                }
            }
        }
    }

    #[test]
    fn picked_rows_equal_their_copies() {
        let (cols, rows) = (50, [4, 0, 0, 7, 3, 6, 1, 7]);
        let x = noise(8 * cols, 6);
        let copies: Vec<_> =
            rows.iter().flat_map(|row| &x[row * cols..][..cols]).copied().collect();
        for isa in Isa::all() {
            for kind in [InputKind::Float, InputKind::Bf16, InputKind::Int16, InputKind::Int8] {
                for tokens in 0..=rows.len() {
                    let (mut whole, mut picked) = (Input::new(), Input::new());
                    whole.prepare(isa, kind, &copies[..tokens * cols], tokens, cols);
                    picked.prepare_rows(isa, kind, &x, &rows[..tokens], cols);
                    assert_same(&whole, &picked);
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "exceed the address space")]
    fn activations_larger_than_memory_are_refused() {
        Input::new().prepare(Isa::scalar(), InputKind::Float, &[], 1 << 60, 1 << 4);
    }

    fn assert_same(a: &Input, b: &Input) {
        assert_eq!((a.kind(), a.tokens(), a.cols()), (b.kind(), b.tokens(), b.cols()));
        for tile in 0..a.tiles() {
            if matches!(a.kind(), InputKind::Float | InputKind::Bf16) {
                let bits = |x: &Input| -> Vec<u32> {
                    x.float_part(tile, &(0..x.cols())).x.iter().map(|x| x.to_bits()).collect()
                };
                assert_eq!(bits(a), bits(b));
            } else {
                let (a, b) = (a.int_tile(tile), b.int_tile(tile));
                assert_eq!((a.words, a.scales, a.starts), (b.words, b.scales, b.starts));
            }
        }
    }

    #[test]
    #[should_panic(
        expected = "cut at token 7, which is neither a multiple of 6 nor the last of 20"
    )]
    fn a_cut_inside_a_tile_is_refused() {
        let mut input = Input::new();
        input.reset(InputKind::Float, 20, 3);
        input.split(&[0..7, 7..20]);
    }

    #[test]
    #[should_panic(expected = "the cuts end at token 12 of 20")]
    fn missing_tokens_are_refused() {
        let mut input = Input::new();
        input.reset(InputKind::Int8, 20, 3);
        input.split(&[0..6, 6..12]);
    }
}
