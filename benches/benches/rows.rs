//! Kernels over one row: activation, norm, rotation, softmax, sums. In L1, next to their scalar
//! reference.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use simd_kernels::*;

use benches::{assert_close, noise};

/// Elements of a row: the feed-forward width of Qwen3-0.6B.
const LEN: usize = 3072;

/// A kernel that changes `x [LEN]`, given a second row, and its name.
type Kernel = (&'static str, fn(Isa, &mut [f32], &[f32]));

const KERNELS: [Kernel; 10] = [
    ("exp", |isa, x, _| exp(isa, x)),
    ("softmax", |isa, x, _| softmax(isa, x)),
    ("swiglu", |isa, x, y| {
        let (gate, up) = y.split_at(LEN / 2);
        swiglu(isa, gate, up, &mut x[..LEN / 2]);
    }),
    ("rms_norm", |isa, x, y| rms_norm(isa, y, y, 1.0e-6, x)),
    ("rope", |isa, x, y| {
        for head in x.chunks_exact_mut(128) {
            rope(isa, head, &y[..64], &y[64..128]);
        }
    }),
    ("norm_rope", |isa, x, y| norm_rope(isa, x, &y[128..256], 1.0e-6, &y[..64], &y[64..128])),
    ("add", |isa, x, y| add(isa, x, y)),
    ("scale_add", |isa, x, y| scale_add(isa, x, 0.5, y)),
    ("dot", |isa, x, y| x[0] = dot(isa, y, &y[..LEN])),
    ("argmax", |isa, x, y| x[0] = argmax(isa, y).map_or(-1.0, |i| i as f32)),
];

fn rows(criterion: &mut Criterion) {
    let (x, y) = (noise(LEN, 1), noise(LEN, 2));
    for (name, kernel) in KERNELS {
        let run = |isa: Isa| {
            let mut out = x.clone();
            kernel(isa, &mut out, &y);
            out
        };
        // Sums of LEN terms, each rounded once, relative to at most the sum of magnitudes (below
        // LEN).
        let tolerance = LEN as f32 * f32::EPSILON;
        assert_close(name, &run(Isa::detect()), &run(Isa::scalar()), |expected| {
            tolerance * (1.0 + expected)
        });
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(LEN as u64));
        for isa in [Some(Isa::scalar()), Isa::avx2()].into_iter().flatten() {
            let mut out = x.clone();
            group.bench_function(isa.name(), |b| {
                b.iter(|| {
                    // In-place kernels start from the same numbers each time, or they would drift
                    // to infinity.
                    out.copy_from_slice(&x);
                    kernel(isa, &mut out, &y);
                });
            });
        }
        group.finish();
    }
}

criterion_group!(name = all; config = benches::criterion(); targets = rows);
criterion_main!(all);
