//! Staging: a piece of the input, copied, validated and narrowed on the way.

use super::cache::{self, Line};
use super::plan::{Cut, Piece};
use crate::cpu;
use crate::element::{DType, Element, Precision, with_element};
use crate::encoding::product::{Factor, Product};
use crate::encoding::{Form, amplitude, basis};
use crate::error::{Error, Result};
use crate::input::{Input, Row};
use crate::plan::EncodePlan;
use multiversion::multiversion;
use num_complex::Complex;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ops::RangeInclusive;

/// Narrowed values keep their precision where their norm's square is in this range: below, values
/// that matter would be subnormal, above, infinite.
const NARROW_RANGE: RangeInclusive<f64> =
    f64::from_bits((1023 - 120) << 52)..=f64::from_bits((1023 + 120) << 52);

/// Well within it: a sum taken in another order is in the range, too.
const WITHIN_RANGE: RangeInclusive<f64> =
    f64::from_bits((1023 - 119) << 52)..=f64::from_bits((1023 + 119) << 52);

/// Up to so many bytes of input, threads write what they stage past their caches. Of more, what was
/// written is pushed out by what follows before the link comes to it, and the threads' time counts.
const STREAM_BYTES: usize = 16 << 20;

/// How the values of an input travel.
pub(crate) struct Staging<'a> {
    plan: &'a EncodePlan,
    input: &'a Input<'a>,
    /// Their type on the link.
    dtype: DType,
    /// By sample, factors (powers of two) that bring values into the range of a narrower type.
    factors: HashMap<usize, f64>,
    /// Whether to write past the caches, see [`cache::stream`].
    stream: bool,
}

/// The type that samples travel as: half the bytes where the result has no use for the others.
/// Narrower types travel as they are; kernels read them all. Features are angles, whose accuracy
/// the result has, so only amplitudes are narrowed.
pub(crate) fn link_dtype(plan: &EncodePlan) -> DType {
    match (plan.form(), plan.precision(), plan.dtype()) {
        (Form::Amplitude, Precision::Complex64, DType::F64 | DType::I64 | DType::U64) => DType::F32,
        (Form::Amplitude, Precision::Complex64, DType::C128) => DType::C64,
        (_, _, dtype) => dtype,
    }
}

impl<'a> Staging<'a> {
    pub(crate) fn new(plan: &'a EncodePlan, input: &'a Input<'a>) -> Self {
        let dtype = link_dtype(plan);
        // Narrowed, less is written than is read, and threads have the time.
        let stream = dtype != plan.dtype() || input.num_bytes() <= STREAM_BYTES;
        Self { plan, input, dtype, factors: HashMap::new(), stream }
    }

    /// Values that travel as they are, to memory that is or is not to be written past the caches.
    pub(crate) fn unchanged(plan: &'a EncodePlan, input: &'a Input<'a>, stream: bool) -> Self {
        Self { dtype: plan.dtype(), stream, ..Self::new(plan, input) }
    }

    /// Copies a piece to `target`, which has its size on the link; returns its sum of squares.
    pub(crate) fn stage(&self, piece: &Piece, target: &mut [u8]) -> Result<f64> {
        with_element!(self.input.dtype(), T => self.stage_as::<T>(piece, target))
    }

