// Attention to selected chunks on Hopper where neighbouring tokens choose the same chunks: query tiles with products of a
// warpgroup, and the split that says which tiles are worth it.  The maths are attend.cuh's.
//
// A row is a (token, query head of one key head), token-major; a tile is 64·TILES neighbouring rows.
//
//   attend_split   a warp per tile walks the union of its tokens' chunks and writes it as a list; where tokens share too little
//                  the tile is left to the chunk-major form (attend_chunks_hopper.cuh), which sees no choices of the others
//   attend_tiles   a block of one warpgroup goes through tiles; per chunk of the list, 64 rows at a time:
//                  S = Q·Kᵀ (wgmma)   P = w·softmax(S) in registers   O += P·V (A from registers, sums stay in registers)
//
// One 64 rows' softmax runs while the other's products do; a chunk's K and V, the next tile's Q and the list after that are on
// their way meanwhile, so that a tile begins as the one before ends.  Q, K and V are boxes that one thread asks for
// (tensor_map.cuh): its warp waits until all warps have left the place, the others go on; the block meets once a tile.  Rows whose
// token did not choose a chunk have w = 0.  A chunk is one tile: no rescaling, no workspace but the lists.  Deterministic.
// Traffic: q, o once; K and V once per tile and chunk of its union, from L2.  What limits it: 64 rows of a chunk of 64 by 64 take
// 256 cycles of the tensor cores, as many of exp2, and 200 issues of a warp's 256.  On an H100 they take about 700 with three blocks
// on a multiprocessor: half of the issue slots are empty for want of warps, and registers have no room for more.
#pragma once
#include "attend_chunks.cuh"
#include "tensor_map.cuh"

