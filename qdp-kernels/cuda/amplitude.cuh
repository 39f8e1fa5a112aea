// What the kernels of amplitude encoding share: reading, scaling and storing a part of a row, and
// the inverse of a norm.
#pragma once

#include <cuda/annotated_ptr>

#include "common.cuh"
#include "team.cuh"

// Every element type of an input and its part of a kernel's name.
#define QDP_FOR_ELEMENTS(KERNELS) \
    KERNELS(uint8_t, u8)                 \
    KERNELS(uint16_t, u16)               \
    KERNELS(uint32_t, u32)               \
    KERNELS(unsigned long long, u64)     \
    KERNELS(int8_t, i8)                  \
    KERNELS(int16_t, i16)                \
    KERNELS(int32_t, i32)                \
    KERNELS(long long, i64)              \
    KERNELS(__half, f16)                 \
    KERNELS(__nv_bfloat16, bf16)         \
    KERNELS(float, f32)                  \
    KERNELS(double, f64)                 \
    KERNELS(qdp::Complex<float>, c64)    \
    KERNELS(qdp::Complex<double>, c128)

namespace qdp {

// 2^-960; see qdp-core/src/encoding/amplitude.rs.
__device__ const double MIN_NORM_SQUARED = 1.0261342003245941e-289;

// Mirrored and explained in qdp-core/src/cuda/kernels/amplitude.rs.
constexpr uint32_t MAX_UNITS = 8;       // of a thread

// Amplitudes that fill a store of 16 bytes.
template <class R>
constexpr uint32_t UNIT = 16 / sizeof(Complex<R>);

// The values of as many, aligned so that they are read at once.
template <class T, class R>
struct alignas(UNIT<R> * sizeof(T) < 16 ? UNIT<R> * sizeof(T) : 16) Unit {
    T x[UNIT<R>];
};

// What of a row is read is kept in the L2 cache until it is read again, and no longer.
enum class Read { ONCE, FIRST, AGAIN };

// Makes the compiler load all units before it converts one: it would else convert each where it is
// loaded, and wait for it before the next load starts.
template <class T, class R>
__device__ __forceinline__ void settle(Unit<T, R> (&units)[MAX_UNITS]) {
    constexpr uint32_t WORDS = (sizeof(Unit<T, R>) + 3) / 4;
#pragma unroll
    for (uint32_t u = 0; u < MAX_UNITS; ++u) {
        uint32_t words[WORDS] = {};
        memcpy(words, &units[u], sizeof(units[u]));
        for (uint32_t w = 0; w < WORDS; ++w) asm volatile("" : "+r"(words[w]));
        memcpy(&units[u], words, sizeof(units[u]));
    }
}

// Reads a thread's units of a row of `features` values: those at `first`, `first + step` and so on,
// with zeros behind the features. `whole` says that all are there and aligned. What describes the
// row is taken by reference: it is then read where it is used, and holds no registers before.
template <Read READ, class T, class R>
__device__ __forceinline__ void load_units(Unit<T, R> (&units)[MAX_UNITS], const T* in,
                                           const int64_t& stride, const uint64_t& features,
                                           const uint64_t& first, const uint32_t& step,
                                           bool whole) {
    if (whole) {
        const T* from = in + first;
        if constexpr (READ == Read::FIRST) {
            from = cuda::associate_access_property(from, cuda::access_property::persisting());
        } else if constexpr (READ == Read::AGAIN) {
            from = cuda::associate_access_property(from, cuda::access_property::streaming());
        }
#pragma unroll
        for (uint32_t u = 0; u < MAX_UNITS; ++u) {
            units[u] = *reinterpret_cast<const Unit<T, R>*>(from + u * step);
        }
    } else {
        const bool aligned =
            stride == 1 && reinterpret_cast<uintptr_t>(in) % alignof(Unit<T, R>) == 0;
#pragma unroll
        for (uint32_t u = 0; u < MAX_UNITS; ++u) {
            const uint64_t i = first + u * step;
            units[u] = {};
            if (aligned && i + UNIT<R> <= features) {
                units[u] = *reinterpret_cast<const Unit<T, R>*>(in + i);
            } else {
#pragma unroll
                for (uint32_t k = 0; k < UNIT<R>; ++k) {
                    if (i + k >= features) break;
                    units[u].x[k] = in[static_cast<int64_t>(i + k) * stride];
                }
            }
        }
    }
}

// What a thread has of a row: the units at `first`, `first + step` and so on.
template <class T, class R>
struct Part {
    const Args& args;
    uint64_t row, first;
    uint32_t step;
    Unit<T, R> units[MAX_UNITS];

