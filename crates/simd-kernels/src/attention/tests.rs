//! Attention against a naive f64 softmax over what the cache holds: all formats, shapes, ranges and
//! merges.

use super::*;
use crate::guarded::noise;
use crate::isa::witness::assert_entered;
use crate::kv::KvFormat;
use crate::kv::filled::Filled;
use proptest::prelude::*;

mod instruction_sets;

const FORMATS: [KvFormat; 3] = [KvFormat::F32, KvFormat::F16, KvFormat::Q8];

type Algorithm = fn(Isa, &AttentionInput<'_>, &mut SoftmaxState);

/// A problem: a filled cache, queries, and what each row sees.
#[derive(Clone)]
struct Case {
    kv: Filled,
    q: Vec<f32>,
    visible: Vec<usize>,
    keys: Range<usize>,
    scale: f32,
    arithmetic: AttentionArithmetic,
}

impl Case {
    fn new(
        format: KvFormat,
        head_dim: usize,
        tokens: usize,
        visible: Vec<usize>,
        keys: Range<usize>,
    ) -> Case {
        let mut kv = Filled::new(format, head_dim);
        let seed = (head_dim * 1000 + tokens) as u64;
        let (k, v) = (noise(tokens * head_dim, seed), noise(tokens * head_dim, seed + 1));
        kv.push_many(Isa::scalar(), &k, &v, tokens);
        // Scores of a few units, as trained models have them, so that no key drowns the others.
        let q = noise(visible.len() * head_dim, seed + 2).iter().map(|x| x * 6.0).collect();
        let (scale, arithmetic) = (1.0 / (head_dim as f32).sqrt(), AttentionArithmetic::Float);
        Case { kv, q, visible, keys, scale, arithmetic }
    }

    /// Adds the keys of a range to `state`.
    fn attend(&self, run: Algorithm, isa: Isa, keys: Range<usize>, state: &mut SoftmaxState) {
        let Case { q, visible, scale, arithmetic, .. } = self;
        self.kv.with(|kv| {
            let (scale, arithmetic) = (*scale, *arithmetic);
            run(isa, &AttentionInput { q, visible, kv, keys, scale, arithmetic }, state);
        });
    }

    fn state(&self) -> SoftmaxState {
        let mut state = SoftmaxState::new();
        state.reset(self.visible.len(), self.kv.head_dim());
        state
    }

    /// (attention, log-sum-exp, Σ |scores' rounding|) of a row in f64; `None` when it sees nothing.
    fn exact(&self, row: usize) -> Option<(Vec<f64>, f64, f64)> {
        let head_dim = self.kv.head_dim();
        let q = &self.q[row * head_dim..(row + 1) * head_dim];
        let end = self.visible[row].min(self.keys.end);
        let mut vector = vec![0.0; head_dim];
        let mut scores = Vec::new();
        let mut rounding = 0.0f64;
        for key in self.keys.start..end {
            self.kv.key(key, &mut vector);
            let products = || q.iter().zip(&vector).map(|(&q, &k)| f64::from(q) * f64::from(k));
            scores.push(products().sum::<f64>() * f64::from(self.scale));
            let size = products().map(f64::abs).sum::<f64>() * f64::from(self.scale);
            rounding = rounding.max(size * (head_dim as f64 + 2.0) * f64::from(f32::EPSILON));
        }
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if scores.is_empty() {
            return None;
        }
        let sum: f64 = scores.iter().map(|x| (x - most).exp()).sum();
        let mut attention = vec![0.0; head_dim];
        for (key, score) in (self.keys.start..end).zip(&scores) {
            self.kv.value(key, &mut vector);
            let weight = (score - most).exp() / sum;
            attention.iter_mut().zip(&vector).for_each(|(a, &v)| *a += weight * f64::from(v));
        }
        Some((attention, most + sum.ln(), rounding))
    }

    /// What int16 may cost a row: in a score, and in an element of the attention.
    ///
    /// Each element of q and k is off by half a step, of a length that keeps their norms below
    /// 65000 and 32500. Each weight of 128 keys by up to half of 1/32767 of the largest, as random
    /// numbers add up (7 standard deviations; 16 keys as they come); each value by half of 1/8191
    /// of its largest.
    fn integers(&self, isa: Isa, row: usize) -> (f64, f64) {
        let head_dim = self.kv.head_dim();
        if self.kv.format() == KvFormat::F32
            || !isa.has_avx2()
            || self.arithmetic == AttentionArithmetic::Float
        {
            return (0.0, 0.0);
        }
        let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let total = |x: &[f32]| x.iter().map(|&x| f64::from(x.abs())).sum::<f64>();
        let q = &self.q[row * head_dim..(row + 1) * head_dim];
        let most = q.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let q_step = (norm(q) / 65_000.0).max(f64::from(most) / 32_767.0);
        let mut key = vec![0.0; head_dim];
        let mut score = 0.0f64;
        for i in self.keys.start..self.visible[row].min(self.keys.end) {
            self.kv.key(i, &mut key);
            let k_step = norm(&key) / 32_500.0;
            let steps =
                q_step * total(&key) + k_step * total(q) + q_step * k_step * head_dim as f64;
            score = score.max(0.5 * steps * f64::from(self.scale));
        }
        let keys = self.keys.len().min(128) as f64;
        (score, 1.01 * (2.0 * keys.sqrt() / 32_767.0 + 0.5 / 8_191.0))
    }

    fn check(&self, isa: Isa, state: &SoftmaxState, what: &str) {
        let head_dim = self.kv.head_dim();
        let mut out = vec![f32::NAN; head_dim];
        for row in 0..self.visible.len() {
            state.write(isa, row, &mut out);
            let Some((attention, log_sum, rounding)) = self.exact(row) else {
                assert_eq!(
                    (state.max[row], state.sum[row]),
                    (f32::NEG_INFINITY, 0.0),
                    "{what}: row {row}"
                );
                assert!(
                    out.iter().all(|&x| x == 0.0),
                    "{what}: row {row} sees nothing, but gave {out:?}"
                );
                continue;
            };
            if !log_sum.is_finite() || !attention.iter().all(|x| x.is_finite()) {
                assert!(
                    !out.iter().any(|x| x.is_finite()),
                    "{what}: row {row} hides what is not finite, {out:?}"
                );
                continue;
            }
            let n = self.keys.len() as f64;
            // Rounded scores shift each weight by that much; the exponentials and the sum of n of
            // them add the rest. Values are below 1.01.
            let (score, value) = self.integers(isa, row);
            let allowed = 2.0 * (rounding + score) + value + (n + 16.0) * f64::from(f32::EPSILON);
            let found = f64::from(state.max[row]) + f64::from(state.sum[row]).ln();
            assert!(
                (found - log_sum).abs() <= allowed * (1.0 + log_sum.abs()),
                "{what}: row {row}: {found}, {log_sum}"
            );
            for (d, (&found, &expected)) in out.iter().zip(&attention).enumerate() {
                assert!(
                    (f64::from(found) - expected).abs() <= allowed,
                    "{what}: row {row}, element {d}: {found}, expected {expected} within {allowed:e}"
                );
            }
        }
    }

    /// Both algorithms, whole and in parts, with both arithmetics.
    fn check_all(&self, isa: Isa, cut: usize) {
        self.check_algorithms(isa, cut);
        if self.kv.format() != KvFormat::F32 {
            Case { arithmetic: AttentionArithmetic::Int16, ..self.clone() }
                .check_algorithms(isa, cut);
        }
    }

    fn check_algorithms(&self, isa: Isa, cut: usize) {
        let cut = cut.clamp(self.keys.start, self.keys.end);
        let what = |name: &str| {
            format!(
                "{name}, {isa}, {}, head_dim {}, {} rows, keys {:?} cut at {cut}",
                self.kv.format(),
                self.kv.head_dim(),
                self.visible.len(),
                self.keys
            )
        };
        for (name, run) in [
            ("streaming", attention_streaming as Algorithm),
            ("materialized", attention_materialized),
        ] {
            let mut whole = self.state();
            self.attend(run, isa, self.keys.clone(), &mut whole);
            self.check(isa, &whole, &what(name));

            let (mut left, mut right) = (self.state(), self.state());
            self.attend(run, isa, self.keys.start..cut, &mut left);
            self.attend(run, isa, cut..self.keys.end, &mut right);
            let mut continued = left.clone();
            left.merge(isa, &right);
            self.check(isa, &left, &what(&format!("{name}, merged")));
            self.attend(run, isa, cut..self.keys.end, &mut continued);
            self.check(isa, &continued, &what(&format!("{name}, continued")));
        }
    }
}

/// Not sorted, some rows see nothing and some everything.
fn ragged(rows: usize, tokens: usize) -> Vec<usize> {
    (0..rows).map(|row| row * 7919 % (tokens + 9)).collect()
}

#[test]
fn every_head_size() {
    for isa in Isa::all() {
        for format in FORMATS {
            for head_dim in (1..=40).chain([64, 72, 80, 96, 112, 127, 128, 130]) {
                Case::new(
                    format,
                    head_dim,
                    45,
                    ragged(if head_dim % 3 == 1 { 13 } else { 5 }, 45),
                    0..45,
                )
                .check_all(isa, 19);
            }
        }
    }
    assert_entered("tiles::attention");
}

#[test]
fn every_number_of_rows() {
    for isa in Isa::all() {
        for format in FORMATS {
            for rows in (0..=20).chain([127, 128, 143, 144, 145, 264, 265, 528, 529, 1057]) {
                Case::new(format, 16, 150, ragged(rows, 150), 0..150).check_all(isa, 128);
            }
        }
    }
    assert_entered("tiles::attention");
}

#[test]
fn every_number_of_keys() {
    for isa in Isa::all() {
        for format in FORMATS {
            for tokens in (0..=130usize).chain([255, 256, 257, 300]) {
                for rows in [1, 2, 13] {
                    let visible =
                        (0..rows).map(|row| (tokens + row).saturating_sub(rows / 2)).collect();
                    Case::new(format, 8, tokens, visible, 0..tokens).check_all(isa, tokens / 3);
                }
            }
        }
    }
    assert_entered("tiles::attention");
}

#[test]
fn every_first_key() {
    for isa in Isa::all() {
        for format in FORMATS {
            for start in (0..=40).chain(120..=140) {
                for rows in [2, 14] {
                    Case::new(format, 10, 170, ragged(rows, 170), start..170)
                        .check_all(isa, start + 5);
                    Case::new(format, 10, 170, ragged(rows, 170), start..start + 1)
                        .check_all(isa, start + 1);
                }
            }
        }
    }
    assert_entered("tiles::attention");
}

#[test]
fn causal_prefill_of_a_group() {
    for isa in Isa::all() {
        for format in FORMATS {
            let (group, tokens, before) = (2, 64, 200);
            let visible = (0..group * tokens).map(|row| before + row / group + 1).collect();
            Case::new(format, 128, before + tokens, visible, 0..before + tokens)
                .check_all(isa, 130);
        }
    }
}

#[test]
fn what_lies_beyond_the_visible_keys_does_not_matter() {
    for isa in Isa::all() {
        for format in FORMATS {
            for rows in [1, 3, 20] {
                // NaN and infinity in keys and values that no row sees: later ones, cut ones, and
                // ones before the range.
                let mut case = Case::new(format, 24, 90, vec![70; rows], 5..70);
                let poison = [f32::NAN; 24];
                let clean = {
                    let mut state = case.state();
                    case.attend(attention_streaming, isa, 5..70, &mut state);
                    state
                };
                let (keys, values): (Vec<_>, Vec<_>) = (0..90)
                    .map(|i| {
                        let (mut key, mut value) = (vec![0.0; 24], vec![0.0; 24]);
                        case.kv.key(i, &mut key);
                        case.kv.value(i, &mut value);
                        (key, value)
                    })
                    .unzip();
                let mut kv = Filled::new(format, 24);
                for i in 0..70 {
                    if i < 5 {
                        kv.push(isa, &poison, &[f32::INFINITY; 24]);
                    } else {
                        kv.push(isa, &keys[i], &values[i]);
                    }
                }
                for _ in 0..7 {
                    kv.push(isa, &poison, &poison);
                }
                kv.truncate(75);
                case.kv = kv;
                let mut state = case.state();
                case.attend(attention_streaming, isa, 5..70, &mut state);
                let mut cut = case.state();
                case.kv.truncate(70);
                case.attend(attention_streaming, isa, 5..70, &mut cut);
                assert_eq!(state.acc, cut.acc);
                // Q8 rounds twice here; the others read back exactly.
                if format != KvFormat::Q8 {
                    assert_eq!(
                        (&state.max, &state.sum, &state.acc),
                        (&clean.max, &clean.sum, &clean.acc)
                    );
                }
                assert!(state.acc.iter().all(|x| x.is_finite()));
            }
        }
    }
}

#[test]
fn scores_of_minus_infinity_weigh_nothing() {
    for isa in Isa::all() {
        for rows in [1, 2, 13] {
            let mut kv = Filled::new(KvFormat::F32, 4);
            for i in 0..40 {
                let far = if i % 3 == 0 { f32::NEG_INFINITY } else { 0.5 };
                kv.push(isa, &[far, 0.0, 0.0, 0.0], &[i as f32; 4]);
            }
            let q = [1.0, 0.0, 0.0, 0.0].repeat(rows);
            let mut state = SoftmaxState::new();
            for (keys, expected) in [(0..1, 0.0), (0..2, 1.0), (0..3, 1.5), (3..4, 0.0)] {
                let visible = vec![40; rows];
                for run in [attention_streaming as Algorithm, attention_materialized] {
                    state.reset(rows, 4);
                    kv.with(|kv| {
                        let arithmetic = AttentionArithmetic::Float;
                        let (q, visible, keys) = (&q, &visible, keys.clone());
                        let input = AttentionInput { q, visible, kv, keys, scale: 1.0, arithmetic };
                        run(isa, &input, &mut state);
                    });
                    let mut out = [f32::NAN; 4];
                    state.write(isa, rows - 1, &mut out);
                    assert_eq!(out, [expected; 4]);
                }
            }
        }
    }
}

/// All infinities and NaNs, each in a query, in a key or in a value, and what sees them.
fn check_not_finite(format: KvFormat, visible: impl Fn(usize) -> usize) {
    let (head_dim, tokens) = (40, 150);
    for (isa, rows) in Isa::all().flat_map(|isa| [1, 5, 13, 20].map(|rows| (isa, rows))) {
        let keys =
            [("query", 0), ("key", 0), ("key", 100), ("key", 130), ("key", 149), ("all keys", 0)];
        let values = [("value", 100), ("value", 130), ("value", 149), ("faint value", 0)];
        for (place, at) in keys.into_iter().chain(values) {
            for bad in [f32::NAN, f32::INFINITY] {
                let visible = (0..rows).map(&visible).collect();
                let mut case = Case::new(format, head_dim, 0, visible, 0..tokens);
                let (mut keys, mut values) =
                    (noise(tokens * head_dim, 1), noise(tokens * head_dim, 2));
                // An infinite key times these is +∞.
                case.q.iter_mut().for_each(|q| *q = q.abs());
                match place {
                    "query" => case.q[rows / 2 * head_dim + 3] = bad,
                    "key" => keys[at * head_dim + 3] = bad,
                    "faint value" => {
                        keys[..head_dim].fill(-30.0);
                        values[..head_dim].fill(bad);
                    }
                    "all keys" => keys.fill(bad),
                    _ => values[at * head_dim..][..head_dim].fill(bad),
                }
                case.kv.push_many(isa, &keys, &values, tokens);
                case.check_all(isa, 129);
            }
        }
    }
}

#[test]
fn infinities_and_nans_are_not_hidden() {
    FORMATS.into_iter().for_each(|format| check_not_finite(format, |_| 150));
}

#[test]
fn infinities_and_nans_of_later_tokens_do_not_reach_earlier_ones() {
    // Rows of a panel that see a few keys more or less, or none of the tile.
    FORMATS.into_iter().for_each(|format| check_not_finite(format, |row| 150 - 7 * row % 40));
    FORMATS
        .into_iter()
        .for_each(|format| check_not_finite(format, |row| [150, 126, 131, 0][row % 4]));
    FORMATS
        .into_iter()
        .for_each(|format| check_not_finite(format, |row| [60, 150, 64, 65, 0][row % 5]));
}

#[test]
fn tiny_queries_weigh_all_keys_alike() {
    for isa in Isa::all() {
        for format in FORMATS {
            for size in [1.0e-20, 1.0e-30, 1.0e-36, 1.0e-40, 0.0] {
                let mut case = Case::new(format, 16, 150, ragged(20, 150), 0..150);
                case.q.iter_mut().for_each(|q| *q *= size);
                case.check_all(isa, 60);
                case.scale = 0.0;
                case.check_all(isa, 60);
            }
        }
    }
}

#[test]
fn the_largest_sums_of_integers_fit() {
    for isa in Isa::all() {
        for head_dim in [1, 2, 127, 128, 512] {
            // Queries and keys that are parallel, dense or of one element, and equal weights of
            // equal values.
            for one in [false, true] {
                let vector: Vec<f32> =
                    (0..head_dim).map(|d| if one && d > 0 { 0.0 } else { 3.0 }).collect();
                let (keys, values) = (vector.repeat(256), vec![-0.75; 256 * head_dim]);
                for format in FORMATS {
                    let mut kv = Filled::new(format, head_dim);
                    kv.push_many(isa, &keys, &values, 256);
                    let scale = 1.0 / (head_dim as f32).sqrt();
                    let case = Case {
                        kv,
                        q: vector.repeat(13),
                        visible: vec![256; 13],
                        keys: 0..256,
                        scale,
                        arithmetic: AttentionArithmetic::Float,
                    };
                    case.check_all(isa, 128);
                }
            }
        }
    }
}

#[test]
fn a_key_of_large_weight_and_small_value_costs_the_others_nothing() {
    for isa in Isa::all() {
        // The first key weighs 4000 times what each of the others does, and brings next to nothing.
        let (head_dim, tokens) = (64, 128);
        let (mut keys, mut values) = (vec![0.0; tokens * head_dim], noise(tokens * head_dim, 5));
        keys[0] = 4000.0f32.ln();
        values[..head_dim].iter_mut().for_each(|x| *x *= 1.0e-4);
        let mut kv = Filled::new(KvFormat::F16, head_dim);
        kv.push_many(isa, &keys, &values, tokens);
        let q: Vec<f32> = (0..13 * head_dim).map(|i| f32::from(i % head_dim == 0)).collect();
        let (visible, arithmetic) = (vec![tokens; 13], AttentionArithmetic::Int16);
        let case = Case { kv, q, visible, keys: 0..tokens, scale: 1.0, arithmetic };
        let mut state = case.state();
        case.attend(attention_streaming, isa, 0..tokens, &mut state);
        let (exact, ..) = case.exact(3).expect("every row sees all keys");
        let mut out = vec![f32::NAN; head_dim];
        state.write(isa, 3, &mut out);
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut out.iter().zip(&exact).map(|(&x, e)| f64::from(x) - e))
            / norm(&mut exact.iter().copied());
        // In steps of 1/32767 of the largest weight each of the others would be eight.
        assert!(error < 1.0e-3, "{isa}: {error:e}");
    }
}

