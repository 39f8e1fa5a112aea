// Amplitude encoding of one sample that arrives in chunks, longer than what may lie on the device
// beside its state. Each chunk is written to its place in the result as it is, as complex numbers,
// and leaves its sum of squares; once all are there, they are added up and the row is scaled in
// place: two reads and two writes, of which all but the last chunk's first ones happen while the
// input is on its way.
//
// Sums are taken of parts of a fixed length and added up in a fixed order. Chunks begin where parts
// do: results are the same however the sample is cut.

#include "amplitude.cuh"

namespace qdp {

struct SplitArgs : Args {  // `input` is the chunk, `output` the row, `features` the sample's
    uint64_t sample;       // its index, for the report
    uint64_t first;        // feature of the chunk, a multiple of SPLIT_PART
    uint64_t count;        // features of the chunk
    double* inverse;       // of the norm, once it is known
    double* sums;          // of each part of the sample
};

// Mirrored and explained in qdp-core/src/cuda/kernels/split.rs.
constexpr uint32_t SPLIT_PART = 4096;          // features
constexpr uint32_t SPLIT_THREADS = 256;        // of a block, which takes a part
constexpr uint32_t SPLIT_NORM_THREADS = 1024;  // that add up

// The part at `begin` of `all` features as a row of its own. Behind its features that has zeros:
// where they are fewer than a part has, the sample ends, and the tail of its row begins.
__device__ __forceinline__ Args as_row(const SplitArgs& args, uint64_t begin, uint64_t all) {
    Args row = args;
    row.features = begin < all ? min(uint64_t{SPLIT_PART}, all - begin) : 0;
    row.num_qubits = min(args.num_qubits, static_cast<uint32_t>(__popc(SPLIT_PART - 1)));
    row.row_stride = row.output_stride = 0;
    return row;
}

// Reports the first value of a part that is not finite.
template <class T>
__device__ void report_bad(const SplitArgs& args, const Args& part, uint64_t position) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < part.features; i += SPLIT_THREADS) {
        const Complex<double> z = to_complex(load<T>(part, 0, i));
        const double bad = isfinite(z.re) ? z.im : z.re;
        if (!isfinite(bad)) {
            report(args, args.sample, position + i, reason_not_finite(bad));
            break;
        }
    }
}

// A block takes a part.
template <class T, class R>
__device__ void amplitude_spread(const SplitArgs& args) {
    __shared__ double warps[MAX_WARPS];
    constexpr uint32_t STEP = SPLIT_THREADS * UNIT<R>, TILE = MAX_UNITS * STEP;
    const uint64_t begin = uint64_t{blockIdx.x} * SPLIT_PART;
    Args row = as_row(args, begin, args.count);
    row.input = static_cast<const T*>(args.input) + static_cast<int64_t>(begin) * args.col_stride;
    row.output = output_row<R>(args, 0) + args.first + begin;
    double sum = 0.0;
#pragma unroll 1
    for (uint32_t tile = 0; tile < SPLIT_PART; tile += TILE) {
        Part<T, R> part(row, 0, tile + threadIdx.x * UNIT<R>, STEP);
        part.template load<Read::ONCE>();
        sum += part.sum_of_squares();
        part.store(1.0);
    }
    sum = group_sum(sum, SPLIT_THREADS, warps);
    if (threadIdx.x == 0) args.sums[args.first / SPLIT_PART + blockIdx.x] = sum;
    if (!isfinite(sum)) report_bad<T>(args, row, args.first + begin);
}

// Adds the parts up, in one block.
__device__ inline void amplitude_norm(const SplitArgs& args) {
    __shared__ double warps[MAX_WARPS];
    constexpr uint32_t EACH = 8;  // on their way at once
    const uint64_t parts = (args.features + SPLIT_PART - 1) / SPLIT_PART;
    double sum[EACH] = {};
    for (uint64_t first = threadIdx.x; first < parts; first += EACH * SPLIT_NORM_THREADS) {
#pragma unroll
        for (uint32_t u = 0; u < EACH; ++u) {
            const uint64_t i = first + u * SPLIT_NORM_THREADS;
            if (i < parts) sum[u] += args.sums[i];
        }
    }
#pragma unroll
    for (uint32_t u = 1; u < EACH; ++u) sum[0] += sum[u];
    const double all = group_sum(sum[0], SPLIT_NORM_THREADS, warps);
    if (threadIdx.x == 0) *args.inverse = inverse_norm(args, args.sample, all, true);
}

// A block takes a part, those at the end of the row first: they were written last.
template <class R>
__device__ void amplitude_scale(const SplitArgs& args) {
    constexpr uint32_t STEP = SPLIT_THREADS * UNIT<R>, TILE = MAX_UNITS * STEP;
    const uint64_t begin = uint64_t{gridDim.x - 1 - blockIdx.x} * SPLIT_PART;
    Args row = as_row(args, begin, args.features);
    row.input = row.output = output_row<R>(args, 0) + begin;
    row.col_stride = 1;
    const double inverse = *args.inverse;
#pragma unroll 1
    for (uint32_t tile = 0; tile < SPLIT_PART; tile += TILE) {
        Part<Complex<R>, R> part(row, 0, tile + threadIdx.x * UNIT<R>, STEP);
        part.template load<Read::ONCE>();
        part.store(inverse);
    }
}

}  // namespace qdp

extern "C" __global__ void __launch_bounds__(qdp::SPLIT_NORM_THREADS)
    qdp_amplitude_norm(const __grid_constant__ qdp::SplitArgs args) {
    qdp::wait_for_previous();
    qdp::amplitude_norm(args);
}

#define QDP_SCALE(R, PRECISION)                                           \
    extern "C" __global__ void __launch_bounds__(qdp::SPLIT_THREADS)      \
        qdp_amplitude_scale_##PRECISION(                                  \
            const __grid_constant__ qdp::SplitArgs args) {                \
        qdp::wait_for_previous();                                         \
        qdp::amplitude_scale<R>(args);                                    \
    }

QDP_SCALE(float, c64)
QDP_SCALE(double, c128)

#define QDP_SPREAD(T, NAME)                                               \
    QDP_SPREAD_TO(T, NAME, float, c64)                                    \
    QDP_SPREAD_TO(T, NAME, double, c128)
#define QDP_SPREAD_TO(T, NAME, R, PRECISION)                              \
    extern "C" __global__ void __launch_bounds__(qdp::SPLIT_THREADS)      \
        qdp_amplitude_spread_##NAME##_##PRECISION(                        \
            const __grid_constant__ qdp::SplitArgs args) {                \
        qdp::wait_for_previous();                                         \
        qdp::amplitude_spread<T, R>(args);                                \
    }

QDP_FOR_ELEMENTS(QDP_SPREAD)
