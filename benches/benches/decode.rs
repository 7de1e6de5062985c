//! Products of one to four tokens on a team of threads, next to a plain read of the same memory.
//!
//! Weights are larger than the caches. Divide a reported byte rate by that of `read`.

use std::sync::Arc;
use std::sync::Mutex;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use simd_kernels::{ForkJoin, Input, InputKind, Isa, MatMut, PANEL, Store, matmul, read};

use benches::{FORMATS, Weights, bytes, check_matmul, noise};

const COLS: usize = 1024;
const BYTES: usize = 256 << 20;

fn decode(criterion: &mut Criterion) {
    let isa = Isa::detect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(2);
    let team = ForkJoin::new(threads, Arc::new(|_| ())).expect("threads");
    let weights = Weights::new(BYTES);
    for format in FORMATS {
        for tokens in 1..=6 {
            check_matmul(isa, format, weights.panels(format, 100, COLS, 1), tokens);
        }
    }
    for tokens in [1, 2, 4] {
        let x = noise(tokens * COLS, 1);
        let mut group = criterion
            .benchmark_group(format!("decode {tokens} tokens, {threads} threads, {}", isa.name()));

        let floats = weights.floats();
        group.throughput(Throughput::Bytes(4 * floats.len() as u64));
        group.bench_function("read", |b| {
            let chunk = floats.len().div_ceil(threads);
            let chunks: Vec<&[f32]> = floats.chunks(chunk).collect();
            b.iter(|| team.run(&|i| assert_ne!(read(isa, chunks[i]), 1)));
        });

        for format in FORMATS {
            // One tall matrix: a multiple of the threads' panels, so that all have the same work.
            let granule = PANEL * threads;
            let rows = BYTES / bytes(format, granule, COLS) * granule;
            let w = weights.panels(format, rows, COLS, 0);
            let mut input = Input::new();
            input.prepare(isa, InputKind::of(isa, &w.data()), &x, tokens, COLS);
            let mut out = vec![0.0; tokens * rows];
            group.throughput(Throughput::Bytes(bytes(format, rows, COLS) as u64));
            group.bench_function(format, |b| {
                b.iter(|| {
                    let share = w.count() / threads;
                    let mut rest = MatMut::new(&mut out, tokens, rows, rows);
                    let mut blocks = Vec::new();
                    for _ in 0..threads {
                        let (block, after) = rest.split_cols(share * PANEL);
                        blocks.push(Mutex::new(Some(block)));
                        rest = after;
                    }
                    team.run(&|i| {
                        let block = blocks[i].lock().expect("no other user").take().expect("once");
                        matmul(isa, w, i * share..(i + 1) * share, &input, block, Store::Set);
                    });
                });
            });
        }
        group.finish();
    }
}

criterion_group!(name = all; config = benches::criterion(); targets = decode);
criterion_main!(all);