    fn stage_as<T: Element>(&self, piece: &Piece, target: &mut [u8]) -> Result<f64> {
        let (mut sum, mut again) = (0.0, false);
        let row_bytes = piece.columns.len() * self.dtype.size();
        for (sample, target) in piece.rows.clone().zip(target.chunks_exact_mut(row_bytes)) {
            let row = self.input.row::<T>(sample).part(piece.columns.clone());
            if sample + 2 < piece.rows.end
                && let Some(ahead) = self.input.row::<T>(sample + 2).as_slice()
            {
                // Short rows may lie apart from each other, where no processor looks ahead.
                cache::prefetch(&ahead[..ahead.len().min(BLOCK)]);
            }
            let (target, padding) = target.split_at_mut(row.len() * self.dtype.size());
            padding.fill(0);
            if self.is_amplitude() {
                let factor = self.factors.get(&sample).copied();
                let (narrowed, factor) = (self.is_narrowed(), factor.unwrap_or(1.0));
                sum = transfer(row, narrowed, factor, self.stream, target);
                if !sum.is_finite() {
                    cpu::check_finite(sample, row, piece.columns.start)?;
                }
            } else {
                copy(row, target);
                sum = self.validate(sample, row, piece.columns.start)?;
            }
            if self.is_amplitude() && piece.columns.len() == self.plan.features() {
                amplitude::norm(sample, sum)?;
                // Several rows have one sum each, so what it says of them is noted here.
                // The rows behind it may have something wrong with them all the same.
                again |= piece.rows.len() > 1 && !self.fits(sample, sum);
            }
        }
        Ok(if again { f64::NAN } else { sum })
    }

    fn is_amplitude(&self) -> bool {
        matches!(self.plan.form(), Form::Amplitude)
    }

    fn is_narrowed(&self) -> bool {
        self.dtype != self.input.dtype()
    }

    /// Whether a sample keeps its precision on the way.
    fn fits(&self, sample: usize, sum: f64) -> bool {
        !self.is_narrowed() || self.factors.contains_key(&sample) || NARROW_RANGE.contains(&sum)
    }

    /// Checks the norms of samples that were cut into several pieces. False where samples have to
    /// be staged again because they left the range of a narrower type; how, is known now.
    pub(crate) fn settle(&mut self, cut: &Cut, sums: &[f64]) -> Result<bool> {
        if !self.is_amplitude() {
            return Ok(true);
        }
        let mut again = Vec::new();
        let mut row_sum = 0.0;
        for (piece, &sum) in cut.pieces.iter().zip(sums) {
            if piece.rows.len() > 1 {
                if sum.is_nan() {
                    again.extend(piece.rows.clone());
                }
                continue; // whole rows were checked one by one
            }
            row_sum += sum;
            if piece.columns.end == self.plan.features() {
                let sample = piece.rows.start;
                let total = std::mem::take(&mut row_sum);
                amplitude::norm(sample, total)?;
                if !self.fits(sample, total) {
                    again.push(sample);
                }
            }
        }
        for &sample in &again {
            // A sum at the bound may be beyond it as pieces are summed and not as whole rows are, and
            // to ask the same of both would never end.
            let sum = self.sum_of_squares(sample);
            if !WITHIN_RANGE.contains(&sum) {
                self.factors.insert(sample, power_of_two_near(sum.sqrt().recip()));
            }
        }
        Ok(again.is_empty())
    }

    fn sum_of_squares(&self, sample: usize) -> f64 {
        with_element!(self.input.dtype(), T => cpu::partial_sum(self.input.row::<T>(sample)))
    }

    /// The first error of a cut of which staging a piece has raised `error`: the norm of a sample
    /// in several pieces is not known before all of them are staged.
    pub(crate) fn first_error(&self, cut: &Cut, error: Error) -> Error {
        let (Error::NonFinite { sample, .. }
        | Error::ZeroNorm { sample }
        | Error::NormOverflow { sample }) = error
        else {
            return error;
        };
        match cut.pieces.first() {
            Some(first) if self.is_amplitude() && first.columns.len() < self.plan.features() => {
                self.scan(first.rows.start..sample).err().unwrap_or(error)
            }
            _ => error,
        }
    }

    /// Raises the first thing that is wrong with some samples, where something is: for input that
    /// was not staged and that the device found fault with.
    pub(crate) fn scan(&self, samples: std::ops::Range<usize>) -> Result<()> {
        with_element!(self.input.dtype(), T => {
            for sample in samples {
                let sum = self.validate(sample, self.input.row::<T>(sample), 0)?;
                if self.is_amplitude() {
                    amplitude::norm(sample, sum)?;
                }
            }
            Ok(())
        })
    }

