//! The instruction sets beyond AVX2 compute what it does.

use super::*;

#[test]
fn instruction_sets_beyond_avx2_agree_with_it_to_the_last_bit() {
    for format in FORMATS {
        for head_dim in [64, 80, 128] {
            for start in [0, 21, 70] {
                let case = Case::new(format, head_dim, 300, ragged(40, 300), start..300);
                let mut first: Option<SoftmaxState> = None;
                for isa in Isa::all().filter(|isa| isa.has_avx2()) {
                    let mut state = case.state();
                    attention_streaming(isa, &case.input(case.keys.clone()), &mut state);
                    let first = first.get_or_insert_with(|| state.clone());
                    for (a, b) in [(&state.acc, &first.acc), (&state.max, &first.max), (&state.sum, &first.sum)] {
                        assert_eq!(a, b, "{isa}, {format}, head_dim {head_dim}, keys from {start} on");
                    }
                }
            }
        }
    }
}
