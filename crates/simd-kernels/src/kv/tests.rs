//! A cache gives back what was stored, in every format, whatever was stored there before.

use super::filled::Filled;
use super::*;
use crate::guarded::noise;
use proptest::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};

const FORMATS: [KvFormat; 3] = [KvFormat::F32, KvFormat::F16, KvFormat::Q8];

/// Half a step of the format for a number of a group whose largest is `most`.
fn rounding(format: KvFormat, x: f32, most: f32) -> f32 {
    match format {
        KvFormat::F32 => 0.0,
        KvFormat::F16 => x.abs() * f32::powi(2.0, -11) + f32::powi(2.0, -25),
        KvFormat::Q8 => 0.51 * most / 127.0 * (1.0 + f32::powi(2.0, -11)),
    }
}

fn check(kv: &Filled, expected: &[(Vec<f32>, Vec<f32>)]) {
    assert_eq!(kv.len(), expected.len());
    let mut out = vec![f32::NAN; kv.head_dim()];
    for (i, (key, value)) in expected.iter().enumerate() {
        for (side, stored) in [("key", key), ("value", value)] {
            out.fill(f32::NAN);
            if side == "key" {
                kv.key(i, &mut out)
            } else {
                kv.value(i, &mut out)
            }
            for (group, found) in stored.chunks(KV_GROUP).zip(out.chunks(KV_GROUP)) {
                let most = group.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                for (&x, &found) in group.iter().zip(found) {
                    let allowed = rounding(kv.format(), x, most);
                    assert!(
                        (x - found).abs() <= allowed,
                        "{side} {i}: {found}, pushed {x}, {}",
                        kv.format()
                    );
                }
            }
        }
    }
}

fn token(head_dim: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    (noise(head_dim, 2 * seed), noise(head_dim, 2 * seed + 1))
}

#[test]
fn every_head_size_reads_back() {
    for isa in Isa::all() {
        for format in FORMATS {
            for head_dim in (1..=40).chain([64, 72, 80, 96, 127, 128, 130, 256]) {
                let mut kv = Filled::new(format, head_dim);
                let tokens: Vec<_> = (0..35).map(|i| token(head_dim, i)).collect();
                for (key, value) in &tokens {
                    kv.push(isa, key, value);
                }
                check(&kv, &tokens);
            }
        }
    }
}

#[test]
fn strided_positions_equal_single_ones() {
    for isa in Isa::all() {
        for format in FORMATS {
            let (head_dim, stride, count) = (24, 61, 37);
            let (keys, values) = (noise(stride * count, 1), noise(stride * count, 2));
            let layout = KvLayout::new(format, head_dim);
            let [mut one, mut many] = [1, 1].map(|n| KvMemory::new(layout, n, 1).expect("memory"));
            let mut spans = one.split(&[0]).0;
            for i in 0..count {
                let row = i * stride..i * stride + head_dim;
                spans[0].store(isa, 50 + i, &keys[row.clone()], &values[row]);
            }
            let mut spans = many.split(&[0]).0;
            for (from, count) in [(0, 0), (0, 5), (5, 30), (35, 2)] {
                let rows = (&keys[from * stride..], &values[from * stride..]);
                spans[0].store_many(isa, 50 + from, count, rows, stride);
            }
            let [one, many] =
                [one, many].map(|memory| memory.reader().span(0, 0).numbers::<i8>().to_vec());
            assert!(one == many, "{isa} {format}");
        }
    }
}

#[test]
fn positions_and_lengths_that_do_not_fit_are_refused() {
    let layout = KvLayout::new(KvFormat::F32, 8);
    let (row, short) = ([1.0; 8], [1.0; 7]);
    for (position, key, value) in
        [(KV_SPAN, &row[..], &row[..]), (0, &short, &row), (0, &row, &short)]
    {
        let mut memory = KvMemory::new(layout, 1, 1).expect("memory");
        let store = AssertUnwindSafe(|| {
            memory.split(&[0]).0[0].store(Isa::scalar(), position, key, value);
        });
        assert!(catch_unwind(store).is_err(), "position {position}");
    }
    let memory = KvMemory::new(layout, 1, 1).expect("memory");
    let spans = [memory.reader().span(0, 0)];
    let other = KvLayout::new(KvFormat::F16, 8);
    for (layout, len) in [(layout, KV_SPAN + 1), (other, 1)] {
        assert!(catch_unwind(|| KvHead::new(layout, &spans, len)).is_err(), "{len}");
    }
}

