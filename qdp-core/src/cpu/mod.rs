//! The CPU backend: the same states, with as many threads as the configuration names.
//!
//! A state that fits a core's cache belongs to one thread, and the threads share the batch; the
//! threads share the chunks of a larger state, one state after another. Small calls run on the
//! caller's thread. Results do not depend on the number of threads.

// What is not inlined into a function with several versions is not compiled for the processor's
// vectors.
#![allow(clippy::inline_always)]

mod amplitude;
mod diagonal;
pub(crate) mod gradient;
pub(crate) mod memory;
pub(crate) mod parallel;
mod product;
mod trig;
mod walsh_hadamard;

pub(crate) use amplitude::{check_finite, partial_sum, sum_slice};

use crate::affine::Affine;
use crate::config::Config;
use crate::element::{Element, Precision, Real, with_element};
use crate::encoding::{EncodeSpec, Form, basis};
use crate::error::{Error, Result};
use crate::input::{Input, Row};
use crate::interrupt::Interrupt;
use crate::output::{Output, RowsMut};
use num_complex::Complex;
use parallel::ENCODE;
use parking_lot::Mutex;
use trig::Trig;

/// States up to this many amplitudes belong to one thread each.
const TASK_DIM: usize = 1 << 16;
/// Calls with less to do run on the caller's thread: sharing costs about as much. In units of an
/// amplitude that is copied, a fraction of a nanosecond.
const PARALLEL_WORK: usize = 1 << 16;
/// Work that a thread takes at a time.
const GROUP_WORK: usize = 1 << 14;
/// Amplitudes per chunk of a larger state: they fit the first-level cache.
const CHUNK: usize = 1 << 10;
/// Amplitudes of a larger state that a thread takes at a time.
const PIECE: usize = 1 << 14;

/// Work between two questions whether to go on, in the same units: some milliseconds of it.
const ROUND_WORK: usize = 1 << 22;
/// Bytes of states between two questions at most.
const ROUND_BYTES: usize = 64 << 20;

/// How the work of one state is run.
#[derive(Clone, Copy, PartialEq)]
enum Within {
    OneThread,
    Pool,
}

/// Consecutive samples, and where their states go.
struct Rows<'a, R> {
    input: &'a Input<'a>,
    first: usize,
    states: RowsMut<'a, Complex<R>>,
    within: Within,
}

/// Encodes a host input into a host output.
pub(crate) fn encode(
    spec: &EncodeSpec,
    form: &Form,
    input: &Input<'_>,
    output: &mut Output<'_>,
    interrupt: Interrupt,
) -> Result<()> {
    with_element!(input.dtype(), T => match output.precision() {
        Precision::Complex64 => {
            encode_rounds::<T, f32>(spec, form, input, output.rows_mut(), interrupt)
        }
        Precision::Complex128 => {
            encode_rounds::<T, f64>(spec, form, input, output.rows_mut(), interrupt)
        }
    })
}

/// Samples in rounds, between which the caller is asked whether to go on; in one round where
/// nobody is to be asked.
fn encode_rounds<T: Element, R: Trig>(
    spec: &EncodeSpec,
    form: &Form,
    input: &Input<'_>,
    states: RowsMut<'_, Complex<R>>,
    mut interrupt: Interrupt,
) -> Result<()> {
    let round = if interrupt.is_asked() {
        // Samples of much work are not so few that a thread is left without.
        let enough = (ROUND_WORK / work_per_sample(form, spec)).max(8 * Config::get().num_threads);
        enough.min(ROUND_BYTES / (spec.dim() * R::PRECISION.size()))
    } else {
        states.len()
    };
    for (first, states) in states.groups(round.max(1)) {
        interrupt.poll()?;
        encode_as::<T, R>(spec, form, input, first, states)?;
    }
    Ok(())
}

