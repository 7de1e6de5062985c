//! The cache gives back what was pushed, in every format, whatever was pushed, cut and pushed again
//! before.

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

fn check(kv: &KvHead, expected: &[(Vec<f32>, Vec<f32>)]) {
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
                let mut kv = KvHead::new(format, head_dim);
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
fn strided_pushes_equal_single_ones() {
    for isa in Isa::all() {
        for format in FORMATS {
            let (head_dim, stride, tokens) = (24, 61, 37);
            let (keys, values) = (noise(stride * tokens, 1), noise(stride * tokens, 2));
            let mut one = KvHead::new(format, head_dim);
            let mut many = KvHead::new(format, head_dim);
            for t in 0..tokens {
                one.push(isa, &keys[t * stride..][..head_dim], &values[t * stride..][..head_dim]);
            }
            for (from, count) in [(0, 0), (0, 5), (5, 30), (35, 2)] {
                many.push_many(
                    isa,
                    &keys[from * stride..],
                    &values[from * stride..],
                    count,
                    stride,
                );
            }
            assert_eq!(one.len(), many.len());
            assert_eq!(one.spans.view::<i8>(0), many.spans.view::<i8>(0));
        }
    }
}

#[test]
fn sizes_that_overflow_are_refused() {
    for (tokens, stride) in [(9, 1 << 61), (usize::MAX, 0), (1 << 62, 0)] {
        let mut kv = KvHead::new(KvFormat::F32, 8);
        kv.push(Isa::scalar(), &[1.0; 8], &[1.0; 8]);
        let push =
            AssertUnwindSafe(|| kv.push_many(Isa::scalar(), &[0.0; 8], &[0.0; 8], tokens, stride));
        assert!(catch_unwind(push).is_err(), "{tokens} tokens at a stride of {stride}");
        assert_eq!(kv.len(), 1);
    }
}

#[test]
fn reserved_memory_is_not_counted_and_not_moved() {
    let mut kv = KvHead::new(KvFormat::F16, 128);
    kv.reserve(100);
    assert_eq!(kv.bytes(), 0);
    kv.push(Isa::scalar(), &[0.5; 128], &[0.25; 128]);
    assert_eq!(kv.bytes(), 2 * 16 * 128 * 2);
    let place = kv.key_block::<u16>(0).as_ptr();
    for _ in 1..100 {
        kv.push(Isa::scalar(), &[0.5; 128], &[0.25; 128]);
    }
    assert_eq!(kv.key_block::<u16>(0).as_ptr(), place);
    kv.truncate(0);
    assert!(kv.is_empty() && kv.bytes() == 0);
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
        let mut kv = KvHead::new(format, head_dim);
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
