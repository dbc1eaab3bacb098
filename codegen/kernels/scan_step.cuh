// One token of the selective scan: h = exp(dt a) h0 + dt x (x) b, y = h·c + d x.
//
// `lanes` threads own a row of a head's state [P, R], vectors of it side by side.  The state is read and written once;
// that traffic limits it.  h may lie over h0.  What no kernel before it writes is asked for before it waits (earlier.cuh).
//
// C: T (x, b, c, y), Exact (d and states), heads, groups, head_dim (P), state (R), vec, lanes, threads, early, decays_ahead (nothing
// before it writes what `a` reads).
// Dt and A are hooks: dt[n, head] and a[head], perhaps made on the spot.  Grid (ceil(heads · P / (threads / lanes)), N).
#pragma once
#include "earlier.cuh"
#include "map.cuh"
#include "warp.cuh"

namespace rambac {

// Rows that lie in memory, as a hook.
template <class T> struct Rows {
    const T* p;
    i64 stride;
    __device__ __forceinline__ float operator()(i64 r, i64 c) const { return to_f32(p[r * stride + c]); }
};

template <class C, class Dt, class A>
__device__ __forceinline__ void scan_step(const typename C::T* x, i64 x_stride, const Dt& dt, const A& a, const typename C::T* b, i64 b_stride,
                                          const typename C::T* c, i64 c_stride, const typename C::Exact* d, const typename C::Exact* h0, typename C::T* y,
                                          i64 y_stride, typename C::Exact* h) {
    constexpr int P = C::head_dim, R = C::state, V = C::vec, LANES = C::lanes, PIECES = (R + V * LANES - 1) / (V * LANES), ROWS = C::heads * P;
    static_assert(R % V == 0, "rows are whole vectors");
    const i64 n = blockIdx.y;
    const int row = blockIdx.x * (C::threads / LANES) + threadIdx.x / LANES, lane = threadIdx.x % LANES;
    // Lanes of a row past the end take part in sums of their warp.
    const bool mine = row < ROWS;
    const int head = min_of(row, ROWS - 1) / P, group = head / (C::heads / C::groups);
    const i64 at = (n * ROWS + row) * R + lane * V;
    let_next_begin<C>();
    float state[PIECES][V];
#pragma unroll
    for (int k = 0; k < PIECES; k++)
        if (mine && (R % (V * LANES) == 0 || (k * LANES + lane) * V < R)) load_f32(state[k], h0 + at + k * LANES * V);
    const float skip = to_f32(d[head]);
    float decays = 0.f;
    if constexpr (C::decays_ahead) decays = a(0, head);
    wait_for_earlier<C>();
    // MUT step_wait: ;
    if constexpr (!C::decays_ahead) decays = a(0, head);
    const float step = dt(n, head);
    const float xv = mine ? to_f32(x[n * x_stride + row]) : 0.f;
    const float decay = exp2_fast(step * decays * LOG2E), in = step * xv;
    // MUT step_decay: const float decay = exp2_fast(step * decays), in = step * xv;
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < PIECES; k++) {
        const int col = (k * LANES + lane) * V;
        float bs[V], cs[V];
        if (mine && (R % (V * LANES) == 0 || col < R)) {
            load_f32(bs, b + n * b_stride + group * R + col);
            load_f32(cs, c + n * c_stride + group * R + col);
#pragma unroll
            for (int i = 0; i < V; i++) {
                state[k][i] = fmaf(decay, state[k][i], in * bs[i]);
                sum = fmaf(state[k][i], cs[i], sum);
            }
            store_f32(h + at + k * LANES * V, state[k]);
        }
    }
    sum = warp_sum<LANES>(sum);
    if (mine && lane == 0) y[n * y_stride + row] = from_f32<typename C::T>(fmaf(skip, xv, sum));
    // MUT step_skip: if (mine && lane == 0) y[n * y_stride + row] = from_f32<typename C::T>(sum);
}

}  // namespace rambac