    /// Checks the values of a row, or of its part from `first` on; returns the sum of squares for
    /// amplitude encoding.
    fn validate<T: Element>(&self, sample: usize, row: Row<'_, T>, first: usize) -> Result<f64> {
        let num_qubits = self.plan.spec().num_qubits();
        match self.plan.form() {
            Form::Amplitude => {
                let sum = cpu::partial_sum(row);
                if !sum.is_finite() {
                    cpu::check_finite(sample, row, first)?;
                }
                Ok(sum)
            }
            Form::Basis => basis::index(sample, row.get(0).to_f64(), num_qubits).map(|_| 0.0),
            Form::Product(Product { factor: Factor::Bit, .. }) => {
                for position in 0..row.len() {
                    let value = row.get(position).to_f64();
                    basis::check_bit(sample, first + position, value, num_qubits)?;
                }
                Ok(0.0)
            }
            Form::Product(_) | Form::Diagonal(_) => {
                cpu::check_finite(sample, row, first).map(|()| 0.0)
            }
        }
    }
}

/// What is wrong with which samples of a host input, by their order.
pub(crate) fn faults(plan: &EncodePlan, input: &Input<'_>) -> Vec<(usize, Error)> {
    let (staging, found) = (Staging::new(plan, input), Mutex::new(Vec::new()));
    let parallel = input.num_bytes() > ONE_THREAD_BYTES;
    cpu::parallel::ENCODE.for_each(parallel, 0..input.batch(), |sample| {
        if let Err(error) = staging.scan(sample..sample + 1) {
            found.lock().push((sample, error));
        }
    });
    let mut found = found.into_inner();
    found.sort_unstable_by_key(|&(sample, _)| sample);
    found
}

/// Less input than so many bytes is not worth a second thread to look at.
const ONE_THREAD_BYTES: usize = 1 << 18;

/// 2 to the exponent of `x`, which is normal.
fn power_of_two_near(x: f64) -> f64 {
    f64::from_bits(x.to_bits() & (0x7ff << 52))
}

/// Copies values as they are to `target`, rows without gaps.
pub(crate) fn copy_rows(input: &Input<'_>, target: &mut [u8]) {
    let row_bytes = input.features() * input.dtype().size();
    with_element!(input.dtype(), T => {
        for (row, target) in target.chunks_exact_mut(row_bytes.max(1)).enumerate() {
            copy(input.row::<T>(row), target);
        }
    });
}

fn copy<T: Element>(row: Row<'_, T>, target: &mut [u8]) {
    if let Some(slice) = row.as_slice() {
        return copy_slice(slice, false, target);
    }
    for (i, bytes) in target.chunks_exact_mut(size_of::<T>()).enumerate() {
        // SAFETY: `bytes` has the size of T; the write asks for no alignment.
        unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(row.get(i)) };
    }
}

fn copy_slice<T: Element>(values: &[T], stream: bool, target: &mut [u8]) {
    // SAFETY: types of elements have no bytes but those of their values.
    let bytes =
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    if stream {
        cache::stream(bytes, target);
    } else {
        target.copy_from_slice(bytes);
    }
}

/// Writes a row of amplitudes to `target`, narrowed and times `factor` or as it is; returns its sum
/// of squares. Both in one pass: the row comes from memory, and that is what takes the time.
fn transfer<T: Element>(
    row: Row<'_, T>,
    narrowed: bool,
    factor: f64,
    stream: bool,
    target: &mut [u8],
) -> f64 {
    let Some(values) = row.as_slice() else {
        let sum = cpu::partial_sum(row);
        if narrowed {
            for (i, bytes) in target.chunks_exact_mut(narrow_size::<T>()).enumerate() {
                write_narrow(row.get(i), factor, bytes);
            }
        } else {
            copy(row, target);
        }
        return sum;
    };
    // The first-level cache holds a block until it is summed.
    let size = if narrowed { narrow_size::<T>() } else { size_of::<T>() };
    let mut ahead = values.chunks(BLOCK).skip(2);
    let mut sum = 0.0;
    for (values, target) in values.chunks(BLOCK).zip(target.chunks_mut(BLOCK * size)) {
        if let Some(values) = ahead.next() {
            cache::prefetch(values);
        }
        if narrowed {
            narrow(values, factor, stream, target);
        } else {
            copy_slice(values, stream, target);
        }
        sum += cpu::sum_slice(values);
    }
    if stream {
        cache::fence();
    }
    sum
}

