// What the host and the kernels agree on: descriptors, parameter structs, limits, tile shapes. Plain data only.
//
// A layer, launch by launch. P = tokens · slots bounds the number of pairs (a pair is a token and one of its experts);
// how many pairs there are, and whose, is known to the device alone. Every grid depends on (tokens, slots, number of
// multiprocessors) only, so that the sequence can be captured in a graph.
//
//   launch                      grid, block                       reads -> writes
//   moe_logits_*                (ceil(T/64), ceil(rows/64)), 256  x, router -> logits f32 [T, rows]
//     or moe_logits_few_*       (ceil(rows/2), ceil(T/8)), 128    T <= 256: the same
//     or moe_logits_many_*      (ceil(T/32), ceil(rows/64)), 128  beyond, 16-bit x: the same, of the router in parts
//   moe_route                   ceil(T/4), 128                    logits -> ids i32 [T, slots], weights f32 [T, slots]
//   moe_sort_small              1, 256      T·slots <= 2048       ids, weights -> offsets, pair_token, pair_weight,
//                                                                 slot_source; tile prefixes of the four GEMM stages
//     or moe_route_sort         1, 256      T <= 8                both of them
//     or moe_sort_count         ceil(T·slots/2048), 256           ids -> histogram
//        moe_sort_scan          1, 256                            histogram -> offsets, histogram (bases), tile prefixes
//        moe_sort_scatter       as count                          -> pair_token, pair_weight, slot_source
//   moe_scale_input_*           P, 128      Llama 4 only          x, weights -> x of each pair, times its weight
//   moe_base_plan               1, 32       layers with a base    -> offsets and tiles of the table of the base
//   moe_project_in_*            with the table of the base        x -> base_in [T, ld_base]
//   moe_project_in_*            persistent                        x -> z [P, ldz]: V x of gate and up (and S x)
//   moe_hidden_*                persistent                        x or z, base_in -> h [P, ldh] = act(gate, up)
//   moe_project_hidden_*        persistent                        h -> z [P, ldz]: V h of down (and S h)
//   moe_output_*                persistent                        h or z -> y [P, ldy] = down(h), without combine weight
//   moe_base_hidden_*           T, 128      down has a base       h, weights -> hb [T, ldh] = sum of w h
//   moe_output_*                with the table of the base        hb -> yb [T, ldy]
//   moe_combine_*               (T, ceil(H/1024)), 128            y, constants, yb, residual -> out [T, H]
//
// A layer without low-rank matrices needs no moe_project_*: the host knows which forms a layer has.
// A shared expert is an expert that every token visits: MoeRouteParams::shared_expert appends it as one more slot (its
// weight is 1, or the sigmoid of one more row of the logits). One computed elsewhere can be the residual of combine.
// The base of a layer of "base + delta" experts is itself a table of one MoeExpert and `offsets` {0, T}, run by the
// kernels of the stages: moe_project_in_* with v_in = the stacked base of gate and up, moe_output_* with down = the base.
//
// The GEMM stages come in families by the most rows (tokens of one expert) of a tile:
//   t8        16 weight rows x 8 tokens, K split over 8 warps       decode: weights stream once
//   t16       32 weight rows x 16 tokens, K split over 4 warps
//   t32, t64  128 weight rows x 32 or 64 tokens                     up to the ridge: still bound by weights
//   t128      128 tokens x 128 weight rows (of two matrices in moe_hidden)    bound by arithmetic
// The rule, `rows` = ceil(T · slots / experts): t8 if T <= 8; else the smallest family with 16, 32, 64 >= 2 · rows; else
// t128. Every family is correct for every number of tokens; a result does not depend on the grid, but families differ
// in the order of their sums. f32 has one family, t64. `moe_GEMM_tN_DTYPE` with DTYPE bf16, f16 or f32.
//
// Alignment: x, out, residual, weights, z, h, y: base addresses multiples of 16 bytes, rows (leading dimensions) multiples of
// 8 elements (4 for f32). Columns between a row's end and its leading dimension are never read. z, h and y rows are written
// up to the next multiple of 8 columns.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Limits.
constexpr int MOE_MAX_EXPERTS = 1024;  // slots of a layer, shared expert included
constexpr int MOE_MAX_TOP_K = 32;
constexpr int MOE_MAX_SLOTS = MOE_MAX_TOP_K + 1;
constexpr int MOE_MAX_GROUPS = 64;

