// The factors of product states: the single-qubit states that features give, and their derivatives.
#pragma once

#include "common.cuh"

namespace qdp {

// Mirrored by `FactorArgs` in qdp-core/src/cuda/kernels/product.rs.
struct FactorArgs {
    double scale;   // of the angle
    double global;  // common phase per angle
    uint32_t kind;  // FactorKind
    uint32_t reps;
    uint32_t big_endian;
    uint32_t final_hadamard;
};

enum FactorKind : uint32_t { ROTATION_X, ROTATION_Y, ROTATION_Z, LAYERS, BIT };

struct Factor {
    Complex<double> zero, one;
};

// The single-qubit state of feature x; the formulas are in qdp-core/src/encoding/product.rs.
__device__ inline Factor factor(const FactorArgs& args, double x) {
    double sin, cos;
    sincos(args.scale * x, &sin, &cos);
    switch (args.kind) {
        case ROTATION_X: return {{cos, 0.0}, {0.0, -sin}};
        case ROTATION_Y: return {{cos, 0.0}, {sin, 0.0}};
        case ROTATION_Z: return {{cos, -sin}, {0.0, 0.0}};
        case LAYERS: {
            const double h = 0.70710678118654752440;
            const Complex<double> phase = {cos, sin};
            Complex<double> common;
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

// A factor and its derivative by the feature.
struct Slope {
    Factor value, derivative;
};

__device__ inline Slope slope(const FactorArgs& args, double x) {
    double sin, cos;
    sincos(args.scale * x, &sin, &cos);
    const double s = args.scale;
    switch (args.kind) {
        case ROTATION_X: return {{{cos, 0.0}, {0.0, -sin}}, {{-s * sin, 0.0}, {0.0, -s * cos}}};
        case ROTATION_Y: return {{{cos, 0.0}, {sin, 0.0}}, {{-s * sin, 0.0}, {s * cos, 0.0}}};
        case ROTATION_Z: return {{{cos, -sin}, {0.0, 0.0}}, {{-s * sin, -s * cos}, {0.0, 0.0}}};
        case LAYERS: {
            const double h = 0.70710678118654752440;
            Complex<double> common;
            sincos(args.global * x, &common.im, &common.re);
            const Complex<double> zero = common * h, one = zero * Complex<double>{cos, sin};
            const Complex<double> by_common = {0.0, args.global}, by_both = {0.0, args.global + s};
            Complex<double> a = {1.0, 0.0}, b = {0.0, 0.0}, da = {0.0, 0.0}, db = {0.0, 0.0};
            for (uint32_t rep = 0; rep < args.reps; ++rep) {
                const Complex<double> sum = (a + b) * zero, difference = (a - b) * one;
                const Complex<double> slope_of_sum = (da + db) * zero + sum * by_common;
                db = (da - db) * one + difference * by_both;
                da = slope_of_sum;
                a = sum;
                b = difference;
            }
            if (!args.final_hadamard) return {{a, b}, {da, db}};
            return {{(a + b) * h, (a - b) * h}, {(da + db) * h, (da - db) * h}};
        }
        default: return {factor(args, x), {{0.0, 0.0}, {0.0, 0.0}}};
    }
}

}  // namespace qdp
