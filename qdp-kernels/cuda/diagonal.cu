// Layers of Walsh-Hadamard transforms and quadratic phases: iqp, zz, iqp-embedding.
//
// A block holds a tile of a state in shared memory. States up to 2^12 amplitudes are one tile and
// one launch, whatever the number of layers. Larger ones take passes over memory: a tile then has
// `tile_bits - column_bits` transformed bits from `low_bit` on, and `column_bits` of the lowest
// bits beside them, so that memory is read and written in whole lines. The first pass makes the
// amplitudes it transforms, the last one of a transform multiplies the next diagonal in.
//
// Phases are in turns as fixed point (32 bits for complex64, 64 for complex128), where adding is
// exact modulo one turn. A thread walks through its amplitudes in Gray-code order, so each phase
// is the one before plus what one flipped bit changes.

#include "common.cuh"

namespace qdp {

struct DiagonalArgs : Args {
    const uint32_t* multiplicity;  // how often each pair is coupled
    double scale;                  // of the amplitudes
    double last_scale;
    uint32_t kind;  // PairTerms
    uint32_t reps;
    uint32_t big_endian;
    uint32_t generate;     // make the tile instead of loading it
    uint32_t transforms;   // Walsh-Hadamard transforms of the tile
    uint32_t multiplies;   // how many of them a diagonal follows
    uint32_t low_bit;      // first transformed bit of the index
    uint32_t tile_bits;    // bits of the tile
    uint32_t column_bits;  // of those, low bits that are not transformed
    uint32_t unused;
};

constexpr uint32_t MAX_DIAGONAL_QUBITS = 40;
constexpr uint32_t MAX_TILE_BITS = 12;

// Mirrored by `PairTerms` in qdp-core/src/encoding/diagonal.rs, as are the formulas.
enum PairTerms : uint32_t { EXPLICIT, ZZ, MULTI };

template <class R>
struct Phase;
template <>
struct Phase<float> {
    using Turns = uint32_t;
    static __device__ Turns from(uint64_t turns) {
        return static_cast<uint32_t>((turns + 0x80000000ull) >> 32);
    }
    static __device__ Complex<float> cis(Turns turns) {
        Complex<float> z;
        sincospif(static_cast<float>(static_cast<int32_t>(turns)) * 0x1p-31f, &z.im, &z.re);
        return z;
    }
};
template <>
struct Phase<double> {
    using Turns = unsigned long long;
    static __device__ Turns from(uint64_t turns) { return turns; }
    static __device__ Complex<double> cis(Turns turns) {
        Complex<double> z;
        sincospi(static_cast<double>(static_cast<int64_t>(turns)) * 0x1p-63, &z.im, &z.re);
        return z;
    }
};

__device__ inline uint64_t turns(double phase) {
    const double HIGH = 0.15915494309189535, LOW = -9.839338337591243e-18;  // 1 / (2 pi)
    const double high = phase * HIGH;
    const double low = fma(phase, HIGH, -high) + phase * LOW;
    const double fraction = (high - rint(high)) + low;
    return static_cast<uint64_t>(__double2ll_rn(fraction * 0x1p64));
}

__device__ inline uint32_t pair_index(uint32_t n, uint32_t j, uint32_t k) {
    return j * (2 * n - j - 1) / 2 + k - j - 1;
}

// Coefficients of c + sum s_k b_k + sum w_jk b_j b_k.
template <class Turns, uint32_t N>
struct Quadratic {
    Turns constant;
    Turns singles[N];
    Turns pairs[N * (N - 1) / 2];
};

// Padding that keeps the strided accesses of the transform off each other's banks.
__device__ __forceinline__ uint32_t padded(uint32_t i) { return i + (i >> 4); }

template <class R>
struct Shared {
    using Turns = typename Phase<R>::Turns;
    Quadratic<Turns, MAX_DIAGONAL_QUBITS> state;  // by bit of the index
    Quadratic<Turns, MAX_TILE_BITS> tile;         // by bit of the tile, for its fixed bits
    double features[MAX_DIAGONAL_QUBITS];
    int bad;
};

// The coefficients for the state, from the features of one row.
template <class R>
__device__ void load_phase(const DiagonalArgs& args, uint64_t row, bool reporter, Shared<R>& shared) {
    using Turns = typename Phase<R>::Turns;
    const uint32_t n = args.num_qubits;
    if (threadIdx.x == 0) {
        shared.bad = 0;
        shared.state.constant = 0;
    }
    __syncthreads();
    for (uint32_t f = threadIdx.x; f < args.features; f += blockDim.x) {
        const double x = load_feature(args, row, f);
        if (f < n) shared.features[f] = x;
        if (!isfinite(x)) {
            shared.bad = 1;
            if (reporter) report(args, row, f, reason_not_finite(x));
        }
    }
    __syncthreads();
    const double PI = 3.14159265358979323846;
    // The single term of feature k, with the shares of its pairs; then its pairs with higher ones.
    for (uint32_t k = threadIdx.x; k < n; k += blockDim.x) {
        const double x = shared.features[k];
        const uint32_t bit_k = args.big_endian ? n - 1 - k : k;
        uint64_t single = turns(args.kind == ZZ ? 2.0 * x : x);
        uint64_t constant = args.kind == MULTI ? 0 - turns(x / 2.0) : 0;
        for (uint32_t j = 0; j < n; ++j) {
            if (j == k) continue;
            const uint32_t low = min(j, k), high = max(j, k);
            const uint32_t pair = pair_index(n, low, high);
            const uint64_t times = args.multiplicity[pair];
            uint64_t weight = 0;
            if (times && args.kind == EXPLICIT) {
                if (j > k) weight = turns(load_feature(args, row, n + pair));
            } else if (times) {
                const double y = shared.features[j];
                const double u = args.kind == ZZ ? 2.0 * (PI - shared.features[low]) *
                                                       (PI - shared.features[high])
                                                 : x * y;
                const uint64_t share = turns(u) * times;
                single += share;
                weight = 0 - 2 * share;
                if (args.kind == MULTI && j > k) constant -= turns(u / 2.0) * times;
            }
            if (j > k) {
                const uint32_t bit_j = args.big_endian ? n - 1 - j : j;
                shared.state.pairs[pair_index(n, min(bit_j, bit_k), max(bit_j, bit_k))] =
                    Phase<R>::from(weight);
            }
        }
        shared.state.singles[bit_k] = Phase<R>::from(single);
        atomicAdd(&shared.state.constant, static_cast<Turns>(Phase<R>::from(constant)));
    }
    __syncthreads();
}

// Bit of the index that bit f of the tile is.
__device__ __forceinline__ uint32_t index_bit(const DiagonalArgs& args, uint32_t f) {
    return f < args.column_bits ? f : args.low_bit + f - args.column_bits;
}

// The coefficients for the tile whose fixed bits are those of `base`.
template <class R>
__device__ void restrict_phase(const DiagonalArgs& args, uint64_t base, Shared<R>& shared) {
    using Turns = typename Phase<R>::Turns;
    const uint32_t n = args.num_qubits;
    const auto pair = [&](uint32_t a, uint32_t b) {
        return shared.state.pairs[pair_index(n, min(a, b), max(a, b))];
    };
    if (threadIdx.x == 0) shared.tile.constant = shared.state.constant;
    __syncthreads();
    for (uint32_t k = threadIdx.x; k < n; k += blockDim.x) {
        if (!(base >> k & 1)) continue;
        Turns sum = shared.state.singles[k];
        for (uint32_t j = 0; j < k; ++j) {
            if (base >> j & 1) sum += pair(j, k);
        }
        atomicAdd(&shared.tile.constant, sum);
    }
    for (uint32_t f = threadIdx.x; f < args.tile_bits; f += blockDim.x) {
        const uint32_t bit = index_bit(args, f);
        Turns single = shared.state.singles[bit];
        for (uint32_t k = 0; k < n; ++k) {
            if (base >> k & 1) single += pair(bit, k);
        }
        shared.tile.singles[f] = single;
        for (uint32_t g = 0; g < f; ++g) {
            shared.tile.pairs[pair_index(args.tile_bits, g, f)] = pair(index_bit(args, g), bit);
        }
    }
    __syncthreads();
}

// Calls use(i, phase of amplitude i) for the tile's amplitudes of this thread, i = thread modulo
// the block's size.
template <class R, class Use>
__device__ __forceinline__ void for_phases(const DiagonalArgs& args, const Shared<R>& shared, Use use) {
    using Turns = typename Phase<R>::Turns;
    const uint32_t bits = args.tile_bits;
    const uint32_t thread_bits = min(bits, 31 - __clz(blockDim.x));
    if (threadIdx.x >= 1u << thread_bits) return;
    const auto pair = [&](uint32_t a, uint32_t b) {
        return shared.tile.pairs[pair_index(bits, a, b)];
    };
    Turns phase = shared.tile.constant;
    for (uint32_t f = 0; f < thread_bits; ++f) {
        if (!(threadIdx.x >> f & 1)) continue;
        phase += shared.tile.singles[f];
        for (uint32_t g = 0; g < f; ++g) {
            if (threadIdx.x >> g & 1) phase += pair(g, f);
        }
    }
    uint32_t index = threadIdx.x;
    use(index, phase);
    for (uint32_t step = 1; step < 1u << (bits - thread_bits); ++step) {
        const uint32_t f = thread_bits + __ffs(step) - 1;
        Turns change = shared.tile.singles[f];
        for (uint32_t g = 0; g < f; ++g) {
            if (index >> g & 1) change += pair(g, f);
        }
        for (uint32_t g = f + 1; g < bits; ++g) {
            if (index >> g & 1) change += pair(f, g);
        }
        phase = index >> f & 1 ? phase - change : phase + change;
        index ^= 1u << f;
        use(index, phase);
    }
}

// Transforms K bits of the tile from bit `from` on, 2^K amplitudes at a time in registers.
template <int K, class R>
__device__ __forceinline__ void transform_bits(Complex<R>* tile, uint32_t tile_bits, uint32_t from) {
    constexpr int SIZE = 1 << K;
    const uint32_t groups = 1u << (tile_bits - K);
    for (uint32_t g = threadIdx.x; g < groups; g += blockDim.x) {
        const uint32_t base = (g >> from) << (from + K) | (g & ((1u << from) - 1));
        Complex<R> z[SIZE];
#pragma unroll
        for (int e = 0; e < SIZE; ++e) z[e] = tile[padded(base + (uint32_t(e) << from))];
#pragma unroll
        for (int half = 1; half < SIZE; half *= 2) {
#pragma unroll
            for (int e = 0; e < SIZE; ++e) {
                if (e & half) continue;
                const Complex<R> a = z[e], b = z[e | half];
                z[e] = a + b;
                z[e | half] = a - b;
            }
        }
#pragma unroll
        for (int e = 0; e < SIZE; ++e) tile[padded(base + (uint32_t(e) << from))] = z[e];
    }
    __syncthreads();
}

template <class R>
__device__ void transform(Complex<R>* tile, uint32_t tile_bits, uint32_t from) {
    for (uint32_t bit = from; bit < tile_bits;) {
        switch (min(tile_bits - bit, 4u)) {
            case 4: transform_bits<4>(tile, tile_bits, bit); bit += 4; break;
            case 3: transform_bits<3>(tile, tile_bits, bit); bit += 3; break;
            case 2: transform_bits<2>(tile, tile_bits, bit); bit += 2; break;
            default: transform_bits<1>(tile, tile_bits, bit); bit += 1; break;
        }
    }
}

template <class R>
__device__ void diagonal(const DiagonalArgs& args) {
    extern __shared__ __align__(16) unsigned char dynamic[];
    Complex<R>* tile = reinterpret_cast<Complex<R>*>(dynamic);
    __shared__ Shared<R> shared;

    const uint32_t size = 1u << args.tile_bits;
    const uint64_t tiles = uint64_t(1) << (args.num_qubits - args.tile_bits);
    const uint32_t middle_bits = args.low_bit - args.column_bits;
    for (uint64_t part = blockIdx.x; part < args.batch * tiles; part += gridDim.x) {
        const uint64_t row = part / tiles, number = part % tiles;
        // The bits of the index that the tile does not have: between its columns and its
        // transformed bits, and above those.
        const uint64_t middle = number & ((uint64_t(1) << middle_bits) - 1);
        const uint64_t base =
            middle << args.column_bits |
            (number >> middle_bits) << (args.low_bit + args.tile_bits - args.column_bits);
        const auto index = [&](uint32_t i) {
            const uint64_t column = i & ((1u << args.column_bits) - 1);
            return base | column | uint64_t(i >> args.column_bits) << args.low_bit;
        };
        Complex<R>* out = output_row<R>(args, row);
        if (args.generate || args.multiplies) {
            load_phase(args, row, args.generate && number == 0, shared);
            restrict_phase(args, base, shared);
        }
        uint32_t diagonals = 0;  // of the state's `reps`, where this launch makes all of them
        if (args.generate) {
            const R scale = static_cast<R>(args.reps == 1 ? args.last_scale : args.scale);
            for_phases<R>(args, shared, [&](uint32_t i, typename Phase<R>::Turns phase) {
                tile[padded(i)] = shared.bad ? not_a_number<R>() : Phase<R>::cis(phase) * scale;
            });
            diagonals = 1;
        } else {
            for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) {
                tile[padded(i)] = out[index(i)];
            }
        }
        __syncthreads();
        for (uint32_t t = 0; t < args.transforms; ++t) {
            transform(tile, args.tile_bits, args.column_bits);
            if (t < args.multiplies) {
                ++diagonals;
                const R scale =
                    static_cast<R>(diagonals == args.reps ? args.last_scale : args.scale);
                for_phases<R>(args, shared, [&](uint32_t i, typename Phase<R>::Turns phase) {
                    tile[padded(i)] = tile[padded(i)] * (Phase<R>::cis(phase) * scale);
                });
                __syncthreads();
            }
        }
        for (uint32_t i = threadIdx.x; i < size; i += blockDim.x) {
            out[index(i)] = tile[padded(i)];
        }
        __syncthreads();
    }
}

}  // namespace qdp

extern "C" __global__ void __launch_bounds__(256)
    qdp_diagonal_c64(const __grid_constant__ qdp::DiagonalArgs args) {
    qdp::wait_for_previous();
    qdp::diagonal<float>(args);
}
extern "C" __global__ void __launch_bounds__(256)
    qdp_diagonal_c128(const __grid_constant__ qdp::DiagonalArgs args) {
    qdp::wait_for_previous();
    qdp::diagonal<double>(args);
}
