// The choice among dense scores (op `select`), weights of what was chosen (op `weigh`) and their gradient.
//
// choose: a warp per row, whatever K and C are.  The row's scores are read once to count what is seen, up to four times for the
// K-th best by radix (a byte of the ordered bits at a time), and once to write:
//
//   seen = not -∞      forced: the first `sinks` and the last `recent` of them
//   threshold = the (K - forced)-th best of the others, by histograms of a warp in shared memory
//   chosen: forced, above the threshold, or equal to it among the first so many (ties go to the smaller unit)
//
// Latest first is the order of reading backwards; best first counts who is better.  Histograms are sums of integers: no schedule
// changes them.  Traffic: at most six reads of a row of scores, from L1 and L2 all but the first.
#pragma once
#include "select_grad.cuh"

namespace rambac {

// C says: slots (K), order, sinks, recent, warps.
template <class C> struct Choosing {
    u32 histogram[C::warps][256];
    // Best first alone: the chosen as candidates.
    u64 chosen[C::order == Order::SCORE ? C::warps : 1][C::order == Order::SCORE ? C::slots : 1];
};

// Calls f(unit, key, rank among the seen) for 32 units of a row at a time; a key of 0 is not seen.  Returns how many are seen.
template <class T, class F> __device__ __forceinline__ int walk_units(const T* row, int chunks, const F& f) {
    int seen = 0;
    for (int c0 = 0; c0 < chunks; c0 += 32) {
        int c = c0 + lane_id();
        float x = c < chunks ? to_f32(row[c]) : -infinity();
        u32 key = x > -infinity() ? ordered(x + 0.f) : 0, among = __ballot_sync(ALL_LANES, key != 0);
        f(c, key, seen + __popc(among & ((1u << lane_id()) - 1)));
        seen += __popc(among);
    }
    return seen;
}

// indices [rows, K], count [rows]; s [rows, chunks].
template <class C, class T>
__device__ __forceinline__ void choose(i32* indices, i32* count, const T* s, i64 rows, i32 chunks) {
    constexpr int K = C::slots;
    using S = Choosing<C>;
    extern __shared__ __align__(16) u8 shared[];
    S& all = *reinterpret_cast<S*>(shared);
    u32* histogram = all.histogram[warp_id()];
    i64 row = (i64)blockIdx.x * C::warps + warp_id();
    if (row >= rows) return;
    const T* own = s + row * chunks;
    const int lane = lane_id();
    const u32 before = (1u << lane) - 1;
    const int seen = walk_units(own, chunks, [](int, u32, int) {});
    auto forced = [&](int rank) { return rank < C::sinks || rank + C::recent >= seen; };
    // MUT choose_forced: auto forced = [&](int rank) { return rank < C::sinks || rank + C::recent > seen; };
    const int fixed = min_of(seen, C::sinks + C::recent), others = seen - fixed, wanted = min_of(K - fixed, others);
    // The wanted-th best key of the others, and how many that are equal to it are taken.
    u32 threshold = 0;
    int equal = 0;
    if (wanted == 0) {
        threshold = 0xffffffffu;
    } else if (wanted < others) {
        int left = wanted;
        for (int shift = 24; shift >= 0; shift -= 8) {
            for (int i = lane; i < 256; i += 32) histogram[i] = 0;
            __syncwarp();
            walk_units(own, chunks, [&](int, u32 key, int rank) {
                bool match = key != 0 && !forced(rank) && (shift == 24 || key >> (shift + 8) == threshold >> (shift + 8));
                if (match) atomicAdd(&histogram[key >> shift & 255], 1u);
            });
            __syncwarp();
            // From the top: the bin where `left` are reached.  A lane has eight bins.
            u32 mine = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) mine += histogram[255 - lane * 8 - i];
            u32 upto = mine;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                u32 other = __shfl_up_sync(ALL_LANES, upto, d);
                if (lane >= d) upto += other;
            }
            u32 reached = __ballot_sync(ALL_LANES, upto >= (u32)left);
            int owner = __ffs(reached) - 1, bin = 0, above = 0;
            if (lane == owner) {
                above = (int)(upto - mine);
                for (bin = 255 - lane * 8; above + (int)histogram[bin] < left; bin--) above += histogram[bin];
            }
            bin = __shfl_sync(ALL_LANES, bin, owner), above = __shfl_sync(ALL_LANES, above, owner);
            left -= above;
            // MUT choose_left: left -= 0;
            threshold |= (u32)bin << shift;
            __syncwarp();
        }
        equal = left;
    }
    const int n = fixed + wanted;
    int taken = 0, ties = 0;
    walk_units(own, chunks, [&](int c, u32 key, int rank) {
        bool out = key != 0 && forced(rank), same = key != 0 && !out && key == threshold && equal > 0;
        u32 tied = __ballot_sync(ALL_LANES, same);
        out |= key != 0 && key > threshold;
        out |= same && ties + __popc(tied & before) < equal;
        // MUT choose_ties: out |= same;
        ties += __popc(tied);
        u32 who = __ballot_sync(ALL_LANES, out);
        int place = taken + __popc(who & before);
        taken += __popc(who);
        if (!out) return;
        if constexpr (C::order == Order::RECENT) indices[row * K + n - 1 - place] = c;
        else all.chosen[warp_id()][place] = (u64)key << 32 | ~(u32)c;
    });
    if constexpr (C::order == Order::SCORE) {
        __syncwarp();
        const u64* mine = all.chosen[warp_id()];
        for (int i = lane; i < n; i += 32) {
            int better = 0;
            for (int j = 0; j < n; j++) better += mine[j] > mine[i];
            indices[row * K + better] = (i32) ~(u32)mine[i];
        }
    }
    for (int i = n + lane; i < K; i += 32) indices[row * K + i] = 0;
    if (lane == 0) count[row] = n;
}

