//! Token embeddings, read from the checkpoint row by row on demand.

use tensor::{Activations, MatrixSource};

use crate::linear::reshape;

/// The embedding table [vocabulary, hidden].
///
/// The table stays in the file. A token needs one row, and the page cache of the operating system
/// keeps the rows that are used. No rank holds the table in memory or asks another rank for a row.
pub struct Embedding<M> {
    table: M,
}

impl<M: MatrixSource> Embedding<M> {
    /// An embedding that reads the rows of `table` [vocabulary, hidden].
    pub fn new(table: M) -> Self {
        Self { table }
    }

    /// Writes the rows of `tokens` into `out` [tokens, hidden]. Each token must be below the
    /// vocabulary's size.
    ///
    /// # Errors
    /// When the table can no longer be read.
    pub fn lookup(
        &self,
        tokens: impl ExactSizeIterator<Item = u32>,
        out: &mut Activations,
    ) -> Result<(), M::Error> {
        reshape(out, tokens.len(), self.table.cols());
        let mut scratch = M::Scratch::default();
        for (row, token) in out.outer_iter_mut().zip(tokens) {
            let row = row.into_slice().expect("rows of activations are contiguous");
            let token = token as usize;
            self.table.read_f32(token..token + 1, row, &mut scratch)?;
        }
        Ok(())
    }
}
