// Copies a batch whose samples lie side by side in memory (a transposed array) to rows without
// gaps, a tile at a time through shared memory: read along the samples, written along their values,
// so whole memory lines are used on both sides. A batch of few samples has long tiles.

#include "common.cuh"

namespace qdp {

struct GatherArgs : Args {
    void* rows;          // shape (batch, features)
    uint32_t tile_bits;  // samples of a tile: 2^tile_bits, at most as many as threads
    uint32_t unused;
};

constexpr uint32_t GATHER_THREADS = 256;
// Values of a tile: 2^bits.
template <class T>
constexpr uint32_t GATHER_TILE_BITS = sizeof(T) <= 8 ? 12 : 10;

// Values are moved, not looked at: a type is as good as any of its size. Addresses are worked out
// once per tile.
template <class T>
__device__ void gather(const GatherArgs& args) {
    constexpr uint32_t EACH = (1u << GATHER_TILE_BITS<T>) / GATHER_THREADS;
    // A value more in each row: columns off one bank.
    __shared__ T tile[(1u << GATHER_TILE_BITS<T>) + GATHER_THREADS];
    const uint32_t bits = args.tile_bits, width_bits = GATHER_TILE_BITS<T> - bits;
    const uint32_t height = 1u << bits, width = 1u << width_bits;
    const uint64_t across = (args.features + width - 1) >> width_bits;
    const uint64_t down = (args.batch + height - 1) >> bits;
    // Where this thread begins to read in a tile, and, as threads are a multiple of the height, the
    // constant step it goes on with.
    const uint32_t r = threadIdx.x & (height - 1), c = threadIdx.x >> bits;
    const uint32_t step = GATHER_THREADS >> bits;
    for (uint64_t part = blockIdx.x; part < across * down; part += gridDim.x) {
        // Neighbouring tiles along the samples, whose values are neighbours in memory: the parts of
        // a memory page are read at about the same time.
        const uint64_t row = part % down << bits, column = part / down << width_bits;
        const auto rows = static_cast<uint32_t>(min(uint64_t{height}, args.batch - row));
        const auto columns = static_cast<uint32_t>(min(uint64_t{width}, args.features - column));
        const T* from = static_cast<const T*>(args.input) +
                        static_cast<int64_t>(row + r) * args.row_stride +
                        static_cast<int64_t>(column + c) * args.col_stride;
        T values[EACH];
#pragma unroll
        for (uint32_t u = 0; u < EACH; ++u) {
            values[u] = r < rows && c + u * step < columns ? *from : T{};
            from += step * args.col_stride;
        }
#pragma unroll
        for (uint32_t u = 0; u < EACH; ++u) {
            tile[r * (width + 1) + c + u * step] = values[u];
        }
        __syncthreads();
        T* to = static_cast<T*>(args.rows) + row * args.features + column;
#pragma unroll
        for (uint32_t u = 0; u < EACH; ++u) {
            const uint32_t i = u * GATHER_THREADS + threadIdx.x;
            const uint32_t y = i >> width_bits, x = i & (width - 1);
            if (y < rows && x < columns) {
                to[y * args.features + x] = tile[y * (width + 1) + x];
            }
        }
        __syncthreads();
    }
}

}  // namespace qdp

#define QDP_GATHER(T, SIZE)                                     \
    extern "C" __global__ void __launch_bounds__(qdp::GATHER_THREADS) \
        qdp_gather_##SIZE(const __grid_constant__ qdp::GatherArgs args) { \
        qdp::wait_for_previous();                               \
        qdp::gather<T>(args);                                   \
    }

QDP_GATHER(uint8_t, 1)
QDP_GATHER(uint16_t, 2)
QDP_GATHER(uint32_t, 4)
QDP_GATHER(unsigned long long, 8)
QDP_GATHER(double2, 16)
