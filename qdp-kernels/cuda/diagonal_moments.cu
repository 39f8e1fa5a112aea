// Behind diagonal_gradient.cu's passes over the tiles of larger states: what the tiles have left is
// put together to the moments of states, and those give the gradients by features.

#include "diagonal_gradient.cuh"

namespace qdp {

// Where tiles leave their moments, by what bits of the index they have.
struct TileMoments {
    double* sums;  // [row][coefficient][tile]; null: none did
    uint32_t tile_bits;
    uint32_t column_bits;
    uint32_t low_bit;
};

// Mirrored by `CombineArgs` in qdp-core/src/cuda/kernels/gradient/diagonal/mod.rs.
struct CombineArgs : Args {
    const uint32_t* multiplicity;
    TileMoments tiles[2];
    double* coefficients;  // [row][coefficient], in the order of the features
    uint32_t kind;
    uint32_t big_endian;
};

// Puts the tiles' moments together to those of states: a warp for each coefficient.
__device__ void gradient_combine(const CombineArgs& args) {
    const uint32_t n = args.num_qubits, count = coefficients(n), lane = threadIdx.x % 32;
    const uint32_t warps = blockDim.x / 32;
    const uint64_t all = args.batch * count;
    for (uint64_t item = uint64_t(blockIdx.x) * warps + threadIdx.x / 32; item < all;
         item += uint64_t(gridDim.x) * warps) {
        const uint64_t row = item / count;
        const uint32_t i = static_cast<uint32_t>(item % count);
        uint32_t j = NO_BIT, k = NO_BIT, at = 0;
        if (i > 0) {
            const Entry entry = entry_of(i - 1, n);
            at = coefficient_index(n, entry.j, entry.k);
            j = args.big_endian ? n - 1 - entry.j : entry.j;
            k = args.big_endian ? n - 1 - entry.k : entry.k;
        }
        double sum = 0;
        for (const TileMoments& tile : args.tiles) {
            if (!tile.sums) continue;
            // A bit of the tile chooses its coefficient, one beside the tile signs the sum.
            const uint32_t bits = tile.tile_bits, number_bits = n - bits;
            const uint32_t upper = tile.low_bit + bits - tile.column_bits;
            uint32_t inside[2] = {NO_BIT, NO_BIT};
            uint64_t beside = 0;
            const auto place = [&](uint32_t bit, uint32_t which) {
                if (bit < tile.column_bits) {
                    inside[which] = bit;
                } else if (bit >= tile.low_bit && bit < upper) {
                    inside[which] = bit - tile.low_bit + tile.column_bits;
                } else {
                    beside |= uint64_t(1) << (bit < tile.low_bit ? bit - tile.column_bits
                                                                 : bit - bits);
                }
            };
            if (j != NO_BIT) place(j, 0);
            if (k != j) place(k, 1);
            uint32_t own = 0;
            if (inside[0] != NO_BIT || inside[1] != NO_BIT) {
                own = coefficient_index(bits, inside[0] == NO_BIT ? inside[1] : inside[0],
                                        inside[1] == NO_BIT ? inside[0] : inside[1]);
            }
            const double* sums =
                tile.sums + ((row * coefficients(bits) + own) << number_bits);
            for (uint64_t number = lane; number < uint64_t(1) << number_bits; number += 32) {
                sum += __popcll(number & beside) & 1 ? -sums[number] : sums[number];
            }
        }
        for (uint32_t distance = 16; distance > 0; distance /= 2) {
            sum += __shfl_xor_sync(0xffffffff, sum, distance);
        }
        if (lane == 0) args.coefficients[row * count + at] = sum;
    }
}

// From the moments of states to the gradients: a thread for each feature.
__device__ void gradient_features(const CombineArgs& args) {
    const uint32_t n = args.num_qubits;
    const uint64_t all = args.batch * args.features;
    for (uint64_t item = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; item < all;
         item += uint64_t(gridDim.x) * blockDim.x) {
        const uint64_t row = item / args.features;
        const uint32_t feature = static_cast<uint32_t>(item % args.features);
        const double* coefficients = args.coefficients + row * qdp::coefficients(n);
        const auto of = [&](uint32_t j, uint32_t k) {
            return coefficients[j == NO_BIT ? 0 : coefficient_index(n, j, k)];
        };
        double gradient;
        if (args.kind == EXPLICIT) {
            uint32_t j = feature, k = feature;
            if (feature >= n) {
                uint32_t pair = feature - n;
                for (j = 0; pair >= n - 1 - j; ++j) pair -= n - 1 - j;
                k = j + 1 + pair;
            }
            gradient = explicit_gradient(j, k, of);
        } else {
            const uint32_t j = feature;
            gradient = own_term(args.kind, j, of);
            for (uint32_t k = 0; k < n; ++k) {
                if (k == j) continue;
                const uint32_t times = args.multiplicity[pair_index(n, min(j, k), max(j, k))];
                gradient += pair_term(args.kind, j, k, of) * times *
                            slope(args.kind, load_feature(args, row, k));
            }
        }
        store_real(args, row, feature, gradient);
    }
}

}  // namespace qdp

extern "C" __global__ void __launch_bounds__(256) qdp_diagonal_gradient_combine(
    const __grid_constant__ qdp::CombineArgs args) {
    qdp::wait_for_previous();
    qdp::gradient_combine(args);
}
extern "C" __global__ void __launch_bounds__(256) qdp_diagonal_gradient_features(
    const __grid_constant__ qdp::CombineArgs args) {
    qdp::wait_for_previous();
    qdp::gradient_features(args);
}
