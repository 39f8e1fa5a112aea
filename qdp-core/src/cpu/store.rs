//! How results are written.

use super::CHUNK;
use crate::element::Real;
use num_complex::Complex;

/// Where written amplitudes go.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Store {
    /// To the caches, as always.
    Cached,
    /// To memory: a store to a line that no cache holds would read the line first, and put out
    /// others for it.
    PastCaches,
}

impl Store {
    /// Lets `fill` write up to [`CHUNK`] amplitudes that end up in `target`.
    #[inline(always)]
    pub(super) fn fill<R: Real>(
        self,
        target: &mut [Complex<R>],
        fill: impl FnOnce(&mut [Complex<R>]),
    ) {
        match self {
            Self::Cached => fill(target),
            Self::PastCaches => {
                let mut buffer = [Complex::new(R::zero(), R::zero()); CHUNK];
                let buffer = &mut buffer[..target.len()];
                fill(buffer);
                copy_past_caches(buffer, target);
            }
        }
    }

    /// Copies to `target`, which has the length of `source`.
    pub(super) fn copy<R: Real>(self, source: &[Complex<R>], target: &mut [Complex<R>]) {
        match self {
            Self::Cached => target.copy_from_slice(source),
            Self::PastCaches => copy_past_caches(source, target),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn copy_past_caches<R: Real>(source: &[Complex<R>], target: &mut [Complex<R>]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    const LINE: usize = 64;

    assert_eq!(source.len(), target.len());
    let start = target.as_mut_ptr().addr();
    let size = size_of::<Complex<R>>();
    if !start.is_multiple_of(size) {
        return target.copy_from_slice(source); // no amplitude begins on a cache line
    }
    let head = ((start.next_multiple_of(LINE) - start) / size).min(source.len());
    let (source_head, source) = source.split_at(head);
    let (target_head, target) = target.split_at_mut(head);
    target_head.copy_from_slice(source_head);
    let lines = size_of_val(target) / LINE;
    // SAFETY: both slices hold `lines` whole lines of plain values, the borrows keep them from
    // overlapping, and the target's lines are aligned. The fence orders these stores before
    // whatever this thread does next, as every other store is.
    unsafe {
        let source = source.as_ptr().cast::<__m128i>();
        let target = target.as_mut_ptr().cast::<__m128i>();
        for part in 0..lines * (LINE / 16) {
            _mm_stream_si128(target.add(part), _mm_loadu_si128(source.add(part)));
        }
        _mm_sfence();
    }
    let rest = lines * (LINE / size);
    target[rest..].copy_from_slice(&source[rest..]);
}

#[cfg(not(target_arch = "x86_64"))]
fn copy_past_caches<R: Real>(source: &[Complex<R>], target: &mut [Complex<R>]) {
    target.copy_from_slice(source);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_alignment_and_length_is_copied() {
        let source: Vec<Complex<f32>> = (0..40).map(|i| Complex::new(i as f32, -1.0)).collect();
        for offset in 0..9 {
            for len in 0..=30 {
                let mut target = vec![Complex::new(0.0f32, 0.0); 40];
                Store::PastCaches.copy(&source[..len], &mut target[offset..offset + len]);
                assert_eq!(target[offset..offset + len], source[..len]);
                let untouched = target.iter().filter(|z| z.im == 0.0).count();
                assert_eq!(untouched, 40 - len);
            }
        }
    }
}