constexpr int MOE_SORT_CHUNK = 2048;  // slots that one block sorts

// Launch shapes. GEMM stages: any grid of at least one block; multiprocessors · resident blocks is best. All families
// take MOE_GEMM_SHARED bytes of dynamic shared memory: what every card since sm_80 has.
constexpr int MOE_ROUTE_TOKENS = 4;  // per block, one warp each
constexpr int MOE_ROUTE_THREADS = 32 * MOE_ROUTE_TOKENS;
constexpr int MOE_SORT_THREADS = 256;
constexpr int MOE_ROUTE_SORT_TOKENS = MOE_SORT_THREADS / 32;  // at most, one warp each
constexpr int MOE_ROW_THREADS = 128;                          // kernels with one block per token or pair
constexpr int MOE_COMBINE_COLS = 8 * MOE_ROW_THREADS;         // columns of a block
constexpr int MOE_GEMM_SHARED = 96 * 1024;
constexpr int MOE_LOGITS_TILE = 64;  // tokens and rows per block
constexpr int MOE_LOGITS_FEW = 256;  // tokens at most of moe_logits_few_*
constexpr int MOE_LOGITS_FEW_THREADS = 128;
constexpr int MOE_LOGITS_FEW_TOKENS = 8, MOE_LOGITS_FEW_ROWS = 2;  // per block
constexpr int MOE_LOGITS_FEW_SHARED = MOE_LOGITS_FEW_THREADS / 32 * MOE_LOGITS_FEW_TOKENS * MOE_LOGITS_FEW_ROWS * 4;
constexpr int MOE_LOGITS_SHARED = 2 * 32 * (MOE_LOGITS_TILE + 4) * 4;
constexpr int MOE_LOGITS_MANY_THREADS = 128;
constexpr int MOE_LOGITS_MANY_TOKENS = 32, MOE_LOGITS_MANY_ROWS = 64;  // per block
constexpr int MOE_LOGITS_MANY_SHARED = 3 * (MOE_LOGITS_MANY_TOKENS + MOE_LOGITS_MANY_ROWS) * 128 * 2;
constexpr int moe_gemm_threads(int tile_rows, bool is_hidden) { return tile_rows == 128 && !is_hidden ? 128 : 256; }
// Blocks of a GEMM stage that registers let share a multiprocessor; shared memory may let fewer.
constexpr int moe_gemm_blocks(int tile_rows, bool is_hidden) { return tile_rows == 128 && is_hidden ? 1 : 2; }
constexpr int moe_gemm_tile_cols(int tile_rows) { return tile_rows == 8 ? 16 : tile_rows == 16 ? 32 : 128; }
constexpr int moe_route_words(int experts) { return 2 * experts + MOE_MAX_GROUPS; }  // of a token
constexpr int moe_route_shared(int experts) { return 4 * MOE_ROUTE_TOKENS * moe_route_words(experts); }
constexpr int moe_sort_shared(int experts) {
    return 4 * (MOE_SORT_THREADS / 32 * experts + experts + 1 + 64) + 2 * MOE_SORT_CHUNK;
}
// Routing, then sorting in the same place. `experts` of the router, `rows` of the tables.
constexpr int moe_route_sort_shared(int experts, int rows) {
    const int route = 4 * MOE_ROUTE_SORT_TOKENS * moe_route_words(experts), sort = moe_sort_shared(rows);
    return route > sort ? route : sort;
}

// What an expert is. An alias has no descriptor of its own: `canonical` leads to another slot.
enum MoeForm : int32_t {
    MOE_NONE = 0,      // never chosen; computes nothing
    MOE_MLP = 1,       // down(act(gate(x), up(x))); down(act(gate(x), 1)) without an up matrix
    MOE_CONSTANT = 2,  // a vector
};

