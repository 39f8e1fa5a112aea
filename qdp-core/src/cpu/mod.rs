//! The CPU backend: the same states, with as many threads as the configuration names.
//!
//! A state that fits a core's cache is one task, and tasks run in parallel over the batch; the
//! chunks of a larger state run in parallel one state after another. Small calls run on the
//! caller's thread. Results do not depend on the number of threads.

mod amplitude;
mod diagonal;
pub(crate) mod memory;
pub(crate) mod parallel;
mod product;
mod walsh_hadamard;

pub(crate) use amplitude::{check_finite, partial_sum};

use crate::element::{Element, Precision, Real, with_element};
use crate::encoding::{EncodeSpec, Form, basis};
use crate::error::{Error, Result};
use crate::input::{Input, Output, Row};
use num_complex::Complex;
use parallel::ENCODE;
use parking_lot::Mutex;

/// States up to this many amplitudes are one task each.
const TASK_DIM: usize = 1 << 15;
/// Calls with less to do (amplitudes times their cost) run on the caller's thread: waking others
/// takes longer.
const PARALLEL_WORK: usize = 1 << 17;
/// Amplitudes of the small states that a thread takes at a time.
const GROUP: usize = 1 << 12;
/// Amplitudes per chunk of a larger state.
const CHUNK: usize = 1 << 12;

/// How the work of one state is run.
#[derive(Clone, Copy, PartialEq)]
enum Within {
    OneThread,
    Pool,
}

/// Encodes a host input into a host output.
pub(crate) fn encode(
    spec: &EncodeSpec,
    form: &Form,
    input: &Input<'_>,
    output: &mut Output<'_>,
) -> Result<()> {
    with_element!(input.dtype(), T => match output.precision() {
        Precision::Complex64 => encode_as::<T, f32>(spec, form, input, output),
        Precision::Complex128 => encode_as::<T, f64>(spec, form, input, output),
    })
}

fn encode_as<T: Element, R: Real>(
    spec: &EncodeSpec,
    form: &Form,
    input: &Input<'_>,
    output: &mut Output<'_>,
) -> Result<()> {
    let encode_row = |sample: usize, state: &mut [Complex<R>], within: Within| -> Result<()> {
        let row = input.row::<T>(sample);
        match form {
            Form::Amplitude => amplitude::encode(sample, row, state, within),
            Form::Basis => {
                let index = basis::index(sample, row.get(0).to_f64(), spec.num_qubits())?;
                state.fill(Complex::new(R::zero(), R::zero()));
                state[index] = Complex::new(R::one(), R::zero());
                Ok(())
            }
            Form::Product(product) => {
                let x = features(spec, form, sample, row)?;
                product::encode(product, &x, state, within);
                Ok(())
            }
            Form::Diagonal(diagonal) => {
                let x = features(spec, form, sample, row)?;
                diagonal::encode(diagonal, &x, state, within);
                Ok(())
            }
        }
    };
    let work = input.batch() * spec.dim() * cost(form);
    let parallel = work >= PARALLEL_WORK;
    let mut rows = output.rows_mut::<R>();
    if parallel && spec.dim() > TASK_DIM {
        let mut rows = rows.iter_mut().enumerate();
        return rows.try_for_each(|(sample, state)| encode_row(sample, state, Within::Pool));
    }
    // The error of the first bad sample, whichever thread meets one first.
    let first_error = Mutex::new(None::<(usize, Error)>);
    let group = (GROUP / spec.dim()).max(1);
    ENCODE.for_each(parallel, rows.chunks_mut(group).enumerate(), |(number, states)| {
        for (i, state) in states.iter_mut().enumerate() {
            let sample = number * group + i;
            if let Err(error) = encode_row(sample, state, Within::OneThread) {
                let mut first = first_error.lock();
                if first.as_ref().is_none_or(|&(other, _)| sample < other) {
                    *first = Some((sample, error));
                }
                return;
            }
        }
    });
    first_error.into_inner().map_or(Ok(()), |(_, error)| Err(error))
}

/// What an amplitude of a form costs, roughly, in units of a copied one.
fn cost(form: &Form) -> usize {
    match form {
        Form::Amplitude | Form::Basis | Form::Product(_) => 1,
        Form::Diagonal(diagonal) => 8 * diagonal.reps as usize,
    }
}

/// The features of one sample as doubles, every one checked.
fn features<T: Element>(
    spec: &EncodeSpec,
    form: &Form,
    sample: usize,
    row: Row<'_, T>,
) -> Result<Vec<f64>> {
    use crate::encoding::product::{Factor, Product};
    let bits = matches!(form, Form::Product(Product { factor: Factor::Bit, .. }));
    (0..row.len())
        .map(|position| {
            let value = row.get(position).to_f64();
            if bits {
                basis::check_bit(sample, position, value, spec.num_qubits())?;
            } else if !value.is_finite() {
                return Err(crate::encoding::amplitude::non_finite(sample, position, value));
            }
            Ok(value)
        })
        .collect()
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
