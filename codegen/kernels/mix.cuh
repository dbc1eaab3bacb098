// Rows that are weighed and added: softmax over the last axis, `merge` of attentions over disjoint keys, `aggregate` of slots, and
// the gradients of both.
//
//   softmax          p = e^(x - lse), lse = log Σ e^x                                      a warp per row, two reads
//   merge            y = Σ_i softmax(lse)_i · o_i                                          a thread per element
//   merge_grad       do_i = w_i·dy,  dlse_i = Σ_heads w_i·(dy·o_i - Σ_j w_j·dy·o_j + dlse)    a warp per token
//   aggregate        y = Σ_k w_k · o_k                                                     a thread per element
//   aggregate_slots  do_k = w_k·dy                                                         a thread per element
//   aggregate_heads  dw_k = Σ_heads dy·o_k                                                 a warp per weight
//
// Everything is read once but for the second pass of softmax: memory limits all of them.  A slot's rows are an axis of one array,
// or arrays of their own, whose addresses come in a table by value.
#pragma once
#include "map_each.cuh"
#include "warp.cuh"

namespace rambac {

// p [rows, k], lse [rows].
template <class T> __device__ __forceinline__ void softmax_rows(T* p, T* lse, const T* x, i64 rows, i64 k) {
    i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (row >= rows) return;
    const T* own = x + row * k;
    float top = -infinity(), sum = 0.f;
    for (i64 i = lane_id(); i < k; i += 32) {
        float z = to_f32(own[i]), more = fmaxf(top, z);
        // -∞ below -∞ is no difference.
        if (more > -infinity()) sum = fmaf(sum, exp2_fast((top - more) * LOG2E), exp2_fast((z - more) * LOG2E)), top = more;
        // MUT softmax_top: if (more > -infinity()) sum = sum + exp2_fast((z - more) * LOG2E), top = more;
    }
    float most = warp_max(top);
    sum = warp_sum(top > -infinity() ? sum * exp2_fast((top - most) * LOG2E) : 0.f);
    float all = most > -infinity() ? most + LN2 * __log2f(sum) : -infinity(), by = sum > 0.f ? 1.f / sum : 0.f;
    for (i64 i = lane_id(); i < k; i += 32) {
        float z = to_f32(own[i]);
        p[row * k + i] = from_f32<T>(z > -infinity() ? by * exp2_fast((z - most) * LOG2E) : 0.f);
    }
    if (lane_id() == 0) lse[row] = from_f32<T>(all);
}

// COUNT parts, words of three: o [rows, d], lse [tokens, heads / group], group; of a row [tokens, heads].
template <class T, int COUNT> struct Parts {
    const u64* at;
    __device__ __forceinline__ const T* o(int i) const { return (const T*)at[3 * i]; }
    __device__ __forceinline__ i64 group(int i) const { return (i64)at[3 * i + 2]; }
    // `heads` is a multiple of each group, so rows in order have their groups in order.
    __device__ __forceinline__ float lse(int i, i64 row) const { return to_f32(((const T*)at[3 * i + 1])[row / group(i)]); }
    // softmax(lse) of a row, and its log-sum-exp.
    __device__ __forceinline__ float weigh(float (&w)[COUNT], i64 row) const {
        float top = -infinity(), sum = 0.f;
#pragma unroll
        for (int i = 0; i < COUNT; i++) w[i] = lse(i, row), top = fmaxf(top, w[i]);
#pragma unroll
        for (int i = 0; i < COUNT; i++) w[i] = top > -infinity() ? exp2_fast((w[i] - top) * LOG2E) : 0.f, sum += w[i];
#pragma unroll
        for (int i = 0; i < COUNT; i++) w[i] = sum > 0.f ? w[i] / sum : 0.f;
        return sum > 0.f ? top + LN2 * __log2f(sum) : -infinity();
    }
};

template <class T, int COUNT>
__device__ __forceinline__ void merge(T* y, T* lse, const Table<3 * COUNT>& table, i64 n, i64 d) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    Parts<T, COUNT> parts{table.at};
    float w[COUNT], all = parts.weigh(w, i / d), x = 0.f;
#pragma unroll
    for (int k = 0; k < COUNT; k++) x = w[k] > 0.f ? fmaf(w[k], to_f32(parts.o(k)[i]), x) : x;
    y[i] = from_f32<T>(x);
    if (i % d == 0) lse[i / d] = from_f32<T>(all);
}

