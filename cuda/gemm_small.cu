// Grouped GEMM for few tokens per expert (t8, t16, t32, t64): the weights are the m16 side of mma, tokens the n8 side.
//
// Bound by the bytes of the weights, which are read once per tile of tokens: 16 KiB of them per step, in three stages
// filled by cp.async. The pipeline runs across the ends of products and tiles, so that short ranks and narrow experts
// do not drain it: 32 KiB of weights are under way per block at any time, and two blocks fit on an SM of 227 KiB. With
// 8 tokens a tile is 16 weight rows, so that a decode step of a few experts still has work for all SMs; K is then split
// over the warps and summed in shared memory, in the order of the warps. Rows of 128 bytes are swizzled as in
// gemm_large.cu.
#include "gemm.cuh"

namespace {

template <int TOKENS, int WARPS_ALONG_ROWS>
struct SmallShape {
    template <class T, int STAGE>
    struct Small {
        static constexpr int THREADS = 256;
        static constexpr int WARPS_ALONG_K = THREADS / 32 / WARPS_ALONG_ROWS;
        static constexpr int ROWS = 16 * WARPS_ALONG_ROWS;  // of weights
        static constexpr int PANEL = 64;                    // columns of a swizzled row, and K of a warp's step
        static constexpr int K = PANEL * WARPS_ALONG_K;
        static constexpr int STAGES = 3;
        static constexpr int PRODUCT_COUNT = PRODUCTS<STAGE>;
        static constexpr int ROW_BYTES = PANEL * 2;
        static constexpr int CHUNKS = K / VECTOR;  // of a row
        static constexpr int WEIGHT_BYTES = ROWS * K * 2, TOKEN_BYTES = TOKENS * K * 2;
        static constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKEN_BYTES;
        static constexpr int ROW_STEP = THREADS / CHUNKS;  // rows that the threads copy at once
        static constexpr int WEIGHT_COPIES = ROWS / ROW_STEP;
        static constexpr int TOKEN_COPIES = TOKENS / ROW_STEP;
        static constexpr int ROUND = TOKENS < 16 ? TOKENS : 16;  // tokens in a round of the epilogue
        static constexpr int PITCH = ROWS + 8;
        static constexpr int PARTIAL = ROUND * PITCH;  // floats of a partial sum: [token][weight row]
        static_assert(ROWS == moe_gemm_tile_cols(TOKENS), "the plan's tiles");
        static_assert(ROWS % ROW_STEP == 0 && TOKENS % ROW_STEP == 0, "whole copies");
        static_assert(STAGES * STAGE_BYTES + PRODUCT_COUNT * WARPS_ALONG_K * PARTIAL * 4 <= MOE_GEMM_SHARED, "it fits");

        // [product][n8 tile of tokens]: weight rows g, g + 8 x tokens 2t, 2t + 1.
        using Sums = float[TOKENS / 8][4];

        // Walks through the K steps of all tiles of this block.
        struct Loader {
            Tile tile;
            Operands<T> o;
            int number, tiles, product, k;
            int weight_rows;         // from the tile's first on; `o.weight` is that one
            int rows[TOKEN_COPIES];  // input row of each copy, or -1

            __device__ void start(const MoeGemmParams& p, int tile_count) {
                number = static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x);
                tiles = tile_count;
                product = PRODUCT_COUNT;
                k = o.k = 0;
                skip_to_work(p);
            }

            __device__ bool done() const { return number >= tiles; }

            // To the next product with columns, if this one has none left.
            __device__ void skip_to_work(const MoeGemmParams& p) {
                while (k >= o.k) {
                    if (++product >= PRODUCT_COUNT) {
                        product = 0;
                        number += gridDim.x;
                        if (done()) return;
                        tile = Tile::find<TOKENS, ROWS>(p, number);
                    }
                    const MoeExpert& e = p.experts[tile.expert];
                    o = Operands<T>::template of<STAGE>(p, e, product);
                    weight_rows = stage_cols<STAGE>(p, e) - tile.col;
                    o.weight += static_cast<int64_t>(tile.col) * o.ld_weight;
                    k = 0;
                }
                if (k > 0) return;
#pragma unroll
                for (int i = 0; i < TOKEN_COPIES; ++i) {
                    const int row = threadIdx.x / CHUNKS + i * ROW_STEP;
                    const int pair = tile.first_pair + row;
                    rows[i] = row >= tile.rows ? -1 : o.gathered ? p.pair_token[pair] : pair;
                }
            }

