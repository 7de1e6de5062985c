//! Rows of bytes in a file, of which any part can be read.

use std::{ops::Range, path::Path, sync::Arc};

use crate::{CheckpointError, file::WeightFile};

/// Rows that are cut narrower than the file's are read one by one, unless at most this many bytes
/// lie between two of them: then one read takes them all. A system call costs about what copying 2
/// KB costs; twice that would already read whole file pages that nobody asked for.
const MERGE_GAP: usize = 1024;

/// A merged read is cut into pieces of at most about this size, which stay in the cache until they
/// are used.
const PIECE: usize = 256 << 10;

/// Consecutive rows of equal length in a file. The header was checked: all of them lie in the file.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub(crate) file: Arc<WeightFile>,
    /// The tensor, for messages.
    pub(crate) name: Arc<str>,
    /// Of the first row, in the file.
    pub(crate) offset: u64,
    pub(crate) rows: usize,
    pub(crate) row_bytes: usize,
}

impl Region {
    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    /// Reads the bytes `span` of each of `rows` into `out` `[rows, span]`.
    ///
    /// # Panics
    ///
    /// If rows or bytes are out of range, or `out` has another length.
    pub(crate) fn read(
        &self,
        rows: Range<usize>,
        span: Range<usize>,
        out: &mut [u8],
        merged: &mut Vec<u8>,
    ) -> Result<(), CheckpointError> {
        assert!(rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(span.end <= self.row_bytes, "bytes {span:?} of {}", self.row_bytes);
        assert_eq!(out.len(), rows.len() * span.len(), "{} rows of {}", rows.len(), span.len());
        if out.is_empty() {
            return Ok(());
        }
        let read = |row: usize, out: &mut [u8]| {
            let offset = self.offset + (row * self.row_bytes + span.start) as u64;
            self.file.read_at(&self.name, offset, out)
        };
        let gap = self.row_bytes - span.len();
        if gap == 0 {
            return read(rows.start, out);
        }
        if gap > MERGE_GAP {
            for (row, out) in rows.zip(out.chunks_exact_mut(span.len())) {
                read(row, out)?;
            }
            return Ok(());
        }
        let batch = (PIECE / self.row_bytes).max(1);
        for (row, out) in rows.step_by(batch).zip(out.chunks_mut(batch * span.len())) {
            let count = out.len() / span.len();
            merged.resize((count - 1) * self.row_bytes + span.len(), 0);
            read(row, merged)?;
            for (from, to) in merged.chunks(self.row_bytes).zip(out.chunks_exact_mut(span.len())) {
                to.copy_from_slice(&from[..span.len()]);
            }
        }
        Ok(())
    }

    /// The error for a weight or scale that is not finite.
    pub(crate) fn not_finite(&self, row: usize, found: f32) -> CheckpointError {
        CheckpointError::NotFinite {
            file: self.path().to_owned(),
            tensor: self.name.to_string(),
            row,
            found,
        }
    }
}

/// Bytes whose start is aligned for every element type.
#[derive(Debug, Default)]
pub(crate) struct Buffer(Vec<u64>);

impl Buffer {
    /// The first `len` bytes, whose contents are unspecified.
    pub(crate) fn bytes(&mut self, len: usize) -> &mut [u8] {
        self.0.resize(len.div_ceil(8), 0);
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }
}
