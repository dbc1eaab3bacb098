// Sums and extremes over the lanes of a warp and over a block, in a fixed order: same input, same bits.
#pragma once
#include "types.cuh"

namespace rambac {

// The same value, from which the compiler computes what follows anew, so that it takes no registers in between.
__device__ __forceinline__ int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

constexpr u32 ALL_LANES = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }

// Over groups of N neighbouring lanes (a power of two); every lane gets the result.
template <int N = 32> __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = N / 2; d > 0; d /= 2) x += __shfl_xor_sync(ALL_LANES, x, d);
    return x;
}
// Of N values at once (a power of two) over the whole warp: 32 / N lanes get the sum of each, the first lanes the first.  Lanes
// exchange halves of what they have, so N values take N + log2(32 / N) - 1 exchanges, not 5 N.
template <int N> __device__ __forceinline__ float warp_sums(float (&x)[N]) {
    int d = 16;
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2, d /= 2) {
        const bool upper = lane_id() & d;
#pragma unroll
        for (int i = 0; i < half; i++) {
            const float mine = upper ? x[i + half] : x[i], other = upper ? x[i] : x[i + half];
            x[i] = mine + __shfl_xor_sync(ALL_LANES, other, d);
        }
    }
#pragma unroll
    for (; d > 0; d /= 2) x[0] += __shfl_xor_sync(ALL_LANES, x[0], d);
    return x[0];
}
template <int N = 32> __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int d = N / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, d));
    return x;
}

// Over a block of THREADS threads; every thread gets the result.  `scratch` holds a float per warp and is free again
// after the next barrier.
template <int THREADS> __device__ __forceinline__ float block_sum(float x, float* scratch) {
    constexpr int WARPS = THREADS / 32;
    x = warp_sum(x);
    if constexpr (WARPS > 1) {
        if (lane_id() == 0) scratch[warp_id()] = x;
        __syncthreads();
        x = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) x += scratch[w];
        __syncthreads();
    }
    return x;
}

}  // namespace rambac
