// Copies a few bytes, in a graph from page-locked host memory: a kernel is launched with others at
// no cost to the host, where the copy engine has to be told apart.

#include "common.cuh"

namespace qdp {

struct CopyArgs {
    const void* from;  // at multiples of 16, as is `to`
    void* to;
    uint64_t bytes;
};

__device__ inline void copy(const CopyArgs& args) {
    const uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const uint64_t units = args.bytes / sizeof(uint4);
    if (i < units) {
        static_cast<uint4*>(args.to)[i] = static_cast<const uint4*>(args.from)[i];
    }
    // The rest, byte by byte.
    const uint64_t byte = units * sizeof(uint4) + i;
    if (byte < args.bytes) {
        static_cast<uint8_t*>(args.to)[byte] = static_cast<const uint8_t*>(args.from)[byte];
    }
}

}  // namespace qdp

extern "C" __global__ void qdp_copy(const __grid_constant__ qdp::CopyArgs args) {
    qdp::wait_for_previous();
    qdp::copy(args);
}
