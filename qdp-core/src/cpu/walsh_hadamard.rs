//! The unnormalised Walsh-Hadamard transform, in place.
//!
//! It is real, so a complex state is transformed as the reals it consists of, with every stride
//! doubled.

use super::parallel::ENCODE;
use super::{CHUNK, Within, reals_mut};
use crate::element::Real;
use multiversion::multiversion;
use num_complex::Complex;

/// Transforms the bits from that of `stride` on, up to three in a pass over memory.
pub(super) fn transform_high<R: Real>(state: &mut [Complex<R>], stride: usize, within: Within) {
    let mut stride = stride;
    while stride < state.len() {
        let radix = (state.len() / stride).min(8);
        for group in state.chunks_exact_mut(radix * stride) {
            match radix {
                2 => share::<R, 2>(group, within),
                4 => share::<R, 4>(group, within),
                _ => share::<R, 8>(group, within),
            }
        }
        stride *= radix;
    }
}

/// Transforms over the `N` rows of `group`, in pieces that threads share.
fn share<R: Real, const N: usize>(group: &mut [Complex<R>], within: Within) {
    let mut rows = split::<_, N>(group);
    if within == Within::OneThread {
        return combine_rows(rows.map(reals_mut));
    }
    let mut pieces = rows.each_mut().map(|row| row.chunks_mut(CHUNK));
    let count = pieces[0].len();
    let piece = |_| pieces.each_mut().map(|row| reals_mut(row.next().unwrap_or_default()));
    let pieces: Vec<_> = (0..count).map(piece).collect();
    ENCODE.for_each(true, pieces.into_iter(), combine_rows::<R, N>);
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn combine_rows<R: Real, const N: usize>(mut rows: [&mut [R]; N]) {
    combine(&mut rows);
}

/// Transforms a state that the first-level cache holds. For callers that are compiled for the
/// processor's vectors.
#[inline(always)]
pub(super) fn transform_cached<R: Real>(state: &mut [Complex<R>]) {
    let mut stride = lowest(state);
    let reals = reals_mut(state);
    while 2 * stride < reals.len() {
        let radix = (reals.len() / (2 * stride)).min(8);
        for group in reals.chunks_exact_mut(radix * 2 * stride) {
            match radix {
                2 => combine(&mut split::<R, 2>(group)),
                4 => combine(&mut split::<R, 4>(group)),
                _ => combine(&mut split::<R, 8>(group)),
            }
        }
        stride *= radix;
    }
}

/// Transforms the lowest bits, up to three; returns the stride of the next.
#[inline(always)]
fn lowest<R: Real>(state: &mut [Complex<R>]) -> usize {
    match state.len() {
        0 | 1 => 1,
        2 => {
            let (a, b) = (state[0], state[1]);
            (state[0], state[1]) = (a + b, a - b);
            2
        }
        4 => {
            let (blocks, _) = state.as_chunks_mut::<4>();
            for block in blocks {
                *block = radix_4(*block);
            }
            4
        }
        _ => {
            let (blocks, _) = state.as_chunks_mut::<8>();
            for block in blocks {
                let [a, b, c, d, e, f, g, h] = *block;
                let [a, b, c, d] = radix_4([a, b, c, d]);
                let [e, f, g, h] = radix_4([e, f, g, h]);
                *block = [a + e, b + f, c + g, d + h, a - e, b - f, c - g, d - h];
            }
            8
        }
    }
}

#[inline(always)]
fn radix_4<R: Real>([a, b, c, d]: [Complex<R>; 4]) -> [Complex<R>; 4] {
    let (a, b) = (a + b, a - b);
    let (c, d) = (c + d, c - d);
    [a + c, b + d, a - c, b - d]
}

#[inline(always)]
fn split<T, const N: usize>(group: &mut [T]) -> [&mut [T]; N] {
    let mut rows = group.chunks_exact_mut(group.len() / N);
    std::array::from_fn(|_| rows.next().unwrap_or_default())
}

/// Transforms over the rows: at every position, the values of the `N` rows there.
#[inline(always)]
fn combine<R: Real, const N: usize>(rows: &mut [&mut [R]; N]) {
    // A vector register of AVX2.
    if size_of::<R>() == 4 {
        combine_lanes::<R, N, 8>(rows);
    } else {
        combine_lanes::<R, N, 4>(rows);
    }
}

#[inline(always)]
fn combine_lanes<R: Real, const N: usize, const LANES: usize>(rows: &mut [&mut [R]; N]) {
    let blocks = rows[0].len() / LANES;
    for block in 0..blocks {
        let at = block * LANES;
        // All loads come before the stores, so that nothing need be known about how the rows lie.
        let mut values = [[R::zero(); LANES]; N];
        for row in 0..N {
            values[row].copy_from_slice(&rows[row][at..at + LANES]);
        }
        let mut half = 1;
        while half < N {
            for low in 0..N {
                if low & half == 0 {
                    let (a, b) = (values[low], values[low + half]);
                    for lane in 0..LANES {
                        values[low][lane] = a[lane] + b[lane];
                        values[low + half][lane] = a[lane] - b[lane];
                    }
                }
            }
            half *= 2;
        }
        for row in 0..N {
            rows[row][at..at + LANES].copy_from_slice(&values[row]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transform(state: &mut [Complex<f64>], chunk: usize, within: Within) {
        state.chunks_mut(chunk).for_each(transform_cached);
        transform_high(state, chunk, within);
    }

    #[test]
    fn agrees_with_the_definition() {
        for (n, chunk) in [(1, 2), (2, 4), (3, 8), (4, 16), (6, 64), (7, 8), (8, 32)] {
            let dim = 1usize << n;
            let input: Vec<Complex<f64>> =
                (0..dim).map(|i| Complex::new(i as f64, (i * i % 7) as f64)).collect();
            let mut state = input.clone();
            transform(&mut state, chunk, Within::OneThread);
            for (i, got) in state.iter().enumerate() {
                let expected: Complex<f64> = (0..dim)
                    .map(|j| if (i & j).count_ones() % 2 == 0 { input[j] } else { -input[j] })
                    .sum();
                assert!((got - expected).norm() < 1e-9, "n={n} i={i}");
            }
        }
    }

    #[test]
    fn twice_is_the_identity_above_the_chunk_size() {
        for n in [11, 13, 14, 16] {
            let dim = 1usize << n;
            let input: Vec<Complex<f64>> =
                (0..dim).map(|i| Complex::new((i % 97) as f64, (i % 89) as f64)).collect();
            let mut state = input.clone();
            transform(&mut state, CHUNK, Within::Pool);
            transform(&mut state, CHUNK, Within::OneThread);
            for (got, expected) in state.iter().zip(&input) {
                assert!((got / dim as f64 - expected).norm() < 1e-12);
            }
        }
    }
}