/// The bits of a row are the same whatever rows come with it, and whatever they see.
#[test]
fn rows_do_not_change_each_other() {
    let arithmetics = [AttentionArithmetic::Float, AttentionArithmetic::Int16];
    let numbers = |isa: Isa, case: &Case| {
        let mut state = case.state();
        case.attend(attention_streaming, isa, case.keys.clone(), &mut state);
        state
    };
    for isa in Isa::all() {
        for (format, arithmetic) in
            FORMATS.into_iter().flat_map(|format| arithmetics.map(|one| (format, one)))
        {
            for head_dim in [40, 128] {
                let case = Case::new(format, head_dim, 300, ragged(40, 300), 128..300);
                let case = Case { arithmetic, ..case };
                let all = numbers(isa, &case);
                for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 33] {
                    let first = 40 - rows;
                    let part = Case {
                        q: case.q[first * head_dim..].to_vec(),
                        visible: case.visible[first..].to_vec(),
                        ..case.clone()
                    };
                    let part = numbers(isa, &part);
                    let what =
                        format!("{isa} {format} {arithmetic:?}, head_dim {head_dim}, {rows} rows");
                    assert!(part.max == all.max[first..], "{what}: maxima");
                    assert!(part.sum == all.sum[first..], "{what}: sums");
                    assert!(part.acc == all.acc[first * head_dim..], "{what}: accumulators");
                }
            }
        }
    }
}

