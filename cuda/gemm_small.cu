// Grouped GEMM for few tokens per expert (t8, t16, t32, t64): the weights are the m16 side of mma, tokens the n8 side.
//
// Bound by the bytes of the weights, which are read once per tile of tokens: 16 KiB of them per step, in three stages
// filled by cp.async. The pipeline runs across the ends of products and tiles, so that short ranks and narrow experts
// do not drain it: 32 KiB of weights are under way per block at any time, and two blocks fit on an SM of 227 KiB. With
// 8 tokens a tile is 16 weight rows, so that a decode step of a few experts still has work for all SMs; K is then split
// over the warps and summed in shared memory, in the order of the warps. Rows of 128 bytes are swizzled as in
// gemm_large.cu.
//
// From the moment at which a block has asked for the last of its weights to the one at which a block of the next kernel
// asks for its first, memory would idle: some microseconds, as long as a decode step takes to read the weights of a stage.
// So in t8 and t16 a block that has nothing left to copy calls what its successor begins with into L2.
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
        static constexpr bool CALLS_AHEAD = TOKENS <= 16;
        static_assert(ROWS == moe_gemm_tile_cols(TOKENS), "the plan's tiles");
        static_assert(ROWS % ROW_STEP == 0 && TOKENS % ROW_STEP == 0, "whole copies");
        static_assert(STAGE_BYTES % ROW_BYTES == 0, "chunks are found by ^");
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
                        tile = Tile::find<TOKENS, ROWS>(p, p.tile_first, number);
                    }
                    const MoeExpert& e = p.experts[tile.expert];
                    o = Operands<T>::of(p, e, STAGE, product);
                    weight_rows = stage_cols(p, e, STAGE) - tile.col;
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

        // The weights with which this block of the next kernel begins: two steps of each product, as its pipeline does.
        struct Ahead {
            static constexpr int LINE = 128 / 2;                  // elements
            static constexpr int ROW_THREADS = THREADS / ROWS;    // that call the lines of a row, by turns
            static constexpr int MOST_PRODUCTS = STAGE == MOE_PROJECT_IN ? 2 : 1;  // of the stage that follows
            const T* rows[MOST_PRODUCTS] = {};                    // this thread's, from its first line on
            int cols[MOST_PRODUCTS] = {};                         // from there on; none to begin with

            __device__ void find(const MoeGemmParams& p) {
                const int number = blockIdx.x;
                if (!p.next_tile_first || number >= p.next_tile_first[p.experts_count]) return;
                const Tile tile = Tile::find<TOKENS, ROWS>(p, p.next_tile_first, number);
                const MoeExpert& e = p.experts[tile.expert];
                const int row = tile.col + threadIdx.x / ROW_THREADS, col = threadIdx.x % ROW_THREADS * LINE;
                if (row >= stage_cols(p, e, p.next_stage)) return;
#pragma unroll
                for (int product = 0; product < MOST_PRODUCTS; ++product) {
                    const Operands<T> o = Operands<T>::of(p, e, p.next_stage, product);
                    rows[product] = o.weight + static_cast<int64_t>(row) * o.ld_weight + col;
                    cols[product] = min(o.k, 2 * K) - col;
                }
            }

            __device__ void call() const {
#pragma unroll
                for (int product = 0; product < MOST_PRODUCTS; ++product) {
#pragma unroll
                    for (int col = 0; col < 2 * K; col += ROW_THREADS * LINE) {
                        if (col < cols[product]) prefetch_line(rows[product] + col);
                    }
                }
            }
        };

        // Adds this warp's share of one step.
        __device__ static void multiply(uint32_t stage, Sums& sums) {
            const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
            const int panel = warp / WARPS_ALONG_ROWS;
            const int row = warp % WARPS_ALONG_ROWS * 16 + lane % 16;
            const uint32_t tokens = stage + WEIGHT_BYTES + panel * TOKENS * ROW_BYTES;
            // Stages begin at multiples of a row, so chunk c of a row is its first one ^ 16 c, swizzle and all.
            const uint32_t weight = stage + (panel * ROWS + row) * ROW_BYTES + ((lane / 16) ^ (row & 7)) * 16;
            if (TOKENS == 8) {
                // One n8 tile: an x4 load brings two k16 steps of it.
                const uint32_t token = tokens + lane % 8 * ROW_BYTES + ((lane / 8) ^ (lane & 7)) * 16;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint32_t b[4];
                    load_matrix_x4(b, token ^ (4 * half * 16));
#pragma unroll
                    for (int step = 0; step < 2; ++step) {
                        uint32_t a[4];
                        load_matrix_x4(a, weight ^ ((4 * half + 2 * step) * 16));
                        const uint32_t pair[2] = {b[2 * step], b[2 * step + 1]};
                        T::mma(sums[0], a, pair);
                    }
                }
            } else {
                const int token_row = lane % 8 + lane / 16 * 8;
                const uint32_t token = tokens + token_row * ROW_BYTES + ((lane / 8 % 2) ^ (token_row & 7)) * 16;
#pragma unroll
                for (int step = 0; step < PANEL / 16; ++step) {
                    uint32_t a[4];
                    load_matrix_x4(a, weight ^ (2 * step * 16));
#pragma unroll
                    for (int n = 0; n < TOKENS / 16; ++n) {
                        uint32_t b[4];
                        load_matrix_x4(b, (token ^ (2 * step * 16)) + n * 16 * ROW_BYTES);
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
            const int cols = stage_cols(p, e, STAGE);
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
            // Found while the first copies are under way.
            Ahead ahead;
            if (CALLS_AHEAD) ahead.find(p);
            bool called = !CALLS_AHEAD;
            const auto call_ahead = [&] {
                if (called || !loader.done()) return;
                ahead.call();
                called = true;
            };
            if (CALLS_AHEAD) call_ahead();

            for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
                const Tile tile = Tile::find<TOKENS, ROWS>(p, p.tile_first, number);
                const MoeExpert& e = p.experts[tile.expert];
                Sums sums[PRODUCT_COUNT] = {};
#pragma unroll
                for (int product = 0; product < PRODUCT_COUNT; ++product) {
                    const int steps = (Operands<T>::of(p, e, STAGE, product).k + K - 1) / K;
                    for (int i = 0; i < steps; ++i) {
                        wait_copies<STAGES - 2>();
                        __syncthreads();  // the step is there for all, and all are done with the stage filled next
                        load_next();
                        if (CALLS_AHEAD) call_ahead();
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
