//! A piece of memory that several ranks see: of this process, or mapped by all processes of a
//! machine.
//!
//! The front holds 64-bit atomic words, open to everyone at any time. The rest holds data, cut into
//! regions that [`exchange`](crate::exchange) and [`mail`](crate::mail) hand from rank to rank with
//! those words. Nothing has a name in a file system, so nothing is left behind, however a process
//! ends.

use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

#[cfg(any(feature = "mpi", test))]
use std::{fs, io, os::fd::AsRawFd, os::fd::FromRawFd};

/// Regions start at multiples of this: two cache lines, since processors fetch them in pairs.
pub(crate) const LINE: usize = 128;

/// Zeroed memory with shared access.
pub(crate) struct Segment {
    base: NonNull<u8>,
    words: usize,
    data: usize,
    bytes: usize,
}

// SAFETY: the memory belongs to the mapping, not to a thread; `word` gives out atomics, and the
// callers of `data` and `data_mut` uphold that no region is written while another rank reads or
// writes it.
unsafe impl Send for Segment {}
// SAFETY: as above.
unsafe impl Sync for Segment {}

impl Segment {
    fn lengths(word_bytes: usize, data_bytes: usize) -> (usize, usize) {
        let data = word_bytes.max(8).next_multiple_of(LINE);
        (data, data.checked_add(data_bytes).expect("segment size overflows"))
    }

    fn map(
        flags: libc::c_int,
        fd: libc::c_int,
        word_bytes: usize,
        data_bytes: usize,
    ) -> Option<Self> {
        let (data, bytes) = Self::lengths(word_bytes, data_bytes);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the system's choice touches no memory in use.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = NonNull::new(base.cast())?;
        Some(Segment { base, words: data / 8, data, bytes })
    }

    /// Memory of this process, for `word_bytes` of atomic words and `data_bytes` of data.
    pub(crate) fn private(word_bytes: usize, data_bytes: usize) -> Segment {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        Self::map(flags, -1, word_bytes, data_bytes).unwrap_or_else(|| {
            panic!("no memory for {} bytes between threads", word_bytes + data_bytes)
        })
    }

    /// Memory that other processes can map through the returned file as long as it is open.
    #[cfg(all(target_os = "linux", any(feature = "mpi", test)))]
    pub(crate) fn create(word_bytes: usize, data_bytes: usize) -> io::Result<(Segment, fs::File)> {
        // SAFETY: the name is a C string; the call touches no other memory.
        let fd = unsafe { libc::memfd_create(c"comm".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        let file = unsafe { fs::File::from_raw_fd(fd) };
        file.set_len(Self::lengths(word_bytes, data_bytes).1 as u64)?;
        Ok((Self::of_file(&file, word_bytes, data_bytes)?, file))
    }

    /// Systems without memory files have no shared path between processes.
    #[cfg(all(not(target_os = "linux"), any(feature = "mpi", test)))]
    pub(crate) fn create(_words: usize, _data: usize) -> io::Result<(Segment, fs::File)> {
        Err(io::Error::other("this system has no memfd_create"))
    }

    /// Maps what another process created; `file` is its file, opened through `/proc`.
    #[cfg(any(feature = "mpi", test))]
    pub(crate) fn of_file(
        file: &fs::File,
        word_bytes: usize,
        data_bytes: usize,
    ) -> io::Result<Segment> {
        let (_, bytes) = Self::lengths(word_bytes, data_bytes);
        let found = file.metadata()?.len();
        if found != bytes as u64 {
            return Err(io::Error::other(format!(
                "the segment has {found} bytes, expected {bytes}"
            )));
        }
        Self::map(libc::MAP_SHARED, file.as_raw_fd(), word_bytes, data_bytes)
            .ok_or_else(io::Error::last_os_error)
    }

    /// The atomic word `index`.
    #[inline]
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words, "word {index} of {}", self.words);
        // SAFETY: in bounds (just checked), aligned (a page-aligned base plus a multiple of 8),
        // zeroed at the start, and reached as an atomic only: `data` and `data_mut` begin behind
        // the words.
        unsafe { AtomicU64::from_ptr(self.base.as_ptr().cast::<u64>().add(index)) }
    }

    /// Bytes `start..start + len` of the data.
    ///
    /// # Safety
    /// No rank, in this process or another, writes the region while the slice lives.
    #[inline]
    pub(crate) unsafe fn data(&self, start: usize, len: usize) -> &[u8] {
        self.check(start, len);
        // SAFETY: in bounds (just checked), initialized (zeroed by the system), unwritten (the
        // caller).
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(self.data + start), len) }
    }

    /// Bytes `start..start + len` of the data, to write.
    ///
    /// # Safety
    /// No rank, in this process or another, reads or writes the region while the slice lives.
    #[inline]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn data_mut(&self, start: usize, len: usize) -> &mut [u8] {
        self.check(start, len);
        // SAFETY: in bounds (just checked), initialized (zeroed by the system), exclusive (the
        // caller).
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(self.data + start), len) }
    }

    #[inline]
    fn check(&self, start: usize, len: usize) {
        let room = self.bytes - self.data;
        assert!(start <= room && len <= room - start, "{len} bytes at {start} of {room}");
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the mapping is this segment's own, and no borrow of it outlives the segment.
        let code = unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert_eq!(code, 0, "munmap returned {code}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::SeqCst;

    #[test]
    fn two_mappings_of_one_file_share_words_and_data() {
        let (first, file) = Segment::create(16, 1000).unwrap();
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let open = || fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let second = Segment::of_file(&open(), 16, 1000).unwrap();
        assert!(Segment::of_file(&open(), 16, 1001).is_err());
        drop(file);
        first.word(1).store(7, SeqCst);
        assert_eq!(second.word(1).load(SeqCst), 7);
        // SAFETY: one thread, and the two slices are not used at the same time.
        unsafe {
            first.data_mut(990, 10).fill(9);
            assert_eq!(second.data(989, 11), [0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]);
        }
    }

    #[test]
    #[should_panic(expected = "2 bytes at 999 of 1000")]
    fn regions_outside_are_refused() {
        let segment = Segment::private(8, 1000);
        // SAFETY: refused before memory is touched.
        let _ = unsafe { segment.data(999, 2) };
    }
}
