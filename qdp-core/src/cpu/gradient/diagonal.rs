//! Of layers of Hadamards and a diagonal D, by the adjoint method.
//!
//! The state is walked back layer by layer, and the cotangent u with it. Where D follows a state
//! chi, the derivative of the loss by the phase of index i is `t_i = Im(conj(D_i) u_i conj(chi_i))`,
//! and the cotangent before D is `conj(D) u`. A Hadamard is its own adjoint. Of the first layer chi
//! is the uniform state, so one layer needs no state at all. The derivatives by the coefficients
//! are moments of t, summed over the layers, which share them.
//!
//! Like the forward computation this goes chunk by chunk of the low bits: the moments over them
//! leave a sum, and a moment for each low bit, of every chunk.

use super::super::diagonal::{LOW_BITS, Layer, Linear, Split, apply, each_row, prepare, start};
use super::super::parallel::ENCODE;
use super::super::trig::Trig;
use super::super::walsh_hadamard::{transform_cached, transform_high};
use super::super::{PIECE, Within, for_chunks, load_features};
use super::moments::{column_moments, first_moments, second_moments};
use super::{Rows, contiguous, fill_not_a_number, part_of, to_f64};
use crate::element::{Element, Floating, Real};
use crate::encoding::Diagonal;
use crate::encoding::diagonal::{QuadraticPhase, QuadraticSlopes, pair_index};
use multiversion::multiversion;
use num_complex::Complex;

