//! The unnormalised Walsh-Hadamard transform, in place.

use super::parallel::ENCODE;
use super::{CHUNK, Within, for_chunks};
use crate::element::Real;
use num_complex::Complex;

/// Transforms `state`, whose length is a power of two.
///
/// The low bits are transformed chunk by chunk in cache; the high bits two at a time, so that each
/// pass over memory does two of them.
pub(super) fn walsh_hadamard<R: Real>(state: &mut [Complex<R>], within: Within) {
    let chunk = CHUNK.min(state.len());
    for_chunks(state, chunk, within, |_, part| {
        let mut stride = 1;
        while stride < part.len() {
            stride = pass(part, stride, Within::OneThread);
        }
    });
    let mut stride = chunk;
    while stride < state.len() {
        stride = pass(state, stride, within);
    }
}

/// Transforms the bit of `stride` and, where there is one, the next; returns the stride after.
fn pass<R: Real>(state: &mut [Complex<R>], stride: usize, within: Within) -> usize {
    let radix = if 4 * stride <= state.len() { 4 } else { 2 };
    for group in state.chunks_exact_mut(radix * stride) {
        let (low, high) = group.split_at_mut(radix / 2 * stride);
        if radix == 2 {
            for_zipped(within, [low, high], |[a, b]| {
                let (x, y) = (*a, *b);
                *a = x + y;
                *b = x - y;
            });
        } else {
            let (a, b) = low.split_at_mut(stride);
            let (c, d) = high.split_at_mut(stride);
            for_zipped(within, [a, b, c, d], |[a, b, c, d]| {
                let (sum_low, difference_low) = (*a + *b, *a - *b);
                let (sum_high, difference_high) = (*c + *d, *c - *d);
                *a = sum_low + sum_high;
                *b = difference_low + difference_high;
                *c = sum_low - sum_high;
                *d = difference_low - difference_high;
            });
        }
    }
    stride * radix
}

/// Runs `butterfly` on the elements of the parts at equal positions.
fn for_zipped<R: Real, const N: usize>(
    within: Within,
    parts: [&mut [Complex<R>]; N],
    butterfly: impl Fn([&mut Complex<R>; N]) + Sync,
) {
    let run = |mut parts: [&mut [Complex<R>]; N]| {
        let len = parts[0].len();
        for i in 0..len {
            butterfly(parts.each_mut().map(|part| &mut part[i]));
        }
    };
    if within == Within::OneThread || parts[0].len() <= CHUNK {
        run(parts);
        return;
    }
    let mut rest = parts;
    let mut tasks = Vec::with_capacity(rest[0].len().div_ceil(CHUNK));
    while !rest[0].is_empty() {
        let at = CHUNK.min(rest[0].len());
        let mut tails =
            rest.map(|part| part.split_at_mut(at)).map(|(head, tail)| (Some(head), tail));
        tasks.push(tails.each_mut().map(|(head, _)| head.take().unwrap_or_default()));
        rest = tails.map(|(_, tail)| tail);
    }
    ENCODE.for_each(true, tasks.into_iter(), run);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_the_definition() {
        for (n, within) in [(1, Within::OneThread), (3, Within::OneThread), (6, Within::Pool)] {
            let dim = 1usize << n;
            let input: Vec<Complex<f64>> =
                (0..dim).map(|i| Complex::new(i as f64, (i * i % 7) as f64)).collect();
            let mut state = input.clone();
            walsh_hadamard(&mut state, within);
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
        for n in [13, 14, 16] {
            let dim = 1usize << n;
            let input: Vec<Complex<f64>> =
                (0..dim).map(|i| Complex::new((i % 97) as f64, (i % 89) as f64)).collect();
            let mut state = input.clone();
            walsh_hadamard(&mut state, Within::Pool);
            walsh_hadamard(&mut state, Within::OneThread);
            for (got, expected) in state.iter().zip(&input) {
                assert!((got / dim as f64 - expected).norm() < 1e-12);
            }
        }
    }
}
