//! A growing cache of one KV head for tests, each of its spans in memory of its own.

use super::{KV_SPAN, KvFormat, KvHead, KvLayout, KvMemory, KvSpan};
use crate::isa::Isa;

pub(crate) struct Filled {
    layout: KvLayout,
    spans: Vec<KvMemory>,
    len: usize,
}

impl Filled {
    pub fn new(format: KvFormat, head_dim: usize) -> Filled {
        Filled { layout: KvLayout::new(format, head_dim), spans: Vec::new(), len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn format(&self) -> KvFormat {
        self.layout.format()
    }

    pub fn head_dim(&self) -> usize {
        self.layout.head_dim()
    }

    pub fn push(&mut self, isa: Isa, key: &[f32], value: &[f32]) {
        let place = self.len % KV_SPAN;
        if place == 0 && self.len / KV_SPAN == self.spans.len() {
            self.spans.push(KvMemory::new(self.layout, 1, 1).expect("memory"));
        }
        let (mut spans, _) = self.spans[self.len / KV_SPAN].split(&[0]);
        spans[0].store(isa, place, key, value);
        self.len += 1;
    }

    pub fn push_many(&mut self, isa: Isa, keys: &[f32], values: &[f32], count: usize) {
        let head_dim = self.head_dim();
        let rows = keys.chunks_exact(head_dim).zip(values.chunks_exact(head_dim));
        rows.take(count).for_each(|(key, value)| self.push(isa, key, value));
    }

    /// Keeps the first positions. The memory of the others is not cleared.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The head, as kernels see it.
    pub fn with<T>(&self, see: impl FnOnce(KvHead<'_>) -> T) -> T {
        let spans: Vec<KvSpan<'_>> = self.spans.iter().map(|one| one.reader().span(0, 0)).collect();
        see(KvHead::new(self.layout, &spans, self.len))
    }

    pub fn key(&self, i: usize, out: &mut [f32]) {
        self.with(|head| head.key(i, out));
    }

    pub fn value(&self, i: usize, out: &mut [f32]) {
        self.with(|head| head.value(i, out));
    }
}

impl Clone for Filled {
    fn clone(&self) -> Filled {
        let copy = |memory: &KvMemory| {
            let mut copy = KvMemory::new(self.layout, 1, 1).expect("memory");
            copy.lines.lines_mut().copy_from_slice(memory.lines.lines());
            copy
        };
        Filled { spans: self.spans.iter().map(copy).collect(), ..*self }
    }
}