#[test]
fn bytes_are_those_of_whole_blocks() {
    let layout = KvLayout::new(KvFormat::F16, 128);
    assert_eq!(layout.bytes(0), 0);
    assert_eq!(layout.bytes(1), 2 * 16 * 128 * 2);
    assert_eq!((layout.bytes(128), layout.span_bytes()), (2 * 128 * 128 * 2, 2 * 128 * 128 * 2));
}

#[test]
fn groups_are_written_while_others_are_read() {
    let (heads, groups) = (3, 6);
    let layout = KvLayout::new(KvFormat::F32, 4);
    let mut memory = KvMemory::new(layout, heads, groups).expect("memory");
    let key = |group: usize, head: usize| [(10 * group + head) as f32; 4];
    let all: Vec<_> = (0..groups).collect();
    for (i, span) in memory.split(&all).0.iter_mut().enumerate() {
        span.store(Isa::scalar(), 127, &key(i / heads, i % heads), &[1.0; 4]);
    }
    memory.parts(4).into_iter().next().expect("a part").clear();
    memory.copy(4, 0, 2);
    let written = [2, 5];
    let (mut spans, reader) = memory.split(&written);
    assert_eq!(spans.len(), 2 * heads);
    spans[4].store(Isa::scalar(), 127, &[-1.0; 4], &[1.0; 4]);
    let read = |span: KvSpan<'_>| {
        let mut out = [0.0; 4];
        KvHead::new(layout, &[span], KV_SPAN).key(127, &mut out);
        out
    };
    assert_eq!(read(spans[1].as_span()), key(2, 1));
    assert_eq!(read(spans[4].as_span()), [-1.0; 4]);
    for (group, from) in [(0, 4), (1, 5), (3, 3), (4, 4)] {
        for head in 0..heads {
            assert_eq!(read(reader.span(group, head)), key(from, head), "group {group}");
        }
    }
    for (group, head) in [(2, 0), (5, 0), (6, 0), (0, heads)] {
        let read = AssertUnwindSafe(|| read(reader.span(group, head)));
        assert!(catch_unwind(read).is_err(), "group {group}, head {head}");
    }
    drop((spans, reader));
    for written in [&[1, 1][..], &[3, 2], &[6]] {
        let split = AssertUnwindSafe(|| drop(memory.split(written)));
        assert!(catch_unwind(split).is_err(), "{written:?}");
    }
    let error = KvMemory::new(layout, usize::MAX, 2).err().expect("more than any memory");
    assert_eq!(error.groups, 2);
    let none = KvMemory::new(layout, 0, 7).expect("nothing");
    assert_eq!((none.groups(), none.reader().layout()), (7, layout));
}

#[test]
fn format_names_round_trip() {
    for format in FORMATS {
        assert_eq!(format.to_string().parse(), Ok(format));
    }
    let error = "q4".parse::<KvFormat>().expect_err("not a cache format");
    assert_eq!(error.to_string(), "unknown cache format \"q4\", expected f32, f16 or q8");
}

proptest! {
    #[test]
    fn pushes_and_cuts_in_any_order(
        steps in prop::collection::vec((any::<bool>(), 0usize..40), 1..20),
        head_dim in (1usize..20).prop_map(|h| 2 * h),
        format in prop::sample::select(&FORMATS[..]),
        vector in any::<bool>(),
    ) {
        let isa = if vector { Isa::avx2().unwrap_or(Isa::scalar()) } else { Isa::scalar() };
        let mut kv = Filled::new(format, head_dim);
        let mut expected = Vec::new();
        let mut seed = 0;
        for (push, n) in steps {
            if push {
                for _ in 0..n {
                    seed += 1;
                    let (key, value) = token(head_dim, seed);
                    kv.push(isa, &key, &value);
                    expected.push((key, value));
                }
            } else {
                kv.truncate(n);
                expected.truncate(n);
            }
        }
        check(&kv, &expected);
    }
}
