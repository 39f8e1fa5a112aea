//! Sines and cosines that a loop over a slice vectorises: no branch, no table, no call.
//!
//! An argument is reduced to within an eighth of a turn of a multiple of a quarter turn; there, two
//! polynomials (minimax in the square of the argument) are within a rounding of sine and cosine.

use crate::element::Real;
use crate::encoding::diagonal::Turns;
use std::f64::consts::{FRAC_2_PI, PI};

/// A real type with a cosine and a sine of its own precision.
pub(super) trait Trig: Real {
    /// `(cos, sin)` of a phase in turns.
    fn cis(turns: Turns) -> (Self, Self);
}

impl Trig for f64 {
    #[inline(always)]
    fn cis(turns: Turns) -> (f64, f64) {
        // Shifted by an eighth, the two top bits count quarter turns and the others the rest.
        let shifted = turns.wrapping_add(1 << 61);
        let rest = shifted & ((1 << 62) - 1);
        // Exact in two halves. Integers below 2^52 are converted by writing them into the mantissa
        // of 2^52, which every vector unit can do.
        let high = f64::from_bits(MANTISSA | rest >> 32) - (TWO_52 + (1u64 << 29) as f64);
        let low = f64::from_bits(MANTISSA | rest & 0xffff_ffff) - TWO_52;
        let radians = (high * (1u64 << 32) as f64 + low) * (PI / (1u64 << 63) as f64);
        quarter(shifted >> 62, polynomials(radians))
    }
}

impl Trig for f32 {
    #[inline(always)]
    fn cis(turns: Turns) -> (f32, f32) {
        let shifted = ((turns >> 32) as u32).wrapping_add(1 << 29);
        let rest = (shifted & ((1 << 30) - 1)) as i32 - (1 << 29);
        let r = rest as f32 * (PI / (1u64 << 31) as f64) as f32;
        let z = r * r;
        let sin = r + r * z * (-0.166_666_55 + z * (8.332_178e-3 + z * -1.951_723_5e-4));
        let cos =
            1.0 - 0.5 * z + z * z * (0.041_666_647 + z * (-1.388_736_7e-3 + z * 2.443_838e-5));
        let quadrant = shifted >> 30;
        let swap = (quadrant & 1).wrapping_neg() & (sin.to_bits() ^ cos.to_bits());
        (
            f32::from_bits(cos.to_bits() ^ swap ^ (quadrant.wrapping_add(1) & 2) << 30),
            f32::from_bits(sin.to_bits() ^ swap ^ (quadrant & 2) << 30),
        )
    }
}

const TWO_52: f64 = (1u64 << 52) as f64;
const MANTISSA: u64 = TWO_52.to_bits();

/// Above this the parts of pi/2 in [`cos_sin`] leave too few bits.
const LARGE: f64 = 1e6;

/// Cosine and sine of every `x` times `scale`, in radians.
#[inline(always)]
pub(super) fn cos_sin(x: &[f64], scale: f64, cos: &mut [f64], sin: &mut [f64]) {
    let mut large = false;
    for ((&x, cos), sin) in x.iter().zip(&mut *cos).zip(&mut *sin) {
        let x = x * scale;
        large |= x.abs() > LARGE;
        (*cos, *sin) = small_cos_sin(x);
    }
    if large {
        for ((&x, cos), sin) in x.iter().zip(cos).zip(sin) {
            if (x * scale).abs() > LARGE {
                (*sin, *cos) = (x * scale).sin_cos();
            }
        }
    }
}

#[inline(always)]
fn small_cos_sin(x: f64) -> (f64, f64) {
    // pi/2 in parts of 33, 33 and 53 bits: a count of quarter turns below 2^20 times one of the
    // first two is exact.
    const PARTS: [f64; 3] =
        [1.570_796_326_734_125_6, 6.077_100_506_303_966e-11, 2.022_266_248_795_950_6e-21];
    // Added to a small number, this rounds it to an integer, found in the lowest bits of the sum.
    const ROUND: f64 = 1.5 * TWO_52;
    let sum = x * FRAC_2_PI + ROUND;
    let quarters = sum - ROUND;
    let rest = x - quarters * PARTS[0] - quarters * PARTS[1] - quarters * PARTS[2];
    quarter(sum.to_bits(), polynomials(rest))
}

/// Cosine and sine of `r` radians, up to an eighth of a turn.
#[inline(always)]
fn polynomials(r: f64) -> (f64, f64) {
    const SIN: [f64; 6] = [
        -0.166_666_666_666_666_32,
        8.333_333_333_322_414e-3,
        -1.984_126_982_980_780_4e-4,
        2.755_731_369_191_741_5e-6,
        -2.505_075_811_523_628e-8,
        1.589_679_565_417_059e-10,
    ];
    const COS: [f64; 6] = [
        0.041_666_666_666_666_6,
        -1.388_888_888_887_412_4e-3,
        2.480_158_728_948_218e-5,
        -2.755_731_435_233_123_3e-7,
        2.087_572_327_295_499_5e-9,
        -1.135_964_778_707_956_9e-11,
    ];
    let z = r * r;
    let horner = |c: [f64; 6]| c[0] + z * (c[1] + z * (c[2] + z * (c[3] + z * (c[4] + z * c[5]))));
    (1.0 - (0.5 * z - z * z * horner(COS)), r + r * z * horner(SIN))
}

/// Adds a number of quarter turns, of which the two lowest bits count, to an angle.
#[inline(always)]
fn quarter(count: u64, (cos, sin): (f64, f64)) -> (f64, f64) {
    let swap = (count & 1).wrapping_neg() & (cos.to_bits() ^ sin.to_bits());
    (
        f64::from_bits(cos.to_bits() ^ swap ^ (count.wrapping_add(1) & 2) << 62),
        f64::from_bits(sin.to_bits() ^ swap ^ (count & 2) << 62),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::diagonal::{radians, turns};

    #[test]
    fn phases_in_turns_have_their_sine_and_cosine() {
        for i in 0..10_000u64 {
            let phase = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i << 61;
            let (sin, cos) = radians(phase).sin_cos();
            let double = f64::cis(phase);
            assert!((double.0 - cos).abs() < 5e-16 && (double.1 - sin).abs() < 5e-16, "{phase}");
            let single = f32::cis(phase);
            assert!((f64::from(single.0) - cos).abs() < 1.2e-7, "{phase}");
            assert!((f64::from(single.1) - sin).abs() < 1.2e-7, "{phase}");
        }
        let (cos, sin) = f64::cis(0);
        assert!((cos - 1.0).abs() + sin.abs() < 1e-16);
        assert!((f64::cis(turns(PI)).0 + 1.0).abs() < 1e-16);
    }

    #[test]
    fn angles_of_every_size_have_their_sine_and_cosine() {
        let mut x: Vec<f64> = (-4000..4000).map(|i| f64::from(i) * 0.137).collect();
        x.extend([0.0, 1e-300, -1e-9, 1e3, 123_456.789, -999_999.0, PI, PI / 2.0, 355.0, 710.0]);
        let check = |x: &[f64]| {
            let (mut cos, mut sin) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            cos_sin(x, 0.5, &mut cos, &mut sin);
            for ((&x, cos), sin) in x.iter().zip(cos).zip(sin) {
                let want = (0.5 * x).sin_cos();
                let close = |got: f64, want: f64| (got - want).abs() <= 4e-16 * want.abs();
                assert!(close(sin, want.0) && close(cos, want.1), "{x}: {cos} {sin} {want:?}");
            }
        };
        check(&x);
        x.extend([1e7, -1e18, 1e300]);
        check(&x);
    }
}
