//! Of `x / norm(x)`: `(g - psi Re<psi, g>) / norm(x)`, of which a real sample takes the real part.

use super::super::parallel::ENCODE;
use super::super::{PIECE, Within};
use super::{Rows, add_lanes, contiguous};
use crate::element::{Element, Floating, Real};
use crate::encoding::amplitude::MIN_NORM_SQUARED;
use crate::input::Row;
use multiversion::multiversion;
use num_complex::Complex;

/// Values that are summed at a time, and gathered where they do not lie together.
const BLOCK: usize = 1 << 10;
/// Values that are converted at a time.
const STRIP: usize = 64;
/// Independent sums.
const LANES: usize = 8;

/// The sum of squares of a sample, and the real part of its product with the cotangent.
#[derive(Clone, Copy, Default)]
struct Sums {
    square: f64,
    product: f64,
}

pub(super) fn backward<T: Floating, R: Real>(rows: Rows<'_, T>)
where
    Complex<R>: Element,
{
    let Rows { input, cotangent, first, gradients, within } = rows;
    for (sample, gradient) in (first..).zip(gradients) {
        let x = input.row::<T>(sample);
        let g = cotangent.row::<Complex<R>>(sample).range(0..x.len());
        let Sums { square, product } = sum(x, g, within);
        let valid = square.is_finite() && square >= MIN_NORM_SQUARED;
        let inverse = if valid { 1.0 / square.sqrt() } else { f64::NAN };
        let along = product * inverse * inverse;
        let pieces = gradient.chunks_mut(PIECE).enumerate();
        ENCODE.for_each(within == Within::Pool, pieces, |(p, piece)| {
            let range = p * PIECE..p * PIECE + piece.len();
            project(x.range(range.clone()), g.range(range), (inverse, along), piece);
        });
    }
}

fn sum<T: Element, G: Element>(x: Row<'_, T>, g: Row<'_, G>, within: Within) -> Sums {
    let mut parts = vec![Sums::default(); x.len().div_ceil(PIECE)];
    ENCODE.for_each(within == Within::Pool, parts.iter_mut().enumerate(), |(p, sums)| {
        let range = p * PIECE..((p + 1) * PIECE).min(x.len());
        *sums = sum_piece(x.range(range.clone()), g.range(range));
    });
    parts.into_iter().fold(Sums::default(), Sums::plus)
}

fn sum_piece<T: Element, G: Element>(x: Row<'_, T>, g: Row<'_, G>) -> Sums {
    let mut total = Sums::default();
    let (mut values, mut cotangents) = (Vec::new(), Vec::new());
    for first in (0..x.len()).step_by(BLOCK) {
        let range = first..(first + BLOCK).min(x.len());
        let x = contiguous(x.range(range.clone()), &mut values);
        let g = contiguous(g.range(range), &mut cotangents);
        total = total.plus(sum_block(x, g));
    }
    total
}

impl Sums {
    fn plus(self, other: Self) -> Self {
        Self { square: self.square + other.square, product: self.product + other.product }
    }
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn sum_block<T: Element, G: Element>(x: &[T], g: &[G]) -> Sums {
    let (mut squares, mut products) = ([0.0; LANES], [0.0; LANES]);
    for (x, g) in x.chunks(STRIP).zip(g.chunks(STRIP)) {
        let (a, b) = (strip(x, Element::to_f64), strip(g, Element::to_f64));
        add_products(&a, &a, &mut squares);
        add_products(&a, &b, &mut products);
        if T::DTYPE.is_complex() {
            let (a, b) = (strip(x, |x| x.to_complex().im), strip(g, |g| g.to_complex().im));
            add_products(&a, &a, &mut squares);
            add_products(&a, &b, &mut products);
        }
    }
    Sums { square: add_lanes(&{ squares }), product: add_lanes(&{ products }) }
}

/// Up to a strip of values as doubles, with zeros behind. A loop that only converts is vectorised
/// for every type.
#[inline(always)]
fn strip<T: Copy>(values: &[T], convert: impl Fn(T) -> f64) -> [f64; STRIP] {
    let mut doubles = [0.0; STRIP];
    for (double, &value) in doubles.iter_mut().zip(values) {
        *double = convert(value);
    }
    doubles
}

#[inline(always)]
fn add_products(a: &[f64; STRIP], b: &[f64; STRIP], sums: &mut [f64; LANES]) {
    for (a, b) in a.as_chunks::<LANES>().0.iter().zip(b.as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
}

/// Writes `(g - along * x) * inverse`.
fn project<T: Floating, G: Element>(
    x: Row<'_, T>,
    g: Row<'_, G>,
    factors: (f64, f64),
    gradient: &mut [T],
) {
    let (mut values, mut cotangents) = (Vec::new(), Vec::new());
    for (b, gradient) in gradient.chunks_mut(BLOCK).enumerate() {
        let range = b * BLOCK..b * BLOCK + gradient.len();
        let x = contiguous(x.range(range.clone()), &mut values);
        let g = contiguous(g.range(range), &mut cotangents);
        project_block(x, g, factors, gradient);
    }
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn project_block<T: Floating, G: Element>(
    x: &[T],
    g: &[G],
    (inverse, along): (f64, f64),
    gradient: &mut [T],
) {
    for ((gradient, &x), &g) in gradient.iter_mut().zip(x).zip(g) {
        let g = g.to_complex();
        *gradient = T::from_complex(if T::DTYPE.is_complex() {
            (g - x.to_complex() * along) * inverse
        } else {
            Complex::new((g.re - x.to_f64() * along) * inverse, 0.0)
        });
    }
}