// Bits of MoeMatrix::flags.
constexpr uint32_t MOE_LOW_RANK = 1;  // `weight` is U and multiplies the projection z
constexpr uint32_t MOE_BASE = 2;      // plus the layer's base of this matrix
constexpr uint32_t MOE_ABSENT = 4;    // of up: there is none (k = 0), its factor is 1

// One linear map [out, in] of an expert: weight · input (+ sparse rows) (+ base) (+ bias).
struct MoeMatrix {
    const void* weight;       // dense: W [out, k = in]; low rank: U [out, k = rank]; may be null where k = 0
    const int32_t* row_slot;  // [out]: the column of the pair's z that this output adds, or -1; null without sparse rows
    const float* bias;        // [out], or null
    int32_t ld;               // elements from one row of `weight` to the next, a multiple of 8 (4 in f32)
    int32_t k;                // columns of `weight`; 0 is allowed
    int32_t z_first;          // low rank: first column of V x in the pair's z, a multiple of 8
    uint32_t flags;           // MOE_LOW_RANK, MOE_BASE, MOE_ABSENT
};

// One expert; static after the layer is prepared.
struct MoeExpert {
    MoeMatrix gate, up, down;
    const void* v_in;       // [v_in_rows, hidden]: rows that multiply x: V of gate, its sparse rows S, V of up, its S; each
                            // V begins at a multiple of 8 rows (what is in between is not used)
    const void* v_down;     // [v_down_rows, width]: V of down, then its S
    const float* constant;  // [hidden] of MOE_CONSTANT
    int32_t form;           // MoeForm
    int32_t width;          // of the hidden vector
    int32_t v_in_rows;      // 0 where gate and up are dense
    int32_t v_in_ld;        // a multiple of 8 (4 in f32)
    int32_t v_down_rows;
    int32_t v_down_ld;      // a multiple of 8 (4 in f32)
    int32_t reserved[22];
};

enum MoeScoring : int32_t { MOE_SOFTMAX = 0, MOE_SIGMOID = 1, MOE_SPARSE_MIXER = 2 };
enum MoeChoice : int32_t { MOE_BY_SCORE = 0, MOE_BY_BIASED_SCORE = 1, MOE_BY_LOGIT = 2 };
enum MoeGroupScore : int32_t { MOE_GROUP_LARGEST = 0, MOE_GROUP_TWO_LARGEST = 1 };
// What becomes of slots whose weights are small beside the others (NAEE, arXiv 2402.14800, section 3.3 and A.2).
enum MoeSkip : int32_t {
    MOE_SKIP_NONE = 0,
    MOE_SKIP_RAW = 1,       // left out; the other weights stay
    MOE_SKIP_RESCALED = 2,  // left out; the other weights grow to the old sum
};

// Logits = x · weightᵀ in f32: moe_logits_{bf16,f16,f32}, moe_logits_few_*, moe_logits_many_{bf16,f16}.
struct MoeLogitsParams {
    const void* x;        // [tokens, hidden]
    const float* weight;  // [rows, hidden]
    const void* parts;    // [part_count, rows, hidden] of x's type: the weight in parts, see logits_many.cu
    float* logits;        // [tokens, rows]
    int32_t tokens;
    int32_t rows;
    int32_t hidden;
    int32_t ldx;
    int32_t ldw;
    int32_t ld_parts;     // a multiple of 8
    int32_t part_count;   // 1 to 3
    int32_t ld_logits;
};

