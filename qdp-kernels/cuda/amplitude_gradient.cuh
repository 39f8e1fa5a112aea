// What the kernels of amplitude encoding's gradient share: their arguments, a row's sums, and what
// they make of the features and the cotangent.
#pragma once

#include "amplitude.cuh"
#include "gradient.cuh"

namespace qdp {

// The two sums of a row or of its part.
struct RowSums {
    double square, product;
};

struct AmplitudeGradientArgs : GradientArgs {
    uint32_t group;      // threads of a short row, a power of two
    uint32_t slots;      // of a ring
    uint32_t teams;      // 1 or 2, into which a ring's writers are split
    uint32_t total_lag;  // how many chunks behind its last one a long row is added up
    uint64_t write_lag;  // how many chunks behind the sums gradients of long rows are written
    uint64_t chunks;     // of a long row
    Slot* sums;          // [chunk][square, product] of long rows, cleared before
    Slot* totals;        // [row][square, product], behind the sums
};

template <class T>
__device__ __forceinline__ T from_complex(Complex<double> z) {
    return static_cast<T>(z.re);
}
template <>
__device__ __forceinline__ __half from_complex(Complex<double> z) {
    return __double2half(z.re);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_complex(Complex<double> z) {
    return __double2bfloat16(z.re);
}
template <>
__device__ __forceinline__ Complex<float> from_complex(Complex<double> z) {
    return round_to<float>(z);
}
template <>
__device__ __forceinline__ Complex<double> from_complex(Complex<double> z) {
    return z;
}

template <class T>
constexpr bool IS_COMPLEX = false;
template <class R>
constexpr bool IS_COMPLEX<Complex<R>> = true;

template <class T, class R>
__device__ __forceinline__ void add(RowSums& sums, const Unit<T, R>& x,
                                    const Unit<Complex<R>, R>& g) {
#pragma unroll
    for (uint32_t k = 0; k < UNIT<R>; ++k) {
        const Complex<double> a = to_complex(x.x[k]), b = to_complex(g.x[k]);
        sums.square += a.re * a.re;
        sums.product += a.re * b.re;
        if (IS_COMPLEX<T>) {
            sums.square += a.im * a.im;
            sums.product += a.im * b.im;
        }
    }
}

// What a row's sums make of its features and cotangent: (g - x along) inverse. The inverse of a bad
// row's norm is NaN, and so is all that it multiplies.
struct RowGradient {
    double inverse, along;

    __device__ __forceinline__ explicit RowGradient(RowSums sums) {
        const bool valid = isfinite(sums.square) && sums.square >= MIN_NORM_SQUARED;
        inverse = valid ? rsqrt(sums.square) : not_a_number<double>().re;
        along = sums.product * inverse * inverse;
    }

    template <class T, class R>
    __device__ __forceinline__ Unit<T, R> of(const Unit<T, R>& x,
                                             const Unit<Complex<R>, R>& g) const {
        Unit<T, R> unit;
#pragma unroll
        for (uint32_t k = 0; k < UNIT<R>; ++k) {
            const Complex<double> a = to_complex(x.x[k]), b = to_complex(g.x[k]);
            unit.x[k] = from_complex<T>((b - a * along) * inverse);
        }
        return unit;
    }
};

// As `publish` and `await`, of two sums, the second of any sign: minus zero stands for zero.
__device__ __forceinline__ void publish(Slot* slots, RowSums sums) {
    publish(slots[0], sums.square);
    publish(slots[1], sums.product == 0.0 ? 0.0 : sums.product);
}
__device__ __forceinline__ RowSums await_both(Slot* slots) {
    return {await(slots[0]), await(slots[1])};
}

}  // namespace qdp
