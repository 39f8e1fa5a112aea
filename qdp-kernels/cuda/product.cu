// Product states: every encoding that entangles nothing (angle, phase, basis by bits, iqp-z, zz
// and iqp-embedding without pairs).
//
// A chunk of a row is the outer product of a table over its lower bits and one over its upper
// bits, times one number for the bits above the chunk: 2n sines and cosines per chunk and one
// complex product per amplitude.

#include "common.cuh"

namespace qdp {

struct ProductArgs : Args {
    double scale;   // of the angle
    double global;  // common phase per angle
    uint32_t kind;  // FactorKind
    uint32_t reps;
    uint32_t big_endian;
    uint32_t final_hadamard;
};

constexpr uint32_t MAX_QUBITS = 50;
constexpr uint32_t TABLE_BITS = 6;  // of each table: a chunk has at most 2^12 amplitudes

// Mirrored by `factor_kind` in qdp-core/src/cuda/kernels/product.rs.
enum FactorKind : uint32_t { ROTATION_X, ROTATION_Y, ROTATION_Z, LAYERS, BIT };

struct Factor {
    Complex<double> zero, one;
};

// The single-qubit state of feature x; the formulas are in qdp-core/src/encoding/product.rs.
__device__ inline Factor factor(const ProductArgs& args, double x) {
    double sin, cos;
    switch (args.kind) {
        case ROTATION_X:
            sincos(args.scale * x, &sin, &cos);
            return {{cos, 0.0}, {0.0, -sin}};
        case ROTATION_Y:
            sincos(args.scale * x, &sin, &cos);
            return {{cos, 0.0}, {sin, 0.0}};
        case ROTATION_Z:
            sincos(args.scale * x, &sin, &cos);
            return {{cos, -sin}, {0.0, 0.0}};
        case LAYERS: {
            const double h = 0.70710678118654752440;
            Complex<double> phase, common;
            sincos(args.scale * x, &phase.im, &phase.re);
            sincos(args.global * x, &common.im, &common.re);
            Complex<double> a = {1.0, 0.0}, b = {0.0, 0.0};
            for (uint32_t rep = 0; rep < args.reps; ++rep) {
                const Complex<double> sum = (a + b) * h, difference = (a - b) * h;
                a = sum * common;
                b = difference * common * phase;
            }
            if (args.final_hadamard) {
                const Complex<double> sum = (a + b) * h, difference = (a - b) * h;
                a = sum;
                b = difference;
            }
            return {a, b};
        }
        default: return x == 0.0 ? Factor{{1.0, 0.0}, {0.0, 0.0}} : Factor{{0.0, 0.0}, {1.0, 0.0}};
    }
}

// Product of the factors of bits [from, to), picked by the bits of `index`.
__device__ inline Complex<double> pick(const Factor* factors, uint32_t from, uint32_t to,
                                       uint64_t index) {
    Complex<double> product = {1.0, 0.0};
    for (uint32_t bit = from; bit < to; ++bit) {
        product = product * (index >> (bit - from) & 1 ? factors[bit].one : factors[bit].zero);
    }
    return product;
}

template <class R>
__device__ void product(const ProductArgs& args) {
    __shared__ Factor factors[MAX_QUBITS];
    __shared__ Complex<R> low[1 << TABLE_BITS], high[1 << TABLE_BITS];
    __shared__ int bad;

    const uint32_t n = args.num_qubits;
    const uint32_t chunk_bits = min(n, 2 * TABLE_BITS);
    const uint32_t low_bits = chunk_bits / 2;
    const uint64_t chunks = uint64_t(1) << (n - chunk_bits);
    for (uint64_t part = blockIdx.x; part < args.batch * chunks; part += gridDim.x) {
        const uint64_t row = part / chunks, chunk = part % chunks;
        if (threadIdx.x == 0) bad = 0;
        __syncthreads();
        for (uint32_t bit = threadIdx.x; bit < n; bit += blockDim.x) {
            const uint32_t feature = args.big_endian ? n - 1 - bit : bit;
            const double x = load_feature(args, row, feature);
            uint32_t reason = 0;
            if (!isfinite(x)) {
                reason = reason_not_finite(x);
            } else if (args.kind == BIT && x != 0.0 && x != 1.0) {
                reason = BASIS_BIT;
            }
            if (reason) {
                bad = 1;
                if (chunk == 0) report(args, row, feature, reason);
            }
            factors[bit] = factor(args, x);
        }
        __syncthreads();
        const uint32_t low_size = 1u << low_bits, high_size = 1u << (chunk_bits - low_bits);
        for (uint32_t i = threadIdx.x; i < low_size + high_size; i += blockDim.x) {
            if (i < low_size) {
                low[i] = round_to<R>(pick(factors, 0, low_bits, i));
            } else {
                const Complex<double> above = pick(factors, chunk_bits, n, chunk);
                const Complex<double> upper = pick(factors, low_bits, chunk_bits, i - low_size);
                high[i - low_size] = round_to<R>(upper * above);
            }
        }
        __syncthreads();
        Complex<R>* out = output_row<R>(args, row) + (chunk << chunk_bits);
        for (uint32_t i = threadIdx.x; i < 1u << chunk_bits; i += blockDim.x) {
            out[i] = bad ? not_a_number<R>() : low[i & (low_size - 1)] * high[i >> low_bits];
        }
        __syncthreads();
    }
}

}  // namespace qdp

extern "C" __global__ void __launch_bounds__(256)
    qdp_product_c64(const __grid_constant__ qdp::ProductArgs args) {
    qdp::wait_for_previous();
    qdp::product<float>(args);
}
extern "C" __global__ void __launch_bounds__(256)
    qdp_product_c128(const __grid_constant__ qdp::ProductArgs args) {
    qdp::wait_for_previous();
    qdp::product<double>(args);
}
