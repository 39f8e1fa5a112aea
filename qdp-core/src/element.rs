//! Element types: what may come in ([`DType`], [`Element`]) and what goes out ([`Precision`],
//! [`Real`]).

use crate::error::{Error, Result};
use half::{bf16, f16};
use num_complex::Complex;
use std::fmt;
use std::str::FromStr;

mod sealed {
    pub trait Sealed {}
}

/// The element type of an input array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs)] // the names say it
pub enum DType {
    U8 = 0,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
    F16,
    BF16,
    F32,
    F64,
    C64,
    C128,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::BF16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::C64 => 8,
            Self::C128 => 16,
        }
    }

    /// Whether the elements are complex.
    pub const fn is_complex(self) -> bool {
        matches!(self, Self::C64 | Self::C128)
    }

    /// Whether the elements are integers.
    pub const fn is_integer(self) -> bool {
        matches!(
            self,
            Self::U8
                | Self::U16
                | Self::U32
                | Self::U64
                | Self::I8
                | Self::I16
                | Self::I32
                | Self::I64
        )
    }

    /// The precision of the result where the caller names none: 64-bit input gives complex128,
    /// everything else complex64, as `torch.fft` does.
    pub const fn natural_precision(self) -> Precision {
        match self {
            Self::U64 | Self::I64 | Self::F64 | Self::C128 => Precision::Complex128,
            _ => Precision::Complex64,
        }
    }

    /// The field's name of this type, as in NumPy.
    pub const fn name(self) -> &'static str {
        match self {
            Self::U8 => "uint8",
            Self::U16 => "uint16",
            Self::U32 => "uint32",
            Self::U64 => "uint64",
            Self::I8 => "int8",
            Self::I16 => "int16",
            Self::I32 => "int32",
            Self::I64 => "int64",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
            Self::C64 => "complex64",
            Self::C128 => "complex128",
        }
    }
}

impl FromStr for DType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        const ALL: [DType; 14] = [
            DType::U8,
            DType::U16,
            DType::U32,
            DType::U64,
            DType::I8,
            DType::I16,
            DType::I32,
            DType::I64,
            DType::F16,
            DType::BF16,
            DType::F32,
            DType::F64,
            DType::C64,
            DType::C128,
        ];
        ALL.into_iter().find(|dtype| dtype.name() == text).ok_or_else(|| Error::DType {
            argument: "dtype",
            expected: format!("one of {}", ALL.map(DType::name).join(", ")),
            got: format!("{text:?}"),
        })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The element type of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Two float32 per amplitude.
    Complex64,
    /// Two float64 per amplitude.
    Complex128,
}

impl Precision {
    /// Size of one amplitude in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::Complex64 => 8,
            Self::Complex128 => 16,
        }
    }

    /// The field's name of this type, as in NumPy.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Complex64 => "complex64",
            Self::Complex128 => "complex128",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The real type under a state's complex type: `f32` or `f64`.
pub trait Real:
    sealed::Sealed + num_traits::Float + num_traits::NumAssign + Send + Sync + fmt::Debug + 'static
{
    /// The precision whose real type this is.
    const PRECISION: Precision;

    /// Rounds a double to this type.
    fn from_f64(value: f64) -> Self;
}

impl sealed::Sealed for f32 {}
impl Real for f32 {
    const PRECISION: Precision = Precision::Complex64;
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl sealed::Sealed for f64 {}
impl Real for f64 {
    const PRECISION: Precision = Precision::Complex128;
    fn from_f64(value: f64) -> Self {
        value
    }
}

/// A type that an input array may hold.
pub trait Element: Copy + Send + Sync + 'static {
    /// Its [`DType`].
    const DTYPE: DType;

    /// The value as a complex double. Exact for every type but 64-bit integers, which round.
    fn to_complex(self) -> Complex<f64>;

    /// The real part of the value as a double; the whole value for a real type.
    fn to_f64(self) -> f64 {
        self.to_complex().re
    }
}

/// As `f16::to_f64`, without a branch or a question to the processor, so that loops vectorise.
#[inline]
fn f16_to_f64(x: f16) -> f64 {
    /// What is added to the exponent, in place.
    const BIAS: u32 = (127 - 15) << 23;
    const LEAST_NORMAL: u32 = (127 - 14) << 23;
    let bits = u32::from(x.to_bits());
    let magnitude = (bits & 0x7fff) << 13;
    let normal = magnitude + BIAS;
    let infinite_or_nan = normal + BIAS;
    let subnormal = f32::from_bits(magnitude + LEAST_NORMAL) - f32::from_bits(LEAST_NORMAL);
    let value = match magnitude & (0x1f << 23) {
        0 => subnormal.to_bits(),
        exponent if exponent == 0x1f << 23 => infinite_or_nan,
        _ => normal,
    };
    f64::from(f32::from_bits(value | (bits & 0x8000) << 16))
}

