// Grouped GEMM for many tokens per expert (t128): 128 pairs x 128 weight rows, K in steps of 64.
//
// Three stages of 32 KiB are filled by cp.async (rows of x are gathered on the way); rows of 128 bytes are swizzled by
// chunk ^ row % 8, so that ldmatrix meets no bank conflict. A tile reads 32 KiB per 2 MFLOP from L2: 64 FLOP/byte. Four
// warps of 64 x 64 sums each; in the hidden stage eight warps of 64 x 32 of gate and as many of up, with one pipeline
// that runs through the K of gate and then through that of up: so each of them may be dense or low rank, with ranks of
// their own. K tails are zero-filled by the copies. The sums go through shared memory to the epilogue, 8 columns a
// thread.
//
// An expert's last tile is rarely full. With at most 64 pairs each warp takes 32 rows in place of 64, which halves the
// arithmetic of the tile for all of them.
#include "gemm.cuh"

namespace {

template <class T, int STAGE>
struct Large {
    static constexpr int ROWS = 128, COLS = 128, K = 64, STAGES = 3;
    static constexpr int PRODUCT_COUNT = PRODUCTS<STAGE>;
    static constexpr int THREADS = moe_gemm_threads(ROWS, STAGE == MOE_HIDDEN);
    static constexpr int WARP_ROWS = 64, WARP_COLS = STAGE == MOE_HIDDEN ? 32 : 64;
    static constexpr int WARPS_ALONG_ROWS = ROWS / WARP_ROWS, WARPS_ALONG_COLS = COLS / WARP_COLS;
    static constexpr int ROW_BYTES = K * 2;
    static constexpr int OPERAND_BYTES = ROWS * ROW_BYTES;
    static constexpr int STAGE_BYTES = 2 * OPERAND_BYTES;
    static constexpr int ROW_STEP = THREADS / 8;          // rows that the threads copy at once, 8 chunks each
    static constexpr int COPIES = ROWS / ROW_STEP;        // per thread and operand
    static constexpr int PITCH = COLS + 8;                // of the sums in shared memory: no conflicts for 8-byte stores
    static constexpr int STORE_ROWS = ROWS / PRODUCT_COUNT;  // at most, in a round of the epilogue
    static_assert(ROWS == COLS, "both operands are copied alike");
    static_assert(WARPS_ALONG_COLS * WARPS_ALONG_ROWS * 32 == THREADS, "warps cover the tile");
    static_assert(STAGES * STAGE_BYTES <= MOE_GEMM_SHARED, "stages fit");
    static_assert(PRODUCT_COUNT * STORE_ROWS * PITCH * 4 <= MOE_GEMM_SHARED, "sums fit");
    static_assert(STORE_ROWS == WARP_ROWS || PRODUCT_COUNT == 1, "a round of the epilogue is a row of warps");

    // Of a warp with FRAGMENTS times 16 rows.
    template <int FRAGMENTS>
    using Sums = float[FRAGMENTS][WARP_COLS / 8][4];

    // Copies the K steps of one product into stages.
    struct Loader {
        Operands<T> o;
        int k;
        int rows[COPIES];  // input row of each copy, or -1
        int weight_row, weight_rows;

        __device__ void begin(const MoeGemmParams& p, const MoeExpert& e, const Tile& tile, int product, int cols) {
            o = Operands<T>::of(p, e, STAGE, product);
            k = 0;
            weight_row = tile.col + threadIdx.x / 8;
            weight_rows = cols;
#pragma unroll
            for (int i = 0; i < COPIES; ++i) {
                const int row = threadIdx.x / 8 + i * ROW_STEP;
                const int pair = tile.first_pair + row;
                rows[i] = row >= tile.rows ? -1 : o.gathered ? p.pair_token[pair] : pair;
            }
        }

