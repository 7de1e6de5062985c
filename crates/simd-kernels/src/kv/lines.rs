//! Memory in whole cache lines, seen as slices of numbers.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// One cache line. The alignment keeps every 32-byte load of the attention kernels inside one line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

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

    /// Lines `from..` as numbers.
    pub(crate) fn view<T: Plain>(&self, from: usize) -> &[T] {
        assert!(from <= self.len, "line {from} of {}", self.len);
        let count = (self.len - from) * LINE / size_of::<T>();
        // SAFETY: lines from..len are written and ours for the borrow, `Plain` allows any bytes, a
        // line is aligned for T, and the length is rounded down to whole T.
        unsafe { std::slice::from_raw_parts(self.start.add(from).as_ptr().cast(), count) }
    }

    /// Lines `from..` as numbers to write.
    pub(crate) fn view_mut<T: Plain>(&mut self, from: usize) -> &mut [T] {
        assert!(from <= self.len, "line {from} of {}", self.len);
        let count = (self.len - from) * LINE / size_of::<T>();
        // SAFETY: as in `view`; the borrow is exclusive, and any T written is a valid pattern of
        // bytes.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from).as_ptr().cast(), count) }
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
        copy.view_mut::<u16>(0).copy_from_slice(self.view(0));
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
    #[should_panic(expected = "line 3 of 2")]
    fn views_end_with_the_lines() {
        let mut lines = Lines::default();
        lines.resize(2);
        lines.view::<f32>(3);
    }
}
