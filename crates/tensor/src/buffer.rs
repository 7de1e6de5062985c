//! Zeroed memory for weights: 2 MiB-aligned, backed by huge pages where that costs no memory.

use std::{alloc, ptr, ptr::NonNull, slice};

const HUGE_PAGE: usize = 2 << 20;

/// Below this size a buffer comes from the ordinary allocator, aligned to a cache line.
const SMALL: usize = 1 << 20;

/// Alignment of small buffers: a cache line, which is also the widest load of any kernel.
const SMALL_ALIGN: usize = 64;

/// A fixed number of bytes, zero until written. Pages become resident when first touched, so the thread that fills a
/// part decides on which NUMA node it lives.
pub(crate) struct HugeBuffer {
    data: NonNull<u8>,
    len: usize,
    origin: Origin,
}

enum Origin {
    Empty,
    Heap(alloc::Layout),
    /// An anonymous mapping of this many bytes that starts at `data`.
    Map(usize),
}

// SAFETY: the buffer owns its memory alone; shared access is reads only, writes need `&mut`.
unsafe impl Send for HugeBuffer {}
// SAFETY: as above.
unsafe impl Sync for HugeBuffer {}

impl HugeBuffer {
    /// `len` zero bytes. Out of memory ends the process as it does for `Vec`.
    pub(crate) fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self { data: NonNull::<u64>::dangling().cast(), len, origin: Origin::Empty };
        }
        if len < SMALL {
            return Self::zeroed_small(len);
        }
        Self::zeroed_mapped(len)
    }

    fn zeroed_small(len: usize) -> Self {
        let layout = alloc::Layout::from_size_align(len, SMALL_ALIGN).expect("below 1 MiB");
        // SAFETY: the layout has a size above 0: `zeroed` handles 0.
        let data = unsafe { alloc::alloc_zeroed(layout) };
        let data = NonNull::new(data).unwrap_or_else(|| alloc::handle_alloc_error(layout));
        Self { data, len, origin: Origin::Heap(layout) }
    }

    fn zeroed_mapped(len: usize) -> Self {
        let failed = || -> ! {
            match alloc::Layout::from_size_align(len, HUGE_PAGE) {
                Ok(layout) => alloc::handle_alloc_error(layout),
                Err(_) => panic!("{len} bytes exceed the address space"),
            }
        };
        let page = page_size();
        let Some(mapped) = len.checked_next_multiple_of(page) else { failed() };
        let Some(reserved) = mapped.checked_add(HUGE_PAGE) else { failed() };
        // SAFETY: a new private anonymous mapping touches no existing memory.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserved,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            failed()
        }
        // mmap aligns to small pages only: cut an aligned piece out of a mapping that is one huge page longer.
        let before = base.align_offset(HUGE_PAGE);
        let after = reserved - before - mapped;
        let data = base.wrapping_byte_add(before);
        // SAFETY: both pieces lie inside the mapping made above, on page borders (`before` because the base and 2 MiB
        // are, `mapped` by rounding), and nothing refers to them. A length of 0 is skipped.
        unsafe {
            if before > 0 {
                libc::munmap(base, before);
            }
            if after > 0 {
                libc::munmap(data.wrapping_byte_add(mapped), after);
            }
        }
        // The end of a mapping that does not fill a huge page stays in small pages: nothing is resident beyond it.
        #[cfg(target_os = "linux")]
        // SAFETY: the range is the mapping that remains; the advice changes no contents. Its failure (a kernel
        // without huge pages) only costs speed.
        unsafe {
            libc::madvise(data, mapped, libc::MADV_HUGEPAGE);
        }
        let data = NonNull::new(data.cast()).expect("mmap never maps address 0 unasked");
        Self { data, len, origin: Origin::Map(mapped) }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `data` points at `len` initialized (zeroed) bytes owned by self; `len` fits in isize because it was
        // allocated; for 0 bytes the pointer is dangling but aligned.
        unsafe { slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` excludes every other reference.
        unsafe { slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl Drop for HugeBuffer {
    fn drop(&mut self) {
        match self.origin {
            Origin::Empty => {}
            // SAFETY: allocated with this layout in `zeroed_small`, freed once.
            Origin::Heap(layout) => unsafe { alloc::dealloc(self.data.as_ptr(), layout) },
            // SAFETY: what `zeroed_mapped` kept of its mapping, unmapped once.
            Origin::Map(mapped) => unsafe {
                libc::munmap(self.data.as_ptr().cast(), mapped);
            },
        }
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf reads a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(HUGE_PAGE)
}
