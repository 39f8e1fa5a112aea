// What every encoding shares: the argument block, complex arithmetic, reading features of any
// type, and reporting bad values without a host synchronisation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace qdp {

// Values of the features' affine map, one per feature; null where there are none. Mirrored by
// `Parameter` in qdp-core/src/cuda/kernels/args.rs.
struct Parameter {
    const void* values;
    uint32_t dtype;
};

// What every kernel is told. Mirrored by `CommonArgs` in qdp-core/src/cuda/kernels/args.rs, as are
// the encodings' own arguments by the structs beside it; they must stay equal field by field.
struct Args {
    const void* input;
    void* output;
    unsigned long long* record;  // the first bad value of this encode, as a key
    uint32_t* slot_flag;         // host memory: this encode found a bad value
    uint32_t* any_flag;          // host memory: some encode found a bad value
    int64_t row_stride;          // of the input, in elements
    int64_t col_stride;
    uint64_t output_stride;  // between rows, in amplitudes
    uint64_t batch;
    uint64_t features;
    uint32_t dtype;
    uint32_t num_qubits;
    Parameter weight;
    Parameter bias;
};

enum class DType : uint32_t { U8, U16, U32, U64, I8, I16, I32, I64, F16, BF16, F32, F64, C64, C128 };

// Why a value is bad; the low three bits of the record's key.
enum Reason : uint32_t {
    NOT_A_NUMBER = 1,
    INFINITE = 2,
    ZERO_NORM = 3,
    NORM_OVERFLOW = 4,
    BASIS_INDEX = 5,
    BASIS_BIT = 6,
};

template <class R>
struct alignas(2 * sizeof(R)) Complex {
    R re, im;
};

template <class R>
__device__ __forceinline__ Complex<R> operator+(Complex<R> a, Complex<R> b) {
    return {a.re + b.re, a.im + b.im};
}
template <class R>
__device__ __forceinline__ Complex<R> operator-(Complex<R> a, Complex<R> b) {
    return {a.re - b.re, a.im - b.im};
}
template <class R>
__device__ __forceinline__ Complex<R> operator*(Complex<R> a, Complex<R> b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class R>
__device__ __forceinline__ Complex<R> operator*(Complex<R> a, R s) {
    return {a.re * s, a.im * s};
}
template <class R>
__device__ __forceinline__ Complex<R> round_to(Complex<double> z) {
    return {static_cast<R>(z.re), static_cast<R>(z.im)};
}
template <class R>
__device__ __forceinline__ Complex<R> not_a_number() {
    const R nan = static_cast<R>(__longlong_as_double(0x7ff8000000000000LL));
    return {nan, nan};
}

template <class T>
__device__ __forceinline__ Complex<double> to_complex(T x) {
    return {static_cast<double>(x), 0.0};
}
template <>
__device__ __forceinline__ Complex<double> to_complex(__half x) {
    return {static_cast<double>(__half2float(x)), 0.0};
}
template <>
__device__ __forceinline__ Complex<double> to_complex(__nv_bfloat16 x) {
    return {static_cast<double>(__bfloat162float(x)), 0.0};
}
template <>
__device__ __forceinline__ Complex<double> to_complex(Complex<float> x) {
    return {x.re, x.im};
}
template <>
__device__ __forceinline__ Complex<double> to_complex(Complex<double> x) {
    return x;
}

// Every kernel calls this before it touches memory: launches overlap the end of what precedes them
// in the stream (programmatic dependent launch), and this waits until that is done and seen.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

template <class T>
__device__ __forceinline__ T load(const Args& args, uint64_t row, uint64_t column) {
    return static_cast<const T*>(args.input)[static_cast<int64_t>(row) * args.row_stride +
                                             static_cast<int64_t>(column) * args.col_stride];
}

// A value of the affine map as a double, or `otherwise`. Out of line, as few kernels run it at all.
__device__ __noinline__ double load_parameter(Parameter parameter, uint64_t column,
                                              double otherwise) {
    const void* values = parameter.values;
    if (!values) return otherwise;
    switch (static_cast<DType>(parameter.dtype)) {
        case DType::F16: return to_complex(static_cast<const __half*>(values)[column]).re;
        case DType::BF16: return to_complex(static_cast<const __nv_bfloat16*>(values)[column]).re;
        case DType::F32: return static_cast<const float*>(values)[column];
        case DType::F64: return static_cast<const double*>(values)[column];
        default: return not_a_number<double>().re;  // other types are refused on the host
    }
}

// A value of a real input as a double. Few are read per state, so the type is looked at here
// rather than multiplying the kernels by it.
__device__ __forceinline__ double load_value(const Args& args, uint64_t row, uint64_t column) {
    switch (static_cast<DType>(args.dtype)) {
        case DType::U8: return load<uint8_t>(args, row, column);
        case DType::U16: return load<uint16_t>(args, row, column);
        case DType::U32: return load<uint32_t>(args, row, column);
        case DType::U64: return static_cast<double>(load<unsigned long long>(args, row, column));
        case DType::I8: return load<int8_t>(args, row, column);
        case DType::I16: return load<int16_t>(args, row, column);
        case DType::I32: return load<int32_t>(args, row, column);
        case DType::I64: return static_cast<double>(load<long long>(args, row, column));
        case DType::F16: return to_complex(load<__half>(args, row, column)).re;
        case DType::BF16: return to_complex(load<__nv_bfloat16>(args, row, column)).re;
        case DType::F32: return load<float>(args, row, column);
        case DType::F64: return load<double>(args, row, column);
        default: return not_a_number<double>().re;  // complex input is refused on the host
    }
}

// A feature: the value, or what the affine map makes of it.
__device__ __forceinline__ double load_feature(const Args& args, uint64_t row, uint64_t column) {
    const double value = load_value(args, row, column);
    if (!args.weight.values && !args.bias.values) return value;
    return fma(value, load_parameter(args.weight, column, 1.0),
               load_parameter(args.bias, column, 0.0));
}

template <class R>
__device__ __forceinline__ Complex<R>* output_row(const Args& args, uint64_t row) {
    return static_cast<Complex<R>*>(args.output) + row * args.output_stride;
}

// Records a bad value. The record keeps the smallest key, so the first bad value of the batch
// whatever the order of the blocks; the flags are plain stores over the bus, which the host reads
// without a call. They are written last, so whoever sees them finds a record.
__device__ inline void report(const Args& args, uint64_t row, uint64_t position, uint32_t reason) {
    const unsigned long long key = (row * (args.features + 1) + position) << 3 | reason;
    atomicMin(args.record, key);
    __threadfence_system();
    *const_cast<volatile uint32_t*>(args.slot_flag) = 1;
    __threadfence_system();
    *const_cast<volatile uint32_t*>(args.any_flag) = 1;
}

__device__ __forceinline__ uint32_t reason_not_finite(double value) {
    return isnan(value) ? NOT_A_NUMBER : INFINITE;
}

}  // namespace qdp
