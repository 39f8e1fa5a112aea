//! Sums of a vector over the indices with a bit set, and with two: by halves.
//!
//! The sum over the upper half is that of the top bit. Adding it to the lower half leaves a vector
//! over the other bits, half as long, with the same sums.

use crate::encoding::diagonal::{QuadraticSlopes, pair_index};

/// Sums that do not wait for each other.
const LANES: usize = 8;

/// Writes the sums of `values` over the indices with bit `k` set to `singles[k]`, and answers the
/// sum of all. Overwrites the values.
#[inline(always)]
pub(super) fn first_moments(values: &mut [f64], singles: &mut [f64]) -> f64 {
    let mut rest = values;
    for single in singles.iter_mut().rev() {
        let (low, high) = rest.split_at_mut(rest.len() / 2);
        *single = sum(high);
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
        rest = low;
    }
    rest[0]
}

#[inline(always)]
fn sum(values: &[f64]) -> f64 {
    let (whole, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for values in whole {
        for (sum, value) in lanes.iter_mut().zip(values) {
            *sum += value;
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().sum::<f64>()
}

/// Writes the sums of `values` over the indices with two bits set to `slopes`: their bit `k` is bit
/// `k + lowest` there. Overwrites the values.
pub(super) fn second_moments(values: &mut [f64], lowest: usize, slopes: &mut QuadraticSlopes) {
    let n = slopes.singles.len();
    let mut upper = Vec::new();
    let mut singles = vec![0.0; n];
    let mut rest = values;
    for top in (1..rest.len().ilog2() as usize).rev() {
        let (low, high) = rest.split_at_mut(1 << top);
        upper.clear();
        upper.extend_from_slice(high);
        first_moments(&mut upper, &mut singles[..top]);
        for (k, &sum) in singles[..top].iter().enumerate() {
            slopes.pairs[pair_index(n, lowest + k, lowest + top)] = sum;
        }
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
        rest = low;
    }
}

/// First moments of the columns of a matrix over the index of its rows of `columns` values each:
/// writes those of bit `k` to `singles[k * columns..]`, and the columns' sums to the first row.
/// Overwrites the matrix.
pub(super) fn column_moments(matrix: &mut [f64], columns: usize, singles: &mut [f64]) {
    let mut rest = matrix;
    for singles in singles.chunks_exact_mut(columns).rev() {
        let (low, high) = rest.split_at_mut(rest.len() / 2);
        singles.fill(0.0);
        for (low, high) in low.chunks_exact_mut(columns).zip(high.chunks_exact(columns)) {
            for ((low, high), single) in low.iter_mut().zip(high).zip(&mut *singles) {
                *low += high;
                *single += high;
            }
        }
        rest = low;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_sums_over_set_bits() {
        for n in 1..=7usize {
            let values: Vec<f64> =
                (0..1usize << n).map(|i| ((i * i + 3 * i) % 17) as f64).collect();
            let sum = |bits: usize| -> f64 {
                (0..1 << n).filter(|i| i & bits == bits).map(|i| values[i]).sum()
            };
            let mut singles = vec![f64::NAN; n];
            let total = first_moments(&mut values.clone(), &mut singles);
            let mut slopes = QuadraticSlopes {
                singles: vec![0.0; n + 2],
                pairs: vec![0.0; (n + 2) * (n + 1) / 2],
                ..QuadraticSlopes::default()
            };
            second_moments(&mut values.clone(), 2, &mut slopes);
            assert!((total - sum(0)).abs() < 1e-9);
            for (k, single) in singles.iter().enumerate() {
                assert!((single - sum(1 << k)).abs() < 1e-9, "n={n} k={k}");
                for j in 0..k {
                    let got = slopes.pairs[pair_index(n + 2, j + 2, k + 2)];
                    assert!((got - sum(1 << j | 1 << k)).abs() < 1e-9, "n={n} j={j} k={k}");
                }
            }
            let mut twice: Vec<f64> =
                values.iter().flat_map(|&value| [value, -2.0 * value]).collect();
            let mut columns = vec![f64::NAN; 2 * n];
            column_moments(&mut twice, 2, &mut columns);
            assert!((twice[0] - sum(0)).abs() + (twice[1] + 2.0 * sum(0)).abs() < 1e-9);
            for k in 0..n {
                let want = sum(1 << k);
                assert!((columns[2 * k] - want).abs() < 1e-9, "n={n} k={k}");
                assert!((columns[2 * k + 1] + 2.0 * want).abs() < 1e-9, "n={n} k={k}");
            }
        }
    }
}
