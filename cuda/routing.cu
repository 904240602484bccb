// Routing: logits of a token -> its experts and their combine weights, as src/architecture/router.rs defines it.
//
// A warp per token; lane l owns the experts l, l + 32, … . Scores and order keys lie in shared memory, so that any number
// of experts runs through one kernel without spills. Top-k is k rounds of two warp reductions over the lanes' best
// keys; only the winner's lane looks through its experts again. 4 bytes are read per logit: latency bound at any size. For
// few tokens the sort follows in the same kernel (moe_route_sort).
//
// Whatever the logits, ids are distinct and in range and weights finite: a logit that is NaN or -inf counts as the least
// finite number, +inf as the largest, and weights whose sum is 0 are not divided by it.
#include "sort.cuh"

namespace {

constexpr unsigned NOBODY = 0xFFFFFFFFu;  // above every expert
constexpr uint32_t CLOSED = 0;  // key of an expert that cannot be chosen (any more)
constexpr float NEGATIVE_INFINITY = -__builtin_huge_valf();
constexpr float LARGEST = 3.402823466e38f;  // finite

// Unsigned order of the keys = order of the values; NaN counts as -inf, -0 as +0. Never CLOSED.
__device__ uint32_t key_of(float value) {
    if (value != value) value = NEGATIVE_INFINITY;
    const uint32_t bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float value_of(uint32_t key) {
    if (key == CLOSED) return NEGATIVE_INFINITY;
    return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

__device__ float warp_sum(float value) {
    for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(WHOLE_WARP, value, lanes);
    return value;
}

__device__ float warp_max(float value) {
    for (int lanes = 16; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(WHOLE_WARP, value, lanes));
    return value;
}

// fmaxf gives the other operand for a NaN.
__device__ float finite(float logit) { return fminf(fmaxf(logit, -LARGEST), LARGEST); }

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// This lane's best open expert.
struct Best {
    uint32_t key = CLOSED;
    unsigned index = NOBODY;

    __device__ void find(const uint32_t* keys, int experts, int lane) {
        key = CLOSED;
        index = NOBODY;
        for (int i = lane; i < experts; i += 32) {
            if (keys[i] > key) {
                key = keys[i];
                index = i;
            }
        }
    }

    // The warp's best expert, the lowest of equals; closes it.
    __device__ unsigned take(uint32_t* keys, int experts, int lane) {
        const uint32_t largest = __reduce_max_sync(WHOLE_WARP, key);
        const unsigned winner = __reduce_min_sync(WHOLE_WARP, key == largest ? index : NOBODY);
        if (index == winner && winner != NOBODY) {
            keys[winner] = CLOSED;
            find(keys, experts, lane);
        }
        return winner;
    }
};

// Closes the experts of all but the best groups.
__device__ void limit_groups(const MoeRouteParams& p, uint32_t* keys, float* scores, int lane) {
    for (int g = 0; g < p.groups; ++g) {
        uint32_t first = CLOSED, second = CLOSED;
        for (int i = lane; i < p.experts; i += 32) {
            if (p.group_of[i] != g) continue;
            const uint32_t key = keys[i];
            second = max(second, min(first, key));
            first = max(first, key);
        }
        const uint32_t largest = __reduce_max_sync(WHOLE_WARP, first);
        // One lane, of those that have the largest key, offers its second one.
        const int owner = __ffs(__ballot_sync(WHOLE_WARP, first == largest)) - 1;
        const uint32_t next = __reduce_max_sync(WHOLE_WARP, lane == owner ? second : first);
        float score = value_of(largest);
        if (p.group_score == MOE_GROUP_TWO_LARGEST && next != CLOSED) score += value_of(next);
        if (lane == 0) scores[g] = score != score ? NEGATIVE_INFINITY : score;
    }
    __syncwarp();
    uint64_t kept = 0;
    for (int half = 0; half < 2; ++half) {
        const int g = 32 * half + lane;
        int ahead = 0;
        for (int h = 0; h < p.groups && g < p.groups; ++h) {
            ahead += scores[h] > scores[g] || (scores[h] == scores[g] && h < g);
        }
        const unsigned half_kept = __ballot_sync(WHOLE_WARP, g < p.groups && ahead < p.groups_kept);
        kept |= static_cast<uint64_t>(half_kept) << (32 * half);
    }
    for (int i = lane; i < p.experts; i += 32) {
        if (!(kept >> p.group_of[i] & 1)) keys[i] = CLOSED;
    }
}

// GRIN's choice: each slot's weight is a softmax over what is near to the best of the experts not chosen yet.
__device__ float sparse_mixer(const MoeRouteParams& p, uint32_t* keys, const float* logits, Best& best, int lane, int& id) {
    float weight = 0.0f;
    for (int slot = 0; slot < p.top_k; ++slot) {
        const uint32_t largest = __reduce_max_sync(WHOLE_WARP, best.key);
        const unsigned winner = __reduce_min_sync(WHOLE_WARP, best.key == largest ? best.index : NOBODY);
        const float top = logits[winner];
        float sum = 0.0f;
        for (int i = lane; i < p.experts; i += 32) {
            if (keys[i] == CLOSED) continue;
            const float z = logits[i];
            const bool far = (top - z) / fmaxf(fabsf(z), top) > p.jitter;
            sum += far ? 0.0f : expf(z - top);
        }
        sum = warp_sum(sum);
        best.take(keys, p.experts, lane);
        if (lane == slot) {
            id = static_cast<int>(winner);
            weight = 1.0f / sum;
        }
    }
    return weight;
}

// Leaves out the slots of least weight (src/architecture/skip.rs). Lane j < top_k holds slot j; `sorted` has room for the
// weights.
__device__ void leave_out(const MoeRouteParams& p, float* sorted, int lane, int& id, float& weight) {
    __syncwarp();  // `sorted` may have held something else
    const bool is_slot = lane < p.top_k;
    // Descending, ties to the earlier slot.
    int rank = 0;
    for (int slot = 0; slot < p.top_k; ++slot) {
        const float other = __shfl_sync(WHOLE_WARP, weight, slot);
        rank += other > weight || (other == weight && slot < lane);
    }
    if (is_slot) sorted[rank] = weight;
    __syncwarp();
    float total = 0.0f, tail = 0.0f;  // tail: the sum of what is not above the lane'th largest
    for (int m = p.top_k - 1; m >= 0; --m) {
        total += sorted[m];
        if (m == lane) tail = total;
    }
    const unsigned small = __ballot_sync(WHOLE_WARP, is_slot && lane > 0 && tail < p.skip * total);
    if (small == 0) return;
    const int kept = __ffs(small) - 1;
    float sum = 0.0f;
    for (int m = 0; m < kept; ++m) sum += sorted[m];
    if (rank >= kept) {
        id = -1;
        weight = 0.0f;
    } else if (p.skip_rule == MOE_SKIP_RESCALED) {
        weight = total * (weight / sum);
    }
}

// This warp's moe_route_words(experts).
__device__ float* words_of_warp(unsigned char* shared, int experts) {
    return reinterpret_cast<float*>(shared) + threadIdx.x / 32 * (2 * experts + MOE_MAX_GROUPS);
}

// One token, by a warp, with its words of shared memory.
__device__ void route(const MoeRouteParams& p, int64_t token, float* values) {
    const int lane = threadIdx.x % 32;
    uint32_t* const keys = reinterpret_cast<uint32_t*>(values + p.experts);
    float* const group_scores = values + 2 * p.experts;
    const float* const logits = p.logits + token * p.ld_logits;

    // Logits, and the keys of those that are live.
    float largest = NEGATIVE_INFINITY;
    for (int i = lane; i < p.experts; i += 32) {
        const float z = finite(logits[i] + (p.logit_bias ? p.logit_bias[i] : 0.0f));
        const bool live = !p.live || p.live[i];
        values[i] = z;
        keys[i] = live ? key_of(z) : CLOSED;
        if (live) largest = fmaxf(largest, z);
    }

    int id = -1;
    float weight = 0.0f;
    Best best;
    if (p.scoring == MOE_SPARSE_MIXER) {
        __syncwarp();
        best.find(keys, p.experts, lane);
        weight = sparse_mixer(p, keys, values, best, lane, id);
    } else {
        float sum = 1.0f;
        if (p.scoring == MOE_SOFTMAX) {
            largest = warp_max(largest);
            sum = 0.0f;
            for (int i = lane; i < p.experts; i += 32) {
                values[i] = expf(values[i] - largest);
                if (keys[i] != CLOSED) sum += values[i];
            }
            sum = warp_sum(sum);
        }
        for (int i = lane; i < p.experts; i += 32) {
            const float score = p.scoring == MOE_SOFTMAX ? values[i] / sum : sigmoid(values[i]);
            values[i] = score;
            if (keys[i] == CLOSED || p.choice == MOE_BY_LOGIT) continue;
            keys[i] = key_of(p.choice == MOE_BY_BIASED_SCORE ? score + p.choice_bias[i] : score);
        }
        __syncwarp();
        if (p.groups > 0) limit_groups(p, keys, group_scores, lane);
        best.find(keys, p.experts, lane);
        for (int slot = 0; slot < p.top_k; ++slot) {
            const unsigned winner = best.take(keys, p.experts, lane);
            if (lane == slot && winner != NOBODY) {
                id = static_cast<int>(winner);
                weight = values[winner];
            }
        }
        if (p.renormalise) {
            float chosen = 0.0f;
            for (int slot = 0; slot < p.top_k; ++slot) chosen += __shfl_sync(WHOLE_WARP, weight, slot);
            const float divisor = fmaxf(chosen + p.added, p.least);
            if (divisor != 0.0f) weight /= divisor;
        }
        weight *= p.scale;
    }
    if (p.skip_rule != MOE_SKIP_NONE) leave_out(p, group_scores, lane, id, weight);

    const int64_t first = token * p.slots;
    if (lane < p.top_k) {
        p.ids[first + lane] = id;
        p.weights[first + lane] = weight;
    }
    if (lane == 0 && p.slots > p.top_k) {
        p.ids[first + p.top_k] = p.shared_expert;
        p.weights[first + p.top_k] = p.shared_gate < 0 ? 1.0f : sigmoid(finite(logits[p.shared_gate]));
    }
}

}  // namespace

MOE_KERNEL(moe_route, MoeRouteParams, MOE_ROUTE_THREADS, 4) {
    follow_previous_kernel();
    MOE_SHARED(shared);
    const int warp = threadIdx.x / 32;
    const int64_t token = static_cast<int64_t>(blockIdx.x) * MOE_ROUTE_TOKENS + warp;
    if (token >= p.tokens) return;
    route(p, token, words_of_warp(shared, p.experts));
}

MOE_KERNEL(moe_route_sort, MoeRouteSortParams, MOE_SORT_THREADS, 1) {
    prefetch_tables(p.sort);
    follow_previous_kernel();
    MOE_SHARED(shared);
    const int warp = threadIdx.x / 32;
    if (warp < p.route.tokens) route(p.route, warp, words_of_warp(shared, p.route.experts));
    __syncthreads();
    sort_all(p.sort, shared);
}
