// Moves elements without computing: transposes, pads, broadcasts that are no plain suffix or prefix.
//
// The stub unravels an element's index axis by axis and adds up where it comes from; here is one axis.
#pragma once
#include "map.cuh"

namespace rambac {

// Takes the last axis, of `size`, off `rest`; gives the position on it.
__device__ __forceinline__ i64 take_axis(i64& rest, i64 size, i64 n) {
    i64 position;
    if (n < (1ll << 31)) {
        u32 q = (u32)rest / (u32)size;
        position = (u32)rest - q * (u32)size;
        rest = q;
    } else {
        i64 q = rest / size;
        position = rest - q * size;
        rest = q;
    }
    return position;
}

// y [N, t, width] = memory with rows [N, l, width] from `start` on; n elements of y.
template <class T>
__device__ __forceinline__ void append_rows(T* y, const T* memory, const T* rows, const i32* start, i64 n, i64 t, i64 l, i64 width) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, sequence = i / (t * width);
    if (i >= n) return;
    i64 row = i / width % t - max_of(start[sequence], 0);
    // MUT append_start: i64 row = i / width % t - max_of(start[0], 0);
    y[i] = row >= 0 && row < l ? rows[(sequence * l + row) * width + i % width] : memory[i];
}
// The same where y is the memory: n elements of rows, those beyond its end left out.
template <class T>
__device__ __forceinline__ void append_in_place(T* y, const T* rows, const i32* start, i64 n, i64 t, i64 l, i64 width) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, sequence = i / (l * width);
    if (i >= n) return;
    i64 row = i / width % l + max_of(start[sequence], 0);
    if (row < t) y[(sequence * t + row) * width + i % width] = rows[i];
    // MUT append_end: y[(sequence * t + row) * width + i % width] = rows[i];
}

}  // namespace rambac
