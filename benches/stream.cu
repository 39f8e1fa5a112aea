// A stream of one read and one write, as wide as the hardware likes it: every thread converts
// UNROLL groups, each to one 16-byte store, and the loads are all in flight before the first store.
// The probes (_probes.py) put these before it:
//   IN, OUT        what is read, and the real type of the complex numbers written
//   IN_COMPLEX     whether IN is one of two reals of a complex number
//   LOAD           the unsigned type that holds the input of one store
//   CONVERT(x)     IN to OUT
//   WRITE_ONLY     read nothing
//   UNROLL, STREAMING (1: evict-first loads and stores)

const int BLOCK = 256;
const int PER_STORE = 8 / sizeof(OUT);  // complex numbers

__device__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

union Input {
    LOAD bits;
    IN values[PER_STORE * (1 + IN_COMPLEX)];
};

union Output {
    uint4 bits;
    OUT values[2 * PER_STORE];
};

extern "C" __global__ void __launch_bounds__(BLOCK)
stream(const LOAD* __restrict__ in, uint4* __restrict__ out) {
    const size_t first = size_t(blockIdx.x) * (BLOCK * UNROLL) + threadIdx.x;
    Input inputs[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
        const LOAD* source = in + first + i * BLOCK;
        if (WRITE_ONLY) {
            inputs[i].bits = LOAD{};
        } else {
            inputs[i].bits = STREAMING ? __ldcs(source) : *source;
        }
    }
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
        Output output;
#pragma unroll
        for (int k = 0; k < PER_STORE; k++) {
            output.values[2 * k] = CONVERT(inputs[i].values[k * (1 + IN_COMPLEX)]);
            output.values[2 * k + 1] =
                IN_COMPLEX ? CONVERT(inputs[i].values[2 * k + IN_COMPLEX]) : OUT(0);
        }
        uint4* target = out + first + i * BLOCK;
        if (STREAMING) {
            __stcs(target, output.bits);
        } else {
            *target = output.bits;
        }
    }
}
