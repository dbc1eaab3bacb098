// Root-mean-square normalisation of rows, and its gradient.
//
//   r = 1 / sqrt(mean(x²) + eps)     y = w x r     dx = r (w dy - x r² mean(w dy x))     dw = sum over rows of dy x r
//
// `lanes` threads own a row and hold it in registers: part of a warp, a warp, or the whole CTA for wide rows.
//
//   row   | lane 0: vec | lane 1: vec | … | lane 0: vec | …      `pieces` vectors a lane
//
// Traffic: x and y once; backward x, dy, dx once, and per CTA a slot of dw [width] in f32 (slots.cuh adds them).
// Memory limits both.
//
// C: T, width, eps, vec, lanes, threads.  Grid (ceil(rows / (threads / lanes))); backward fewer, CTAs then take every
// grid-th group of rows.
#pragma once
#include "warp.cuh"

namespace rambac {

template <class C> struct NormRow {
    using T = typename C::T;
    static constexpr int V = C::vec, LANES = C::lanes, PIECES = (C::width + V * LANES - 1) / (V * LANES);
    static constexpr int GROUPS = C::threads / LANES;
    static_assert(C::width % V == 0, "rows are whole vectors");
    static_assert(LANES <= 32 || LANES == C::threads, "a row belongs to lanes of a warp or to all of a CTA");

    static __device__ __forceinline__ int column(int piece) { return (piece * LANES + threadIdx.x % LANES) * V; }
    // Whether this lane has such a piece: the last may be short.
    static __device__ __forceinline__ bool has(int piece) { return C::width % (V * LANES) == 0 || column(piece) < C::width; }

    static __device__ __forceinline__ float sum(float x, float* scratch) {
        if constexpr (LANES <= 32) return warp_sum<LANES>(x);
        else return block_sum<LANES>(x, scratch);
    }
};

template <class C>
__device__ __forceinline__ void rms_norm(const typename C::T* x, i64 x_stride, const typename C::T* w, typename C::T* y, i64 y_stride, i64 rows) {
    using R = NormRow<C>;
    __shared__ float scratch[max_of(C::threads / 32, 1)];
    const i64 row = (i64)blockIdx.x * R::GROUPS + threadIdx.x / C::lanes;
    // Lanes of a row past the end take part in sums of their warp.
    const bool mine = row < rows;
    float v[R::PIECES][C::vec] = {};
    float squares = 0.f;
#pragma unroll
    for (int p = 0; p < R::PIECES; p++) {
        if (mine && R::has(p)) load_f32(v[p], x + row * x_stride + R::column(p));
#pragma unroll
        for (int i = 0; i < C::vec; i++) squares = fmaf(v[p][i], v[p][i], squares);
    }
    const float r = rsqrtf(R::sum(squares, scratch) * (1.f / C::width) + C::eps);
    // MUT norm_eps: const float r = rsqrtf(R::sum(squares, scratch) * (1.f / C::width));
#pragma unroll
    for (int p = 0; p < R::PIECES; p++) {
        if (!(mine && R::has(p))) continue;
        float weight[C::vec];
        load_f32(weight, w + R::column(p));
#pragma unroll
        for (int i = 0; i < C::vec; i++) v[p][i] *= r * weight[i];
        store_f32(y + row * y_stride + R::column(p), v[p]);
    }
}

template <class C>
__device__ __forceinline__ void rms_norm_grad(const typename C::T* x, i64 x_stride, const typename C::T* w, const typename C::T* dy, i64 dy_stride,
                                              typename C::T* dx, i64 dx_stride, float* slots, i64 rows) {
    using R = NormRow<C>;
    __shared__ float scratch[max_of(C::threads / 32, 1)];
    __shared__ float sums[R::GROUPS > 1 ? R::PIECES * C::vec * C::lanes : 1];
    const int lane = threadIdx.x % C::lanes, group = threadIdx.x / C::lanes;

    float weight[R::PIECES][C::vec] = {}, dw[R::PIECES][C::vec] = {};
#pragma unroll
    for (int p = 0; p < R::PIECES; p++)
        if (R::has(p)) load_f32(weight[p], w + R::column(p));

    for (i64 at = (i64)blockIdx.x * R::GROUPS; at < rows; at += (i64)gridDim.x * R::GROUPS) {
        const i64 row = at + group;
        const bool mine = row < rows;
        float v[R::PIECES][C::vec] = {}, g[R::PIECES][C::vec] = {};
        float squares = 0.f, dot = 0.f;
#pragma unroll
        for (int p = 0; p < R::PIECES; p++) {
            if (mine && R::has(p)) {
                load_f32(v[p], x + row * x_stride + R::column(p));
                load_f32(g[p], dy + row * dy_stride + R::column(p));
            }
#pragma unroll
            for (int i = 0; i < C::vec; i++) {
                squares = fmaf(v[p][i], v[p][i], squares);
                dot = fmaf(v[p][i] * weight[p][i], g[p][i], dot);
            }
        }
        const float r = rsqrtf(R::sum(squares, scratch) * (1.f / C::width) + C::eps);
        const float m = R::sum(dot, scratch) * (1.f / C::width) * r * r;
        // MUT norm_mean: const float m = R::sum(dot, scratch) * (1.f / C::width) * r;
#pragma unroll
        for (int p = 0; p < R::PIECES; p++) {
            float d[C::vec];
#pragma unroll
            for (int i = 0; i < C::vec; i++) {
                d[i] = r * fmaf(weight[p][i], g[p][i], -v[p][i] * m);
                dw[p][i] = fmaf(g[p][i], v[p][i] * r, dw[p][i]);
            }
            if (mine && R::has(p)) store_f32(dx + row * dx_stride + R::column(p), d);
        }
    }

    // Groups of lanes add up one after another.
    if constexpr (R::GROUPS > 1) {
        for (int turn = 0; turn < R::GROUPS; turn++) {
            if (turn == group) {
#pragma unroll
                for (int p = 0; p < R::PIECES; p++)
#pragma unroll
                    for (int i = 0; i < C::vec; i++) {
                        float& sum = sums[(p * C::vec + i) * C::lanes + lane];
                        if (turn > 0) dw[p][i] += sum;
                        sum = dw[p][i];
                    }
            }
            __syncthreads();
            // MUT norm_turns: ;
        }
    }
    if (group == R::GROUPS - 1) {
#pragma unroll
        for (int p = 0; p < R::PIECES; p++)
            if (R::has(p)) store_f32(slots + (i64)blockIdx.x * C::width + R::column(p), dw[p]);
    }
}

}  // namespace rambac
