// Moments of what a tile's amplitudes have to do with the bits of their index: the coefficients of
// weight two at most of its Walsh-Hadamard transform, sum_i t_i (-1)^(b_j + b_k).
//
// Threads hold 2^B values each. They first find the coefficients of their own bits, lanes then
// those of theirs with them by butterflies; what warps have found is put together where it is
// used. Up to 1024 values are summed in pairs in the precision of the states, more of them in
// double, always in the same order.
#pragma once

#include "walsh_hadamard.cuh"

namespace qdp {

// In the place of both bits: the coefficient of none, which is the sum.
constexpr uint32_t NO_BIT = ~0u;

// The coefficients of B bits: of no bit, of single ones, and of pairs in the order of `pair_index`.
__host__ __device__ constexpr uint32_t coefficients(uint32_t bits) {
    return 1 + bits * (bits + 1) / 2;
}
__device__ inline uint32_t coefficient_index(uint32_t bits, uint32_t j, uint32_t k) {
    return j == k ? 1 + j : 1 + bits + pair_index(bits, min(j, k), max(j, k));
}

// Sum of COUNT terms, a power of two, in pairs. The terms are used up.
template <int COUNT, class R, int SIZE>
__device__ __forceinline__ R pairwise_sum(R (&terms)[SIZE]) {
    if constexpr (COUNT > 1) {
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) terms[i] += terms[i + COUNT / 2];
        return pairwise_sum<COUNT / 2>(terms);
    } else {
        return terms[0];
    }
}

// Splits 2^(K+1) terms into differences and sums over their highest bit.
template <int K, class R, int SIZE, int HALF>
__device__ __forceinline__ void split(R (&terms)[SIZE], R (&differences)[HALF]) {
#pragma unroll
    for (int i = 0; i < 1 << K; ++i) {
        differences[i] = terms[i] - terms[i + (1 << K)];
        terms[i] += terms[i + (1 << K)];
    }
}

// Adds the coefficients of bit K with each of the J bits below it, and its own, from its
// differences.
template <int B, int K, int J, class R, int SIZE>
__device__ __forceinline__ void add_pairs(R (&differences)[SIZE], R (&found)[coefficients(B)]) {
    if constexpr (J > 0) {
        R second[1 << (J - 1)];
        split<J - 1>(differences, second);
        found[1 + B + (J - 1) * (2 * B - J) / 2 + K - J] += pairwise_sum<1 << (J - 1)>(second);
        add_pairs<B, K, J - 1>(differences, found);
    } else {
        found[1 + K] += differences[0];
    }
}

// Adds the coefficients of a thread's values, of the K lowest bits, or of none where K = 0. The
// values are used up.
template <int B, int K = B, class R>
__device__ __forceinline__ void add_coefficients(R (&values)[1 << B],
                                                 R (&found)[coefficients(B)]) {
    if constexpr (K > 0) {
        R differences[1 << (K - 1)];
        split<K - 1>(values, differences);
        add_pairs<B, K - 1, K - 1>(differences, found);
        add_coefficients<B, K - 1>(values, found);
    } else {
        found[0] += values[0];
    }
}

// What the threads of a tile have found, as their lanes' bits have it with them, in shared memory.
template <class R, int B>
struct Moments {
    static constexpr uint32_t COUNT = coefficients(B), PAIRS = COUNT - 1 - B;

    R* memory;  // [coefficient of a thread's bits][thread]
    uint32_t thread, thread_bits;

