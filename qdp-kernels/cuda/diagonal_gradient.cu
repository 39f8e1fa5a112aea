// Gradients by the features of what diagonal.cu encodes, by the adjoint method.
//
// The state is D H D ... H D 1 (and a last H), each H normalised, D = diag exp(i theta). With u the
// gradient by what follows the last D, taken back through the last H, and a the state before that
// D, the gradient by theta_i is t_i = Im(v_i conj a_i), v = conj(D) u; and u = H v is the gradient
// by what follows the D before. theta is quadratic in the bits, so the features' gradients are the
// moments of t (moments.cuh).
//
// States that a block can hold are done at once: a is made anew for each diagonal. For others, a is
// encoded to memory by diagonal.cu, v goes through memory by tiles as states do there, and tiles
// leave their moments to be put together by later launches.

#include "diagonal_gradient.cuh"

namespace qdp {

// Mirrored by `Args` in qdp-core/src/cuda/kernels/gradient/diagonal/mod.rs. Input and output are
// those of `GradientArgs`; `scale` is that of a transform, `last_scale` that of the source.
struct DiagonalGradientArgs : DiagonalArgs {
    Cotangent source;    // or what launches before made of it
    const void* states;  // before the diagonal, in rows without gaps; null: all amplitudes equal
    void* target;        // where the tile goes, in rows without gaps; null: nowhere
    double* sums;        // of moments: [row][coefficient][tile]
    uint32_t before;       // transforms before the diagonal
    uint32_t after;        // and behind it
    uint32_t add_sums;     // to those that are there
    uint32_t memory_size;  // where a tile is exchanged and its moments are shared
    uint32_t stash_at;     // where a tile is kept in shared memory, if it is
    uint32_t features_at;  // where the terms of features are
};

// Cotangents as they lie: anywhere, in any strides.
template <class R, int K>
struct Source {
    const Complex<R>* from;
    int64_t stride;
    bool aligned;

