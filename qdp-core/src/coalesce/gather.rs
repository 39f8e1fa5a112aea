//! Rows of many requests as one input.

use crate::element::{DType, Element, with_element};
use crate::input::{Input, Row, RowRef};
use num_complex::Complex;

/// The type that values of both types are converted to, to be rows of one input: exact, but for
/// 64-bit integers.
pub(super) fn promote(a: DType, b: DType) -> DType {
    if a == b {
        return a;
    }
    let wide = |dtype: DType| dtype.size() >= 4 && !matches!(dtype, DType::F32 | DType::C64);
    match (a.is_complex() || b.is_complex(), wide(a) || wide(b)) {
        (false, false) => DType::F32,
        (false, true) => DType::F64,
        (true, false) => DType::C64,
        (true, true) => DType::C128,
    }
}

/// Rows of one element type, where they lie, or converted.
#[derive(Default)]
pub(super) struct Gathered {
    rows: Vec<RowRef>,
    features: usize,
    /// What the converted rows point to. Not boxes, which claim theirs for themselves when moved.
    converted: Vec<Vec<Complex<f64>>>,
}

impl Gathered {
    /// Adds the samples of `input`, which is on the host, as rows of `dtype`.
    ///
    /// # Safety
    ///
    /// The memory of `input` must be as [`Input::from_raw`] asks until this is dropped.
    pub(super) unsafe fn push(&mut self, input: &Input<'_>, dtype: DType) {
        self.features = self.features.max(input.features());
        for sample in 0..input.batch() {
            let row = if input.dtype() == dtype {
                input.row_ref(sample)
            } else {
                let row = with_element!(input.dtype(), T => convert(input.row::<T>(sample), dtype));
                let (ptr, len) = (row.as_ptr().cast(), input.features());
                self.converted.push(row);
                RowRef::contiguous(ptr, len)
            };
            self.rows.push(row);
        }
    }

    /// All rows, as samples of one batch of `dtype`, which they were pushed as.
    pub(super) fn input(&self, dtype: DType) -> Input<'_> {
        // SAFETY: rows lie in inputs of this type, which the caller of `push` keeps, or in what
        // was converted to it.
        unsafe { Input::gathered(&self.rows, dtype, self.features) }
    }
}

/// The row's values as `dtype`, one of those that [`promote`] names, in memory aligned for all.
fn convert<T: Element>(row: Row<'_, T>, dtype: DType) -> Vec<Complex<f64>> {
    let words = (row.len() * dtype.size()).div_ceil(size_of::<Complex<f64>>());
    let mut memory = vec![Complex::default(); words];
    let start = memory.as_mut_ptr();
    for i in 0..row.len() {
        let z = row.get(i).to_complex();
        // SAFETY: the memory has room for so many values of this type and is aligned to the
        // largest.
        unsafe {
            match dtype {
                DType::F32 => start.cast::<f32>().add(i).write(z.re as f32),
                DType::F64 => start.cast::<f64>().add(i).write(z.re),
                DType::C64 => {
                    start
                        .cast::<Complex<f32>>()
                        .add(i)
                        .write(Complex::new(z.re as f32, z.im as f32));
                }
                _ => start.add(i).write(z),
            }
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promotion_is_exact_and_symmetric() {
        use DType::{BF16, C64, C128, F16, F32, F64, I8, I32, U8, U16, U64};
        for (a, b, both) in [
            (F32, F32, F32),
            (U8, U8, U8),
            (F16, BF16, F32),
            (I8, U16, F32),
            (F32, U8, F32),
            (I32, F32, F64),
            (U64, F32, F64),
            (F32, F64, F64),
            (F16, C64, C64),
            (F64, C64, C128),
            (C64, C128, C128),
        ] {
            assert_eq!(promote(a, b), both, "{a} {b}");
            assert_eq!(promote(b, a), both, "{b} {a}");
        }
    }

    #[test]
    fn rows_of_any_type_and_stride_become_one_input() {
        let (doubles, bytes) = ([1.0, 2.0, 3.0, 4.0], [5_u8, 6, 7]);
        // SAFETY: two rows of two values, the second value before the first, in four values.
        let backward = unsafe {
            let (ptr, device) = (doubles.as_ptr().wrapping_add(1).cast(), crate::Device::Cpu);
            Input::from_raw(ptr, DType::F64, device, (2, 2), (2, -1))
        };
        let mut gathered = Gathered::default();
        // SAFETY: the arrays outlive it.
        unsafe {
            gathered.push(&backward, DType::F64);
            gathered.push(&Input::sample(&bytes), DType::F64);
        }
        let input = gathered.input(DType::F64);
        let row = |sample| {
            let row = input.row::<f64>(sample);
            (0..row.len()).map(|i| row.get(i)).collect::<Vec<_>>()
        };
        assert_eq!((input.batch(), input.features()), (3, 3));
        assert_eq!([row(0), row(1), row(2)], [vec![2.0, 1.0], vec![4.0, 3.0], vec![5.0, 6.0, 7.0]]);
    }
}
