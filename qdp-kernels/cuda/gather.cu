// Copies a batch whose samples lie side by side in memory (a transposed array) to rows without
// gaps, a square tile at a time through shared memory: read along the samples, written along their
// values, so whole memory lines are used on both sides.

#include "common.cuh"

namespace qdp {

struct GatherArgs : Args {
    void* rows;  // shape (batch, features)
};

constexpr uint32_t GATHER_TILE = 32;

// Values are moved, not looked at: a type is as good as any of its size.
template <class T>
__device__ void gather(const GatherArgs& args) {
    __shared__ T tile[GATHER_TILE][GATHER_TILE + 1];  // one more: columns off each other's banks
    const uint64_t across = (args.features + GATHER_TILE - 1) / GATHER_TILE;
    const uint64_t down = (args.batch + GATHER_TILE - 1) / GATHER_TILE;
    const uint32_t x = threadIdx.x % GATHER_TILE, step = blockDim.x / GATHER_TILE;
    for (uint64_t part = blockIdx.x; part < across * down; part += gridDim.x) {
        // Tiles of the same samples' values one after another: they read lines apart, but write
        // neighbouring ones.
        const uint64_t row = part / across * GATHER_TILE, column = part % across * GATHER_TILE;
        for (uint32_t y = threadIdx.x / GATHER_TILE; y < GATHER_TILE; y += step) {
            if (row + x < args.batch && column + y < args.features) {
                tile[y][x] = load<T>(args, row + x, column + y);
            }
        }
        __syncthreads();
        for (uint32_t y = threadIdx.x / GATHER_TILE; y < GATHER_TILE; y += step) {
            if (row + y < args.batch && column + x < args.features) {
                static_cast<T*>(args.rows)[(row + y) * args.features + column + x] = tile[x][y];
            }
        }
        __syncthreads();
    }
}

}  // namespace qdp

#define QDP_GATHER(T, SIZE)                                     \
    extern "C" __global__ void __launch_bounds__(256)           \
        qdp_gather_##SIZE(const __grid_constant__ qdp::GatherArgs args) { \
        qdp::wait_for_previous();                               \
        qdp::gather<T>(args);                                   \
    }

QDP_GATHER(uint8_t, 1)
QDP_GATHER(uint16_t, 2)
QDP_GATHER(uint32_t, 4)
QDP_GATHER(unsigned long long, 8)
QDP_GATHER(double2, 16)
