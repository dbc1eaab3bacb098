// Sums of n floats per block of 256: by shared memory, by shuffles, within warps by shared memory, and of the whole
// array with the last block that arrives adding the blocks' sums.

extern "C" __global__ void sum_shared(float* out, const float* x) {
    __shared__ float s[256];
    int t = threadIdx.x;
    s[t] = x[blockIdx.x * 256 + t];
    // MUT unwritten: if (t < 255) s[t] = x[blockIdx.x * 256 + t];
    __syncthreads();
    // MUT first_barrier: ;
    for (int d = 128; d > 0; d /= 2) {
        // MUT too_far: for (int d = 256; d > 0; d /= 2) {
        if (t < d) s[t] += s[t + d];
        // MUT all_threads: s[t] += s[(t + d) % 256];
        __syncthreads();
        // MUT loop_barrier: ;
        // MUT half_barrier: if (t < 128) __syncthreads();
        // MUT lane_barrier: if (t % 2) __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = s[0];
    // MUT out_index: if (t == 0) out[blockIdx.x + 1] = s[0];
}

extern "C" __global__ void sum_shuffle(float* out, const float* x) {
    __shared__ float s[8];
    int t = threadIdx.x;
    float v = x[blockIdx.x * 256 + t];
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    // MUT wrong_lane: for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d % 16);
    // MUT fewer: for (int d = 16; d > 1; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    // MUT up: for (int d = 16; d > 0; d /= 2) v += __shfl_up_sync(0xffffffffu, v, d);
    if (t % 32 == 0) s[t / 32] = v;
    // MUT warp_index: if (t % 32 == 0) s[t / 33] = v;
    __syncthreads();
    // MUT barrier: ;
    // MUT warp_barrier: __syncwarp();
    if (t < 32) {
        v = t < 8 ? s[t] : 0.f;
        // MUT too_many: v = s[t];
        // MUT no_zero: v = t < 9 ? s[t] : 0.f;
        for (int d = 4; d > 0; d /= 2) v += __shfl_down_sync(0xffffffffu, v, d);
        // MUT half_mask: if (t < 4) for (int d = 4; d > 0; d /= 2) v += __shfl_down_sync(0xffffffffu, v, d);
        if (t == 0) out[blockIdx.x] = v;
    }
}

extern "C" __global__ void sum_warp(float* out, const float* x) {
    __shared__ float s[256];
    int t = threadIdx.x;
    float v = x[blockIdx.x * 256 + t];
    s[t] = v;
    for (int d = 16; d > 0; d /= 2) {
        __syncwarp();
        // MUT before_read: ;
        float other = s[t ^ d];
        // MUT outside_warp: float other = s[t ^ (2 * d)];
        __syncwarp();
        // MUT before_write: ;
        v += other;
        s[t] = v;
    }
    if (t % 32 == 0) out[blockIdx.x * 8 + t / 32] = v;
}

__device__ unsigned int ticket = 0;

extern "C" __global__ void sum_all(float* out, volatile float* partial, const float* x) {
    __shared__ float s[256];
    __shared__ bool last;
    int t = threadIdx.x;
    s[t] = x[blockIdx.x * 256 + t];
    __syncthreads();
    for (int d = 128; d > 0; d /= 2) {
        if (t < d) s[t] += s[t + d];
        __syncthreads();
    }
    if (t == 0) {
        *(float*)&partial[blockIdx.x] = s[0];
        __threadfence();
        // MUT fence: ;
        unsigned int n = atomicInc(&ticket, gridDim.x - 1);
        // MUT plain_ticket: unsigned int n = ticket++;
        last = n == gridDim.x - 1;
        // MUT first_block: last = n == 0;
    }
    __syncthreads();
    // MUT last_barrier: ;
    if (last && t == 0) {
        __threadfence();
        float total = 0;
        for (int i = 0; i < gridDim.x; i++) total += *(float*)&partial[i];
        *out = total;
    }
}
