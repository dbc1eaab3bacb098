// Means of chunks (op `summarise`): x [N, T, W] → y [N, T/chunk, W].
//
//   a thread owns VEC neighbouring columns of a chunk and walks down its rows; neighbouring threads have neighbouring columns
//
// Traffic: x and y once, coalesced.
#pragma once
#include "types.cuh"

namespace rambac {

// C says: T, chunk, vec.  `width` and `vectors` (those of y) in vectors.
template <class C>
__device__ __forceinline__ void summarise(typename C::T* y, const typename C::T* x, i64 width, i64 vectors) {
    using T = typename C::T;
    constexpr int VEC = C::vec;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= vectors) return;
    const T* from = x + (i / width * C::chunk * width + i % width) * VEC;
    float sum[VEC] = {};
#pragma unroll 4
    for (int row = 0; row < C::chunk; row++) {
        // MUT summarise_last: for (int row = 0; row < C::chunk - 1; row++) {
        auto v = load<T, VEC>(from + row * width * VEC);
        // MUT summarise_row: auto v = load<T, VEC>(from + row * VEC);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum[j] += to_f32(v[j]);
    }
    Vec<T, VEC> out;
#pragma unroll
    for (int j = 0; j < VEC; j++) out[j] = from_f32<T>(sum[j] * (1.f / C::chunk));
    // MUT summarise_mean: for (int j = 0; j < VEC; j++) out[j] = from_f32<T>(sum[j]);
    store_global(y + i * VEC, out);
}

}  // namespace rambac
