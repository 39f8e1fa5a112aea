// Basis encoding by index: one-hot.

#include "common.cuh"

namespace qdp {

struct BasisArgs : Args {
    uint64_t chunk;  // amplitudes per block
};

template <class R>
__device__ void basis(const BasisArgs& args) {
    const uint64_t dim = uint64_t(1) << args.num_qubits;
    const uint64_t chunks = dim / args.chunk;
    for (uint64_t part = blockIdx.x; part < args.batch * chunks; part += gridDim.x) {
        const uint64_t row = part / chunks, begin = part % chunks * args.chunk;
        const double value = load_feature(args, row, 0);
        const bool valid = value >= 0.0 && value < static_cast<double>(dim) && value == trunc(value);
        if (!valid && begin == 0 && threadIdx.x == 0) {
            report(args, row, 0, isfinite(value) ? BASIS_INDEX : reason_not_finite(value));
        }
        const uint64_t index = valid ? static_cast<uint64_t>(value) : 0;
        const Complex<R> elsewhere = valid ? Complex<R>{R(0), R(0)} : not_a_number<R>();
        const Complex<R> one = valid ? Complex<R>{R(1), R(0)} : not_a_number<R>();
        Complex<R>* out = output_row<R>(args, row);
        for (uint64_t i = begin + threadIdx.x; i < begin + args.chunk; i += blockDim.x) {
            out[i] = i == index ? one : elsewhere;
        }
    }
}

}  // namespace qdp

extern "C" __global__ void __launch_bounds__(256)
    qdp_basis_c64(const __grid_constant__ qdp::BasisArgs args) {
    qdp::wait_for_previous();
    qdp::basis<float>(args);
}
extern "C" __global__ void __launch_bounds__(256)
    qdp_basis_c128(const __grid_constant__ qdp::BasisArgs args) {
    qdp::wait_for_previous();
    qdp::basis<double>(args);
}