// w [rows, K] of the scores that were chosen; `scores` [rows, K], if not null, gets these, 0 in unfilled slots.  A thread per row.
// C says: slots, rule, threads.
template <class C, class T, class W>
__device__ __forceinline__ void weigh_chosen(W* w, const T* s, const i32* indices, const i32* count, i64 rows, i32 chunks) {
    constexpr int K = C::slots, PITCH_ROW = slot_pitch(C::threads, K);
    extern __shared__ __align__(16) u8 shared[];
    float *score = reinterpret_cast<float*>(shared), *weight = score + K * PITCH_ROW;
    i64 row0 = (i64)blockIdx.x * C::threads;
    int n = (int)min_of((i64)C::threads, rows - row0);
    for (int i = threadIdx.x; i < n * K; i += C::threads) {
        i64 row = row0 + i / K;
        if (i % K < count[row]) score[i % K * PITCH_ROW + i / K] = to_f32(s[row * chunks + indices[row * K + i % K]]);
        // MUT weigh_row: if (i % K < count[row]) score[i % K * PITCH_ROW + i / K] = to_f32(s[row0 * chunks + indices[row * K + i % K]]);
    }
    __syncthreads();
    if (threadIdx.x < n) weigh<C::rule>(weight + threadIdx.x, score + threadIdx.x, PITCH_ROW, count[row0 + threadIdx.x]);
    __syncthreads();
    for (int i = threadIdx.x; i < n * K; i += C::threads)
        w[row0 * K + i] = from_f32<W>(i % K < count[row0 + i / K] ? weight[i % K * PITCH_ROW + i / K] : unfilled<C::rule>());
}

// y [rows, chunks] = 0, and at what was chosen the slots' ds [rows, K], in order.  A warp per row.  C says: slots, warps.
template <class C, class T>
__device__ __forceinline__ void scatter_slots(T* y, const float* ds, const i32* indices, const i32* count, i64 rows, i32 chunks) {
    constexpr int K = C::slots;
    i64 row = (i64)blockIdx.x * C::warps + warp_id();
    if (row >= rows) return;
    for (int c = lane_id(); c < chunks; c += 32) y[row * chunks + c] = from_f32<T>(0.f);
    __syncwarp();
    // Units that were chosen twice get both.
    if (lane_id() == 0)
        for (int k = 0; k < count[row]; k++) {
            T* to = y + row * chunks + indices[row * K + k];
            float x = ds[row * K + k];
            for (int j = 0; j < k; j++) x += indices[row * K + j] == indices[row * K + k] ? ds[row * K + j] : 0.f;
            *to = from_f32<T>(x);
        }
}

}  // namespace rambac
