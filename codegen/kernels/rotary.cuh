// Rotary position embedding in half-split form.
//
//   (x_i, x_{i+d/2}) turns by position / base^(2i/d)       position = start of the sequence + row % period
//
// A CTA owns ROWS rows [heads · d].  It first makes the table of its sines and cosines in shared memory, each once for
// all heads, then turns the pairs.  x once, y once; memory limits it.  y may lie over x.
//
// Angles in turns, as a sum of two floats, lose nothing for positions up to 2^24.  Sequences of `period` rows start where
// `start` says, null: at 0.
//
// C: T, heads, head_dim, log2_base (double), inverse, vec, rows, threads.  Grid (ceil(rows / ROWS)).
#pragma once
#include "types.cuh"

namespace rambac {

template <class C>
__device__ __forceinline__ void rotary_from(const i32* start, const typename C::T* x, i64 x_stride, typename C::T* y, i64 y_stride, i64 rows,
                                            i32 period) {
    constexpr int HALF = C::head_dim / 2, V = C::vec;
    static_assert(HALF % V == 0, "half a head is whole vectors");
    __shared__ alignas(16) float sines[C::rows][HALF], cosines[C::rows][HALF];
    const i64 first = (i64)blockIdx.x * C::rows;
    for (int i = threadIdx.x; i < C::rows * HALF; i += C::threads) {
        const int pair = i % HALF, row = i / HALF;
        const double turns = exp2(-C::log2_base * (2.0 * pair / C::head_dim)) * 0.15915494309189535;
        const float big = (float)turns, small = (float)(turns - big);
        const i64 sequence = min_of(first + row, rows - 1) / period;
        // MUT rotary_sequence: const i64 sequence = 0;
        const float position = (float)((first + row) % period + (start ? start[sequence] : 0));
        const float whole = rintf(position * big);
        float sine, cosine;
        sincospif(2.f * fmaf(position, small, fmaf(position, big, -whole)), &sine, &cosine);
        // MUT rotary_small: sincospif(2.f * fmaf(position, big, -whole), &sine, &cosine);
        sines[row][pair] = C::inverse ? -sine : sine;
        cosines[row][pair] = cosine;
    }
    __syncthreads();
    // MUT rotary_barrier: ;
    constexpr int PER_HEAD = HALF / V, PER_ROW = C::heads * PER_HEAD;
    for (int i = threadIdx.x; i < C::rows * PER_ROW; i += C::threads) {
        const int row = i / PER_ROW, head = i % PER_ROW / PER_HEAD, pair = i % PER_HEAD * V;
        if (first + row >= rows) break;
        const i64 at = (i64)head * C::head_dim + pair;
        float a[V], b[V], s[V], c[V], to_a[V], to_b[V];
        load_f32(a, x + (first + row) * x_stride + at);
        load_f32(b, x + (first + row) * x_stride + at + HALF);
        load_f32(s, &sines[row][pair]);
        load_f32(c, &cosines[row][pair]);
#pragma unroll
        for (int v = 0; v < V; v++) {
            to_a[v] = a[v] * c[v] - b[v] * s[v];
            to_b[v] = b[v] * c[v] + a[v] * s[v];
            // MUT rotary_sign: to_b[v] = b[v] * c[v] - a[v] * s[v];
        }
        store_f32(y + (first + row) * y_stride + at, to_a);
        store_f32(y + (first + row) * y_stride + at + HALF, to_b);
    }
}

template <class C>
__device__ __forceinline__ void rotary(const typename C::T* x, i64 x_stride, typename C::T* y, i64 y_stride, i64 rows, i32 period) {
    rotary_from<C>(nullptr, x, x_stride, y, y_stride, rows, period);
}

}  // namespace rambac
