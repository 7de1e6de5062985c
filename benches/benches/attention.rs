//! Attention over the cache of a KV head, next to the two limits: prefill beside multiply-adds,
//! decode beside a read.
//!
//! Caches of decode are larger together than the CPU's, and taken in turn, as the layers of a model
//! are. Divide a reported rate by that of `limit`.

use std::cell::Cell;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use simd_kernels::{
    AttentionArithmetic, AttentionInput, Isa, KV_SPAN, KvFormat, KvHead, KvLayout, KvMemory,
    KvSpan, MULTIPLY_ADD_FLOPS, SoftmaxState, attention_materialized, attention_streaming,
    multiply_add, read,
};

use benches::{Weights, assert_close, noise};

const HEAD_DIM: usize = 128;
const SCALE: f32 = 0.088;
/// Memory that no cache of a CPU holds.
const BYTES: usize = 256 << 20;

type Algorithm = fn(Isa, &AttentionInput<'_>, &mut SoftmaxState);
const ALGORITHMS: [(&str, Algorithm); 2] =
    [("streaming", attention_streaming), ("materialized", attention_materialized)];
const FORMATS: [KvFormat; 3] = [KvFormat::F32, KvFormat::F16, KvFormat::Q8];

/// Memory for `heads` KV heads of `tokens` positions each.
fn cache(isa: Isa, format: KvFormat, heads: usize, tokens: usize) -> KvMemory {
    let groups = tokens.div_ceil(KV_SPAN);
    let layout = KvLayout::new(format, HEAD_DIM);
    let mut memory = KvMemory::new(layout, heads, groups).expect("memory");
    fill(isa, &mut memory, &noise(tokens * HEAD_DIM, 1), &noise(tokens * HEAD_DIM, 2));
    memory
}

/// Stores positions, keys and values [tokens, HEAD_DIM], in each head.
fn fill(isa: Isa, memory: &mut KvMemory, keys: &[f32], values: &[f32]) {
    let tokens = keys.len() / HEAD_DIM;
    let (heads, groups) = (memory.heads(), (0..tokens.div_ceil(KV_SPAN)).collect::<Vec<_>>());
    for (index, span) in memory.split(&groups).0.iter_mut().enumerate() {
        let first = index / heads * KV_SPAN;
        let rows = (&keys[first * HEAD_DIM..], &values[first * HEAD_DIM..]);
        span.store_many(isa, 0, KV_SPAN.min(tokens - first), rows, HEAD_DIM);
    }
}

/// The spans of a head.
fn spans(memory: &KvMemory, head: usize) -> Vec<KvSpan<'_>> {
    (0..memory.groups()).map(|group| memory.reader().span(group, head)).collect()
}

/// The attention of all rows.
fn answers(isa: Isa, run: Algorithm, input: &AttentionInput<'_>) -> Vec<f32> {
    let rows = input.visible.len();
    let mut state = SoftmaxState::new();
    state.reset(rows, HEAD_DIM);
    run(isa, input, &mut state);
    let mut out = vec![f32::NAN; rows * HEAD_DIM];
    for (row, out) in out.chunks_exact_mut(HEAD_DIM).enumerate() {
        state.write(isa, row, out);
    }
    out
}

/// Fails when an algorithm is not the scalar reference. Averages of values below 1, with weights
/// that are exponentials of sums of HEAD_DIM products; int16 rounds more (see the tests of the
/// kernel, which bound that).
fn check(isa: Isa, input: &AttentionInput<'_>) {
    let expected = answers(Isa::scalar(), attention_materialized, input);
    let integers = input.arithmetic == AttentionArithmetic::Int16;
    for (name, run) in ALGORITHMS {
        let allowed = 4.0 * HEAD_DIM as f32 * f32::EPSILON + if integers { 1.0e-3 } else { 0.0 };
        assert_close(name, &answers(isa, run, input), &expected, |_| allowed);
    }
}

