// Layers of Walsh-Hadamard transforms and quadratic phases: iqp, zz, iqp-embedding.
//
// A thread holds 2^K cells of a tile in registers, K consecutive bits of the cell's number: the
// window. It transforms those bits, passes the cells on through shared memory to whoever holds
// the next window, and so on; the tile is made in the registers of the first window and goes to
// memory from those of the last, in which neighbouring lanes hold neighbouring cells.
//
// A state larger than a tile has two ways. The highest bits may be folded: since the transform
// is linear, each tile of the transformed state is the transform of a sum over those bits of the
// phases, with signs; summing costs arithmetic, and no memory. Or later launches transform the
// other bits: then a tile has `tile_bits - column_bits` transformed bits from `low_bit` on, and
// `column_bits` of the lowest bits beside them, so that memory is read and written in whole lines.

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

// Of tiles that are made and transformed once at most, TILE_CELLS may tell the bits of a cell's
// number, which makes constants of shifts and loop bounds.
template <class R, int K, int TILE_CELLS = 0>
__device__ void diagonal(const DiagonalArgs& args) {
    constexpr int C = CELL_BITS<R>, CELLS = 1 << K;
    constexpr bool FIXED = TILE_CELLS > 0;
    // A block holds several tiles, which need not be whole warps, or one that is several.
    constexpr bool GROUPS = !FIXED || !separate_factors<K, TILE_CELLS>;
    extern __shared__ __align__(16) unsigned char dynamic[];

    // Bits of a cell's number.
    const uint32_t tile_cells = FIXED ? TILE_CELLS : args.tile_bits - C;
    const uint32_t tile_bits = tile_cells + C;
    const uint32_t column_bits = FIXED ? 0 : args.column_bits, low_bit = FIXED ? 0 : args.low_bit;
    const uint32_t threads = 1u << (tile_cells - K);
    const uint32_t thread = GROUPS ? threadIdx.x & (threads - 1) : threadIdx.x;
    const uint32_t group = GROUPS ? threadIdx.x >> (tile_cells - K) : 0;
    const uint32_t group_bits = GROUPS ? args.group_bits : 0;

    // Rounds take K of the transformed bits each, the last what is left, in a window that may
    // reach back.
    const uint32_t first_bit = max(column_bits, uint32_t(C)) - C;
    const uint32_t rounds = (tile_cells - first_bit + K - 1) / K;
    const auto window_of = [&](uint32_t round) {
        return min(first_bit + round * K, tile_cells - K);
    };
    const auto active_of = [&](uint32_t round) {
        const uint32_t from = first_bit + round * K, to = min(from + K, tile_cells);
        return ((1u << to) - (1u << from)) >> window_of(round);
    };
    // Offset in the state of amplitude `i` of the tile.
    const auto offset = [&](uint32_t i) {
        return (i & ((1u << column_bits) - 1)) | uint64_t(i >> column_bits) << low_bit;
    };
    const bool aligned =
        C == 0 || ((reinterpret_cast<uintptr_t>(args.output) / sizeof(Complex<R>) |
                    (args.batch > 1 ? args.output_stride : 0)) & 1) == 0;

    const uint32_t number_bits = args.num_qubits - tile_bits;
    const uint32_t middle_bits = low_bit - column_bits;
    const uint64_t tiles = args.batch << number_bits;
    const uint64_t parts = (tiles + (1u << group_bits) - 1) >> group_bits;
    const uint64_t begin = uint64_t(blockIdx.x) * args.parts;
    const uint64_t end = min(begin + args.parts, parts);
    const bool ahead = !GROUPS && args.ahead > 1;
    Cell<R> cells[CELLS];
    for (uint64_t part = begin; part < end; ++part) {
        const uint64_t wanted = part << group_bits | group;
        const bool exists = !GROUPS || wanted < tiles;
        const uint64_t tile_index = exists ? wanted : tiles - 1;
        const uint64_t row = tile_index >> number_bits;
        const uint64_t number = tile_index & ((uint64_t(1) << number_bits) - 1);
        // The bits of the index that the tile does not have: between its columns and its
        // transformed bits, and above those.
        const uint64_t middle = number & ((uint64_t(1) << middle_bits) - 1);
        const uint64_t base = middle << column_bits |
                              number >> middle_bits << (low_bit + tile_bits - column_bits);
        Complex<R>* out = output_row<R>(args, row) + base;
        // The last transform ends in the highest window; each goes through the rounds the other
        // way than the one before it.
        bool ascending = args.transforms & 1;
        uint32_t window = window_of(ascending ? 0 : rounds - 1);
        const uint32_t state = static_cast<uint32_t>((part - begin) >> number_bits) %
                               (GROUPS ? 1 : args.ahead);
        sync_group(threads);  // everybody is done with the tile and the tables of before

        // The diagonal that follows `t` transforms.
        const auto multiply = [&](uint32_t t) {
            const bool generate = t == 0 && args.generate;
            // Beside a tile that is made, the folded bits are not set but summed over.
            const uint64_t folded = generate ? (uint64_t(1) << args.fold_bits) - 1 : 0;
            const uint64_t fixed = (number & ~folded) << tile_bits;
            // Tiles of a state follow one another, and where no second diagonal overwrites
            // them, those that only differ in what is folded share their tables.
            const bool reload = args.multiplies || part == begin || number == 0;
            const bool make = ahead ? generate && number == 0 && state == 0
                                    : reload || (number & folded) == 0;
            const uint32_t kinds = ahead && args.multiplies ? 2 : 1;
            if (make) {
                // Either the threads of the tile make its tables, or each warp those of a state,
                // of which there are two where a second diagonal finds another window.
                const uint32_t workers = ahead ? 32 : threads;
                const uint32_t count = ahead ? args.ahead * kinds : group + 1;
#pragma unroll 1
                for (uint32_t item = ahead ? threadIdx.x / 32 : group; item < count;
                     item += blockDim.x / 32) {
                    const bool again = item & (kinds - 1);
                    const uint64_t other = ahead ? row + (kinds == 2 ? item / 2 : item) : row;
                    if (ahead && other >= args.batch) break;
                    const Diagonal<R, K, TILE_CELLS> diagonal{
                        args, dynamic + args.tables_at + item * args.tables_size,
                        threadIdx.x & (workers - 1), workers};
                    if (ahead || reload) {
                        diagonal.load(other, again ? window_of(rounds - 1) : window,
                                      generate && number == 0 && exists && !again);
                    }
                    diagonal.tabulate(fixed);
                    if (!ahead) break;
                }
                if (ahead) __syncthreads();
            }
            const uint32_t table = ahead ? state * kinds + (t ? kinds - 1 : 0) : group;
            const Diagonal<R, K, TILE_CELLS> diagonal{
                args, dynamic + args.tables_at + table * args.tables_size, thread, threads};
            Complex<R>* factors = GROUPS ? diagonal.factors()
                                         : reinterpret_cast<Complex<R>*>(dynamic + args.factors_at);
            if (make || (ahead && (args.multiplies || number == 0))) {
                diagonal.factorise(factors, thread);
            }
            const uint32_t rep = args.diagonals + t - (args.generate ? 0 : 1);
            const double scale = rep + 1 == args.reps ? args.last_scale : args.scale;
            diagonal.apply(cells, factors, thread, generate, static_cast<uint32_t>(number),
                           R(scale));
        };
        // Passes the cells on to who holds them in another window.
        const auto exchange = [&](uint32_t from, uint32_t to) {
            const auto cell = [&](uint32_t at) -> Cell<R>& {
                return *reinterpret_cast<Cell<R>*>(dynamic + at);
            };
            const auto step = [](uint32_t window) {
                return [window](uint32_t at, int bit) {
                    return at ^ slot<K>(1u << (window + bit)) * sizeof(Cell<R>);
                };
            };
            for_cells<K>(slot<K>(spread<K>(threadIdx.x, from)) * sizeof(Cell<R>), step(from),
                         [&](int e, uint32_t at) { cell(at) = cells[e]; });
            sync_group(threads);
            for_cells<K>(slot<K>(spread<K>(threadIdx.x, to)) * sizeof(Cell<R>), step(to),
                         [&](int e, uint32_t at) { cells[e] = cell(at); });
        };
        if constexpr (FIXED) {
            multiply(0);
            if (args.transforms) {
#pragma unroll
                for (uint32_t round = 0; round < rounds; ++round) {
                    if (round > 0) exchange(window_of(round - 1), window_of(round));
                    transform_window<R, K>(cells, active_of(round), round == 0);
                }
                window = window_of(rounds - 1);
                if (args.multiplies) multiply(1);
            }
            window = window_of(rounds - 1);
        } else {
#pragma unroll 1
            for (uint32_t t = 0;; ++t) {
                if ((t == 0 && args.generate) || (t > 0 && t <= args.multiplies)) {
                    multiply(t);
                } else if (t == 0) {
                    const auto next = [&](Complex<R>* at, int bit) {
                        return at + offset(1u << (window + C + bit));
                    };
                    for_cells<K>(out + offset(spread<K>(thread, window) << C), next,
                                 [&](int e, Complex<R>* at) { cells[e] = load_cell(at, aligned); });
                }
                if (t == args.transforms) break;
#pragma unroll 1
                for (uint32_t step = 0; step < rounds; ++step) {
                    const uint32_t round = ascending ? step : rounds - 1 - step;
                    if (step > 0) {
                        exchange(window, window_of(round));
                        window = window_of(round);
                    }
                    transform_window<R, K>(cells, active_of(round),
                                           column_bits == 0 && round == 0);
                }
                ascending = !ascending;
                if (rounds == 1) sync_group(threads);  // everybody is done with the tables
            }
        }
        if (exists) {
            const auto next = [&](Complex<R>* at, int bit) {
                return at + offset(1u << (window + C + bit));
            };
            Complex<R>* to = out + offset(spread<K>(thread, window) << C);
            if (aligned) {
                for_cells<K>(to, next, [&](int e, auto at) { store_cell(at, cells[e], true); });
            } else {
                for_cells<K>(to, next, [&](int e, auto at) { store_cell(at, cells[e], false); });
            }
        }
    }
}

}  // namespace qdp

