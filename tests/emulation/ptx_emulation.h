// What the wrappers of cuda/ptx.cuh do, for the emulation.
#pragma once

#include "cuda_emulation.h"

using emulation::Site;

inline void follow_previous_kernel(Site site = Site::here()) { emulation::follow_previous_kernel(site); }
// Moves nothing, so it may come at any moment; but what it calls must be there.
inline void prefetch_line(const void* p, Site site = Site::here()) { emulation::check_there(p, site); }
inline uint32_t shared_address(const void* p, Site site = Site::here()) { return emulation::shared_offset(p, site); }

inline void copy_16_async(uint32_t to, const void* from, int valid, Site site = Site::here()) {
    emulation::copy_async(emulation::shared_at(to, 16, 16, site), from, 16, static_cast<uint32_t>(valid), site);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int NEWEST>
inline void wait_copies(Site site = Site::here()) {
    emulation::wait_copies(NEWEST, site);
}

namespace emulation {

// Lane 8 i + j brings row j of matrix i; lane l receives elements 2 (l % 4), +1 of row l / 4 of every matrix.
template <int MATRICES>
void load_matrices(Rendezvous& r) {
    uint64_t conflicts = 0;
    for (int i = 0; i < MATRICES; ++i) {
        uint32_t banks = 0;
        for (int j = 0; j < 8; ++j) {
            const uint32_t group = 1u << (r.in[8 * i + j][4] / 16 % 8);
            conflicts += (banks & group) != 0;
            banks |= group;
        }
        for (int lane = 0; lane < WARP; ++lane) r.out[lane][i] = r.in[8 * i + lane / 4][lane % 4];
    }
    count_conflicts(conflicts);
}

template <int MATRICES>
void load_matrix(uint32_t (&registers)[MATRICES], uint32_t address, Site site) {
    uint32_t operands[5] = {};
    const int lane = current->lane;
    if (lane < 8 * MATRICES) memcpy(operands, shared_at(address, 16, 16, site), 16);
    operands[4] = address;
    const uint32_t* result = collective("ldmatrix", ~0u, operands, sizeof operands, load_matrices<MATRICES>, site);
    for (int i = 0; i < MATRICES; ++i) registers[i] = result[i];
}

inline float widen_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
inline float widen_f16(uint32_t bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    _Float16 value;
    memcpy(&value, &half, 2);
    return static_cast<float>(value);
}
inline uint32_t narrow_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline uint32_t narrow_f16(float x) {
    const _Float16 value = static_cast<_Float16>(x);
    uint16_t half;
    memcpy(&half, &value, 2);
    return x != x ? 0x7FFF : half;
}

// D = A B + C of m16n8k16; operands a0..a3, b0, b1, c0..c3. With g = lane / 4 and t = lane % 4: A a0 (g; 2t, 2t+1), a1
// (g+8), a2 (g; 2t+8, +9), a3 (g+8; 2t+8, +9); B b0 (k = 2t, 2t+1; n = g), b1 (k + 8); C c0, c1 (g; 2t, 2t+1), c2, c3
// (g+8).
template <float (*WIDEN)(uint32_t)>
void multiply(Rendezvous& r) {
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < WARP; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t* in = r.in[lane];
        for (int i = 0; i < 4; ++i) {
            for (int half = 0; half < 2; ++half) {
                a[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = WIDEN(in[i] >> 16 * half & 0xFFFF);
                if (i < 2) b[2 * t + 8 * i + half][g] = WIDEN(in[4 + i] >> 16 * half & 0xFFFF);
            }
            c[g + 8 * (i / 2)][2 * t + i % 2] = __uint_as_float(in[6 + i]);
        }
    }
    for (int m = 0; m < 16; ++m) {
        float sum[8] = {};
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) sum[n] += a[m][k] * b[k][n];
        }
        for (int n = 0; n < 8; ++n) c[m][n] += sum[n];
    }
    for (int lane = 0; lane < WARP; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) r.out[lane][i] = __float_as_uint(c[g + 8 * (i / 2)][2 * t + i % 2]);
    }
}

template <float (*WIDEN)(uint32_t)>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
    uint32_t operands[10] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    memcpy(operands + 6, c, 16);
    memcpy(c, collective("mma.sync", ~0u, operands, sizeof operands, multiply<WIDEN>, site), 16);
}

}  // namespace emulation

inline void load_matrix_x4(uint32_t (&registers)[4], uint32_t address, Site site = Site::here()) {
    emulation::load_matrix(registers, address, site);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
    emulation::multiply_add<emulation::widen_bf16>(c, a, b, site);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
    emulation::multiply_add<emulation::widen_f16>(c, a, b, site);
}

inline uint32_t pack_bf16(float low, float high) { return emulation::narrow_bf16(low) | emulation::narrow_bf16(high) << 16; }
inline uint32_t pack_f16(float low, float high) { return emulation::narrow_f16(low) | emulation::narrow_f16(high) << 16; }
inline float2 unpack_bf16(uint32_t pair) { return {emulation::widen_bf16(pair & 0xFFFF), emulation::widen_bf16(pair >> 16)}; }
inline float2 unpack_f16(uint32_t pair) { return {emulation::widen_f16(pair & 0xFFFF), emulation::widen_f16(pair >> 16)}; }
