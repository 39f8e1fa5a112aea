//! Of a product state: with `v_k[b] = sum over i with bit k = b of conj(g_i) times the factors of
//! the other qubits`, the derivative by feature k is `Re(v_k[0] f'_k[0] + v_k[1] f'_k[1])`.
//!
//! The index is cut into low and high bits. One pass over the cotangent contracts it with the
//! table of the high bits, which leaves a vector over the low ones, and with the table of the low
//! bits, which leaves one over the high ones. From such a vector every qubit's sums follow by
//! contracting one bit after another, each time with the product of those below: nothing is ever
//! divided by a factor.

use super::super::parallel::ENCODE;
use super::super::product::{LOW_BITS, fill_table, with_phases};
use super::super::trig::Trig;
use super::super::{PIECE, Within, load_features, reals, reals_mut};
use super::{Rows, add_lanes, contiguous, fill_not_a_number, part_of, to_f64};
use crate::element::{Element, Floating, Real};
use crate::encoding::product::{Factor, Product};
use crate::input::Row;
use multiversion::multiversion;
use num_complex::Complex;

type Pair = [Complex<f64>; 2];

pub(super) fn backward<T: Floating, R: Trig>(product: &Product, rows: Rows<'_, T>)
where
    Complex<R>: Element,
{
    let Rows { input, cotangent, first, gradients, within } = rows;
    let n = input.features();
    let mut x = vec![0.0; gradients.len() * n];
    let mut finite = Vec::with_capacity(gradients.len());
    for (sample, x) in (first..).zip(x.chunks_exact_mut(n)) {
        finite.push(load_features(input.row::<T>(sample), input.affine(), x));
        if product.big_endian {
            x.reverse();
        }
    }
    let (factors, slopes) = factors_and_slopes(product.factor, &x);
    let mut contraction = Contraction::<R>::new(n);
    let mut left_out = vec![[Complex::new(0.0, 0.0); 2]; n];
    for (row, gradient) in gradients.enumerate() {
        if !finite[row] {
            fill_not_a_number(gradient);
            continue;
        }
        let range = row * n..(row + 1) * n;
        let g = cotangent.row::<Complex<R>>(first + row);
        contraction.run(&factors[range.clone()], g, within, &mut left_out);
        for (bit, (v, slope)) in left_out.iter().zip(&slopes[range]).enumerate() {
            let feature = if product.big_endian { n - 1 - bit } else { bit };
            let derivative = (v[0] * slope[0]).re + (v[1] * slope[1]).re;
            gradient[feature] = T::from_complex(derivative.into());
        }
    }
}

/// The factor of every feature, and its derivative.
#[multiversion(targets("x86_64+avx2+fma"))]
fn factors_and_slopes(factor: Factor, x: &[f64]) -> (Vec<Pair>, Vec<Pair>) {
    let each =
        |x, phase, common| (factor.combine(x, phase, common), factor.derivative(phase, common));
    with_phases(factor, x, each).into_iter().unzip()
}

/// The tables and sums of one sample at a time.
struct Contraction<R> {
    low_bits: usize,
    low: Vec<Complex<R>>,
    /// The low table times -i, conjugated: see [`contract_rows`].
    turned: Vec<Complex<R>>,
    high: Vec<Complex<R>>,
    /// Over the high bits: the cotangent contracted with the low table.
    by_high: Vec<Complex<f64>>,
    /// Of each part of the state, over the low bits: it contracted with the high table.
    by_low: Vec<Complex<f64>>,
    scratch: Vec<Complex<f64>>,
}

impl<R: Real> Contraction<R>
where
    Complex<R>: Element,
{
    fn new(n: usize) -> Self {
        // Two small tables cost less than one of the whole state.
        let low_bits = n.div_ceil(2).min(LOW_BITS);
        let parts = (1 << n) / part_of(1 << n).min(1 << n);
        let zero = Complex::new(0.0, 0.0);
        Self {
            low_bits,
            low: Vec::new(),
            turned: Vec::new(),
            high: Vec::new(),
            by_high: vec![zero; 1 << (n - low_bits)],
            by_low: vec![zero; parts << low_bits],
            scratch: Vec::new(),
        }
    }

    /// Sums over the cotangent `g` with the factors of all qubits but one, for each and both values
    /// of its bit.
    fn run(
        &mut self,
        factors: &[Pair],
        g: Row<'_, Complex<R>>,
        within: Within,
        left_out: &mut [Pair],
    ) {
        let Self { low_bits, low, turned, high, by_high, by_low, scratch } = self;
        let (low_factors, high_factors) = factors.split_at(*low_bits);
        fill_table(low_factors, scratch, low);
        fill_table(high_factors, scratch, high);
        turned.clear();
        turned.extend(low.iter().map(|z| Complex::new(z.im, -z.re)));

        let part = part_of(g.len()).min(g.len());
        let parts = by_high.chunks_mut(part >> *low_bits).zip(by_low.chunks_mut(1 << *low_bits));
        let tables = Tables { low, turned, high };
        ENCODE.for_each(within == Within::Pool, parts.enumerate(), |(p, (by_high, by_low))| {
            tables.contract_part(g, p * part, by_high, by_low);
        });
        let (sum, others) = by_low.split_at_mut(1 << *low_bits);
        for other in others.chunks_exact(1 << *low_bits) {
            for (sum, other) in sum.iter_mut().zip(other) {
                *sum += other;
            }
        }
        let (low_left_out, high_left_out) = left_out.split_at_mut(*low_bits);
        leave_out(sum, low_factors, scratch, low_left_out);
        leave_out(by_high, high_factors, scratch, high_left_out);
    }
}

#[derive(Clone, Copy)]
struct Tables<'a, R> {
    low: &'a [Complex<R>],
    turned: &'a [Complex<R>],
    high: &'a [Complex<R>],
}

