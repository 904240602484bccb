// The device code of the sort, see sort.cu: by all threads of a block of MOE_SORT_THREADS, whose shared memory holds for a
// chunk of MOE_SORT_CHUNK slots what Chunk says.
#pragma once

#include "params.cuh"
#include "ptx.cuh"

namespace {

constexpr int SORT_WARPS = MOE_SORT_THREADS / 32;
constexpr int WARP_SLOTS = MOE_SORT_CHUNK / SORT_WARPS;
constexpr int SCAN_WORDS = 64;
constexpr int NO_PAIR = -1;
static_assert(SCAN_WORDS >= MOE_STAGES * SORT_WARPS, "a word per sum and warp");

// Whose weights a slot runs, or -1.
__device__ int expert_of(const MoeSortParams& p, int slot) {
    const int id = p.ids[slot];
    const int expert = id < 0 || id >= p.experts_count ? -1 : p.canonical[id];
    return expert < 0 || p.experts[expert].form == MOE_NONE ? -1 : expert;
}

// A chunk of slots. Its shared memory: counts, offsets, scan, experts.
struct Chunk {
    int first, end;    // slots
    int* counts;       // [SORT_WARPS, experts_count]
    int* offsets;      // [experts_count + 1]: those of the parameters, without the way to memory and back
    int* scan;         // [SCAN_WORDS]
    int16_t* experts;  // [MOE_SORT_CHUNK]: expert_of
    static_assert(MOE_MAX_EXPERTS <= INT16_MAX, "experts fit");

    __device__ Chunk(const MoeSortParams& p, int number, unsigned char* shared) {
        first = number * MOE_SORT_CHUNK;
        end = min(first + MOE_SORT_CHUNK, p.tokens * p.slots);
        counts = reinterpret_cast<int*>(shared);
        offsets = counts + SORT_WARPS * p.experts_count;
        scan = offsets + p.experts_count + 1;
        experts = reinterpret_cast<int16_t*>(scan + SCAN_WORDS);
    }

    __device__ int* own_counts(const MoeSortParams& p) const { return counts + threadIdx.x / 32 * p.experts_count; }

    // Calls visit(slot, expert_of(slot)) for slots of one token; only those of a chunk's first and last token may lie in its
    // neighbours. What is read at a time does not depend on what was read.
    template <class Visit>
    __device__ void each(const MoeSortParams& p, int begin, int stop, const Visit& visit) const {
        for (int s = begin; s < min(stop, first); ++s) visit(s, expert_of(p, s));
#pragma unroll 4
        for (int s = max(begin, first); s < min(stop, end); ++s) visit(s, static_cast<int>(experts[s - first]));
        for (int s = max(begin, end); s < stop; ++s) visit(s, expert_of(p, s));
    }
};

// What becomes of a slot.
struct Slot {
    int expert = -1;    // whose pair it is, or -1
    int constant = -1;  // or the constant expert it names
    float weight = 0.0f;
    float factor = 0.0f;  // of the pair
};

__device__ Slot read_slot(const MoeSortParams& p, const Chunk& chunk, int slot) {
    Slot result;
    const int expert = chunk.experts[slot - chunk.first];
    if (expert < 0) return result;
    float weight = p.weights[slot];
    if (p.merge_duplicates) {
        const int token_first = slot / p.slots * p.slots;
        bool is_duplicate = false;
        chunk.each(p, token_first, slot, [&](int, int other) { is_duplicate |= other == expert; });
        if (is_duplicate) return result;
        chunk.each(p, slot + 1, token_first + p.slots, [&](int s, int other) {
            if (other == expert) weight += p.weights[s];
        });
    }
    const bool is_constant = p.experts[expert].form == MOE_CONSTANT;
    (is_constant ? result.constant : result.expert) = expert;
    result.weight = p.merge_duplicates ? weight : 1.0f;
    result.factor = weight;
    return result;
}

// Goes through this warp's slots of a chunk, 32 at a time. `cells[expert]` grows by the pairs found; where PLACE, what it
// held is the position of the next pair, and pairs are written there.
template <bool PLACE>
__device__ void walk(const MoeSortParams& p, const Chunk& chunk, int* cells) {
    const int lane = threadIdx.x % 32;
    const int first = chunk.first + static_cast<int>(threadIdx.x) / 32 * WARP_SLOTS;
    for (int start = first; start < min(first + WARP_SLOTS, chunk.end); start += 32) {
        const int index = start + lane;
        Slot slot;
        if (index < chunk.end) slot = read_slot(p, chunk, index);
        const unsigned same = __match_any_sync(WHOLE_WARP, static_cast<unsigned>(slot.expert));
        const int rank = __popc(same & ((1u << lane) - 1));
        const int position = slot.expert >= 0 ? cells[slot.expert] + rank : NO_PAIR;
        __syncwarp();
        if (slot.expert >= 0 && rank == 0) cells[slot.expert] += __popc(same);
        __syncwarp();
        if (!PLACE || index >= chunk.end) continue;
        if (slot.expert >= 0) {
            p.pair_token[position] = index / p.slots;
            p.pair_weight[position] = slot.factor;
        }
        p.slot_source[index] = slot.constant >= 0 ? -2 - slot.constant : position;
        p.slot_weight[index] = slot.weight;
    }
}

// Experts and counts of a chunk.
__device__ void count_chunk(const MoeSortParams& p, const Chunk& chunk) {
    for (int i = threadIdx.x; i < SORT_WARPS * p.experts_count; i += MOE_SORT_THREADS) chunk.counts[i] = 0;
    for (int slot = chunk.first + threadIdx.x; slot < chunk.end; slot += MOE_SORT_THREADS) {
        chunk.experts[slot - chunk.first] = static_cast<int16_t>(expert_of(p, slot));
    }
    __syncthreads();
    walk<false>(p, chunk, chunk.own_counts(p));
    __syncthreads();
}

// Pairs of an expert in a chunk.
__device__ int count_of(const MoeSortParams& p, const Chunk& chunk, int expert) {
    int sum = 0;
    for (int warp = 0; warp < SORT_WARPS; ++warp) sum += chunk.counts[warp * p.experts_count + expert];
    return sum;
}

// Turns counts into the first positions of the warps; `first(expert)` is that of the chunk. Then places the pairs.
template <class First>
__device__ void place_chunk(const MoeSortParams& p, const Chunk& chunk, const First& first) {
    for (int e = threadIdx.x; e < p.experts_count; e += MOE_SORT_THREADS) {
        int position = first(e);
        int* const cells = chunk.counts + e;
        int counts[SORT_WARPS];
#pragma unroll
        for (int warp = 0; warp < SORT_WARPS; ++warp) counts[warp] = cells[warp * p.experts_count];
#pragma unroll
        for (int warp = 0; warp < SORT_WARPS; ++warp) {
            cells[warp * p.experts_count] = position;
            position += counts[warp];
        }
    }
    __syncthreads();
    walk<true>(p, chunk, chunk.own_counts(p));
}

// N running sums at once: for every i up to and including `count`, put(i, before), where before[n] is the sum of what
// value(j, own) set own[n] to, over j < i. `scan` has a word per sum and warp.
template <int N, class Value, class Put>
__device__ void exclusive_scan(int count, int* scan, const Value& value, const Put& put) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int carry[N] = {};
    for (int start = 0; start <= count; start += MOE_SORT_THREADS) {
        const int i = start + threadIdx.x;
        int own[N] = {}, sum[N];
        if (i < count) value(i, own);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            sum[n] = own[n];
            for (int lanes = 1; lanes < 32; lanes *= 2) {
                const int below = __shfl_up_sync(WHOLE_WARP, sum[n], lanes);
                if (lane >= lanes) sum[n] += below;
            }
            if (lane == 31) scan[n * SORT_WARPS + warp] = sum[n];
        }
        __syncthreads();
        int before[N];
#pragma unroll
        for (int n = 0; n < N; ++n) {
            before[n] = carry[n] + sum[n] - own[n];
            for (int w = 0; w < SORT_WARPS; ++w) {
                const int part = scan[n * SORT_WARPS + w];
                if (w < warp) before[n] += part;
                carry[n] += part;
            }
        }
        if (i <= count) put(i, before);
        __syncthreads();
    }
}

