// The element types of weights and activations: 16-bit formats as their bits, and f32.
#pragma once

#include "ptx.cuh"

struct Bf16 {
    uint16_t bits;
    static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_bf16(low, high); }
    static __device__ __forceinline__ float2 unpack(uint32_t pair) { return unpack_bf16(pair); }
    static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        mma_bf16(c, a, b);
    }
};

struct F16 {
    uint16_t bits;
    static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_f16(low, high); }
    static __device__ __forceinline__ float2 unpack(uint32_t pair) { return unpack_f16(pair); }
    static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        mma_f16(c, a, b);
    }
};

// One element as f32, and back.
template <class T>
__device__ __forceinline__ float load_element(const T* p) {
    return T::unpack(p->bits).x;
}
template <>
__device__ __forceinline__ float load_element(const float* p) {
    return *p;
}
template <class T>
__device__ __forceinline__ void store_element(T* p, float value) {
    p->bits = static_cast<uint16_t>(T::pack(value, 0.0f));
}
template <>
__device__ __forceinline__ void store_element(float* p, float value) {
    *p = value;
}

// What a thread handles at once: 8 elements, 16 bytes of a 16-bit type. The address is a multiple of 16.
constexpr int VECTOR = 8;

template <class T>
__device__ __forceinline__ void load_vector(const T* p, float (&v)[VECTOR]) {
    const uint4 q = *reinterpret_cast<const uint4*>(p);
    const uint32_t pairs[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = T::unpack(pairs[i]);
        v[2 * i] = pair.x;
        v[2 * i + 1] = pair.y;
    }
}
template <>
__device__ __forceinline__ void load_vector(const float* p, float (&v)[VECTOR]) {
    const float4* const q = reinterpret_cast<const float4*>(p);
    const float4 a = q[0], b = q[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <class T>
__device__ __forceinline__ void store_vector(T* p, const float (&v)[VECTOR]) {
    *reinterpret_cast<uint4*>(p) = make_uint4(T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]), T::pack(v[6], v[7]));
}
template <>
__device__ __forceinline__ void store_vector(float* p, const float (&v)[VECTOR]) {
    float4* const q = reinterpret_cast<float4*>(p);
    q[0] = make_float4(v[0], v[1], v[2], v[3]);
    q[1] = make_float4(v[4], v[5], v[6], v[7]);
}

// Columns `col` and up of a row of `cols`; what is beyond its end is not read, and 0.
template <class T>
__device__ __forceinline__ void load_columns(const T* row, int col, int cols, bool aligned, float (&v)[VECTOR]) {
    if (aligned && col + VECTOR <= cols) {
        load_vector(row + col, v);
        return;
    }
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) v[i] = col + i < cols ? load_element(row + col + i) : 0.0f;
}
