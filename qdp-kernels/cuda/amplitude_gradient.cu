// Gradients by the amplitudes: (g - psi Re<psi, g>) / norm(x), of which a real x takes the real
// part.
//
// A short row and its cotangent are kept in the registers of a group of threads until its two sums
// are known, a longer one in those of a cluster of blocks, where there are clusters, and most that
// are longer still in shared memory: amplitude_ring.cu. Others are cut into chunks, as amplitude.cu
// does: each block sums one and writes the gradient of an earlier one, which the L2 cache still
// holds. Reading all again takes more of that cache's bandwidth than scaling a row does, which is
// why a cluster is worth its waits here. What lies behind the features is not read.
//
// Both sums, of the squares and of Re conj(x) g, are in double and in an order that depends on the
// number of features and how rows lie, not on what else is in the batch.

#include <cooperative_groups.h>

#include "amplitude_gradient.cuh"

namespace qdp {

// Mirrored and explained in qdp-core/src/cuda/kernels/gradient/amplitude.rs.
constexpr uint32_t MAX_GRADIENT_GROUP = 512;
constexpr uint32_t GRADIENT_THREADS = 256;   // of a chunk of a long row
constexpr uint32_t MAX_EACH_GRADIENT = 512;  // chunks of a row that each block adds up for itself

// What a thread has of a row and its cotangent: the units at `first`, `first + step` and so on.
template <class T, class R>
struct GradientPart {
    const GradientArgs& args;
    uint64_t row, first;
    uint32_t step;
    Unit<T, R> x[MAX_UNITS];
    Unit<Complex<R>, R> g[MAX_UNITS];

    __device__ __forceinline__ GradientPart(const GradientArgs& args, uint64_t row, uint64_t first,
                                            uint32_t step)
        : args(args), row(row), first(first), step(step) {}

    // Whether all of the thread's units are there and aligned.
    __device__ __forceinline__ bool whole() const {
        const auto aligned = [](const void* at, size_t to) {
            return reinterpret_cast<uintptr_t>(at) % to == 0;
        };
        return args.col_stride == 1 && args.cotangent.col_stride == 1 &&
               aligned(args.input, alignof(Unit<T, R>)) && aligned(args.cotangent.values, 16) &&
               aligned(args.output, alignof(Unit<T, R>)) &&
               (args.row_stride | args.cotangent.row_stride | args.output_stride) % UNIT<R> == 0 &&
               first + (MAX_UNITS - 1) * step + UNIT<R> <= args.features;
    }

    template <class V>
    static __device__ __forceinline__ const V* row_of(const void* values, uint64_t row,
                                                      int64_t stride) {
        return static_cast<const V*>(values) + static_cast<int64_t>(row) * stride;
    }

    // With zeros behind the features.
    template <Read READ>
    __device__ __forceinline__ void load() {
        const bool all = whole();
        const int64_t x_stride = args.col_stride;
        const T* const xs = row_of<T>(args.input, row, args.row_stride);
        load_units<READ>(x, xs, x_stride, args.features, first, step, all);
        const Cotangent& of = args.cotangent;
        const int64_t g_stride = of.col_stride;
        const Complex<R>* const gs = row_of<Complex<R>>(of.values, row, of.row_stride);
        load_units<READ>(g, gs, g_stride, args.features, first, step, all);
        settle(x);
        settle(g);
    }

    __device__ __forceinline__ RowSums sums() const {
        RowSums sums = {0.0, 0.0};
#pragma unroll
        for (uint32_t u = 0; u < MAX_UNITS; ++u) add(sums, x[u], g[u]);
        return sums;
    }

