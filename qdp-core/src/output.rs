//! What an encode writes to: borrowed rows.

use crate::element::{Precision, Real};
use crate::engine::Device;
use crate::error::Result;
use crate::shape::whole_rows;
use num_complex::Complex;
use std::marker::PhantomData;

/// Where an encode writes: shape `(batch, 2^n)`, rows without gaps, on any device.
#[derive(Debug)]
pub struct Output<'a> {
    ptr: *mut u8,
    precision: Precision,
    device: Device,
    batch: usize,
    dim: usize,
    /// In amplitudes.
    row_stride: usize,
    data: PhantomData<&'a mut [u8]>,
}

// SAFETY: an Output is an exclusive borrow of plain values.
unsafe impl Send for Output<'_> {}

impl<'a> Output<'a> {
    /// Consecutive rows of `dim` amplitudes in host memory.
    pub fn rows<R: Real>(amplitudes: &'a mut [Complex<R>], dim: usize) -> Result<Self> {
        let batch = whole_rows("out", amplitudes.len(), dim, ("rows", "amplitudes"))?;
        Ok(Self {
            ptr: amplitudes.as_mut_ptr().cast(),
            precision: R::PRECISION,
            device: Device::Cpu,
            batch,
            dim,
            row_stride: dim,
            data: PhantomData,
        })
    }

    /// A view of memory that somebody else describes.
    ///
    /// # Safety
    ///
    /// For the lifetime `'a`, `dim` amplitudes from each `ptr + i * row_stride * size`,
    /// `i < batch`, must be writable on `device`, initialised (to anything), aligned to 8 bytes or
    /// more, in rows that do not overlap, and not touched by anybody else in an unordered way.
    pub unsafe fn from_raw(
        ptr: *mut u8,
        precision: Precision,
        device: Device,
        (batch, dim): (usize, usize),
        row_stride: usize,
    ) -> Self {
        Self { ptr, precision, device, batch, dim, row_stride, data: PhantomData }
    }

    /// Address of the first amplitude, on [`Self::device`].
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.ptr
    }

    /// Element type.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Where the amplitudes lie.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Number of states.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Amplitudes per state.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Distance between rows, in amplitudes.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// The rows of a host output.
    pub(crate) fn rows_mut<R: Real>(&mut self) -> RowsMut<'_, Complex<R>> {
        assert_eq!(self.precision, R::PRECISION);
        assert_eq!(self.device, Device::Cpu);
        let (ptr, stride) = (self.ptr.cast(), self.row_stride);
        // SAFETY: what `from_raw` was promised, or the slice borrowed.
        unsafe { RowsMut::from_raw(ptr, self.batch, self.dim, stride) }
    }
}

/// Rows of a host [`Output`] or [`Gradient`](crate::Gradient).
#[derive(Debug)]
pub(crate) struct RowsMut<'a, T> {
    ptr: *mut T,
    rows: usize,
    dim: usize,
    stride: usize,
    data: PhantomData<&'a mut [T]>,
}

// SAFETY: RowsMut is an exclusive borrow of plain values.
unsafe impl<T: Send> Send for RowsMut<'_, T> {}

impl<'a, T> RowsMut<'a, T> {
    /// Rows of `dim` values each, `stride` apart.
    ///
    /// # Safety
    ///
    /// For the lifetime `'a`, every value of the rows must be writable, initialised and aligned,
    /// the rows must not overlap, and nobody else may touch them.
    pub(crate) unsafe fn from_raw(ptr: *mut T, rows: usize, dim: usize, stride: usize) -> Self {
        Self { ptr, rows, dim, stride, data: PhantomData }
    }

    /// How many rows are left.
    pub(crate) fn len(&self) -> usize {
        self.rows
    }

    /// Takes up to `count` rows off one end.
    fn split_off(&mut self, count: usize, front: bool) -> Self {
        let count = count.min(self.rows);
        let skipped = if front { 0 } else { self.rows - count };
        // Wrapping, because past the last row there need be no memory.
        let part = Self { ptr: self.ptr.wrapping_add(skipped * self.stride), rows: count, ..*self };
        if front {
            self.ptr = self.ptr.wrapping_add(count * self.stride);
        }
        self.rows -= count;
        part
    }

    /// Groups of `size` rows, the last one with what is left, each with the number of its first row.
    pub(crate) fn groups(self, size: usize) -> Groups<'a, T> {
        Groups { rest: self, first: 0, size }
    }
}

impl<'a, T> Iterator for RowsMut<'a, T> {
    type Item = &'a mut [T];

    fn next(&mut self) -> Option<Self::Item> {
        if self.rows == 0 {
            return None;
        }
        let row = self.split_off(1, true);
        // SAFETY: the contract of whoever described the memory (or the slice borrowed) makes each
        // row writable, initialised, aligned and disjoint from the others, and none is taken twice.
        Some(unsafe { std::slice::from_raw_parts_mut(row.ptr, row.dim) })
    }
}

/// See [`RowsMut::groups`].
pub(crate) struct Groups<'a, T> {
    rest: RowsMut<'a, T>,
    first: usize,
    size: usize,
}

impl<'a, T> Iterator for Groups<'a, T> {
    type Item = (usize, RowsMut<'a, T>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.rows == 0 {
            return None;
        }
        let first = self.first;
        let group = self.rest.split_off(self.size, true);
        self.first += group.rows;
        Some((first, group))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let groups = self.rest.rows.div_ceil(self.size);
        (groups, Some(groups))
    }
}

impl<T> ExactSizeIterator for Groups<'_, T> {}

impl<T> DoubleEndedIterator for Groups<'_, T> {
    fn next_back(&mut self) -> Option<Self::Item> {
        if self.rest.rows == 0 {
            return None;
        }
        // The last group is the short one.
        let count = (self.rest.rows - 1) % self.size + 1;
        let group = self.rest.split_off(count, false);
        Some((self.first + self.rest.rows, group))
    }
}
