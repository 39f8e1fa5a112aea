// Stores of 16 bytes: the widest, and the fewest for the bytes.
#pragma once

#include "common.cuh"

namespace qdp {

// A wide store takes 2^WIDE_BITS amplitudes.
template <class R>
constexpr uint32_t WIDE_BITS = sizeof(R) == 4 ? 1 : 0;

// Whether wide stores may go there: a caller's own memory is aligned to 8 bytes only.
template <class R>
__device__ __forceinline__ bool is_wide(const Complex<R>* out) {
    return reinterpret_cast<uintptr_t>(out) % 16 == 0;
}

// What is written is not read again by its kernel, so it is the first to leave the cache.
template <bool WIDE>
__device__ __forceinline__ void store(Complex<float>* out, const Complex<float> (&z)[2]) {
    if (WIDE) {
        __stcs(reinterpret_cast<float4*>(out),
               make_float4(z[0].re, z[0].im, z[1].re, z[1].im));
    } else {
        __stcs(reinterpret_cast<float2*>(out), make_float2(z[0].re, z[0].im));
        __stcs(reinterpret_cast<float2*>(out) + 1, make_float2(z[1].re, z[1].im));
    }
}
template <bool WIDE>
__device__ __forceinline__ void store(Complex<double>* out, const Complex<double> (&z)[1]) {
    if (WIDE) {
        __stcs(reinterpret_cast<double2*>(out), make_double2(z[0].re, z[0].im));
    } else {
        __stcs(reinterpret_cast<double*>(out), z[0].re);
        __stcs(reinterpret_cast<double*>(out) + 1, z[0].im);
    }
}

}  // namespace qdp
