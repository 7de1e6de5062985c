//! A mutable block of a row-major matrix that threads may cut into columns and fill side by side.

use std::marker::PhantomData;

/// A mutable block `[rows, cols]` inside a row-major buffer whose rows are `stride` elements apart.
///
/// Unlike a slice it can be cut into columns: the pieces share rows of the buffer but no element.
#[derive(Debug)]
pub struct MatMut<'a> {
    start: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a MatMut is an exclusive borrow of its elements, as `&mut [f32]` is, and pieces never
// overlap.
unsafe impl Send for MatMut<'_> {}
// SAFETY: a shared MatMut only answers its sizes; elements are reached through `&mut self`.
unsafe impl Sync for MatMut<'_> {}

impl<'a> MatMut<'a> {
    /// The first `cols` elements of each of `rows` rows, row `i` at `data[i * stride..]`.
    ///
    /// # Panics
    /// When the rows overlap (`cols > stride`) or the last one ends beyond `data`.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> MatMut<'a> {
        assert!(
            rows <= 1 || cols <= stride,
            "rows of {cols} columns at a stride of {stride} overlap"
        );
        // No buffer has as many elements as a sum that does not fit comes to here.
        let needed =
            if rows == 0 { 0 } else { (rows - 1).saturating_mul(stride).saturating_add(cols) };
        assert!(
            needed <= data.len(),
            "[{rows}, {cols}] at stride {stride} takes {needed} elements, got {}",
            data.len()
        );
        MatMut { start: data.as_mut_ptr(), rows, cols, stride, owner: PhantomData }
    }

    /// Rows of the block.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the block.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `row`, all its columns.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: `new` checked that row `row < rows` lies in the borrowed buffer, splitting only
        // narrowed the block, and `&mut self` makes this the only view of these elements.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.stride), self.cols) }
    }

    /// The columns before `at` and those from `at` on.
    ///
    /// # Panics
    /// When `at` is beyond the last column.
    pub fn split_cols(self, at: usize) -> (MatMut<'a>, MatMut<'a>) {
        assert!(at <= self.cols, "column {at} of {}", self.cols);
        // Without rows the block may be empty memory; then the pointer must not move.
        let offset = if self.rows == 0 { 0 } else { at };
        // SAFETY: with a row, `offset <= cols` stays within that row of the buffer or one past its
        // end.
        let right = unsafe { self.start.add(offset) };
        (MatMut { cols: at, ..self }, MatMut { start: right, cols: self.cols - at, ..self })
    }

    /// The rows before `at` and those from `at` on.
    ///
    /// # Panics
    /// When `at` is beyond the last row.
    pub fn split_rows(self, at: usize) -> (MatMut<'a>, MatMut<'a>) {
        assert!(at <= self.rows, "row {at} of {}", self.rows);
        // The start of the row after the last one may lie beyond the buffer (the last row need not
        // be a full stride long), so an empty lower part keeps the old pointer.
        let offset = if at == self.rows { 0 } else { at * self.stride };
        // SAFETY: row `at` exists here, so its start is inside the buffer.
        let lower = unsafe { self.start.add(offset) };
        (MatMut { rows: at, ..self }, MatMut { start: lower, rows: self.rows - at, ..self })
    }

    /// The same block for a shorter time, for a callee that takes it by value.
    pub fn reborrow(&mut self) -> MatMut<'_> {
        MatMut {
            start: self.start,
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
            owner: PhantomData,
        }
    }

    /// The first element and the distance between rows, for libraries that take a pointer.
    pub(crate) fn as_mut_ptr(&mut self) -> (*mut f32, usize) {
        (self.start, self.stride)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_block_once() {
        for (rows, cols, stride) in [(0, 0, 0), (0, 5, 5), (1, 3, 3), (4, 5, 7), (3, 0, 2)] {
            for row_cut in 0..=rows {
                for col_cut in 0..=cols {
                    let len = if rows == 0 { 0 } else { (rows - 1) * stride + cols };
                    let mut data = vec![0.0; len];
                    let (top, bottom) =
                        MatMut::new(&mut data, rows, cols, stride).split_rows(row_cut);
                    for part in [top, bottom] {
                        let (left, right) = part.split_cols(col_cut);
                        for mut piece in [left, right] {
                            for row in 0..piece.rows() {
                                piece.row_mut(row).iter_mut().for_each(|x| *x += 1.0);
                            }
                        }
                    }
                    for (i, &x) in data.iter().enumerate() {
                        let inside = i % stride.max(1) < cols;
                        assert_eq!(
                            x,
                            f32::from(u8::from(inside)),
                            "[{rows}, {cols}] stride {stride} at {i}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "takes 13 elements, got 12")]
    fn a_short_buffer_is_refused() {
        MatMut::new(&mut [0.0; 12], 3, 3, 5);
    }

    #[test]
    #[should_panic(expected = "got 16")]
    fn a_size_that_overflows_is_refused() {
        MatMut::new(&mut [0.0; 16], 9, 1, 1 << 61);
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn overlapping_rows_are_refused() {
        MatMut::new(&mut [0.0; 12], 2, 4, 3);
    }
}
