//! Candidates for the next token: the best tokens of a rank's slice of the vocabulary, and their
//! form on the wire.

use std::cmp::Ordering;
use std::ops::Range;

use ops::Isa;
use ops::kernels::argmax;

use crate::deterministic::Noise;

/// A token with its score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub score: f32,
    pub id: u32,
}

impl Candidate {
    /// Worse than any token.
    pub const NONE: Self = Self { score: f32::NEG_INFINITY, id: u32::MAX };

    /// Higher scores first, lower ids first among equals.
    pub fn rank(&self, other: &Self) -> Ordering {
        other
            .score
            .partial_cmp(&self.score)
            .expect("scores are not NaN")
            .then(self.id.cmp(&other.id))
    }

    /// Whether this one comes before `other`.
    pub fn beats(&self, other: &Self) -> bool {
        self.score > other.score || (self.score == other.score && self.id < other.id)
    }

    /// Whether this stands for no token at all.
    pub fn is_none(&self) -> bool {
        self.score == f32::NEG_INFINITY
    }

    /// Score and id in eight bytes.
    pub fn pack(self) -> u64 {
        u64::from(self.score.to_bits()) << 32 | u64::from(self.id)
    }

    /// The inverse of [`Candidate::pack`].
    pub fn unpack(word: u64) -> Self {
        Self { score: f32::from_bits((word >> 32) as u32), id: word as u32 }
    }
}

/// Whether a logit is NaN or +∞; −∞ excludes a token and is allowed.
pub(crate) fn any_invalid(logits: &[f32]) -> bool {
    // On bits, so that the loop stays in vector registers.
    let invalid = |x: &f32| {
        let bits = x.to_bits();
        u32::from((0x7f80_0000..0x8000_0000).contains(&bits)) | u32::from(bits > 0xff80_0000)
    };
    logits.iter().map(invalid).fold(0, |any, one| any | one) != 0
}

/// The largest of some scores, none of them NaN.
fn largest(scores: &[f32]) -> f32 {
    // Eight independent maxima: a single one would be a chain that cannot be vectorized.
    let mut lanes = [f32::NEG_INFINITY; 8];
    let (blocks, rest) = scores.as_chunks::<8>();
    for block in blocks {
        for (lane, &score) in lanes.iter_mut().zip(block) {
            *lane = if score > *lane { score } else { *lane };
        }
    }
    lanes
        .iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |most, &score| if score > most { score } else { most })
}

/// The best token of a slice of the vocabulary that starts at `first`.
pub(crate) fn best(isa: Isa, scores: &[f32], first: usize) -> Candidate {
    match argmax(isa, scores) {
        Some(index) if scores[index] > f32::NEG_INFINITY => {
            Candidate { score: scores[index], id: (first + index) as u32 }
        }
        _ => Candidate::NONE,
    }
}

/// The best `count` tokens of a slice, best first, fewer if the slice has fewer.
pub(crate) fn select(scores: &[f32], first: usize, count: usize, out: &mut Vec<Candidate>) {
    /// Scores that are compared with the threshold at once.
    const BLOCK: usize = 64;
    out.clear();
    let room = count.saturating_mul(2).max(BLOCK);
    let mut threshold = f32::NEG_INFINITY;
    for (block, start) in scores.chunks(BLOCK).zip((first..).step_by(BLOCK)) {
        if largest(block) <= threshold {
            continue;
        }
        for (&score, id) in block.iter().zip(start..) {
            // Ids ascend, so a later score must exceed the threshold, not only reach it.
            if score > threshold {
                out.push(Candidate { score, id: id as u32 });
            }
        }
        if out.len() >= room {
            keep(out, count);
            threshold =
                out.iter().fold(f32::INFINITY, |least, candidate| least.min(candidate.score));
        }
    }
    keep(out, count);
    out.sort_unstable_by(Candidate::rank);
}

fn keep(candidates: &mut Vec<Candidate>, count: usize) {
    if candidates.len() > count {
        if count > 0 {
            candidates.select_nth_unstable_by(count - 1, Candidate::rank);
        }
        candidates.truncate(count);
    }
}

