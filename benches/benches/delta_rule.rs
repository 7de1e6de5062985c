//! The gated delta rule of one head, for a generated token and for a chunk of a prompt, and the
//! convolution before it.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use simd_kernels::{DeltaTokens, Isa, causal_conv_silu, delta_rule, delta_state_len};

use benches::{assert_close, noise};

/// Elements of a key and of a value of the published models.
const DIM: usize = 128;
/// Tokens that the convolution covers.
const TAPS: usize = 4;

/// The tokens of a call: q, k and v [tokens, DIM], and one number each.
struct Tokens {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    key_query: Vec<f32>,
    decay: Vec<f32>,
    beta: Vec<f32>,
}

impl Tokens {
    fn new(count: usize) -> Self {
        let unit = |seed| {
            let mut x = noise(count * DIM, seed);
            for row in x.chunks_mut(DIM) {
                let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
                row.iter_mut().for_each(|x| *x /= length);
            }
            x
        };
        let (q, k) = (unit(1), unit(2));
        let pairs = q.chunks(DIM).zip(k.chunks(DIM));
        let key_query = pairs.map(|(q, k)| q.iter().zip(k).map(|(q, k)| q * k).sum()).collect();
        let (decay, beta) = (vec![0.9; count], vec![0.5; count]);
        Self { q, k, v: noise(count * DIM, 3), key_query, decay, beta }
    }

    fn run(&self, isa: Isa, state: &mut [f32], out: &mut [f32]) {
        let Self { q, k, v, key_query, decay, beta } = self;
        let tokens = DeltaTokens { q, k, v, key_query, decay, beta };
        delta_rule(isa, &tokens, (DIM, DIM), state, out);
    }
}

fn recurrence(criterion: &mut Criterion) {
    for count in [1, 32] {
        let tokens = Tokens::new(count);
        let run = |isa| {
            let (mut state, mut out) =
                (vec![0.0; delta_state_len(DIM, DIM)], vec![0.0; count * DIM]);
            tokens.run(isa, &mut state, &mut out);
            out
        };
        let expected = run(Isa::scalar());
        let mut group = criterion.benchmark_group(format!("delta rule, {count} tokens"));
        // Four multiply-adds for each element of the state.
        group.throughput(Throughput::Elements((8 * count * DIM * DIM) as u64));
        for isa in Isa::all() {
            assert_close("delta rule", &run(isa), &expected, |x| 1e-5 * x + 2e-6);
            let (mut state, mut out) =
                (vec![0.0; delta_state_len(DIM, DIM)], vec![0.0; count * DIM]);
            group.bench_function(isa.name(), |b| b.iter(|| tokens.run(isa, &mut state, &mut out)));
        }
        group.finish();
    }
}

fn convolution(criterion: &mut Criterion) {
    let count = 32;
    let (weights, window) = (noise(TAPS * DIM, 4), noise((TAPS - 1 + count) * DIM, 5));
    let run = |isa, out: &mut [f32]| causal_conv_silu(isa, &weights, &window, DIM, out);
    let mut expected = vec![0.0; count * DIM];
    run(Isa::scalar(), &mut expected);
    let mut group = criterion.benchmark_group(format!("convolution, {count} tokens"));
    group.throughput(Throughput::Elements((count * DIM) as u64));
    for isa in [Some(Isa::scalar()), Isa::avx2()].into_iter().flatten() {
        let mut out = vec![0.0; count * DIM];
        run(isa, &mut out);
        assert_close("convolution", &out, &expected, |x| 1e-6 * x + 1e-6);
        group.bench_function(isa.name(), |b| b.iter(|| run(isa, &mut out)));
    }
    group.finish();
}

criterion_group!(name = all; config = benches::criterion(); targets = recurrence, convolution);
criterion_main!(all);