// Router of src/architecture/router.rs.
struct MoeRouteParams {
    const float* logits;       // [tokens, ld_logits]
    const float* logit_bias;   // [experts], or null
    const float* choice_bias;  // [experts], or null
    const int32_t* group_of;   // [experts], or null where there is no group limit
    const uint8_t* live;       // [experts]: 0 where the row may not be chosen; null where all may
    int32_t* ids;              // [tokens, slots]; -1 = skipped
    float* weights;            // [tokens, slots]
    int32_t tokens;
    int32_t experts;           // router rows, <= MOE_MAX_EXPERTS
    int32_t ld_logits;
    int32_t top_k;             // <= MOE_MAX_TOP_K and <= live rows
    int32_t slots;             // top_k, plus 1 with a shared expert
    int32_t scoring;           // MoeScoring
    int32_t choice;            // MoeChoice
    int32_t groups;            // 0: no limit
    int32_t groups_kept;
    int32_t group_score;       // MoeGroupScore
    int32_t renormalise;       // 0: s · scale; 1: s / max(sum + added, least) · scale
    float scale;
    float added;
    float least;
    float jitter;              // threshold of MOE_SPARSE_MIXER
    int32_t skip_rule;         // MoeSkip
    float skip;                // the least share of the sum that a tail of slots must have to stay
    int32_t shared_expert;     // id of the last slot, or -1
    int32_t shared_gate;       // column of the logits whose sigmoid is its weight, or -1: weight 1
    int32_t reserved;
};

// The four GEMM stages, as indices of MoeSortParams::tile_*.
enum MoeStage : int32_t { MOE_PROJECT_IN = 0, MOE_HIDDEN = 1, MOE_PROJECT_HIDDEN = 2, MOE_OUTPUT = 3, MOE_STAGES = 4 };

// Stable sort of pairs by expert: all moe_sort_* kernels.
struct MoeSortParams {
    const int32_t* ids;         // [tokens, slots]; negative = skip
    const float* weights;       // [tokens, slots]
    const int32_t* canonical;   // [experts]: the slot whose weights each slot runs, -1: nobody's, skip
    const MoeExpert* experts;   // [experts]
    const int32_t* order;       // [experts]: the order in which tiles are dealt out, costly experts first
    int32_t* offsets;           // [experts + 1]: first pair of each expert
    int32_t* pair_token;        // [P]
    float* pair_weight;         // [P]: combine weight; sum over the duplicates of a token
    int32_t* slot_source;       // [tokens, slots]: pair; -1 nothing (skipped, or a duplicate); -2 - e: constant expert e
    float* slot_weight;         // [tokens, slots]: combine weight of the slot, duplicates summed into the first
    int32_t* tile_first;        // [MOE_STAGES, experts + 1]: first tile of order[i] in each stage
    int32_t* histogram;         // [chunks, experts], moe_sort_count and later only
    int32_t tokens;
    int32_t slots;
    int32_t experts_count;
    int32_t hidden;
    int32_t merge_duplicates;   // 0 where combine weights multiply inputs: every slot is a pair of its own, and its
                                // slot_weight is 1 (pair_weight is the factor of the input)
    int32_t tile_rows;          // tokens of a tile in all stages
    int32_t tile_cols[MOE_STAGES];
};

// Routing and sort of at most MOE_ROUTE_SORT_TOKENS tokens: moe_route_sort. What `route` writes is what `sort` reads.
struct MoeRouteSortParams {
    MoeRouteParams route;
    MoeSortParams sort;
};

// Offsets and tiles of a layer's base, a table of one expert that all tokens visit: moe_base_plan.
struct MoeBasePlanParams {
    const MoeExpert* base;  // [1]
    int32_t* offsets;       // [2]: 0, tokens
    int32_t* tile_first;    // [MOE_STAGES, 2]
    int32_t tokens;
    int32_t hidden;
    int32_t tile_rows;
    int32_t tile_cols[MOE_STAGES];
    int32_t reserved;
};

// x of each pair times its weight: moe_scale_input_*.
struct MoeScaleInputParams {
    const void* x;              // [tokens, ldx]
    const int32_t* offsets;     // [experts + 1]
    const int32_t* pair_token;  // [P]
    const float* pair_weight;   // [P]
    void* out;                  // [P, ld_out]
    int32_t experts;
    int32_t hidden;
    int32_t ldx;
    int32_t ld_out;
};

enum MoeActivation : int32_t {
    MOE_SWIGLU = 0,          // silu(g) · u
    MOE_CLAMPED_SWIGLU = 1,  // g' · sigmoid(slope · g') · (u' + 1), g' = min(g, limit), u' = u within ± limit
    MOE_GELU_TANH = 2,       // gelu(g) · u by the tanh formula
    MOE_RELU = 3,            // relu(g) · u
    MOE_SQUARED_RELU = 4,    // relu(g)² · u
};

