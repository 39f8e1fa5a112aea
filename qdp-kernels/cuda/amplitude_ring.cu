// Gradients by the amplitudes of long rows, of which the shared memory of all multiprocessors
// together holds two: one read and one write.
//
// The chunks of all rows are dealt to the blocks in turn, of which each multiprocessor has one. In
// each block one thread copies chunks into the slots of a ring as they become free, some warps sum
// them, and others wait for the sums of a row, write the gradient and free the slots. The three are
// apart by as much as the ring holds: reads of the next rows go on while a row waits for its sums
// and while it is written.
//
// Blocks wait for each other, so the launch has to be cooperative: all run at once. None holds up
// what it waits for: chunks are freed in the order in which they come, and a row fits in the slots.

#include <cuda/ptx>

#include "amplitude_gradient.cuh"

namespace qdp {

// Mirrored and explained in qdp-core/src/cuda/kernels/gradient/amplitude.rs.
constexpr uint32_t RING_BYTES = 16384;  // of the cotangent in a slot
constexpr uint32_t MAX_RING_SLOTS = 16;
constexpr uint32_t RING_SUMMERS = 256;  // threads that sum chunks
constexpr uint32_t RING_WRITERS = 256;  // threads that write them
constexpr uint32_t RING_THREADS = RING_SUMMERS + RING_WRITERS + 32;  // and one that reads

// Of a slot: that the chunk is there, and that it is written.
struct RingBarriers {
    uint64_t full[MAX_RING_SLOTS], empty[MAX_RING_SLOTS];
};

// Where one of so many teams of a block is: each takes every so many-th of the block's chunks.
template <class T, class R>
struct RingTurn {
    static constexpr uint32_t CHUNK = RING_BYTES / sizeof(Complex<R>);  // features
    static constexpr uint32_t SLOT_BYTES = CHUNK * (sizeof(Complex<R>) + sizeof(T));

    const AmplitudeGradientArgs& args;
    uint32_t teams, row_step, chunk_step;  // from one chunk to the next
    uint64_t row;
    uint32_t chunk, slot;
    bool odd = false;  // how often the ring was gone round

    __device__ __forceinline__ RingTurn(const AmplitudeGradientArgs& args, uint32_t team,
                                        uint32_t teams)
        : args(args), teams(teams), slot(team) {
        const uint32_t chunks = static_cast<uint32_t>(args.chunks);
        const uint32_t first = team * gridDim.x + blockIdx.x, step = teams * gridDim.x;
        row = first / chunks;
        chunk = first % chunks;
        row_step = step / chunks;
        chunk_step = step % chunks;
    }

    __device__ __forceinline__ bool more() const { return row < args.batch; }

    __device__ __forceinline__ void next() {
        slot += teams;
        if (slot >= args.slots) {
            slot -= args.slots;
            odd = !odd;
        }
        row += row_step;
        chunk += chunk_step;
        if (chunk >= args.chunks) {
            chunk -= static_cast<uint32_t>(args.chunks);
            ++row;
        }
    }

    __device__ __forceinline__ uint64_t first() const { return uint64_t{chunk} * CHUNK; }
    __device__ __forceinline__ uint32_t features() const {
        return static_cast<uint32_t>(min(uint64_t{CHUNK}, args.features - first()));
    }
    __device__ __forceinline__ const Complex<R>* cotangent() const {
        return static_cast<const Complex<R>*>(args.cotangent.values) +
               static_cast<int64_t>(row) * args.cotangent.row_stride + first();
    }
    __device__ __forceinline__ const T* input() const {
        return static_cast<const T*>(args.input) + static_cast<int64_t>(row) * args.row_stride +
               first();
    }
    __device__ __forceinline__ T* output() const {
        return static_cast<T*>(args.output) + row * args.output_stride + first();
    }

