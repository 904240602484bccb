// Router logits: x · weightᵀ in f32, 64 tokens x 64 router rows per block, 4 x 4 sums per thread.
//
// The router is small (experts · hidden) and is computed in f32, whatever the type of x: choices among near-equal
// experts hang on it. Operands go through shared memory transposed, [k][row], so that a thread reads its 4 rows at once.
#include "element.cuh"
#include "params.cuh"

namespace {

constexpr int TILE = MOE_LOGITS_TILE, K = 32, PITCH = TILE + 4, THREADS = 256;
static_assert(2 * K * PITCH * 4 == MOE_LOGITS_SHARED, "shared memory of the launch");

template <class T>
__device__ void logits(const MoeLogitsParams& p) {
    MOE_SHARED(shared);
    float* const inputs = reinterpret_cast<float*>(shared);
    float* const weights = inputs + K * PITCH;
    const int64_t first_token = static_cast<int64_t>(blockIdx.x) * TILE;
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * TILE;
    const int thread_token = threadIdx.x / 16 * 4, thread_row = threadIdx.x % 16 * 4;
    float sums[4][4] = {};
    for (int k = 0; k < p.hidden; k += K) {
        __syncthreads();
        for (int i = threadIdx.x; i < TILE * K; i += THREADS) {
            const int row = i / K, col = k + i % K;
            const bool in = col < p.hidden;
            const int64_t token = first_token + row, router_row = first_row + row;
            inputs[i % K * PITCH + row] =
                in && token < p.tokens ? load_element(static_cast<const T*>(p.x) + token * p.ldx + col) : 0.0f;
            weights[i % K * PITCH + row] = in && router_row < p.rows ? p.weight[router_row * p.ldw + col] : 0.0f;
        }
        __syncthreads();
#pragma unroll 8
        for (int j = 0; j < K; ++j) {
            const float4 x = *reinterpret_cast<const float4*>(inputs + j * PITCH + thread_token);
            const float4 w = *reinterpret_cast<const float4*>(weights + j * PITCH + thread_row);
            const float xs[4] = {x.x, x.y, x.z, x.w}, ws[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int r = 0; r < 4; ++r) {
#pragma unroll
                for (int c = 0; c < 4; ++c) sums[r][c] += xs[r] * ws[c];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int64_t token = first_token + thread_token + r;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int64_t row = first_row + thread_row + c;
            if (token < p.tokens && row < p.rows) p.logits[token * p.ld_logits + row] = sums[r][c];
        }
    }
}

}  // namespace

MOE_KERNEL(moe_logits_bf16, MoeLogitsParams, THREADS, 2) { logits<Bf16>(p); }
MOE_KERNEL(moe_logits_f16, MoeLogitsParams, THREADS, 2) { logits<F16>(p); }
MOE_KERNEL(moe_logits_f32, MoeLogitsParams, THREADS, 2) { logits<float>(p); }