    __device__ Source(const DiagonalGradientArgs& args, uint64_t row)
        : from(static_cast<const Complex<R>*>(args.source.values) +
               static_cast<int64_t>(row) * args.source.row_stride),
          stride(args.source.col_stride),
          aligned(stride == 1 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {}

    // Loads a thread's cells, of which `first` is the first one's amplitude.
    template <class Offset>
    __device__ __forceinline__ void load(Cell<R> (&cells)[1 << K], uint64_t first,
                                         uint32_t window, Offset offset) const {
        const auto next = [&](uint64_t at, int bit) {
            return at + offset(1u << (window + CELL_BITS<R> + bit));
        };
        if (aligned) {
            for_cells<K>(first, next, [&](int e, uint64_t at) {
                const float4 loaded = __ldcs(reinterpret_cast<const float4*>(from + at));
                cells[e] = *reinterpret_cast<const Cell<R>*>(&loaded);
            });
        } else {
            for_cells<K>(first, next, [&](int e, uint64_t at) {
#pragma unroll
                for (int a = 0; a < 1 << CELL_BITS<R>; ++a) {
                    cells[e].z[a] = from[static_cast<int64_t>(at + a) * stride];
                }
            });
        }
    }
};

// A transform of the tile, window by window, down from the one that holds its highest bits or up
// to it.
template <bool DOWN, class R, int K, int TILE_CELLS>
__device__ __forceinline__ void transform(const Tiling<R, K, TILE_CELLS>& tiling,
                                          Cell<R> (&cells)[1 << K], unsigned char* memory) {
#pragma unroll(TILE_CELLS ? 4 : 1)
    for (uint32_t step = 0; step < tiling.rounds; ++step) {
        const uint32_t round = DOWN ? tiling.rounds - 1 - step : step;
        if (step > 0) {
            tiling.exchange(cells, memory, tiling.window_of(DOWN ? round + 1 : round - 1),
                            tiling.window_of(round));
        }
        transform_window<R, K>(cells, tiling.active_of(round),
                               tiling.column_bits == 0 && round == 0);
    }
}

// Whole states, a tile each.
template <class R, int K, int TILE_CELLS, bool LAYERED>
__device__ void diagonal_gradient(const DiagonalGradientArgs& args) {
    constexpr int C = CELL_BITS<R>, CELLS = 1 << K;
    constexpr bool GROUPS = TILE_CELLS == 0 || !separate_factors<K, TILE_CELLS>;
    extern __shared__ __align__(16) unsigned char dynamic[];

    const Tiling<R, K, TILE_CELLS> tiling(args);
    const uint32_t threads = tiling.threads();
    const uint32_t thread = GROUPS ? threadIdx.x & (threads - 1) : threadIdx.x;
    const uint32_t group = GROUPS ? threadIdx.x / threads : 0;
    const uint32_t group_bits = GROUPS ? args.group_bits : 0;
    const uint32_t n = args.num_qubits;
    const uint32_t home = tiling.window_of(tiling.rounds - 1);
    // That in which the diagonal meets the tile.
    const uint32_t window = !LAYERED && args.before ? tiling.window_of(0) : home;
    const uint32_t first = spread<K>(thread, home) << C;
    const auto offset = [](uint32_t i) { return uint64_t(i); };
    unsigned char* memory = dynamic + group * args.memory_size;
    double* terms = reinterpret_cast<double*>(dynamic + args.features_at) + group * n * n;
    const R scale = static_cast<R>(args.scale);

    const uint64_t parts = (args.batch + (1u << group_bits) - 1) >> group_bits;
    const uint64_t begin = uint64_t(blockIdx.x) * args.parts;
    const uint64_t end = min(begin + args.parts, parts);
    for (uint64_t part = begin; part < end; ++part) {
        const uint64_t wanted = part << group_bits | group;
        const bool exists = !GROUPS || wanted < args.batch;
        const uint64_t row = exists ? wanted : args.batch - 1;
        const Source<R, K> source(args, row);
        const uint32_t state = GROUPS ? 0 : static_cast<uint32_t>(part - begin) % args.ahead;
        // Cotangents are on their way while a block's tables are made, which spares iqp, n = 12,
        // complex128 7 %. Small states that share a block lose as much, so theirs wait.
        Cell<R> cells[CELLS];
        if (!LAYERED && !GROUPS) source.load(cells, first, home, offset);
        sync_group(threads);  // everybody is done with the memory of before

        // Either the threads of the tile make its tables, or each warp those of a state.
        if (GROUPS || args.ahead == 1) {
            const Diagonal<R, K, TILE_CELLS> diagonal{
                args, dynamic + args.tables_at + group * args.tables_size, thread, threads};
            diagonal.load(row, window, false);
            diagonal.tabulate(0);
        } else if (state == 0) {
            const uint32_t item = threadIdx.x / 32;
            if (row + item < args.batch) {
                const Diagonal<R, K, TILE_CELLS> diagonal{
                    args, dynamic + args.tables_at + item * args.tables_size, threadIdx.x & 31, 32};
                diagonal.load(row + item, window, false);
                diagonal.tabulate(0);
            }
            __syncthreads();
        }
        const uint32_t table = GROUPS ? group : state;
        const Diagonal<R, K, TILE_CELLS> diagonal{
            args, dynamic + args.tables_at + table * args.tables_size, thread, threads};
        Complex<R>* factors = GROUPS ? diagonal.factors()
                                     : reinterpret_cast<Complex<R>*>(dynamic + args.factors_at);
        if (!LAYERED && GROUPS) source.load(cells, first, home, offset);
        diagonal.factorise(factors, thread);

        R found[coefficients(C + K)] = {};
        const auto find = [&](R scale) {
            R t[CELLS << C];
            diagonal.for_factors(factors, thread, scale, [&](int e, int a, Complex<R> factor) {
                const Complex<R> u = cells[e].z[a];
                t[e << C | a] = u.im * factor.re - u.re * factor.im;
            });
            add_coefficients<C + K>(t, found);
        };
        if constexpr (!LAYERED) {
            if (args.before) transform<true>(tiling, cells, dynamic);
            find(static_cast<R>(args.last_scale));
        } else {
            const auto transform_back = [&] {
                transform<true>(tiling, cells, dynamic);
                if (tiling.rounds > 1) {
                    tiling.exchange(cells, dynamic, tiling.window_of(0), home);
                }
            };
            Cell<R>* stash = reinterpret_cast<Cell<R>*>(dynamic + args.stash_at) + threadIdx.x;
#pragma unroll 1
            for (uint32_t rep = args.reps; rep > 1; --rep) {
                // The state before the diagonal, less one scale.
#pragma unroll 1
                for (uint32_t i = 1; i < rep; ++i) {
                    diagonal.for_factors(factors, thread, scale,
                                         [&](int e, int a, Complex<R> factor) {
                        Complex<R>& z = cells[e].z[a];
                        z = i == 1 ? factor : z * factor;
                    });
                    transform_back();
                }
                const bool last = rep == args.reps;
                // All at once: loads between the products would wait for one another.
                Cell<R> u[CELLS];
                if (last) {
                    source.load(u, first, home, offset);
                } else {
#pragma unroll
                    for (int e = 0; e < CELLS; ++e) u[e] = stash[e * blockDim.x];
                }
                R t[CELLS << C];
                const R factor_scale = last ? static_cast<R>(args.last_scale) : scale;
                diagonal.for_factors(factors, thread, factor_scale,
                                     [&](int e, int a, Complex<R> factor) {
                    const Complex<R> before = cells[e].z[a];
                    const Complex<R> v = u[e].z[a] * Complex<R>{factor.re, -factor.im};
                    t[e << C | a] = v.im * before.re - v.re * before.im;
                    cells[e].z[a] = v;
                });
                add_coefficients<C + K>(t, found);
                transform_back();
                if (rep == 2) break;
#pragma unroll
                for (int e = 0; e < CELLS; ++e) stash[e * blockDim.x] = cells[e];
            }
            find(scale);
        }

        const Moments<R, C + K> moments{reinterpret_cast<R*>(memory), thread,
                                        diagonal.thread_bits()};
        sync_group(threads);  // everybody has read what was exchanged
        moments.share(found);
        const uint32_t* places = diagonal.places();
        const auto of = [&](uint32_t j, uint32_t k) {
            return args.scale * moments.coefficient(j == NO_BIT ? NO_BIT : places[j],
                                                    k == NO_BIT ? NO_BIT : places[k]);
        };
        for (uint32_t i = thread; i < n * (n + 1) / 2; i += threads) {
            const Entry entry = entry_of(i, n);
            const uint32_t j = entry.j, k = entry.k;
            if (args.kind == EXPLICIT) {
                const uint32_t feature = j == k ? j : n + pair_index(n, j, k);
                const double gradient = explicit_gradient(j, k, of);
                if (exists) store_real(args, row, feature, gradient);
            } else if (j == k) {
                terms[j * n + j] = own_term(args.kind, j, of);
            } else {
                const double term = pair_term(args.kind, j, k, of) *
                                    args.multiplicity[pair_index(n, j, k)];
                terms[j * n + k] = term * slope(args.kind, load_feature(args, row, k));
                terms[k * n + j] = term * slope(args.kind, load_feature(args, row, j));
            }
        }
        if (args.kind == EXPLICIT) continue;
        sync_group(threads);
        for (uint32_t j = thread; j < n; j += threads) {
            double gradient = 0;
            for (uint32_t k = 0; k < n; ++k) gradient += terms[j * n + k];
            if (exists) store_real(args, row, j, gradient);
        }
    }
}

// A tile of a larger state: transforms of its bits, between them the diagonal that takes the
// moments.
template <class R, int K>
__device__ void gradient_pass(const DiagonalGradientArgs& args) {
    constexpr int C = CELL_BITS<R>, CELLS = 1 << K;
    extern __shared__ __align__(16) unsigned char dynamic[];

    const Tiling<R, K, 0> tiling(args);
    const uint32_t threads = tiling.threads(), thread = threadIdx.x;
    const uint32_t top = tiling.window_of(tiling.rounds - 1), bottom = tiling.window_of(0);
    const uint32_t number_bits = args.num_qubits - tiling.tile_bits;
    const uint64_t tiles = args.batch << number_bits;
    const auto offset = [&](uint32_t i) { return tiling.offset(i); };
    const auto first = [&](uint32_t window) {
        return tiling.offset(spread<K>(thread, window) << C);
    };
    // A block takes neighbouring tiles of a state, for which it reads the features once.
    const uint64_t begin = uint64_t(blockIdx.x) * args.parts;
    const uint64_t end = min(begin + args.parts, tiles);
    for (uint64_t tile = begin; tile < end; ++tile) {
        const uint64_t row = tile >> number_bits;
        const uint64_t number = tile & ((uint64_t(1) << number_bits) - 1);
        const uint64_t base = tiling.base(number);
        Cell<R> cells[CELLS];
        uint32_t window = top;
        __syncthreads();  // everybody is done with the memory of before
        Source<R, K>(args, row).load(cells, base + first(top), top, offset);
        if (args.before) {
            transform<true>(tiling, cells, dynamic);
            window = bottom;
        }
        if (args.sums) {
            const Diagonal<R, K, 0> diagonal{args, dynamic + args.tables_at, thread, threads};
            if (tile == begin || number == 0) diagonal.load(row, window, false);
            diagonal.tabulate(number << tiling.tile_bits);
            diagonal.factorise(diagonal.factors(), thread);
            R t[CELLS << C];
            const R scale = static_cast<R>(args.last_scale);
            if (args.states) {
                const auto* states = static_cast<const Complex<R>*>(args.states) +
                                     (row << args.num_qubits) + base;
                Cell<R> before;
                diagonal.for_factors(diagonal.factors(), thread, scale,
                                     [&](int e, int a, Complex<R> factor) {
                    if (a == 0) {
                        const uint64_t at = first(window) + offset(e << (window + C));
                        before = *reinterpret_cast<const Cell<R>*>(states + at);
                    }
                    const Complex<R> state = before.z[a];
                    const Complex<R> v = cells[e].z[a] * Complex<R>{factor.re, -factor.im};
                    t[e << C | a] = v.im * state.re - v.re * state.im;
                    cells[e].z[a] = v;
                });
            } else {
                diagonal.for_factors(diagonal.factors(), thread, scale,
                                     [&](int e, int a, Complex<R> factor) {
                    const Complex<R> u = cells[e].z[a];
                    t[e << C | a] = u.im * factor.re - u.re * factor.im;
                });
            }
            R found[coefficients(C + K)] = {};
            add_coefficients<C + K>(t, found);
            const Moments<R, C + K> moments{reinterpret_cast<R*>(dynamic), thread,
                                            diagonal.thread_bits()};
            __syncthreads();  // everybody has read what was exchanged
            moments.share(found);
            const uint32_t bits = tiling.tile_bits, count = coefficients(bits);
            double* sums = args.sums + (row * count << number_bits) + number;
            for (uint32_t i = thread; i < count; i += threads) {
                uint32_t j = NO_BIT, k = NO_BIT, at = 0;
                if (i > 0) {
                    const Entry entry = entry_of(i - 1, bits);
                    j = diagonal.tile_order(entry.j, window);
                    k = diagonal.tile_order(entry.k, window);
                    at = coefficient_index(bits, entry.j, entry.k);
                }
                const double sum = moments.coefficient(j, k) * (args.states ? 1.0 : args.scale);
                double& to = sums[uint64_t(at) << number_bits];
                to = args.add_sums ? to + sum : sum;
            }
            __syncthreads();  // everybody is done with the moments
        }
        if (args.after) {
            if (window == top) {
                transform<true>(tiling, cells, dynamic);
                window = bottom;
            } else {
                transform<false>(tiling, cells, dynamic);
                window = top;
            }
        }
        if (!args.target) continue;
        // Without columns beside them, only the top window's lanes hold neighbouring cells.
        if (window != top && tiling.column_bits == 0) {
            tiling.exchange(cells, dynamic, window, top);
            window = top;
        }
        Complex<R>* target =
            static_cast<Complex<R>*>(args.target) + (row << args.num_qubits) + base;
        const auto next = [&](Complex<R>* at, int bit) {
            return at + offset(1u << (window + C + bit));
        };
        for_cells<K>(target + first(window), next, [&](int e, Complex<R>* at) {
            *reinterpret_cast<Cell<R>*>(at) = cells[e];
        });
    }
}

}  // namespace qdp

// Any whole state, K bits of a cell's number in registers.
#define QDP_GRADIENT(R, SUFFIX, K, THREADS)                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) qdp_diagonal_gradient_##K##_##SUFFIX( \
        const __grid_constant__ qdp::DiagonalGradientArgs args) {                               \
        qdp::wait_for_previous();                                                               \
        if (args.reps == 1) {                                                                   \
            qdp::diagonal_gradient<R, K, 0, false>(args);                                       \
        } else {                                                                                \
            qdp::diagonal_gradient<R, K, 0, true>(args);                                        \
        }                                                                                       \
    }