/// The states of consecutive samples.
fn encode_as<T: Element, R: Trig>(
    spec: &EncodeSpec,
    form: &Form,
    input: &Input<'_>,
    first: usize,
    states: RowsMut<'_, Complex<R>>,
) -> Result<()> {
    let work = work_per_sample(form, spec);
    let parallel = states.len().saturating_mul(work) >= PARALLEL_WORK;
    let run = |first, states, within| {
        let rows = Rows { input, first, states, within };
        match form {
            Form::Amplitude => amplitude::encode::<T, R>(rows),
            Form::Basis => encode_basis::<T, R>(spec, rows),
            Form::Product(product) => product::encode::<T, R>(product, rows),
            Form::Diagonal(diagonal) => diagonal::encode::<T, R>(diagonal, rows),
        }
    };
    if !parallel {
        return run(first, states, Within::OneThread);
    }
    if spec.dim() > TASK_DIM {
        return run(first, states, Within::Pool);
    }
    // The error of the first bad sample, whichever thread meets one first.
    let first_error = Mutex::new(None::<(usize, Error)>);
    let group = (GROUP_WORK / work).max(rows_per_line(input));
    ENCODE.for_each(true, states.groups(group), |(offset, states)| {
        if let Err(error) = run(first + offset, states, Within::OneThread) {
            let mut found = first_error.lock();
            if found.as_ref().is_none_or(|&(other, _)| offset < other) {
                *found = Some((offset, error));
            }
        }
    });
    first_error.into_inner().map_or(Ok(()), |(_, error)| Err(error))
}

/// Rows that share their cache lines: those of a transposed batch lie within each other.
fn rows_per_line(input: &Input<'_>) -> usize {
    let (row, column) = input.strides();
    if row.unsigned_abs() < column.unsigned_abs() { 64 / input.dtype().size() } else { 1 }
}

/// What a sample costs, roughly: as many copied amplitudes.
fn work_per_sample(form: &Form, spec: &EncodeSpec) -> usize {
    let n = spec.num_qubits() as usize;
    match form {
        Form::Amplitude | Form::Basis => spec.dim() + 16,
        Form::Product(_) => spec.dim() + 32 * n,
        Form::Diagonal(diagonal) => 8 * diagonal.reps as usize * spec.dim() + 16 * n * n,
    }
}

fn encode_basis<T: Element, R: Real>(spec: &EncodeSpec, rows: Rows<'_, R>) -> Result<()> {
    for (sample, state) in (rows.first..).zip(rows.states) {
        let value = rows.input.row::<T>(sample).get(0).to_f64();
        let index = basis::index(sample, value, spec.num_qubits())?;
        for_chunks(state, PIECE, rows.within, |_, piece| {
            piece.fill(Complex::new(R::zero(), R::zero()));
        });
        state[index] = Complex::new(R::one(), R::zero());
    }
    Ok(())
}

/// The features of one sample as doubles, mapped and every one checked.
fn features<T: Element>(sample: usize, input: &Input<'_>, bits: bool, x: &mut [f64]) -> Result<()> {
    if !load_features(input.row::<T>(sample), input.affine(), x) {
        check_finite(sample, Input::sample(x).row::<f64>(0), 0)?;
    }
    if bits {
        let len = x.len() as u32;
        for (position, &x) in x.iter().enumerate() {
            basis::check_bit(sample, position, x, len)?;
        }
    }
    Ok(())
}

/// The features of a row as doubles, mapped; answers whether all are finite.
fn load_features<T: Element>(row: Row<'_, T>, affine: Option<&Affine<'_>>, x: &mut [f64]) -> bool {
    let mut finite = true;
    for (position, x) in x.iter_mut().enumerate() {
        *x = row.get(position).to_f64();
        finite &= x.is_finite();
    }
    if let Some(affine) = affine {
        affine.apply(x);
        finite = x.iter().all(|x| x.is_finite());
    }
    finite
}

/// Runs `fill(first index, chunk)` over the chunks of one state.
fn for_chunks<R: Real>(
    state: &mut [Complex<R>],
    chunk: usize,
    within: Within,
    fill: impl Fn(usize, &mut [Complex<R>]) + Sync,
) {
    ENCODE.for_each(within == Within::Pool, state.chunks_mut(chunk).enumerate(), |(c, part)| {
        fill(c * chunk, part);
    });
}

/// The reals that complex values consist of: real part, imaginary part, real part, ...
fn reals<R: Real>(values: &[Complex<R>]) -> &[R] {
    // SAFETY: num_complex's Complex is repr(C) of two R.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), 2 * values.len()) }
}

/// See [`reals`].
fn reals_mut<R: Real>(values: &mut [Complex<R>]) -> &mut [R] {
    // SAFETY: as above, and the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), 2 * values.len()) }
}
