//! What an encode reads: borrowed, strided, two-dimensional views.

use crate::affine::Affine;
use crate::element::{DType, Element, Precision};
use crate::engine::Device;
use crate::error::{Error, Result};
use crate::shape::whole_rows;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// A batch of samples: shape `(batch, features)`, any element type, any strides, on any device.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    ptr: *const u8,
    dtype: DType,
    device: Device,
    batch: usize,
    features: usize,
    /// In elements, as in DLPack.
    strides: (isize, isize),
    /// Where each sample lies, if not at `ptr` and the strides.
    rows: Option<&'a [RowRef]>,
    /// Fits: checked where it was taken.
    affine: Option<Affine<'a>>,
    data: PhantomData<&'a [u8]>,
}

/// One sample of a gathered [`Input`]: where it lies on the host, its values and their distance.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowRef {
    ptr: *const u8,
    len: usize,
    stride: isize,
}

// SAFETY: a shared borrow of plain values, as an Input.
unsafe impl Send for RowRef {}
// SAFETY: as above.
unsafe impl Sync for RowRef {}

// SAFETY: an Input is a shared borrow of plain values; it is only ever read through.
unsafe impl Send for Input<'_> {}
// SAFETY: as above.
unsafe impl Sync for Input<'_> {}

impl<'a> Input<'a> {
    /// One sample in host memory.
    pub fn sample<T: Element>(values: &'a [T]) -> Self {
        Self {
            ptr: values.as_ptr().cast(),
            dtype: T::DTYPE,
            device: Device::Cpu,
            batch: 1,
            features: values.len(),
            strides: (values.len() as isize, 1),
            rows: None,
            affine: None,
            data: PhantomData,
        }
    }

    /// Consecutive samples of `features` values each in host memory.
    pub fn rows<T: Element>(values: &'a [T], features: usize) -> Result<Self> {
        let batch = whole_rows("data", values.len(), features, ("samples", "values"))?;
        Ok(Self { batch, features, strides: (features as isize, 1), ..Self::sample(values) })
    }

    /// A view of memory that somebody else describes.
    ///
    /// # Safety
    ///
    /// For the lifetime `'a`, every element `ptr + (i * strides.0 + j * strides.1) * size` with
    /// `i < batch` and `j < features` must be readable on `device`, aligned to its type's natural
    /// alignment, initialised, and not written to by anybody in an unordered way.
    pub unsafe fn from_raw(
        ptr: *const u8,
        dtype: DType,
        device: Device,
        (batch, features): (usize, usize),
        strides: (isize, isize),
    ) -> Self {
        let (rows, affine, data) = (None, None, PhantomData);
        Self { ptr, dtype, device, batch, features, strides, rows, affine, data }
    }

    /// Samples that lie anywhere in host memory, of at most `features` values each: shorter ones
    /// count as padded with zeros.
    ///
    /// # Safety
    ///
    /// What [`Self::from_raw`] asks for must hold for every value of every row.
    pub(crate) unsafe fn gathered(rows: &'a [RowRef], dtype: DType, features: usize) -> Self {
        debug_assert!(rows.iter().all(|row| row.len <= features));
        let strides = (features as isize, 1);
        let ptr = std::ptr::null();
        let (device, batch, rows) = (Device::Cpu, rows.len(), Some(rows));
        Self { ptr, dtype, device, batch, features, strides, rows, affine: None, data: PhantomData }
    }

    /// The same samples, with their features mapped where an encode reads them. The gradient of
    /// [`Engine::backward`](crate::Engine::backward) is that by the mapped features.
    ///
    /// For the encodings whose features are few (not amplitude, not basis), and for samples where
    /// the engine computes.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] for other than one value per feature, [`Error::DType`] for a type that is
    /// not a real floating one, [`Error::DeviceMismatch`] for values that are not where the samples
    /// are; in arguments `weight` and `bias`.
    pub fn with_affine(self, affine: Affine<'a>) -> Result<Self> {
        affine.check(self.features, self.device)?;
        Ok(Self { affine: Some(affine), ..self })
    }