#define QDP_GRADIENTS(K, THREADS)        \
    QDP_GRADIENT(float, c64, K, THREADS) \
    QDP_GRADIENT(double, c128, K, THREADS)

QDP_GRADIENTS(1, 256)
QDP_GRADIENTS(2, 256)
QDP_GRADIENTS(3, 256)
QDP_GRADIENTS(4, 128)

// Whole states of 2^CELLS cells, with one diagonal and with several.
#define QDP_WHOLE(R, SUFFIX, CELLS, THREADS, LAYERED, NAME, BLOCKS)                             \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                               \
        qdp_diagonal_gradient_##NAME##_##CELLS##_##SUFFIX(                                      \
            const __grid_constant__ qdp::DiagonalGradientArgs args) {                           \
        qdp::wait_for_previous();                                                               \
        qdp::diagonal_gradient<R, 4, CELLS, LAYERED>(args);                                     \
    }
#define QDP_WHOLES(CELLS, THREADS)                                                              \
    QDP_WHOLE(float, c64, CELLS, THREADS, false, single, 512 / THREADS)                         \
    QDP_WHOLE(double, c128, CELLS, THREADS, false, single, 512 / THREADS)                       \
    QDP_WHOLE(float, c64, CELLS, THREADS, true, layered, 256 / THREADS ? 256 / THREADS : 1)     \
    QDP_WHOLE(double, c128, CELLS, THREADS, true, layered, 256 / THREADS ? 256 / THREADS : 1)

QDP_WHOLES(7, 128)
QDP_WHOLES(8, 128)
QDP_WHOLES(9, 128)
QDP_WHOLES(10, 128)
QDP_WHOLES(11, 128)
QDP_WHOLES(12, 256)
QDP_WHOLES(13, 512)

// Tiles of larger states.
#define QDP_GRADIENT_PASS(R, SUFFIX)                                                           \
    extern "C" __global__ void __launch_bounds__(512) qdp_diagonal_gradient_pass_##SUFFIX(     \
        const __grid_constant__ qdp::DiagonalGradientArgs args) {                              \
        qdp::wait_for_previous();                                                              \
        qdp::gradient_pass<R, 4>(args);                                                        \
    }
QDP_GRADIENT_PASS(float, c64)
QDP_GRADIENT_PASS(double, c128)
