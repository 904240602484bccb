// Router logits: x · weightᵀ in f32. The router is small (experts · hidden) and is computed in f32, whatever the type of x:
// choices among near-equal experts hang on it.
//
//   moe_logits       64 tokens x 64 router rows per block, 4 x 4 sums per thread. Operands go through shared memory
//                    transposed, [k][row], so that a thread reads its 4 rows at once.
//   moe_logits_few   8 tokens x 2 router rows per block, whose threads share the columns: for few tokens, where blocks of
//                    64 x 64 would leave most of the GPU idle. All that a thread reads is under way at once.
#include "element.cuh"
#include "params.cuh"

namespace {

constexpr int TILE = MOE_LOGITS_TILE, K = 32, PITCH = TILE + 4, THREADS = 256;
static_assert(2 * K * PITCH * 4 == MOE_LOGITS_SHARED, "shared memory of the launch");

template <class T>
__device__ void logits(const MoeLogitsParams& p) {
    follow_previous_kernel();
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

template <class T>
__device__ void few_logits(const MoeLogitsParams& p) {
    constexpr int TOKENS = MOE_LOGITS_FEW_TOKENS, ROWS = MOE_LOGITS_FEW_ROWS, WARPS = MOE_LOGITS_FEW_THREADS / 32;
    const int first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
    // What lies beyond the last row or token is computed like the last one, and not written.
    const auto weight_row = [&](int r) { return p.weight + static_cast<int64_t>(min(first_row + r, p.rows - 1)) * p.ldw; };
    const auto input_row = [&](int t) {
        return static_cast<const T*>(p.x) + static_cast<int64_t>(min(first_token + t, p.tokens - 1)) * p.ldx;
    };
    for (int line = threadIdx.x; line < p.hidden / 32; line += MOE_LOGITS_FEW_THREADS) {
        for (int r = 0; r < ROWS; ++r) prefetch_line(weight_row(r) + 32 * line);
    }
    follow_previous_kernel();
    float sums[TOKENS * ROWS] = {};
    for (int col = threadIdx.x * VECTOR; col < p.hidden; col += MOE_LOGITS_FEW_THREADS * VECTOR) {
        float w[ROWS][VECTOR], x[TOKENS][VECTOR];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) load_columns(weight_row(r), col, p.hidden, true, w[r]);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) load_columns(input_row(t), col, p.hidden, true, x[t]);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
#pragma unroll
            for (int sum = 0; sum < TOKENS * ROWS; ++sum) sums[sum] += x[sum / ROWS][i] * w[sum % ROWS][i];
        }
    }
    MOE_SHARED(shared);
    float* const partials = reinterpret_cast<float*>(shared);  // [warp][sum]
#pragma unroll
    for (int sum = 0; sum < TOKENS * ROWS; ++sum) {
        for (int lanes = 16; lanes > 0; lanes /= 2) sums[sum] += __shfl_xor_sync(WHOLE_WARP, sums[sum], lanes);
        if (threadIdx.x % 32 == 0) partials[threadIdx.x / 32 * TOKENS * ROWS + sum] = sums[sum];
    }
    __syncthreads();
    const int sum = threadIdx.x, token = first_token + sum / ROWS, row = first_row + sum % ROWS;
    if (sum >= TOKENS * ROWS || token >= p.tokens || row >= p.rows) return;
    float total = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) total += partials[warp * TOKENS * ROWS + sum];
    p.logits[static_cast<int64_t>(token) * p.ld_logits + row] = total;
}

}  // namespace

MOE_KERNEL(moe_logits_few_bf16, MoeLogitsParams, MOE_LOGITS_FEW_THREADS, 4) { few_logits<Bf16>(p); }
MOE_KERNEL(moe_logits_few_f16, MoeLogitsParams, MOE_LOGITS_FEW_THREADS, 4) { few_logits<F16>(p); }
MOE_KERNEL(moe_logits_few_f32, MoeLogitsParams, MOE_LOGITS_FEW_THREADS, 4) { few_logits<float>(p); }
MOE_KERNEL(moe_logits_bf16, MoeLogitsParams, THREADS, 2) { logits<Bf16>(p); }
MOE_KERNEL(moe_logits_f16, MoeLogitsParams, THREADS, 2) { logits<F16>(p); }
MOE_KERNEL(moe_logits_f32, MoeLogitsParams, THREADS, 2) { logits<float>(p); }