    __device__ __forceinline__ Part(const Args& args, uint64_t row, uint64_t first, uint32_t step)
        : args(args), row(row), first(first), step(step) {}

    // Whether all rows of input and output are made of aligned units, as many as the threads take.
    __device__ __forceinline__ bool whole() const {
        const uint64_t dim = uint64_t(1) << args.num_qubits;
        const bool aligned =
            reinterpret_cast<uintptr_t>(args.input) % alignof(Unit<T, R>) == 0 &&
            reinterpret_cast<uintptr_t>(args.output) % 16 == 0 &&
            (args.row_stride | args.output_stride) % UNIT<R> == 0;
        return aligned && args.col_stride == 1 && args.features == dim && dim >= MAX_UNITS * step;
    }

    // With zeros behind the features.
    template <Read READ>
    __device__ __forceinline__ void load() {
        const T* const in =
            static_cast<const T*>(args.input) + static_cast<int64_t>(row) * args.row_stride;
        load_units<READ>(units, in, args.col_stride, args.features, first, step, whole());
        settle(units);
    }

    __device__ __forceinline__ double sum_of_squares() const {
        double sum[2] = {0.0, 0.0};
#pragma unroll
        for (uint32_t u = 0; u < MAX_UNITS; ++u) {
#pragma unroll
            for (uint32_t k = 0; k < UNIT<R>; ++k) {
                const Complex<double> z = to_complex(units[u].x[k]);
                sum[(u * UNIT<R> + k) % 2] += z.re * z.re + z.im * z.im;
            }
        }
        return sum[0] + sum[1];
    }

    // Scales and stores. The inverse of a bad row's norm is NaN, and what it multiplies becomes
    // NaN in real and imaginary part. The product's rounding in double disappears in float's.
    __device__ __forceinline__ void store(double inverse) const {
        const uint64_t dim = uint64_t(1) << args.num_qubits;
        Complex<R>* const out = output_row<R>(args, row) + first;
        const bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
        const auto store_unit = [&](uint32_t u, bool together) {
            Complex<R> z[UNIT<R>];
#pragma unroll
            for (uint32_t k = 0; k < UNIT<R>; ++k) {
                z[k] = round_to<R>(to_complex(units[u].x[k]) * inverse);
            }
            if (together) {
                float4 bytes;
                memcpy(&bytes, z, sizeof(bytes));
                __stcs(reinterpret_cast<float4*>(out + u * step), bytes);
            } else {
#pragma unroll
                for (uint32_t k = 0; k < UNIT<R>; ++k) out[u * step + k] = z[k];
            }
        };
        if (whole()) {
#pragma unroll
            for (uint32_t u = 0; u < MAX_UNITS; ++u) store_unit(u, true);
        } else {
#pragma unroll
            for (uint32_t u = 0; u < MAX_UNITS; ++u) {
                if (first + u * step < dim) store_unit(u, aligned);
            }
        }
    }

    // Reports the first value that is not finite.
    __device__ void report_bad() const {
#pragma unroll 1
        for (uint32_t j = 0; j < MAX_UNITS * UNIT<R>; ++j) {
            const uint64_t i = first + j / UNIT<R> * step + j % UNIT<R>;
            if (i >= args.features) break;
            const Complex<double> z = to_complex(qdp::load<T>(args, row, i));
            const double bad = isfinite(z.re) ? z.im : z.re;
            if (!isfinite(bad)) {
                report(args, row, i, reason_not_finite(bad));
                break;
            }
        }
    }
};

// 1 / norm, or NaN where there is none; the reporter says why. A position of `features` says that
// the row as a whole is bad; it sorts behind a bad value in the row.
__device__ inline double inverse_norm(const Args& args, uint64_t row, double sum, bool reporter) {
    if (isfinite(sum) && sum >= MIN_NORM_SQUARED) return rsqrt(sum);
    if (reporter && !isnan(sum)) {
        report(args, row, args.features, isinf(sum) ? NORM_OVERFLOW : ZERO_NORM);
    }
    return not_a_number<double>().re;
}

}  // namespace qdp
