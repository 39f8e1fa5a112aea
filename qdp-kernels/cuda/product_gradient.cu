// Gradients by the features of product states.
//
// The derivative by feature k is the real part of the sum over all indices of conj(g) times the
// factors of the other qubits and the derivative of qubit k's. A thread holds some amplitudes of
// the cotangent g, whose bits it contracts with tables of factors; for the bits of its own number
// and those above, its contracted value takes the product of the factors of all but one, made from
// both sides and never by division. So each thread has a real number for each bit, and what is left
// is to add them up.
//
// Short rows have teams of 2^T threads, several to a block. A long row has blocks of its own: each
// goes through tiles of its chunk of the row, and where there are several chunks leaves its sums to
// a kernel that adds them up.

#include "gradient.cuh"
#include "product.cuh"
#include "tile.cuh"

namespace qdp {

// Mirrored, as are the constants, in qdp-core/src/cuda/kernels/gradient/product.rs.
struct ProductGradientArgs : GradientArgs {
    FactorArgs factor;
    double* sums;         // [row][bit][chunk], where rows have several chunks
    uint32_t chunk_bits;  // of a long row
    uint32_t unused;
};

constexpr uint32_t MAX_TEAM_BITS = 7;   // 2^T threads at most share a row
constexpr uint32_t MAX_OUTER_BITS = 4;  // 2^bits tiles at most make a chunk
constexpr uint32_t MAX_QUBITS = 50;

// Bits of a thread's amplitudes: 8 loads of 16 bytes.
template <class R>
constexpr int HELD_BITS = sizeof(R) == 4 ? 4 : 3;

template <int T>
constexpr uint32_t TEAMS_THREADS = T < 2 ? 64 : 128;  // shared memory for the rows of short teams

// A qubit's factor, and its derivative.
template <class R>
struct BitSlope {
    Complex<R> value[2], derivative[2];
};

// The products over the bits that threads hold, the lower ones and the upper ones apart: with all
// their factors, and with the derivative of one.
template <class R>
struct HeldTables {
    static constexpr int LOW = HELD_BITS<R> / 2, HIGH = HELD_BITS<R> - LOW;
    static constexpr uint32_t ENTRIES = ((LOW + 1) << LOW) + ((HIGH + 1) << HIGH);
    Complex<R> low[LOW + 1][1 << LOW];  // [derived bit, or LOW for none]
    Complex<R> high[HIGH + 1][1 << HIGH];
};

// a += x y
template <class R>
__device__ __forceinline__ void multiply_add(Complex<R>& a, Complex<R> x, Complex<R> y) {
    a.re += x.re * y.re - x.im * y.im;
    a.im += x.re * y.im + x.im * y.re;
}

// What one row needs, shared by its team.
template <class R, int T, bool LONG>
struct ProductRow {
    static constexpr int K = HELD_BITS<R>;
    static constexpr int BITS = LONG ? int(MAX_QUBITS) : K + T;
    BitSlope<R> bits[BITS];
    HeldTables<R> held;
    // Of a long row's chunk: the factors of the bits above it, and those of its tiles.
    Complex<R> top, outer[LONG ? 1 << MAX_OUTER_BITS : 1];
};

template <class R, int T, bool LONG>
struct ProductGradient {
    static constexpr int K = HELD_BITS<R>, C = WIDE_BITS<R>, TILE = K + T;
    static constexpr int LOW = HeldTables<R>::LOW, HIGH = HeldTables<R>::HIGH;
    static constexpr uint32_t THREADS = TEAMS_THREADS<T>, ROWS = THREADS >> T;
    using Row = ProductRow<R, T, LONG>;
    static constexpr uint32_t WARPS = THREADS / 32;

    const ProductGradientArgs& args;
    const uint32_t team = threadIdx.x >> T, thread = threadIdx.x & ((1u << T) - 1);

    // The bit of the index that is a held one: whole loads take the lowest, threads the next.
    static __device__ __forceinline__ constexpr int held_bit(int bit) {
        return bit < C ? bit : T + bit;
    }
    static __device__ __forceinline__ constexpr int thread_bit(int bit) { return C + bit; }