pub(super) fn backward<T: Floating, R: Trig>(diagonal: &Diagonal, rows: Rows<'_, T>)
where
    Complex<R>: Element,
{
    let Rows { input, cotangent, first, gradients, within } = rows;
    let n = diagonal.num_qubits as usize;
    let mut x = vec![0.0; input.features()];
    let mut gradient_of_x = x.clone();
    let mut phase = QuadraticPhase::default();
    let mut low = Split::new(1 << LOW_BITS.min(n));
    let mut linear = Linear::new();
    let zero = Complex::new(R::zero(), R::zero());
    let mut u = vec![zero; 1 << n];
    let mut chi = if diagonal.reps > 1 { u.clone() } else { Vec::new() };
    let mut moments = Moments::new(n);
    // Of every Hadamard of all qubits, where the transform leaves it out.
    let scale = (-0.5 * n as f64).exp2();
    for (sample, gradient) in (first..).zip(gradients) {
        if !load_features(input.row::<T>(sample), input.affine(), &mut x) {
            fill_not_a_number(gradient);
            continue;
        }
        prepare(diagonal, &x, &mut phase, &mut linear, &mut low);
        let layer = Layer { phase: &phase, low: &low, scale: R::from_f64(scale), hadamard: true };
        let g = cotangent.row::<Complex<R>>(sample);
        for_chunks(&mut u, PIECE, within, |first, piece| {
            let g = g.range(first..first + piece.len());
            piece.copy_from_slice(contiguous(g, &mut Vec::new()));
        });
        let mut transforms = diagonal.final_hadamard;
        if diagonal.final_hadamard {
            transform(&mut u, within);
        }
        // The state before the last diagonal, but for the scale of its last transform.
        for rep in 1..diagonal.reps {
            for_chunks(&mut chi, low.re.len(), within, |first, chunk| {
                if rep == 1 { start(&layer, first, chunk) } else { apply(&layer, first, chunk) }
            });
            transform_high(&mut chi, low.re.len(), within);
        }
        moments.clear();
        for rep in (1..=diagonal.reps).rev() {
            let of_u = if transforms { layer.scale } else { R::one() };
            let chi_here = if rep > 1 { &chi[..] } else { &[] };
            moments.add(&Layer { scale: of_u, ..layer }, &mut u, chi_here, within);
            if rep > 1 {
                transform(&mut u, within);
                transforms = true;
            }
            if rep > 2 {
                transform(&mut chi, within);
                for_chunks(&mut chi, low.re.len(), within, |first, chunk| {
                    retrace(&layer, first, chunk);
                });
            }
        }
        diagonal.chain_into(&x, moments.slopes(scale), &mut gradient_of_x);
        for (gradient, &value) in gradient.iter_mut().zip(&gradient_of_x) {
            *gradient = T::from_complex(value.into());
        }
    }
}

/// Transforms every bit.
fn transform<R: Real>(state: &mut [Complex<R>], within: Within) {
    let chunk = state.len().min(1 << LOW_BITS);
    for_chunks(state, chunk, within, |_, chunk| transform_chunk(chunk));
    transform_high(state, chunk, within);
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn transform_chunk<R: Real>(chunk: &mut [Complex<R>]) {
    transform_cached(chunk);
}

/// Multiplies a chunk by the conjugate of a layer's diagonal and its scale.
#[multiversion(targets("x86_64+avx2+fma"))]
fn retrace<R: Trig>(layer: &Layer<'_, R>, first: usize, chunk: &mut [Complex<R>]) {
    each_row(layer, first, chunk, |value, re, im| {
        *value = Complex::new(value.re * re + value.im * im, value.im * re - value.re * im);
    });
}

/// Moments of the derivatives by the phases, of all layers so far.
struct Moments {
    low_bits: usize,
    /// Of each part of the state, the sum over its chunks: a value for each low index.
    low: Vec<f64>,
    /// Of each chunk, the first moments over its low bits and the sum.
    chunks: Vec<f64>,
    slopes: QuadraticSlopes,
}

impl Moments {
    fn new(n: usize) -> Self {
        let low_bits = n.min(LOW_BITS);
        let parts = (1 << n) / part_of(1 << n).min(1 << n);
        let slopes = QuadraticSlopes {
            constant: 0.0,
            singles: vec![0.0; n],
            pairs: vec![0.0; n * (n - 1) / 2],
        };
        Self {
            low_bits,
            low: vec![0.0; parts << low_bits],
            chunks: vec![0.0; (low_bits + 1) << (n - low_bits)],
            slopes,
        }
    }

    fn clear(&mut self) {
        self.low.fill(0.0);
        self.chunks.fill(0.0);
    }

    /// Takes `u` before the layer's diagonal and adds what its phases then contribute, with the
    /// state there, or the uniform one where `chi` is empty, each of these but for a scale.
    fn add<R: Trig>(
        &mut self,
        layer: &Layer<'_, R>,
        u: &mut [Complex<R>],
        chi: &[Complex<R>],
        within: Within,
    ) {
        let (len, columns) = (1 << self.low_bits, self.low_bits + 1);
        let part = part_of(u.len()).min(u.len());
        let parts = u.chunks_mut(part).zip(self.low.chunks_mut(len));
        let parts = parts.zip(self.chunks.chunks_mut(part / len * columns));
        ENCODE.for_each(within == Within::Pool, parts.enumerate(), |(p, ((u, low), moments))| {
            let chunks = u.chunks_mut(len).zip(moments.chunks_mut(columns));
            for (c, (u, moments)) in chunks.enumerate() {
                let first = p * part + c * len;
                let chi = chi.get(first..first + len).unwrap_or_default();
                add_chunk(layer, first, (u, chi), low, moments);
            }
        });
    }

    /// The derivatives by the coefficients, `scale` times what was added.
    fn slopes(&mut self, scale: f64) -> &QuadraticSlopes {
        let Self { low_bits, low, chunks, slopes } = self;
        let (n, columns) = (slopes.singles.len(), *low_bits + 1);
        let (sum, others) = low.split_at_mut(1 << *low_bits);
        for other in others.chunks_exact(sum.len()) {
            for (sum, other) in sum.iter_mut().zip(other) {
                *sum += other;
            }
        }
        second_moments(sum, 0, slopes);
        let mut sums: Vec<f64> =
            chunks.chunks_exact(columns).map(|chunk| chunk[*low_bits]).collect();
        second_moments(&mut sums, *low_bits, slopes);
        let mut by_high = vec![0.0; (n - *low_bits) * columns];
        column_moments(chunks, columns, &mut by_high);
        for (k, singles) in (*low_bits..n).zip(by_high.chunks_exact(columns)) {
            slopes.singles[k] = singles[*low_bits];
            for (j, &single) in singles[..*low_bits].iter().enumerate() {
                slopes.pairs[pair_index(n, j, k)] = single;
            }
        }
        slopes.singles[..*low_bits].copy_from_slice(&chunks[..*low_bits]);
        slopes.constant = chunks[*low_bits];
        slopes.singles.iter_mut().chain(&mut slopes.pairs).for_each(|slope| *slope *= scale);
        slopes.constant *= scale;
        slopes
    }
}

/// See [`Moments::add`].
#[multiversion(targets("x86_64+avx2+fma"))]
fn add_chunk<R: Trig>(
    layer: &Layer<'_, R>,
    first: usize,
    (u, chi): (&mut [Complex<R>], &[Complex<R>]),
    low: &mut [f64],
    moments: &mut [f64],
) {
    each_row(layer, first, u, |value, re, im| {
        *value = Complex::new(value.re * re + value.im * im, value.im * re - value.re * im);
    });
    let mut slopes = [0.0; 1 << LOW_BITS];
    let slopes = &mut slopes[..u.len()];
    if chi.is_empty() {
        for (slope, u) in slopes.iter_mut().zip(&*u) {
            *slope = to_f64(u.im);
        }
    } else {
        for ((slope, u), chi) in slopes.iter_mut().zip(&*u).zip(chi) {
            *slope = to_f64(u.im * chi.re - u.re * chi.im);
        }
    }
    for (low, &slope) in low.iter_mut().zip(&*slopes) {
        *low += slope;
    }
    let mut singles = [0.0; LOW_BITS];
    let bits = moments.len() - 1;
    let sum = first_moments(slopes, &mut singles[..bits]);
    for (moment, single) in moments.iter_mut().zip(&singles[..bits]) {
        *moment += single;
    }
    moments[bits] += sum;
}
