//! Zeroed memory for weights, in huge pages as far as that costs no memory.
//!
//! A matrix of one layer is often smaller than a few 2 MiB pages, and ends in the middle of one.
//! So:
//!
//! - large buffers have a mapping of their own, whose end is in small pages;
//! - middling ones are cut from a shared mapping, one after the other, so that huge pages have no
//!   gaps; what a process can lose is the rest of the last page of each shared mapping, below 1 %;
//! - small ones come from the ordinary allocator.
//!
//! Cuts of a shared mapping are never used again: the mapping goes when its last buffer does.
//! Models are loaded and dropped as a whole, so nothing smarter pays.

use std::{
    alloc, ptr,
    ptr::NonNull,
    slice,
    sync::{Arc, Mutex, PoisonError, Weak},
};

const HUGE_PAGE: usize = 2 << 20;

/// From this size on a buffer has its own mapping.
const LARGE: usize = 32 << 20;

/// Below this size a buffer comes from the ordinary allocator.
const SMALL: usize = 64 << 10;

/// Address space of a shared mapping; only what is touched takes memory. Where the address space is
/// limited (`ulimit -v`) and has no such piece, [`LARGE`] bytes have to do.
const SHARED: usize = 256 << 20;

/// A cache line, which is also the widest load of any kernel.
const ALIGN: usize = 64;

/// The shared mapping that is being cut, and how much of it is gone.
static CURRENT: Mutex<(Weak<Mapping>, usize)> = Mutex::new((Weak::new(), 0));

/// A fixed number of bytes, zero until written, aligned to a cache line. Pages become resident when
/// first touched, so the thread that fills a part decides on which NUMA node it lives.
pub(crate) struct HugeBuffer {
    data: NonNull<u8>,
    len: usize,
    owner: Owner,
}

/// What is freed with the buffer.
enum Owner {
    Nothing,
    Heap(alloc::Layout),
    Mapping { _keep: Arc<Mapping> },
}

// SAFETY: the buffer alone refers to its bytes; shared access is reads only, writes need `&mut`.
unsafe impl Send for HugeBuffer {}
// SAFETY: as above.
unsafe impl Sync for HugeBuffer {}

impl HugeBuffer {
    /// `len` zero bytes. Out of memory ends the process as it does for `Vec`.
    pub(crate) fn zeroed(len: usize) -> Self {
        match len {
            0 => Self { data: NonNull::<CacheLine>::dangling().cast(), len, owner: Owner::Nothing },
            _ if len < SMALL => Self::on_heap(len),
            _ if len < LARGE => Self::cut(len),
            _ => {
                let mapping = Arc::new(Mapping::new(len));
                Self { data: mapping.start, len, owner: Owner::Mapping { _keep: mapping } }
            }
        }
    }

    fn on_heap(len: usize) -> Self {
        let layout = alloc::Layout::from_size_align(len, ALIGN).expect("a small size");
        // SAFETY: the layout has a size above 0: `zeroed` handles 0.
        let data = unsafe { alloc::alloc_zeroed(layout) };
        let data = NonNull::new(data).unwrap_or_else(|| alloc::handle_alloc_error(layout));
        Self { data, len, owner: Owner::Heap(layout) }
    }