/// Values that are converted and summed at a time.
const BLOCK: usize = 1024;

const fn narrow_size<T: Element>() -> usize {
    if T::DTYPE.is_complex() { size_of::<Complex<f32>>() } else { size_of::<f32>() }
}

/// Writes `values` in single precision, times `factor`, past the caches if that is wanted.
#[multiversion(targets("x86_64+avx512f+avx512vl", "x86_64+avx2+fma"))]
fn narrow<T: Element>(values: &[T], factor: f64, stream: bool, target: &mut [u8]) {
    let size = narrow_size::<T>();
    assert_eq!(values.len() * size, target.len());
    let rest = |values: &[T], bytes: &mut [u8]| {
        for (&value, bytes) in values.iter().zip(bytes.chunks_exact_mut(size)) {
            write_narrow(value, factor, bytes);
        }
    };
    if !target.as_ptr().align_offset(size_of::<Line>()).is_multiple_of(size) {
        return rest(values, target); // no line begins with a value
    }
    let (head, lines, tail) = cache::lines(target);
    let (first, values) = values.split_at(head.len() / size);
    let sources = values.chunks_exact(size_of::<Line>() / size);
    rest(first, head);
    rest(sources.remainder(), tail);
    for (line, values) in lines.iter_mut().zip(sources) {
        let narrowed = Line(std::array::from_fn(|i| {
            let value = if T::DTYPE.is_complex() {
                let z = values[i / 2].to_complex();
                if i % 2 == 0 { z.re } else { z.im }
            } else {
                values[i].to_f64()
            };
            ((value * factor) as f32).to_bits()
        }));
        if stream {
            line.stream(narrowed);
        } else {
            *line = narrowed;
        }
    }
}

