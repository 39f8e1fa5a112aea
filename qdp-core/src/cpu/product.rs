//! Product states: the outer product of a table over the low bits and a table over the high bits.

use super::{Within, for_chunks};
use crate::element::Real;
use crate::encoding::Product;
use num_complex::Complex;

/// Bits of the low table at most: 1024 amplitudes stay in the first-level cache.
const LOW_BITS: usize = 10;

pub(super) fn encode<R: Real>(
    product: &Product,
    x: &[f64],
    state: &mut [Complex<R>],
    within: Within,
) {
    let factor = |bit: usize| {
        let feature = if product.big_endian { x.len() - 1 - bit } else { bit };
        product.factor.evaluate(x[feature])
    };
    let factors: Vec<_> = (0..x.len()).map(factor).collect();
    fill_outer(&factors, Complex::new(1.0, 0.0), state, within);
}

/// Writes `scale` times the tensor product of `factors`, bit 0 first.
pub(super) fn fill_outer<R: Real>(
    factors: &[[Complex<f64>; 2]],
    scale: Complex<f64>,
    state: &mut [Complex<R>],
    within: Within,
) {
    let n = factors.len();
    // Two small tables cost less than one of the whole state, and one product per amplitude.
    let low_bits = if n <= LOW_BITS { n.div_ceil(2) } else { LOW_BITS };
    let (low, high) = factors.split_at(low_bits);
    let low: Vec<Complex<R>> = round(&table(low, scale));
    let high: Vec<Complex<R>> = round(&table(high, Complex::new(1.0, 0.0)));
    for_chunks(state, low.len(), within, |first, chunk| {
        let factor = high[first / low.len()];
        for (value, &z) in chunk.iter_mut().zip(&low) {
            *value = z * factor;
        }
    });
}

/// `scale` times the tensor product of `factors` by doubling: each bit extends the table below it.
pub(super) fn table(factors: &[[Complex<f64>; 2]], scale: Complex<f64>) -> Vec<Complex<f64>> {
    let mut table = vec![scale];
    for &[zero, one] in factors {
        let half = table.len();
        table.extend_from_within(..);
        let (low, high) = table.split_at_mut(half);
        for z in low {
            *z *= zero;
        }
        for z in high {
            *z *= one;
        }
    }
    table
}

pub(super) fn round<R: Real>(table: &[Complex<f64>]) -> Vec<Complex<R>> {
    table.iter().map(|z| Complex::new(R::from_f64(z.re), R::from_f64(z.im))).collect()
}
