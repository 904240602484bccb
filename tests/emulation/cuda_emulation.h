// The CUDA vocabulary of the kernels, for g++: included before a .cu file in place of what nvcc knows by itself.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block->index)
#define blockDim (emulation::current->block->size)
#define gridDim (emulation::current->block->grid)

// A kernel with its parameters by value, found by name.
#define MOE_KERNEL(NAME, PARAMS, THREADS, BLOCKS)                                                                     \
    static void NAME(const PARAMS p);                                                                                 \
    static const emulation::Registration register_##NAME(#NAME, __FILE__, sizeof(PARAMS), [](const void* params) {   \
        NAME(*static_cast<const PARAMS*>(params));                                                                    \
    });                                                                                                               \
    static void NAME(const PARAMS p)
#define MOE_SHARED(NAME) unsigned char* const NAME = emulation::current->block->shared

struct __attribute__((aligned(8))) uint2 {
    unsigned x, y;
};
struct __attribute__((aligned(16))) uint4 {
    unsigned x, y, z, w;
};
struct __attribute__((aligned(8))) float2 {
    float x, y;
};
struct __attribute__((aligned(16))) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T>
inline T __ldg(const T* address) {
    return *address;
}
template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

inline void __syncthreads(emulation::Site site = emulation::Site::here()) { emulation::sync_threads(site); }

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, emulation::Site site = emulation::Site::here()) {
    const uint32_t nothing = 0;
    emulation::collective("__syncwarp", mask, &nothing, 4, [](emulation::Rendezvous&) {}, site);
}

namespace emulation {

// The result of a shuffle: lane `source(lane)`'s value; `in` is {value, argument}.
template <int (*SOURCE)(int lane, int argument)>
void shuffle(Rendezvous& r) {
    for (int lane = 0; lane < WARP; ++lane) {
        if (!(r.mask >> lane & 1)) continue;
        const int source = SOURCE(lane, static_cast<int>(r.in[lane][1]));
        if (!(r.mask >> source & 1)) fail("%s at line %d: lane %d reads lane %d, which takes no part", r.what, r.site.line, lane, source);
        r.out[lane][0] = r.in[source][0];
    }
}

template <class T, int (*SOURCE)(int, int)>
T shuffled(const char* what, unsigned mask, T value, int argument, Site site) {
    static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
    uint32_t operands[2];
    memcpy(operands, &value, 4);
    operands[1] = static_cast<uint32_t>(argument);
    T result;
    memcpy(&result, collective(what, mask, operands, 8, shuffle<SOURCE>, site), 4);
    return result;
}

inline int source_same(int, int argument) { return argument & 31; }
inline int source_xor(int lane, int argument) { return lane ^ argument; }
inline int source_up(int lane, int argument) { return lane < argument ? lane : lane - argument; }
inline int source_down(int lane, int argument) { return lane + argument > 31 ? lane : lane + argument; }

// One result for all lanes.
template <class F>
void reduce(Rendezvous& r, uint32_t start, F combine) {
    uint32_t all = start;
    for (int lane = 0; lane < WARP; ++lane) {
        if (r.mask >> lane & 1) all = combine(all, r.in[lane][0], lane);
    }
    for (int lane = 0; lane < WARP; ++lane) r.out[lane][0] = all;
}

}  // namespace emulation

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, emulation::Site site = emulation::Site::here()) {
    return emulation::shuffled<T, emulation::source_same>("__shfl_sync", mask, value, lane, site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, emulation::Site site = emulation::Site::here()) {
    return emulation::shuffled<T, emulation::source_xor>("__shfl_xor_sync", mask, value, lanes, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, int lanes, emulation::Site site = emulation::Site::here()) {
    return emulation::shuffled<T, emulation::source_up>("__shfl_up_sync", mask, value, lanes, site);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, int lanes, emulation::Site site = emulation::Site::here()) {
    return emulation::shuffled<T, emulation::source_down>("__shfl_down_sync", mask, value, lanes, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::here()) {
    const uint32_t operand = predicate != 0;
    return *emulation::collective("__ballot_sync", mask, &operand, 4, [](emulation::Rendezvous& r) {
        emulation::reduce(r, 0, [](uint32_t all, uint32_t set, int lane) { return all | set << lane; });
    }, site);
}
inline int __any_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::here()) {
    return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulation::Site site = emulation::Site::here()) {
    return __ballot_sync(mask, predicate, site) == mask;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, emulation::Site site = emulation::Site::here()) {
    return *emulation::collective("__reduce_max_sync", mask, &value, 4, [](emulation::Rendezvous& r) {
        emulation::reduce(r, 0, [](uint32_t all, uint32_t x, int) { return all < x ? x : all; });
    }, site);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, emulation::Site site = emulation::Site::here()) {
    return *emulation::collective("__reduce_min_sync", mask, &value, 4, [](emulation::Rendezvous& r) {
        emulation::reduce(r, ~0u, [](uint32_t all, uint32_t x, int) { return x < all ? x : all; });
    }, site);
}
inline unsigned __match_any_sync(unsigned mask, unsigned value, emulation::Site site = emulation::Site::here()) {
    return *emulation::collective("__match_any_sync", mask, &value, 4, [](emulation::Rendezvous& r) {
        for (int lane = 0; lane < emulation::WARP; ++lane) {
            r.out[lane][0] = 0;
            for (int other = 0; other < emulation::WARP; ++other) {
                if (r.mask >> other & 1 && r.in[other][0] == r.in[lane][0]) r.out[lane][0] |= 1u << other;
            }
        }
    }, site);
}
