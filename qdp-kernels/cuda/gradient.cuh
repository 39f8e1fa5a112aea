// What the gradients' kernels share: their arguments, and reading and writing what they name.
#pragma once

#include "common.cuh"

namespace qdp {

// The gradient of a loss by the states, as it lies. Mirrored, as is GradientArgs, in
// qdp-core/src/cuda/kernels/gradient/mod.rs.
struct Cotangent {
    const void* values;  // complex, in the precision of the kernel
    int64_t row_stride;  // in amplitudes
    int64_t col_stride;
};

// `input` are the features, `output` their gradients in the same type, `output_stride` of its
// elements between rows. Nothing is reported: what has no state gets a gradient of NaN.
struct GradientArgs : Args {
    Cotangent cotangent;
};

// Writes the gradient by a real feature.
__device__ __forceinline__ void store_real(const Args& args, uint64_t row, uint64_t feature,
                                           double value) {
    const uint64_t at = row * args.output_stride + feature;
    switch (static_cast<DType>(args.dtype)) {
        case DType::F16: static_cast<__half*>(args.output)[at] = __double2half(value); break;
        case DType::BF16:
            static_cast<__nv_bfloat16*>(args.output)[at] = __double2bfloat16(value);
            break;
        case DType::F32: static_cast<float*>(args.output)[at] = static_cast<float>(value); break;
        case DType::F64: static_cast<double*>(args.output)[at] = value; break;
        default: break;  // other types are refused on the host
    }
}

}  // namespace qdp
