//! The time of an empty run of a team: what each of the barriers in a layer costs.

use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use simd_kernels::ForkJoin;

fn fork_join(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("empty run");
    for threads in [1, 2, 3, 16] {
        let team = ForkJoin::new(threads, Arc::new(|_| ())).expect("threads");
        group.bench_function(format!("{threads} threads"), |b| b.iter(|| team.run(&|_| ())));
    }
    group.finish();
}

criterion_group!(name = all; config = benches::criterion(); targets = fork_join);
criterion_main!(all);
