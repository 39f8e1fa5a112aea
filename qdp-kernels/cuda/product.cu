// Product states: every encoding that entangles nothing (angle, phase, basis by bits, iqp-z, zz
// and iqp-embedding without pairs).
//
// A block writes some rows, or a chunk of one: the outer product of a table over the chunk's lower
// bits and one over its upper bits and those above the chunk. That is 2n sines and cosines per row
// and chunk, and one complex product per amplitude.

#include "product.cuh"
#include "tile.cuh"

namespace qdp {

struct ProductArgs : TileArgs {
    FactorArgs factor;
};

// `product` times the factors of bits [from, to), picked by the bits of `index`.
__device__ inline Complex<double> pick(Complex<double> product, const Factor* factors,
                                       uint32_t from, uint32_t to, uint64_t index) {
#pragma unroll 4
    for (uint32_t bit = from; bit < to; ++bit, index >>= 1) {
        product = product * (index & 1 ? factors[bit].one : factors[bit].zero);
    }
    return product;
}
// The product of at least one such factor.
__device__ inline Complex<double> pick(const Factor* factors, uint32_t from, uint32_t to,
                                       uint64_t index) {
    const Complex<double> first = index & 1 ? factors[from].one : factors[from].zero;
    return pick(first, factors, from + 1, to, index >> 1);
}

// The factor of a feature. That of a bad one makes every amplitude of its row NaN.
__device__ inline Factor checked_factor(const ProductArgs& args, uint64_t row, uint32_t feature,
                                        bool reports) {
    const double x = load_feature(args, row, feature);
    uint32_t reason = 0;
    if (!isfinite(x)) {
        reason = reason_not_finite(x);
    } else if (args.factor.kind == BIT && x != 0.0 && x != 1.0) {
        reason = BASIS_BIT;
    }
    if (reason == 0) return factor(args.factor, x);
    if (reports) report(args, row, feature, reason);
    return {not_a_number<double>(), not_a_number<double>()};
}

// Writes `lower` times each of `count` entries of `upper`, `step` apart, to `out`, `stride`
// amplitudes apart.
template <bool WIDE, class R, uint32_t N>
__device__ __forceinline__ void write(Complex<R>* out, uint32_t stride,
                                      const Complex<R> (&lower)[N], const Complex<R>* upper,
                                      uint32_t count, uint32_t step) {
#pragma unroll 4
    for (uint32_t i = 0; i < count; ++i, out += stride, upper += step) {
        Complex<R> z[N];
        for (uint32_t j = 0; j < N; ++j) z[j] = lower[j] * *upper;
        store<WIDE>(out, z);
    }
}

// A block has 2^k threads, at least as many as a row's lower table has wide stores, and shared
// memory for its rows' factors and tables.
template <class R>
__device__ void product(const ProductArgs& args) {
    extern __shared__ Factor factors[];  // [row][bit]; the tables follow
    const uint32_t n = args.num_qubits;
    const uint32_t high_bits = args.chunk_bits / 2, low_bits = args.chunk_bits - high_bits;
    auto* const low = reinterpret_cast<Complex<R>*>(factors + args.rows * n);  // [row][bits]
    auto* const high = low + (args.rows << low_bits);

    // The bits of a thread's index, from the lowest: its wide store of the lower table, its first
    // entry of the upper one, its first row. The rows get what a warp leaves over whose stores
    // adjoin; so a thread does several stores for each entry of the lower table that it reads.
    const uint32_t column_bits = low_bits - WIDE_BITS<R>;
    const uint32_t slot_bits = log2_floor(blockDim.x) - column_bits;
    const uint32_t adjoining_bits = min(slot_bits, WARP_BITS - min(column_bits, WARP_BITS));
    const uint32_t row_bits = min(slot_bits - adjoining_bits, log2_floor(args.rows));
    const uint32_t upper_bits = min(slot_bits - row_bits, high_bits);
    const uint32_t column = threadIdx.x & ((1u << column_bits) - 1);
    const uint32_t slot = threadIdx.x >> column_bits;
    const uint32_t first_upper = slot & ((1u << upper_bits) - 1);

    for (uint64_t part = blockIdx.x; part < tile_count(args); part += gridDim.x) {
        const auto [first_row, chunk, rows] = tile_at(args, part);
        for (uint32_t i = threadIdx.x; i < rows * n; i += blockDim.x) {
            const uint32_t bit = i % n;
            const uint32_t feature = args.factor.big_endian ? n - 1 - bit : bit;
            factors[i] = checked_factor(args, first_row + i / n, feature, chunk == 0);
        }
        __syncthreads();
        const uint32_t low_size = rows << low_bits, high_size = rows << high_bits;
        for (uint32_t i = threadIdx.x; i < low_size + high_size; i += blockDim.x) {
            if (i < low_size) {
                low[i] = round_to<R>(pick(factors + (i >> low_bits) * n, 0, low_bits, i));
            } else {
                const uint32_t j = i - low_size;
                const Factor* const of_row = factors + (j >> high_bits) * n;
                const uint64_t above = chunk << high_bits | (j & ((1u << high_bits) - 1));
                high[j] = round_to<R>(pick({1.0, 0.0}, of_row, low_bits, n, above));
            }
        }
        __syncthreads();
        const uint32_t row_step = 1u << (slot_bits - upper_bits);
        for (uint32_t row = slot >> upper_bits; row < rows; row += row_step) {
            Complex<R> lower[1 << WIDE_BITS<R>];
            for (uint32_t i = 0; i < 1 << WIDE_BITS<R>; ++i) {
                lower[i] = low[(row << low_bits) + (column << WIDE_BITS<R>) + i];
            }
            const Complex<R>* const upper = high + (row << high_bits) + first_upper;
            Complex<R>* const out = output_row<R>(args, first_row + row) +
                                    (chunk << args.chunk_bits) + (first_upper << low_bits) +
                                    (column << WIDE_BITS<R>);
            const uint32_t count = 1u << (high_bits - upper_bits), step = 1u << upper_bits;
            if (is_wide(out)) {
                write<true>(out, step << low_bits, lower, upper, count, step);
            } else {
                write<false>(out, step << low_bits, lower, upper, count, step);
            }
        }
        __syncthreads();
    }
}

}  // namespace qdp

extern "C" __global__ void __launch_bounds__(128)
    qdp_product_c64(const __grid_constant__ qdp::ProductArgs args) {
    qdp::wait_for_previous();
    qdp::product<float>(args);
}
extern "C" __global__ void __launch_bounds__(128)
    qdp_product_c128(const __grid_constant__ qdp::ProductArgs args) {
    qdp::wait_for_previous();
    qdp::product<double>(args);
}
