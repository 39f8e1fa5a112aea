//! The gradient of a loss by the features, given its gradient by the states (the cotangent).
//!
//! For a real loss L and a state psi the cotangent is `g = dL/d(Re psi) + i dL/d(Im psi)`, so that
//! `dL = Re sum_i conj(g_i) dpsi_i`. Nothing is kept from the forward computation: whatever of it
//! is needed is computed again. Results do not depend on the number of threads.

mod amplitude;
mod diagonal;
mod moments;
mod product;

use super::parallel::ENCODE;
use super::trig::Trig;
use super::{
    GROUP_WORK, PARALLEL_WORK, PIECE, ROUND_WORK, TASK_DIM, Within, rows_per_line, work_per_sample,
};
use crate::config::Config;
use crate::element::{Element, Floating, Real, with_floating};
use crate::encoding::{EncodeSpec, Form};
use crate::error::Result;
use crate::gradient::{Gradient, no_gradient_by, no_gradient_of};
use crate::input::{Input, Row};
use crate::interrupt::Interrupt;
use crate::output::RowsMut;
use num_complex::Complex;

/// Parts of a larger state at most, whose sums are added up one after another.
const MAX_PARTS: usize = 64;

/// Consecutive samples, their cotangents, and where their gradients go.
struct Rows<'a, T> {
    input: &'a Input<'a>,
    cotangent: &'a Input<'a>,
    first: usize,
    gradients: RowsMut<'a, T>,
    within: Within,
}

/// Writes the gradients of host input by the cotangents of its states.
pub(crate) fn backward(
    spec: &EncodeSpec,
    form: &Form,
    input: &Input<'_>,
    cotangent: &Input<'_>,
    gradient: &mut Gradient<'_>,
    interrupt: Interrupt,
) -> Result<()> {
    with_floating!(input.dtype(), T => {
        let gradients = gradient.rows_mut::<T>();
        match cotangent.dtype() {
            DType::C64 => rounds::<T, f32>(spec, form, (input, cotangent), gradients, interrupt),
            DType::C128 => rounds::<T, f64>(spec, form, (input, cotangent), gradients, interrupt),
            other => unreachable!("a cotangent of {other}, which was refused"),
        }
    }, else Err(no_gradient_by(input.dtype())))
}

/// Samples in rounds, between which the caller is asked whether to go on; in one round where
/// nobody is to be asked.
fn rounds<T: Floating, R: Trig>(
    spec: &EncodeSpec,
    form: &Form,
    (input, cotangent): (&Input<'_>, &Input<'_>),
    gradients: RowsMut<'_, T>,
    mut interrupt: Interrupt,
) -> Result<()>
where
    Complex<R>: Element,
{
    let work = work_per_sample(form, spec);
    let round = if interrupt.is_asked() {
        // Samples of much work are not so few that a thread is left without.
        (ROUND_WORK / work).max(8 * Config::get().num_threads)
    } else {
        gradients.len()
    };
    let run = |first, gradients, within| {
        let rows = Rows { input, cotangent, first, gradients, within };
        match form {
            Form::Amplitude => {
                amplitude::backward::<T, R>(rows);
                Ok(())
            }
            Form::Product(product) => {
                product::backward::<T, R>(product, rows);
                Ok(())
            }
            Form::Diagonal(diagonal) => {
                diagonal::backward::<T, R>(diagonal, rows);
                Ok(())
            }
            Form::Basis => Err(no_gradient_of(spec)),
        }
    };
    for (first, gradients) in gradients.groups(round.max(1)) {
        interrupt.poll()?;
        if gradients.len().saturating_mul(work) < PARALLEL_WORK {
            run(first, gradients, Within::OneThread)?;
        } else if spec.dim() > TASK_DIM {
            run(first, gradients, Within::Pool)?;
        } else {
            let lines = rows_per_line(input).max(rows_per_line(cotangent));
            let group = (GROUP_WORK / work).max(lines);
            ENCODE.for_each(true, gradients.groups(group), |(offset, gradients)| {
                run(first + offset, gradients, Within::OneThread)
                    .expect("a form without a gradient was refused");
            });
        }
    }
    Ok(())
}

/// The gradient of a sample that has no state.
fn fill_not_a_number<T: Floating>(gradient: &mut [T]) {
    gradient.fill(T::from_complex(Complex::new(f64::NAN, f64::NAN)));
}

/// The values of a row where they lie, or from `memory` where they do not lie together.
fn contiguous<'a, T: Element>(row: Row<'a, T>, memory: &'a mut Vec<T>) -> &'a [T] {
    if let Some(slice) = row.as_slice() {
        return slice;
    }
    memory.clear();
    memory.extend((0..row.len()).map(|i| row.get(i)));
    memory
}

#[inline]
fn to_f64<R: Real>(x: R) -> f64 {
    x.to_f64().unwrap_or(f64::NAN)
}

/// Out of line: what is done with the lanes here would else spread them over registers in the loop
/// that makes them.
#[inline(never)]
fn add_lanes<R: Real, const LANES: usize>(lanes: &[R; LANES]) -> f64 {
    lanes.iter().copied().map(to_f64).sum()
}

/// Amplitudes of a part of a larger state: whole pieces, the same number whatever the threads.
fn part_of(dim: usize) -> usize {
    PIECE.max(dim / MAX_PARTS)
}
