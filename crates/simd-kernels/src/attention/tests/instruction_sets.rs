//! The instruction sets beyond AVX2 compute what it does.

use super::*;
use crate::isa::witness::assert_entered_avx512;

/// Accumulators, maxima and sums; NaN, of which there are many, as one.
fn bits(isa: Isa, case: &Case) -> Vec<u32> {
    let mut state = case.state();
    let middle = case.keys.start.midpoint(case.keys.end);
    for keys in [case.keys.start..middle, middle..case.keys.end] {
        case.attend(attention_streaming, isa, keys, &mut state);
    }
    let numbers = [state.acc, state.max, state.sum].concat();
    numbers.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

/// As they are, and with a number in a query, a key and a value that is not finite.
fn check(case: &Case) {
    let head_dim = case.kv.head_dim();
    for special in [0.0, f32::INFINITY, f32::NAN] {
        let mut case = case.clone();
        case.q[7 * head_dim] = special;
        compare(&case, &format!("a query of {special}"));
    }
    let mut case = case.clone();
    for (key, value, what) in [(f32::NAN, 1.0, "a key of NaN"), (1.0, f32::NAN, "a value of NaN")] {
        case.kv.truncate(290);
        for _ in 290..300 {
            case.kv.push_many(Isa::scalar(), &vec![key; head_dim], &vec![value; head_dim], 1);
        }
        compare(&case, what);
    }
}

fn compare(case: &Case, what: &str) {
    for arithmetic in [AttentionArithmetic::Float, AttentionArithmetic::Int16] {
        let case = Case { arithmetic, ..case.clone() };
        compare_sets(&case, &format!("{what}, {arithmetic:?}"));
    }
}

fn compare_sets(case: &Case, what: &str) {
    let mut sets = Isa::all().filter(|isa| isa.has_avx2());
    let Some(first) = sets.next().map(|isa| bits(isa, case)) else { return };
    for isa in sets {
        let (format, head_dim, rows) = (case.kv.format(), case.kv.head_dim(), case.visible.len());
        let what = format!(
            "{isa}, {format}, head_dim {head_dim}, {rows} rows, keys {:?}, {what}",
            case.keys
        );
        assert!(bits(isa, case) == first, "{what}: differs from AVX2");
    }
}

#[test]
fn they_agree_with_it_to_the_last_bit() {
    for format in FORMATS {
        for head_dim in [10, 64, 80, 127, 128] {
            for start in [0, 21, 29, 70, 110] {
                check(&Case::new(format, head_dim, 300, ragged(40, 300), start..300));
            }
        }
        // Groups of one, two and three vectors of sixteen rows, several of them, and several tiles
        // of rows.
        for rows in [13, 20, 33, 70, 100, 528, 529] {
            check(&Case::new(format, 16, 300, ragged(rows, 300), 5..300));
        }
    }
    assert_entered_avx512("wide::step");
}
