// What the GEMM kernels of all families share: which tile is whose, which operands a stage multiplies, and what becomes
// of the sums.
//
// A stage computes, for every pair of every expert, one or two products input_row · weight_rowᵀ. Tiles are dealt out by
// number: tile_first[i] is the first tile of expert order[i], and within an expert tiles run along the pairs first, so
// that blocks that run together read the same weights. A tile's result does not depend on which block computes it.
#pragma once

#include "element.cuh"
#include "params.cuh"

// A block of pairs x weight rows of one expert.
struct Tile {
    int expert;
    int first_pair;
    int rows;  // pairs, at most those of a tile
    int col;   // first weight row

    // The tile of a number below tile_first[experts_count]. By a whole warp: two reads whatever the number of experts, and
    // two more for what belongs to the one found. Where tiles are small, and a block waits for nothing but these reads, one
    // more is spared by reading for 32 experts what only one of them needs, which takes registers.
    template <int TILE_ROWS, int TILE_COLS>
    __device__ static Tile find(const MoeGemmParams& p, const int32_t* tile_first, int number) {
        const int lane = threadIdx.x % 32;
        const auto starts_by = [&](int i) { return i <= p.experts_count && tile_first[i] <= number; };
        const int block = __popc(__ballot_sync(WHOLE_WARP, starts_by(32 * (lane + 1))));
        Tile tile;
        int first;
        if (TILE_ROWS <= 16) {
            const int own = min(32 * block + lane, p.experts_count - 1);
            const int own_expert = p.order[own], own_first = tile_first[own];
            const int place = __popc(__ballot_sync(WHOLE_WARP, starts_by(32 * block + lane + 1)));
            tile.expert = __shfl_sync(WHOLE_WARP, own_expert, place);
            first = __shfl_sync(WHOLE_WARP, own_first, place);
        } else {
            const int index = 32 * block + __popc(__ballot_sync(WHOLE_WARP, starts_by(32 * block + lane + 1)));
            tile.expert = p.order[index];
            first = tile_first[index];
        }
        const int begin = p.offsets[tile.expert], end = p.offsets[tile.expert + 1];
        const int row_tiles = (end - begin + TILE_ROWS - 1) / TILE_ROWS;
        const int local = number - first;
        tile.first_pair = begin + local % row_tiles * TILE_ROWS;
        tile.rows = min(end - tile.first_pair, TILE_ROWS);
        tile.col = local / row_tiles * TILE_COLS;
        return tile;
    }
};
static_assert(MOE_MAX_EXPERTS <= 32 * 32, "Tile::find looks at 32 blocks of 32");

// Products per tile: gate and up in the hidden stage.
template <int STAGE>
constexpr int PRODUCTS = STAGE == MOE_HIDDEN ? 2 : 1;

// Weight rows of the expert in a stage.
__device__ __forceinline__ int stage_cols(const MoeGemmParams& p, const MoeExpert& e, int stage) {
    if (stage == MOE_PROJECT_IN) return e.v_in_rows;
    if (stage == MOE_HIDDEN) return e.width;
    if (stage == MOE_PROJECT_HIDDEN) return e.v_down_rows;
    return p.hidden;
}

// The operands of one product.
template <class T>
struct Operands {
    const T* input;  // row of pair i: input + row(i) · ld_input
    const T* weight;
    int ld_input;
    int ld_weight;
    int k;
    bool gathered;  // row(i) is the token of pair i, otherwise i

    __device__ static Operands of(const MoeGemmParams& p, const MoeExpert& e, int stage, int product) {
        Operands o;
        o.input = static_cast<const T*>(p.input);
        o.ld_input = p.ld_input;
        o.gathered = (stage == MOE_PROJECT_IN || stage == MOE_HIDDEN) && p.pair_token != nullptr;
        if (stage == MOE_PROJECT_IN) {
            o.weight = static_cast<const T*>(e.v_in);
            o.ld_weight = e.v_in_ld;
            o.k = p.hidden;
        } else if (stage == MOE_PROJECT_HIDDEN) {
            o.weight = static_cast<const T*>(e.v_down);
            o.ld_weight = e.v_down_ld;
            o.k = e.width;
        } else {
            const MoeMatrix& m = stage == MOE_OUTPUT ? e.down : product == 0 ? e.gate : e.up;
            o.weight = static_cast<const T*>(m.weight);
            o.ld_weight = m.ld;
            o.k = m.k;
            if (m.flags & MOE_LOW_RANK) {
                o.input = static_cast<const T*>(p.z) + m.z_first;
                o.ld_input = p.ld_z;
                o.gathered = false;
            }
        }
        return o;
    }
};

// Columns of `input` and `weight` that lie within k, as bytes of the 16 that begin at column `col`.
__device__ __forceinline__ int valid_bytes(int col, int k) { return max(0, min(16, (k - col) * 2)); }

// g · sigmoid(slope · g). The fast instructions are off by some 1e-6, far below the rounding to 16 bits that follows.
template <class T>
__device__ __forceinline__ float silu(float g, float slope = 1.0f) {
    return __fdividef(g, 1.0f + __expf(-slope * g));
}
template <>
__device__ __forceinline__ float silu<float>(float g, float slope) {
    return g / (1.0f + expf(-slope * g));
}

