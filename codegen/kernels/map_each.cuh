// One elementwise region over many tensors, and the sum of squares of many tensors.
//
// A launch brings a table of its tensors by value: per tensor its first block, its elements, and addresses.  A block finds
// its tensor by bisection of first blocks, which all of its threads read from constant memory.
//
//   blocks   | tensor 0: ceil(n0 / EACH) | tensor 1 | …          EACH = threads · width · rounds elements
//
// Every element of every operand is read once and every result written once: memory limits both.  A result may lie over an
// operand of the same tensor: a thread reads its elements before it writes them.
#pragma once
#include "map.cuh"
#include "warp.cuh"

namespace rambac {

template <int WORDS> struct Table {
    u64 at[WORDS];
};

// Entry of the tensor that block `block` belongs to, of COUNT entries of EACH words: (first block, elements, addresses …).
template <int COUNT, int EACH, int WORDS> __device__ __forceinline__ const u64* find_tensor(const Table<WORDS>& t, i64 block) {
    static_assert(COUNT * EACH == WORDS, "the table has an entry per tensor");
    int low = 0;
#pragma unroll
    for (int step = 1 << 30; step > 0; step /= 2)
        if (step < COUNT && low + step < COUNT && (i64)t.at[(low + step) * EACH] <= block) low += step;
    // MUT each_find: if (step < COUNT && low + step < COUNT && (i64)t.at[(low + step) * EACH] < block) low += step;
    return &t.at[low * EACH];
}

// As map.cuh's, of the first `m` of W elements.
template <int W, class T> __device__ __forceinline__ auto load_some(const T* p, i64 i, int m) {
    if (m >= W) return load_at<W>(p + i);
    Values<typename Arithmetic<T>::Type, W> y;
#pragma unroll
    for (int e = 0; e < W; e++) y[e] = e < m ? Arithmetic<T>::of(p[i + e]) : 0;
    return y;
}
template <int W, class T, class A> __device__ __forceinline__ void store_some(T* p, i64 i, int m, const Values<A, W>& y) {
    if (m >= W) return store_at<W>(p + i, y);
#pragma unroll
    for (int e = 0; e < W; e++)
        if (e < m) p[i + e] = as_element<T>(y[e]);
    // MUT each_tail: p[i + e] = as_element<T>(y[e]);
}

// A slot per block: the sum of squares of its elements.  C: T, count, words (all), width, rounds, threads.
template <class C> __device__ __forceinline__ void squares(const Table<C::words>& table, float* slots, i64 first) {
    constexpr int W = C::width;
    __shared__ float scratch[C::threads / 32];
    const i64 block = blockIdx.x + first;
    const u64* own = find_tensor<C::count, 3>(table, block);
    const typename C::T* x = reinterpret_cast<const typename C::T*>(own[2]);
    const i64 n = own[1], start = (block - (i64)own[0]) * (C::threads * W * C::rounds);
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < C::rounds; k++) {
        const i64 i = start + (k * C::threads + threadIdx.x) * W;
        if (i >= n) break;
        auto v = load_some<W>(x, i, (int)min_of(n - i, (i64)W));
#pragma unroll
        for (int e = 0; e < W; e++) sum = fmaf(v[e], v[e], sum);
    }
    sum = block_sum<C::threads>(sum, scratch);
    if (threadIdx.x == 0) slots[block] = sum;
}

// All slots, in double: one block.
template <class C> __device__ __forceinline__ void squares_of_slots(const float* slots, i64 count, typename C::T* y) {
    __shared__ double parts[C::threads];
    double sum = 0.;
    for (i64 i = threadIdx.x; i < count; i += C::threads) sum += slots[i];
    parts[threadIdx.x] = sum;
    __syncthreads();
#pragma unroll
    for (int d = C::threads / 2; d > 0; d /= 2) {
        if (threadIdx.x < d) parts[threadIdx.x] += parts[threadIdx.x + d];
        __syncthreads();
        // MUT each_slots: ;
    }
    if (threadIdx.x == 0) *y = from_f32<typename C::T>((float)parts[0]);
}

}  // namespace rambac
