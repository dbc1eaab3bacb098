// Rows of a table picked by ids, and the gradient that adds them back.
//
// The gradient has no atomics: a block owns ROWS rows of the table and COLS columns, held in shared memory.  It walks over
// all ids, a tile at a time, lists those that are its own, and adds their rows of dy in the order of their positions.  An id that
// is most of a text keeps one column of blocks busy: there the rows of a batch are on their way together.
#pragma once
#include "warp.cuh"

namespace rambac {

// C: T, Table (of its elements), threads, w.  A thread moves w elements; an id outside the table gives zeros.
template <class C>
__device__ __forceinline__ void embedding(const i32* ids, const typename C::Table* table, typename C::T* y, i64 y_stride, i64 n,
                                          i32 cols, i32 vocab) {
    i64 i = ((i64)blockIdx.x * C::threads + threadIdx.x) * C::w;
    if (i >= n * cols) return;
    i64 token = i / cols, col = i - token * cols;
    i32 id = ids[token];
    Vec<typename C::Table, C::w> x{};
    if (id >= 0 && id < vocab) x = load<typename C::Table, C::w>(table + (i64)id * cols + col);
    // MUT embedding_bound: if (id <= vocab) x = load<typename C::Table, C::w>(table + (i64)id * cols + col);
    Vec<typename C::T, C::w> v;
#pragma unroll
    for (int k = 0; k < C::w; k++) v[k] = from_f32<typename C::T>(to_f32(x[k]));
    store<typename C::T, C::w>(y + token * y_stride + col, v);
}

// C: T, threads = cols of a block, rows (at most 32), batch (rows of dy that are on their way at once).
template <class C>
__device__ __forceinline__ void embedding_grad(const i32* ids, const typename C::T* dy, i64 stride, typename C::T* dtable, i64 n,
                                               i32 cols, i32 vocab) {
    constexpr int EACH = 4, TILE = EACH * C::threads, WARPS = C::threads / 32;
    __shared__ float sum[C::rows][C::threads];
    // Positions of this block's ids in the tile, in order, and their rows.
    __shared__ u16 hits[TILE];
    __shared__ int counts[WARPS];
    static_assert(TILE * 32 <= 1 << 16 && C::rows <= 32, "a hit fits 16 bits");
    i32 first = blockIdx.x * C::rows, col = blockIdx.y * C::threads + threadIdx.x;
#pragma unroll
    for (int r = 0; r < C::rows; r++) sum[r][threadIdx.x] = 0.f;
    // The row that was added to last, in a register: the same id often comes again.
    int held = -1;
    float row = 0.f;
    auto add = [&](int r, float v) {
        if (r != held) {
            if (held >= 0) sum[held][threadIdx.x] = row;
            row = sum[r][threadIdx.x], held = r;
        }
        row += v;
    };
    for (i64 base = 0; base < n; base += TILE) {
        i32 id[EACH];
        int own = 0;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            i64 mine = base + EACH * threadIdx.x + j;
            id[j] = mine < n ? ids[mine] - first : -1;
            if (id[j] < 0 || id[j] >= C::rows) id[j] = -1;
            own += id[j] >= 0;
        }
        // Most tiles have no id of this block's.  Nobody reads hits of the tile before any more.
        if (!__syncthreads_or(own)) continue;
        int before = own;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            int left = __shfl_up_sync(ALL_LANES, before, d);
            if (lane_id() >= d) before += left;
        }
        if (lane_id() == 31) counts[warp_id()] = before;
        __syncthreads();
        int total = 0, at = before - own;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            at += w < warp_id() ? counts[w] : 0;
            // MUT embedding_warps: ;
            total += counts[w];
        }
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (id[j] >= 0) hits[at++] = (u16)((EACH * threadIdx.x + j) * 32 + id[j]);
        __syncthreads();
        // MUT embedding_barrier: ;
        if (col >= cols) continue;
        const typename C::T* from = dy + base * stride + col;
        int t = 0;
        for (; t + C::batch <= total; t += C::batch) {
            float v[C::batch];
#pragma unroll
            for (int i = 0; i < C::batch; i++) v[i] = to_f32(from[hits[t + i] / 32 * stride]);
#pragma unroll
            for (int i = 0; i < C::batch; i++) add(hits[t + i] % 32, v[i]);
        }
        for (; t < total; t++) add(hits[t] % 32, to_f32(from[hits[t] / 32 * stride]));
        // MUT embedding_rest: ;
    }
    if (held >= 0) sum[held][threadIdx.x] = row;
    // MUT embedding_held: ;
    if (col < cols)
        for (int r = 0; r < C::rows && first + r < vocab; r++)
            dtable[(i64)(first + r) * cols + col] = from_f32<typename C::T>(sum[r][threadIdx.x]);
}

}  // namespace rambac
