// Where keys, values and landmarks lie: in one array, or in pages that a table on the device finds.
//
//   array   sequence s, chunk c of C:   rows (s·C + c)·S …                 [N, C·S, h, d]
//   pages                               rows table[s, c]·S …               a pool [slots, S, h, d], table i32 [N, C]
//   landmarks in pages                  row table[s, c / PAGE]·PAGE + c % PAGE      a pool [pages, PAGE, h, r]
//
// Of landmarks a part may be there at a time: window[s] = the first page of a sequence and the one behind the last.  What looks
// through them is then started once per part, and goes on from what it found before; its first part begins at page 0.
//
// A pool's elements (C::Stored) may be narrower than T: they are widened on their way to shared memory, as a copy that is
// under way until the next barrier.
#pragma once
#include "copy.cuh"

namespace rambac {

// Landmarks of a page.
constexpr int LANDMARK_PAGE = 128;

// 16 bytes of T, from elements of T (asynchronously) or narrower ones; zeros where `valid` is false.
template <class T, class E> __device__ __forceinline__ void copy16_wide(u32 to, const E* from, bool valid) {
    if constexpr (sizeof(T) == sizeof(E)) {
        copy16_async(to, from, valid);
    } else {
        static_assert(sizeof(T) == 4, "f32 alone is wider than what is stored");
        u32 x[4] = {};
        if (valid) {
            auto v = load<E, 4>(from);
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = __float_as_uint(to_f32(v[i]));
        }
        store_shared16(to, x);
    }
}

// As copy_rows_async, from elements of T or narrower ones.
template <int THREADS, int ROWS, int COLS, int PITCH, class T, class E>
__device__ __forceinline__ void copy_rows_wide(T* to, const E* from, i64 stride, int rows) {
    if constexpr (sizeof(T) == sizeof(E)) {
        copy_rows_async<THREADS, ROWS, COLS, PITCH>(to, from, stride, rows);
    } else {
        constexpr int EACH = 16 / sizeof(T), PER_ROW = COLS / EACH;
        using Order = PieceOrder<ROWS, PER_ROW, PITCH / EACH>;
#pragma unroll 4
        for (int i = threadIdx.x; i < ROWS * PER_ROW; i += THREADS) {
            int row = Order::row(i), col = Order::piece(i) * EACH;
            copy16_wide<T>(shared_address(to + row * PITCH + col), from + row * stride + col, row < rows);
        }
    }
}

// Keys and values, rows of h·head_dim at their strides, by chunk.  C says: T, chunk; with pages Stored too.
template <class C> struct ArrayChunks {
    using Stored = typename C::T;
    const Stored *k, *v;
    i64 k_stride, v_stride, tokens_kv;
    // The first of a chunk's rows.
    __device__ __forceinline__ i64 first(i64 sequence, int chunk) const { return sequence * tokens_kv + (i64)chunk * C::chunk; }
};
template <class C> struct PagedChunks {
    using Stored = typename C::Stored;
    const Stored *k, *v;
    i64 k_stride, v_stride;
    const i32* table;
    i32 chunks;
    __device__ __forceinline__ i64 first(i64 sequence, int chunk) const { return (i64)table[sequence * chunks + chunk] * C::chunk; }
    // MUT pages_chunk: __device__ __forceinline__ i64 first(i64 sequence, int chunk) const { return (i64)table[chunk] * C::chunk; }
};

// Pages of a sequence's landmarks.
struct Window {
    int first, end;
    // Nothing was found before.
    __device__ __forceinline__ bool fresh() const { return first == 0; }
    // MUT pages_fresh: __device__ __forceinline__ bool fresh() const { return true; }
};

// Landmarks, rows of h·width at their stride.
template <class C> struct ArrayLandmarks {
    using Stored = typename C::T;
    const Stored* at;
    i64 stride;
    i32 chunks;
    // The row of a chunk; those of a tile that divides a page, and of which this is the first, lie side by side.
    __device__ __forceinline__ const Stored* row(i64 sequence, int chunk) const { return at + (sequence * chunks + chunk) * stride; }
    __device__ __forceinline__ Window here(i64) const { return {0, (int)ceil_div(chunks, LANDMARK_PAGE)}; }
};
template <class C> struct PagedLandmarks {
    using Stored = typename C::Stored;
    const Stored* at;
    i64 stride;
    const i32 *table, *window;
    i32 chunks;
    __device__ __forceinline__ const Stored* row(i64 sequence, int chunk) const {
        i64 page = table[sequence * (chunks / LANDMARK_PAGE) + chunk / LANDMARK_PAGE];
        return at + (page * LANDMARK_PAGE + chunk % LANDMARK_PAGE) * stride;
        // MUT pages_landmark: return at + (page * LANDMARK_PAGE + chunk) * stride;
    }
    __device__ __forceinline__ Window here(i64 sequence) const {
        auto x = load<i32, 2>(window + sequence * 2);
        // MUT pages_window: auto x = load<i32, 2>(window);
        return {x[0], x[1]};
    }
};

}  // namespace rambac
