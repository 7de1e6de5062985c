//! Memory for messages: buffers of long ones are used again, since to touch fresh memory takes
//! longer than to move what comes into it.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of the longest message that this crate sends, and of every buffer that is kept.
pub(crate) const LONGEST: usize = 512 << 10;
/// Messages of up to this many bytes are in memory that the allocator has at hand.
const SHORT: usize = 32 << 10;
/// So many buffers are kept at most.
const KEPT: usize = 32;

/// Buffers that wait for their next message.
#[derive(Default)]
pub(crate) struct Buffers {
    spare: Mutex<Vec<Vec<u8>>>,
}

/// The bytes of one message.
pub(crate) struct Buffer<'b> {
    owner: &'b Buffers,
    bytes: Vec<u8>,
    length: usize,
}

impl Buffers {
    /// A buffer of `length` bytes, with anything in them.
    pub(crate) fn of(&self, length: usize) -> Buffer<'_> {
        let kept = if (SHORT + 1..=LONGEST).contains(&length) {
            let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
            Some(spare.unwrap_or_else(|| vec![0; LONGEST]))
        } else {
            None
        };
        Buffer { owner: self, bytes: kept.unwrap_or_else(|| vec![0; length]), length }
    }

    /// A buffer with these bytes.
    pub(crate) fn with(&self, bytes: &[u8]) -> Arc<Buffer<'_>> {
        let mut buffer = self.of(bytes.len());
        buffer.copy_from_slice(bytes);
        Arc::new(buffer)
    }
}

impl Deref for Buffer<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        if self.bytes.len() == LONGEST {
            let mut spare = self.owner.spare.lock().unwrap_or_else(PoisonError::into_inner);
            if spare.len() < KEPT {
                spare.push(std::mem::take(&mut self.bytes));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_buffers_come_back_and_short_ones_do_not() {
        let buffers = Buffers::default();
        let kept = || buffers.spare.lock().unwrap().len();
        for length in [0, 1, SHORT] {
            assert_eq!(buffers.of(length).len(), length);
            assert_eq!(kept(), 0, "of {length} bytes");
        }
        for length in [SHORT + 1, LONGEST, 100_000] {
            let mut buffer = buffers.of(length);
            assert_eq!((buffer.len(), kept()), (length, 0));
            buffer.fill(7);
            drop(buffer);
            assert_eq!(kept(), 1, "of {length} bytes");
        }
        assert_eq!(buffers.of(LONGEST + 1).len(), LONGEST + 1);
        drop((0..2 * KEPT).map(|_| buffers.of(LONGEST)).collect::<Vec<_>>());
        assert_eq!(kept(), KEPT);
    }
}
