// Amplitude encoding: x / norm(x), zero-padded to 2^n.
//
// Short rows are kept in the registers of a group of threads until their norm is known, several
// rows to a block where they are small: one read, one write. Long rows are cut into chunks. Each
// block sums the squares of one chunk, then scales an earlier one, whose row's sums are there or
// about to be: one read from memory, a second one that the L2 cache serves as long as a row fits
// there, one write. Small blocks that come and go keep reads and writes mixed; teams of blocks
// that hold a row in shared memory, or in that of a cluster, alternate between the two and were
// slower.
//
// Squares are summed in double for every type, in an order that depends on the length of the row
// alone: results are the same from run to run, whatever else is in the batch.

#include "amplitude.cuh"

namespace qdp {

struct AmplitudeArgs : Args {
    uint32_t group;      // threads of a short row, a power of two
    uint32_t total_lag;  // how many chunks behind its last one a long row is added up
    uint64_t scale_lag;  // how many chunks behind the sums long rows are scaled
    Slot* sums;          // of the chunks of long rows, cleared before
    Slot* totals;        // of long rows, behind the sums
};

// Mirrored and explained in qdp-core/src/cuda/kernels/amplitude.rs.
constexpr uint32_t MAX_GROUP = 512;     // threads of a short row
constexpr uint32_t LONG_THREADS = 256;  // threads of a chunk of a long row
constexpr uint32_t MAX_EACH = 512;      // chunks of a row that each block adds up for itself

template <class T, class R>
__device__ void amplitude_short(const AmplitudeArgs& args) {
    __shared__ double warps[MAX_WARPS];
    const uint32_t lane = threadIdx.x & (args.group - 1);
    const uint64_t thread = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const uint64_t row = thread >> __popc(args.group - 1);
    // Threads beyond the batch take part in the sums: they repeat its last row.
    const bool inside = row < args.batch;
    Part<T, R> part(args, inside ? row : args.batch - 1, lane * UNIT<R>, args.group * UNIT<R>);
    part.template load<Read::ONCE>();
    const double sum = group_sum(part.sum_of_squares(), args.group, warps);
    if (!inside) return;
    if (!isfinite(sum)) part.report_bad();
    part.store(inverse_norm(args, row, sum, lane == 0));
}

// A kernel of our own, as launches of kernels overlap and a memset's does not.
__device__ inline void amplitude_clear(const AmplitudeArgs& args) {
    Slot* const slot = args.sums + static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (slot < args.totals + args.batch) *slot = 0;
}

// Sum of squares of a long row, from those of its chunks.
__device__ inline double add_up(Slot* sums, uint32_t chunks, double (&warps)[MAX_WARPS]) {
    if (chunks <= 32) {
        const uint32_t lane = threadIdx.x % 32;
        return group_sum(lane < chunks ? await(sums[lane]) : 0.0, 32, warps);
    }
    double sum = 0.0;
    for (uint32_t chunk = threadIdx.x; chunk < chunks; chunk += LONG_THREADS) {
        sum += await(sums[chunk]);
    }
    return group_sum(sum, LONG_THREADS, warps);
}

// A block sums the squares of chunk `summed`, adds the row up that ends at chunk `totalled`, and
// scales chunk `scaled`. Blocks with lower indices make what it waits for, or it does itself.
template <class T, class R>
__device__ void amplitude_long(const AmplitudeArgs& args) {
    __shared__ double warps[2][MAX_WARPS];
    constexpr uint32_t STEP = LONG_THREADS * UNIT<R>, CHUNK = MAX_UNITS * STEP;
    const uint32_t chunk_bits = args.num_qubits - __popc(CHUNK - 1);
    const uint32_t chunks = 1u << chunk_bits;
    const uint64_t count = args.batch << chunk_bits;
    const uint32_t lane = threadIdx.x * UNIT<R>;
    // Where a lag is larger than the index, this wraps around beyond the count.
    const uint64_t summed = blockIdx.x;
    const uint64_t totalled = summed - args.total_lag;
    const uint64_t scaled = summed - args.scale_lag;

    if (summed < count) {
        const uint64_t first = (summed & (chunks - 1)) * CHUNK + lane;
        Part<T, R> part(args, summed >> chunk_bits, first, STEP);
        part.template load<Read::FIRST>();
        const double sum = group_sum(part.sum_of_squares(), LONG_THREADS, warps[0]);
        if (threadIdx.x == 0) publish(args.sums[summed], sum);
        if (!isfinite(sum)) part.report_bad();
    }
    // Up to some length, each block adds its row up: that is sooner done than told by another.
    const bool each = chunks <= MAX_EACH;
    if (!each && totalled < count && (totalled & (chunks - 1)) == chunks - 1) {
        const double sum = add_up(args.sums + totalled - (chunks - 1), chunks, warps[1]);
        if (threadIdx.x == 0) publish(args.totals[totalled >> chunk_bits], sum);
    }
    if (scaled < count) {
        // The last chunk first: it was read last.
        const uint64_t row = scaled >> chunk_bits, chunk = chunks - 1 - (scaled & (chunks - 1));
        Part<T, R> part(args, row, chunk * CHUNK + lane, STEP);
        part.template load<Read::AGAIN>();
        const double sum = each ? add_up(args.sums + (row << chunk_bits), chunks, warps[1])
                                : await(args.totals[row]);
        part.store(inverse_norm(args, row, sum, chunk == 0 && threadIdx.x == 0));
    }
}

}  // namespace qdp

extern "C" __global__ void __launch_bounds__(qdp::LONG_THREADS)
    qdp_amplitude_clear(const __grid_constant__ qdp::AmplitudeArgs args) {
    qdp::wait_for_previous();
    qdp::amplitude_clear(args);
}

#define QDP_AMPLITUDE(T, NAME)                                      \
    QDP_AMPLITUDE_TO(T, NAME, float, c64)                           \
    QDP_AMPLITUDE_TO(T, NAME, double, c128)
#define QDP_AMPLITUDE_TO(T, NAME, R, PRECISION)                     \
    extern "C" __global__ void __launch_bounds__(qdp::MAX_GROUP)    \
        qdp_amplitude_short_##NAME##_##PRECISION(                   \
            const __grid_constant__ qdp::AmplitudeArgs args) {      \
        qdp::wait_for_previous();                                   \
        qdp::amplitude_short<T, R>(args);                           \
    }                                                               \
    extern "C" __global__ void __launch_bounds__(qdp::LONG_THREADS) \
        qdp_amplitude_long_##NAME##_##PRECISION(                    \
            const __grid_constant__ qdp::AmplitudeArgs args) {      \
        qdp::wait_for_previous();                                   \
        qdp::amplitude_long<T, R>(args);                            \
    }

QDP_FOR_ELEMENTS(QDP_AMPLITUDE)
