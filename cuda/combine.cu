// The kernels with one block per token or pair around the GEMMs, all bound by memory: 16-byte accesses, f32 sums.
//
//   moe_combine       out = residual + base + sum of weight · y, in slot order, so the result does not depend on how
//                     pairs lie in memory. Reads (slots + 1) · H elements per token, writes H.
//   moe_base_hidden   sum of weight · h over the token's delta experts: the base's down runs once per token, since
//                     sum of w_e (B + D_e) h_e = B (sum of w_e h_e) + sum of w_e D_e h_e.
//   moe_scale_input   x · weight of each pair, where weights multiply inputs.
#include "element.cuh"
#include "params.cuh"

namespace {

template <class T>
__device__ const T* row_of(const void* base, int64_t row, int ld) {
    return static_cast<const T*>(base) + row * ld;
}

// Adds weight · y of the token's slots, in their order. Four slots are read before one is added: with one token, latency
// is all there is.
template <class T>
__device__ void add_slots(const MoeCombineParams& p, int64_t token, int col, float (&sum)[VECTOR]) {
    constexpr int BATCH = 4;
    const int32_t* const sources = p.slot_source + token * p.slots;
    const float* const weights = p.slot_weight + token * p.slots;
    for (int first = 0; first < p.slots; first += BATCH) {
        int source[BATCH];
        float weight[BATCH], v[BATCH][VECTOR];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const bool there = first + i < p.slots;
            source[i] = there ? sources[first + i] : -1;
            weight[i] = there ? weights[first + i] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (source[i] >= 0) load_vector(row_of<T>(p.y, source[i], p.ldy) + col, v[i]);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            if (source[i] == -1) continue;
            if (source[i] < -1) load_columns(p.experts[-2 - source[i]].constant, col, p.hidden, false, v[i]);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) sum[j] += weight[i] * v[i][j];
        }
    }
}

template <class T>
__device__ void combine(const MoeCombineParams& p) {
    follow_previous_kernel();
    const int64_t token = blockIdx.x;
    const int col = blockIdx.y * MOE_COMBINE_COLS + threadIdx.x * VECTOR;
    if (col >= p.hidden) return;
    float sum[VECTOR] = {}, v[VECTOR];
    add_slots<T>(p, token, col, sum);
    if (p.base) {
        load_vector(row_of<T>(p.base, token, p.ldy) + col, v);
        for (int i = 0; i < VECTOR; ++i) sum[i] += v[i];
    }
    if (p.residual) {
        load_columns(row_of<T>(p.residual, token, p.ld_residual), col, p.hidden, true, v);
        for (int i = 0; i < VECTOR; ++i) sum[i] += v[i];
    }
    T* const out = static_cast<T*>(p.out) + token * p.ld_out + col;
    if (col + VECTOR <= p.hidden) {
        store_vector(out, sum);
    } else {
        for (int i = 0; i < VECTOR && col + i < p.hidden; ++i) store_element(out + i, sum[i]);
    }
}

template <class T>
__device__ void base_hidden(const MoeBaseHiddenParams& p) {
    follow_previous_kernel();
    const int64_t token = blockIdx.x;
    for (int col = threadIdx.x * VECTOR; col < p.width; col += MOE_ROW_THREADS * VECTOR) {
        float sum[VECTOR] = {}, v[VECTOR];
        for (int slot = 0; slot < p.slots; ++slot) {
            const int source = p.slot_source[token * p.slots + slot];
            if (source < 0) continue;
            const int expert = p.canonical[p.ids[token * p.slots + slot]];
            if (!(p.experts[expert].down.flags & MOE_BASE)) continue;
            const float weight = p.slot_weight[token * p.slots + slot];
            load_vector(row_of<T>(p.h, source, p.ldh) + col, v);
            for (int i = 0; i < VECTOR; ++i) sum[i] += weight * v[i];
        }
        store_vector(static_cast<T*>(p.out) + token * p.ld_out + col, sum);
    }
}

template <class T>
__device__ void scale_input(const MoeScaleInputParams& p) {
    follow_previous_kernel();
    const int64_t pair = blockIdx.x;
    if (pair >= p.offsets[p.experts]) return;
    const T* const x = row_of<T>(p.x, p.pair_token[pair], p.ldx);
    const float weight = p.pair_weight[pair];
    for (int col = threadIdx.x * VECTOR; col < p.hidden; col += MOE_ROW_THREADS * VECTOR) {
        float v[VECTOR];
        load_columns(x, col, p.hidden, true, v);
        for (int i = 0; i < VECTOR; ++i) v[i] *= weight;
        store_vector(static_cast<T*>(p.out) + pair * p.ld_out + col, v);
    }
}

}  // namespace

MOE_KERNEL(moe_combine_bf16, MoeCombineParams, MOE_ROW_THREADS, 6) { combine<Bf16>(p); }
MOE_KERNEL(moe_combine_f16, MoeCombineParams, MOE_ROW_THREADS, 6) { combine<F16>(p); }
MOE_KERNEL(moe_combine_f32, MoeCombineParams, MOE_ROW_THREADS, 6) { combine<float>(p); }
MOE_KERNEL(moe_base_hidden_bf16, MoeBaseHiddenParams, MOE_ROW_THREADS, 8) { base_hidden<Bf16>(p); }
MOE_KERNEL(moe_base_hidden_f16, MoeBaseHiddenParams, MOE_ROW_THREADS, 8) { base_hidden<F16>(p); }
MOE_KERNEL(moe_base_hidden_f32, MoeBaseHiddenParams, MOE_ROW_THREADS, 8) { base_hidden<float>(p); }
MOE_KERNEL(moe_scale_input_bf16, MoeScaleInputParams, MOE_ROW_THREADS, 8) { scale_input<Bf16>(p); }
MOE_KERNEL(moe_scale_input_f16, MoeScaleInputParams, MOE_ROW_THREADS, 8) { scale_input<F16>(p); }
MOE_KERNEL(moe_scale_input_f32, MoeScaleInputParams, MOE_ROW_THREADS, 8) { scale_input<float>(p); }
