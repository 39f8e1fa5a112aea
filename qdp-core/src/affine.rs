//! A scale and a shift of every feature, applied where the features are read.

use crate::element::{DType, Floating, Precision, with_floating};
use crate::engine::Device;
use crate::error::{Error, Result};
use multiversion::multiversion;
use std::marker::PhantomData;

/// One value per feature: a real floating type, without gaps, on any device.
#[derive(Debug, Clone, Copy)]
pub struct Vector<'a> {
    ptr: *const u8,
    dtype: DType,
    device: Device,
    len: usize,
    data: PhantomData<&'a [u8]>,
}

// SAFETY: a Vector is a shared borrow of plain values; it is only ever read through.
unsafe impl Send for Vector<'_> {}
// SAFETY: as above.
unsafe impl Sync for Vector<'_> {}

impl<'a> Vector<'a> {
    /// Values in host memory.
    pub fn values<T: Floating>(values: &'a [T]) -> Self {
        let (ptr, device) = (values.as_ptr().cast(), Device::Cpu);
        Self { ptr, dtype: T::DTYPE, device, len: values.len(), data: PhantomData }
    }

    /// A view of memory that somebody else describes.
    ///
    /// # Safety
    ///
    /// For the lifetime `'a`, `len` consecutive elements from `ptr` must be readable on `device`,
    /// aligned to their type's size, initialised, and not written to by anybody in an unordered
    /// way.
    pub unsafe fn from_raw(ptr: *const u8, dtype: DType, device: Device, len: usize) -> Self {
        Self { ptr, dtype, device, len, data: PhantomData }
    }

    /// Address of the first value, on the device where the values lie.
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Refuses values other than one per feature, on another device, or of a type that is not a
    /// real floating one.
    fn check(&self, argument: &'static str, features: usize, device: Device) -> Result<()> {
        if self.dtype.is_integer() || self.dtype.is_complex() {
            return Err(Error::DType {
                argument,
                expected: "float16, bfloat16, float32 or float64".to_owned(),
                got: self.dtype.to_string(),
            });
        }
        if self.len != features {
            return Err(Error::Shape {
                argument,
                expected: format!("({features},)"),
                got: format!("({},)", self.len),
            });
        }
        device.check_holds(argument, self.device)
    }

    /// The values, which are on the host and of this type.
    fn as_slice<T: Floating>(&self) -> &'a [T] {
        assert_eq!((self.dtype, self.device), (T::DTYPE, Device::Cpu));
        if self.len == 0 {
            return &[];
        }
        // SAFETY: what `from_raw` was promised, or the slice borrowed.
        unsafe { std::slice::from_raw_parts(self.ptr.cast(), self.len) }
    }
}

/// The map `weight * x + bias` of every feature; without a weight it is 1, without a bias 0.
///
/// Computed in double with one rounding, in the kernels themselves.
#[derive(Debug, Clone, Copy, Default)]
pub struct Affine<'a> {
    /// What a feature is multiplied by.
    pub weight: Option<Vector<'a>>,
    /// What is added.
    pub bias: Option<Vector<'a>>,
}

impl<'a> Affine<'a> {
    fn vectors(&self) -> impl Iterator<Item = (&'static str, Vector<'a>)> {
        let named = [("weight", self.weight), ("bias", self.bias)];
        named.into_iter().filter_map(|(name, vector)| Some((name, vector?)))
    }

    /// The same map with a lifetime of the caller's choice.
    ///
    /// # Safety
    ///
    /// What [`Vector::from_raw`] asks for must hold for that lifetime.
    pub(crate) unsafe fn for_any_lifetime<'b>(&self) -> Affine<'b> {
        fn any<'b>(vector: Vector<'_>) -> Vector<'b> {
            Vector { data: PhantomData, ..vector }
        }
        Affine { weight: self.weight.map(any), bias: self.bias.map(any) }
    }

    /// The name of what is there, the weight's before the bias's.
    pub(crate) fn argument(&self) -> &'static str {
        self.vectors().next().map_or("weight", |(name, _)| name)
    }

    pub(crate) fn check(&self, features: usize, device: Device) -> Result<()> {
        self.vectors().try_for_each(|(name, vector)| vector.check(name, features, device))
    }

    /// The precision of states whose features are mapped from samples of type `dtype`, as a sum of
    /// such arrays would be: integers make nothing wider.
    pub(crate) fn precision(&self, dtype: DType) -> Precision {
        let double = |dtype| dtype == DType::F64;
        if double(dtype) || self.vectors().any(|(_, vector)| double(vector.dtype)) {
            Precision::Complex128
        } else {
            Precision::Complex64
        }
    }

    /// Maps the features of a sample on the host.
    pub(crate) fn apply(&self, x: &mut [f64]) {
        const REFUSED: &str = "checked when the input took the map";
        match (self.weight, self.bias) {
            (None, None) => {}
            (Some(weight), None) => with_floating!(
                weight.dtype,
                T => scale(x, weight.as_slice::<T>()),
                else unreachable!("{REFUSED}")
            ),
            (None, Some(bias)) => with_floating!(
                bias.dtype,
                T => shift(x, bias.as_slice::<T>()),
                else unreachable!("{REFUSED}")
            ),
            (Some(weight), Some(bias)) => with_floating!(
                weight.dtype,
                T => with_floating!(
                    bias.dtype,
                    U => scale_and_shift(x, weight.as_slice::<T>(), bias.as_slice::<U>()),
                    else unreachable!("{REFUSED}")
                ),
                else unreachable!("{REFUSED}")
            ),
        }
    }
}

fn scale<T: Floating>(x: &mut [f64], weight: &[T]) {
    for (x, weight) in x.iter_mut().zip(weight) {
        *x *= weight.to_f64();
    }
}

fn shift<T: Floating>(x: &mut [f64], bias: &[T]) {
    for (x, bias) in x.iter_mut().zip(bias) {
        *x += bias.to_f64();
    }
}

#[multiversion(targets("x86_64+avx2+fma"))]
fn scale_and_shift<T: Floating, U: Floating>(x: &mut [f64], weight: &[T], bias: &[U]) {
    for ((x, weight), bias) in x.iter_mut().zip(weight).zip(bias) {
        *x = x.mul_add(weight.to_f64(), bias.to_f64());
    }
}
