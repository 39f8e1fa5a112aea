//! Amplitude encoding: one pass for the norm, one to scale and pad.

use super::parallel::ENCODE;
use super::{PIECE, Rows, Within, for_chunks, rows_per_line};
use crate::element::{DType, Element, Precision, Real};
use crate::encoding::amplitude::{non_finite, norm};
use crate::error::Result;
use crate::input::{Input, Row};
use multiversion::multiversion;
use num_complex::Complex;
use std::ops::Range;

/// Values whose squares are summed at a time.
const BLOCK: usize = 1 << 10;
/// Independent sums, so that the additions need not wait for each other, and round less often.
const LANES: usize = 16;

/// Columns of a batch that are gathered at a time: from every row a cache line of what is written.
const COLUMNS: usize = 16;

pub(super) fn encode<T: Element, R: Real>(rows: Rows<'_, R>) -> Result<()> {
    let Rows { input, first, states, within } = rows;
    let gathered: Vec<T>;
    let (input, before) = if rows_per_line(input) > 1 && within == Within::OneThread {
        gathered = gather(input, first..first + states.len());
        (&Input::rows(&gathered, input.features())?, first)
    } else {
        (input, 0)
    };
    for (sample, state) in (first..).zip(states) {
        let row = input.row::<T>(sample - before);
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

/// Copies the rows of a transposed batch, one behind the other. Every cache line holds values of
/// many of them: so a few columns at a time.
fn gather<T: Element>(input: &Input<'_>, samples: Range<usize>) -> Vec<T> {
    let len = input.features();
    let rows: Vec<_> = samples.map(|sample| input.row::<T>(sample)).collect();
    let Some(row) = rows.first() else { return Vec::new() };
    let mut values = vec![row.get(0); rows.len() * len];
    for first in (0..len).step_by(COLUMNS) {
        let columns = first..(first + COLUMNS).min(len);
        for (row, values) in rows.iter().zip(values.chunks_exact_mut(len)) {
            let part = row.range(columns.clone());
            for (value, i) in values[columns.clone()].iter_mut().zip(0..part.len()) {
                *value = part.get(i);
            }
        }
    }
    values
}

/// Writes `row` times `factor` to `state`, and zeros behind it.
fn scale<T: Element, R: Real>(row: Row<'_, T>, factor: f64, state: &mut [Complex<R>]) {
    let (values, padding) = state.split_at_mut(row.len());
    if let Some(slice) = row.as_slice() {
        scale_slice(slice, factor, values);
    } else {
        // By the same arithmetic: where the values lie makes no difference to any bit.
        let mut block = [row.get(0); COLUMNS];
        for (b, values) in values.chunks_mut(COLUMNS).enumerate() {
            for (x, i) in block[..values.len()].iter_mut().zip(b * COLUMNS..) {
                *x = row.get(i);
            }
            scale_slice(&block[..values.len()], factor, values);
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

/// Sum of squares of a piece of a row, in double. The row's stride makes no difference to it.
pub(crate) fn partial_sum<T: Element>(row: Row<'_, T>) -> f64 {
    if let Some(slice) = row.as_slice() {
        return sum_slice(slice);
    }
    let block = |first: usize| {
        let part = row.range(first..(first + BLOCK).min(row.len()));
        let whole = part.len() / LANES * LANES;
        let mut lanes = [0.0; LANES];
        for first in (0..whole).step_by(LANES) {
            for (i, sum) in (first..).zip(&mut lanes) {
                *sum += square(part.get(i));
            }
        }
        total(lanes) + (whole..part.len()).map(|i| square(part.get(i))).sum::<f64>()
    };
    (0..row.len()).step_by(BLOCK).map(block).sum()
}

#[multiversion(targets("x86_64+avx2+fma"))]
pub(crate) fn sum_slice<T: Element>(values: &[T]) -> f64 {
    let block = |values: &[T]| {
        let (whole, rest) = values.as_chunks::<LANES>();
        let mut lanes = [0.0; LANES];
        for values in whole {
            for (sum, &x) in lanes.iter_mut().zip(values) {
                *sum += square(x);
            }
        }
        total(lanes) + rest.iter().map(|&x| square(x)).sum::<f64>()
    };
    values.chunks(BLOCK).map(block).sum()
}

#[inline(always)]
fn total(mut lanes: [f64; LANES]) -> f64 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn square<T: Element>(x: T) -> f64 {
    if T::DTYPE.is_complex() { x.to_complex().norm_sqr() } else { x.to_f64() * x.to_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Device;
    use crate::output::Output;

    fn states<T: Element>(
        values: &[T],
        (batch, features): (usize, usize),
        strides: (isize, isize),
        within: Within,
    ) -> Vec<Complex<f64>> {
        let dim = features.next_power_of_two();
        let mut amplitudes = vec![Complex::new(f64::NAN, f64::NAN); batch * dim];
        // SAFETY: every caller's shape and strides name elements of `values`.
        let input = unsafe {
            let ptr = values.as_ptr().cast();
            Input::from_raw(ptr, T::DTYPE, Device::Cpu, (batch, features), strides)
        };
        let mut output = Output::rows(&mut amplitudes, dim).unwrap();
        let states = output.rows_mut::<f64>();
        encode::<T, f64>(Rows { input: &input, first: 0, states, within }).unwrap();
        amplitudes
    }

    #[test]
    fn strides_and_threads_change_no_bit() {
        for (batch, features) in [(1, 2), (3, 17), (37, 100), (5, 3 * BLOCK + 5), (2, PIECE + 77)] {
            let value = |row: usize, column: usize| ((row * 31 + column * 17) % 101) as f32 - 50.5;
            let dense: Vec<f32> =
                (0..batch * features).map(|i| value(i / features, i % features)).collect();
            let mut transposed = vec![0.0f32; batch * features];
            let mut every_second = vec![f32::NAN; 2 * batch * features];
            for (i, &x) in dense.iter().enumerate() {
                transposed[i % features * batch + i / features] = x;
                every_second[2 * i] = x;
            }
            let shape = (batch, features);
            let (rows, columns) = (features as isize, batch as isize);
            let expected = states(&dense, shape, (rows, 1), Within::OneThread);
            for (sample, state) in expected.chunks(features.next_power_of_two()).enumerate() {
                let row = &dense[sample * features..][..features];
                let norm = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                for (i, z) in state.iter().enumerate() {
                    let x = row.get(i).map_or(0.0, |&x| f64::from(x) / norm);
                    assert!((z.re - x).abs() < 1e-15 && z.im == 0.0, "{shape:?} {sample} {i}");
                }
            }
            for within in [Within::OneThread, Within::Pool] {
                assert_eq!(states(&dense, shape, (rows, 1), within), expected);
                assert_eq!(states(&transposed, shape, (1, columns), within), expected);
                assert_eq!(states(&every_second, shape, (2 * rows, 2), within), expected);
            }
        }
    }
}