        // Of the first TILE_ROWS pairs.
        template <int TILE_ROWS>
        __device__ void issue(uint32_t stage) {
            const int chunk = threadIdx.x % 8, row = threadIdx.x / 8;
            const int col = k + chunk * VECTOR;
            const int bytes = valid_bytes(col, o.k);
            const uint32_t to = stage + row * ROW_BYTES + (chunk ^ (row & 7)) * 16;
            static_assert(ROW_STEP % 8 == 0, "all rows of a thread are swizzled alike");
#pragma unroll
            for (int i = 0; i < TILE_ROWS / ROW_STEP; ++i) {
                const bool valid = rows[i] >= 0 && bytes > 0;
                const T* const from = valid ? o.input + static_cast<int64_t>(rows[i]) * o.ld_input + col : o.input;
                copy_16_async(to + i * ROW_STEP * ROW_BYTES, from, valid ? bytes : 0);
            }
#pragma unroll
            for (int i = 0; i < COPIES; ++i) {
                const int weight = weight_row + i * ROW_STEP;
                const bool valid = weight < weight_rows && bytes > 0;
                const T* const from = valid ? o.weight + static_cast<int64_t>(weight) * o.ld_weight + col : o.input;
                copy_16_async(to + OPERAND_BYTES + i * ROW_STEP * ROW_BYTES, from, valid ? bytes : 0);
            }
            k += K;
        }
    };

    // Adds one stage's products.
    template <int FRAGMENTS>
    __device__ static void multiply(uint32_t stage, Sums<FRAGMENTS>& sums) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int row = warp / WARPS_ALONG_COLS * FRAGMENTS * 16 + lane % 16;
        const int col = warp % WARPS_ALONG_COLS * WARP_COLS + lane % 8 + lane / 16 * 8;
        // Stages begin at multiples of a row, so chunk c of a row is its first one ^ 16 c, swizzle and all.
        const uint32_t input = stage + row * ROW_BYTES + ((lane / 16) ^ (row & 7)) * 16;
        const uint32_t weight = stage + OPERAND_BYTES + col * ROW_BYTES + ((lane / 8 % 2) ^ (col & 7)) * 16;
#pragma unroll
        for (int step = 0; step < K / 16; ++step) {
            uint32_t a[FRAGMENTS][4], b[WARP_COLS / 16][4];
#pragma unroll
            for (int m = 0; m < FRAGMENTS; ++m) load_matrix_x4(a[m], (input ^ (2 * step * 16)) + m * 16 * ROW_BYTES);
#pragma unroll
            for (int n = 0; n < WARP_COLS / 16; ++n) load_matrix_x4(b[n], (weight ^ (2 * step * 16)) + n * 16 * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < FRAGMENTS; ++m) {
#pragma unroll
                for (int n = 0; n < WARP_COLS / 8; ++n) {
                    const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
                    T::mma(sums[m][n], a[m], pair);
                }
            }
        }
    }

