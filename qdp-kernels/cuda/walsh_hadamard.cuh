// Walsh-Hadamard transforms of tiles that lie in the registers of several threads.
//
// A thread holds 2^K cells of a tile, K consecutive bits of the cell's number: the window. It
// transforms those bits, and passes the cells on through shared memory to whoever holds the next
// window.
#pragma once

#include "phase.cuh"

namespace qdp {

// Amplitudes as the output has them: rows of complex64 may begin at an odd one.
template <class R>
__device__ __forceinline__ Cell<R> load_cell(const Complex<R>* from, bool aligned) {
    if (aligned || CELL_BITS<R> == 0) return *reinterpret_cast<const Cell<R>*>(from);
    Cell<R> cell;
    cell.z[0] = from[0];
    cell.z[CELL_BITS<R>] = from[CELL_BITS<R>];
    return cell;
}
// What is written leaves the cache first, which spares
// iqp, n = 12, complex64 another 3 %.
template <class R>
__device__ __forceinline__ void store_cell(Complex<R>* to, Cell<R> cell, bool aligned) {
    if (aligned || CELL_BITS<R> == 0) {
        __stcs(reinterpret_cast<float4*>(to), *reinterpret_cast<const float4*>(&cell));
    } else {
        to[0] = cell.z[0];
        to[CELL_BITS<R>] = cell.z[CELL_BITS<R>];
    }
}

template <class R>
__device__ __forceinline__ void butterfly(Complex<R>& a, Complex<R>& b) {
    const Complex<R> sum = a + b, difference = a - b;
    a = sum;
    b = difference;
}

template <class R, int K>
__device__ __forceinline__ void transform_bit(Cell<R> (&cells)[1 << K], int bit) {
#pragma unroll
    for (int e = 0; e < 1 << K; ++e) {
        if (e >> bit & 1) continue;
#pragma unroll
        for (int a = 0; a < 1 << CELL_BITS<R>; ++a) {
            butterfly(cells[e].z[a], cells[e | 1 << bit].z[a]);
        }
    }
}

// Transforms the bits `active` of the window, and the cell's own.
template <class R, int K>
__device__ __forceinline__ void transform_window(Cell<R> (&cells)[1 << K], uint32_t active,
                                                 bool inside) {
    constexpr uint32_t ALL = (1 << K) - 1;
    const auto within_cells = [&] {
#pragma unroll
        for (int e = 0; e < 1 << K; ++e) butterfly(cells[e].z[0], cells[e].z[CELL_BITS<R>]);
    };
    // Nearly always all of them: without branches between them the sums stay where they are,
    // while each branch would cost a move of every register.
    if (active == ALL) {
        if (CELL_BITS<R> && inside) {
            within_cells();
#pragma unroll
            for (int bit = 0; bit < K; ++bit) transform_bit<R, K>(cells, bit);
        } else {
#pragma unroll
            for (int bit = 0; bit < K; ++bit) transform_bit<R, K>(cells, bit);
        }
    } else {
        if (CELL_BITS<R> && inside) within_cells();
#pragma unroll
        for (int bit = 0; bit < K; ++bit) {
            if (active >> bit & 1) transform_bit<R, K>(cells, bit);
        }
    }
}

// Where a cell lies in shared memory: whatever the window, eight neighbouring lanes find theirs
// in different banks. Linear over exclusive or.
template <int K>
__device__ __forceinline__ uint32_t slot(uint32_t cell) {
    return cell ^ (cell >> K & 7);
}

// Calls use(e, where) for a thread's cells, whose places follow from the first one's and the steps
// from bit to bit of the window.
template <int K, int E = 0, class At, class Next, class Use>
__device__ __forceinline__ void for_cells(At at, Next next, Use use) {
    if constexpr (K == 0) {
        use(E, at);
    } else {
        for_cells<K - 1, E>(at, next, use);
        for_cells<K - 1, E | 1 << (K - 1)>(next(at, K - 1), next, use);
    }
}

// How the threads of a tile hold it. Rounds of a transform take K of the transformed bits each,
// the last what is left, in a window that may reach back. Of whole states, TILE_CELLS may tell the
// bits of a cell's number, which makes constants of shifts and loop bounds.
template <class R, int K, int TILE_CELLS>
struct Tiling {
    static constexpr int C = CELL_BITS<R>, CELLS = 1 << K;
    static constexpr bool FIXED = TILE_CELLS > 0;

    uint32_t tile_cells, tile_bits;  // bits of a cell's number and of an amplitude's
    uint32_t column_bits, low_bit;
    uint32_t first_bit;  // of a cell's number, transformed
    uint32_t rounds;

    __device__ __forceinline__ explicit Tiling(const DiagonalArgs& args)
        : tile_cells(FIXED ? TILE_CELLS : args.tile_bits - C),
          tile_bits(tile_cells + C),
          column_bits(FIXED ? 0 : args.column_bits),
          low_bit(FIXED ? 0 : args.low_bit),
          first_bit(max(column_bits, uint32_t(C)) - C),
          rounds((tile_cells - first_bit + K - 1) / K) {}

    __device__ __forceinline__ uint32_t threads() const { return 1u << (tile_cells - K); }
    __device__ __forceinline__ uint32_t window_of(uint32_t round) const {
        return min(first_bit + round * K, tile_cells - K);
    }
    // The bits of the window that the round transforms.
    __device__ __forceinline__ uint32_t active_of(uint32_t round) const {
        const uint32_t from = first_bit + round * K, to = min(from + K, tile_cells);
        return ((1u << to) - (1u << from)) >> window_of(round);
    }
    // Offset in the state of amplitude `i` of the tile.
    __device__ __forceinline__ uint64_t offset(uint32_t i) const {
        return (i & ((1u << column_bits) - 1)) | uint64_t(i >> column_bits) << low_bit;
    }
    // Offset in the state of tile `number` of it: the bits of the index that the tile does not
    // have, between its columns and its transformed bits, and above those.
    __device__ __forceinline__ uint64_t base(uint64_t number) const {
        const uint32_t middle_bits = low_bit - column_bits;
        const uint64_t middle = number & ((uint64_t(1) << middle_bits) - 1);
        return middle << column_bits |
               number >> middle_bits << (low_bit + tile_bits - column_bits);
    }

    // Passes the cells on to who holds them in another window.
    __device__ __forceinline__ void exchange(Cell<R> (&cells)[CELLS], unsigned char* memory,
                                             uint32_t from, uint32_t to) const {
        const auto cell = [&](uint32_t at) -> Cell<R>& {
            return *reinterpret_cast<Cell<R>*>(memory + at);
        };
        const auto step = [](uint32_t window) {
            return [window](uint32_t at, int bit) {
                return at ^ slot<K>(1u << (window + bit)) * sizeof(Cell<R>);
            };
        };
        for_cells<K>(slot<K>(spread<K>(threadIdx.x, from)) * sizeof(Cell<R>), step(from),
                     [&](int e, uint32_t at) { cell(at) = cells[e]; });
        sync_group(threads());
        for_cells<K>(slot<K>(spread<K>(threadIdx.x, to)) * sizeof(Cell<R>), step(to),
                     [&](int e, uint32_t at) { cells[e] = cell(at); });
    }
};

}  // namespace qdp