    /// The next piece of the shared mapping.
    fn cut(len: usize) -> Self {
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let mapping = match current.0.upgrade() {
            Some(mapping) if len <= mapping.len - current.1 => mapping,
            _ => {
                let mapping = Mapping::try_new(SHARED).unwrap_or_else(|| Mapping::new(LARGE));
                let mapping = Arc::new(mapping);
                *current = (Arc::downgrade(&mapping), 0);
                mapping
            }
        };
        let offset = current.1;
        current.1 = (offset + len).next_multiple_of(ALIGN).min(mapping.len);
        // SAFETY: `offset + len` is within the mapping. No other buffer has these bytes: offsets
        // only grow while the mapping lives, and a new mapping starts anew.
        let data = unsafe { mapping.start.add(offset) };
        Self { data, len, owner: Owner::Mapping { _keep: mapping } }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `data` points at `len` initialized (zeroed) bytes that live as long as the owner
        // and belong to this buffer; for 0 bytes the pointer is dangling but aligned.
        unsafe { slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` excludes every other reference.
        unsafe { slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl Drop for HugeBuffer {
    fn drop(&mut self) {
        if let Owner::Heap(layout) = self.owner {
            // SAFETY: allocated with this layout in `on_heap`, freed once.
            unsafe { alloc::dealloc(self.data.as_ptr(), layout) }
        }
    }
}

/// Has the threads of this process share one heap. glibc otherwise reserves 64 MiB of address space
/// for a heap of each thread, which a small limit on address space (`RLIMIT_AS`) does not allow.
/// Costs speed where many threads allocate at once, so only processes with such a limit call it,
/// before they start threads. Does nothing with other C libraries.
pub fn share_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets a number of the allocator; no memory is touched.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

#[repr(align(64))]
struct CacheLine;

/// An anonymous mapping that starts at a multiple of 2 MiB and asks for huge pages.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is only an address range here; its bytes are reached through the buffers that
// own parts of it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// As [`try_new`](Self::try_new); a refusal ends the process as it does for `Vec`.
    fn new(len: usize) -> Self {
        Self::try_new(len).unwrap_or_else(|| match alloc::Layout::from_size_align(len, HUGE_PAGE) {
            Ok(layout) => alloc::handle_alloc_error(layout),
            Err(_) => panic!("{len} bytes exceed the address space"),
        })
    }

    /// At least `len` bytes (`len` > 0), rounded up to small pages: nothing beyond the last one can
    /// become resident. `None` where the system refuses them.
    fn try_new(len: usize) -> Option<Self> {
        let kept = len.checked_next_multiple_of(page_size())?;
        let reserved = kept.checked_add(HUGE_PAGE)?;
        // SAFETY: a new private anonymous mapping touches no existing memory.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserved,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        // mmap aligns to small pages only: cut an aligned piece out of a mapping that is one huge
        // page longer.
        let before = base.align_offset(HUGE_PAGE);
        let start = base.wrapping_byte_add(before);
        let after = reserved - before - kept;
        // SAFETY: both pieces lie inside the mapping made above, on page borders (`before` because
        // the base and 2 MiB are, `kept` by rounding), and nothing refers to them. A length of 0 is
        // skipped.
        unsafe {
            if before > 0 {
                libc::munmap(base, before);
            }
            if after > 0 {
                libc::munmap(start.wrapping_byte_add(kept), after);
            }
        }
        #[cfg(target_os = "linux")]
        // SAFETY: the range is the mapping that remains; the advice changes no contents. Its
        // failure (a kernel without huge pages) only costs speed.
        unsafe {
            libc::madvise(start, kept, libc::MADV_HUGEPAGE);
        }
        let start = NonNull::new(start.cast()).expect("mmap never chooses address 0");
        Some(Self { start, len: kept })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: what `new` kept of its mapping, unmapped once; the last buffer in it is gone,
        // since each holds an `Arc`.
        unsafe {
            libc::munmap(self.start.as_ptr().cast(), self.len);
        }
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf reads a constant of the system.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(HUGE_PAGE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes around every border between the three kinds.
    const SIZES: [usize; 10] = [
        0,
        1,
        100,
        SMALL - 1,
        SMALL,
        SMALL + 1,
        3 << 20,
        LARGE - 1,
        LARGE,
        LARGE + HUGE_PAGE + 12345,
    ];

    #[test]
    fn zeroed_aligned_and_writable_to_the_last_byte() {
        for len in SIZES {
            let mut buffer = HugeBuffer::zeroed(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.bytes().as_ptr() as usize % ALIGN, 0, "{len}");
            assert!(buffer.bytes().iter().all(|&byte| byte == 0), "{len}");
            buffer.bytes_mut().fill(7);
            assert!(buffer.bytes().iter().all(|&byte| byte == 7), "{len}");
        }
    }

    #[test]
    fn buffers_do_not_share_bytes() {
        // More than one shared mapping's worth of address space, little of it touched.
        let mut buffers: Vec<HugeBuffer> =
            (0..40).map(|_| HugeBuffer::zeroed(LARGE - 4097)).collect();
        for (index, buffer) in buffers.iter_mut().enumerate() {
            let bytes = buffer.bytes_mut();
            bytes[0] = index as u8 + 1;
            *bytes.last_mut().unwrap() = index as u8 + 1;
        }
        buffers.remove(3);
        for (index, buffer) in buffers.iter().enumerate() {
            let expected = if index < 3 { index as u8 + 1 } else { index as u8 + 2 };
            assert_eq!((buffer.bytes()[0], *buffer.bytes().last().unwrap()), (expected, expected));
        }
    }

    #[test]
    fn a_freed_shared_mapping_does_not_come_back_dirty() {
        for _ in 0..3 {
            let mut buffer = HugeBuffer::zeroed(SMALL);
            assert!(buffer.bytes().iter().all(|&byte| byte == 0));
            buffer.bytes_mut().fill(9);
        }
    }

    #[test]
    fn threads_may_allocate_side_by_side() {
        let buffers = std::thread::scope(|scope| {
            let run = |mark: u8| {
                move || {
                    let mut buffers: Vec<_> =
                        (0..20).map(|_| HugeBuffer::zeroed(SMALL + 3)).collect();
                    buffers.iter_mut().for_each(|buffer| buffer.bytes_mut().fill(mark));
                    buffers
                }
            };
            let threads: Vec<_> = (1..=4).map(|mark| (mark, scope.spawn(run(mark)))).collect();
            threads
                .into_iter()
                .map(|(mark, thread)| (mark, thread.join().unwrap()))
                .collect::<Vec<_>>()
        });
        for (mark, buffers) in buffers {
            assert!(buffers.iter().all(|buffer| buffer.bytes().iter().all(|&byte| byte == mark)));
        }
    }
}