    // This warp's sums to rows of shared memory.
    template <int FRAGMENTS>
    __device__ static void stage_sums(float* to, const Sums<FRAGMENTS>& sums) {
        const int lane = threadIdx.x % 32;
        const int col = threadIdx.x / 32 % WARPS_ALONG_COLS * WARP_COLS + lane % 4 * 2;
#pragma unroll
        for (int m = 0; m < FRAGMENTS; ++m) {
#pragma unroll
            for (int n = 0; n < WARP_COLS / 8; ++n) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float* const cell = to + (m * 16 + half * 8 + lane / 4) * PITCH + col + n * 8;
                    *reinterpret_cast<float2*>(cell) = make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
                }
            }
        }
    }

    // Finishes `count` rows of staged sums, `first` being the first one's place in the tile.
    __device__ static void store(const MoeGemmParams& p, const MoeExpert& e, const Tile& tile, int cols, int first,
                                 int count, const float* sums) {
        const int vectors = COLS / VECTOR;
        for (int i = threadIdx.x; i < count * vectors; i += THREADS) {
            const int row = i / vectors, col = i % vectors * VECTOR;
            if (first + row >= tile.rows || tile.col + col >= cols) continue;
            float v[PRODUCT_COUNT][VECTOR];
#pragma unroll
            for (int product = 0; product < PRODUCT_COUNT; ++product) {
                load_vector(sums + (product * STORE_ROWS + row) * PITCH + col, v[product]);
            }
            store_products<T, STAGE>(p, e, tile.first_pair + first + row, tile.col + col, cols, v);
        }
    }

    // A whole tile, with FRAGMENTS times 16 rows for each warp.
    template <int FRAGMENTS>
    __device__ static void compute(const MoeGemmParams& p, const Tile& tile, unsigned char* shared) {
        constexpr int TILE_ROWS = FRAGMENTS * 16 * WARPS_ALONG_ROWS;
        const uint32_t stages = shared_address(shared);
        const MoeExpert& e = p.experts[tile.expert];
        const int cols = stage_cols(p, e, STAGE);
        int steps[PRODUCT_COUNT];
        int total = 0;
#pragma unroll
        for (int product = 0; product < PRODUCT_COUNT; ++product) {
            steps[product] = (Operands<T>::of(p, e, STAGE, product).k + K - 1) / K;
            total += steps[product];
        }
        Loader loader;
        int loaded = 0;
        // Commits an empty group where nothing is left, so that groups count steps.
        const auto load_next = [&] {
            if (loaded < total) {
                if (loaded == 0) loader.begin(p, e, tile, 0, cols);
                if (PRODUCT_COUNT > 1 && loaded == steps[0]) loader.begin(p, e, tile, 1, cols);
                loader.template issue<TILE_ROWS>(stages + loaded % STAGES * STAGE_BYTES);
            }
            ++loaded;
            commit_copies();
        };
        for (int i = 0; i < STAGES - 1; ++i) load_next();

        Sums<FRAGMENTS> sums[PRODUCT_COUNT] = {};
        int step = 0;
#pragma unroll
        for (int product = 0; product < PRODUCT_COUNT; ++product) {
            for (int i = 0; i < steps[product]; ++i) {
                wait_copies<STAGES - 2>();
                __syncthreads();  // the step is there for all, and all are done with the stage that comes next
                load_next();
                multiply<FRAGMENTS>(stages + step % STAGES * STAGE_BYTES, sums[product]);
                ++step;
            }
        }
        wait_copies<0>();

        float* const staged = reinterpret_cast<float*>(shared);
        const int warp_row = threadIdx.x / 32 / WARPS_ALONG_COLS;
        constexpr int COUNT = TILE_ROWS < STORE_ROWS ? TILE_ROWS : STORE_ROWS;
        for (int round = 0; round < TILE_ROWS / COUNT; ++round) {
            __syncthreads();
            if (COUNT == TILE_ROWS || warp_row == round) {
                const int first = COUNT == TILE_ROWS ? warp_row * FRAGMENTS * 16 : 0;
#pragma unroll
                for (int product = 0; product < PRODUCT_COUNT; ++product) {
                    stage_sums<FRAGMENTS>(staged + (product * STORE_ROWS + first) * PITCH, sums[product]);
                }
            }
            __syncthreads();
            store(p, e, tile, cols, round * COUNT, COUNT, staged);
        }
        __syncthreads();
    }

    __device__ static void run(const MoeGemmParams& p) {
        MOE_SHARED(shared);
        const int tiles = p.tile_first[p.experts_count];
        for (int number = blockIdx.x; number < tiles; number += gridDim.x) {
            const Tile tile = Tile::find<ROWS, COLS>(p, p.tile_first, number);
            if (tile.rows <= ROWS / 2) {
                compute<WARP_ROWS / 32>(p, tile, shared);
            } else {
                compute<WARP_ROWS / 16>(p, tile, shared);
            }
        }
    }
};

}  // namespace

MOE_GEMM_KERNELS(128, bf16, Bf16, Large)
MOE_GEMM_KERNELS(128, f16, F16, Large)