// One GEMM stage: moe_project_in_*, moe_hidden_*, moe_project_hidden_*, moe_output_*.
struct MoeGemmParams {
    const MoeExpert* experts;        // [experts_count]
    const int32_t* offsets;          // [experts_count + 1]
    const int32_t* order;            // [experts_count]
    const int32_t* tile_first;       // [experts_count + 1] of this stage
    const int32_t* next_tile_first;  // the same of the stage that the next launch computes for these experts; null: of none
    const int32_t* pair_token;       // row of `input` of each pair; null: the pair itself. Only in project_in and hidden
    const void* input;               // what dense matrices and V multiply: x, or h in project_hidden and output
    const void* z;                   // what U multiplies; hidden and output only
    const void* base;                // hidden: base of gate and up [tokens, ld_base], or null
    void* out;                       // project_*: z; hidden: h; output: y
    int32_t experts_count;
    int32_t hidden;
    int32_t ld_input;
    int32_t ld_z;
    int32_t ld_base;
    int32_t ld_out;
    int32_t base_up;                 // column of `base` where up begins
    int32_t activation;              // MoeActivation
    float limit;
    float slope;
    int32_t next_stage;              // MoeStage of next_tile_first: hidden behind project_in, then one of those behind it
    int32_t reserved;
};

// hb[t] = sum of weight · h over the token's pairs whose down has MOE_BASE: moe_base_hidden_*.
struct MoeBaseHiddenParams {
    const MoeExpert* experts;
    const int32_t* canonical;
    const int32_t* ids;          // [tokens, slots]
    const int32_t* slot_source;  // [tokens, slots]
    const float* slot_weight;    // [tokens, slots]
    const void* h;               // [P, ldh]
    void* out;                   // [tokens, ld_out]
    int32_t tokens;
    int32_t slots;
    int32_t width;
    int32_t ldh;
    int32_t ld_out;
    int32_t reserved;
};

// out = residual + base + sum over slots, in slot order, of weight · y, in f32: moe_combine_*.
struct MoeCombineParams {
    const MoeExpert* experts;    // for constants
    const int32_t* slot_source;  // [tokens, slots]
    const float* slot_weight;    // [tokens, slots]
    const void* y;               // [P, ldy]
    const void* base;            // [tokens, ldy], or null
    const void* residual;        // [tokens, ld_residual], or null
    void* out;                   // [tokens, ld_out]
    int32_t tokens;
    int32_t slots;
    int32_t hidden;
    int32_t ldy;
    int32_t ld_residual;
    int32_t ld_out;
};

static_assert(sizeof(MoeMatrix) == 40 && offsetof(MoeMatrix, flags) == 36, "MoeMatrix");
static_assert(sizeof(MoeExpert) == 256 && offsetof(MoeExpert, form) == 144, "MoeExpert");
static_assert(sizeof(MoeLogitsParams) == 64, "MoeLogitsParams");
static_assert(sizeof(MoeRouteParams) == 136 && offsetof(MoeRouteParams, tokens) == 56, "MoeRouteParams");
static_assert(sizeof(MoeSortParams) == 136 && offsetof(MoeSortParams, tokens) == 96, "MoeSortParams");
static_assert(sizeof(MoeRouteSortParams) == 272 && offsetof(MoeRouteSortParams, sort) == 136, "MoeRouteSortParams");
static_assert(sizeof(MoeBasePlanParams) == 56 && offsetof(MoeBasePlanParams, tokens) == 24, "MoeBasePlanParams");
static_assert(sizeof(MoeScaleInputParams) == 56, "MoeScaleInputParams");
static_assert(sizeof(MoeGemmParams) == 128 && offsetof(MoeGemmParams, experts_count) == 80, "MoeGemmParams");
static_assert(sizeof(MoeBaseHiddenParams) == 80, "MoeBaseHiddenParams");
static_assert(sizeof(MoeCombineParams) == 80 && offsetof(MoeCombineParams, tokens) == 56, "MoeCombineParams");
