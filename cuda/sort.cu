// Stable sort of (token, expert) pairs by expert, on the device: offsets of the experts, the token and weight of each
// pair, the pair of each slot, and how many GEMM tiles each expert has.
//
// A counting sort without atomics. A chunk of MOE_SORT_CHUNK slots belongs to one block, an eighth of it to each warp;
// a warp counts its slots per expert with __match_any_sync, 32 at a time and in order, so the order within an expert is
// that of the slots whatever the schedule. Up to one chunk everything happens in one launch (moe_sort_small); above,
// moe_sort_count writes a histogram per chunk, moe_sort_scan turns it into first positions, moe_sort_scatter places.
// Reads 8 bytes per slot (twice), writes 20.
#include "params.cuh"
#include "ptx.cuh"

namespace {

constexpr unsigned ALL = 0xFFFFFFFFu;
constexpr int WARPS = MOE_SORT_THREADS / 32;
constexpr int WARP_SLOTS = MOE_SORT_CHUNK / WARPS;
constexpr int NO_PAIR = -1;

// What becomes of a slot.
struct Slot {
    int expert = -1;    // whose pair it is, or -1
    int constant = -1;  // or the constant expert it names
    float weight = 0.0f;
    float factor = 0.0f;  // of the pair
};

__device__ int expert_of(const MoeSortParams& p, int64_t slot) {
    const int id = p.ids[slot];
    return id < 0 || id >= p.experts_count ? -1 : p.canonical[id];
}

__device__ Slot read_slot(const MoeSortParams& p, int64_t slot) {
    Slot result;
    const int expert = expert_of(p, slot);
    if (expert < 0) return result;
    const int form = p.experts[expert].form;
    if (form == MOE_NONE) return result;
    float weight = p.weights[slot];
    if (p.merge_duplicates) {
        const int64_t token_first = slot / p.slots * p.slots;
        for (int64_t s = token_first; s < slot; ++s) {
            if (expert_of(p, s) == expert) return result;
        }
        for (int64_t s = slot + 1; s < token_first + p.slots; ++s) {
            if (expert_of(p, s) == expert) weight += p.weights[s];
        }
    }
    if (form == MOE_MLP) result.expert = expert;
    if (form == MOE_CONSTANT) result.constant = expert;
    result.weight = p.merge_duplicates ? weight : 1.0f;
    result.factor = weight;
    return result;
}

// Goes through this warp's slots of a chunk, 32 at a time. `cells[expert]` grows by the pairs found; where PLACE, what it
// held is the position of the next pair, and pairs are written there.
template <bool PLACE>
__device__ void walk(const MoeSortParams& p, int64_t chunk_first, int* cells) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t total = static_cast<int64_t>(p.tokens) * p.slots;
    const int64_t first = chunk_first + warp * WARP_SLOTS;
    for (int64_t start = first; start < first + WARP_SLOTS && start < total; start += 32) {
        const int64_t index = start + lane;
        Slot slot;
        if (index < total) slot = read_slot(p, index);
        const unsigned same = __match_any_sync(ALL, static_cast<unsigned>(slot.expert));
        const int rank = __popc(same & ((1u << lane) - 1));
        const int position = slot.expert >= 0 ? cells[slot.expert] + rank : NO_PAIR;
        __syncwarp();
        if (slot.expert >= 0 && rank == 0) cells[slot.expert] += __popc(same);
        __syncwarp();
        if (!PLACE || index >= total) continue;
        if (slot.expert >= 0) {
            p.pair_token[position] = static_cast<int>(index / p.slots);
            p.pair_weight[position] = slot.factor;
        }
        p.slot_source[index] = slot.constant >= 0 ? -2 - slot.constant : position;
        p.slot_weight[index] = slot.weight;
    }
}

// counts[warp][expert] of a chunk.
__device__ void count_chunk(const MoeSortParams& p, int64_t chunk_first, int* counts) {
    for (int i = threadIdx.x; i < WARPS * p.experts_count; i += MOE_SORT_THREADS) counts[i] = 0;
    __syncthreads();
    walk<false>(p, chunk_first, counts + threadIdx.x / 32 * p.experts_count);
    __syncthreads();
}

// Turns counts[warp][expert] into the first positions of the warps; `first(expert)` is that of the chunk.
template <class First>
__device__ void counts_to_positions(const MoeSortParams& p, int* counts, const First& first) {
    for (int e = threadIdx.x; e < p.experts_count; e += MOE_SORT_THREADS) {
        int position = first(e);
        for (int warp = 0; warp < WARPS; ++warp) {
            const int count = counts[warp * p.experts_count + e];
            counts[warp * p.experts_count + e] = position;
            position += count;
        }
    }
    __syncthreads();
}

