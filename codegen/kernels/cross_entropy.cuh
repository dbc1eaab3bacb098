// Cross-entropy of logits against labels, a block per row: ln Σ exp(z) − z[label], and its gradient.
//
// One pass over the row finds maximum and sum at once: a thread keeps (m, s) with s = Σ exp(z − m); pairs are combined as
// (max, s1·exp(m1 − max) + s2·exp(m2 − max)).  The gradient reads the row twice, the second time from the L2 cache.
#pragma once
#include "warp.cuh"

namespace rambac {

struct LogSum {
    float top, sum;
    // What a part with this maximum counts beside `t`: nothing at −∞, where −∞ − −∞ would be NaN.
    static __device__ __forceinline__ float scale(float top, float t) { return top == -infinity() ? 0.f : expf(top - t); }
    __device__ __forceinline__ void add(float z) {
        float t = fmaxf(top, z);
        sum = sum * scale(top, t) + scale(z, t);
        top = t;
    }
    __device__ __forceinline__ void join(LogSum o) {
        float t = fmaxf(top, o.top);
        sum = sum * scale(top, t) + o.sum * scale(o.top, t);
        top = t;
    }
};

// ln Σ exp of a row, for all threads.
template <int THREADS, class T> __device__ __forceinline__ float log_sum_exp(const T* z, int cols, LogSum* scratch) {
    LogSum a{-infinity(), 0.f};
    for (int j = threadIdx.x; j < cols; j += THREADS) a.add(to_f32(z[j]));
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        a.join({__shfl_xor_sync(ALL_LANES, a.top, d), __shfl_xor_sync(ALL_LANES, a.sum, d)});
    if (lane_id() == 0) scratch[warp_id()] = a;
    __syncthreads();
    a = scratch[0];
#pragma unroll
    for (int w = 1; w < THREADS / 32; w++) a.join(scratch[w]);
    return a.top + logf(a.sum);
}

// C: threads, ignore.
template <class C, class Z, class Y>
__device__ __forceinline__ void cross_entropy(const Z* z, i64 stride, const i32* labels, Y* y, i32 cols) {
    __shared__ LogSum scratch[C::threads / 32];
    i64 row = blockIdx.x;
    i32 label = labels[row];
    const Z* zr = z + row * stride;
    float loss = 0.f;
    if (label != C::ignore) {
        float at = label >= 0 && label < cols ? to_f32(zr[label]) : 0.f;
        loss = log_sum_exp<C::threads>(zr, cols, scratch) - at;
    }
    if (threadIdx.x == 0) y[row] = from_f32<Y>(loss);
}

template <class C, class Z, class Y, class DZ>
__device__ __forceinline__ void cross_entropy_grad(const Z* z, i64 stride, const i32* labels, const Y* dloss, DZ* dz, i64 dz_stride, i32 cols) {
    __shared__ LogSum scratch[C::threads / 32];
    i64 row = blockIdx.x;
    i32 label = labels[row];
    const Z* zr = z + row * stride;
    DZ* dr = dz + row * dz_stride;
    float g = 0.f, lse = 0.f;
    if (label != C::ignore) {
        g = to_f32(dloss[row]);
        lse = log_sum_exp<C::threads>(zr, cols, scratch);
        // The gradient may overwrite the logits: all have been read.
        __syncthreads();
    }
    for (int j = threadIdx.x; j < cols; j += C::threads) {
        float p = label != C::ignore ? expf(to_f32(zr[j]) - lse) : 0.f;
        dr[j] = from_f32<DZ>(g * (p - (j == label ? 1.f : 0.f)));
    }
}

}  // namespace rambac