            __device__ static uint32_t place(int row, int chunk, int operand_rows) {
                const int panel = chunk / 8;
                return (panel * operand_rows + row) * ROW_BYTES + ((chunk % 8) ^ (row & 7)) * 16;
            }

            __device__ void issue(const MoeGemmParams& p, uint32_t stage) {
                const int chunk = threadIdx.x % CHUNKS, row = threadIdx.x / CHUNKS;
                const int col = k + chunk * VECTOR;
                const int bytes = valid_bytes(col, o.k);
#pragma unroll
                for (int i = 0; i < WEIGHT_COPIES; ++i) {
                    const int weight = row + i * ROW_STEP;
                    const bool valid = weight < weight_rows && bytes > 0;
                    const T* const from = valid ? o.weight + static_cast<int64_t>(weight) * o.ld_weight + col : o.input;
                    copy_16_async(stage + place(row + i * ROW_STEP, chunk, ROWS), from, valid ? bytes : 0);
                }
#pragma unroll
                for (int i = 0; i < TOKEN_COPIES; ++i) {
                    const bool valid = rows[i] >= 0 && bytes > 0;
                    const T* const from = valid ? o.input + static_cast<int64_t>(rows[i]) * o.ld_input + col : o.input;
                    copy_16_async(stage + WEIGHT_BYTES + place(row + i * ROW_STEP, chunk, TOKENS), from, valid ? bytes : 0);
                }
                k += K;
                skip_to_work(p);
            }
        };

        // Adds this warp's share of one step.
        __device__ static void multiply(uint32_t stage, Sums& sums) {
            const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
            const int panel = warp / WARPS_ALONG_ROWS;
            const int row = warp % WARPS_ALONG_ROWS * 16 + lane % 16;
            const uint32_t weight = stage + (panel * ROWS + row) * ROW_BYTES;
            const uint32_t tokens = stage + WEIGHT_BYTES + panel * TOKENS * ROW_BYTES;
            if (TOKENS == 8) {
                // One n8 tile: an x4 load brings two k16 steps of it.
                const uint32_t token = tokens + lane % 8 * ROW_BYTES;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t b[4];
                    load_matrix_x4(b, token + (((4 * half + lane / 8) ^ (lane & 7)) * 16));
#pragma unroll
                    for (int step = 0; step < 2; ++step) {
                        uint32_t a[4];
                        load_matrix_x4(a, weight + (((4 * half + 2 * step + lane / 16) ^ (row & 7)) * 16));
                        const uint32_t pair[2] = {b[2 * step], b[2 * step + 1]};
                        T::mma(sums[0], a, pair);
                    }
                }
            } else {
                const int token_row = lane % 8 + lane / 16 * 8;
                const uint32_t token = tokens + token_row * ROW_BYTES;
#pragma unroll
                for (int step = 0; step < PANEL / 16; ++step) {
                    uint32_t a[4];
                    load_matrix_x4(a, weight + (((2 * step + lane / 16) ^ (row & 7)) * 16));
                    const uint32_t chunk = (2 * step + lane / 8 % 2) ^ (token_row & 7);
#pragma unroll
                    for (int n = 0; n < TOKENS / 16; ++n) {
                        uint32_t b[4];
                        load_matrix_x4(b, token + n * 16 * ROW_BYTES + chunk * 16);
                        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                        T::mma(sums[2 * n], a, low);
                        T::mma(sums[TOKENS == 8 ? 0 : 2 * n + 1], a, high);
                    }
                }
            }
        }