    // Its slot: the cotangent, then the features.
    __device__ __forceinline__ unsigned char* held(unsigned char* memory) const {
        return memory + slot * SLOT_BYTES;
    }
    static __device__ __forceinline__ const Unit<Complex<R>, R>& g(const unsigned char* held,
                                                                   uint32_t feature) {
        return reinterpret_cast<const Unit<Complex<R>, R>*>(held)[feature / UNIT<R>];
    }
    static __device__ __forceinline__ const Unit<T, R>& x(const unsigned char* held,
                                                          uint32_t feature) {
        held += CHUNK * sizeof(Complex<R>);
        return reinterpret_cast<const Unit<T, R>*>(held)[feature / UNIT<R>];
    }
};

__device__ __forceinline__ void await_phase(uint64_t& barrier, bool odd) {
    while (!cuda::ptx::mbarrier_try_wait_parity(&barrier, odd)) {
    }
}

// Adds up over groups of so many neighbouring lanes.
__device__ __forceinline__ void add_lanes(RowSums& sums, uint32_t lanes) {
    for (uint32_t offset = lanes / 2; offset > 0; offset >>= 1) {
        sums.square += __shfl_xor_sync(0xffffffff, sums.square, offset);
        sums.product += __shfl_xor_sync(0xffffffff, sums.product, offset);
    }
}

// Sums over a team of `THREADS` threads, which meet at a barrier of their own.
template <uint32_t THREADS>
__device__ __forceinline__ RowSums team_sums(RowSums sums, uint32_t barrier,
                                             RowSums (&warps)[THREADS / 32]) {
    add_lanes(sums, 32);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32 % (THREADS / 32)] = sums;
    __barrier_sync_count(barrier, THREADS);
    sums = warps[threadIdx.x % (THREADS / 32)];
    add_lanes(sums, THREADS / 32);
    return sums;
}

// Copies the chunks in.
template <class T, class R>
__device__ __forceinline__ void ring_read(const AmplitudeGradientArgs& args, unsigned char* memory,
                                          RingBarriers& barriers) {
    namespace ptx = cuda::ptx;
    uint32_t filled = 0;
    for (RingTurn<T, R> at(args, 0, 1); at.more(); at.next()) {
        if (filled == args.slots) {
            await_phase(barriers.empty[at.slot], !at.odd);
        } else {
            ++filled;
        }
        const uint32_t g_bytes = at.features() * sizeof(Complex<R>);
        const uint32_t x_bytes = at.features() * sizeof(T);
        unsigned char* const to = at.held(memory);
        uint64_t* const barrier = &barriers.full[at.slot];
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, barrier,
                                       g_bytes + x_bytes);
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, to, at.cotangent(), g_bytes,
                           barrier);
        ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global,
                           to + at.CHUNK * sizeof(Complex<R>), at.input(), x_bytes, barrier);
    }
}

// Sums the chunks and tells the sums.
template <class T, class R>
__device__ __forceinline__ void ring_sum(const AmplitudeGradientArgs& args, unsigned char* memory,
                                         RingBarriers& barriers) {
    __shared__ RowSums warps[2][RING_SUMMERS / 32];
    bool turn = false;  // two places for the warps' sums: one may still be read
    for (RingTurn<T, R> at(args, 0, 1); at.more(); at.next(), turn = !turn) {
        await_phase(barriers.full[at.slot], at.odd);
        const unsigned char* const held = at.held(memory);
        const uint32_t features = at.features();
        RowSums sums = {0.0, 0.0};
#pragma unroll 4
        for (uint32_t i = threadIdx.x * UNIT<R>; i < features; i += RING_SUMMERS * UNIT<R>) {
            add(sums, at.x(held, i), at.g(held, i));
        }
        sums = team_sums<RING_SUMMERS>(sums, 1, warps[turn]);
        if (threadIdx.x == 0) publish(args.sums + 2 * (at.row * args.chunks + at.chunk), sums);
    }
}

// The sums of a row, from those of its chunks, of which the calling thread adds those at `first`,
// `first + step` and so on. Lanes stay together: a warp that waits in parts took twice as long.
__device__ __forceinline__ RowSums ring_add_up(Slot* slots, uint32_t chunks, uint32_t first,
                                               uint32_t step) {
    constexpr uint32_t EACH = 4;  // on their way at once
    RowSums sums = {0.0, 0.0};
    for (uint32_t begin = 0; begin < chunks; begin += EACH * step) {
        RowSums of_chunk[EACH];
        bool missing;
        do {
            missing = false;
#pragma unroll
            for (uint32_t j = 0; j < EACH; ++j) {
                const uint32_t chunk = begin + j * step + first;
                of_chunk[j] = {0.0, 0.0};
                if (chunk < chunks) {
                    const Slot square = peek(slots[2 * chunk]);
                    const Slot product = peek(slots[2 * chunk + 1]);
                    missing |= square == 0 || product == 0;
                    of_chunk[j] = {told(square), told(product)};
                }
            }
        } while (__any_sync(0xffffffff, missing));
#pragma unroll
        for (uint32_t j = 0; j < EACH; ++j) {
            sums.square += of_chunk[j].square;
            sums.product += of_chunk[j].product;
        }
    }
    return sums;
}

