//! The keys and values of one KV head, laid out for the attention kernels.

mod lines;
mod narrow;

pub(crate) use lines::{LINE, Lines, Plain};

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

/// Keys and values of one KV head; grows by a token at a time and can be cut back.
///
/// The cache is a sequence of spans of 128 positions, each eight blocks of keys and then eight
/// blocks of values, a block being 16 positions and starting on a cache line. With `width` =
/// head_dim rounded up to 16 and `groups` = ⌈head_dim / 32⌉ a block holds:
///
/// | | keys | values |
/// |---|---|---|
/// | f32, f16 | `[head_dim][16 positions]` | `[width / 16][16 positions][16]`, zero beyond head_dim |
/// | q8 | the same in int8, then scales `[groups][16]` | the same in int8, then scales `[groups][16]` |
///
/// So attention reads one plain stream, in the order in which it lies in memory: for a block of
/// keys it keeps 16 scores of each row in registers, for a chunk of values 16 sums of each row.
/// (Keys and values in two streams, or values by position, are read at three quarters of the speed:
/// the hardware's prefetchers start anew at each turn.)
#[derive(Clone)]
pub struct KvHead {
    format: KvFormat,
    head_dim: usize,
    len: usize,
    spans: Lines,
    /// Lines of a block of keys, and of values.
    key_lines: usize,
    value_lines: usize,
}

impl KvHead {
    /// An empty cache for heads of `head_dim` elements.
    ///
    /// # Panics
    /// When `head_dim` is 0.
    pub fn new(format: KvFormat, head_dim: usize) -> KvHead {
        assert!(head_dim > 0, "KvHead: heads of 0 elements");
        let width = head_dim.next_multiple_of(BLOCK);
        KvHead {
            format,
            head_dim,
            len: 0,
            spans: Lines::default(),
            key_lines: (BLOCK * format.bytes(head_dim)).div_ceil(LINE),
            value_lines: (BLOCK * format.bytes(width)).div_ceil(LINE),
        }
    }

    /// Tokens stored.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is stored.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements of a key and of a value.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// How the numbers are stored.
    pub fn format(&self) -> KvFormat {
        self.format
    }

    /// Bytes of the blocks in use: what one pass of attention over the whole cache reads.
    pub fn bytes(&self) -> usize {
        self.len.div_ceil(BLOCK) * (self.key_lines + self.value_lines) * LINE
    }

    /// Makes room for `tokens` tokens in all, so that pushing up to there copies nothing. Memory is
    /// not touched.
    pub fn reserve(&mut self, tokens: usize) {
        self.spans.reserve(self.lines(tokens));
    }

    /// Keeps the first `tokens` tokens (all, when there are fewer).
    pub fn truncate(&mut self, tokens: usize) {
        if tokens < self.len {
            self.len = tokens;
            self.spans.resize(self.lines(tokens));
        }
    }

    /// Appends one token; key and value: `[head_dim]`.
    ///
    /// # Panics
    /// When a length is not head_dim.
    pub fn push(&mut self, isa: Isa, key: &[f32], value: &[f32]) {
        self.push_many(isa, key, value, 1, self.head_dim);
    }

    /// Appends `tokens` tokens; the key of token t is `keys[t * stride..][..head_dim]`, likewise
    /// its value. The stride lets them lie among the other heads' in the output of a projection.
    ///
    /// # Panics
    /// When a slice ends before the last token does, or the cache would exceed the address space.
    pub fn push_many(
        &mut self,
        isa: Isa,
        keys: &[f32],
        values: &[f32],
        tokens: usize,
        stride: usize,
    ) {
        if tokens == 0 {
            return;
        }
        let needed = (tokens - 1).saturating_mul(stride).saturating_add(self.head_dim);
        assert!(
            keys.len() >= needed && values.len() >= needed,
            "KvHead: {} and {} elements of keys and values, {tokens} tokens need {needed}",
            keys.len(),
            values.len(),
        );
        let first = self.len;
        // With a stride of 0 the slices do not bound the tokens.
        let len = first.checked_add(tokens).expect("a cache fits the address space");
        self.spans.resize(self.lines(len));
        self.len = len;
        for t in 0..tokens {
            let row = t * stride..t * stride + self.head_dim;
            self.set_key(isa, first + t, &keys[row.clone()]);
            self.set_value(isa, first + t, &values[row]);
        }
    }