    // Reads the conjugated amplitudes of a tile. Of a row shorter than that, the others are zero.
    __device__ __forceinline__ void load(Complex<R> (&a)[1 << K], const Complex<R>* row,
                                         uint64_t first, bool wide) const {
        const int64_t stride = args.cotangent.col_stride;
#pragma unroll
        for (uint32_t j = 0; j < 1u << (K - C); ++j) {
            const uint64_t i = first + (j << (T + C)) + (thread << C);
            Complex<R> z[1 << C];
            if (wide) {
                const float4 bytes = __ldcs(reinterpret_cast<const float4*>(row + i));
                memcpy(z, &bytes, sizeof(bytes));
            } else {
#pragma unroll
                for (uint32_t u = 0; u < 1u << C; ++u) {
                    z[u] = {};
                    if (T > 0 || i + u < uint64_t(1) << args.num_qubits) {
                        z[u] = row[static_cast<int64_t>(i + u) * stride];
                    }
                }
            }
#pragma unroll
            for (uint32_t u = 0; u < 1u << C; ++u) a[j << C | u] = {z[u].re, -z[u].im};
        }
    }

    // Fills the tables of the block's rows.
    __device__ void tabulate(Row* rows, uint64_t first_row, uint32_t count, uint64_t chunk,
                             uint32_t outer) const {
        const uint32_t n = args.num_qubits, bits = LONG ? n : TILE;
        for (uint32_t i = threadIdx.x; i < count * bits; i += THREADS) {
            const uint32_t bit = i % bits;
            BitSlope<R>& to = rows[i / bits].bits[bit];
            if (bit >= n) {  // of a row shorter than a tile
                to = {{{1, 0}, {0, 0}}, {}};
                continue;
            }
            const uint32_t feature = args.factor.big_endian ? n - 1 - bit : bit;
            const double x = load_feature(args, first_row + i / bits, feature);
            const Slope of = slope(args.factor, x);
            to = {{round_to<R>(of.value.zero), round_to<R>(of.value.one)},
                  {round_to<R>(of.derivative.zero), round_to<R>(of.derivative.one)}};
            if (!isfinite(x)) {
                to = {{not_a_number<R>(), not_a_number<R>()},
                      {not_a_number<R>(), not_a_number<R>()}};
            }
        }
        __syncthreads();
        constexpr uint32_t LOWS = (LOW + 1) << LOW;
        for (uint32_t i = threadIdx.x; i < count * HeldTables<R>::ENTRIES; i += THREADS) {
            Row& row = rows[i / HeldTables<R>::ENTRIES];
            const uint32_t entry = i % HeldTables<R>::ENTRIES;
            const bool upper = entry >= LOWS;
            const uint32_t at = upper ? entry - LOWS : entry, size = upper ? HIGH : LOW;
            const uint32_t derived = at >> size;
            Complex<R> product = {1, 0};
            for (uint32_t bit = 0; bit < size; ++bit) {
                const BitSlope<R>& of = row.bits[held_bit((upper ? LOW : 0) + bit)];
                const uint32_t set = at >> bit & 1;
                product = product * (bit == derived ? of.derivative[set] : of.value[set]);
            }
            (upper ? &row.held.high[0][0] : &row.held.low[0][0])[at] = product;
        }
        if (LONG) {
            const BitSlope<R>* const bits = rows->bits + TILE;
            const uint32_t tile = threadIdx.x - 32;
            if (tile < 1u << outer) rows->outer[tile] = product(bits, outer, tile);
            if (threadIdx.x >= THREADS - 32) {
                const uint32_t lane = threadIdx.x % 32, tops = n - TILE - outer;
                Complex<R> part = {1, 0};
                for (uint32_t bit = lane; bit < tops; bit += 32) {
                    part = part * bits[outer + bit].value[chunk >> bit & 1];
                }
                for (uint32_t step = 16; step > 0; step >>= 1) {
                    part = part * Complex<R>{__shfl_xor_sync(~0u, part.re, step),
                                             __shfl_xor_sync(~0u, part.im, step)};
                }
                if (lane == 0) rows->top = part;
            }
        }
        __syncthreads();
    }