#[test]
fn states_merge_in_any_order() {
    for isa in Isa::all() {
        let case = Case::new(KvFormat::F32, 20, 100, ragged(7, 100), 0..100);
        let part = |keys| {
            let mut state = case.state();
            case.attend(attention_streaming, isa, keys, &mut state);
            state
        };
        let parts = [part(0..40), part(40..41), part(41..41), part(41..90), part(90..100)];
        for order in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 0, 3, 1]] {
            let mut state = case.state();
            for i in order {
                state.merge(isa, &parts[i]);
            }
            case.check(isa, &state, &format!("merged in order {order:?}"));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn any_shape_matches_f64(
        format in prop::sample::select(&FORMATS[..]),
        half in 1usize..40,
        tokens in 0usize..300,
        rows in 0usize..30,
        (a, b, cut) in (0.0f64..=1.0, 0.0f64..=1.0, 0.0f64..=1.0),
        seen in prop::collection::vec(0usize..320, 30),
        isa in prop::sample::select(Isa::all().collect::<Vec<_>>()),
    ) {
        let at = |share: f64| (share * tokens as f64) as usize;
        let case = Case::new(format, 2 * half, tokens, seen[..rows].to_vec(), at(a.min(b))..at(a.max(b)));
        case.check_all(isa, at(cut));
    }
}
