//! Keys and values of KV heads, laid out for the attention kernels.

#[cfg(test)]
pub(crate) mod filled;
mod lines;
mod memory;
mod narrow;

use lines::Line;
pub(crate) use lines::{LINE, Lines, Plain};
pub use memory::{KvMemory, KvMemoryError, KvPart, KvReader};

use crate::half_float::f16_to_f32;
use crate::isa::Isa;
use narrow::{to_f16, to_q8};
use std::fmt;
use std::str::FromStr;

/// Keys that lie interleaved: with one broadcast query element, two registers of keys give sixteen
/// scores, and no kernel needs a horizontal sum.
pub(crate) const BLOCK: usize = 16;
/// Positions whose keys lie together, and after them their values: a tile of the attention kernels.
pub const KV_SPAN: usize = 8 * BLOCK;
/// Blocks of keys, and of values, in a span.
const BLOCKS: usize = KV_SPAN / BLOCK;
/// Elements of a head that share a scale in [`KvFormat::Q8`].
pub(crate) const KV_GROUP: usize = 32;

/// How a cache stores numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KvFormat {
    /// Single precision: exact.
    F32,
    /// Half precision. Numbers from 65520 on become infinite.
    F16,
    /// int8 with a half-precision scale per 32 elements of each key and value. Where one of the 32
    /// is not finite, all are NaN.
    Q8,
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvFormat::F32 => "f32",
            KvFormat::F16 => "f16",
            KvFormat::Q8 => "q8",
        })
    }
}

impl FromStr for KvFormat {
    type Err = UnknownKvFormat;

    fn from_str(name: &str) -> Result<KvFormat, UnknownKvFormat> {
        match name {
            "f32" => Ok(KvFormat::F32),
            "f16" => Ok(KvFormat::F16),
            "q8" => Ok(KvFormat::Q8),
            other => Err(UnknownKvFormat { name: other.to_owned() }),
        }
    }
}

/// The name of a cache format that does not exist.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownKvFormat {
    /// The name as given.
    pub name: String,
}

impl fmt::Display for UnknownKvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown cache format {:?}, expected f32, f16 or q8", self.name)
    }
}

impl std::error::Error for UnknownKvFormat {}

impl KvFormat {
    /// Bytes that a key, or a value, of `elements` elements takes.
    pub fn bytes(self, elements: usize) -> usize {
        match self {
            KvFormat::F32 => elements * size_of::<f32>(),
            KvFormat::F16 => elements * size_of::<u16>(),
            KvFormat::Q8 => elements + elements.div_ceil(KV_GROUP) * size_of::<u16>(),
        }
    }
}

/// How the keys and values of one KV head lie in memory.
///
/// They lie in spans of 128 positions, each eight blocks of keys and then eight blocks of values, a
/// block being 16 positions and starting on a cache line. With `width` = head_dim rounded up to 16
/// and `groups` = ⌈head_dim / 32⌉ a block holds:
///
/// | | keys | values |
/// |---|---|---|
/// | f32, f16 | `[head_dim][16 positions]` | `[width / 16][16 positions][16]`, zero beyond head_dim |
/// | q8 | the same in int8, then scales `[groups][16]` | the same in int8, then scales `[groups][16]` |
///
/// Attention reads a span in the order in which it lies in memory: for a block of keys it keeps 16
/// scores of each row in registers, for a chunk of values 16 sums of each row. (Keys and values in
/// two streams, or values by position, are read at three quarters of the speed: the hardware's
/// prefetchers start anew at each jump.)
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KvLayout {
    format: KvFormat,
    head_dim: usize,
    /// Lines of a block of keys, and of values.
    key_lines: usize,
    value_lines: usize,
}

impl KvLayout {
    /// The layout of heads of `head_dim` elements.
    ///
    /// # Panics
    /// When `head_dim` is 0.
    pub fn new(format: KvFormat, head_dim: usize) -> KvLayout {
        assert!(head_dim > 0, "KvLayout: heads of 0 elements");
        let width = head_dim.next_multiple_of(BLOCK);
        KvLayout {
            format,
            head_dim,
            key_lines: (BLOCK * format.bytes(head_dim)).div_ceil(LINE),
            value_lines: (BLOCK * format.bytes(width)).div_ceil(LINE),
        }
    }

