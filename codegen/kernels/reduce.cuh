// Sums, means and extremes over the middle axis of [outer, mid, inner]: one launch or two, in a fixed order.
//
// A block takes `inner` columns LANES at a time and one part of `mid`; its ROWS·LANES threads step down the part's rows,
// then rows are combined in shared memory, lowest first.  The second launch combines the parts in the same way.
//
//            inner: lanes side by side, coalesced; with inner = 1 the lanes walk along mid
//   mid ↓    each row of threads takes every ROWS-th row
#pragma once
#include "warp.cuh"

namespace rambac {

struct Sum {
    static __device__ __forceinline__ float none() { return 0.f; }
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
    static __device__ __forceinline__ float done(float a) { return a; }
};
template <int N> struct Mean : Sum {
    static __device__ __forceinline__ float done(float a) { return a * (1.f / N); }
};
// A NaN stays, as it should be seen.
struct Max {
    static __device__ __forceinline__ float none() { return -infinity(); }
    static __device__ __forceinline__ float of(float a, float b) { return b <= a || a != a ? a : b; }
    static __device__ __forceinline__ float done(float a) { return a; }
};
struct Min {
    static __device__ __forceinline__ float none() { return infinity(); }
    static __device__ __forceinline__ float of(float a, float b) { return b >= a || a != a ? a : b; }
    static __device__ __forceinline__ float done(float a) { return a; }
};

// C: In, Out, F, lanes, rows (lanes · rows threads).  `part` rows of mid per block; y: [outer, parts, inner].
template <class C>
__device__ __forceinline__ void reduce(const typename C::In* x, i64 outer_stride, i64 mid_stride, typename C::Out* y, i64 mid,
                                       i64 inner, i64 part) {
    using F = typename C::F;
    __shared__ float rows[C::rows][C::lanes];
    int lane = threadIdx.x % C::lanes, row = threadIdx.x / C::lanes;
    i64 tiles = ceil_div(inner, C::lanes), outer = blockIdx.x / tiles, parts = gridDim.y;
    i64 col = (blockIdx.x - outer * tiles) * C::lanes + lane;
    i64 first = blockIdx.y * part, last = min_of(first + part, mid);
    const typename C::In* from = x + outer * outer_stride + col;
    float sum = F::none();
    if (col < inner)
#pragma unroll 8
        for (i64 m = first + row; m < last; m += C::rows) sum = F::of(sum, to_f32(from[m * mid_stride]));
    rows[row][lane] = sum;
    __syncthreads();
#pragma unroll
    for (int d = C::rows / 2; d > 0; d /= 2) {
        if (row < d) rows[row][lane] = F::of(rows[row][lane], rows[row + d][lane]);
        __syncthreads();
    }
    if (row == 0 && col < inner) y[(outer * parts + blockIdx.y) * inner + col] = from_f32<typename C::Out>(F::done(rows[0][lane]));
}

}  // namespace rambac