        // This warp's partial sums of the tokens from `first` on, a round of them: partial[k warp][token][weight row].
        __device__ __forceinline__ static void stage_sums(float* partial, const Sums& sums, int first) {
            const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
            float* const to = partial + warp / WARPS_ALONG_ROWS * PARTIAL + warp % WARPS_ALONG_ROWS * 16 + lane / 4;
#pragma unroll
            for (int n = 0; n < ROUND / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    to[(n * 8 + lane % 4 * 2 + i % 2) * PITCH + i / 2 * 8] = sums[first / 8 + n][i];
                }
            }
        }

        __device__ static void store(const MoeGemmParams& p, const Tile& tile, int first, const float* partials) {
            const MoeExpert& e = p.experts[tile.expert];
            const int cols = stage_cols<STAGE>(p, e);
            constexpr int VECTORS = ROWS / VECTOR;
            for (int i = threadIdx.x; i < ROUND * VECTORS; i += THREADS) {
                const int row = i / VECTORS, col = i % VECTORS * VECTOR;
                if (first + row >= tile.rows || tile.col + col >= cols) continue;
                float v[PRODUCT_COUNT][VECTOR];
#pragma unroll
                for (int product = 0; product < PRODUCT_COUNT; ++product) {
                    const float* const partial = partials + product * WARPS_ALONG_K * PARTIAL + row * PITCH + col;
                    load_vector(partial, v[product]);
#pragma unroll
                    for (int warp = 1; warp < WARPS_ALONG_K; ++warp) {
                        float more[VECTOR];
                        load_vector(partial + warp * PARTIAL, more);
#pragma unroll
                        for (int j = 0; j < VECTOR; ++j) v[product][j] += more[j];
                    }
                }
                store_products<T, STAGE>(p, e, tile.first_pair + first + row, tile.col + col, cols, v);
            }
        }

        // The epilogue, round by round.
        __device__ static void finish(const MoeGemmParams& p, const Tile& tile, float* partials, const Sums (&sums)[PRODUCT_COUNT]) {
#pragma unroll 1
            for (int first = 0; first < tile.rows; first += ROUND) {
                __syncthreads();
                // Registers have no index: of the unrolled rounds one does something.
#pragma unroll
                for (int round = 0; round < TOKENS; round += ROUND) {
                    if (first != round) continue;
#pragma unroll
                    for (int product = 0; product < PRODUCT_COUNT; ++product) {
                        stage_sums(partials + product * WARPS_ALONG_K * PARTIAL, sums[product], round);
                    }
                }
                __syncthreads();
                store(p, tile, first, partials);
            }
        }

        __device__ static void run(const MoeGemmParams& p) {
            MOE_SHARED(shared);
            const uint32_t stages = shared_address(shared);
            float* const partials = reinterpret_cast<float*>(shared + STAGES * STAGE_BYTES);
            const int tiles = p.tile_first[p.experts_count];
            Loader loader;
            loader.start(p, tiles);
            int fill = 0;   // stage to fill next
            int drain = 0;  // stage to multiply next
            // Commits an empty group where nothing is left, so that groups count steps.
            const auto load_next = [&] {
                if (!loader.done()) loader.issue(p, stages + fill * STAGE_BYTES);
                fill = fill + 1 == STAGES ? 0 : fill + 1;
                commit_copies();
            };
#pragma unroll 1
            for (int i = 0; i < STAGES - 1; ++i) load_next();

            for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
                const Tile tile = Tile::find<TOKENS, ROWS>(p, number);
                const MoeExpert& e = p.experts[tile.expert];
                Sums sums[PRODUCT_COUNT] = {};
#pragma unroll
                for (int product = 0; product < PRODUCT_COUNT; ++product) {
                    const int steps = (Operands<T>::template of<STAGE>(p, e, product).k + K - 1) / K;
                    for (int i = 0; i < steps; ++i) {
                        wait_copies<STAGES - 2>();
                        __syncthreads();  // the step is there for all, and all are done with the stage filled next
                        load_next();
                        multiply(stages + drain * STAGE_BYTES, sums[product]);
                        drain = drain + 1 == STAGES ? 0 : drain + 1;
                    }
                }
                finish(p, tile, partials, sums);
            }
            wait_copies<0>();
        }
    };
};

template <class T, int STAGE>
using Small8 = SmallShape<8, 1>::Small<T, STAGE>;
template <class T, int STAGE>
using Small16 = SmallShape<16, 2>::Small<T, STAGE>;
template <class T, int STAGE>
using Small32 = SmallShape<32, 8>::Small<T, STAGE>;
template <class T, int STAGE>
using Small64 = SmallShape<64, 8>::Small<T, STAGE>;

}  // namespace

MOE_GEMM_KERNELS(8, bf16, Bf16, Small8)
MOE_GEMM_KERNELS(8, f16, F16, Small8)
MOE_GEMM_KERNELS(16, bf16, Bf16, Small16)
MOE_GEMM_KERNELS(16, f16, F16, Small16)
MOE_GEMM_KERNELS(32, bf16, Bf16, Small32)
MOE_GEMM_KERNELS(32, f16, F16, Small32)
MOE_GEMM_KERNELS(64, bf16, Bf16, Small64)
MOE_GEMM_KERNELS(64, f16, F16, Small64)
