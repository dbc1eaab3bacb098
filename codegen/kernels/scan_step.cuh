// One token of the selective scan: h = exp(dt a) h0 + dt x (x) b, y = h·c + d x.
//
// `lanes` threads own a row of a head's state [P, R], vectors of it side by side.  The state is read and written once;
// that traffic limits it.  h may lie over h0.
//
// C: T (x, b, c, y), Exact (dt, a, d and states), heads, groups, head_dim (P), state (R), vec, lanes, threads.  Grid (ceil(heads · P / (threads / lanes)), N).
#pragma once
#include "warp.cuh"

namespace rambac {

template <class C>
__device__ __forceinline__ void scan_step(const typename C::T* x, i64 x_stride, const typename C::Exact* dt, i64 dt_stride, const typename C::Exact* a,
                                          const typename C::T* b, i64 b_stride, const typename C::T* c, i64 c_stride, const typename C::Exact* d,
                                          const typename C::Exact* h0, typename C::T* y, i64 y_stride, typename C::Exact* h) {
    constexpr int P = C::head_dim, R = C::state, V = C::vec, LANES = C::lanes, PIECES = (R + V * LANES - 1) / (V * LANES), ROWS = C::heads * P;
    static_assert(R % V == 0, "rows are whole vectors");
    const i64 n = blockIdx.y;
    const int row = blockIdx.x * (C::threads / LANES) + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    // Lanes of a row past the end take part in sums of their warp.
    const bool mine = row < ROWS;
    const int head = min_of(row, ROWS - 1) / P, group = head / (C::heads / C::groups);
    const float step = to_f32(dt[n * dt_stride + head]);
    const float xv = mine ? to_f32(x[n * x_stride + row]) : 0.f;
    const float decay = exp2_fast(step * to_f32(a[head]) * LOG2E), in = step * xv;
    // MUT step_decay: const float decay = exp2_fast(step * to_f32(a[head])), in = step * xv;
    const i64 at = (n * ROWS + row) * R + lane * V;
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        const int col = (k * LANES + lane) * V;
        float state[V], bs[V], cs[V];
        if (mine && (R % (V * LANES) == 0 || col < R)) {
            load_f32(state, h0 + at + k * LANES * V);
            load_f32(bs, b + n * b_stride + group * R + col);
            load_f32(cs, c + n * c_stride + group * R + col);
#pragma unroll
            for (int i = 0; i < V; i++) {
                state[i] = fmaf(decay, state[i], in * bs[i]);
                sum = fmaf(state[i], cs[i], sum);
            }
            store_f32(h + at + k * LANES * V, state);
        }
    }
    sum = warp_sum<LANES>(sum);
    if (mine && lane == 0) y[n * y_stride + row] = from_f32<typename C::T>(fmaf(to_f32(d[head]), xv, sum));
    // MUT step_skip: if (mine && lane == 0) y[n * y_stride + row] = from_f32<typename C::T>(sum);
}

}  // namespace rambac
