//! Memory in whole cache lines, seen as slices of numbers.

/// One cache line. The alignment keeps every 32-byte load of the attention kernels inside one line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// Bytes of a line.
pub(crate) const LINE: usize = 64;

/// Numbers for which every bit pattern is a value and whose alignment a line satisfies.
///
/// # Safety
/// Implementors have no padding, no invalid bit pattern, no destructor, and an alignment that divides [`LINE`].
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: a primitive number of four bytes.
unsafe impl Plain for f32 {}
// SAFETY: a primitive number of two bytes.
unsafe impl Plain for u16 {}
// SAFETY: a primitive number of one byte.
unsafe impl Plain for i8 {}
// SAFETY: an array has no padding beyond its elements', and their alignment.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// A growing buffer of zero-initialized lines.
#[derive(Clone, Default)]
pub(crate) struct Lines(Vec<Line>);

impl Lines {
    /// `n` lines, the new ones zero; the memory of lost ones is kept.
    pub(crate) fn resize(&mut self, n: usize) {
        self.0.resize(n, Line([0; LINE]));
    }

    /// At least `n` lines (contents unspecified), for use as scratch.
    pub(crate) fn grow(&mut self, n: usize) {
        if self.0.len() < n {
            self.resize(n);
        }
    }

    /// Makes room for `n` lines in all, without touching it.
    pub(crate) fn reserve(&mut self, n: usize) {
        self.0.reserve_exact(n.saturating_sub(self.0.len()));
    }

    /// Bytes in use.
    pub(crate) fn bytes(&self) -> usize {
        self.0.len() * LINE
    }

    /// Lines `from..` as numbers.
    pub(crate) fn view<T: Plain>(&self, from: usize) -> &[T] {
        let lines = &self.0[from..];
        // SAFETY: the slice owns its bytes for the borrow, `Plain` allows any bytes, a line is aligned for T, and the
        // length is rounded down to whole T.
        unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines) / size_of::<T>()) }
    }

    /// Lines `from..` as numbers to write.
    pub(crate) fn view_mut<T: Plain>(&mut self, from: usize) -> &mut [T] {
        let lines = &mut self.0[from..];
        let len = size_of_val(lines) / size_of::<T>();
        // SAFETY: as in `view`; the borrow is exclusive, and any T written is a valid pattern of bytes.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), len) }
    }
}
