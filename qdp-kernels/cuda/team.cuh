// Sums over the threads of a block and over the blocks of a grid, in a fixed order.
#pragma once

#include <cuda/atomic>
#include <stdint.h>

namespace qdp {

constexpr uint32_t MAX_WARPS = 32;

// Sum over groups of `group` neighbouring threads, a power of two, the same bits in each; all
// threads of the block take part. `warps` may be used again behind another barrier.
__device__ inline double group_sum(double value, uint32_t group, double (&warps)[MAX_WARPS]) {
    for (uint32_t offset = 16; offset > 0; offset >>= 1) {
        if (offset < group) value += __shfl_xor_sync(0xffffffff, value, offset);
    }
    if (group <= 32) return value;
    const uint32_t warp = threadIdx.x / 32, last = group / 32 - 1;
    if (threadIdx.x % 32 == 0) warps[warp] = value;
    __syncthreads();
    value = warps[(warp & ~last) | (threadIdx.x & last)];
    for (uint32_t offset = 16; offset > 0; offset >>= 1) {
        if (offset <= last) value += __shfl_xor_sync(0xffffffff, value, offset);
    }
    return value;
}

// A sum that one block tells others: zero until then. It holds the opposite of a sum that is not
// negative, whose bits are never all zero: one word tells the sum and that it is there, so
// nothing else has to be ordered by it.
using Slot = unsigned long long;

__device__ inline void publish(Slot& slot, double sum) {
    cuda::atomic_ref<Slot, cuda::thread_scope_device>(slot).store(
        __double_as_longlong(-sum), cuda::std::memory_order_relaxed);
}

// What a slot holds: zero, or what `told` reads.
__device__ inline Slot peek(Slot& slot) {
    return cuda::atomic_ref<Slot, cuda::thread_scope_device>(slot).load(
        cuda::std::memory_order_relaxed);
}
__device__ inline double told(Slot bits) { return -__longlong_as_double(bits); }

// Waits for a block that is sure to run. Blocks start in the order of their indices, so that is
// any block with a lower index that itself waits for lower ones only.
__device__ inline double await(Slot& slot) {
    Slot bits = 0;
    while (bits == 0) bits = peek(slot);
    return told(bits);
}

}  // namespace qdp