namespace rambac {

// What C says: T, head_dim, chunk, heads_per_kv (G, divides the rows of a tile), slots (K), scale, off_by_one, tiles, and
// shared_by: how many pairs a chunk of the union must serve.
template <class C> struct Tiling {
    static constexpr int ROWS = 64 * C::tiles, TOKENS = ROWS / C::heads_per_kv;
    static_assert(ROWS % C::heads_per_kv == 0 && TOKENS <= 32, "a lane holds the choices of a token");
    // The most chunks of a union that is shared, even: lists are copied by two.
    static constexpr int MOST = (TOKENS * C::slots / C::shared_by + 1) / 2 * 2;
    static_assert(C::slots * TOKENS % 4 == 0, "weights are copied by four");
};

// Written for tiles by (sequence, key head), a warp each:
//   scattered [N, L, h]          counts, -1 for tokens of shared tiles
//   numbers [tiles]              chunks of the union, 0 of a tile that is not shared
//   unions [tiles, MOST, 2]      a chunk and the mask of tokens that chose it, latest first
//   ordered [tiles, K, TOKENS]   a token's weights in this order, those of a chunk chosen twice together
template <class C, class W>
__device__ __forceinline__ void attend_split(i32* scattered, i32* numbers, i32* unions, float* ordered, const i32* indices,
                                             const i32* count, const W* weights, i64 all_tiles, i32 tiles, i32 l, i32 h) {
    using S = Tiling<C>;
    constexpr int K = C::slots, TOKENS = S::TOKENS;
    i64 tile = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (tile >= all_tiles) return;
    int lane = lane_id(), token = (int)(tile % tiles) * TOKENS + lane;
    bool valid = lane < TOKENS && token < l;
    i64 at = (tile / tiles / h * l + token) * h + tile / tiles % h;
    int n = valid ? count[at] : 0, own[K];
    float w[K];
#pragma unroll
    for (int j = 0; j < K; j++) own[j] = j < n ? indices[at * K + j] : -1, w[j] = j < n ? to_f32(weights[at * K + j]) : 0.f;
    int most = __reduce_add_sync(ALL_LANES, n) / C::shared_by, number = 0, bound = 0x7fffffff, filled = 0, served = 0;
    // After so many chunks a tile that does not share by half as much is given up.
    constexpr int GLANCE = 8;
    ordered += tile * K * TOKENS + lane, unions += tile * S::MOST * 2;
    for (;; number++) {
        // The latest chunk before the last.
        int best = -1;
#pragma unroll
        for (int j = 0; j < K; j++) best = own[j] < bound ? max_of(best, own[j]) : best;
        bound = __reduce_max_sync(ALL_LANES, best);
        if (bound < 0 || number == most || (number == GLANCE && 2 * served < GLANCE * C::shared_by)) break;
        float sum = 0.f;
        bool has = false;
#pragma unroll
        for (int j = 0; j < K; j++)
            if (own[j] == bound) has = true, sum += w[j];
            // MUT tile_twice: if (own[j] == bound) has = true, sum = w[j];
        u32 chosen_by = __ballot_sync(ALL_LANES, has);
        served += __popc(chosen_by);
        if (has) ordered[filled++ * TOKENS] = sum;
        if (lane == 0) store_global(unions + number * 2, Vec<i32, 2>{{bound, (i32)chosen_by}});
    }
    bool shared = bound < 0 && number > 0;
    // Whole pieces are copied.
    if (shared && number % 2 == 1 && lane == 0) store_global(unions + number * 2, Vec<i32, 2>{{0, 0}});
    if (shared && lane < TOKENS)
        for (; filled < K; filled++) ordered[filled * TOKENS] = 0.f;
    if (valid) scattered[at] = shared ? -1 : n;
    if (lane == 0) numbers[tile] = shared ? number : 0;
}

template <class C> struct TileHopper {
    using T = typename C::T;
    static constexpr int D = C::head_dim, KEYS = C::chunk, MOST = Tiling<C>::MOST, TOKENS = Tiling<C>::TOKENS;
    static_assert(sizeof(T) == 2, "16 bits");
    T q[2][C::tiles][64 * D];
    T kv[2][2][KEYS * D];
    struct List {
        i32 unions[MOST][2];
        float weight[C::slots][TOKENS];
        // Where the tile is, and how many of its tokens there are.
        i32 sequence, kv_head, token, tokens;
    } list[3];
    // Queries are there; keys and values are, and are no longer read.
    Mbarrier asked[2], full[2], empty[2];
};

// The greatest of a lane's two rows of a D tile, or zero: as integers, of which three are compared at once.  Where nothing is above
// zero the warp's rows are looked at as numbers.
template <int TILES> __device__ __forceinline__ void row_top(float (&top)[2], const float (&d)[TILES][4]) {
    i32 m[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        m[0] = max_of(max_of(m[0], __float_as_int(d[i][0])), __float_as_int(d[i][1]));
        m[1] = max_of(max_of(m[1], __float_as_int(d[i][2])), __float_as_int(d[i][3]));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        m[i] = max_of(m[i], __shfl_xor_sync(ALL_LANES, m[i], 2));
        m[i] = max_of(m[i], __shfl_xor_sync(ALL_LANES, m[i], 1));
        top[i] = __int_as_float(m[i]);
    }
    if (__any_sync(ALL_LANES, m[0] == 0 || m[1] == 0)) {
        // MUT tile_below: if (false) {
        top[0] = top[1] = -3e38f;
        row_max(top, d);
    }
}

// o: rows of H·head_dim at its stride; q: boxes of 64 rows of [N, L, H, head_dim]; k, v: boxes of a chunk of [N, tokens, h·head_dim].
// Tiles that are not shared are passed over.
template <class C>
__device__ __forceinline__ void attend_tiles(typename C::T* o, i64 o_stride, const TensorMap& q, const TensorMap& k,
                                             const TensorMap& v, const i32* numbers, const i32* unions,
                                             const float* ordered, i32 all_tiles, i32 tiles, i32 l, i32 h) {
    using S = TileHopper<C>;
    using T = typename C::T;
    constexpr int D = S::D, G = C::heads_per_kv, K = C::slots, KEYS = S::KEYS, TILES = C::tiles, ROWS = 64 * TILES;
    constexpr int TOKENS = S::TOKENS, MOST = S::MOST;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    extern __shared__ __align__(1024) u8 panels[];
    S& s = *reinterpret_cast<S*>(panels);
    const int lane = lane_id(), row = warp_id() % 4 * 16 + lane / 4;

    // A shared tile of this block, or -1, and its chunks.
    struct Found {
        int tile, number;
    };
    auto find = [&](int from) {
        int step = gridDim.x;
        for (; from < all_tiles; from += 32 * step) {
            int at = from + lane * step, number = at < all_tiles ? numbers[at] : 0;
            u32 shared = __ballot_sync(ALL_LANES, number > 0);
            if (shared) {
                int first = __ffs(shared) - 1;
                return Found{from + first * step, __shfl_sync(ALL_LANES, number, first)};
            }
        }
        return Found{-1, 0};
    };
    auto fetch_list = [&](int slot, Found f) {
        if (threadIdx.x == 0) {
            const u32 list = (u32)f.tile / tiles;
            const int token = ((u32)f.tile - list * tiles) * TOKENS;
            s.list[slot].sequence = list / h, s.list[slot].kv_head = list % h;
            s.list[slot].token = token, s.list[slot].tokens = min_of(TOKENS, l - token);
        }
        int pieces = (f.number + 1) / 2;
#pragma unroll 1
        for (int i = threadIdx.x; i < pieces + K * TOKENS / 4; i += 128) {
            if (i < pieces) copy16_async(s.list[slot].unions[2 * i], unions + ((i64)f.tile * MOST + 2 * i) * 2);
            else copy16_async(s.list[slot].weight[0] + (i - pieces) * 4, ordered + (i64)f.tile * K * TOKENS + (i - pieces) * 4);
        }
    };
    // One thread asks for copies.  What is used in turns has two places; a place's phases are of parity 0 and 1.
    auto place = [](u32 turn) { return turn % 2; };
    auto parity = [](u32 turn) { return turn / 2 % 2; };
    auto fetch_q = [&](u32 turn, int slot) {
        if (threadIdx.x > 0) return;
        const auto& list = s.list[slot];
        Mbarrier& asked = s.asked[place(turn)];
        asked.expect(sizeof(s.q[0]));
#pragma unroll
        for (int t = 0; t < TILES; t++)
            copy_box(shared_address(s.q[place(turn)][t]), q, asked, 0, list.kv_head * G + 64 * t % G, list.token + 64 * t / G, list.sequence);
    };
    auto fetch_kv = [&](u32 turn, int slot, int i) {
        if (threadIdx.x > 0) return;
        const auto& list = s.list[slot];
        s.empty[place(turn)].wait(parity(turn) ^ 1);
        // MUT tile_empty: ;
        Mbarrier& full = s.full[place(turn)];
        full.expect(sizeof(s.kv[0]));
        // MUT tile_bytes: full.expect(sizeof(s.kv[0]) / 2);
        copy_box(shared_address(s.kv[place(turn)][0]), k, full, list.kv_head * D, list.unions[i][0] * KEYS, list.sequence);
        copy_box(shared_address(s.kv[place(turn)][1]), v, full, list.kv_head * D, list.unions[i][0] * KEYS, list.sequence);
    };

    Found now = find(blockIdx.x), then{-1, 0};
    if (now.tile < 0) return;
    then = find(now.tile + gridDim.x);
    if (threadIdx.x == 0) {
        prefetch_map(q), prefetch_map(k), prefetch_map(v);
        for (int i = 0; i < 2; i++) s.asked[i].init(1), s.full[i].init(1), s.empty[i].init(4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    fetch_list(0, now);
    if (then.tile >= 0) fetch_list(1, then);
    copies_commit();
    copies_wait<0>();
    __syncthreads();
    fetch_q(0, 0);
    fetch_kv(0, 0, 0);
    u32 turn = 0, round = 0;
    int slot = 0;
#pragma unroll 1
    for (;;) {
        Found later{-1, 0};
        if (then.tile >= 0) later = find(then.tile + gridDim.x);
        int next[TILES][2] = {};
        float out[TILES][D / 8][4];
#pragma unroll
        for (int t = 0; t < TILES; t++) clear(out[t]);
#pragma unroll 1
        for (int i = 0; i < now.number; i++, turn++) {
            if (i == 0) {
                copies_wait<0>();
                // All have done with the tile before.
                __syncthreads();
                // MUT tile_barrier: ;
                if (then.tile >= 0) fetch_q(round + 1, (slot + 1) % 3);
                if (later.tile >= 0) fetch_list((slot + 2) % 3, later);
                // MUT tile_list: if (later.tile >= 0) fetch_list((slot + 1) % 3, later);
                copies_commit();
                s.asked[place(round)].wait(parity(round));
                // MUT tile_asked: ;
            }
            s.full[place(turn)].wait(parity(turn));
            // MUT tile_full: ;
            u32 chosen_by = s.list[slot].unions[i][1];
            const Panels<KEYS> keys(s.kv[place(turn)][0]), values(s.kv[place(turn)][1]);
            float logits[TILES][KEYS / 8][4];
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                const Panels<64> queries(s.q[place(round)][t]);
                products_begin();
                // MUT tile_unfenced_q: ;
#pragma unroll
                for (int j = 0; j < D / 16; j++)
                    Wgmma<T, KEYS, 0, 0>::run(logits[t], queries.along_rows(j), keys.along_rows(j), j > 0);
                products_commit();
            }
            // What comes next is fetched while the products run.
            if (i + 1 < now.number) fetch_kv(turn + 1, slot, i + 1);
            else if (then.tile >= 0) fetch_kv(turn + 1, (slot + 1) % 3, 0);
            // MUT tile_then: else if (then.tile >= 0) fetch_kv(turn + 1, slot, 0);
#pragma unroll
            for (int t = 0; t < TILES; t++) {
                float w[2] = {0.f, 0.f}, top[2], sum[2];
#pragma unroll
                for (int j = 0; j < (G % 16 == 0 ? 1 : 2); j++) {
                    int token = (row + 64 * t + 8 * j) / G;
                    if (chosen_by >> token & 1) w[j] = s.list[slot].weight[next[t][j]++][token];
                    // MUT tile_masked: w[j] = s.list[slot].weight[min_of(K - 1, next[t][j]++)][token];
                }
                if (G % 16 == 0) w[1] = w[0];
                products_wait<1>();
                if (TILES == 1) products_wait<0>();
                in_flight(logits[t]);
                row_top(top, logits[t]);
                row_exp2(sum, logits[t], top, ChunkSoftmax<C>::FACTOR);
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    if (C::off_by_one != 0.f) sum[j] = fmaf(C::off_by_one, exp2_fast(-top[j] * ChunkSoftmax<C>::FACTOR), sum[j]);
                    w[j] = __fdividef(w[j], sum[j]);
                }
                row_scale(logits[t], w);
                u32 p[KEYS / 16][4];
#pragma unroll
                for (int j = 0; j < KEYS / 16; j++) a_of_d<T>(p[j], logits[t] + 2 * j);
                products_begin();
                // MUT tile_unfenced: ;
#pragma unroll
                for (int j = 0; j < KEYS / 16; j++) Wgmma<T, D, 0, 1>::run(out[t], p[j], values.along_columns(j), true);
                products_commit();
            }
            products_wait<0>();
#pragma unroll
            for (int t = 0; t < TILES; t++) in_flight(out[t]);
            if (lane == 0) s.empty[place(turn)].arrive();
        }
        const auto& list = s.list[slot];
        T* to = o + ((i64)list.sequence * l + list.token) * o_stride + (i64)list.kv_head * G * D;
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            T* at[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int r = row + 64 * t + 8 * i, token = r / G;
                at[i] = token < list.tokens ? to + token * o_stride + r % G * D : nullptr;
                // MUT tile_rows: at[i] = to + token * o_stride + r % G * D;
            }
            store_d_global(at[0], at[1], out[t]);
        }
        if (then.tile < 0) break;
        now = then, then = later;
        slot = (slot + 1) % 3, round++;
    }
}

}  // namespace rambac