    pub(crate) fn affine(&self) -> Option<&Affine<'a>> {
        self.affine.as_ref()
    }

    /// Refuses a map of the features, for `what` that knows none.
    pub(crate) fn refuse_affine(&self, what: &str) -> Result<()> {
        let Some(affine) = &self.affine else { return Ok(()) };
        Err(Error::invalid(affine.argument(), format!("None for {what}"), "values"))
    }

    /// The precision of the states where nobody asks for another.
    pub(crate) fn natural_precision(&self) -> Precision {
        let dtype = self.dtype;
        self.affine.map_or(dtype.natural_precision(), |affine| affine.precision(dtype))
    }

    /// The same view with a lifetime of the caller's choice. Not of a gathered one.
    ///
    /// # Safety
    ///
    /// What [`Self::from_raw`] asks for must hold for that lifetime, also of the memory of a map.
    pub(crate) unsafe fn for_any_lifetime<'b>(&self) -> Input<'b> {
        debug_assert!(self.rows.is_none());
        // SAFETY: passed on to the caller.
        let affine = self.affine.map(|affine| unsafe { affine.for_any_lifetime() });
        Input { rows: None, affine, data: PhantomData, ..*self }
    }

    /// Where a sample of a host input lies.
    pub(crate) fn row_ref(&self, sample: usize) -> RowRef {
        assert!(sample < self.batch);
        debug_assert_eq!(self.device, Device::Cpu);
        if let Some(rows) = self.rows {
            return rows[sample];
        }
        let offset = sample as isize * self.strides.0 * self.dtype.size() as isize;
        RowRef { ptr: self.ptr.wrapping_offset(offset), len: self.features, stride: self.strides.1 }
    }

    /// Address of the first element, on [`Self::device`].
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where the values lie.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Number of samples.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Values per sample.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Row and column stride, in elements.
    pub fn strides(&self) -> (isize, isize) {
        self.strides
    }

    /// Bytes of the values, without gaps.
    pub fn num_bytes(&self) -> usize {
        self.batch * self.features * self.dtype.size()
    }

    /// Whether the values fill their memory: each row without gaps, and row after row.
    pub(crate) fn has_no_gaps(&self) -> bool {
        self.rows.is_none()
            && (self.features <= 1 || self.strides.1 == 1)
            && (self.batch <= 1 || self.strides.0 == self.features as isize)
    }

    /// Row `sample` of a host input.
    pub(crate) fn row<T: Element>(&self, sample: usize) -> Row<'a, T> {
        debug_assert_eq!(T::DTYPE, self.dtype);
        let RowRef { ptr, len, stride } = self.row_ref(sample);
        Row { ptr: ptr.cast(), len, stride, data: PhantomData }
    }
}

impl RowRef {
    /// Values without gaps.
    pub(crate) fn contiguous(ptr: *const u8, len: usize) -> Self {
        Self { ptr, len, stride: 1 }
    }
}

/// An [`Input`] and what keeps its memory: what asynchronous work takes along.
pub struct OwnedInput {
    input: Input<'static>,
    owner: Box<dyn Send>,
}

impl fmt::Debug for OwnedInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OwnedInput").field(&self.input).finish()
    }
}

impl OwnedInput {
    /// One sample in host memory: a `Vec`, a boxed slice, an `Arc` of one, an array.
    pub fn sample<T: Element>(values: impl AsRef<[T]> + Send + Sync + 'static) -> Self {
        let values = Arc::new(values);
        let input = Input::sample((*values).as_ref());
        // SAFETY: the values lie in the Arc or belong to what lies there. The only handle to it
        // goes along, so it neither moves nor changes before it is dropped.
        unsafe { Self::from_raw(input, Box::new(Arc::clone(&values))) }
    }

    /// Consecutive samples of `features` values each in host memory.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if they are not a whole number of samples.
    pub fn rows<T: Element>(
        values: impl AsRef<[T]> + Send + Sync + 'static,
        features: usize,
    ) -> Result<Self> {
        let values = Arc::new(values);
        let input = Input::rows((*values).as_ref(), features)?;
        // SAFETY: as in `sample`.
        Ok(unsafe { Self::from_raw(input, Box::new(Arc::clone(&values))) })
    }

    /// A view of memory that `owner` keeps.
    ///
    /// # Safety
    ///
    /// What [`Input::from_raw`] asks for must hold until `owner` is dropped, whatever the lifetime
    /// of `input` says; likewise of the memory of its [`Affine`].
    pub unsafe fn from_raw(input: Input<'_>, owner: Box<dyn Send>) -> Self {
        // SAFETY: passed on to the caller.
        Self { input: unsafe { input.for_any_lifetime() }, owner }
    }

    /// The values.
    pub fn input(&self) -> Input<'_> {
        self.input
    }

    /// What keeps the memory.
    pub fn into_owner(self) -> Box<dyn Send> {
        self.owner
    }
}

/// One strided row of a host [`Input`].
#[derive(Clone, Copy)]
pub(crate) struct Row<'a, T> {
    ptr: *const T,
    len: usize,
    stride: isize,
    data: PhantomData<&'a [T]>,
}

// SAFETY: a Row is a shared borrow of plain values.
unsafe impl<T: Sync> Send for Row<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Row<'_, T> {}

impl<'a, T: Element> Row<'a, T> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The row as a slice, where it has no gaps.
    pub(crate) fn as_slice(&self) -> Option<&'a [T]> {
        (self.stride == 1 || self.len <= 1).then(|| {
            if self.len == 0 {
                return &[][..];
            }
            // SAFETY: stride 1 makes the row's elements contiguous, and Input's contract makes
            // them readable, aligned and initialised for 'a.
            unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
        })
    }

    pub(crate) fn get(&self, index: usize) -> T {
        assert!(index < self.len);
        // SAFETY: `index < len`, and Input's contract covers every element of the row.
        unsafe { *self.ptr.offset(index as isize * self.stride) }
    }

    /// The part of the row that `range` names, as far as there is one.
    pub(crate) fn part(&self, range: std::ops::Range<usize>) -> Self {
        self.range(range.start.min(self.len)..range.end.min(self.len))
    }

    /// The part of the row that `range` names.
    pub(crate) fn range(&self, range: std::ops::Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len);
        let start = if range.is_empty() { 0 } else { range.start as isize };
        // SAFETY: a non-empty range starts inside the row.
        let ptr = unsafe { self.ptr.offset(start * self.stride) };
        Self { ptr, len: range.len(), ..*self }
    }
}
