//! The CPU backend: the same states, with as many threads as the configuration names.
//!
//! A state that fits a core's cache is one task, and tasks run in parallel over the batch; the
//! chunks of a larger state run in parallel one state after another. Small calls run on the
//! caller's thread. Results do not depend on the number of threads.

mod amplitude;
mod diagonal;
pub(crate) mod memory;
mod product;
mod walsh_hadamard;

pub(crate) use amplitude::{check_finite, partial_sum};

use crate::config::Config;
use crate::element::{Element, Precision, Real, with_element};
use crate::encoding::{EncodeSpec, Form, basis};
use crate::error::Result;
use crate::input::{Input, Output, Row};
use num_complex::Complex;
use rayon::prelude::*;
use std::sync::OnceLock;

/// States up to this many amplitudes are one task each.
const TASK_DIM: usize = 1 << 15;
/// Calls that write fewer amplitudes run on the caller's thread: waking the pool costs more.
const PARALLEL_AMPLITUDES: usize = 1 << 14;
/// Amplitudes per chunk of a larger state.
const CHUNK: usize = 1 << 12;

/// Threads for host work, made when there is first enough of it.
pub(crate) struct Pool(OnceLock<Option<rayon::ThreadPool>>);

/// For the states of the CPU backend.
static ENCODE: Pool = Pool(OnceLock::new());
/// For copying host input on its way to a device.
pub(crate) static STAGE: Pool = Pool(OnceLock::new());

impl Pool {
    /// Runs `task` inside the pool, where there is one and it is worth it.
    pub(crate) fn run<T: Send>(&self, parallel: bool, task: impl FnOnce(bool) -> T + Send) -> T {
        let threads = if parallel { self.threads() } else { None };
        match threads.filter(|threads| threads.current_num_threads() > 1) {
            Some(threads) => threads.install(|| task(true)),
            None => task(false),
        }
    }

    fn threads(&self) -> Option<&rayon::ThreadPool> {
        let make = || {
            let all = Config::get().num_threads;
            // Copies saturate the memory before they run out of cores, and a core has to be left
            // for whoever waits for them: with as many threads as cores they slow each other down.
            let few = (all * 3 / 4).clamp(1, 12);
            let staging = std::ptr::eq(self, &raw const STAGE);
            rayon::ThreadPoolBuilder::new()
                .num_threads(if staging { few } else { all })
                .thread_name(|index| format!("qdp-{index}"))
                .build()
                .map_err(|error| tracing::warn!("no thread pool, running on one thread: {error}"))
                .ok()
        };
        self.0.get_or_init(make).as_ref()
    }
}

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
    let amplitudes = input.batch() * spec.dim();
    let mut rows = output.rows_mut::<R>();
    ENCODE.run(amplitudes >= PARALLEL_AMPLITUDES, |parallel| {
        let within = if parallel { Within::Pool } else { Within::OneThread };
        if parallel && spec.dim() <= TASK_DIM {
            let group = (PARALLEL_AMPLITUDES / 4 / spec.dim()).max(1);
            // The error of the first bad sample, whichever thread meets one first.
            rows.par_iter_mut()
                .enumerate()
                .with_min_len(group)
                .filter_map(|(sample, state)| {
                    encode_row(sample, state, Within::OneThread).err().map(|error| (sample, error))
                })
                .min_by_key(|&(sample, _)| sample)
                .map_or(Ok(()), |(_, error)| Err(error))
        } else {
            rows.iter_mut()
                .enumerate()
                .try_for_each(|(sample, state)| encode_row(sample, state, within))
        }
    })
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
    if within == Within::Pool && state.len() > chunk {
        state.par_chunks_mut(chunk).enumerate().for_each(|(c, part)| fill(c * chunk, part));
    } else {
        state.chunks_mut(chunk).enumerate().for_each(|(c, part)| fill(c * chunk, part));
    }
}
