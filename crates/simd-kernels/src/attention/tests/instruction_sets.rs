//! The instruction sets beyond AVX2 compute what it does.

use super::*;
use crate::isa::witness::assert_entered_avx512;

/// Accumulators, maxima and sums; NaN, of which there are many, as one.
fn bits(isa: Isa, case: &Case) -> Vec<u32> {
    let mut state = case.state();
    attention_streaming(isa, &case.input(case.keys.clone()), &mut state);
    let numbers = [state.acc, state.max, state.sum].concat();
    numbers.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

#[test]
fn they_agree_with_it_to_the_last_bit() {
    for format in FORMATS {
        for head_dim in [10, 64, 80, 127, 128] {
            for start in [0, 21, 29, 70, 110] {
                let mut case = Case::new(format, head_dim, 300, ragged(40, 300), start..300);
                for special in [0.0, f32::INFINITY, f32::NAN] {
                    case.q[7 * head_dim] = special;
                    let mut sets = Isa::all().filter(|isa| isa.has_avx2());
                    let Some(first) = sets.next().map(|isa| bits(isa, &case)) else { return };
                    for isa in sets {
                        let what =
                            format!("{isa}, {format}, head_dim {head_dim}, keys from {start} on, a query of {special}");
                        assert!(bits(isa, &case) == first, "{what}: differs from AVX2");
                    }
                }
            }
        }
    }
    assert_entered_avx512("wide::step");
}
