//! Memory in whole cache lines, seen as slices of numbers.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// One cache line. The alignment keeps every 32-byte load of the attention kernels inside one line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; LINE]);

/// Bytes of a line.
pub(crate) const LINE: usize = 64;
/// Bytes of a huge page. Buffers that hold one start on one.
const HUGE: usize = 2 << 20;

/// Numbers for which every bit pattern is a value and whose alignment a line satisfies.
///
/// # Safety
/// Implementors have no padding, no invalid bit pattern, no destructor, and an alignment that
/// divides [`LINE`].
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: a primitive number of four bytes.
unsafe impl Plain for f32 {}
// SAFETY: a primitive number of four bytes.
unsafe impl Plain for i32 {}
// SAFETY: a primitive number of two bytes.
unsafe impl Plain for u16 {}
// SAFETY: a primitive number of one byte.
unsafe impl Plain for i8 {}
// SAFETY: an array has no padding beyond its elements', and their alignment.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// A growing buffer of lines, zero where nothing was written.
///
/// Not a `Vec`: that aligns to the element, and memory that is read as one long stream is read a
/// tenth faster when it lies on huge pages.
pub(crate) struct Lines {
    start: NonNull<Line>,
    len: usize,
    capacity: usize,
}

// SAFETY: `Lines` owns its memory, like a `Vec`.
unsafe impl Send for Lines {}
// SAFETY: as above; all writing goes through `&mut self`.
unsafe impl Sync for Lines {}

impl Lines {
    /// `n` lines, the new ones zero; the memory of lost ones is kept.
    pub(crate) fn resize(&mut self, n: usize) {
        if n > self.capacity {
            self.reserve(n.max(2 * self.capacity));
        }
        if n > self.len {
            // SAFETY: lines self.len..n lie inside the capacity.
            unsafe { self.start.add(self.len).write_bytes(0, n - self.len) };
        }
        self.len = n;
    }

    /// `n` numbers (contents unspecified), for use as scratch.
    pub(crate) fn scratch<T: Plain>(&mut self, n: usize) -> &mut [T] {
        let lines = (n * size_of::<T>()).div_ceil(LINE);
        if self.len < lines {
            self.resize(lines);
        }
        &mut self.view_mut(0)[..n]
    }

    /// Makes room for `n` lines in all, without touching it.
    pub(crate) fn reserve(&mut self, n: usize) {
        if n <= self.capacity {
            return;
        }
        let layout = layout(n);
        // SAFETY: the layout is not empty, n being more than the capacity.
        let start = NonNull::new(unsafe { alloc(layout) })
            .unwrap_or_else(|| handle_alloc_error(layout))
            .cast();
        advise_huge(start.cast(), layout.size());
        let old = std::mem::replace(self, Lines { start, len: self.len, capacity: n });
        // SAFETY: both buffers hold old.len lines, the old one written ones, and they do not
        // overlap.
        unsafe { start.copy_from_nonoverlapping(old.start, old.len) };
    }

    /// All lines.
    fn lines(&self) -> &[Line] {
        // SAFETY: the first `len` lines are written and ours for the borrow.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// Lines `from..` as numbers.
    #[cfg(test)]
    pub(crate) fn view<T: Plain>(&self, from: usize) -> &[T] {
        assert!(from <= self.len, "line {from} of {}", self.len);
        numbers(&self.lines()[from..])
    }

    /// Lines `from..` as numbers to write.
    pub(crate) fn view_mut<T: Plain>(&mut self, from: usize) -> &mut [T] {
        assert!(from <= self.len, "line {from} of {}", self.len);
        // SAFETY: as in `lines`; the borrow is exclusive.
        let lines = unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) };
        numbers_mut(&mut lines[from..])
    }
}

/// Whole lines as the numbers in them.
pub(crate) fn numbers<T: Plain>(lines: &[Line]) -> &[T] {
    let count = size_of_val(lines) / size_of::<T>();
    // SAFETY: `Plain` allows any bytes, a line is aligned for T, and the length is rounded down to
    // whole T.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), count) }
}

/// Whole lines as the numbers in them, to write.
pub(crate) fn numbers_mut<T: Plain>(lines: &mut [Line]) -> &mut [T] {
    let count = size_of_val(lines) / size_of::<T>();
    // SAFETY: as in `numbers`; the borrow is exclusive, and any T written is a valid pattern of
    // bytes.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), count) }
}

/// A fixed number of lines, zero until they are written, on huge pages where there are enough of
/// them. The system provides memory for a page only when it is first written or read.
pub(crate) struct ZeroedLines {
    /// What was allocated, and how.
    allocation: NonNull<u8>,
    layout: Layout,
    start: NonNull<Line>,
    len: usize,
}

// SAFETY: `ZeroedLines` owns its memory, like a `Vec`.
unsafe impl Send for ZeroedLines {}
// SAFETY: as above; all writing goes through `&mut self`.
unsafe impl Sync for ZeroedLines {}

