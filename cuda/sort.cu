// Stable sort of (token, expert) pairs by expert, on the device: offsets of the experts, the token and weight of each
// pair, the pair of each slot, and how many GEMM tiles each expert has.
//
// A counting sort without atomics. A chunk of MOE_SORT_CHUNK slots belongs to one block, an eighth of it to each warp;
// a warp counts its slots per expert with __match_any_sync, 32 at a time and in order, so the order within an expert is
// that of the slots whatever the schedule. Up to one chunk everything happens in one launch (moe_sort_small, or
// moe_route_sort together with routing); above, moe_sort_count writes a histogram per chunk, moe_sort_scan turns it into
// first positions, moe_sort_scatter places. Reads 8 bytes per slot (twice), writes 20.
#include "sort.cuh"

MOE_KERNEL(moe_sort_small, MoeSortParams, MOE_SORT_THREADS, 1) {
    prefetch_tables(p);
    follow_previous_kernel();
    MOE_SHARED(shared);
    sort_all(p, shared);
}

MOE_KERNEL(moe_sort_count, MoeSortParams, MOE_SORT_THREADS, 1) {
    follow_previous_kernel();
    MOE_SHARED(shared);
    const Chunk chunk(p, blockIdx.x, shared);
    count_chunk(p, chunk);
    for (int e = threadIdx.x; e < p.experts_count; e += MOE_SORT_THREADS) {
        p.histogram[blockIdx.x * p.experts_count + e] = count_of(p, chunk, e);
    }
}

MOE_KERNEL(moe_sort_scan, MoeSortParams, MOE_SORT_THREADS, 1) {
    follow_previous_kernel();
    MOE_SHARED(shared);
    const Chunk chunk(p, 0, shared);
    const int chunks = ceil_div(p.tokens * p.slots, MOE_SORT_CHUNK);
    scan_offsets(p, chunk, [&](int e) {
        int sum = 0;
#pragma unroll 8
        for (int i = 0; i < chunks; ++i) sum += p.histogram[i * p.experts_count + e];
        return sum;
    });
    // Eight chunks are read before one is written, so that as many reads are under way.
    constexpr int BATCH = 8;
    for (int e = threadIdx.x; e < p.experts_count; e += MOE_SORT_THREADS) {
        int position = chunk.offsets[e];
        for (int first = 0; first < chunks; first += BATCH) {
            int32_t* const cells = p.histogram + first * p.experts_count + e;
            int counts[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) counts[i] = first + i < chunks ? cells[i * p.experts_count] : 0;
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (first + i < chunks) cells[i * p.experts_count] = position;
                position += counts[i];
            }
        }
    }
    plan_tiles(p, chunk);
}

MOE_KERNEL(moe_sort_scatter, MoeSortParams, MOE_SORT_THREADS, 1) {
    follow_previous_kernel();
    MOE_SHARED(shared);
    const Chunk chunk(p, blockIdx.x, shared);
    count_chunk(p, chunk);
    place_chunk(p, chunk, [&](int e) { return p.histogram[blockIdx.x * p.experts_count + e]; });
}

MOE_KERNEL(moe_base_plan, MoeBasePlanParams, 32, 1) {
    follow_previous_kernel();
    const int stage = threadIdx.x;
    if (stage == 0) {
        p.offsets[0] = 0;
        p.offsets[1] = p.tokens;
    }
    if (stage < MOE_STAGES) {
        const int row_tiles = ceil_div(p.tokens, p.tile_rows);
        p.tile_first[2 * stage] = 0;
        p.tile_first[2 * stage + 1] = row_tiles * column_tiles(*p.base, stage, p.hidden, p.tile_cols);
    }
}