// Stores what is not read again soon.
template <class U>
__device__ __forceinline__ void store_streaming(U* to, const U& unit) {
    if constexpr (sizeof(U) == 4) {
        __stcs(reinterpret_cast<unsigned*>(to), *reinterpret_cast<const unsigned*>(&unit));
    } else if constexpr (sizeof(U) == 8) {
        __stcs(reinterpret_cast<uint2*>(to), *reinterpret_cast<const uint2*>(&unit));
    } else if constexpr (sizeof(U) == 16) {
        __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&unit));
    } else {
        *to = unit;
    }
}

// Writes the chunks' gradients and frees their slots.
template <class T, class R, uint32_t TEAMS>
__device__ __forceinline__ void ring_write(const AmplitudeGradientArgs& args, uint32_t writer,
                                           unsigned char* memory, RingBarriers& barriers) {
    constexpr uint32_t TEAM = RING_WRITERS / TEAMS;
    __shared__ RowSums warps[TEAMS][2][TEAM / 32];
    const uint32_t team = writer / TEAM, thread = writer % TEAM;
    const uint32_t chunks = static_cast<uint32_t>(args.chunks);
    bool turn = false;
    for (RingTurn<T, R> at(args, team, TEAMS); at.more();) {
        const uint64_t row = at.row;
        Slot* const slots = args.sums + 2 * row * chunks;
        RowSums sums;
        if (chunks <= 32) {  // each warp for itself
            sums = ring_add_up(slots, chunks, thread % 32, 32);
            add_lanes(sums, 32);
        } else {
            sums = ring_add_up(slots, chunks, thread, TEAM);
            sums = team_sums<TEAM>(sums, 2 + team, warps[team][turn]);
            turn = !turn;
        }
        const RowGradient gradient(sums);
        for (; at.row == row; at.next()) {
            await_phase(barriers.full[at.slot], at.odd);  // it is there for this thread, too
            const unsigned char* const held = at.held(memory);
            Unit<T, R>* const out = reinterpret_cast<Unit<T, R>*>(at.output());
            const uint32_t features = at.features();
#pragma unroll 4
            for (uint32_t i = thread * UNIT<R>; i < features; i += TEAM * UNIT<R>) {
                store_streaming(out + i / UNIT<R>, gradient.of(at.x(held, i), at.g(held, i)));
            }
            // Nobody sums it any more: the row's sums are made of it.
            __syncwarp();
            if (threadIdx.x % 32 == 0) cuda::ptx::mbarrier_arrive(&barriers.empty[at.slot]);
        }
    }
}

template <class T, class R>
__device__ __forceinline__ void amplitude_gradient_ring(const AmplitudeGradientArgs& args) {
#if __CUDA_ARCH__ >= 900
    namespace ptx = cuda::ptx;
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ RingBarriers barriers;
    if (threadIdx.x == 0) {
        for (uint32_t slot = 0; slot < args.slots; ++slot) {
            ptx::mbarrier_init(&barriers.full[slot], 1);
            ptx::mbarrier_init(&barriers.empty[slot], RING_WRITERS / args.teams / 32);
        }
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    }
    __syncthreads();
    if (threadIdx.x < RING_SUMMERS) {
        ring_sum<T, R>(args, memory, barriers);
    } else if (threadIdx.x < RING_SUMMERS + RING_WRITERS) {
        const uint32_t writer = threadIdx.x - RING_SUMMERS;
        if (args.teams == 1) {
            ring_write<T, R, 1>(args, writer, memory, barriers);
        } else {
            ring_write<T, R, 2>(args, writer, memory, barriers);
        }
    } else if (threadIdx.x == RING_SUMMERS + RING_WRITERS) {
        ring_read<T, R>(args, memory, barriers);
    }
#endif
}

}  // namespace qdp

#define QDP_AMPLITUDE_RING(T, NAME)             \
    QDP_AMPLITUDE_RING_TO(T, NAME, float, c64)  \
    QDP_AMPLITUDE_RING_TO(T, NAME, double, c128)
#define QDP_AMPLITUDE_RING_TO(T, NAME, R, PRECISION)                   \
    extern "C" __global__ void __launch_bounds__(qdp::RING_THREADS, 1) \
        qdp_amplitude_gradient_ring_##NAME##_##PRECISION(              \
            const __grid_constant__ qdp::AmplitudeGradientArgs args) { \
        qdp::wait_for_previous();                                      \
        qdp::amplitude_gradient_ring<T, R>(args);                      \
    }

QDP_AMPLITUDE_RING(__half, f16)
QDP_AMPLITUDE_RING(__nv_bfloat16, bf16)
QDP_AMPLITUDE_RING(float, f32)
QDP_AMPLITUDE_RING(double, f64)
QDP_AMPLITUDE_RING(qdp::Complex<float>, c64)
QDP_AMPLITUDE_RING(qdp::Complex<double>, c128)
