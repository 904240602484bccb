// Kernels that a GPU would hang on, or run wrongly and silently: what the emulation says of each is tested.
#include "../../../cuda/ptx.cuh"

struct MistakeParams {
    int* out;
};

MOE_KERNEL(barrier_in_a_branch, MistakeParams, 64, 1) {
    follow_previous_kernel();
    if (threadIdx.x < 40) __syncthreads();
    if (threadIdx.x >= 40) __shfl_sync(WHOLE_WARP, 1, 8);
    p.out[threadIdx.x] = 1;
}

MOE_KERNEL(two_barriers, MistakeParams, 64, 1) {
    follow_previous_kernel();
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    p.out[threadIdx.x] = 1;
}

MOE_KERNEL(shuffle_after_an_exit, MistakeParams, 32, 1) {
    follow_previous_kernel();
    if (threadIdx.x == 5) return;
    p.out[threadIdx.x] = __shfl_xor_sync(WHOLE_WARP, 1, 4);
}

MOE_KERNEL(shuffle_from_outside, MistakeParams, 32, 1) {
    follow_previous_kernel();
    if (threadIdx.x < 16) p.out[threadIdx.x] = __shfl_sync(0xFFFFu, 1, 20);
}

MOE_KERNEL(divergent_warp, MistakeParams, 32, 1) {
    follow_previous_kernel();
    p.out[threadIdx.x] = threadIdx.x < 16 ? __shfl_sync(WHOLE_WARP, 1, 0) : __any_sync(WHOLE_WARP, 1);
}

MOE_KERNEL(copy_never_waited_for, MistakeParams, 32, 1) {
    follow_previous_kernel();
    MOE_SHARED(shared);
    copy_16_async(shared_address(shared), p.out, 16);
    commit_copies();
}

MOE_KERNEL(copy_to_odd_place, MistakeParams, 32, 1) {
    follow_previous_kernel();
    MOE_SHARED(shared);
    copy_16_async(shared_address(shared) + 8, p.out, 16);
    commit_copies();
    wait_copies<0>();
}

MOE_KERNEL(outside_of_shared, MistakeParams, 32, 1) {
    follow_previous_kernel();
    MOE_SHARED(shared);
    uint32_t r[4];
    load_matrix_x4(r, shared_address(shared) + 16 * threadIdx.x);
    p.out[threadIdx.x] = static_cast<int>(r[0]);
}

MOE_KERNEL(outside_of_global, MistakeParams, 32, 1) {
    follow_previous_kernel();
    p.out[threadIdx.x + 1024] = 1;
}

MOE_KERNEL(reads_poison, MistakeParams, 32, 1) {
    follow_previous_kernel();
    MOE_SHARED(shared);
    p.out[threadIdx.x] = reinterpret_cast<int*>(shared)[threadIdx.x];
}

MOE_KERNEL(reads_what_may_not_be_there_yet, MistakeParams, 32, 1) {
    const int early = p.out[threadIdx.x];
    follow_previous_kernel();
    p.out[threadIdx.x] = early;
}

MOE_KERNEL(calls_what_is_not_there, MistakeParams, 32, 1) {
    follow_previous_kernel();
    prefetch_line(p.out + 1024);
}

MOE_KERNEL(meets_before_it_waits, MistakeParams, 64, 1) {
    __syncthreads();
    follow_previous_kernel();
    p.out[threadIdx.x] = 1;
}

MOE_KERNEL(one_thread_does_not_wait, MistakeParams, 32, 1) {
    if (threadIdx.x == 7) return;
    follow_previous_kernel();
    p.out[threadIdx.x] = 1;
}