    __device__ __forceinline__ void store(RowSums sums) const {
        const RowGradient gradient(sums);
        T* const out = static_cast<T*>(args.output) + row * args.output_stride + first;
        const bool all = whole();
        const bool aligned = reinterpret_cast<uintptr_t>(out) % alignof(Unit<T, R>) == 0;
#pragma unroll
        for (uint32_t u = 0; u < MAX_UNITS; ++u) {
            const uint64_t i = first + u * step;
            if (!all && i >= args.features) break;
            const Unit<T, R> unit = gradient.of(x[u], g[u]);
            if (all || (aligned && i + UNIT<R> <= args.features)) {
                *reinterpret_cast<Unit<T, R>*>(out + u * step) = unit;
            } else {
#pragma unroll
                for (uint32_t k = 0; k < UNIT<R>; ++k) {
                    if (i + k < args.features) out[u * step + k] = unit.x[k];
                }
            }
        }
    }
};

__device__ __forceinline__ RowSums group_sums(RowSums sums, uint32_t group,
                                              double (&warps)[2][MAX_WARPS]) {
    return {group_sum(sums.square, group, warps[0]), group_sum(sums.product, group, warps[1])};
}

template <class T, class R>
__device__ void amplitude_gradient_short(const AmplitudeGradientArgs& args) {
    __shared__ double warps[2][MAX_WARPS];
    const uint32_t lane = threadIdx.x & (args.group - 1);
    const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const uint64_t row = thread >> __popc(args.group - 1);
    // Threads beyond the batch take part in the sums: they repeat its last row.
    const bool inside = row < args.batch;
    GradientPart<T, R> part(args, inside ? row : args.batch - 1, lane * UNIT<R>,
                            args.group * UNIT<R>);
    part.template load<Read::ONCE>();
    const RowSums sums = group_sums(part.sums(), args.group, warps);
    // Kept as they are: as doubles they would take more registers than there are.
    settle(part.x);
    settle(part.g);
    if (inside) part.store(sums);
}

// A row to a cluster, whose blocks tell each other their sums.
template <class T, class R>
__device__ void amplitude_gradient_cluster(const AmplitudeGradientArgs& args) {
#if __CUDA_ARCH__ >= 900
    __shared__ double warps[2][MAX_WARPS];
    __shared__ RowSums own, all;
    const auto cluster = cooperative_groups::this_cluster();
    const uint32_t blocks = cluster.num_blocks(), rank = cluster.block_rank();
    const uint64_t row = blockIdx.x / blocks;
    const uint32_t step = blockDim.x * UNIT<R>;
    GradientPart<T, R> part(args, row, rank * MAX_UNITS * step + threadIdx.x * UNIT<R>, step);
    part.template load<Read::ONCE>();
    const RowSums sums = group_sums(part.sums(), blockDim.x, warps);
    settle(part.x);
    settle(part.g);
    if (threadIdx.x == 0) own = sums;
    cluster.sync();
    if (threadIdx.x < 32) {
        RowSums sum = {0.0, 0.0};
        if (threadIdx.x < blocks) sum = *cluster.map_shared_rank(&own, threadIdx.x);
        sum = group_sums(sum, 32, warps);
        if (threadIdx.x == 0) all = sum;
    }
    auto told = cluster.barrier_arrive();  // this block has read the others' sums
    __syncthreads();
    part.store(all);
    cluster.barrier_wait(std::move(told));  // and none ends before the others have
#endif
}

__device__ inline void amplitude_gradient_clear(const AmplitudeGradientArgs& args) {
    Slot* const slot = args.sums + static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (slot < args.totals + 2 * args.batch) *slot = 0;
}

// The sums of a long row, from those of its chunks.
__device__ inline RowSums add_up(Slot* slots, uint64_t chunks, double (&warps)[2][MAX_WARPS]) {
    RowSums sums = {0.0, 0.0};
    const uint32_t group = chunks <= 32 ? 32 : GRADIENT_THREADS;
    for (uint64_t chunk = threadIdx.x % group; chunk < chunks; chunk += group) {
        const RowSums of_chunk = await_both(slots + 2 * chunk);
        sums.square += of_chunk.square;
        sums.product += of_chunk.product;
    }
    return group_sums(sums, group, warps);
}

// A block sums chunk `summed`, adds the row up that ends at chunk `totalled`, and writes the
// gradient of chunk `written`. Blocks with lower indices make what it waits for, or it does itself.
template <class T, class R>
__device__ void amplitude_gradient_long(const AmplitudeGradientArgs& args) {
    __shared__ double warps[2][2][MAX_WARPS];
    constexpr uint32_t STEP = GRADIENT_THREADS * UNIT<R>, CHUNK = MAX_UNITS * STEP;
    const uint64_t chunks = args.chunks, count = args.batch * chunks;
    const uint32_t lane = threadIdx.x * UNIT<R>;
    // Where a lag is larger than the index, this wraps around beyond the count.
    const uint64_t summed = blockIdx.x;
    const uint64_t totalled = summed - args.total_lag;
    const uint64_t written = summed - args.write_lag;

    if (summed < count) {
        const uint64_t row = summed / chunks;
        GradientPart<T, R> part(args, row, (summed - row * chunks) * CHUNK + lane, STEP);
        part.template load<Read::FIRST>();
        const RowSums sums = group_sums(part.sums(), GRADIENT_THREADS, warps[0]);
        if (threadIdx.x == 0) publish(args.sums + 2 * summed, sums);
    }
    // Up to some length, each block adds its row up: that is sooner done than told by another.
    const bool each = chunks <= MAX_EACH_GRADIENT;
    if (!each && totalled < count && totalled % chunks == chunks - 1) {
        const RowSums sums = add_up(args.sums + 2 * (totalled - (chunks - 1)), chunks, warps[1]);
        if (threadIdx.x == 0) publish(args.totals + 2 * (totalled / chunks), sums);
    }
    if (written < count) {
        // The last chunk first: it was read last.
        const uint64_t row = written / chunks, chunk = chunks - 1 - (written - row * chunks);
        GradientPart<T, R> part(args, row, chunk * CHUNK + lane, STEP);
        part.template load<Read::AGAIN>();
        part.store(each ? add_up(args.sums + 2 * row * chunks, chunks, warps[1])
                        : await_both(args.totals + 2 * row));
    }
}

}  // namespace qdp

