//! Amplitude encoding: one pass for the norm, one to scale and pad.

use super::parallel::ENCODE;
use super::{PIECE, Rows, Within, for_chunks};
use crate::element::{DType, Element, Precision, Real};
use crate::encoding::amplitude::{non_finite, norm};
use crate::error::Result;
use crate::input::Row;
use multiversion::multiversion;
use num_complex::Complex;

pub(super) fn encode<T: Element, R: Real>(rows: Rows<'_, R>) -> Result<()> {
    let Rows { input, first, states, within } = rows;
    for (sample, state) in (first..).zip(states) {
        let row = input.row::<T>(sample);
        let sum = sum_of_squares(row, within);
        if !sum.is_finite() {
            check_finite(sample, row, 0)?;
        }
        // Half a rounding more than a division, and several times as fast.
        let inverse = 1.0 / norm(sample, sum)?;
        for_chunks(state, PIECE, within, |first, piece| {
            let end = (first + piece.len()).min(row.len());
            scale(row.range(first.min(end)..end), inverse, piece);
        });
    }
    Ok(())
}

/// Writes `row` times `factor` to `state`, and zeros behind it.
fn scale<T: Element, R: Real>(row: Row<'_, T>, factor: f64, state: &mut [Complex<R>]) {
    let (values, padding) = state.split_at_mut(row.len());
    if let Some(slice) = row.as_slice() {
        scale_slice(slice, factor, values);
    } else {
        for (i, value) in values.iter_mut().enumerate() {
            *value = scaled(row.get(i), factor);
        }
    }
    padding.fill(Complex::new(R::zero(), R::zero()));
}

#[inline(always)]
fn scaled<T: Element, R: Real>(x: T, factor: f64) -> Complex<R> {
    if T::DTYPE.is_complex() {
        let z = x.to_complex() * factor;
        Complex::new(R::from_f64(z.re), R::from_f64(z.im))
    } else {
        Complex::new(R::from_f64(x.to_f64() * factor), R::zero())
    }
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn scale_slice<T: Element, R: Real>(values: &[T], factor: f64, state: &mut [Complex<R>]) {
    // Single precision need not be multiplied in double where neither the values nor the factor
    // can leave its range: half a rounding more, and half the time.
    let narrow = T::DTYPE == DType::F32 && R::PRECISION == Precision::Complex64;
    if narrow && (f32::MIN_POSITIVE as f64..=f32::MAX as f64).contains(&factor) {
        let factor = R::from_f64(factor);
        for (value, &x) in state.iter_mut().zip(values) {
            *value = Complex::new(R::from_f64(x.to_f64()) * factor, R::zero());
        }
        return;
    }
    for (value, &x) in state.iter_mut().zip(values) {
        *value = scaled(x, factor);
    }
}

/// Fails on the first value of a row, or of its part from `first` on, that is not finite.
pub(crate) fn check_finite<T: Element>(sample: usize, row: Row<'_, T>, first: usize) -> Result<()> {
    for i in 0..row.len() {
        let z = row.get(i).to_complex();
        let value = if z.re.is_finite() { z.im } else { z.re };
        if !value.is_finite() {
            return Err(non_finite(sample, first + i, value));
        }
    }
    Ok(())
}

fn sum_of_squares<T: Element>(row: Row<'_, T>, within: Within) -> f64 {
    let part = |p: usize| partial_sum(row.range(p * PIECE..((p + 1) * PIECE).min(row.len())));
    let pieces = row.len().div_ceil(PIECE);
    if within == Within::OneThread {
        return (0..pieces).map(part).sum();
    }
    let mut parts = vec![0.0; pieces];
    ENCODE.for_each(true, parts.iter_mut().enumerate(), |(p, sum)| *sum = part(p));
    parts.iter().sum()
}

/// Sum of squares of a piece of a row, in double.
pub(crate) fn partial_sum<T: Element>(row: Row<'_, T>) -> f64 {
    match row.as_slice() {
        Some(slice) => sum_slice(slice),
        // In the same order, so that the result is the same.
        None => sum_lanes(row.len(), |i| square(row.get(i))),
    }
}

#[inline(always)]
fn square<T: Element>(x: T) -> f64 {
    if T::DTYPE.is_complex() { x.to_complex().norm_sqr() } else { x.to_f64() * x.to_f64() }
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn sum_slice<T: Element>(values: &[T]) -> f64 {
    sum_lanes(values.len(), |i| square(values[i]))
}

/// Independent lanes, so that the additions need not wait for each other, and round less often.
#[inline(always)]
fn sum_lanes(count: usize, term: impl Fn(usize) -> f64) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [0.0; LANES];
    let whole = count / LANES * LANES;
    for block in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(block + lane);
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0] + (whole..count).map(term).sum::<f64>()
}