// Any tile, K bits of a cell's number in registers.
#define QDP_DIAGONAL(R, SUFFIX, K, THREADS)                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                              \
        qdp_diagonal_##K##_##SUFFIX(const __grid_constant__ qdp::DiagonalArgs args) {  \
        qdp::wait_for_previous();                                                      \
        qdp::diagonal<R, K>(args);                                                     \
    }
#define QDP_DIAGONALS(K, THREADS)        \
    QDP_DIAGONAL(float, c64, K, THREADS) \
    QDP_DIAGONAL(double, c128, K, THREADS)

QDP_DIAGONALS(1, 256)
QDP_DIAGONALS(2, 256)
QDP_DIAGONALS(3, 256)
QDP_DIAGONALS(4, 512)

// A tile of 2^CELLS cells that is made and transformed once at most, 4 bits in registers. Of the
// threads, 512 share an SM.
#define QDP_MADE(R, SUFFIX, CELLS, THREADS)                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS)                       \
        qdp_diagonal_made_##CELLS##_##SUFFIX(const __grid_constant__ qdp::DiagonalArgs args) { \
        qdp::wait_for_previous();                                                              \
        qdp::diagonal<R, 4, CELLS>(args);                                                      \
    }
#define QDP_MADES(CELLS, THREADS)        \
    QDP_MADE(float, c64, CELLS, THREADS) \
    QDP_MADE(double, c128, CELLS, THREADS)

QDP_MADES(7, 128)
QDP_MADES(8, 128)
QDP_MADES(9, 128)
QDP_MADES(10, 128)
QDP_MADES(11, 128)
QDP_MADES(12, 256)
QDP_MADES(13, 512)
