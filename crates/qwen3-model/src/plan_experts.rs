//! How unevenly visits to experts lie on ranks that have whole experts.

use std::collections::BTreeMap;

/// Expected visits of the rank that has most, where rank r has `experts[r]` experts and `visits`
/// different ones are chosen, any set of them as likely as another.
///
/// Given their sum, the numbers on the ranks are those of independent binomial draws, b(n, j) for j
/// of n experts. So, with the coefficient of x^visits in brackets, P(most ≤ m) = \[∏ Σ_{j ≤ m}
/// b(n_r, j) xʲ\] / \[∏ Σ_j b(n_r, j) xʲ\], and the expectation is Σ P(most > m) over m ≥ 0.
pub(crate) fn expected_most(experts: &[usize], visits: usize) -> f64 {
    let (total, fullest) =
        (experts.iter().sum::<usize>(), experts.iter().max().copied().unwrap_or(0));
    if visits >= total {
        return fullest as f64;
    }
    let chance = visits as f64 / total as f64;
    // Logarithms, since a small chance of many experts is a very small number.
    let binomial = |n: usize, most: usize| -> Vec<f64> {
        let mut ln = n as f64 * (1.0 - chance).ln();
        let mut next = |j: usize| {
            let now = ln.exp();
            ln += ((n - j) as f64 / (j + 1) as f64 * chance / (1.0 - chance)).ln();
            now
        };
        (0..=most.min(n).min(visits)).map(&mut next).collect()
    };
    // Shares are balanced: there are no more than two sizes.
    let mut sizes = BTreeMap::new();
    experts.iter().for_each(|n| *sizes.entry(*n).or_insert(0) += 1);
    let at_most = |most: usize| {
        let factors = sizes.iter().map(|(n, ranks)| power(binomial(*n, most), *ranks, visits));
        let product =
            factors.fold(vec![1.0], |product, factor| multiply(&product, &factor, visits));
        product.get(visits).copied().unwrap_or(0.0)
    };
    let all = at_most(fullest);
    (0..fullest).map(|most| 1.0 - at_most(most) / all).sum()
}

/// The product of two polynomials, up to x^degree.
fn multiply(a: &[f64], b: &[f64], degree: usize) -> Vec<f64> {
    let mut product = vec![0.0; (a.len() + b.len() - 1).min(degree + 1)];
    for (i, a) in a.iter().enumerate() {
        for (sum, b) in product.iter_mut().skip(i).zip(b) {
            *sum += a * b;
        }
    }
    product
}

/// A power of a polynomial, up to x^degree.
fn power(mut base: Vec<f64>, mut exponent: usize, degree: usize) -> Vec<f64> {
    let mut power = vec![1.0];
    while exponent > 0 {
        if exponent % 2 == 1 {
            power = multiply(&power, &base, degree);
        }
        base = multiply(&base, &base, degree);
        exponent /= 2;
    }
    power
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mean over all sets of experts, one by one.
    fn counted(experts: &[usize], visits: usize) -> f64 {
        let rank_of: Vec<usize> =
            experts.iter().enumerate().flat_map(|(rank, n)| vec![rank; *n]).collect();
        let (mut sets, mut sum) = (0usize, 0usize);
        for set in 0u32..1 << rank_of.len() {
            if set.count_ones() as usize == visits {
                let mut on = vec![0; experts.len()];
                (0..rank_of.len())
                    .filter(|expert| (set >> expert) & 1 == 1)
                    .for_each(|expert| on[rank_of[expert]] += 1);
                (sets, sum) = (sets + 1, sum + on.iter().max().unwrap());
            }
        }
        sum as f64 / sets as f64
    }

    #[test]
    fn the_mean_over_all_choices() {
        for experts in
            [&[4, 4][..], &[5], &[3, 2, 2], &[1, 1, 1, 1, 1, 0, 0], &[6, 5], &[4, 3, 3, 3]]
        {
            for visits in 0..=experts.iter().sum::<usize>() {
                let (found, expected) = (expected_most(experts, visits), counted(experts, visits));
                assert!(
                    (found - expected).abs() < 1e-9,
                    "{visits} of {experts:?}: {found}, expected {expected}"
                );
            }
        }
        // The published mixture on many ranks: as many as experts, and none that overflows.
        let most = expected_most(&[1; 128], 8);
        assert!((most - 1.0).abs() < 1e-9, "{most}");
        let most = expected_most(&[4096; 64], 512);
        assert!(most > 8.0 && most < 20.0, "{most}");
    }
}
