// y = x·Wᵀ for a few rows of x, and of its norm or gated norm: the products of a decoding step.
//
//   y[i, n] = Σ_k x[i, k]·W[n, k]                                           plain
//   u = x, or x·silu(z)     r = 1 / sqrt(mean(u²) + eps)     y[i, n] = r·Σ_k u[i, k]·g[k]·W[n, k]      normed
//
// Every weight is read once; that traffic limits it.  A block owns OUTS rows of W, its threads lie along k:
//
//   k →      thread 0: vec | thread 1: vec | … | thread 0: vec | …          OUTS·ROWS sums in registers, f32
//   then the sums of all threads, warp by warp in order; Σ u² is one of them, so that the norm costs no pass of its own
//
// C says: T (of x, z and the norm's weight), W, Out, width (k), rows (most), outs, vec, threads, eps; x's rows are `x_stride`
// apart, W's `w_stride`, y's `y_stride`.  Grid (ceil(n / outs)).
#pragma once
#include "warp.cuh"

namespace rambac {

// Hooks: what a row is multiplied by.
struct PlainRow {
    static constexpr bool normed = false, gated = false;
};
template <class T> struct NormedRow {
    static constexpr bool normed = true, gated = false;
    const T* weight;
};
template <class T> struct GatedRow {
    static constexpr bool normed = true, gated = true;
    const T* weight;
    const T* z;
    i64 z_stride;
};

template <class C, class Row>
__device__ __forceinline__ void few_rows(typename C::Out* y, i64 y_stride, const typename C::T* x, i64 x_stride,
                                         const typename C::W* w, i64 w_stride, i32 rows, i32 n, const Row& row) {
    constexpr int V = C::vec, OUTS = C::outs, ROWS = C::rows, WARPS = C::threads / 32, SUMS = ROWS * (OUTS + Row::normed);
    static_assert(C::width % V == 0, "rows are whole vectors");
    __shared__ float sums[WARPS][SUMS];
    const int n0 = blockIdx.x * OUTS;
    float acc[ROWS][OUTS] = {}, squares[ROWS] = {};
#pragma unroll 2
    for (int k = threadIdx.x * V; k < C::width; k += C::threads * V) {
        float ws[OUTS][V];
#pragma unroll
        for (int o = 0; o < OUTS; o++) load_f32(ws[o], w + min_of(n0 + o, n - 1) * w_stride + k);
        float g[V];
        if constexpr (Row::normed) load_f32(g, row.weight + k);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            if (ROWS > 1 && i >= rows) break;
            float u[V];
            load_f32(u, x + i * x_stride + k);
            if constexpr (Row::gated) {
                float z[V];
                load_f32(z, row.z + i * row.z_stride + k);
#pragma unroll
                for (int j = 0; j < V; j++) u[j] *= z[j] * sigmoid_fast(z[j]);
            }
            if constexpr (Row::normed) {
#pragma unroll
                for (int j = 0; j < V; j++) {
                    squares[i] = fmaf(u[j], u[j], squares[i]);
                    u[j] *= g[j];
                }
            }
#pragma unroll
            for (int o = 0; o < OUTS; o++)
#pragma unroll
                for (int j = 0; j < V; j++) acc[i][o] = fmaf(u[j], ws[o][j], acc[i][o]);
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        if (ROWS > 1 && i >= rows) break;
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            const float sum = warp_sum(acc[i][o]);
            if (lane_id() == 0) sums[warp_id()][i * OUTS + o] = sum;
        }
        if constexpr (Row::normed) {
            const float sum = warp_sum(squares[i]);
            if (lane_id() == 0) sums[warp_id()][ROWS * OUTS + i] = sum;
        }
    }
    __syncthreads();
    // MUT few_ready: ;
    for (int i = threadIdx.x; i < ROWS * OUTS; i += C::threads) {
        const int r = i / OUTS, o = i % OUTS;
        if (r >= rows || n0 + o >= n) continue;
        float sum = 0.f, square = 0.f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) {
            sum += sums[warp][i];
            if constexpr (Row::normed) square += sums[warp][ROWS * OUTS + r];
            // MUT few_square: if constexpr (Row::normed) square += sums[0][ROWS * OUTS + r];
        }
        if constexpr (Row::normed) sum *= rsqrtf(square * (1.f / C::width) + C::eps);
        // MUT few_eps: if constexpr (Row::normed) sum *= rsqrtf(square * (1.f / C::width));
        y[r * y_stride + n0 + o] = from_f32<typename C::Out>(sum);
    }
}

template <class C>
__device__ __forceinline__ void product_rows(typename C::Out* y, i64 y_stride, const typename C::T* x, i64 x_stride,
                                             const typename C::W* w, i64 w_stride, i32 rows, i32 n) {
    few_rows<C>(y, y_stride, x, x_stride, w, w_stride, rows, n, PlainRow{});
}
template <class C>
__device__ __forceinline__ void product_normed(typename C::Out* y, i64 y_stride, const typename C::T* x, i64 x_stride,
                                               const typename C::W* w, i64 w_stride, const typename C::T* weight, i32 rows, i32 n) {
    few_rows<C>(y, y_stride, x, x_stride, w, w_stride, rows, n, NormedRow<typename C::T>{weight});
}
template <class C>
__device__ __forceinline__ void product_gated(typename C::Out* y, i64 y_stride, const typename C::T* x, i64 x_stride, const typename C::T* z,
                                              i64 z_stride, const typename C::W* w, i64 w_stride, const typename C::T* weight, i32 rows, i32 n) {
    few_rows<C>(y, y_stride, x, x_stride, w, w_stride, rows, n, GatedRow<typename C::T>{weight, z, z_stride});
}

}  // namespace rambac
