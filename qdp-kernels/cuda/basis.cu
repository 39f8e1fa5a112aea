// Basis encoding by index: one-hot.

#include "common.cuh"
#include "tile.cuh"

namespace qdp {

constexpr uint64_t INVALID = ~uint64_t(0);

// The index that a row names, or INVALID.
__device__ inline uint64_t checked_index(const TileArgs& args, uint64_t row, bool reports) {
    const double value = load_value(args, row, 0);
    const double dim = static_cast<double>(uint64_t(1) << args.num_qubits);
    if (value >= 0.0 && value < dim && value == trunc(value)) return static_cast<uint64_t>(value);
    if (reports) report(args, row, 0, isfinite(value) ? BASIS_INDEX : reason_not_finite(value));
    return INVALID;
}

// Writes the wide stores at `begin`, `begin + step`, ... of a row.
template <bool WIDE, class R>
__device__ __forceinline__ void write_one_hot(Complex<R>* out, uint64_t begin, uint64_t end,
                                              uint32_t step, uint64_t index) {
    const R other = index == INVALID ? not_a_number<R>().re : R(0);
#pragma unroll 4
    for (uint64_t i = begin; i < end; i += step) {
        Complex<R> z[1 << WIDE_BITS<R>];
        for (uint32_t j = 0; j < 1 << WIDE_BITS<R>; ++j) {
            z[j] = {i + j == index ? R(1) : other, other};
        }
        store<WIDE>(out + i, z);
    }
}

// A block has 2^k threads and shared memory for an index per row.
template <class R>
__device__ void basis(const TileArgs& args) {
    extern __shared__ uint64_t indices[];
    const uint32_t column_bits = args.chunk_bits - WIDE_BITS<R>;
    const uint32_t thread_bits = min(log2_floor(blockDim.x), column_bits);
    for (uint64_t part = blockIdx.x; part < tile_count(args); part += gridDim.x) {
        const auto [first_row, chunk, rows] = tile_at(args, part);
        for (uint32_t row = threadIdx.x; row < rows; row += blockDim.x) {
            indices[row] = checked_index(args, first_row + row, chunk == 0);
        }
        __syncthreads();
        const uint32_t column = threadIdx.x & ((1u << thread_bits) - 1);
        const uint64_t begin = (chunk << args.chunk_bits) + (column << WIDE_BITS<R>);
        const uint64_t end = (chunk + 1) << args.chunk_bits;
        const uint32_t step = 1u << (thread_bits + WIDE_BITS<R>);
        const uint32_t row_step = blockDim.x >> thread_bits;
        for (uint32_t row = threadIdx.x >> thread_bits; row < rows; row += row_step) {
            const uint64_t index = indices[row];
            Complex<R>* const out = output_row<R>(args, first_row + row);
            if (is_wide(out)) {
                write_one_hot<true>(out, begin, end, step, index);
            } else {
                write_one_hot<false>(out, begin, end, step, index);
            }
        }
        __syncthreads();
    }
}

}  // namespace qdp

extern "C" __global__ void __launch_bounds__(128)
    qdp_basis_c64(const __grid_constant__ qdp::TileArgs args) {
    qdp::wait_for_previous();
    qdp::basis<float>(args);
}
extern "C" __global__ void __launch_bounds__(128)
    qdp_basis_c128(const __grid_constant__ qdp::TileArgs args) {
    qdp::wait_for_previous();
    qdp::basis<double>(args);
}