extern "C" __global__ void __launch_bounds__(qdp::GRADIENT_THREADS)
    qdp_amplitude_gradient_clear(const __grid_constant__ qdp::AmplitudeGradientArgs args) {
    qdp::wait_for_previous();
    qdp::amplitude_gradient_clear(args);
}

#define QDP_AMPLITUDE_GRADIENT(T, NAME)                                 \
    QDP_AMPLITUDE_GRADIENT_TO(T, NAME, float, c64)                      \
    QDP_AMPLITUDE_GRADIENT_TO(T, NAME, double, c128)
#define QDP_AMPLITUDE_GRADIENT_TO(T, NAME, R, PRECISION)                \
    extern "C" __global__ void __launch_bounds__(qdp::MAX_GRADIENT_GROUP) \
        qdp_amplitude_gradient_short_##NAME##_##PRECISION(              \
            const __grid_constant__ qdp::AmplitudeGradientArgs args) {  \
        qdp::wait_for_previous();                                       \
        qdp::amplitude_gradient_short<T, R>(args);                      \
    }                                                                   \
    extern "C" __global__ void __launch_bounds__(qdp::MAX_GRADIENT_GROUP) \
        qdp_amplitude_gradient_cluster_##NAME##_##PRECISION(            \
            const __grid_constant__ qdp::AmplitudeGradientArgs args) {  \
        qdp::wait_for_previous();                                       \
        qdp::amplitude_gradient_cluster<T, R>(args);                    \
    }                                                                   \
    extern "C" __global__ void __launch_bounds__(qdp::GRADIENT_THREADS) \
        qdp_amplitude_gradient_long_##NAME##_##PRECISION(               \
            const __grid_constant__ qdp::AmplitudeGradientArgs args) {  \
        qdp::wait_for_previous();                                       \
        qdp::amplitude_gradient_long<T, R>(args);                       \
    }

QDP_AMPLITUDE_GRADIENT(__half, f16)
QDP_AMPLITUDE_GRADIENT(__nv_bfloat16, bf16)
QDP_AMPLITUDE_GRADIENT(float, f32)
QDP_AMPLITUDE_GRADIENT(double, f64)
QDP_AMPLITUDE_GRADIENT(qdp::Complex<float>, c64)
QDP_AMPLITUDE_GRADIENT(qdp::Complex<double>, c128)
