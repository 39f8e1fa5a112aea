// Amplitude encoding: x / norm(x), zero-padded to 2^n.
//
// Squares are summed in double for every type. Rows up to ROW_MAX amplitudes take one block: a
// read for the norm, then a second read, which the caches serve, to scale. Longer rows take two
// kernels: the sums of squares of their chunks, then the scaling, whose blocks add the sums up in
// a fixed order. No floating-point atomics: results are the same from run to run.

#include "common.cuh"

namespace qdp {

struct AmplitudeArgs : Args {
    double* partials;  // sums of squares of the chunks of long rows
    uint64_t chunk;    // amplitudes per chunk
};

// 2^-960; see qdp-core/src/encoding/amplitude.rs.
__device__ const double MIN_NORM_SQUARED = 1.0261342003245941e-289;

constexpr int MAX_WARPS = 32;

// Sum over the block, the same in every thread. Fixed order.
__device__ double block_sum(double value) {
    __shared__ double warps[MAX_WARPS];
    for (int offset = 16; offset > 0; offset >>= 1) {
        value += __shfl_xor_sync(0xffffffff, value, offset);
    }
    const int warp = threadIdx.x / 32;
    const int count = (blockDim.x + 31) / 32;
    if (threadIdx.x % 32 == 0) warps[warp] = value;
    __syncthreads();
    double sum = 0.0;
    for (int w = 0; w < count; ++w) sum += warps[w];
    __syncthreads();
    return sum;
}

// Sum of squares of a part of a row, over the block. A non-finite value is looked for only where
// the sum shows that there may be one.
template <class T>
__device__ double sum_of_squares(const Args& args, uint64_t row, uint64_t begin, uint64_t end) {
    // Four independent sums: one chain of additions would wait for its own latency.
    double sum[4] = {0.0, 0.0, 0.0, 0.0};
    const uint64_t step = blockDim.x;
    uint64_t i = begin + threadIdx.x;
    for (; i + 3 * step < end; i += 4 * step) {
        for (int u = 0; u < 4; ++u) {
            const Complex<double> z = to_complex(load<T>(args, row, i + u * step));
            sum[u] += z.re * z.re + z.im * z.im;
        }
    }
    for (; i < end; i += step) {
        const Complex<double> z = to_complex(load<T>(args, row, i));
        sum[0] += z.re * z.re + z.im * z.im;
    }
    const double total = block_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (!isfinite(total)) {
        for (uint64_t j = begin + threadIdx.x; j < end; j += step) {
            const Complex<double> z = to_complex(load<T>(args, row, j));
            const double bad = isfinite(z.re) ? z.im : z.re;
            if (!isfinite(bad)) {
                report(args, row, j, reason_not_finite(bad));
                break;
            }
        }
    }
    return total;
}

// The norm, or NaN after reporting why there is none. A position of `features` says that the
// row as a whole is bad; it sorts behind a bad value in the row.
__device__ double norm(const Args& args, uint64_t row, double sum, bool reporter) {
    if (isfinite(sum) && sum >= MIN_NORM_SQUARED) return sqrt(sum);
    if (reporter && !isnan(sum)) {
        report(args, row, args.features, isinf(sum) ? NORM_OVERFLOW : ZERO_NORM);
    }
    return not_a_number<double>().re;
}

// z / norm. The product's rounding in double disappears in the rounding to float.
template <class R>
__device__ __forceinline__ Complex<R> quotient(Complex<double> z, double norm, double inverse) {
    if constexpr (sizeof(R) == sizeof(double)) {
        return {z.re / norm, z.im / norm};
    } else {
        return round_to<R>(z * inverse);
    }
}

template <class T, class R>
__device__ void scale_part(const Args& args, uint64_t row, uint64_t begin, uint64_t end,
                           double norm) {
    Complex<R>* out = output_row<R>(args, row);
    const double inverse = 1.0 / norm;
    const Complex<R> padding = isnan(norm) ? not_a_number<R>() : Complex<R>{R(0), R(0)};
    for (uint64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        if (i < args.features) {
            const Complex<double> z = to_complex(load<T>(args, row, i));
            // A bad row is NaN throughout, in real and imaginary part, whatever is in it.
            out[i] = isnan(norm) ? padding : quotient<R>(z, norm, inverse);
        } else {
            out[i] = padding;
        }
    }
}

template <class T, class R>
__device__ void amplitude_row(const Args& args) {
    const uint64_t dim = uint64_t(1) << args.num_qubits;
    for (uint64_t row = blockIdx.x; row < args.batch; row += gridDim.x) {
        const double sum = sum_of_squares<T>(args, row, 0, args.features);
        const double norm = qdp::norm(args, row, sum, threadIdx.x == 0);
        scale_part<T, R>(args, row, 0, dim, norm);
    }
}

template <class T>
__device__ void amplitude_norm(const AmplitudeArgs& args) {
    const uint64_t chunks = (uint64_t(1) << args.num_qubits) / args.chunk;
    for (uint64_t part = blockIdx.x; part < args.batch * chunks; part += gridDim.x) {
        const uint64_t row = part / chunks;
        const uint64_t begin = min(part % chunks * args.chunk, args.features);
        const uint64_t end = min(begin + args.chunk, args.features);
        const double sum = sum_of_squares<T>(args, row, begin, end);
        if (threadIdx.x == 0) args.partials[part] = sum;
    }
}

template <class T, class R>
__device__ void amplitude_scale(const AmplitudeArgs& args) {
    const uint64_t chunks = (uint64_t(1) << args.num_qubits) / args.chunk;
    for (uint64_t part = blockIdx.x; part < args.batch * chunks; part += gridDim.x) {
        const uint64_t row = part / chunks;
        const uint64_t chunk = part % chunks;
        double sum = 0.0;
        for (uint64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
            sum += args.partials[row * chunks + c];
        }
        sum = block_sum(sum);
        const double norm = qdp::norm(args, row, sum, chunk == 0 && threadIdx.x == 0);
        scale_part<T, R>(args, row, chunk * args.chunk, (chunk + 1) * args.chunk, norm);
    }
}

}  // namespace qdp