impl<R: Real> Tables<'_, R>
where
    Complex<R>: Element,
{
    /// Contracts the part of `g` from `first` on, as long as `by_high` says. Within a piece sums
    /// are kept in the cotangent's precision, beyond it in double.
    fn contract_part(
        &self,
        g: Row<'_, Complex<R>>,
        first: usize,
        by_high: &mut [Complex<f64>],
        by_low: &mut [Complex<f64>],
    ) {
        let len = self.low.len();
        let zero = Complex::new(R::zero(), R::zero());
        let mut sums = (vec![zero; len], vec![zero; len]);
        let mut memory = Vec::new();
        by_low.fill(Complex::new(0.0, 0.0));
        for (p, by_high) in by_high.chunks_mut((PIECE / len).max(1)).enumerate() {
            let first = first + p * PIECE;
            let g = contiguous(g.range(first..first + by_high.len() * len), &mut memory);
            let tables = Tables { high: &self.high[first / len..], ..*self };
            contract_piece(g, tables, &mut sums, by_high);
            for ((by_low, a), b) in by_low.iter_mut().zip(&mut sums.0).zip(&mut sums.1) {
                let [re, im, re_b, im_b] = [a.re, a.im, b.re, b.im].map(to_f64);
                *by_low += Complex::new(re + im_b, re_b - im);
                (*a, *b) = (zero, zero);
            }
        }
    }
}

type Sums<R> = (Vec<Complex<R>>, Vec<Complex<R>>);

#[multiversion(targets("x86_64+avx2+fma"))]
fn contract_piece<R: Real>(
    g: &[Complex<R>],
    Tables { low, turned, high }: Tables<'_, R>,
    sums: &mut Sums<R>,
    by_high: &mut [Complex<f64>],
) {
    let len = low.len();
    let tables = (reals(low), reals(turned));
    let sums = (reals_mut(&mut sums.0), reals_mut(&mut sums.1));
    // Two rows at a time, which share what is loaded and stored of tables and sums.
    let (pairs, rest) = by_high.as_chunks_mut::<2>();
    for (pair, by_high) in pairs.iter_mut().enumerate() {
        let (g, high) = (&g[2 * pair * len..], &high[2 * pair..]);
        let g = [reals(&g[..len]), reals(&g[len..2 * len])];
        contract_rows(g, [high[0], high[1]], tables, (&mut *sums.0, &mut *sums.1), by_high);
    }
    // A row is left only where it is all there is.
    if let [by_high] = rest {
        let by_high = std::array::from_mut(by_high);
        contract_rows([reals(g)], [high[0]], tables, sums, by_high);
    }
}

/// Contracts rows of the cotangent, each of as many values as the low table.
///
/// With values and tables as the reals they consist of, nothing needs to be shuffled. Of the product
/// of conj(g) and the low table, the real part is the sum of products with the table's reals, and
/// the imaginary part of those with the turned table's. Products of g's reals with the two parts of
/// the high table's entry are summed apart, and put together at the end.
#[inline(always)]
fn contract_rows<R: Real, const N: usize>(
    g: [&[R]; N],
    high: [Complex<R>; N],
    tables: (&[R], &[R]),
    sums: (&mut [R], &mut [R]),
    by_high: &mut [Complex<f64>; N],
) {
    // A vector register of AVX2, or what there is.
    let lanes = 32 / size_of::<R>();
    if tables.0.len() < lanes {
        contract_lanes::<R, N, 2>(g, high, tables, sums, by_high);
    } else if lanes == 8 {
        contract_lanes::<R, N, 8>(g, high, tables, sums, by_high);
    } else {
        contract_lanes::<R, N, 4>(g, high, tables, sums, by_high);
    }
}

