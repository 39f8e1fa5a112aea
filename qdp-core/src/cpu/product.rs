//! Product states: the outer product of a table over the low bits and a table over the high bits.

use super::trig::{Trig, cos_sin};
use super::{PIECE, Rows, features, for_chunks, reals, reals_mut};
use crate::element::{Element, Real};
use crate::encoding::product::{Factor, Product};
use crate::error::Result;
use multiversion::multiversion;
use num_complex::Complex;

/// Bits of the low table at most: as many as fit the first-level cache beside what is written.
pub(super) const LOW_BITS: usize = 9;

pub(super) fn encode<T: Element, R: Trig>(product: &Product, rows: Rows<'_, R>) -> Result<()> {
    let Rows { input, first, states, within } = rows;
    let n = input.features();
    let bits = product.factor == Factor::Bit;
    let mut x = vec![0.0; states.len() * n];
    for (sample, x) in (first..).zip(x.chunks_exact_mut(n)) {
        features::<T>(sample, input, bits, x)?;
        if product.big_endian {
            x.reverse();
        }
    }
    let factors = factors(product.factor, &x);
    let mut tables = Tables::new();
    for (state, factors) in states.zip(factors.chunks_exact(n)) {
        tables.prepare(factors);
        for_chunks(state, PIECE, within, |first, piece| {
            tables.fill(first, piece);
        });
    }
    Ok(())
}

/// The factor of every feature.
#[multiversion(targets("x86_64+avx2+fma"))]
fn factors(factor: Factor, x: &[f64]) -> Vec<[Complex<f64>; 2]> {
    with_phases(factor, x, |x, phase, common| factor.combine(x, phase, common))
}

/// What `each(x, exp(i scale x), exp(i global x))` answers for every feature, with the scales of the
/// factor.
#[inline(always)]
pub(super) fn with_phases<V>(
    factor: Factor,
    x: &[f64],
    each: impl Fn(f64, Complex<f64>, Complex<f64>) -> V,
) -> Vec<V> {
    let (scale, global) = factor.scales();
    let (mut cos, mut sin) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    cos_sin(x, scale, &mut cos, &mut sin);
    let mut values = Vec::with_capacity(x.len());
    let phases = x.iter().zip(cos.iter().zip(&sin));
    if global == 0.0 {
        let one = Complex::new(1.0, 0.0);
        values.extend(phases.map(|(&x, (&cos, &sin))| each(x, Complex::new(cos, sin), one)));
        return values;
    }
    let (mut common_cos, mut common_sin) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    cos_sin(x, global, &mut common_cos, &mut common_sin);
    let both = phases.zip(common_cos.iter().zip(&common_sin));
    values.extend(both.map(|((&x, (&cos, &sin)), (&common_cos, &common_sin))| {
        each(x, Complex::new(cos, sin), Complex::new(common_cos, common_sin))
    }));
    values
}

/// The two tables of one state.
struct Tables<R> {
    low: Vec<Complex<R>>,
    /// The low table times i. Then a product with a complex number is, real by real, a sum of two
    /// products, and needs no shuffling.
    rotated: Vec<Complex<R>>,
    high: Vec<Complex<R>>,
    scratch: Vec<Complex<f64>>,
}

impl<R: Real> Tables<R> {
    fn new() -> Self {
        Self { low: Vec::new(), rotated: Vec::new(), high: Vec::new(), scratch: Vec::new() }
    }

    fn prepare(&mut self, factors: &[[Complex<f64>; 2]]) {
        let Self { low, rotated, high, scratch } = self;
        // Two small tables cost less than one of the whole state.
        let (low_factors, high_factors) = factors.split_at(factors.len().div_ceil(2).min(LOW_BITS));
        fill_table(low_factors, scratch, low);
        rotated.resize(low.len(), Complex::new(R::zero(), R::zero()));
        for (rotated, z) in rotated.iter_mut().zip(&*low) {
            *rotated = Complex::new(-z.im, z.re);
        }
        fill_table(high_factors, scratch, high);
    }

    /// Writes the amplitudes from index `first` on.
    fn fill(&self, first: usize, state: &mut [Complex<R>]) {
        outer(&self.low, &self.rotated, &self.high[first / self.low.len()..], state);
    }
}

/// The tensor product of `factors` by doubling: each bit extends the table below it.
#[multiversion(targets("x86_64+avx2+fma"))]
pub(super) fn fill_table<R: Real>(
    factors: &[[Complex<f64>; 2]],
    scratch: &mut Vec<Complex<f64>>,
    table: &mut Vec<Complex<R>>,
) {
    scratch.resize(1 << factors.len(), Complex::new(0.0, 0.0));
    scratch[0] = Complex::new(1.0, 0.0);
    let mut half = 1;
    for &[zero, one] in factors {
        let (low, high) = scratch[..2 * half].split_at_mut(half);
        if zero.im == 0.0 && one.im == 0.0 {
            // Of a rotation about y: reals side by side fill the vectors without shuffling.
            for (low, high) in reals_mut(low).iter_mut().zip(reals_mut(high)) {
                *high = *low * one.re;
                *low *= zero.re;
            }
        } else {
            for (low, high) in low.iter_mut().zip(high) {
                *high = *low * one;
                *low *= zero;
            }
        }
        half *= 2;
    }
    table.resize(scratch.len(), Complex::new(R::zero(), R::zero()));
    for (value, z) in table.iter_mut().zip(&*scratch) {
        *value = Complex::new(R::from_f64(z.re), R::from_f64(z.im));
    }
}

/// Writes `low` times each of `high` to `state`, one after another; `rotated` is i times `low`.
#[multiversion(targets("x86_64+avx2+fma"))]
fn outer<R: Real>(
    low: &[Complex<R>],
    rotated: &[Complex<R>],
    high: &[Complex<R>],
    state: &mut [Complex<R>],
) {
    let zero = R::zero();
    let (low_reals, rotated) = (reals(low), reals(rotated));
    for (part, factor) in state.chunks_exact_mut(low.len()).zip(high) {
        let part = reals_mut(part);
        // Rotations about x and y have factors without one of the two parts.
        if factor.im == zero {
            for (value, &a) in part.iter_mut().zip(low_reals) {
                *value = a * factor.re;
            }
        } else if factor.re == zero {
            for (value, &b) in part.iter_mut().zip(rotated) {
                *value = b * factor.im;
            }
        } else {
            for ((value, &a), &b) in part.iter_mut().zip(low_reals).zip(rotated) {
                *value = a * factor.re + b * factor.im;
            }
        }
    }
}