    // Contracts a tile: with all factors but for each held bit's, whose derivative takes its place;
    // answers the contraction with all.
    __device__ __forceinline__ Complex<R> contract(const Complex<R> (&a)[1 << K],
                                                   const HeldTables<R>& held,
                                                   Complex<R> (&derived)[K]) const {
        Complex<R> by_low[1 << LOW] = {}, by_high[1 << HIGH] = {};
#pragma unroll
        for (int e = 0; e < 1 << K; ++e) {
            const int low = e & ((1 << LOW) - 1), high = e >> LOW;
            multiply_add(by_low[low], a[e], held.high[HIGH][high]);
            multiply_add(by_high[high], a[e], held.low[LOW][low]);
        }
        Complex<R> all = {};
#pragma unroll
        for (int k = 0; k < K; ++k) derived[k] = {};
#pragma unroll
        for (int i = 0; i < 1 << LOW; ++i) {
            multiply_add(all, by_low[i], held.low[LOW][i]);
#pragma unroll
            for (int k = 0; k < LOW; ++k) multiply_add(derived[k], by_low[i], held.low[k][i]);
        }
#pragma unroll
        for (int i = 0; i < 1 << HIGH; ++i) {
#pragma unroll
            for (int k = 0; k < HIGH; ++k) {
                multiply_add(derived[LOW + k], by_high[i], held.high[k][i]);
            }
        }
        return all;
    }

    // The product of the factors of the bits from `from` on, `count` of them, which `index` sets;
    // of bit `derived` the derivative, if it is one of them.
    static __device__ Complex<R> product(const BitSlope<R>* bits, uint32_t count, uint64_t index,
                                         uint32_t derived = ~0u) {
        Complex<R> product = {1, 0};
        for (uint32_t bit = 0; bit < count; ++bit) {
            const uint32_t set = index >> bit & 1;
            product = product * (bit == derived ? bits[bit].derivative[set] : bits[bit].value[set]);
        }
        return product;
    }

    __device__ __forceinline__ void put(uint64_t row, uint64_t chunk, uint32_t bit, double sum) const {
        const uint32_t n = args.num_qubits;
        if (LONG && args.chunk_bits < n) {
            args.sums[((row * n + bit) << (n - args.chunk_bits)) + chunk] = sum;
        } else {
            store_real(args, row, args.factor.big_endian ? n - 1 - bit : bit, sum);
        }
    }