#[inline(always)]
fn contract_lanes<R: Real, const N: usize, const LANES: usize>(
    g: [&[R]; N],
    high: [Complex<R>; N],
    (low, turned): (&[R], &[R]),
    (by_re, by_im): (&mut [R], &mut [R]),
    by_high: &mut [Complex<f64>; N],
) {
    let zero = R::zero();
    let (mut re, mut im) = ([[zero; LANES]; N], [[zero; LANES]; N]);
    let blocks = low.len() / LANES;
    for block in 0..blocks {
        let at = block * LANES;
        // All loads come before the stores, so that nothing need be known about how slices lie.
        let load = |values: &[R]| {
            let mut lanes = [zero; LANES];
            lanes.copy_from_slice(&values[at..at + LANES]);
            lanes
        };
        let (low, turned) = (load(low), load(turned));
        let (mut sum_re, mut sum_im) = (load(by_re), load(by_im));
        for row in 0..N {
            let g = load(g[row]);
            for lane in 0..LANES {
                re[row][lane] += g[lane] * low[lane];
                im[row][lane] += g[lane] * turned[lane];
                sum_re[lane] += g[lane] * high[row].re;
                sum_im[lane] += g[lane] * high[row].im;
            }
        }
        by_re[at..at + LANES].copy_from_slice(&sum_re);
        by_im[at..at + LANES].copy_from_slice(&sum_im);
    }
    for row in 0..N {
        by_high[row] = Complex::new(add_lanes(&{ re[row] }), add_lanes(&{ im[row] }));
    }
}

/// Of `values` over some bits, for each of them and both of its values the sum with the factors of
/// the others. Overwrites the values.
#[multiversion(targets("x86_64+avx2+fma"))]
fn leave_out(
    values: &mut [Complex<f64>],
    factors: &[Pair],
    scratch: &mut Vec<Complex<f64>>,
    left_out: &mut [Pair],
) {
    // From 2^k on, the products of the factors of the k lowest bits.
    scratch.resize(values.len().max(2), Complex::new(0.0, 0.0));
    scratch[1] = Complex::new(1.0, 0.0);
    for (k, &[zero, one]) in factors.iter().enumerate().take(factors.len().saturating_sub(1)) {
        let half = 1 << k;
        let (below, above) = scratch[half..4 * half].split_at_mut(half);
        let (low, high) = above.split_at_mut(half);
        for ((z, low), high) in below.iter().zip(low).zip(high) {
            *low = z * zero;
            *high = z * one;
        }
    }
    for (k, &[zero, one]) in factors.iter().enumerate().rev() {
        let half = 1 << k;
        let (low, high) = values[..2 * half].split_at_mut(half);
        let mut sums = [Complex::new(0.0, 0.0); 2];
        for ((low, high), z) in low.iter_mut().zip(high).zip(&scratch[half..2 * half]) {
            sums[0] += *low * z;
            sums[1] += *high * z;
            *low = *low * zero + *high * one;
        }
        left_out[k] = sums;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::reals;

    /// Sizes with one row, several, several pieces and several parts, against the definition.
    #[test]
    fn sums_leave_one_factor_out() {
        for n in [1, 2, 3, 5, 9, 15, 17] {
            let wave = |i: usize| Complex::new((i as f64 * 0.7).sin(), (i as f64 * 1.3).cos());
            let g: Vec<_> = (0..1usize << n).map(wave).collect();
            let factors: Vec<Pair> = (0..n).map(|k| [wave(k + 3), wave(2 * k + 9)]).collect();
            let mut got = vec![[Complex::new(0.0, 0.0); 2]; n];
            let input = crate::Input::sample(&g);
            for within in [Within::OneThread, Within::Pool] {
                let row = input.row::<Complex<f64>>(0);
                Contraction::<f64>::new(n).run(&factors, row, within, &mut got);
                for k in 0..n {
                    let mut want = [Complex::new(0.0, 0.0); 2];
                    for (i, g) in g.iter().enumerate() {
                        let others = (0..n).filter(|&j| j != k);
                        let product: Complex<f64> =
                            others.map(|j| factors[j][i >> j & 1]).product();
                        want[i >> k & 1] += g.conj() * product;
                    }
                    let scale = want.map(Complex::norm).iter().sum::<f64>().max(1.0);
                    for (&got, &want) in reals(&got[k]).iter().zip(reals(&want)) {
                        assert!((got - want).abs() < 1e-11 * scale, "n={n} k={k}");
                    }
                }
            }
        }
    }
}