// out[i] = sum of value(j) for j < i; out[count] is the sum of all. By all threads of the block.
template <class Value>
__device__ void exclusive_scan(int count, int* scratch, int32_t* out, const Value& value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int carry = 0;
    for (int start = 0; start < count; start += MOE_SORT_THREADS) {
        const int i = start + threadIdx.x;
        const int own = i < count ? value(i) : 0;
        int sum = own;
        for (int lanes = 1; lanes < 32; lanes *= 2) {
            const int below = __shfl_up_sync(ALL, sum, lanes);
            if (lane >= lanes) sum += below;
        }
        if (lane == 31) scratch[warp] = sum;
        __syncthreads();
        int before = carry;
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) before += scratch[w];
            carry += scratch[w];
        }
        if (i < count) out[i] = before + sum - own;
        __syncthreads();
    }
    if (threadIdx.x == 0) out[count] = carry;
    __syncthreads();
}

__device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Weight rows of an expert in a stage.
__device__ int stage_cols(const MoeExpert& e, int stage, int hidden) {
    if (stage == MOE_PROJECT_IN) return e.v_in_rows;
    if (stage == MOE_HIDDEN) return e.width;
    if (stage == MOE_PROJECT_HIDDEN) return e.v_down_rows;
    return hidden;
}

__device__ int tiles_of(const MoeExpert& e, int rows, int stage, int hidden, int tile_rows, const int32_t* tile_cols) {
    return ceil_div(rows, tile_rows) * ceil_div(stage_cols(e, stage, hidden), tile_cols[stage]);
}

// Tiles of each stage, in the order in which they are dealt out, from the offsets.
__device__ void plan_tiles(const MoeSortParams& p, int* scratch) {
    for (int stage = 0; stage < MOE_STAGES; ++stage) {
        int32_t* const out = p.tile_first + stage * (p.experts_count + 1);
        exclusive_scan(p.experts_count, scratch, out, [&](int i) {
            const int e = p.order[i];
            const int rows = p.offsets[e + 1] - p.offsets[e];
            return tiles_of(p.experts[e], rows, stage, p.hidden, p.tile_rows, p.tile_cols);
        });
    }
}

}  // namespace

MOE_KERNEL(moe_sort_small, MoeSortParams, MOE_SORT_THREADS, 1) {
    MOE_SHARED(shared);
    int* const counts = reinterpret_cast<int*>(shared);
    int* const scratch = counts + WARPS * p.experts_count;
    count_chunk(p, 0, counts);
    exclusive_scan(p.experts_count, scratch, p.offsets, [&](int e) {
        int sum = 0;
        for (int warp = 0; warp < WARPS; ++warp) sum += counts[warp * p.experts_count + e];
        return sum;
    });
    counts_to_positions(p, counts, [&](int e) { return p.offsets[e]; });
    walk<true>(p, 0, counts + threadIdx.x / 32 * p.experts_count);
    plan_tiles(p, scratch);
}

MOE_KERNEL(moe_sort_count, MoeSortParams, MOE_SORT_THREADS, 1) {
    MOE_SHARED(shared);
    int* const counts = reinterpret_cast<int*>(shared);
    count_chunk(p, static_cast<int64_t>(blockIdx.x) * MOE_SORT_CHUNK, counts);
    for (int e = threadIdx.x; e < p.experts_count; e += MOE_SORT_THREADS) {
        int sum = 0;
        for (int warp = 0; warp < WARPS; ++warp) sum += counts[warp * p.experts_count + e];
        p.histogram[static_cast<int64_t>(blockIdx.x) * p.experts_count + e] = sum;
    }
}

MOE_KERNEL(moe_sort_scan, MoeSortParams, MOE_SORT_THREADS, 1) {
    MOE_SHARED(shared);
    int* const scratch = reinterpret_cast<int*>(shared) + WARPS * p.experts_count;
    const int64_t slots = static_cast<int64_t>(p.tokens) * p.slots;
    const int64_t chunks = (slots + MOE_SORT_CHUNK - 1) / MOE_SORT_CHUNK;
    exclusive_scan(p.experts_count, scratch, p.offsets, [&](int e) {
        int sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += p.histogram[chunk * p.experts_count + e];
        return sum;
    });
    for (int e = threadIdx.x; e < p.experts_count; e += MOE_SORT_THREADS) {
        int position = p.offsets[e];
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            int32_t* const cell = p.histogram + chunk * p.experts_count + e;
            const int count = *cell;
            *cell = position;
            position += count;
        }
    }
    plan_tiles(p, scratch);
}

MOE_KERNEL(moe_sort_scatter, MoeSortParams, MOE_SORT_THREADS, 1) {
    MOE_SHARED(shared);
    int* const counts = reinterpret_cast<int*>(shared);
    const int64_t chunk = blockIdx.x;
    count_chunk(p, chunk * MOE_SORT_CHUNK, counts);
    counts_to_positions(p, counts, [&](int e) { return p.histogram[chunk * p.experts_count + e]; });
    walk<true>(p, chunk * MOE_SORT_CHUNK, counts + threadIdx.x / 32 * p.experts_count);
}

MOE_KERNEL(moe_base_plan, MoeBasePlanParams, 32, 1) {
    const int stage = threadIdx.x;
    if (stage == 0) {
        p.offsets[0] = 0;
        p.offsets[1] = p.tokens;
    }
    if (stage < MOE_STAGES) {
        p.tile_first[2 * stage] = 0;
        p.tile_first[2 * stage + 1] = tiles_of(*p.base, p.tokens, stage, p.hidden, p.tile_rows, p.tile_cols);
    }
}
