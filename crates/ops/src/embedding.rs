//! Token embeddings, read from the checkpoint row by row as they are needed.

use tensor::{Activations, CheckpointError, Matrix};

use crate::linear::reshape;

/// The embedding table [vocabulary, hidden].
///
/// It stays in the file: a token needs one row of it, the system's page cache keeps the rows that
/// are used, and no rank holds the table in memory or asks another rank for a row.
pub struct Embedding {
    table: Matrix,
}

impl Embedding {
    /// An embedding that reads the rows of `table` [vocabulary, hidden].
    pub fn new(table: Matrix) -> Self {
        Self { table }
    }

    /// Writes the rows of `tokens` into `out` [tokens, hidden]. Each token must be below the
    /// vocabulary's size.
    ///
    /// # Errors
    /// When the checkpoint can no longer be read.
    pub fn lookup(
        &self,
        tokens: impl ExactSizeIterator<Item = u32>,
        out: &mut Activations,
    ) -> Result<(), CheckpointError> {
        reshape(out, tokens.len(), self.table.cols());
        for (row, token) in out.outer_iter_mut().zip(tokens) {
            let row = row.into_slice().expect("rows of activations are contiguous");
            self.table.read_row(token as usize, row)?;
        }
        Ok(())
    }
}