// `grads`: words of two, do and dlse.  A warp per token.
template <class T, int COUNT>
__device__ __forceinline__ void merge_grad(const Table<3 * COUNT>& table, const Table<2 * COUNT>& grads, const T* dy, const T* dlse,
                                           i64 tokens, i32 heads, i64 d) {
    i64 token = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (token >= tokens) return;
    Parts<T, COUNT> parts{table.at};
    float sums[COUNT] = {};
    for (int head = 0; head < heads; head++) {
        i64 row = token * heads + head;
        float w[COUNT], dot[COUNT] = {}, mean = 0.f;
        parts.weigh(w, row);
        for (i64 j = lane_id(); j < d; j += 32) {
            float g = to_f32(dy[row * d + j]);
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                dot[i] = fmaf(g, to_f32(parts.o(i)[row * d + j]), dot[i]);
                ((T*)grads.at[2 * i])[row * d + j] = from_f32<T>(w[i] * g);
            }
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) dot[i] = warp_sum(dot[i]), mean = fmaf(w[i], dot[i], mean);
        float own = to_f32(dlse[row]);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            sums[i] = fmaf(w[i], dot[i] - mean + own, sums[i]);
            // MUT merge_mean: sums[i] = fmaf(w[i], dot[i] + own, sums[i]);
            if ((row + 1) % parts.group(i) != 0) continue;
            if (lane_id() == 0) ((T*)grads.at[2 * i + 1])[row / parts.group(i)] = from_f32<T>(sums[i]);
            sums[i] = 0.f;
        }
    }
}

// Where a slot's row is: an axis [rows, slots, d], or arrays [rows, d].
template <class T> struct SlotAxis {
    T* base;
    i64 slots, d;
    __device__ __forceinline__ T* at(i64 row, i64 k) const { return base + (row * slots + k) * d; }
};
template <class T> struct SlotArrays {
    const u64* table;
    i64 d;
    __device__ __forceinline__ T* at(i64 row, i64 k) const { return (T*)table[k] + row * d; }
};

// y [rows, d]; w [rows / group, slots].
template <class T, class Slots>
__device__ __forceinline__ void aggregate(T* y, const Slots& o, const T* w, i64 n, i64 slots, i64 d, i64 group) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, row = i / d;
    if (i >= n) return;
    float x = 0.f;
    for (i64 k = 0; k < slots; k++) x = fmaf(to_f32(w[row / group * slots + k]), to_f32(o.at(row, k)[i % d]), x);
    // MUT aggregate_group: for (i64 k = 0; k < slots; k++) x = fmaf(to_f32(w[row * slots + k]), to_f32(o.at(row, k)[i % d]), x);
    y[i] = from_f32<T>(x);
}
template <class T, class Slots>
__device__ __forceinline__ void aggregate_slots(const Slots& out, const T* w, const T* dy, i64 n, i64 slots, i64 d, i64 group) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, row = i / d;
    if (i >= n) return;
    float g = to_f32(dy[i]);
    for (i64 k = 0; k < slots; k++) out.at(row, k)[i % d] = from_f32<T>(to_f32(w[row / group * slots + k]) * g);
}
// dw [rows / group, slots].
template <class T, class Slots>
__device__ __forceinline__ void aggregate_heads(T* dw, const Slots& o, const T* dy, i64 n, i64 slots, i64 d, i64 group) {
    i64 at = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (at >= n) return;
    float x = 0.f;
    for (i64 row = at / slots * group; row < (at / slots + 1) * group; row++)
        for (i64 j = lane_id(); j < d; j += 32) x = fmaf(to_f32(dy[row * d + j]), to_f32(o.at(row, at % slots)[j]), x);
    x = warp_sum(x);
    if (lane_id() == 0) dw[at] = from_f32<T>(x);
}

}  // namespace rambac
