// Grouped GEMM of f32 layers (t64_f32): correct, in f32 arithmetic throughout, and not fast.
//
// 64 pairs x 128 weight rows, K in steps of 16 through shared memory, 4 x 8 sums per thread.
#include "gemm.cuh"

namespace {

template <class T, int STAGE>
struct Plain {
    static constexpr int THREADS = 256, ROWS = 64, COLS = 128, K = 16;
    static constexpr int PRODUCT_COUNT = PRODUCTS<STAGE>;
    static constexpr int THREAD_ROWS = 4;
    static_assert(COLS == moe_gemm_tile_cols(ROWS), "the plan's tiles");
    static_assert(THREADS == COLS / VECTOR * (ROWS / THREAD_ROWS), "sums cover the tile");
    static_assert((ROWS + COLS) * (K + 1) * 4 <= MOE_GEMM_SHARED, "it fits");

    __device__ static void run(const MoeGemmParams& p) {
        MOE_SHARED(shared);
        float* const inputs = reinterpret_cast<float*>(shared);  // [row][k], one element of padding
        float* const weights = inputs + ROWS * (K + 1);
        const int tiles = p.tile_first[p.experts_count];
        const int thread_row = threadIdx.x / (COLS / VECTOR) * THREAD_ROWS;
        const int thread_col = threadIdx.x % (COLS / VECTOR) * VECTOR;
        for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
            const Tile tile = Tile::find<ROWS, COLS>(p, p.tile_first, number);
            const MoeExpert& e = p.experts[tile.expert];
            const int cols = stage_cols(p, e, STAGE);
            float sums[THREAD_ROWS][PRODUCT_COUNT][VECTOR] = {};
#pragma unroll
            for (int product = 0; product < PRODUCT_COUNT; ++product) {
                const Operands<T> o = Operands<T>::of(p, e, STAGE, product);
                for (int k = 0; k < o.k; k += K) {
                    __syncthreads();
                    for (int i = threadIdx.x; i < ROWS * K; i += THREADS) {
                        const int row = i / K, col = k + i % K;
                        const int pair = tile.first_pair + row;
                        float value = 0.0f;
                        if (row < tile.rows && col < o.k) {
                            const int64_t input_row = o.gathered ? p.pair_token[pair] : pair;
                            value = o.input[input_row * o.ld_input + col];
                        }
                        inputs[row * (K + 1) + i % K] = value;
                    }
                    for (int i = threadIdx.x; i < COLS * K; i += THREADS) {
                        const int row = i / K, col = k + i % K;
                        const bool valid = tile.col + row < cols && col < o.k;
                        const int64_t weight_row = tile.col + row;
                        weights[row * (K + 1) + i % K] = valid ? o.weight[weight_row * o.ld_weight + col] : 0.0f;
                    }
                    __syncthreads();
                    for (int j = 0; j < K; ++j) {
                        float w[VECTOR];
#pragma unroll
                        for (int c = 0; c < VECTOR; ++c) w[c] = weights[(thread_col + c) * (K + 1) + j];
#pragma unroll
                        for (int r = 0; r < THREAD_ROWS; ++r) {
                            const float x = inputs[(thread_row + r) * (K + 1) + j];
#pragma unroll
                            for (int c = 0; c < VECTOR; ++c) sums[r][product][c] += x * w[c];
                        }
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < THREAD_ROWS; ++r) {
                const int row = thread_row + r, col = tile.col + thread_col;
                if (row < tile.rows && col < cols) store_products<T, STAGE>(p, e, tile.first_pair + row, col, cols, sums[r]);
            }
        }
    }
};

}  // namespace

MOE_GEMM_KERNELS(64, f32, float, Plain)
