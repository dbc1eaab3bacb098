// Order within a warp and between blocks, thread by thread: what a mask names, and what one thread waited for.  All but the
// comparison of values finds these defects: run in lockstep, the values are right.

typedef unsigned int u32;
typedef unsigned long long u64;
__device__ __forceinline__ u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Pairs of halves of a warp exchange, then the whole of it.
extern "C" __global__ void masks(float* y, const float* x) {
    __shared__ float s[64];
    int t = threadIdx.x;
    u32 half = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    s[t] = x[t];
    __syncwarp(half);
    // MUT no_sync: ;
    float v = s[t ^ 1];
    __syncwarp(half);
    // MUT no_second: ;
    s[t] = v;
    __syncwarp();
    // MUT half_mask: __syncwarp(half);
    y[t] = s[t ^ 31];
}

// One lane arrives for its warp, one lane of the other waits for its own.
extern "C" __global__ void elected(float* y, const float* x) {
    __shared__ float s[32];
    __shared__ __align__(8) u64 bar;
    int t = threadIdx.x;
    if (t == 0) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(at(&bar)) : "memory");
    __syncthreads();
    if (t < 32) {
        s[t] = x[t];
        __syncwarp();
        // MUT arrives_early: ;
        if (t == 0) asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(at(&bar)) : "memory");
    } else {
        if (t == 32) asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.test_wait.parity.shared.b64 p, [%0], 0;\n@!p bra WAIT;\n}" ::"r"(at(&bar)) : "memory");
        // MUT none_waits: ;
        __syncwarp();
        // MUT waits_alone: ;
        y[t - 32] = s[63 - t];
    }
}

// The first block publishes a row, the second reads it.
extern "C" __global__ void published(float* y, float* row, int* flag, const float* x) {
    int t = threadIdx.x;
    if (blockIdx.x == 0) {
        row[t] = 2 * x[t];
        __syncthreads();
        // MUT others_unfinished: ;
        if (t == 0) {
            __threadfence();
            // MUT no_fence: ;
            atomicExch(flag, 1);
        }
    } else {
        if (t == 0) {
            while (atomicAdd(flag, 0) == 0) {}
            __threadfence();
        }
        __syncthreads();
        // MUT known_to_one: __syncwarp();
        y[t] = row[t ^ 63];
    }
}

// Threads of a block in a chain: each waits for the flag of the one before.
extern "C" __global__ void chain(float* y, const float* x) {
    __shared__ float s[4];
    __shared__ int flags[4];
    int t = threadIdx.x / 32;
    if (threadIdx.x < 4) flags[threadIdx.x] = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        float before = 0;
        if (t > 0) {
            while (atomicAdd(&flags[t - 1], 0) == 0) {}
            __threadfence_block();
            before = s[t - 1];
        }
        s[t] = before + x[t];
        __threadfence_block();
        // MUT no_fence: ;
        atomicExch(&flags[t], 1);
    }
    __syncthreads();
    // MUT last: ;
    if (threadIdx.x < 4) y[threadIdx.x] = s[threadIdx.x];
}
