//! Memory for the spans of many KV heads, of which some are written while the others are read.

use super::lines::{Line, ZeroedLines};
use super::{KvLayout, KvSpan, KvSpanMut};
use std::fmt;

/// Memory for keys and values: `groups` groups, each with one span of 128 positions for each of
/// `heads` KV heads. What a group stands for (a page of a sequence in a layer) the caller decides.
///
/// The memory lies on huge pages where it is large and Linux grants them; it is zero until it is
/// written.
pub struct KvMemory {
    layout: KvLayout,
    heads: usize,
    groups: usize,
    pub(super) lines: ZeroedLines,
}

/// The system refused memory for keys and values.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KvMemoryError {
    /// Bytes of a group.
    pub group_bytes: usize,
    /// Groups asked for.
    pub groups: usize,
}

impl fmt::Display for KvMemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { group_bytes, groups } = self;
        write!(f, "no memory for keys, values and states: {groups} times {group_bytes} bytes")
    }
}

impl std::error::Error for KvMemoryError {}

impl KvMemory {
    /// Memory of zeros.
    ///
    /// # Errors
    /// When the system refuses so much memory.
    pub fn new(layout: KvLayout, heads: usize, groups: usize) -> Result<KvMemory, KvMemoryError> {
        let group = heads.saturating_mul(layout.span_lines());
        let lines = group.checked_mul(groups).and_then(ZeroedLines::new);
        let group_bytes = heads.saturating_mul(layout.span_bytes());
        let lines = lines.ok_or(KvMemoryError { group_bytes, groups })?;
        Ok(KvMemory { layout, heads, groups, lines })
    }

    /// How keys and values lie in a span.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// KV heads of a group.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Number of groups.
    pub fn groups(&self) -> usize {
        self.groups
    }

    /// Copies `count` groups from `from` on to those from `to` on, which may overlap.
    ///
    /// # Panics
    /// When there are no such groups.
    pub fn copy(&mut self, from: usize, to: usize, count: usize) {
        let size = self.heads * self.layout.span_lines();
        let lines = self.lines.lines_mut();
        lines.copy_within(from * size..(from + count) * size, to * size);
    }

    /// The memory in about `count` parts of about the same size, each of which another thread may
    /// touch.
    pub fn parts(&mut self, count: usize) -> Vec<KvPart<'_>> {
        let lines = self.lines.lines_mut();
        let size = lines.len().div_ceil(count.max(1)).max(1);
        lines.chunks_mut(size).map(|lines| KvPart { lines }).collect()
    }

    /// The spans of the groups `written`, in this order and in each by head, to be written; and all
    /// other groups, to be read meanwhile.
    ///
    /// # Panics
    /// When `written` does not ascend strictly or there is no such group.
    pub fn split(&mut self, written: &[usize]) -> (Vec<KvSpanMut<'_>>, KvReader<'_>) {
        let (layout, heads) = (self.layout, self.heads);
        let span = layout.span_lines();
        let size = heads * span;
        let mut spans = Vec::with_capacity(written.len() * heads);
        let mut pieces = Vec::with_capacity(written.len() + 1);
        let (mut rest, mut first) = (self.lines.lines_mut(), 0);
        for &group in written {
            assert!(
                (first..self.groups).contains(&group),
                "KvMemory: group {group} to write, expected one of {first}..{}",
                self.groups
            );
            let (read, tail) = rest.split_at_mut((group - first) * size);
            let (write, tail) = tail.split_at_mut(size);
            pieces.push((first, &*read));
            // Without heads there are no spans, and a chunk of no lines is none.
            spans.extend(write.chunks_exact_mut(span).map(|lines| KvSpanMut { layout, lines }));
            (rest, first) = (tail, group + 1);
        }
        pieces.push((first, &*rest));
        (spans, KvReader { layout, heads, pieces })
    }

    /// All groups, to be read.
    pub fn reader(&self) -> KvReader<'_> {
        let pieces = vec![(0, self.lines.lines())];
        KvReader { layout: self.layout, heads: self.heads, pieces }
    }
}

/// A part of the memory of keys and values.
pub struct KvPart<'a> {
    lines: &'a mut [Line],
}

impl KvPart<'_> {
    /// Overwrites it with zeros, so that the system provides the memory, near the core of this
    /// thread.
    pub fn clear(self) {
        super::lines::numbers_mut::<i32>(self.lines).fill(0);
    }
}

/// Groups of a [`KvMemory`] that are read while others are written.
pub struct KvReader<'a> {
    layout: KvLayout,
    heads: usize,
    /// Consecutive groups, each piece with the number of its first one.
    pieces: Vec<(usize, &'a [Line])>,
}

impl<'a> KvReader<'a> {
    /// How keys and values lie in a span.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// The span of a head in a group.
    ///
    /// # Panics
    /// When there is no such head or group, or the group is being written.
    pub fn span(&self, group: usize, head: usize) -> KvSpan<'a> {
        assert!(head < self.heads, "KvReader: head {head} of {}", self.heads);
        let size = self.layout.span_lines();
        let piece = self.pieces.partition_point(|(first, _)| *first <= group).checked_sub(1);
        let lines = piece.and_then(|piece| {
            let (first, lines) = self.pieces[piece];
            lines.chunks_exact(size).nth((group - first) * self.heads + head)
        });
        let lines = lines.unwrap_or_else(|| {
            panic!("KvReader: group {group} is being written, or there is no such group")
        });
        KvSpan { lines }
    }
}