// Into a function of several versions, or it is not compiled for the processor's vectors.
#[allow(clippy::inline_always)]
#[inline(always)]
fn write_narrow<T: Element>(value: T, factor: f64, bytes: &mut [u8]) {
    if T::DTYPE.is_complex() {
        let z = value.to_complex() * factor;
        bytes[..4].copy_from_slice(&(z.re as f32).to_ne_bytes());
        bytes[4..8].copy_from_slice(&(z.im as f32).to_ne_bytes());
    } else {
        bytes[..4].copy_from_slice(&((value.to_f64() * factor) as f32).to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::{EncodeSpec, Encoding};
    use crate::engine::{Device, Engine};
    use crate::pipeline::config::PipelineConfig;
    use crate::pipeline::plan::Samples;
    use proptest::prelude::*;

    /// A plan for amplitudes, on the CPU.
    fn plan(input: &Input<'_>, precision: Precision) -> std::sync::Arc<EncodePlan> {
        let n = input.features().next_power_of_two().trailing_zeros().max(1);
        let spec = EncodeSpec::new(Encoding::Amplitude, n).unwrap();
        Engine::open(Device::Cpu).unwrap().plan(input, &spec, Some(precision)).unwrap()
    }

    /// What arrives of a batch on the device, and whether it has to be staged again.
    fn staged(staging: &mut Staging<'_>) -> Result<(Vec<u8>, bool)> {
        let (input, size) = (staging.input, staging.dtype.size());
        let samples = Samples { features: input.features(), size, staged: true, growing: true };
        let config = PipelineConfig {
            min_chunk_bytes: 64 << 10,
            max_chunk_bytes: 256 << 10,
            direct_bytes: 64 << 10,
            ..PipelineConfig::built_in(1)
        };
        let cut = Cut::new(0..input.batch(), samples, &config);
        let (mut bytes, mut sums) = (Vec::new(), Vec::new());
        for piece in &cut.pieces {
            let mut target = vec![0; piece.rows.len() * piece.columns.len() * size];
            let sum = staging.stage(piece, &mut target);
            sums.push(sum.map_err(|error| staging.first_error(&cut, error))?);
            bytes.extend(target);
        }
        Ok((bytes, staging.settle(&cut, &sums)?))
    }

    fn doubles(bytes: &[u8]) -> Vec<f64> {
        bytes.chunks_exact(8).map(|b| f64::from_ne_bytes(b.try_into().unwrap())).collect()
    }

    fn singles(bytes: &[u8]) -> Vec<f32> {
        bytes.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect()
    }

    #[test]
    #[cfg_attr(miri, ignore = "large arrays")]
    fn every_byte_arrives() {
        for (batch, features) in [(3, 5), (2, 10_000), (2, 100_000)] {
            let values: Vec<f64> = (0..batch * features).map(|i| 1.0 + i as f64).collect();
            let input = Input::rows(&values, features).unwrap();
            let plan = plan(&input, Precision::Complex128);
            let (bytes, fine) = staged(&mut Staging::new(&plan, &input)).unwrap();
            assert!(fine);
            assert_eq!(doubles(&bytes), values);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "large arrays")]
    fn doubles_are_narrowed_for_a_narrow_result() {
        for features in [5, 100_000] {
            let values: Vec<f64> = (0..3 * features).map(|i| 0.1 + i as f64).collect();
            let input = Input::rows(&values, features).unwrap();
            let plan = plan(&input, Precision::Complex64);
            let (bytes, fine) = staged(&mut Staging::new(&plan, &input)).unwrap();
            assert!(fine);
            let expected: Vec<f32> = values.iter().map(|&x| x as f32).collect();
            assert_eq!(singles(&bytes), expected);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "large arrays")]
    fn samples_beyond_the_narrow_range_are_scaled_by_a_power_of_two_and_others_are_not() {
        for features in [5, 100_000] {
            for scale in [1e-60, 1e60] {
                let mut values: Vec<f64> = (0..3 * features).map(|i| 0.1 + i as f64).collect();
                values[features..2 * features].iter_mut().for_each(|x| *x *= scale);
                let input = Input::rows(&values, features).unwrap();
                let plan = plan(&input, Precision::Complex64);
                let mut staging = Staging::new(&plan, &input);
                assert!(!staged(&mut staging).unwrap().1, "the first time shows it");
                let (bytes, fine) = staged(&mut staging).unwrap();
                assert!(fine);
                let narrow = singles(&bytes);
                for (i, (&x, &y)) in values.iter().zip(&narrow).enumerate() {
                    let factor = if i / features == 1 { staging.factors[&1] } else { 1.0 };
                    assert_eq!(factor.to_bits() << 12, 0, "a power of two");
                    assert_eq!(((x * factor) as f32).to_bits(), y.to_bits(), "value {i}");
                }
                let squares = |y: &f32| f64::from(*y) * f64::from(*y);
                let sum: f64 = narrow[features..2 * features].iter().map(squares).sum();
                assert!(NARROW_RANGE.contains(&sum));
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "large arrays")]
    fn the_first_bad_sample_is_named_behind_one_that_does_not_fit() {
        let (batch, features) = (20_000, 4);
        let mut values = vec![1.0_f64; batch * features];
        values[..4].fill(1e-30);
        values[4..8].fill(0.0);
        values[19_000 * 4] = f64::NAN;
        let input = Input::rows(&values, features).unwrap();
        let plan = plan(&input, Precision::Complex64);
        let error = staged(&mut Staging::new(&plan, &input)).unwrap_err();
        assert_eq!(error, Error::ZeroNorm { sample: 1 });
    }

    #[test]
    #[cfg_attr(miri, ignore = "large arrays")]
    fn sums_at_the_bounds_of_the_range_are_settled_at_once() {
        const FEATURES: usize = 40_000;
        let piece = (64 << 10) / size_of::<f32>();
        let whole = |values: &[f64]| cpu::partial_sum(Input::sample(values).row::<f64>(0));
        let in_pieces = |values: &[f64]| values.chunks(piece).map(whole).sum::<f64>();
        let mut differed = 0;
        for seed in 0..100 {
            let value = |i: usize| 1.0 + ((i * 7919 + seed * 104_729) % 1021) as f64;
            let mut values: Vec<f64> = (0..FEATURES).map(value).collect();
            let scale = (NARROW_RANGE.end() / whole(&values)).sqrt();
            for x in &mut values {
                *x *= scale;
            }
            let fits = |sum| NARROW_RANGE.contains(&sum);
            differed += i32::from(fits(whole(&values)) && !fits(in_pieces(&values)));
            let input = Input::sample(&values);
            let plan = plan(&input, Precision::Complex64);
            let mut staging = Staging::new(&plan, &input);
            let again = !staged(&mut staging).unwrap().1;
            assert!(!again || staged(&mut staging).unwrap().1, "a second time, seed {seed}");
        }
        assert!(differed > 0, "no sample was at the bound");
    }

    #[test]
    #[cfg_attr(miri, ignore = "large arrays")]
    fn the_first_bad_value_is_named() {
        for precision in [Precision::Complex64, Precision::Complex128] {
            for features in [5, 100_000] {
                let check = |values: &[f64]| {
                    let input = Input::rows(values, features).unwrap();
                    let plan = plan(&input, precision);
                    let scanned = Staging::new(&plan, &input).scan(0..3);
                    let staged = staged(&mut Staging::new(&plan, &input)).map(|_| ());
                    assert_eq!(scanned, staged);
                    staged
                };
                let mut values = vec![1.0; 3 * features];
                values[features + 3] = f64::NAN;
                values[2 * features] = f64::INFINITY;
                let expected = Error::NonFinite { sample: 1, position: 3, nan: true };
                assert_eq!(check(&values), Err(expected));
                let mut values = vec![1.0; 3 * features];
                values[2 * features..].fill(0.0);
                assert_eq!(check(&values), Err(Error::ZeroNorm { sample: 2 }));
                values[features] = 1e200;
                assert_eq!(check(&values), Err(Error::NormOverflow { sample: 1 }));
                values[..features].fill(0.0);
                values[2 * features] = f64::NAN;
                assert_eq!(check(&values), Err(Error::ZeroNorm { sample: 0 }));
            }
        }
    }

    proptest! {
        /// Whatever the alignment: the whole lines, and what is before and behind them.
        #[test]
        fn every_value_is_written_and_nothing_else(
            values in prop::collection::vec(-1e30..1e30_f64, 0..70),
            offset in 0usize..80,
            stream: bool,
        ) {
            let check = |size: usize, write: &dyn Fn(&mut [u8]), expected: &[u8]| {
                let mut memory = vec![0xa5; offset + size + 80];
                write(&mut memory[offset..offset + size]);
                cache::fence();
                assert_eq!(&memory[offset..offset + size], expected);
                assert!(memory[..offset].iter().chain(&memory[offset + size..]).all(|&b| b == 0xa5));
            };
            let wide: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
            check(wide.len(), &|target| copy_slice(&values, stream, target), &wide);
            let narrow_bytes = |x: &f64| ((x * 0.5) as f32).to_ne_bytes();
            let expected: Vec<u8> = values.iter().flat_map(narrow_bytes).collect();
            check(expected.len(), &|target| narrow(&values, 0.5, stream, target), &expected);
            let pairs: Vec<Complex<f64>> =
                values.chunks_exact(2).map(|z| Complex::new(z[0], z[1])).collect();
            let expected = &expected[..pairs.len() * 8];
            check(expected.len(), &|target| narrow(&pairs, 0.5, stream, target), expected);
        }
    }
}