template <class T>
__device__ __forceinline__ float activate(const MoeGemmParams& p, float g, float u) {
    switch (p.activation) {
        case MOE_CLAMPED_SWIGLU: {
            g = g > p.limit ? p.limit : g;  // lets NaN through
            u = u > p.limit ? p.limit : u < -p.limit ? -p.limit : u;
            return silu<T>(g, p.slope) * (u + 1.0f);
        }
        case MOE_GELU_TANH: return 0.5f * g * (1.0f + tanhf(0.7978845608f * (g + 0.044715f * g * g * g))) * u;
        case MOE_RELU: return (g < 0.0f ? 0.0f : g) * u;
        case MOE_SQUARED_RELU: return (g < 0.0f ? 0.0f : g * g) * u;
        default: return silu<T>(g) * u;
    }
}

// Adds to the products of columns `col` to col + 7 what is not a product: base, sparse rows, bias.
template <class T>
__device__ __forceinline__ void add_to_products(const MoeGemmParams& p, const MoeMatrix& m, int64_t pair, int col,
                                                int cols, const T* base, float (&v)[VECTOR]) {
    if (base) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            if (col + i < cols) v[i] += load_element(base + col + i);
        }
    }
    if (m.row_slot) {
        const T* const z = static_cast<const T*>(p.z) + pair * p.ld_z;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const int slot = col + i < cols ? m.row_slot[col + i] : -1;
            if (slot >= 0) v[i] += load_element(z + slot);
        }
    }
    if (m.bias) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            if (col + i < cols) v[i] += m.bias[col + i];
        }
    }
}

// Finishes and stores 8 columns of one pair. `v[0]` (and in the hidden stage `v[1]`) are the products. What lies beyond
// `cols` within the 8 is stored as zero.
template <class T, int STAGE>
__device__ __forceinline__ void store_products(const MoeGemmParams& p, const MoeExpert& e, int64_t pair, int col,
                                               int cols, float (&v)[PRODUCTS<STAGE>][VECTOR]) {
    if (STAGE == MOE_HIDDEN) {
        const T* gate_base = nullptr;
        const T* up_base = nullptr;
        if (p.base) {
            const int64_t token = p.pair_token ? p.pair_token[pair] : pair;
            const T* const base = static_cast<const T*>(p.base) + token * p.ld_base;
            if (e.gate.flags & MOE_BASE) gate_base = base;
            if (e.up.flags & MOE_BASE) up_base = base + p.base_up;
        }
        float(&up)[VECTOR] = v[PRODUCTS<STAGE> - 1];
        add_to_products(p, e.gate, pair, col, cols, gate_base, v[0]);
        add_to_products(p, e.up, pair, col, cols, up_base, up);
        if (e.up.flags & MOE_ABSENT) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) up[i] = 1.0f;
        }
        // The common one on a way of its own, without eight switches.
        if (p.activation == MOE_SWIGLU) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) v[0][i] = silu<T>(v[0][i]) * up[i];
        } else {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) v[0][i] = activate<T>(p, v[0][i], up[i]);
        }
    } else if (STAGE == MOE_OUTPUT) {
        add_to_products<T>(p, e.down, pair, col, cols, nullptr, v[0]);
    }
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        if (col + i >= cols) v[0][i] = 0.0f;
    }
    store_vector(static_cast<T*>(p.out) + pair * p.ld_out + col, v[0]);
}

#define MOE_GEMM_KERNEL(NAME, FAMILY, ROWS, IS_HIDDEN) \
    MOE_KERNEL(NAME, MoeGemmParams, FAMILY::THREADS, moe_gemm_blocks(ROWS, IS_HIDDEN)) { \
        follow_previous_kernel();                                                        \
        FAMILY::run(p);                                                                  \
    }
// All kernels of one family: moe_<stage>_t<rows>_<type>.
#define MOE_GEMM_KERNELS(ROWS, SUFFIX, TYPE, FAMILY)                                                                   \
    using ProjectIn##ROWS##SUFFIX = FAMILY<TYPE, MOE_PROJECT_IN>;                                                      \
    using Hidden##ROWS##SUFFIX = FAMILY<TYPE, MOE_HIDDEN>;                                                             \
    using ProjectHidden##ROWS##SUFFIX = FAMILY<TYPE, MOE_PROJECT_HIDDEN>;                                              \
    using Output##ROWS##SUFFIX = FAMILY<TYPE, MOE_OUTPUT>;                                                             \
    MOE_GEMM_KERNEL(moe_project_in_t##ROWS##_##SUFFIX, ProjectIn##ROWS##SUFFIX, ROWS, false)                           \
    MOE_GEMM_KERNEL(moe_hidden_t##ROWS##_##SUFFIX, Hidden##ROWS##SUFFIX, ROWS, true)                                   \
    MOE_GEMM_KERNEL(moe_project_hidden_t##ROWS##_##SUFFIX, ProjectHidden##ROWS##SUFFIX, ROWS, false)                   \
    MOE_GEMM_KERNEL(moe_output_t##ROWS##_##SUFFIX, Output##ROWS##SUFFIX, ROWS, false)