/// As `bf16::to_f64`, likewise.
#[inline]
fn bf16_to_f64(x: bf16) -> f64 {
    f64::from(f32::from_bits(u32::from(x.to_bits()) << 16))
}

macro_rules! real_elements {
    ($($type:ty => $dtype:ident, $convert:expr;)*) => {$(
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
            #[inline]
            fn to_complex(self) -> Complex<f64> {
                Complex::new(self.to_f64(), 0.0)
            }
            #[inline]
            fn to_f64(self) -> f64 {
                $convert(self)
            }
        }
    )*};
}

real_elements! {
    u8 => U8, f64::from;
    u16 => U16, f64::from;
    u32 => U32, f64::from;
    u64 => U64, |x| x as f64;
    i8 => I8, f64::from;
    i16 => I16, f64::from;
    i32 => I32, f64::from;
    i64 => I64, |x| x as f64;
    f16 => F16, f16_to_f64;
    bf16 => BF16, bf16_to_f64;
    f32 => F32, f64::from;
    f64 => F64, |x| x;
}

impl Element for Complex<f32> {
    const DTYPE: DType = DType::C64;
    #[inline]
    fn to_complex(self) -> Complex<f64> {
        Complex::new(f64::from(self.re), f64::from(self.im))
    }
}

impl Element for Complex<f64> {
    const DTYPE: DType = DType::C128;
    #[inline]
    fn to_complex(self) -> Complex<f64> {
        self
    }
}

/// An [`Element`] that a gradient may have: a floating type.
pub trait Floating: Element {
    /// Rounds to this type; of a real type, the real part.
    fn from_complex(value: Complex<f64>) -> Self;
}

macro_rules! floating_elements {
    ($($type:ty => $convert:expr;)*) => {$(
        impl Floating for $type {
            #[inline]
            fn from_complex(value: Complex<f64>) -> Self {
                $convert(value)
            }
        }
    )*};
}

floating_elements! {
    f16 => |z: Complex<f64>| f16::from_f64(z.re);
    bf16 => |z: Complex<f64>| bf16::from_f64(z.re);
    f32 => |z: Complex<f64>| z.re as f32;
    f64 => |z: Complex<f64>| z.re;
    Complex<f32> => |z: Complex<f64>| Complex::new(z.re as f32, z.im as f32);
    Complex<f64> => |z| z;
}

/// Runs `$body` with `$T` bound to the floating type that `$dtype` names, or is `$otherwise`.
macro_rules! with_floating {
    ($dtype:expr, $T:ident => $body:expr, else $otherwise:expr) => {
        $crate::element::with_floating!($dtype, $T => $body; _ => $otherwise)
    };
    // With arms for the other types.
    ($dtype:expr, $T:ident => $body:expr; $($others:tt)*) => {{
        use $crate::element::DType;
        match $dtype {
            DType::F16 => {
                type $T = half::f16;
                $body
            }
            DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::F64 => {
                type $T = f64;
                $body
            }
            DType::C64 => {
                type $T = num_complex::Complex<f32>;
                $body
            }
            DType::C128 => {
                type $T = num_complex::Complex<f64>;
                $body
            }
            $($others)*
        }
    }};
}
pub(crate) use with_floating;

/// Runs `$body` with `$T` bound to the element type that `$dtype` names.
macro_rules! with_element {
    ($dtype:expr, $T:ident => $body:expr) => {
        $crate::element::with_floating!($dtype, $T => $body;
            DType::U8 => {
                type $T = u8;
                $body
            }
            DType::U16 => {
                type $T = u16;
                $body
            }
            DType::U32 => {
                type $T = u32;
                $body
            }
            DType::U64 => {
                type $T = u64;
                $body
            }
            DType::I8 => {
                type $T = i8;
                $body
            }
            DType::I16 => {
                type $T = i16;
                $body
            }
            DType::I32 => {
                type $T = i32;
                $body
            }
            DType::I64 => {
                type $T = i64;
                $body
            }
        )
    };
}
pub(crate) use with_element;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_converts_exactly() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            for (ours, theirs) in [
                (half.to_complex().re, half::f16::to_f64(half)),
                (brain.to_complex().re, half::bf16::to_f64(brain)),
            ] {
                let both_nan = ours.is_nan() && theirs.is_nan();
                assert!(both_nan || ours.to_bits() == theirs.to_bits(), "{bits:#06x}");
            }
        }
    }
}