/// Score plus Gumbel noise: the token with the largest is a draw from the softmax of the scores.
pub(crate) fn perturb(candidate: &Candidate, noise: Noise) -> Candidate {
    let score = (f64::from(candidate.score) + noise.gumbel(candidate.id)) as f32;
    Candidate { score, id: candidate.id }
}

/// The best perturbed token of a slice among those with a score of at least `least`.
pub(crate) fn best_perturbed(
    scores: &[f32],
    vocab: Range<usize>,
    least: f32,
    noise: Noise,
) -> Candidate {
    let mut found = Candidate::NONE;
    for (&score, id) in scores.iter().zip(vocab) {
        let candidate = Candidate { score, id: id as u32 };
        if score < least || candidate.is_none() {
            continue;
        }
        // Few tokens can beat the best so far, and two logarithms a token would cost more than the
        // rest of the step.
        if ((f64::from(score) + noise.gumbel_bound(candidate.id)) as f32) < found.score {
            continue;
        }
        let candidate = perturb(&candidate, noise);
        if candidate.beats(&found) {
            found = candidate;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(count: usize, seed: u64) -> Vec<f32> {
        // Rounded, so that ties are common.
        (0..count as u32).map(|id| (Noise::new(seed, 0).gumbel(id) * 4.0).round() as f32).collect()
    }

    #[test]
    fn words_keep_their_parts() {
        for (score, id) in [(1.5, 0), (-0.0, u32::MAX - 1), (f32::NEG_INFINITY, 77)] {
            let found = Candidate::unpack(Candidate { score, id }.pack());
            assert_eq!((found.score.to_bits(), found.id), (score.to_bits(), id));
        }
        assert!(Candidate::unpack(Candidate { score: f32::NAN, id: 1 }.pack()).score.is_nan());
    }

    #[test]
    fn selection_agrees_with_sorting() {
        for length in [0, 1, 7, 63, 64, 65, 130, 1000] {
            let scores = scores(length, length as u64);
            let mut sorted: Vec<_> =
                scores.iter().zip(500..).map(|(&score, id)| Candidate { score, id }).collect();
            sorted.sort_by(Candidate::rank);
            for count in [0, 1, 2, 20, 64, 500, 2000] {
                let mut found = Vec::new();
                select(&scores, 500, count, &mut found);
                assert_eq!(found, sorted[..count.min(length)], "{count} of {length}");
            }
            let expected = sorted.first().copied().unwrap_or(Candidate::NONE);
            assert_eq!(best(Isa::detect(), &scores, 500), expected, "best of {length}");
        }
    }

    #[test]
    fn excluded_tokens_are_never_selected() {
        let scores = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY];
        let mut found = Vec::new();
        select(&scores, 0, 3, &mut found);
        assert_eq!(found, [Candidate { score: 1.0, id: 1 }]);
        assert!(best(Isa::detect(), &[f32::NEG_INFINITY; 9], 0).is_none());
        assert!(
            best_perturbed(&[f32::NEG_INFINITY; 9], 0..9, f32::NEG_INFINITY, Noise::new(1, 1))
                .is_none()
        );
    }

    #[test]
    fn pruning_does_not_change_the_draw() {
        for seed in 0..50 {
            let scores = scores(700, seed);
            let noise = Noise::new(seed, 9);
            let naive = scores
                .iter()
                .zip(100..)
                .map(|(&score, id)| perturb(&Candidate { score, id }, noise))
                .min_by(Candidate::rank)
                .expect("scores");
            assert_eq!(
                best_perturbed(&scores, 100..800, f32::NEG_INFINITY, noise),
                naive,
                "seed {seed}"
            );
        }
    }

    #[test]
    fn invalid_logits_are_seen() {
        let mut logits = vec![0.5f32; 37];
        logits[3] = f32::NEG_INFINITY;
        logits[4] = f32::MAX;
        logits[5] = -0.0;
        assert!(!any_invalid(&logits));
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            let mut logits = logits.clone();
            logits[36] = bad;
            assert!(any_invalid(&logits), "{bad}");
        }
    }
}
