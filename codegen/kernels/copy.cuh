// Asynchronous copies from global to shared memory (cp.async), 16 bytes each.
#pragma once
#include "mma.cuh"

namespace rambac {

__device__ __forceinline__ void store_shared16(u32 at, const u32 (&x)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

// Copies 16 bytes; where `valid` is false, writes zeros and reads nothing.
__device__ __forceinline__ void copy16_async(void* to, const void* from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// The same to an address in shared memory.
__device__ __forceinline__ void copy16_async(u32 to, const void* from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of the groups that this thread committed are under way; a barrier then shows them to others.
template <int N> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// The order in which the 16-byte pieces of ROWS rows of PER_ROW, PITCH pieces apart in shared memory, are copied.  Eight lanes
// write at once: they take TALL rows by 8 / TALL pieces that share no bank, which for narrow rows are not neighbours.
__device__ constexpr bool pieces_apart(int tall, int pitch) {
    int seen = 0;
    for (int i = 0; i < 8; i++) seen |= 1 << (i / (8 / tall) * pitch + i % (8 / tall)) % 8;
    return seen == 255;
}
__device__ constexpr int tall_of(int rows, int per_row, int pitch) {
    for (int tall = 1; tall <= 8; tall *= 2)
        if (rows % tall == 0 && per_row % (8 / tall) == 0 && pieces_apart(tall, pitch)) return tall;
    return 0;
}
template <int ROWS, int PER_ROW, int PITCH> struct PieceOrder {
    static constexpr int TALL = tall_of(ROWS, PER_ROW, PITCH), WIDE = TALL ? 8 / TALL : PER_ROW, ACROSS = PER_ROW / WIDE;
    // After so many pieces the columns come again, in rows further down.
    static constexpr int PERIOD = max_of(TALL, 1) * PER_ROW;
    static __device__ __forceinline__ u32 row(u32 i) {
        return TALL ? i / 8 / ACROSS * TALL + i % 8 / WIDE : i / PER_ROW;
    }
    static __device__ __forceinline__ u32 piece(u32 i) { return TALL ? i / 8 % ACROSS * WIDE + i % WIDE : i % PER_ROW; }
};

// ROWS rows of COLS elements to shared rows PITCH apart, by THREADS threads; rows from `rows` on become zeros.  Global
// rows are `stride` elements apart and 16-byte aligned.
template <int THREADS, int ROWS, int COLS, int PITCH, class T>
__device__ __forceinline__ void copy_rows_async(T* to, const T* from, i64 stride, int rows) {
    constexpr int EACH = 16 / sizeof(T), PER_ROW = COLS / EACH;
    static_assert(COLS % EACH == 0 && PITCH % EACH == 0, "rows are whole 16-byte pieces");
    using Order = PieceOrder<ROWS, PER_ROW, PITCH / EACH>;
    if constexpr (THREADS % Order::PERIOD == 0) {
        // A thread keeps its column and steps down: one address, not one per piece.
        constexpr int STEP = THREADS / PER_ROW;
        const int row = Order::row(threadIdx.x), col = Order::piece(threadIdx.x) * EACH;
        const T* at = from + row * stride + col;
#pragma unroll
        for (int i = 0; i < ROWS; i += STEP) {
            if (ROWS % STEP != 0 && row + i >= ROWS) break;
            bool valid = row + i < rows;
            copy16_async(to + (row + i) * PITCH + col, valid ? at : from, valid);
            at += STEP * stride;
        }
    } else {
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * PER_ROW; i += THREADS) {
            int row = Order::row(i), col = Order::piece(i) * EACH;
            bool valid = row < rows;
            copy16_async(to + row * PITCH + col, from + (valid ? row * stride + col : 0), valid);
        }
    }
}

}  // namespace rambac
