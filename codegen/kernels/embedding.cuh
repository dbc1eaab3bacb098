// Rows of a table picked by ids, and the gradient that adds them back.
//
// The gradient has no atomics: a block owns ROWS rows of the table and COLS columns, held in shared memory.  It walks over
// all ids, a tile at a time, and adds the rows of dy whose id is its own in the order of their positions.
#pragma once
#include "warp.cuh"

namespace rambac {

// C: T, threads, w.  A thread moves w elements; an id outside the table gives zeros.
template <class C>
__device__ __forceinline__ void embedding(const i32* ids, const typename C::T* table, typename C::T* y, i64 y_stride, i64 n,
                                          i32 cols, i32 vocab) {
    i64 i = ((i64)blockIdx.x * C::threads + threadIdx.x) * C::w;
    if (i >= n * cols) return;
    i64 token = i / cols, col = i - token * cols;
    i32 id = ids[token];
    Vec<typename C::T, C::w> v{};
    if (id >= 0 && id < vocab) v = load<typename C::T, C::w>(table + (i64)id * cols + col);
    store<typename C::T, C::w>(y + token * y_stride + col, v);
}

// C: T, threads = cols of a block, rows (at most 32).
template <class C>
__device__ __forceinline__ void embedding_grad(const i32* ids, const typename C::T* dy, i64 stride, typename C::T* dtable, i64 n,
                                               i32 cols, i32 vocab) {
    __shared__ float sum[C::rows][C::threads];
    __shared__ i32 tile[C::threads];
    i32 first = blockIdx.x * C::rows, col = blockIdx.y * C::threads + threadIdx.x;
#pragma unroll
    for (int r = 0; r < C::rows; r++) sum[r][threadIdx.x] = 0.f;
    for (i64 base = 0; base < n; base += C::threads) {
        i64 mine = base + threadIdx.x;
        i32 id = mine < n ? ids[mine] - first : -1;
        bool hit = id >= 0 && id < C::rows;
        // Most tiles have no id of this block's.
        if (__syncthreads_or(hit)) {
            tile[threadIdx.x] = hit ? id : -1;
            __syncthreads();
            for (int t = 0; t < C::threads; t++) {
                i32 r = tile[t];
                if (r >= 0 && col < cols) sum[r][threadIdx.x] += to_f32(dy[(base + t) * stride + col]);
            }
            __syncthreads();
        }
    }
    if (col < cols)
        for (int r = 0; r < C::rows && first + r < vocab; r++)
            dtable[(i64)(first + r) * cols + col] = from_f32<typename C::T>(sum[r][threadIdx.x]);
}

}  // namespace rambac
