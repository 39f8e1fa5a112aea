//! Layers of Hadamards and quadratic phases.
//!
//! Phases add exactly in fixed point, so the phases of a small table cost one addition each, and
//! its sines and cosines are one loop over vectors. Of a state of more bits, one table covers the
//! low bits; for one value of the high bits everything else is linear in the low bits, so it is
//! the outer product of two small tables.

use super::trig::Trig;
use super::walsh_hadamard::{transform_cached, transform_high};
use super::{Rows, features, for_chunks};
use crate::element::{Element, Real};
use crate::encoding::Diagonal;
use crate::encoding::diagonal::{QuadraticPhase, Turns, pair_index};
use crate::error::Result;
use multiversion::multiversion;
use num_complex::Complex;

/// Bits of a chunk: it fits the first-level cache.
pub(super) const LOW_BITS: usize = 10;
/// Bits of a row of a chunk, and of the number of rows.
const ROW_BITS: usize = 4;
const ROW: usize = 1 << ROW_BITS;
const COLUMN: usize = 1 << (LOW_BITS - ROW_BITS);

pub(super) fn encode<T: Element, R: Trig>(diagonal: &Diagonal, rows: Rows<'_, R>) -> Result<()> {
    let Rows { input, first, states, within } = rows;
    let mut x = vec![0.0; input.features()];
    let mut phase = QuadraticPhase::default();
    let mut low = Split::new(1 << LOW_BITS.min(diagonal.num_qubits as usize));
    let mut linear = Linear::new();
    for (sample, state) in (first..).zip(states) {
        features::<T>(sample, input, false, &mut x)?;
        prepare(diagonal, &x, &mut phase, &mut linear, &mut low);
        for rep in 0..diagonal.reps {
            let last = rep + 1 == diagonal.reps;
            let layer = Layer {
                phase: &phase,
                low: &low,
                scale: R::from_f64(diagonal.scale(rep)),
                hadamard: !last || diagonal.final_hadamard,
            };
            let chunk = low.re.len();
            for_chunks(state, chunk, within, |first, chunk| {
                if rep == 0 { start(&layer, first, chunk) } else { apply(&layer, first, chunk) }
            });
            if layer.hadamard {
                transform_high(state, chunk, within);
            }
        }
    }
    Ok(())
}

/// Complex values with their real and imaginary parts apart, as vectors like to multiply them.
pub(super) struct Split<R> {
    pub(super) re: Vec<R>,
    im: Vec<R>,
}

impl<R: Real> Split<R> {
    pub(super) fn new(len: usize) -> Self {
        Self { re: vec![R::zero(); len], im: vec![R::zero(); len] }
    }
}

/// One diagonal, and whether a Hadamard of every qubit follows.
#[derive(Clone, Copy)]
pub(super) struct Layer<'a, R> {
    pub(super) phase: &'a QuadraticPhase,
    pub(super) low: &'a Split<R>,
    pub(super) scale: R,
    pub(super) hadamard: bool,
}

/// The coefficients of one sample, and the table of the phases within the low bits, with the
/// constant.
#[multiversion(targets("x86_64+avx2+fma"))]
pub(super) fn prepare<R: Trig>(
    diagonal: &Diagonal,
    x: &[f64],
    phase: &mut QuadraticPhase,
    linear: &mut Linear<R>,
    low: &mut Split<R>,
) {
    diagonal.quadratic_phase_into(x, phase);
    let n = phase.singles.len();
    let mut row = [phase.constant; ROW];
    for k in 0..n.min(LOW_BITS) {
        let mut couplings = [0; LOW_BITS];
        for (j, coupling) in couplings[..k].iter_mut().enumerate() {
            *coupling = phase.pairs[pair_index(n, j, k)];
        }
        if k < ROW_BITS {
            let mut linear = [0; ROW / 2];
            linear_phases(phase.singles[k], &couplings[..k], &mut linear);
            let (below, above) = row.split_at_mut(1 << k);
            for ((above, below), linear) in above.iter_mut().zip(below).zip(linear) {
                *above = below.wrapping_add(linear);
            }
            continue;
        }
        if k == ROW_BITS {
            cis_into(&row, &mut low.re, &mut low.im);
        }
        linear.set(phase.singles[k], &couplings[..k], R::one());
        let (re, re_above) = low.re.split_at_mut(1 << k);
        let (im, im_above) = low.im.split_at_mut(1 << k);
        let above = re_above.as_chunks_mut::<ROW>().0.iter_mut();
        let above = above.zip(im_above.as_chunks_mut::<ROW>().0);
        let below = re.as_chunks::<ROW>().0.iter().zip(im.as_chunks::<ROW>().0);
        for (column, ((re, im), below)) in above.zip(below).enumerate() {
            (*re, *im) = linear.row(column, below);
        }
    }
    if n <= ROW_BITS {
        cis_into(&row, &mut low.re, &mut low.im);
    }
}

