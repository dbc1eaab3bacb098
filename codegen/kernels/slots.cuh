// Sums over slots: what CTAs leave of a sum over rows (a weight's gradient), added in a fixed order.
//
//   out[i, j] = sum over s of slots[s, i, j]          slots [count, rows, cols] in f32, slot_stride apart, from `first` on
//
// A CTA owns 32 columns of a row.  Its LANES warps take every LANES-th slot each and are added in order, so the order
// depends on `count` alone.  One pass over the slots, coalesced; what limits it is their bytes.
//
// C: T of out, lanes.  Grid (ceil(cols / 32) · rows), 32 · lanes threads.
#pragma once
#include "types.cuh"

namespace rambac {

template <class C>
__device__ __forceinline__ void sum_slots(const float* slots, i64 first, i32 count, i64 slot_stride, i64 cols, typename C::T* out, i64 row_stride, i64 col_stride) {
    __shared__ float parts[C::lanes][32];
    const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
    const i64 tiles = ceil_div(cols, 32), row = blockIdx.x / tiles, col = blockIdx.x % tiles * 32 + lane;
    const bool mine = col < cols;
    float sum = 0.f;
    if (mine) {
        const float* p = slots + first + row * cols + col;
#pragma unroll 8
        for (int s = part; s < count; s += C::lanes) sum += p[s * slot_stride];
    }
    parts[part][lane] = sum;
    __syncthreads();
    // MUT slots_barrier: ;
    if (part == 0 && mine) {
        sum = 0.f;
#pragma unroll
        for (int i = 0; i < C::lanes; i++) sum += parts[i][lane];
        // MUT slots_last: for (int i = 0; i < C::lanes - 1; i++) sum += parts[i][lane];
        out[row * row_stride + col * col_stride] = from_f32<typename C::T>(sum);
    }
}

}  // namespace rambac
