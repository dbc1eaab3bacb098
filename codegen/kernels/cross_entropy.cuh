// Cross-entropy of logits against labels, a block per row: ln Σ exp(z) − z[label], and its gradient.
//
// One pass over the row finds maximum and sum at once: a thread keeps (m, s) with s = Σ exp(z − m); pairs are combined as
// (max, s1·exp(m1 − max) + s2·exp(m2 − max)).  The gradient reads the row twice, and can give the loss too.  What the second cache
// can't keep of long rows shared memory does: the first `held` logits; the rest is read again first, while it is there.  `vec`
// neighbouring logits are read at once, two such vectors a thread and turn.
#pragma once
#include "warp.cuh"

namespace rambac {

struct LogSum {
    float top, sum;
    // What a part with this maximum counts beside `t`: nothing at −∞, where −∞ − −∞ would be NaN.
    static __device__ __forceinline__ float scale(float top, float t) { return top == -infinity() ? 0.f : expf(top - t); }
    template <class T, int N> __device__ __forceinline__ void add(const Vec<T, N>& z) {
        float t = top;
#pragma unroll
        for (int i = 0; i < N; i++) t = fmaxf(t, to_f32(z[i]));
        float s = sum * scale(top, t);
#pragma unroll
        for (int i = 0; i < N; i++) s += scale(to_f32(z[i]), t);
        top = t, sum = s;
    }
    __device__ __forceinline__ void join(LogSum o) {
        float t = fmaxf(top, o.top);
        sum = sum * scale(top, t) + o.sum * scale(o.top, t);
        top = t;
    }
};

// Hook: nothing is kept.
struct Forget {
    template <class X> __device__ __forceinline__ void operator()(int, const X&) const {}
};

// ln Σ exp of a row, for all threads; `keep(j, x)` gets each vector.
template <int THREADS, int VEC, class T, class Keep> __device__ __forceinline__ float log_sum_exp(const T* z, int cols, LogSum* scratch, const Keep& keep) {
    constexpr int STEP = THREADS * VEC;
    LogSum a{-infinity(), 0.f}, b = a;
    int j = threadIdx.x * VEC;
    for (; j + STEP < cols; j += 2 * STEP) {
        auto x = load<T, VEC>(z + j), y = load<T, VEC>(z + j + STEP);
        a.add(x), b.add(y);
        // MUT loss_halves: a.add(x), b.add(x);
        keep(j, x), keep(j + STEP, y);
    }
    if (j < cols) {
        auto x = load<T, VEC>(z + j);
        a.add(x);
        // MUT loss_rest: ;
        keep(j, x);
    }
    a.join(b);
#pragma unroll
    for (int d = 16; d > 0; d /= 2)
        a.join({__shfl_xor_sync(ALL_LANES, a.top, d), __shfl_xor_sync(ALL_LANES, a.sum, d)});
    if (lane_id() == 0) scratch[warp_id()] = a;
    __syncthreads();
    // MUT loss_barrier: ;
    a = scratch[0];
#pragma unroll
    for (int w = 1; w < THREADS / 32; w++) a.join(scratch[w]);
    return a.top + logf(a.sum);
}

// C: threads, vec (a part of every row, and of where they begin), ignore.
template <class C, class Z, class Y>
__device__ __forceinline__ void cross_entropy(const Z* z, i64 stride, const i32* labels, Y* y, i32 cols) {
    __shared__ LogSum scratch[C::threads / 32];
    i64 row = blockIdx.x;
    i32 label = labels[row];
    const Z* zr = z + row * stride;
    float loss = 0.f;
    if (label != C::ignore) {
        float at = label >= 0 && label < cols ? to_f32(zr[label]) : 0.f;
        loss = log_sum_exp<C::threads, C::vec>(zr, cols, scratch, Forget{}) - at;
    }
    if (threadIdx.x == 0) y[row] = from_f32<Y>(loss);
}

// LOSSES: `y` gets them.  C says `held` too: a multiple of threads · vec, in dynamic shared memory; every thread keeps its own.
template <class C, bool LOSSES, class Z, class Y, class L, class DZ>
__device__ __forceinline__ void cross_entropy_row(L* y, const Z* z, i64 stride, const i32* labels, const Y* dloss, DZ* dz, i64 dz_stride, i32 cols) {
    constexpr int VEC = C::vec;
    extern __shared__ __align__(16) unsigned char kept[];
    Vec<Z, VEC>* held = reinterpret_cast<Vec<Z, VEC>*>(kept);
    __shared__ LogSum scratch[C::threads / 32];
    i64 row = blockIdx.x;
    i32 label = labels[row];
    const Z* zr = z + row * stride;
    DZ* dr = dz + row * dz_stride;
    float g = 0.f, lse = 0.f, loss = 0.f;
    if (label != C::ignore) {
        g = to_f32(dloss[row]);
        float at = LOSSES && label >= 0 && label < cols ? to_f32(zr[label]) : 0.f;
        lse = log_sum_exp<C::threads, VEC>(zr, cols, scratch, [&](int j, const Vec<Z, VEC>& x) {
            if (j < C::held) held[j / VEC] = x;
        });
        // The gradient may overwrite the logits: before the barrier in there all have been read.
        loss = lse - at;
    }
    if (LOSSES && threadIdx.x == 0) y[row] = from_f32<L>(loss);
    auto gradient = [&](int j, const Vec<Z, VEC>& x) {
        float d[VEC];
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            float p = label != C::ignore ? expf(to_f32(x[i]) - lse) : 0.f;
            d[i] = g * (p - (j + i == label ? 1.f : 0.f));
            // MUT loss_label: d[i] = g * (p - (j == label ? 1.f : 0.f));
        }
        store_f32(dr + j, d);
    };
    // What is held if anything is: nothing of a row without a label.
    const int end = label != C::ignore ? min_of(C::held, cols) : 0;
    const int own = threadIdx.x * VEC;
#pragma unroll 2
    for (int j = end + own; j < cols; j += C::threads * VEC) gradient(j, load<Z, VEC>(zr + j));
#pragma unroll 2
    for (int j = own; j < end; j += C::threads * VEC) gradient(j, held[j / VEC]);
    // MUT loss_held: for (int j = own; j < end; j += C::threads * VEC) gradient(j, held[threadIdx.x]);
}
template <class C, class Z, class Y, class DZ>
__device__ __forceinline__ void cross_entropy_grad(const Z* z, i64 stride, const i32* labels, const Y* dloss, DZ* dz, i64 dz_stride, i32 cols) {
    cross_entropy_row<C, false>((float*)nullptr, z, stride, labels, dloss, dz, dz_stride, cols);
}
template <class C, class Z, class Y, class L, class DZ>
__device__ __forceinline__ void cross_entropy_both(const Z* z, i64 stride, const i32* labels, const Y* dloss, L* y, DZ* dz, i64 dz_stride, i32 cols) {
    cross_entropy_row<C, true>(y, z, stride, labels, dloss, dz, dz_stride, cols);
}

}  // namespace rambac