    /// Elements of a key and of a value.
    pub fn head_dim(self) -> usize {
        self.head_dim
    }

    /// How the numbers are stored.
    pub fn format(self) -> KvFormat {
        self.format
    }

    /// Bytes of a span.
    pub fn span_bytes(self) -> usize {
        self.span_lines() * LINE
    }

    /// Bytes of the blocks that hold so many positions: what attention to all of them reads.
    pub fn bytes(self, positions: usize) -> usize {
        positions.div_ceil(BLOCK) * (self.key_lines + self.value_lines) * LINE
    }

    /// Elements of a stored value.
    fn width(self) -> usize {
        self.head_dim.next_multiple_of(BLOCK)
    }

    fn span_lines(self) -> usize {
        BLOCKS * (self.key_lines + self.value_lines)
    }

    /// First line of a block of keys, counted from the start of its span.
    fn key_line(self, block: usize) -> usize {
        block * self.key_lines
    }

    /// First line of a block of values, counted from the start of its span.
    fn value_line(self, block: usize) -> usize {
        BLOCKS * self.key_lines + block * self.value_lines
    }
}

/// A span of 128 positions of one KV head, to be read.
#[derive(Clone, Copy)]
pub struct KvSpan<'a> {
    lines: &'a [Line],
}

impl<'a> KvSpan<'a> {
    /// The whole span as numbers.
    pub(crate) fn numbers<T: Plain>(self) -> &'a [T] {
        lines::numbers(self.lines)
    }
}

/// A span of 128 positions of one KV head, to be written.
pub struct KvSpanMut<'a> {
    layout: KvLayout,
    lines: &'a mut [Line],
}

impl KvSpanMut<'_> {
    /// The span, to be read.
    pub fn as_span(&self) -> KvSpan<'_> {
        KvSpan { lines: self.lines }
    }

    /// Stores the key and the value, each `[head_dim]`, of one position, counted from the start of
    /// the span.
    ///
    /// # Panics
    /// When the span has no such position or a length is not head_dim.
    pub fn store(&mut self, isa: Isa, position: usize, key: &[f32], value: &[f32]) {
        let head_dim = self.layout.head_dim;
        assert!(position < KV_SPAN, "KvSpanMut: position {position} of {KV_SPAN}");
        assert_eq!(
            (key.len(), value.len()),
            (head_dim, head_dim),
            "KvSpanMut: elements of a key and a value"
        );
        self.set_key(isa, position, key);
        self.set_value(isa, position, value);
    }

    /// Stores `count` positions from `first` on; the key of position `first + i` is
    /// `keys[i * stride..][..head_dim]`, likewise its value. The stride lets them lie among the
    /// other heads' in the output of a projection.
    ///
    /// # Panics
    /// When the span has no such positions or a slice ends before the last one does.
    pub fn store_many(
        &mut self,
        isa: Isa,
        first: usize,
        count: usize,
        (keys, values): (&[f32], &[f32]),
        stride: usize,
    ) {
        for i in 0..count {
            let row = i * stride..i * stride + self.layout.head_dim;
            self.store(isa, first + i, &keys[row.clone()], &values[row]);
        }
    }

    fn set_key(&mut self, isa: Isa, i: usize, key: &[f32]) {
        let (from, lane) = (self.layout.key_line(i / BLOCK), i % BLOCK);
        let lines = &mut self.lines[from..];
        match self.layout.format {
            KvFormat::F32 => write_column(lines::numbers_mut(lines), lane, key),
            KvFormat::F16 => {
                let block = lines::numbers_mut::<[u16; BLOCK]>(lines);
                for (rows, key) in block.chunks_mut(KV_GROUP).zip(key.chunks(KV_GROUP)) {
                    let mut halves = [0; KV_GROUP];
                    to_f16(isa, key, &mut halves[..key.len()]);
                    write_column(rows, lane, &halves[..key.len()]);
                }
            }
            KvFormat::Q8 => {
                let scales_at = self.layout.head_dim * BLOCK / 2;
                for (g, key) in key.chunks(KV_GROUP).enumerate() {
                    let mut codes = [0; KV_GROUP];
                    let scale = to_q8(isa, key, &mut codes[..key.len()]);
                    let block = lines::numbers_mut::<[i8; BLOCK]>(lines);
                    write_column(&mut block[g * KV_GROUP..], lane, &codes[..key.len()]);
                    lines::numbers_mut::<u16>(lines)[scales_at + g * BLOCK + lane] = scale;
                }
            }
        }
    }

    fn set_value(&mut self, isa: Isa, i: usize, value: &[f32]) {
        let (from, lane) = (self.layout.value_line(i / BLOCK), i % BLOCK);
        let lines = &mut self.lines[from..];
        match self.layout.format {
            KvFormat::F32 => write_row(lines::numbers_mut(lines), lane, value),
            KvFormat::F16 => {
                let block = lines::numbers_mut::<[u16; BLOCK]>(lines);
                for (rows, value) in block.chunks_mut(KV_GROUP).zip(value.chunks(KV_GROUP)) {
                    let mut halves = [0; KV_GROUP];
                    to_f16(isa, value, &mut halves[..value.len()]);
                    write_row(rows, lane, &halves[..value.len()]);
                }
            }
            KvFormat::Q8 => {
                let scales_at = self.layout.width() * BLOCK / 2;
                for (g, value) in value.chunks(KV_GROUP).enumerate() {
                    let mut codes = [0; KV_GROUP];
                    let scale = to_q8(isa, value, &mut codes[..value.len()]);
                    let block = lines::numbers_mut::<[i8; BLOCK]>(lines);
                    write_row(&mut block[g * KV_GROUP..], lane, &codes[..value.len()]);
                    lines::numbers_mut::<u16>(lines)[scales_at + g * BLOCK + lane] = scale;
                }
            }
        }
    }
}