    // For the bits of a chunk above its tiles and those above the chunk: from the contraction of
    // each tile with the factors of the bits below.
    __device__ void finish_outer(const Row& row, const Complex<R> (*tiles)[WARPS],
                                 uint64_t at_row, uint64_t chunk, uint32_t outer) const {
        const uint32_t n = args.num_qubits, tops = n - TILE - outer, lane = threadIdx.x;
        const BitSlope<R>* const outer_bits = row.bits + TILE;
        const BitSlope<R>* const top_bits = outer_bits + outer;
        Complex<double> sum = {0, 0};
        const bool holds = lane < 1u << outer;
        for (uint32_t w = 0; holds && w < WARPS; ++w) {
            sum = sum + Complex<double>{tiles[lane][w].re, tiles[lane][w].im};
        }
        const auto total = [](double x) {
            for (uint32_t step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
            return x;
        };
        const auto weighted = [&](Complex<R> weight) {
            return sum * Complex<double>{weight.re, weight.im};
        };
        for (uint32_t bit = 0; bit < outer; ++bit) {
            const Complex<R> weight =
                holds ? product(outer_bits, outer, lane, bit) : Complex<R>{};
            const double of_bit = total(weighted(weight * row.top).re);
            if (lane == 0) put(at_row, chunk, TILE + bit, of_bit);
        }
        const Complex<double> mine = weighted(holds ? row.outer[lane] : Complex<R>{});
        sum = {total(mine.re), total(mine.im)};
        for (uint32_t bit = lane; bit < tops; bit += 32) {
            put(at_row, chunk, TILE + outer + bit,
                weighted(product(top_bits, tops, chunk, bit)).re);
        }
    }

    __device__ void run(Row* rows, R (*parts)[THREADS], Complex<R> (*tiles)[WARPS]) const {
        const uint32_t n = args.num_qubits;
        const uint32_t outer = LONG ? args.chunk_bits - TILE : 0;
        const uint32_t chunk_bits = LONG ? n - args.chunk_bits : 0;
        const uint64_t first_row = LONG ? blockIdx.x >> chunk_bits : uint64_t(blockIdx.x) * ROWS;
        const uint64_t chunk = LONG ? blockIdx.x & ((uint64_t(1) << chunk_bits) - 1) : 0;
        const auto count = static_cast<uint32_t>(min(uint64_t(ROWS), args.batch - first_row));
        const uint32_t in_block = min(team, count - 1);  // beyond the batch, its last row again

        const int64_t row_stride = args.cotangent.row_stride;
        const auto* const g = static_cast<const Complex<R>*>(args.cotangent.values) +
                              static_cast<int64_t>(first_row + in_block) * row_stride;
        const bool wide = args.cotangent.col_stride == 1 && n >= K &&
                          reinterpret_cast<uintptr_t>(g) % 16 == 0;
        const uint64_t first = LONG ? chunk << args.chunk_bits : 0;
        Complex<R> a[1 << K];
        load(a, g, first, wide);  // on its way while the tables are made
        tabulate(rows, first_row, count, chunk, outer);

        const Row& row = rows[in_block];
        Complex<R> own = {1, 0};  // the factors of the thread's bits
#pragma unroll
        for (int bit = 0; bit < T; ++bit) {
            own = own * row.bits[thread_bit(bit)].value[thread >> bit & 1];
        }
        R of_held[K] = {};
        Complex<R> contracted = {};
        const auto add_held = [&](const Complex<R> (&derived)[K], Complex<R> weight) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                of_held[k] += derived[k].re * weight.re - derived[k].im * weight.im;
            }
        };
        Complex<R> derived[K];
        if (!LONG) {
            contracted = contract(a, row.held, derived);
            add_held(derived, own);
        } else {
            const Complex<R> own_and_top = own * row.top;
            for (uint32_t tile = 0;;) {
                const Complex<R> all = contract(a, row.held, derived);
                add_held(derived, own_and_top * row.outer[tile]);
                multiply_add(contracted, all, row.outer[tile]);
                Complex<R> sum = all * own;
#pragma unroll
                for (uint32_t step = 16; step > 0; step >>= 1) {
                    sum.re += __shfl_xor_sync(~0u, sum.re, step);
                    sum.im += __shfl_xor_sync(~0u, sum.im, step);
                }
                if (threadIdx.x % 32 == 0) tiles[tile][threadIdx.x / 32] = sum;
                if (++tile == 1u << outer) break;
                load(a, g, first + (uint64_t(tile) << TILE), wide);
            }
            contracted = contracted * row.top;
        }

#pragma unroll
        for (int k = 0; k < K; ++k) parts[k][threadIdx.x] = of_held[k];
        // For a thread's bits, the products of the factors below and above each.
        Complex<R> above[T + 1];
        above[T] = contracted;
#pragma unroll
        for (int bit = T - 1; bit >= 0; --bit) {
            above[bit] = above[bit + 1] * row.bits[thread_bit(bit)].value[thread >> bit & 1];
        }
        Complex<R> below = {1, 0};
#pragma unroll
        for (int bit = 0; bit < T; ++bit) {
            const BitSlope<R>& of = row.bits[thread_bit(bit)];
            const uint32_t set = thread >> bit & 1;
            parts[K + bit][threadIdx.x] = (below * of.derivative[set] * above[bit + 1]).re;
            below = below * of.value[set];
        }
        __syncthreads();
        add_up(parts, first_row, count, chunk);
        if (LONG && threadIdx.x < 32) finish_outer(row, tiles, first_row, chunk, outer);
    }

    // Adds up the threads' parts of each row and bit, by as many lanes as there are for each.
    __device__ void add_up(const R (*parts)[THREADS], uint64_t first_row, uint32_t count,
                           uint64_t chunk) const {
        constexpr uint32_t SUMS = ROWS * TILE;
        constexpr uint32_t SHARE = SUMS > THREADS / 2   ? 1
                                   : SUMS > THREADS / 4 ? 2
                                   : SUMS > THREADS / 8 ? 4
                                                        : 8;
        constexpr uint32_t LANES = SHARE < 1u << T ? SHARE : 1u << T, EACH = (1u << T) / LANES;
        for (uint32_t i = threadIdx.x; i < (SUMS * LANES + 31) / 32 * 32; i += THREADS) {
            const uint32_t which = min(i / LANES, SUMS - 1), part = i % LANES;
            const uint32_t row = which % ROWS, k = which / ROWS;
            double sum = 0;
#pragma unroll 8
            for (uint32_t j = 0; j < EACH; ++j) {
                // Each lane begins at another bank.
                sum += parts[k][(row << T) + part * EACH + ((j + row + part) & (EACH - 1))];
            }
#pragma unroll
            for (uint32_t step = LANES / 2; step > 0; step >>= 1) {
                sum += __shfl_xor_sync(~0u, sum, step);
            }
            const uint32_t bit = k < K ? held_bit(k) : thread_bit(k - K);
            if (part == 0 && i / LANES < SUMS && row < count && bit < args.num_qubits) {
                put(first_row + row, chunk, bit, sum);
            }
        }
    }
};

