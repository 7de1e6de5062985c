//! Products of many tokens on one core, packing included, next to the multiply-add rate and
//! `matrixmultiply` (through ndarray).
//!
//! Read the reported element rates as operations a second and divide by that of `multiply_add`,
//! which is AVX2's also where AVX-512 computes.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2};
use simd_kernels::{
    Input, InputKind, Isa, MULTIPLY_ADD_FLOPS, MatMut, Store, matmul, matmul_swiglu, multiply_add,
};

use benches::{FORMATS, Weights, check_matmul, noise};

/// Outputs and inputs of the feed-forward projections of Qwen3-0.6B.
const ROWS: usize = 3072;
const COLS: usize = 1024;

fn prefill(criterion: &mut Criterion) {
    let isa = Isa::detect();
    let weights = Weights::new(256 << 20);
    for format in FORMATS {
        for tokens in [8, 13, 32] {
            check_matmul(isa, format, weights.panels(format, ROWS, COLS, 1), tokens);
        }
    }
    for tokens in [512, 32, 8] {
        let x = noise(tokens * COLS, 1);
        let mut out = vec![0.0; tokens * ROWS];
        let mut group =
            criterion.benchmark_group(format!("prefill {tokens} tokens, {}", isa.name()));

        const ROUNDS: usize = 2000;
        group.throughput(Throughput::Elements((ROUNDS * MULTIPLY_ADD_FLOPS) as u64));
        group.bench_function("multiply_add", |b| {
            b.iter(|| multiply_add(isa.without_avx512(), ROUNDS))
        });

        group.throughput(Throughput::Elements((2 * tokens * ROWS * COLS) as u64));
        let (a, w) = (ArrayView2::from_shape((tokens, COLS), &x), &weights.floats()[..ROWS * COLS]);
        let (a, w) = (
            a.expect("the shape of x"),
            ArrayView2::from_shape((COLS, ROWS), w).expect("the shape of w"),
        );
        let mut product = Array2::zeros((tokens, ROWS));
        group.bench_function("matrixmultiply", |b| {
            b.iter(|| general_mat_mul(1.0, &a, &w, 0.0, &mut product))
        });

        for format in FORMATS {
            let (mut input, mut index) = (Input::new(), 0);
            group.bench_function(format, |b| {
                b.iter(|| {
                    index += 1;
                    let w = weights.panels(format, ROWS, COLS, index);
                    input.prepare(isa, InputKind::of(isa, &w.data()), &x, tokens, COLS);
                    let out = MatMut::new(&mut out, tokens, ROWS, ROWS);
                    matmul(isa, w, 0..w.count(), &input, out, Store::Set);
                });
            });
        }
        group.throughput(Throughput::Elements((4 * tokens * ROWS * COLS) as u64));
        for format in ["bf16", "q8", "q4"] {
            let (mut input, mut index) = (Input::new(), 0);
            group.bench_function(format!("{format} gate, up and SwiGLU"), |b| {
                b.iter(|| {
                    index += 2;
                    let gate = weights.panels(format, ROWS, COLS, index);
                    let up = weights.panels(format, ROWS, COLS, index + 1);
                    input.prepare(isa, InputKind::of(isa, &gate.data()), &x, tokens, COLS);
                    let out = MatMut::new(&mut out, tokens, ROWS, ROWS);
                    matmul_swiglu(isa, gate, up, 0..gate.count(), &input, out);
                });
            });
        }
        group.finish();
    }
}

fn packing(criterion: &mut Criterion) {
    let isa = Isa::detect();
    let tokens = 512;
    let x = noise(tokens * COLS, 1);
    let mut group = criterion.benchmark_group(format!("packing {tokens} tokens, {}", isa.name()));
    group.throughput(Throughput::Bytes((4 * x.len()) as u64));
    for kind in [InputKind::Float, InputKind::Int16, InputKind::Int8] {
        group.bench_function(format!("{kind:?}"), |b| {
            b.iter_batched_ref(
                Input::new,
                |input| input.prepare(isa, kind, &x, tokens, COLS),
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

criterion_group!(name = all; config = benches::criterion(); targets = prefill, packing);
criterion_main!(all);