#define QDP_AMPLITUDE(T, NAME)                                                                  \
    extern "C" __global__ void __launch_bounds__(1024)                                          \
        qdp_amplitude_row_##NAME##_c64(const __grid_constant__ qdp::AmplitudeArgs args) {                \
        qdp::wait_for_previous();                                                             \
        qdp::amplitude_row<T, float>(args);                                                     \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(1024)                                          \
        qdp_amplitude_row_##NAME##_c128(const __grid_constant__ qdp::AmplitudeArgs args) {               \
        qdp::wait_for_previous();                                                             \
        qdp::amplitude_row<T, double>(args);                                                    \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(512)                                           \
        qdp_amplitude_norm_##NAME(const __grid_constant__ qdp::AmplitudeArgs args) {                     \
        qdp::wait_for_previous();                                                             \
        qdp::amplitude_norm<T>(args);                                                           \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(512)                                           \
        qdp_amplitude_scale_##NAME##_c64(const __grid_constant__ qdp::AmplitudeArgs args) {              \
        qdp::wait_for_previous();                                                             \
        qdp::amplitude_scale<T, float>(args);                                                   \
    }                                                                                           \
    extern "C" __global__ void __launch_bounds__(512)                                           \
        qdp_amplitude_scale_##NAME##_c128(const __grid_constant__ qdp::AmplitudeArgs args) {             \
        qdp::wait_for_previous();                                                             \
        qdp::amplitude_scale<T, double>(args);                                                  \
    }

QDP_AMPLITUDE(uint8_t, u8)
QDP_AMPLITUDE(uint16_t, u16)
QDP_AMPLITUDE(uint32_t, u32)
QDP_AMPLITUDE(unsigned long long, u64)
QDP_AMPLITUDE(int8_t, i8)
QDP_AMPLITUDE(int16_t, i16)
QDP_AMPLITUDE(int32_t, i32)
QDP_AMPLITUDE(long long, i64)
QDP_AMPLITUDE(__half, f16)
QDP_AMPLITUDE(__nv_bfloat16, bf16)
QDP_AMPLITUDE(float, f32)
QDP_AMPLITUDE(double, f64)
QDP_AMPLITUDE(qdp::Complex<float>, c64)
QDP_AMPLITUDE(qdp::Complex<double>, c128)
