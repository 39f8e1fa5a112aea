// Layers of Walsh-Hadamard transforms and quadratic phases: iqp, zz, iqp-embedding.
//
// A tile is made in the registers of the first window (walsh_hadamard.cuh) and goes to memory from
// those of the last, in which neighbouring lanes hold neighbouring cells.
//
// A state larger than a tile has two ways. The highest bits may be folded: since the transform
// is linear, each tile of the transformed state is the transform of a sum over those bits of the
// phases, with signs; summing costs arithmetic, and no memory. Or later launches transform the
// other bits: then a tile has `tile_bits - column_bits` transformed bits from `low_bit` on, and
// `column_bits` of the lowest bits beside them, so that memory is read and written in whole lines.

#include "walsh_hadamard.cuh"

namespace qdp {

// Of tiles that are made and transformed once at most, TILE_CELLS may tell the bits of a cell's
// number, which makes constants of shifts and loop bounds.
template <class R, int K, int TILE_CELLS = 0>
__device__ void diagonal(const DiagonalArgs& args) {
    constexpr int C = CELL_BITS<R>, CELLS = 1 << K;
    constexpr bool FIXED = TILE_CELLS > 0;
    // A block holds several tiles, which need not be whole warps, or one that is several.
    constexpr bool GROUPS = !FIXED || !separate_factors<K, TILE_CELLS>;
    extern __shared__ __align__(16) unsigned char dynamic[];

    const Tiling<R, K, TILE_CELLS> tiling(args);
    const uint32_t tile_cells = tiling.tile_cells, tile_bits = tiling.tile_bits;
    const uint32_t column_bits = tiling.column_bits, rounds = tiling.rounds;
    const uint32_t threads = tiling.threads();
    const uint32_t thread = GROUPS ? threadIdx.x & (threads - 1) : threadIdx.x;
    const uint32_t group = GROUPS ? threadIdx.x >> (tile_cells - K) : 0;
    const uint32_t group_bits = GROUPS ? args.group_bits : 0;
    const bool aligned =
        C == 0 || ((reinterpret_cast<uintptr_t>(args.output) / sizeof(Complex<R>) |
                    (args.batch > 1 ? args.output_stride : 0)) & 1) == 0;

    const uint32_t number_bits = args.num_qubits - tile_bits;
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
        Complex<R>* out = output_row<R>(args, row) + tiling.base(number);
        // The last transform ends in the highest window; each goes through the rounds the other
        // way than the one before it.
        bool ascending = args.transforms & 1;
        uint32_t window = tiling.window_of(ascending ? 0 : rounds - 1);
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
                        diagonal.load(other, again ? tiling.window_of(rounds - 1) : window,
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
        if constexpr (FIXED) {
            multiply(0);
            if (args.transforms) {
#pragma unroll
                for (uint32_t round = 0; round < rounds; ++round) {
                    const uint32_t next = tiling.window_of(round);
                    if (round > 0) {
                        tiling.exchange(cells, dynamic, tiling.window_of(round - 1), next);
                    }
                    transform_window<R, K>(cells, tiling.active_of(round), round == 0);
                }
                window = tiling.window_of(rounds - 1);
                if (args.multiplies) multiply(1);
            }
            window = tiling.window_of(rounds - 1);
        } else {
#pragma unroll 1
            for (uint32_t t = 0;; ++t) {
                if ((t == 0 && args.generate) || (t > 0 && t <= args.multiplies)) {
                    multiply(t);
                } else if (t == 0) {
                    const auto next = [&](Complex<R>* at, int bit) {
                        return at + tiling.offset(1u << (window + C + bit));
                    };
                    for_cells<K>(out + tiling.offset(spread<K>(thread, window) << C), next,
                                 [&](int e, Complex<R>* at) { cells[e] = load_cell(at, aligned); });
                }
                if (t == args.transforms) break;
#pragma unroll 1
                for (uint32_t step = 0; step < rounds; ++step) {
                    const uint32_t round = ascending ? step : rounds - 1 - step;
                    if (step > 0) {
                        tiling.exchange(cells, dynamic, window, tiling.window_of(round));
                        window = tiling.window_of(round);
                    }
                    transform_window<R, K>(cells, tiling.active_of(round),
                                           column_bits == 0 && round == 0);
                }
                ascending = !ascending;
                if (rounds == 1) sync_group(threads);  // everybody is done with the tables
            }
        }
        if (exists) {
            const auto next = [&](Complex<R>* at, int bit) {
                return at + tiling.offset(1u << (window + C + bit));
            };
            Complex<R>* to = out + tiling.offset(spread<K>(thread, window) << C);
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