    // All threads of the tile take part, and are done with the memory before.
    __device__ __forceinline__ void share(R (&found)[COUNT]) const {
        const uint32_t lane_bits = min(thread_bits, 5u), lane = thread & 31;
#pragma unroll
        for (uint32_t bit = 0; bit < 5; ++bit) {
            if (bit >= lane_bits) continue;
            const bool upper = lane >> bit & 1;
#pragma unroll
            for (uint32_t v = 0; v <= B; ++v) {
                const R other = __shfl_xor_sync(0xffffffff, found[v], 1u << bit);
                found[v] = other + (upper ? -found[v] : found[v]);
            }
        }
        if (lane_bits == 5) {
            if constexpr (PAIRS > 0) share_pairs(found);
        } else {
            for (uint32_t bit = 0; bit < lane_bits; ++bit) {
#pragma unroll
                for (uint32_t v = 1 + B; v < COUNT; ++v) {
                    found[v] += __shfl_xor_sync(0xffffffff, found[v], 1u << bit);
                }
            }
            if (thread == 0) {
#pragma unroll
                for (uint32_t v = 1 + B; v < COUNT; ++v) at(v) = found[v];
            }
        }
        const int weight = __popc(lane);
        if (weight <= 2) at(0) = found[0];
        if (weight <= 1) {
#pragma unroll
            for (uint32_t v = 1; v <= B; ++v) at(v) = found[v];
        }
        sync_group(1u << thread_bits);
    }

    // The coefficient of two bits in the order of `Diagonal`; of one where they are equal.
    __device__ double coefficient(uint32_t j, uint32_t k) const {
        if (j == k) k = NO_BIT;
        const uint32_t low = min(j, k), high = max(j, k);
        uint32_t own = 0, others = 0;
        if (low != NO_BIT && low >= thread_bits) {
            own = high == NO_BIT ? 1 + low - thread_bits
                               : coefficient_index(B, low - thread_bits, high - thread_bits);
        } else if (high != NO_BIT && high >= thread_bits) {
            own = 1 + high - thread_bits;
        }
        if (j < thread_bits) others |= 1u << j;
        if (k < thread_bits) others |= 1u << k;
        const uint32_t warps = others >> 5, count = thread_bits > 5 ? 1u << (thread_bits - 5) : 1;
        const R* from = memory + (own << thread_bits) + (others & 31);
        double sum = 0;
        for (uint32_t warp = 0; warp < count; ++warp) {
            const double part = from[warp << 5];
            sum += __popc(warp & warps) & 1 ? -part : part;
        }
        return sum;
    }

private:
    __device__ __forceinline__ R& at(uint32_t v) const {
        return memory[v << thread_bits | thread];
    }

    // Sums the pairs' coefficients over a warp: with each bit of the lane, a lane gives half of its
    // sums away and keeps the others, until it has one.
    __device__ __forceinline__ void share_pairs(R (&found)[COUNT]) const {
        const uint32_t lane = thread & 31;
        uint32_t first = 0, mine = PAIRS;  // of those that the lane has
        bool owner = true;
        R sums[PAIRS];
#pragma unroll
        for (uint32_t i = 0; i < PAIRS; ++i) sums[i] = found[1 + B + i];
#pragma unroll
        for (int bit = 4; bit >= 0; --bit) {
            // How many a lane has at most: constants, once unrolled.
            const uint32_t before = (PAIRS + (16 >> bit) - 1) / (16 >> bit);
            const bool upper = lane >> bit & 1;
            if (before == 1) {
                sums[0] += __shfl_xor_sync(0xffffffff, sums[0], 1u << bit);
                owner = owner && !upper;
                continue;
            }
            const uint32_t half = (before + 1) / 2;
#pragma unroll
            for (uint32_t i = 0; i < half; ++i) {
                const R high = i + half < before ? sums[i + half] : R(0);
                const R given = upper ? sums[i] : high, kept = upper ? high : sums[i];
                sums[i] = kept + __shfl_xor_sync(0xffffffff, given, 1u << bit);
            }
            if (upper) {
                first += half;
                mine = mine > half ? mine - half : 0;
            } else {
                mine = min(mine, half);
            }
        }
        if (owner && mine > 0) memory[((1 + B + first) << thread_bits) + (thread & ~31u)] = sums[0];
    }
};

}  // namespace qdp