    /// The key of token `i`, as f32; out: `[head_dim]`.
    ///
    /// # Panics
    /// When there is no such token or `out` has another length.
    pub fn key(&self, i: usize, out: &mut [f32]) {
        self.check_read(i, out.len());
        let lane = i % BLOCK;
        match self.format {
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

    /// The value of token `i`, as f32; out: `[head_dim]`.
    ///
    /// # Panics
    /// When there is no such token or `out` has another length.
    pub fn value(&self, i: usize, out: &mut [f32]) {
        self.check_read(i, out.len());
        let (b, lane) = (i / BLOCK, i % BLOCK);
        match self.format {
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
        self.head_dim.next_multiple_of(BLOCK)
    }

    /// Block `b` of keys, and whatever follows it in the span: [head_dim][16], T as stored.
    pub(crate) fn key_block<T: Plain>(&self, b: usize) -> &[[T; BLOCK]] {
        self.spans.view(self.key_line(b))
    }

    /// From one block of keys to the next, in units of `[T; 16]`.
    pub(crate) fn key_step<T: Plain>(&self) -> usize {
        self.key_lines * LINE / size_of::<[T; BLOCK]>()
    }

    /// Block `b` of values, and whatever follows it in the span: [width / 16][16 positions][16], T
    /// as stored.
    pub(crate) fn value_block<T: Plain>(&self, b: usize) -> &[[T; BLOCK]] {
        self.spans.view(self.value_line(b))
    }

    /// From one block of values to the next, in units of `[T; 16]`.
    pub(crate) fn value_step<T: Plain>(&self) -> usize {
        self.value_lines * LINE / size_of::<[T; BLOCK]>()
    }

    /// The scales of block `b` of keys (q8): [groups][16] halves.
    pub(crate) fn key_scales(&self, b: usize) -> &[[u16; BLOCK]] {
        let codes = self.head_dim * BLOCK * size_of::<i8>();
        let block: &[u16] = self.spans.view(self.key_line(b));
        block[codes / 2..].as_chunks().0
    }

    /// The scales of block `b` of values (q8): [groups][16] halves.
    pub(crate) fn value_scales(&self, b: usize) -> &[[u16; BLOCK]] {
        let codes = self.width() * BLOCK * size_of::<i8>();
        let block: &[u16] = self.spans.view(self.value_line(b));
        block[codes / 2..].as_chunks().0
    }

    /// The cache lines of span `n`: none, if there is no such span.
    pub(crate) fn span(&self, n: usize) -> &[[i32; BLOCK]] {
        self.spans.view::<[i32; BLOCK]>(0).chunks(self.span_lines()).nth(n).unwrap_or_default()
    }

    fn span_lines(&self) -> usize {
        KV_SPAN / BLOCK * (self.key_lines + self.value_lines)
    }

    /// First line of block `b` of keys.
    fn key_line(&self, b: usize) -> usize {
        let blocks = KV_SPAN / BLOCK;
        b / blocks * self.span_lines() + b % blocks * self.key_lines
    }

    /// First line of block `b` of values.
    fn value_line(&self, b: usize) -> usize {
        let blocks = KV_SPAN / BLOCK;
        b / blocks * self.span_lines() + blocks * self.key_lines + b % blocks * self.value_lines
    }

    /// Lines of the spans that so many tokens need. Places beyond `len` hold zeros or what was
    /// there before; every reader leaves them out.
    fn lines(&self, tokens: usize) -> usize {
        tokens
            .div_ceil(KV_SPAN)
            .checked_mul(self.span_lines())
            .expect("a cache fits the address space")
    }

    fn set_key(&mut self, isa: Isa, i: usize, key: &[f32]) {
        let (from, lane) = (self.key_line(i / BLOCK), i % BLOCK);
        match self.format {
            KvFormat::F32 => write_column(self.spans.view_mut(from), lane, key),
            KvFormat::F16 => {
                let block = self.spans.view_mut::<[u16; BLOCK]>(from);
                for (rows, key) in block.chunks_mut(KV_GROUP).zip(key.chunks(KV_GROUP)) {
                    let mut halves = [0; KV_GROUP];
                    to_f16(isa, key, &mut halves[..key.len()]);
                    write_column(rows, lane, &halves[..key.len()]);
                }
            }
            KvFormat::Q8 => {
                let scales_at = self.head_dim * BLOCK / 2;
                for (g, key) in key.chunks(KV_GROUP).enumerate() {
                    let mut codes = [0; KV_GROUP];
                    let scale = to_q8(isa, key, &mut codes[..key.len()]);
                    let block = self.spans.view_mut::<[i8; BLOCK]>(from);
                    write_column(&mut block[g * KV_GROUP..], lane, &codes[..key.len()]);
                    self.spans.view_mut::<u16>(from)[scales_at + g * BLOCK + lane] = scale;
                }
            }
        }
    }

    fn set_value(&mut self, isa: Isa, i: usize, value: &[f32]) {
        let (from, lane) = (self.value_line(i / BLOCK), i % BLOCK);
        match self.format {
            KvFormat::F32 => write_row(self.spans.view_mut(from), lane, value),
            KvFormat::F16 => {
                let block = self.spans.view_mut::<[u16; BLOCK]>(from);
                for (rows, value) in block.chunks_mut(KV_GROUP).zip(value.chunks(KV_GROUP)) {
                    let mut halves = [0; KV_GROUP];
                    to_f16(isa, value, &mut halves[..value.len()]);
                    write_row(rows, lane, &halves[..value.len()]);
                }
            }
            KvFormat::Q8 => {
                let scales_at = self.width() * BLOCK / 2;
                for (g, value) in value.chunks(KV_GROUP).enumerate() {
                    let mut codes = [0; KV_GROUP];
                    let scale = to_q8(isa, value, &mut codes[..value.len()]);
                    let block = self.spans.view_mut::<[i8; BLOCK]>(from);
                    write_row(&mut block[g * KV_GROUP..], lane, &codes[..value.len()]);
                    self.spans.view_mut::<u16>(from)[scales_at + g * BLOCK + lane] = scale;
                }
            }
        }
    }

    fn check_read(&self, i: usize, out: usize) {
        assert!(i < self.len, "KvHead: token {i} of {}", self.len);
        assert_eq!(
            out, self.head_dim,
            "KvHead: out has {out} elements, head_dim is {}",
            self.head_dim
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