/// 64 tokens, two query heads, at the end of 512 and of 4096 keys.
fn prefill(criterion: &mut Criterion) {
    let isa = Isa::detect();
    for context in [512, 4096] {
        let rows = 2 * 64;
        let q = noise(rows * HEAD_DIM, 3);
        let visible: Vec<usize> = (0..rows).map(|row| context - 64 + row / 2 + 1).collect();
        let mut group = criterion
            .benchmark_group(format!("prefill of {rows} rows, {context} keys, {}", isa.name()));

        let rounds = 10_000;
        group.throughput(Throughput::Elements((rounds * MULTIPLY_ADD_FLOPS) as u64));
        group.bench_function("limit", |b| b.iter(|| multiply_add(isa.without_avx512(), rounds)));

        // Two products of HEAD_DIM multiply-adds for each pair of a row and a key.
        group.throughput(Throughput::Elements(
            (4 * HEAD_DIM * visible.iter().sum::<usize>()) as u64,
        ));
        for format in FORMATS {
            let memory = cache(isa, format, 1, context);
            let spans = spans(&memory, 0);
            let input = AttentionInput {
                q: &q,
                visible: &visible,
                kv: KvHead::new(memory.layout(), &spans, context),
                keys: 0..context,
                scale: SCALE,
                arithmetic: AttentionArithmetic::Int16,
            };
            check(isa, &input);
            for (name, run) in ALGORITHMS {
                let mut state = SoftmaxState::new();
                group.bench_function(format!("{name} {format}"), |b| {
                    b.iter(|| {
                        state.reset(rows, HEAD_DIM);
                        run(isa, &input, &mut state);
                    });
                });
            }
        }
        group.finish();
    }
}

/// One token of one to eight query heads, 4096 keys.
fn decode(criterion: &mut Criterion) {
    let isa = Isa::detect();
    let context = 4096;
    let memory = Weights::new(BYTES);
    for format in FORMATS {
        let bytes = KvLayout::new(format, HEAD_DIM).bytes(context);
        let kv = cache(isa, format, BYTES / bytes, context);
        let heads: Vec<_> = (0..kv.heads()).map(|head| spans(&kv, head)).collect();
        let name = format!("decode, {context} keys in {format}, {}", isa.name());
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(bytes as u64));

        let turn = Cell::new(0);
        let next = || turn.replace((turn.get() + 1) % heads.len());
        group.bench_function("limit", |b| {
            let floats = bytes / 4;
            b.iter(|| read(isa, &memory.floats()[next() * floats..][..floats]));
        });
        for rows in [1, 2, 4, 8] {
            let (q, visible) = (noise(rows * HEAD_DIM, 3), vec![context; rows]);
            let input = |head: usize| AttentionInput {
                q: &q,
                visible: &visible,
                kv: KvHead::new(kv.layout(), &heads[head], context),
                keys: 0..context,
                scale: SCALE,
                arithmetic: AttentionArithmetic::Float,
            };
            check(isa, &input(0));
            let mut state = SoftmaxState::new();
            group.bench_function(format!("{rows} query heads"), |b| {
                b.iter(|| {
                    state.reset(rows, HEAD_DIM);
                    attention_streaming(isa, &input(next()), &mut state);
                });
            });
        }
        group.finish();
    }
}

/// Filling a cache.
fn store(criterion: &mut Criterion) {
    let isa = Isa::detect();
    let tokens = 512;
    let (keys, values) = (noise(tokens * HEAD_DIM, 1), noise(tokens * HEAD_DIM, 2));
    let mut group = criterion.benchmark_group(format!("store {tokens} tokens, {}", isa.name()));
    group.throughput(Throughput::Elements(tokens as u64));
    for format in FORMATS {
        let mut memory = cache(isa, format, 1, tokens);
        group.bench_function(format!("{format}"), |b| {
            b.iter(|| fill(isa, &mut memory, &keys, &values));
        });
    }
    group.finish();
}

criterion_group!(name = all; config = benches::criterion(); targets = prefill, decode, store);
criterion_main!(all);