/// Keys and values of one KV head: spans in order of position, wherever they lie.
#[derive(Clone, Copy)]
pub struct KvHead<'a> {
    layout: KvLayout,
    spans: &'a [KvSpan<'a>],
    len: usize,
}

impl<'a> KvHead<'a> {
    /// The first `len` positions of `spans`, whose memory has this layout.
    ///
    /// # Panics
    /// When the spans have fewer positions, or another size than the layout says.
    pub fn new(layout: KvLayout, spans: &'a [KvSpan<'a>], len: usize) -> KvHead<'a> {
        assert!(
            len <= spans.len() * KV_SPAN,
            "KvHead: {len} positions in {} spans of {KV_SPAN}",
            spans.len()
        );
        let size = layout.span_lines();
        if let Some(other) = spans.iter().find(|span| span.lines.len() != size) {
            panic!("KvHead: a span of {} lines, expected {size}", other.lines.len());
        }
        KvHead { layout, spans, len }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements of a key and of a value.
    pub fn head_dim(&self) -> usize {
        self.layout.head_dim
    }

    /// How the numbers are stored.
    pub fn format(&self) -> KvFormat {
        self.layout.format
    }

    /// Bytes of the blocks in use: what one pass of attention over all positions reads.
    pub fn bytes(&self) -> usize {
        self.layout.bytes(self.len)
    }

    /// The key of position `i`, as f32; out: `[head_dim]`.
    ///
    /// # Panics
    /// When there is no such position or `out` has another length.
    pub fn key(&self, i: usize, out: &mut [f32]) {
        self.check_read(i, out.len());
        let lane = i % BLOCK;
        match self.format() {
            KvFormat::F32 => read_column(self.key_block::<f32>(i / BLOCK), lane, out, |x| x),
            KvFormat::F16 => read_column(self.key_block::<u16>(i / BLOCK), lane, out, f16_to_f32),
            KvFormat::Q8 => {
                let scales = self.key_scales(i / BLOCK);
                read_column(self.key_block::<i8>(i / BLOCK), lane, out, f32::from);
                for (x, scale) in out.chunks_mut(KV_GROUP).zip(scales) {
                    let scale = f16_to_f32(scale[lane]);
                    x.iter_mut().for_each(|x| *x *= scale);
                }
            }
        }
    }

    /// The value of position `i`, as f32; out: `[head_dim]`.
    ///
    /// # Panics
    /// When there is no such position or `out` has another length.
    pub fn value(&self, i: usize, out: &mut [f32]) {
        self.check_read(i, out.len());
        let (b, lane) = (i / BLOCK, i % BLOCK);
        match self.format() {
            KvFormat::F32 => read_row(self.value_block::<f32>(b), lane, out, |x| x),
            KvFormat::F16 => read_row(self.value_block::<u16>(b), lane, out, f16_to_f32),
            KvFormat::Q8 => {
                read_row(self.value_block::<i8>(b), lane, out, f32::from);
                for (x, scale) in out.chunks_mut(KV_GROUP).zip(self.value_scales(b)) {
                    let scale = f16_to_f32(scale[lane]);
                    x.iter_mut().for_each(|x| *x *= scale);
                }
            }
        }
    }

    /// Elements of a stored value.
    pub(crate) fn width(&self) -> usize {
        self.layout.width()
    }

    /// Block `b` of keys, and whatever follows it in the span: [head_dim][16], T as stored.
    pub(crate) fn key_block<T: Plain>(&self, b: usize) -> &'a [[T; BLOCK]] {
        self.view(b, self.layout.key_line(b % BLOCKS))
    }

    /// From one block of keys to the next, in units of `[T; 16]`.
    pub(crate) fn key_step<T: Plain>(&self) -> usize {
        self.layout.key_lines * LINE / size_of::<[T; BLOCK]>()
    }

    /// Block `b` of values, and whatever follows it in the span: [width / 16][16 positions][16], T
    /// as stored.
    pub(crate) fn value_block<T: Plain>(&self, b: usize) -> &'a [[T; BLOCK]] {
        self.view(b, self.layout.value_line(b % BLOCKS))
    }

    /// From one block of values to the next, in units of `[T; 16]`.
    pub(crate) fn value_step<T: Plain>(&self) -> usize {
        self.layout.value_lines * LINE / size_of::<[T; BLOCK]>()
    }

    /// The scales of block `b` of keys (q8): [groups][16] halves.
    pub(crate) fn key_scales(&self, b: usize) -> &'a [[u16; BLOCK]] {
        let codes = self.head_dim() * BLOCK * size_of::<i8>();
        let block: &[u16] = self.view(b, self.layout.key_line(b % BLOCKS));
        block[codes / 2..].as_chunks().0
    }

    /// The scales of block `b` of values (q8): [groups][16] halves.
    pub(crate) fn value_scales(&self, b: usize) -> &'a [[u16; BLOCK]] {
        let codes = self.width() * BLOCK * size_of::<i8>();
        let block: &[u16] = self.view(b, self.layout.value_line(b % BLOCKS));
        block[codes / 2..].as_chunks().0
    }

    /// Span `n`: `None` if there is no such span.
    pub(crate) fn span(&self, n: usize) -> Option<KvSpan<'a>> {
        self.spans.get(n).copied()
    }

    /// The span of block `b` from the given line on.
    fn view<T: Plain>(&self, b: usize, from: usize) -> &'a [T] {
        lines::numbers(&self.spans[b / BLOCKS].lines[from..])
    }

    fn check_read(&self, i: usize, out: usize) {
        assert!(i < self.len, "KvHead: position {i} of {}", self.len);
        assert_eq!(
            out,
            self.head_dim(),
            "KvHead: room for {out} elements, expected {}",
            self.head_dim()
        );
    }
}

fn write_column<T: Copy>(block: &mut [[T; BLOCK]], lane: usize, column: &[T]) {
    for (row, &x) in block.iter_mut().zip(column) {
        row[lane] = x;
    }
}

fn read_column<T: Copy>(
    block: &[[T; BLOCK]],
    lane: usize,
    out: &mut [f32],
    widen: impl Fn(T) -> f32,
) {
    for (out, row) in out.iter_mut().zip(block) {
        *out = widen(row[lane]);
    }
}

/// Into chunks of [16 positions][16].
fn write_row<T: Copy>(block: &mut [[T; BLOCK]], lane: usize, row: &[T]) {
    for (chunk, row) in block.chunks_mut(BLOCK).zip(row.chunks(BLOCK)) {
        chunk[lane][..row.len()].copy_from_slice(row);
    }
}

fn read_row<T: Copy>(block: &[[T; BLOCK]], lane: usize, out: &mut [f32], widen: impl Fn(T) -> f32) {
    for (out, chunk) in out.chunks_mut(BLOCK).zip(block.chunks(BLOCK)) {
        out.iter_mut().zip(chunk[lane]).for_each(|(out, x)| *out = widen(x));
    }
}

#[cfg(test)]
mod tests;