/// Writes a chunk of a first layer.
#[multiversion(targets("x86_64+avx2+fma"))]
pub(super) fn start<R: Trig>(layer: &Layer<'_, R>, first: usize, chunk: &mut [Complex<R>]) {
    each_row(layer, first, chunk, |value, re, im| *value = Complex::new(re, im));
    if layer.hadamard {
        transform_cached(chunk);
    }
}

/// Multiplies a chunk by a later layer.
#[multiversion(targets("x86_64+avx2+fma"))]
pub(super) fn apply<R: Trig>(layer: &Layer<'_, R>, first: usize, chunk: &mut [Complex<R>]) {
    each_row(layer, first, chunk, |value, re, im| {
        *value = Complex::new(value.re * re - value.im * im, value.re * im + value.im * re);
    });
    if layer.hadamard {
        transform_cached(chunk);
    }
}

/// Runs `put(amplitude, real part, imaginary part)` with the diagonal of the chunk at `first`.
#[inline(always)]
pub(super) fn each_row<R: Trig>(
    layer: &Layer<'_, R>,
    first: usize,
    chunk: &mut [Complex<R>],
    put: impl Fn(&mut Complex<R>, R, R),
) {
    let Layer { phase, low, scale, .. } = *layer;
    if first == 0 {
        for ((value, &re), &im) in chunk.iter_mut().zip(&low.re).zip(&low.im) {
            put(value, re * scale, im * scale);
        }
        return;
    }
    // What the high bits add to the phase of each low bit.
    let n = phase.singles.len();
    let mut steps = [0u64; LOW_BITS];
    for (j, step) in steps.iter_mut().enumerate() {
        for k in LOW_BITS..n {
            if first >> k & 1 == 1 {
                *step = step.wrapping_add(phase.pairs[pair_index(n, j, k)]);
            }
        }
    }
    let mut linear = Linear::new();
    linear.set(phase.at(first).wrapping_sub(phase.constant), &steps, scale);
    let low = low.re.as_chunks::<ROW>().0.iter().zip(low.im.as_chunks::<ROW>().0);
    for (column, (values, low)) in chunk.as_chunks_mut::<ROW>().0.iter_mut().zip(low).enumerate() {
        let (re, im) = linear.row(column, low);
        for i in 0..ROW {
            put(&mut values[i], re[i], im[i]);
        }
    }
}

/// Phases that are linear in the bits of a column and of a row: the outer product of two tables.
pub(super) struct Linear<R> {
    row: ([R; ROW], [R; ROW]),
    column: ([R; COLUMN], [R; COLUMN]),
    turns: [Turns; COLUMN],
}

impl<R: Trig> Linear<R> {
    #[inline(always)]
    pub(super) fn new() -> Self {
        let zero = R::zero();
        Self {
            row: ([zero; ROW], [zero; ROW]),
            column: ([zero; COLUMN], [zero; COLUMN]),
            turns: [0; COLUMN],
        }
    }

    /// Sets it to `common` and what each bit adds: [`ROW_BITS`] bits of a row, and the others.
    #[inline(always)]
    fn set(&mut self, common: Turns, steps: &[Turns], scale: R) {
        let Self { row, column, turns } = self;
        let (row_steps, column_steps) = steps.split_at(ROW_BITS);
        linear_phases(0, row_steps, turns);
        cis_into(&turns[..ROW], &mut row.0, &mut row.1);
        let len = linear_phases(common, column_steps, turns);
        cis_into(&turns[..len], &mut column.0, &mut column.1);
        for (re, im) in column.0[..len].iter_mut().zip(&mut column.1) {
            *re *= scale;
            *im *= scale;
        }
    }

    /// The product of a row of it with `values`.
    #[inline(always)]
    fn row(&self, column: usize, values: (&[R; ROW], &[R; ROW])) -> ([R; ROW], [R; ROW]) {
        let (a_re, a_im) = (self.column.0[column], self.column.1[column]);
        let (mut re, mut im) = ([R::zero(); ROW], [R::zero(); ROW]);
        for i in 0..ROW {
            let (b_re, b_im) = (self.row.0[i], self.row.1[i]);
            let (c_re, c_im) = (a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re);
            let (v_re, v_im) = (values.0[i], values.1[i]);
            re[i] = v_re * c_re - v_im * c_im;
            im[i] = v_re * c_im + v_im * c_re;
        }
        (re, im)
    }
}

/// Phases linear in the bits of an index, by doubling; returns how many.
#[inline(always)]
fn linear_phases(common: Turns, steps: &[Turns], phases: &mut [Turns]) -> usize {
    phases[0] = common;
    let mut half = 1;
    for &step in steps {
        let (below, above) = phases[..2 * half].split_at_mut(half);
        for (above, below) in above.iter_mut().zip(below) {
            *above = below.wrapping_add(step);
        }
        half *= 2;
    }
    half
}

#[inline(always)]
fn cis_into<R: Trig>(phases: &[Turns], re: &mut [R], im: &mut [R]) {
    for ((&phase, re), im) in phases.iter().zip(re).zip(im) {
        (*re, *im) = R::cis(phase);
    }
}
