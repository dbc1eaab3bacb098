// Which chunks a token attends to, where tokens are few and landmarks lie in pages: the scan of a decoding step.
//
// Every row (token, head) goes through the landmarks by itself, as products of vectors: no tile of tokens would be filled.
//
//   segment = tiles_each tiles of TILE landmarks          a block per (row, segment), a warp takes TILE / 8 landmarks
//   C::lanes threads share a landmark, 16 bytes each at a time; the query in registers, in f32
//   after every tile: the K best of what there was and of TILE new candidates, each by the number of those above it
//
// `select_merge` (select.cuh) makes one of a row's segments.  The sequences' lengths are read on the device: a segment that
// nobody sees costs a block that writes zeros.  Traffic: visible landmarks once per row; that limits it.
#pragma once
#include "select.cuh"

namespace rambac {

// C says: T, Stored, width (r), chunk, slots (K), scale, vec (elements of a load), lanes (a power of two from 8 to 32).
template <class C> struct SelectScan {
    static constexpr int THREADS = 256, TILE = 32, K = C::slots, V = C::vec, LANES = C::lanes;
    static constexpr int PIECES = (int)ceil_div(C::width, V * LANES), EACH = TILE / (THREADS / LANES), GROUPS = 32 / LANES;
    static_assert(C::width % V == 0, "rows are whole vectors");
    static_assert(LANES >= 8 && LANES <= 32, "a warp has its landmarks in whole passes");
    static __device__ __forceinline__ int column(int piece) { return (piece * LANES + lane_id() % LANES) * V; }
    static __device__ __forceinline__ bool has(int piece) { return C::width % (V * LANES) == 0 || column(piece) < C::width; }
};

template <class C>
__device__ __forceinline__ void select_scan(i32* keys, const typename C::T* q, i64 q_stride, const typename C::Stored* pool,
                                            i64 stride, const i32* table, const i32* window, const i32* start, i32 l, i32 h,
                                            i32 chunks, i32 segments, i32 tiles_each, i64 rows) {
    using S = SelectScan<C>;
    using E = typename C::Stored;
    constexpr int K = S::K, V = S::V;
    // The best so far, then a tile's candidates; 0 is none.
    __shared__ u64 found[2][K + S::TILE];
    __shared__ __align__(16) float staged[S::PIECES * V * S::LANES];
    const i64 row = blockIdx.x / segments, token = row / h, sequence = token / l;
    const int segment = blockIdx.x % segments, head = (int)(row % h), own = threadIdx.x;
    const int visible = max_of(0, min_of(chunks, (start[sequence] + (int)(token % l)) / C::chunk));
    // MUT scan_visible: const int visible = max_of(0, min_of(chunks, start[sequence] / C::chunk));
    const PagedLandmarks<C> landmarks{pool, stride, table, window, chunks};
    const Window here = landmarks.here(sequence);
    const int tile0 = max_of(segment * tiles_each, here.first * (LANDMARK_PAGE / S::TILE));
    const int tile1 = min_of(min_of((segment + 1) * tiles_each, here.end * (LANDMARK_PAGE / S::TILE)), (int)ceil_div(visible, S::TILE));
    // MUT scan_window: const int tile1 = min_of((segment + 1) * tiles_each, (int)ceil_div(visible, S::TILE));
    // What was found before stays.
    if (!here.fresh() && tile0 >= tile1) return;

    // The query once per block; its lanes then read 16 bytes side by side.
    for (int i = own; i < C::width / 4; i += S::THREADS) {
        float x[4];
        load_f32(x, q + token * q_stride + head * C::width + i * 4);
        const int piece = i * 4 / (V * S::LANES), lane = i * 4 / V % S::LANES, part = i % (V / 4);
        store_f32(staged + ((piece * (V / 4) + part) * S::LANES + lane) * 4, x);
        // MUT scan_part: store_f32(staged + ((piece * (V / 4) + 1 - part) * S::LANES + lane) * 4, x);
    }
    i32* kept = keys + (segment * rows + row) * K * 2;
    for (int i = own; i < 2 * (K + S::TILE); i += S::THREADS) found[0][i] = !here.fresh() && i < K ? load_key(kept + i * 2) : 0;
    __syncthreads();
    float query[S::PIECES][V / 4][4] = {};
#pragma unroll
    for (int p = 0; p < S::PIECES; p++)
#pragma unroll
        for (int part = 0; part < V / 4; part++)
            if (S::has(p)) load_f32(query[p][part], staged + ((p * (V / 4) + part) * S::LANES + lane_id() % S::LANES) * 4);

    int at = 0;
#pragma unroll 1
    for (int tile = tile0; tile < tile1; tile++, at ^= 1) {
        const E* first = landmarks.row(sequence, tile * S::TILE) + head * C::width;
        float sum[S::EACH] = {};
#pragma unroll
        for (int i = 0; i < S::EACH; i++) {
            const int c = (warp_id() * S::EACH + i) * S::GROUPS + lane_id() / S::LANES;
            if (tile * S::TILE + c >= visible) continue;
#pragma unroll
            for (int p = 0; p < S::PIECES; p++) {
                if (!S::has(p)) continue;
                float x[V];
                load_f32(x, first + c * stride + S::column(p));
#pragma unroll
                for (int j = 0; j < V; j++) sum[i] = fmaf(query[p][j / 4][j % 4], x[j], sum[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < S::EACH; i++) {
            const int c = (warp_id() * S::EACH + i) * S::GROUPS + lane_id() / S::LANES, chunk = tile * S::TILE + c;
            const float x = warp_sum<S::LANES>(sum[i]) * C::scale;
            // Neither -inf nor NaN is a choice.
            if (lane_id() % S::LANES == 0) found[at][K + c] = chunk < visible && x > __uint_as_float(0xff800000u) ? candidate(x, chunk) : 0;
            // MUT scan_end: if (lane_id() % S::LANES == 0) found[at][K + c] = candidate(x, chunk);
        }
        __syncthreads();
        // MUT scan_found: ;
        // No two candidates are equal: the number above one is its place.
        for (int i = own; i < K + S::TILE; i += S::THREADS) {
            const u64 mine = found[at][i];
            int above = 0;
            for (int j = 0; j < K + S::TILE; j++) above += found[at][j] > mine;
            if (mine != 0 && above < K) found[at ^ 1][above] = mine;
        }
        // The best are never fewer than before, so nothing old is left above them.
        __syncthreads();
        // MUT scan_kept: ;
    }
    for (int i = own; i < K; i += S::THREADS) store_key(kept + i * 2, found[at][i]);
}

}  // namespace rambac