template <class R, int T, bool LONG = false>
__device__ void product_gradient(const ProductGradientArgs& args) {
    using Of = ProductGradient<R, T, LONG>;
    __shared__ typename Of::Row rows[Of::ROWS];
    __shared__ R parts[Of::TILE][Of::THREADS];
    __shared__ Complex<R> tiles[LONG ? 1 << MAX_OUTER_BITS : 1][Of::WARPS];
    Of{args}.run(rows, parts, tiles);
}

// Adds up the sums of the chunks, by as many lanes for each row and bit as a power of two there are.
__device__ inline void product_gradient_combine(const ProductGradientArgs& args) {
    const uint32_t n = args.num_qubits, chunk_bits = n - args.chunk_bits;
    const uint32_t lane_bits = min(chunk_bits, WARP_BITS);
    const uint64_t thread = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const uint64_t which = thread >> lane_bits, count = args.batch * n;
    const uint32_t lane = threadIdx.x & ((1u << lane_bits) - 1);
    const double* const sums = args.sums + (min(which, count - 1) << chunk_bits);
    double sum = 0;
    for (uint64_t chunk = lane; chunk < uint64_t(1) << chunk_bits; chunk += 1u << lane_bits) {
        sum += sums[chunk];
    }
    for (uint32_t step = 1u << lane_bits >> 1; step > 0; step >>= 1) {
        sum += __shfl_xor_sync(~0u, sum, step);
    }
    if (lane == 0 && which < count) {
        const auto bit = static_cast<uint32_t>(which % n);
        store_real(args, which / n, args.factor.big_endian ? n - 1 - bit : bit, sum);
    }
}

}  // namespace qdp

extern "C" __global__ void __launch_bounds__(128)
    qdp_product_gradient_combine(const __grid_constant__ qdp::ProductGradientArgs args) {
    qdp::wait_for_previous();
    qdp::product_gradient_combine(args);
}

#define QDP_PRODUCT_GRADIENT(T)                     \
    QDP_PRODUCT_GRADIENT_OF(float, c64, T)          \
    QDP_PRODUCT_GRADIENT_OF(double, c128, T)
#define QDP_PRODUCT_GRADIENT_OF(R, SUFFIX, T)                                 \
    extern "C" __global__ void __launch_bounds__(qdp::TEAMS_THREADS<T>)       \
        qdp_product_gradient_##T##_##SUFFIX(                                  \
            const __grid_constant__ qdp::ProductGradientArgs args) {          \
        qdp::wait_for_previous();                                             \
        qdp::product_gradient<R, T>(args);                                    \
    }

QDP_PRODUCT_GRADIENT(0)
QDP_PRODUCT_GRADIENT(1)
QDP_PRODUCT_GRADIENT(2)
QDP_PRODUCT_GRADIENT(3)
QDP_PRODUCT_GRADIENT(4)
QDP_PRODUCT_GRADIENT(5)
QDP_PRODUCT_GRADIENT(6)
QDP_PRODUCT_GRADIENT(7)

// With as many blocks to a multiprocessor as registers allow without spilling.
#define QDP_PRODUCT_GRADIENT_LONG(R, SUFFIX, BLOCKS)                                  \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS)                         \
        qdp_product_gradient_long_##SUFFIX(                                           \
            const __grid_constant__ qdp::ProductGradientArgs args) {                  \
        qdp::wait_for_previous();                                                     \
        qdp::product_gradient<R, qdp::MAX_TEAM_BITS, true>(args);                     \
    }

QDP_PRODUCT_GRADIENT_LONG(float, c64, 6)
QDP_PRODUCT_GRADIENT_LONG(double, c128, 4)