// offsets[e]: the sum of pairs(e') for e' < e.
template <class Pairs>
__device__ void scan_offsets(const MoeSortParams& p, const Chunk& chunk, const Pairs& pairs) {
    exclusive_scan<1>(
        p.experts_count, chunk.scan, [&](int e, int(&own)[1]) { own[0] = pairs(e); },
        [&](int e, const int(&before)[1]) { p.offsets[e] = chunk.offsets[e] = before[0]; });
}

__device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tiles along the weight rows of an expert in a stage.
__device__ int column_tiles(const MoeExpert& e, int stage, int hidden, const int32_t* tile_cols) {
    const int cols = stage == MOE_PROJECT_IN       ? e.v_in_rows
                     : stage == MOE_HIDDEN         ? e.width
                     : stage == MOE_PROJECT_HIDDEN ? e.v_down_rows
                                                   : hidden;
    return ceil_div(cols, tile_cols[stage]);
}

// Tiles of each stage, in the order in which they are dealt out, from the offsets.
__device__ void plan_tiles(const MoeSortParams& p, const Chunk& chunk) {
    exclusive_scan<MOE_STAGES>(
        p.experts_count, chunk.scan,
        [&](int i, int(&tiles)[MOE_STAGES]) {
            const int e = p.order[i];
            const int row_tiles = ceil_div(chunk.offsets[e + 1] - chunk.offsets[e], p.tile_rows);
#pragma unroll
            for (int stage = 0; stage < MOE_STAGES; ++stage) {
                tiles[stage] = row_tiles * column_tiles(p.experts[e], stage, p.hidden, p.tile_cols);
            }
        },
        [&](int i, const int(&before)[MOE_STAGES]) {
#pragma unroll
            for (int stage = 0; stage < MOE_STAGES; ++stage) {
                p.tile_first[stage * (p.experts_count + 1) + i] = before[stage];
            }
        });
}

// Up to one chunk of slots: everything at once.
__device__ void sort_all(const MoeSortParams& p, unsigned char* shared) {
    const Chunk chunk(p, 0, shared);
    count_chunk(p, chunk);
    scan_offsets(p, chunk, [&](int e) { return count_of(p, chunk, e); });
    place_chunk(p, chunk, [&](int e) { return chunk.offsets[e]; });
    plan_tiles(p, chunk);
}

// Calls the tables of the layer into L2, for this kernel and those behind it. They do not change, so this may come before
// the previous kernel has ended.
__device__ void prefetch_tables(const MoeSortParams& p) {
    for (int e = threadIdx.x; e < p.experts_count; e += MOE_SORT_THREADS) {
        prefetch_line(p.canonical + e);
        prefetch_line(p.order + e);
        prefetch_line(p.experts + e);
        prefetch_line(&p.experts[e].form);
    }
}
static_assert(offsetof(MoeExpert, form) >= 128, "descriptors have two lines");

}  // namespace
