//! Balanced splits of an index range over ranks or threads.

use std::ops::Range;

/// The part of `0..n` that belongs to `index` of `parts`.
///
/// Parts are contiguous, in order, and cover `0..n`; the first `n % parts` of them have one element
/// more than the others, so with `parts > n` the last ones are empty.
///
/// # Panics
///
/// If `index >= parts`.
///
/// ```
/// assert_eq!(tensor::split_range(10, 4, 0), 0..3);
/// assert_eq!(tensor::split_range(10, 4, 3), 8..10);
/// ```
pub fn split_range(n: usize, parts: usize, index: usize) -> Range<usize> {
    assert!(index < parts, "part {index} of {parts}");
    let (share, extra) = (n / parts, n % parts);
    let start = index * share + index.min(extra);
    start..start + share + usize::from(index < extra)
}

/// As [`split_range`], but cuts only at multiples of `granularity`; the last granule may be short.
///
/// Used where a cut inside a granule would cost something: a head, a quantization group, a weight
/// panel.
///
/// # Panics
///
/// If `index >= parts` or `granularity` is 0.
///
/// ```
/// assert_eq!(tensor::split_granular(100, 32, 2, 0), 0..64);
/// assert_eq!(tensor::split_granular(100, 32, 2, 1), 64..100);
/// ```
pub fn split_granular(n: usize, granularity: usize, parts: usize, index: usize) -> Range<usize> {
    assert!(granularity > 0, "granules of 0 elements cannot cover {n}");
    let granules = split_range(n.div_ceil(granularity), parts, index);
    // A bound can pass `n` only in the last granule, where the product cannot overflow by more than
    // that granule.
    let bound = |granule: usize| granule.saturating_mul(granularity).min(n);
    bound(granules.start)..bound(granules.end)
}
