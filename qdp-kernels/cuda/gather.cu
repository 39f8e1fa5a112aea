// Copies a batch whose samples lie side by side in memory (a transposed array) to rows without
// gaps, a tile at a time through shared memory: read along the samples, written along their values,
// so whole memory lines are used on both sides. A batch of few samples has long tiles.

#include "common.cuh"

namespace qdp {

struct GatherArgs : Args {
    void* rows;          // shape (batch, features)
    uint32_t tile_bits;  // samples of a tile: 2^tile_bits
    uint32_t unused;
};

constexpr uint32_t GATHER_THREADS = 256;
// Values of a tile.
template <class T>
constexpr uint32_t GATHER_TILE = sizeof(T) <= 8 ? 4096 : 1024;

// Values are moved, not looked at: a type is as good as any of its size.
template <class T>
__device__ void gather(const GatherArgs& args) {
    constexpr uint32_t EACH = GATHER_TILE<T> / GATHER_THREADS;
    __shared__ T tile[GATHER_TILE<T> + 64];  // a value more in each row: columns off one bank
    const uint32_t bits = args.tile_bits, height = 1u << bits, width = GATHER_TILE<T> >> bits;
    const uint64_t across = (args.features + width - 1) / width;
    const uint64_t down = (args.batch + height - 1) >> bits;
    for (uint64_t part = blockIdx.x; part < across * down; part += gridDim.x) {
        const uint64_t row = part / across << bits, column = part % across * width;
        T values[EACH];
#pragma unroll
        for (uint32_t u = 0; u < EACH; ++u) {
            const uint32_t i = u * GATHER_THREADS + threadIdx.x;
            const uint64_t r = row + (i & (height - 1)), c = column + (i >> bits);
            values[u] = r < args.batch && c < args.features ? load<T>(args, r, c) : T{};
        }
#pragma unroll
        for (uint32_t u = 0; u < EACH; ++u) {
            const uint32_t i = u * GATHER_THREADS + threadIdx.x;
            tile[(i & (height - 1)) * (width + 1) + (i >> bits)] = values[u];
        }
        __syncthreads();
#pragma unroll
        for (uint32_t u = 0; u < EACH; ++u) {
            const uint32_t i = u * GATHER_THREADS + threadIdx.x;
            const uint32_t y = i / width, x = i & (width - 1);
            if (row + y < args.batch && column + x < args.features) {
                static_cast<T*>(args.rows)[(row + y) * args.features + column + x] =
                    tile[y * (width + 1) + x];
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
