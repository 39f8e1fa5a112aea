// Quadratic phases of the diagonal encodings: from the features of a state to the factors of its
// amplitudes.
//
// A diagonal is exp i(c + sum s_k b_k + sum w_jk b_j b_k) over the bits b of the index. Phases are
// in turns as fixed point (32 bits for complex64, 64 for complex128), where adding is exact modulo
// one turn. The threads of a state first make its coefficients, then tables over the bits of the
// thread's number, and from those the factors of each thread's bits. The factors of the amplitudes
// follow by multiplication.
#pragma once

#include "common.cuh"

namespace qdp {

constexpr uint32_t MAX_FOLD_BITS = 4;

// Mirrored by `PairTerms` in qdp-core/src/encoding/diagonal.rs, as are the formulas.
enum PairTerms : uint32_t { EXPLICIT, ZZ, MULTI };

struct DiagonalArgs : Args {
    const uint32_t* multiplicity;  // how often each pair is coupled
    double scale;                  // of the amplitudes, by each diagonal
    double last_scale;             // by the last diagonal of the state
    uint32_t kind;                 // PairTerms
    uint32_t big_endian;
    uint32_t reps;         // diagonals of the state
    uint32_t diagonals;    // of those, how many came before this launch
    uint32_t generate;     // make the tile instead of loading it
    uint32_t transforms;   // Walsh-Hadamard transforms of the tile
    uint32_t multiplies;   // how many of them a diagonal follows
    uint32_t tile_bits;    // bits of a tile
    uint32_t column_bits;  // of those, low bits that are not transformed
    uint32_t low_bit;      // bit of the index that is the tile's first transformed one
    uint32_t fold_bits;    // bits above the tile that are transformed while it is made
    uint32_t group_bits;   // tiles that a block holds at once
    uint32_t parts;        // how many times it does so
    uint32_t ahead;        // states whose tables it makes at once, by a warp each, if not one
    uint32_t factors_at;   // where the factors begin in shared memory, if not with the tables
    uint32_t tables_at;    // where the tables begin in shared memory
    uint32_t tables_size;  // of each diagonal
};

// 16 bytes of a state, what a thread loads and stores at once: two complex64 or one complex128.
template <class R>
inline constexpr int CELL_BITS = sizeof(R) == 4 ? 1 : 0;

template <class R>
struct alignas(16) Cell {
    Complex<R> z[1 << CELL_BITS<R>];
};

// sin(pi x) / x and cos(pi x) for |x| <= 1/4 as polynomials in x^2, least squares at Chebyshev
// nodes, each coefficient rounded before the next was fitted: wrong by at most 5e-9 and 2e-18. In
// constant memory, where arithmetic takes them from without loading them.
__constant__ float SINE_F32[] = {3.1415925f, -5.16769314f, 2.54934382f, -0.585443795f};
__constant__ float COSINE_F32[] = {1.0f, -4.93480206f, 4.05869818f, -1.33481622f, 0.229549706f};
__constant__ double SINE_F64[] = {
    3.1415926535897931,   -5.1677127800499107,    2.5501640398681413,    -0.59926452866379309,
    0.082145862016811996, -0.0073699316130181334, 0.00046109511505641683};
__constant__ double COSINE_F64[] = {
    1.0,                 -4.934802200544679,    4.0587121264166841,   -1.3352627688462622,
    0.23533062994891885, -0.025806880283870078, 0.001929406122904067, -0.00010330542587948625};

template <class R, int TERMS>
__device__ __forceinline__ R polynomial(R (&terms)[TERMS], R x) {
    R sum = terms[TERMS - 1];
#pragma unroll
    for (int k = TERMS - 2; k >= 0; --k) sum = sum * x + terms[k];
    return sum;
}

template <class R>
struct Phase;
template <>
struct Phase<float> {
    using Turns = uint32_t;
    using Signed = int32_t;
    static __device__ Turns from(uint64_t turns) {
        return static_cast<uint32_t>((turns + 0x80000000ull) >> 32);
    }
    static __device__ float scaled(Signed turns) { return static_cast<float>(turns) * 0x1p-31f; }
    static __device__ float sine(float x) { return polynomial(SINE_F32, x); }
    static __device__ float cosine(float x) { return polynomial(COSINE_F32, x); }
    static __device__ float negated(float x, uint32_t yes) {
        return __uint_as_float(__float_as_uint(x) ^ yes << 31);
    }
};
template <>
struct Phase<double> {
    using Turns = unsigned long long;
    using Signed = long long;
    static __device__ Turns from(uint64_t turns) { return turns; }
    static __device__ double scaled(Signed turns) { return static_cast<double>(turns) * 0x1p-63; }
    static __device__ double sine(double x) { return polynomial(SINE_F64, x); }
    static __device__ double cosine(double x) { return polynomial(COSINE_F64, x); }
    static __device__ double negated(double x, uint32_t yes) {
        return __longlong_as_double(__double_as_longlong(x) ^ Signed(uint64_t(yes) << 63));
    }
};

// exp(i 2 pi turns). The quadrant comes off exactly, as fixed point.
template <class R>
__device__ __forceinline__ Complex<R> cis(typename Phase<R>::Turns turns) {
    using Turns = typename Phase<R>::Turns;
    constexpr int BITS = 8 * sizeof(Turns);
    const Turns nearest = turns + (Turns(1) << (BITS - 3));
    const uint32_t quadrant = static_cast<uint32_t>(nearest >> (BITS - 2));
    const Turns rest = turns - (nearest & Turns(3) << (BITS - 2));
    const R x = Phase<R>::scaled(static_cast<typename Phase<R>::Signed>(rest));
    const R sine = x * Phase<R>::sine(x * x), cosine = Phase<R>::cosine(x * x);
    const R re = quadrant & 1 ? sine : cosine, im = quadrant & 1 ? cosine : sine;
    return {Phase<R>::negated(re, (quadrant + 1) >> 1), Phase<R>::negated(im, quadrant >> 1)};
}

__device__ inline uint64_t turns(double phase) {
    const double HIGH = 0.15915494309189535, LOW = -9.839338337591243e-18;  // 1 / (2 pi)
    const double high = phase * HIGH;
    const double low = fma(phase, HIGH, -high) + phase * LOW;
    double fraction = (high - rint(high)) + low;
    fraction -= rint(fraction);  // beyond a half turn the conversion would saturate
    return static_cast<uint64_t>(__double2ll_rn(fraction * 0x1p64));
}

__device__ inline uint32_t pair_index(uint32_t n, uint32_t j, uint32_t k) {
    return j * (2 * n - j - 1) / 2 + k - j - 1;
}

// The threads that share a state: a part of a warp, or the block.
__device__ __forceinline__ void sync_group(uint32_t threads) {
    if (threads <= 32) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

// Where thread `q`'s registers begin among the cells, when they hold K bits from `window` on.
template <int K>
__device__ __forceinline__ uint32_t spread(uint32_t q, uint32_t window) {
    return (q & ((1u << window) - 1)) | (q >> window) << (window + K);
}

// Whether the factors have a place of their own, since one thread makes them whoever makes the
// tables: where a tile of a known size has several warps.
template <int K, int CELLS>
inline constexpr bool separate_factors = CELLS - K >= 7;

// The diagonal of one state: its coefficients in shared memory, and the factors that they give a
// thread's cells. Bits of the tile are taken in the order of who counts them: the thread's number,
// the cell, the registers, and above the tile those that are folded.
template <class R, int K, int CELLS>
struct Diagonal {
    using Turns = typename Phase<R>::Turns;
    static constexpr int C = CELL_BITS<R>;
    // The registers' bits in two halves, whose factors multiply out to all.
    static constexpr int FIRST = K / 2, LAST = K - FIRST;

    // What folded bits add to the registers' factors, by halves.
    struct Folded {
        Cell<R> last[1 << LAST];
        Complex<R> first[1 << FIRST];
    };

    const DiagonalArgs& args;
    unsigned char* memory;
    uint32_t worker, workers;  // of the threads that make the tables

    __device__ uint32_t thread_bits() const {
        return CELLS ? uint32_t(CELLS - K) : args.tile_bits - C - K;
    }
    // The bits of the thread's number in two halves, and those above them in order.
    __device__ uint32_t lows() const { return (thread_bits() + 1) / 2; }
    __device__ uint32_t highs() const { return thread_bits() / 2; }
    __device__ uint32_t others() const { return C + K + args.fold_bits; }

    // The factors of the registers' bits among themselves.
    __device__ Cell<R>* corner() const { return reinterpret_cast<Cell<R>*>(memory); }
    // [folded bits - 1]
    __device__ Folded* folded() const { return reinterpret_cast<Folded*>(corner() + (1 << K)); }
    // [0, then bits above the thread's][thread]: the factors of a thread's bits, and with them of
    // each bit above.
    __device__ Complex<R>* factors() const {
        return reinterpret_cast<Complex<R>*>(folded() + (1u << args.fold_bits) - 1);
    }
    // What features and pairs of them give: [bit][bit], and [bit], in order.
    __device__ Turns* couplings() const {
        const uint32_t beside = separate_factors<K, CELLS> ? 0 : (1 + others()) << thread_bits();
        return reinterpret_cast<Turns*>(factors() + beside);
    }
    __device__ Turns* terms() const { return couplings() + args.num_qubits * args.num_qubits; }
    __device__ Turns* constants() const { return terms() + args.num_qubits; }
    __device__ Turns* singles() const { return constants() + args.num_qubits; }
    // [bit above the thread's][low half]: their phases with each other's
    __device__ Turns* low_phases() const { return singles() + args.num_qubits; }
    // [bit above the low half][high half]: likewise, and the bit's own
    __device__ Turns* high_phases() const { return low_phases() + (others() << lows()); }
    // [half]: the phases of its bits together, of the high half with the bits' own
    __device__ Turns* low_own() const { return high_phases() + ((lows() + others()) << highs()); }
    __device__ Turns* high_own() const { return low_own() + (1u << lows()); }
    // [feature]: where its bit is in order
    __device__ uint32_t* places() const {
        return reinterpret_cast<uint32_t*>(high_own() + (1u << highs()));
    }
    __device__ uint32_t& bad() const { return places()[args.num_qubits]; }

    // How often the terms enter the coefficients, by kind: a term may stand for a half.
    struct Rule {
        Turns single_term, single_pairs, pair, constant;
    };
    __device__ Rule rule() const {
        switch (args.kind) {
            case ZZ: return {1, 1, Turns(0) - 2, 0};
            case MULTI: return {2, 2, Turns(0) - 4, Turns(0) - 1};
            default: return {1, 0, 1, 0};
        }
    }

    // Where bit `k` of the index is in order, when the registers hold K bits of a cell's number
    // from `window` on: among the bits of the tile, or after them.
    __device__ uint32_t order(uint32_t k, uint32_t window) const {
        const uint32_t upper = args.low_bit + args.tile_bits - args.column_bits;
        const uint32_t b = k < args.column_bits || k >= upper ? k
                           : k >= args.low_bit ? k - args.low_bit + args.column_bits
                                               : k - args.column_bits + args.tile_bits;
        return b < args.tile_bits ? tile_order(b, window) : b;
    }
    // Likewise bit `b` of the tile.
    __device__ uint32_t tile_order(uint32_t b, uint32_t window) const {
        const uint32_t cell = b - C;
        return int(b) < C            ? thread_bits()
               : cell < window       ? cell
               : cell < window + K   ? cell - window + thread_bits() + C
                                     : cell - K;
    }

    // The terms of the state, from the features of its row.
    __device__ void load(uint64_t row, uint32_t window, bool reporter) const {
        const uint32_t n = args.num_qubits;
        if (worker == 0) bad() = 0;
        for (uint32_t k = worker; k < n; k += workers) {
            places()[k] = order(args.big_endian ? n - 1 - k : k, window);
        }
        sync_group(workers);
        const float inverse = 1.0f / static_cast<float>(n);
#pragma unroll 1
        for (uint32_t i = worker; i < n * (n + 1) / 2; i += workers) {
            // Features on a circle: the pairs are those at each distance up to half way around.
            const float middle = static_cast<float>(i) + 0.5f;  // so that rounding does no harm
            const uint32_t distance = static_cast<uint32_t>(middle * inverse);
            const uint32_t a = i - distance * n;
            const uint32_t b = a + distance < n ? a + distance : a + distance - n;
            const uint32_t j = min(a, b), k = max(a, b);
            const bool single = j == k;
            const uint32_t pair = single ? 0 : pair_index(n, j, k);
            const uint32_t feature = args.kind == EXPLICIT && !single ? n + pair : j;
            double x = load_feature(args, row, feature);
            if (!isfinite(x)) {
                bad() = 1;
                if (reporter && args.record) report(args, row, feature, reason_not_finite(x));
            }
            uint32_t times = 1;
            if (args.kind != EXPLICIT) {
                if (single) {
                    x = args.kind == ZZ ? 2.0 * x : x / 2.0;
                } else {
                    const double PI = 3.14159265358979323846;
                    const double y = load_feature(args, row, k);
                    x = args.kind == ZZ ? 2.0 * (PI - x) * (PI - y) : x * y / 2.0;
                    times = args.multiplicity[pair];
                }
            }
            const Turns term = Phase<R>::from(turns(x) * times);
            const uint32_t at_j = places()[j], at_k = places()[k];
            couplings()[at_j * n + at_k] = single ? 0 : term;
            couplings()[at_k * n + at_j] = single ? 0 : term;
            if (single) terms()[at_j] = term;
        }
        sync_group(workers);
    }

    // The couplings of bit `i` with all others, as they enter its single coefficient when the bits
    // `ones` are set.
    __device__ Turns couple_all(uint32_t i, uint64_t ones) const {
        const uint32_t n = args.num_qubits;
        const Rule rule = this->rule();
        Turns sum = 0;
        if (rule.single_pairs == 0 && ones == 0) return sum;
#pragma unroll 4
        for (uint32_t j = 0; j < n; ++j) {
            sum += couplings()[j * n + i] * (rule.single_pairs + (ones >> j & 1 ? rule.pair : 0));
        }
        return sum;
    }
    // The couplings of bit `i` with those of the HALF bits from `from` on that `ones` names. There
    // may be fewer bits: volatile keeps the compiler from reading what is not named.
    static constexpr uint32_t HALF = C + K > 5 ? C + K : 5;
    __device__ __forceinline__ Turns couple(uint32_t i, uint32_t from, uint32_t ones) const {
        const volatile Turns* row = couplings() + i * args.num_qubits + from;
        Turns sum = 0;
#pragma unroll
        for (uint32_t b = 0; b < HALF; ++b) {
            if (ones >> b & 1) sum += row[b];
        }
        return sum;
    }
    // Likewise those of the named bits with each other.
    __device__ __forceinline__ Turns couple_own(uint32_t from, uint32_t ones) const {
        Turns sum = 0;
#pragma unroll
        for (uint32_t b = 1; b < HALF; ++b) {
            const uint32_t below = ones >> b & 1 ? ones & ((1u << b) - 1) : 0;
            sum += couple(from + b, from, below);
        }
        return sum;
    }

    // The coefficients for a tile beside which the bits `fixed` are set, and tables of them.
    __device__ void tabulate(uint64_t fixed) const {
        const uint32_t n = args.num_qubits, q = thread_bits();
        const uint32_t lows = this->lows(), highs = this->highs(), others = this->others();
        const Rule rule = this->rule();
        // The coefficients of single bits, where they are not the terms themselves.
        const bool derived = args.kind != EXPLICIT || fixed;
        const Turns* singles = derived ? this->singles() : terms();
#pragma unroll 1
        for (uint32_t i = worker; derived && i < n; i += workers) {
            const Turns single = rule.single_term * terms()[i];
            this->singles()[i] = single + couple_all(i, fixed);
            if (rule.constant || fixed) {
                Turns sum = terms()[i];
                for (uint32_t j = 0; j < i; ++j) sum += couplings()[j * n + i];
                sum *= rule.constant;
                const uint64_t below = fixed & ((uint64_t(1) << i) - 1);
                if (fixed >> i & 1) sum += single + couple_all(i, below);
                constants()[i] = sum;
            }
        }
        if (derived) sync_group(workers);

        // The tables of phases, in the order in which they lie.
        const uint32_t low_count = others << lows, high_count = (lows + others) << highs;
        const uint32_t phases = low_count + high_count + (1u << lows) + (1u << highs);
#pragma unroll 1
        for (uint32_t entry = worker; entry < phases; entry += workers) {
            uint32_t i = entry;
            Turns pairs, alone = 0;
            if (i < low_count + high_count) {
                const bool low = i < low_count;
                if (!low) i -= low_count;
                const uint32_t bits = low ? lows : highs, from = low ? 0 : lows;
                uint32_t bit = i >> bits;
                if (low) {
                    bit += q;
                } else {
                    if (bit >= lows) bit += highs;
                    alone = singles[bit];
                }
                pairs = couple(bit, from, i & ((1u << bits) - 1));
            } else {
                i -= low_count + high_count;
                const bool low = i < 1u << lows;
                if (!low) i -= 1u << lows;
                const uint32_t from = low ? 0 : lows;
                pairs = couple_own(from, i);
                if (!low) {
#pragma unroll
                    for (uint32_t b = 0; b < HALF; ++b) {
                        alone += i >> b & 1 ? singles[from + b] : 0;
                    }
                    if (rule.constant || fixed) {
                        for (uint32_t k = 0; k < n; ++k) alone += constants()[k];
                    }
                }
            }
            low_phases()[entry] = rule.pair * pairs + alone;
        }
        // The factors, from the last thread on, as the first ones have more phases.
        Complex<R>* corners = reinterpret_cast<Complex<R>*>(corner());
        constexpr uint32_t CORNER = 1 << (C + K);
        constexpr uint32_t LASTS = 1 << (C + LAST), ALL = sizeof(Folded) / sizeof(Complex<R>);
        const uint32_t count = CORNER + ((1u << args.fold_bits) - 1) * ALL;
#pragma unroll 1
        for (uint32_t entry = workers - 1 - worker; entry < count; entry += workers) {
            // Bits of the registers that come together, and folded ones that come with each.
            uint32_t own = entry, ones = 0, with = 0;
            if (entry >= CORNER) {
                const uint32_t i = (entry - CORNER) % ALL;
                ones = (entry - CORNER) / ALL + 1;
                // The cell's bit goes with the last half, the folded ones' own with the first.
                with = i < LASTS ? (i & ((1u << C) - 1)) | i >> C << (C + FIRST) : (i - LASTS) << C;
                own = i < LASTS ? 0 : ones;
            }
            Turns pairs = couple_own(ones ? args.tile_bits : q, own);
#pragma unroll 1
            for (uint32_t b = 0; ones >> b; ++b) {
                if (ones >> b & 1) pairs += couple(args.tile_bits + b, q, with);
            }
            corners[entry] = cis<R>(rule.pair * pairs);
        }
        sync_group(workers);
    }

    // The factors of a thread's bits, and with them of each bit above.
    __device__ __forceinline__ void factorise(Complex<R>* factors, uint32_t thread) const {
        const uint32_t q = thread_bits(), lows = this->lows(), highs = this->highs();
        const uint32_t others = this->others();
        const uint32_t low = thread & ((1u << lows) - 1), high = thread >> lows;
        Turns phase = low_own()[low] + high_own()[high];
#pragma unroll
        for (uint32_t b = 0; b < HALF; ++b) {
            if (low >> b & 1) phase += high_phases()[b << highs | high];
        }
        factors[thread] = bad() ? not_a_number<R>() : cis<R>(phase);
        const Turns* above = high_phases() + (lows << highs);
#pragma unroll 2
        for (uint32_t i = 0; i < others; ++i) {
            phase = low_phases()[i << lows | low] + above[i << highs | high];
            factors[(1 + i) << q | thread] = cis<R>(phase);
        }
    }

    // Calls use(e, a, factor) with the diagonal at amplitude `a` of each of the thread's cells.
    template <class Use>
    __device__ __forceinline__ void for_factors(const Complex<R>* factors, uint32_t thread,
                                                R scale, Use use) const {
        const auto factor_of = [&](uint32_t i) {
            return factors[(1 + i) << thread_bits() | thread];
        };
        Complex<R> first[1 << FIRST], last[1 << LAST];
        first[0] = {R(1), R(0)};
        last[0] = factors[thread] * scale;
#pragma unroll
        for (int f = 0; f < FIRST; ++f) {
            const Complex<R> factor = factor_of(C + f);
#pragma unroll
            for (int e = 0; e < 1 << f; ++e) first[e | 1 << f] = e ? first[e] * factor : factor;
        }
#pragma unroll
        for (int f = 0; f < LAST; ++f) {
            const Complex<R> factor = factor_of(C + FIRST + f);
#pragma unroll
            for (int e = 0; e < 1 << f; ++e) last[e | 1 << f] = last[e] * factor;
        }
        const Complex<R> odd = C ? factor_of(0) : Complex<R>{R(1), R(0)};
#pragma unroll
        for (int e = 0; e < 1 << K; ++e) {
            const int f = e & ((1 << FIRST) - 1), l = e >> FIRST;
            const Complex<R> even = f ? last[l] * first[f] : last[l];
            const Cell<R> pairs = corner()[e];
#pragma unroll
            for (int a = 0; a < 1 << C; ++a) {
                use(e, a, (a ? even * odd : even) * pairs.z[a]);
            }
        }
    }

    // Multiplies the thread's cells by the diagonal, or makes them so. A folded bit is summed over
    // with the sign that the same bit of `sign` gives it.
    __device__ __forceinline__ void apply(Cell<R> (&cells)[1 << K], const Complex<R>* factors,
                                          uint32_t thread, bool generate, uint32_t sign,
                                          R scale) const {
        const auto factor_of = [&](uint32_t i) {
            return factors[(1 + i) << thread_bits() | thread];
        };
        const bool folds = generate && args.fold_bits;
        if (folds) {
            Complex<R> one[MAX_FOLD_BITS];
#pragma unroll
            for (uint32_t b = 0; b < MAX_FOLD_BITS; ++b) {
                if (b >= args.fold_bits) continue;
                one[b] = factor_of(C + K + b);
                if (sign >> b & 1) one[b] = {-one[b].re, -one[b].im};
            }
            fold(cells, one);
        }

        if (generate && !folds) {
            for_factors(factors, thread, scale, [&](int e, int a, Complex<R> factor) {
                cells[e].z[a] = factor;
            });
        } else {
            for_factors(factors, thread, scale, [&](int e, int a, Complex<R> factor) {
                cells[e].z[a] = cells[e].z[a] * factor;
            });
        }
    }

    // The sums over the folded bits, of which `one` has the factors where a single one is set:
    // products of halves, as loading each factor from shared memory would take longer than
    // multiplying.
    __device__ __forceinline__ void fold(Cell<R> (&cells)[1 << K],
                                         const Complex<R> (&one)[MAX_FOLD_BITS]) const {
#pragma unroll
        for (int e = 0; e < 1 << K; ++e) {
#pragma unroll
            for (int a = 0; a < 1 << C; ++a) cells[e].z[a] = {R(1), R(0)};
        }
#pragma unroll 1
        for (uint32_t ones = 1; ones < 1u << args.fold_bits; ++ones) {
            const Folded& table = folded()[ones - 1];
            Complex<R> factor = {R(1), R(0)}, first[1 << FIRST];
#pragma unroll
            for (uint32_t b = 0; b < MAX_FOLD_BITS; ++b) {
                if (ones >> b & 1) factor = factor * one[b];
            }
#pragma unroll
            for (int f = 0; f < 1 << FIRST; ++f) first[f] = factor * table.first[f];
#pragma unroll
            for (int l = 0; l < 1 << LAST; ++l) {
                const Cell<R> last = table.last[l];
#pragma unroll
                for (int f = 0; f < 1 << FIRST; ++f) {
#pragma unroll
                    for (int a = 0; a < 1 << C; ++a) {
                        Complex<R>& z = cells[l << FIRST | f].z[a];
                        z.re += first[f].re * last.z[a].re;
                        z.im += first[f].re * last.z[a].im;
                        z.re -= first[f].im * last.z[a].im;
                        z.im += first[f].im * last.z[a].re;
                    }
                }
            }
        }
    }
};

}  // namespace qdp
