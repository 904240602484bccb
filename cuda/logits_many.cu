// Router logits of many tokens (moe_logits_many): f32 products on tensor cores, for x of 16 bits.
//
// A weight is the sum of up to three parts of x's type, each of what the ones before it left over, in units of
// RouterPart<T>::SCALE of the part before: what f32 holds in 24 bits, bf16 and f16 hold in three times 8 or 11. Products of
// parts are exact, and sums are f32, so the logits are as good as those of moe_logits; where the checkpoint's router is
// 16 bits itself there is one part. The parts run through K one after the other, the least first, each time scaling what
// has been summed. Tensor cores do not round their sums to nearest, so they sum no more than 64 columns.
//
// 32 tokens x 64 router rows per block, K in steps of 128: two panels of 64 columns, one for each pair of warps. Three
// stages of 24 KiB filled by cp.async; swizzled rows of 128 bytes as in gemm_large.cu.
#include "element.cuh"
#include "params.cuh"

namespace {

constexpr int TOKENS = MOE_LOGITS_MANY_TOKENS, ROWS = MOE_LOGITS_MANY_ROWS, THREADS = MOE_LOGITS_MANY_THREADS;
constexpr int PANEL = 64, PANELS = 2, K = PANEL * PANELS, STAGES = 3;
constexpr int ROW_BYTES = PANEL * 2;
constexpr int CHUNKS = K / VECTOR;                // of a row
constexpr int ROW_STEP = THREADS / CHUNKS;        // rows that the threads copy at once
constexpr int TOKEN_BYTES = TOKENS * K * 2, STAGE_BYTES = TOKEN_BYTES + ROWS * K * 2;
constexpr int WARP_ROWS = ROWS / 2;
constexpr int PITCH = ROWS + 8;
static_assert(ROW_STEP % 8 == 0, "all rows of a thread are swizzled alike");
static_assert(STAGES * STAGE_BYTES == MOE_LOGITS_MANY_SHARED, "shared memory of the launch");
static_assert(TOKENS * PITCH * 4 <= MOE_LOGITS_MANY_SHARED, "sums fit");
static_assert(THREADS == 32 * PANELS * (ROWS / WARP_ROWS), "warps cover the tile");

// How much less a part is worth than the one before it.
template <class T>
struct RouterPart;
template <>
struct RouterPart<Bf16> {
    static constexpr float SCALE = 1.0f;
};
template <>
struct RouterPart<F16> {
    static constexpr float SCALE = 1.0f / 2048;  // keeps small ones from vanishing
};

using Sums = float[TOKENS / 16][WARP_ROWS / 8][4];

// Copies columns k to k + K - 1 of the tokens and of one part of the router.
template <class T>
__device__ void load(const MoeLogitsParams& p, int part, int k, uint32_t stage) {
    const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
    const int col = k + chunk * VECTOR;
    const int bytes = max(0, min(16, (p.hidden - col) * 2));
    const int64_t first_token = static_cast<int64_t>(blockIdx.x) * TOKENS, first_row = static_cast<int64_t>(blockIdx.y) * ROWS;
    const T* const x = static_cast<const T*>(p.x);
    const T* const weight = static_cast<const T*>(p.parts) + part * static_cast<int64_t>(p.rows) * p.ld_parts;
    const uint32_t place = first * ROW_BYTES + ((chunk % 8) ^ (first & 7)) * 16;
    const uint32_t tokens = stage + chunk / 8 * TOKENS * ROW_BYTES + place;
    const uint32_t rows = stage + TOKEN_BYTES + chunk / 8 * ROWS * ROW_BYTES + place;
#pragma unroll
    for (int i = 0; i < TOKENS; i += ROW_STEP) {
        const int64_t token = first_token + first + i;
        const bool valid = token < p.tokens && bytes > 0;
        copy_16_async(tokens + i * ROW_BYTES, valid ? x + token * p.ldx + col : x, valid ? bytes : 0);
    }
#pragma unroll
    for (int i = 0; i < ROWS; i += ROW_STEP) {
        const int64_t row = first_row + first + i;
        const bool valid = row < p.rows && bytes > 0;
        copy_16_async(rows + i * ROW_BYTES, valid ? weight + row * p.ld_parts + col : x, valid ? bytes : 0);
    }
}

// Adds this warp's panel of one stage.
template <class T>
__device__ void multiply(uint32_t stage, Sums& sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, panel = warp % PANELS;
    const int token = lane % 16, row = warp / PANELS * WARP_ROWS + lane % 8 + lane / 16 * 8;
    // Chunk c of a row is its first one ^ 16 c, swizzle and all.
    const uint32_t tokens = stage + (panel * TOKENS + token) * ROW_BYTES + ((lane / 16) ^ (token & 7)) * 16;
    const uint32_t rows = stage + TOKEN_BYTES + (panel * ROWS + row) * ROW_BYTES + ((lane / 8 % 2) ^ (row & 7)) * 16;
    Sums part = {};
#pragma unroll
    for (int step = 0; step < PANEL / 16; ++step) {
        uint32_t a[TOKENS / 16][4], b[WARP_ROWS / 16][4];
#pragma unroll
        for (int m = 0; m < TOKENS / 16; ++m) load_matrix_x4(a[m], (tokens ^ (2 * step * 16)) + m * 16 * ROW_BYTES);
#pragma unroll
        for (int n = 0; n < WARP_ROWS / 16; ++n) load_matrix_x4(b[n], (rows ^ (2 * step * 16)) + n * 16 * ROW_BYTES);
#pragma unroll
        for (int m = 0; m < TOKENS / 16; ++m) {
#pragma unroll
            for (int n = 0; n < WARP_ROWS / 8; ++n) {
                const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
                T::mma(part[m][n], a[m], pair);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Sums) / 4); ++i) (&sums[0][0][0])[i] += (&part[0][0][0])[i];
}

template <class T>
__device__ void many_logits(const MoeLogitsParams& p) {
    follow_previous_kernel();
    MOE_SHARED(shared);
    const uint32_t stages = shared_address(shared);
    const int part_steps = (p.hidden + K - 1) / K;
    int loaded_part = p.part_count - 1, loaded_k = 0, fill = 0;
    // Commits an empty group where nothing is left, so that groups count steps.
    const auto load_next = [&] {
        if (loaded_part >= 0) load<T>(p, loaded_part, loaded_k, stages + fill * STAGE_BYTES);
        commit_copies();
        fill = fill + 1 == STAGES ? 0 : fill + 1;
        loaded_k += K;
        if (loaded_k >= p.hidden) {
            loaded_k = 0;
            --loaded_part;
        }
    };
    for (int i = 0; i < STAGES - 1; ++i) load_next();

    Sums sums = {};
    int drain = 0;
    for (int part = p.part_count - 1; part >= 0; --part) {
        for (int i = 0; i < part_steps; ++i) {
            wait_copies<STAGES - 2>();
            __syncthreads();  // the step is there for all, and all are done with the stage filled next
            load_next();
            multiply<T>(stages + drain * STAGE_BYTES, sums);
            drain = drain + 1 == STAGES ? 0 : drain + 1;
        }
        if (part == 0) break;
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(Sums) / 4); ++i) (&sums[0][0][0])[i] *= RouterPart<T>::SCALE;
    }
    wait_copies<0>();

    // The second panel's sums go through shared memory to the warps of the first.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int own_token = lane / 4, own_row = warp / PANELS * WARP_ROWS + lane % 4 * 2;
    float* const others = reinterpret_cast<float*>(shared) + own_token * PITCH + own_row;
    __syncthreads();
    const auto each = [&](const auto& visit) {
#pragma unroll
        for (int m = 0; m < TOKENS / 16; ++m) {
#pragma unroll
            for (int n = 0; n < WARP_ROWS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) visit(m * 16 + i / 2 * 8, n * 8 + i % 2, sums[m][n][i]);
            }
        }
    };
    if (warp % PANELS == 1) each([&](int token, int row, float sum) { others[token * PITCH + row] = sum; });
    __syncthreads();
    if (warp % PANELS == 1) return;
    each([&](int tile_token, int tile_row, float sum) {
        const int64_t token = static_cast<int64_t>(blockIdx.x) * TOKENS + own_token + tile_token;
        const int64_t row = static_cast<int64_t>(blockIdx.y) * ROWS + own_row + tile_row;
        if (token < p.tokens && row < p.rows) p.logits[token * p.ld_logits + row] = sum + others[tile_token * PITCH + tile_row];
    });
}

}  // namespace

MOE_KERNEL(moe_logits_many_bf16, MoeLogitsParams, THREADS, 3) { many_logits<Bf16>(p); }
MOE_KERNEL(moe_logits_many_f16, MoeLogitsParams, THREADS, 3) { many_logits<F16>(p); }