impl ZeroedLines {
    /// `len` lines of zeros; `None` where the system refuses the memory.
    pub(crate) fn new(len: usize) -> Option<ZeroedLines> {
        let bytes = len.checked_mul(LINE)?;
        let align = if bytes >= HUGE { HUGE } else { LINE };
        // An alignment of more than 16 would have the allocator write the zeros at once, so the
        // lines start at the first aligned place of a larger allocation.
        let layout = Layout::from_size_align(bytes.checked_add(align)?, 16).ok()?;
        // SAFETY: the layout is not empty, the alignment being a part of it.
        let allocation = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        let skip = allocation.as_ptr().align_offset(align);
        assert!(skip <= align, "an aligned place within the first {align} bytes");
        // SAFETY: skip + bytes are inside the allocation, by the assertion above.
        let start: NonNull<u8> = unsafe { allocation.add(skip) };
        advise_huge(start, bytes);
        Some(ZeroedLines { allocation, layout, start: start.cast(), len })
    }

    /// All lines.
    pub(crate) fn lines(&self) -> &[Line] {
        // SAFETY: `len` lines lie inside the allocation, which is initialized with zeros and
        // aligned for a line.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// All lines, to write.
    pub(crate) fn lines_mut(&mut self) -> &mut [Line] {
        // SAFETY: as in `lines`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for ZeroedLines {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.allocation.as_ptr(), self.layout) };
    }
}

impl Default for Lines {
    fn default() -> Lines {
        Lines { start: NonNull::dangling(), len: 0, capacity: 0 }
    }
}

impl Clone for Lines {
    fn clone(&self) -> Lines {
        let mut copy = Lines::default();
        copy.resize(self.len);
        copy.view_mut::<u16>(0).copy_from_slice(numbers(self.lines()));
        copy
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if self.capacity > 0 {
            // SAFETY: `start` was allocated by `reserve` with this layout.
            unsafe { dealloc(self.start.cast().as_ptr(), layout(self.capacity)) };
        }
    }
}

fn layout(lines: usize) -> Layout {
    let bytes = lines.checked_mul(LINE).expect("a buffer of lines fits the address space");
    let align = if bytes >= HUGE { HUGE } else { align_of::<Line>() };
    Layout::from_size_align(bytes, align).expect("a buffer of lines fits the address space")
}

/// Asks for huge pages under the whole ones of a buffer. Best effort: without them it is only
/// slower.
#[cfg(target_os = "linux")]
fn advise_huge(start: NonNull<u8>, bytes: usize) {
    unsafe extern "C" {
        fn madvise(
            start: *mut std::ffi::c_void,
            bytes: usize,
            advice: std::ffi::c_int,
        ) -> std::ffi::c_int;
    }
    const MADV_HUGEPAGE: std::ffi::c_int = 14;
    let whole = bytes / HUGE * HUGE;
    if whole > 0 {
        // SAFETY: the range lies inside an allocation of ours that starts on a huge page, and the
        // advice changes no contents.
        unsafe { madvise(start.as_ptr().cast(), whole, MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge(_: NonNull<u8>, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_and_shrinks_like_a_vector() {
        let mut lines = Lines::default();
        assert!(lines.view::<f32>(0).is_empty());
        for n in [1, 3, 2, 40_000, 7, 70_000, 0, 5] {
            let kept = lines.view::<f32>(0).len().min(n * 16);
            lines.resize(n);
            let view = lines.view_mut::<f32>(0);
            assert_eq!(view.len(), n * 16);
            assert!(
                view[..kept].iter().all(|&x| x == 1.0) && view[kept..].iter().all(|&x| x == 0.0)
            );
            view.fill(1.0);
        }
        let copy = lines.clone();
        assert_eq!(copy.view::<f32>(0), lines.view::<f32>(0));
    }

    #[test]
    fn buffers_start_on_lines_and_large_ones_on_huge_pages() {
        for (lines, align) in
            [(1, LINE), (100, LINE), (HUGE / LINE, HUGE), (3 * HUGE / LINE / 2, HUGE)]
        {
            let mut buffer = Lines::default();
            buffer.resize(lines);
            assert_eq!(buffer.view::<u16>(0).as_ptr() as usize % align, 0);
        }
    }

    #[test]
    fn fixed_buffers_start_with_zeros_on_lines_or_huge_pages() {
        for (len, align) in [(0, 1), (1, LINE), (100, LINE), (HUGE / LINE, HUGE), (40_000, HUGE)] {
            let mut buffer = ZeroedLines::new(len).expect("memory");
            assert_eq!(buffer.lines().as_ptr() as usize % align, 0);
            let all = numbers_mut::<i32>(buffer.lines_mut());
            assert!(all.len() == len * LINE / 4 && all.iter().all(|&x| x == 0));
            all.fill(7);
            assert!(numbers::<i32>(buffer.lines()).iter().all(|&x| x == 7));
        }
        assert!(ZeroedLines::new(usize::MAX / LINE).is_none());
        assert!(ZeroedLines::new(usize::MAX).is_none());
    }

    #[test]
    #[should_panic(expected = "line 3 of 2")]
    fn views_end_with_the_lines() {
        let mut lines = Lines::default();
        lines.resize(2);
        lines.view::<f32>(3);
    }
}
