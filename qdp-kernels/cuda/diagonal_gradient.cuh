// From the moments of a diagonal (moments.cuh) to the gradients by its features.
#pragma once

#include "gradient.cuh"
#include "moments.cuh"

namespace qdp {

// Entry `i` of the single features and pairs of them, on a circle: the pairs are those at each
// distance up to half way around.
struct Entry {
    uint32_t j, k;
};
__device__ __forceinline__ Entry entry_of(uint32_t i, uint32_t n) {
    const uint32_t distance = i / n, a = i - distance * n;
    const uint32_t b = a + distance < n ? a + distance : a + distance - n;
    return {min(a, b), max(a, b)};
}

// From the coefficients of t, by features, to the features' gradients. `of(j, k)` is the
// coefficient of both features' bits.

// Explicit features: b = (1 - z) / 2 of their bits' signs.
template <class Of>
__device__ __forceinline__ double explicit_gradient(uint32_t j, uint32_t k, Of of) {
    if (j == k) return (of(NO_BIT, NO_BIT) - of(j, j)) / 2;
    return (of(NO_BIT, NO_BIT) - of(j, j) - of(k, k) + of(j, k)) / 4;
}
// What a coupling adds to the gradient of feature `j` by way of the other's value `y`, or a feature
// by itself: b_j xor b_k = (1 - z_j z_k) / 2 times 2 (pi - x)(pi - y), and RZ and MultiRZ are
// -z_j x / 2 and -z_j z_k x y / 2.
__device__ __forceinline__ double slope(uint32_t kind, double y) {
    return kind == ZZ ? y - 3.14159265358979323846 : -y / 2;
}
template <class Of>
__device__ __forceinline__ double own_term(uint32_t kind, uint32_t j, Of of) {
    return kind == ZZ ? of(NO_BIT, NO_BIT) - of(j, j) : -of(j, j) / 2;
}
template <class Of>
__device__ __forceinline__ double pair_term(uint32_t kind, uint32_t j, uint32_t k, Of of) {
    return kind == ZZ ? of(NO_BIT, NO_BIT) - of(j, k) : of(j, k);
}

}  // namespace qdp
