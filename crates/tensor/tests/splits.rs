//! Splits cover, in order, in balance, at granules.

use proptest::prelude::*;
use tensor::{split_granular, split_range};

proptest! {
    #[test]
    fn parts_cover_in_order_and_balance(n in 0_usize..5000, parts in 1_usize..70) {
        let ranges: Vec<_> = (0..parts).map(|index| split_range(n, parts, index)).collect();
        prop_assert_eq!(ranges[0].start, 0);
        prop_assert_eq!(ranges[parts - 1].end, n);
        for pair in ranges.windows(2) {
            prop_assert_eq!(pair[0].end, pair[1].start);
            // The longer parts come first, by one element.
            prop_assert!(pair[0].len() == pair[1].len() || pair[0].len() == pair[1].len() + 1);
        }
        prop_assert!(ranges[0].len() - ranges[parts - 1].len() <= 1);
        prop_assert_eq!(ranges.iter().filter(|range| range.len() > n / parts).count(), n % parts);
    }

    #[test]
    fn granular_parts_cut_only_at_granules(n in 0_usize..5000, granularity in 1_usize..200, parts in 1_usize..70) {
        let ranges: Vec<_> = (0..parts).map(|index| split_granular(n, granularity, parts, index)).collect();
        prop_assert_eq!(ranges[0].start, 0);
        prop_assert_eq!(ranges[parts - 1].end, n);
        for pair in ranges.windows(2) {
            prop_assert_eq!(pair[0].end, pair[1].start);
            prop_assert!(pair[0].end == n || pair[0].end % granularity == 0);
        }
        let granules: Vec<_> = ranges.iter().map(|range| range.len().div_ceil(granularity)).collect();
        prop_assert!(granules.iter().max().unwrap() - granules.iter().min().unwrap() <= 1);
    }

    #[test]
    fn granules_of_one_are_the_plain_split(n in 0_usize..500, parts in 1_usize..20, index in 0_usize..20) {
        let index = index % parts;
        prop_assert_eq!(split_granular(n, 1, parts, index), split_range(n, parts, index));
    }
}

#[test]
fn more_parts_than_elements_leaves_the_last_empty() {
    let ranges: Vec<_> = (0..5).map(|index| split_range(3, 5, index)).collect();
    assert_eq!(ranges, [0..1, 1..2, 2..3, 3..3, 3..3]);
    let ranges: Vec<_> = (0..4).map(|index| split_granular(40, 32, 4, index)).collect();
    assert_eq!(ranges, [0..32, 32..40, 40..40, 40..40]);
}

#[test]
fn the_largest_counts_do_not_overflow() {
    assert_eq!(split_range(usize::MAX, 3, 2).end, usize::MAX);
    assert_eq!(split_granular(usize::MAX, 32, 3, 2).end, usize::MAX);
}

#[test]
#[should_panic(expected = "part 2 of 2")]
fn a_part_beyond_the_last_is_a_broken_contract() {
    let _ = split_range(10, 2, 2);
}

#[test]
#[should_panic(expected = "granules of 0")]
fn granules_of_nothing_are_a_broken_contract() {
    let _ = split_granular(10, 0, 2, 1);
}
