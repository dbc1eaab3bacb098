// Attention of every token within each chunk that it selected (op `chunk_attention`), neighbouring tokens together:
//
//   o[t, head] = Σ_k w[t, k] · softmax_j(scale · q[t, head]·K[c(t, k), j]) · V[c(t, k)],   off_by_one zero logits more
//
// A row is a (token, query head of one key head), token-major; a block owns ROWS neighbouring rows, a warp 16 of them,
// and walks the union of the chunks that their tokens chose, latest first.  For every G = query heads per key head:
//
//        G = 16: a warp's tile is a token          G = 4: four tokens         G = 1: sixteen tokens
//
//   for the next chunk of the union (a merge of the tokens' sorted choices: a maximum over lanes, no list is built)
//       K, V of the chunk by KEYS keys: the block's stage in shared memory, copied while the one before is worked on
//       warps with a token that chose it: S = Q·Kᵀ, P = w·softmax(S) in registers, O += P·V; rows that did not have w = 0
//
// With `joint` (op `attend`) one softmax goes over all chunks of a row, and its log-sum-exp is a result: the weights are 1.
//
// Deterministic, no workspace.  Traffic: q, o once; K and V once per block and chunk of its union, from L2.
#pragma once
#include "chunk_softmax.cuh"

namespace rambac {

// What C says: T, head_dim, chunk, heads_per_kv (G), slots (K), scale, off_by_one, joint, and of the choice: warps, keys (divides
// chunk).
template <class C> struct QueryTile {
    using T = typename C::T;
    static constexpr int D = C::head_dim, G = C::heads_per_kv, ROWS = 16 * C::warps, THREADS = 32 * C::warps;
    static constexpr int TOKENS = ROWS % G == 0 ? ROWS / G : G % ROWS == 0 ? 1 : (ROWS + G - 2) / G + 1;
    static constexpr int PARTS = C::chunk / C::keys, P = PITCH<T, D>;
    static_assert(TOKENS <= 32, "a lane holds the choices of a token");

    T q[ROWS * P];
    T kv[2][2][C::keys * P];
    // Choices of token t at [rank][t], latest chunk first; those in slot order before that.
    i32 given[C::slots][32];
    i32 chunk[C::slots][32];
    float weight[C::slots][32];
};

// A token's choices in this lane, and the walk over the union of all lanes'.
template <class C> struct Merge {
    const QueryTile<C>& s;
    int filled, next = 0, head;

    __device__ __forceinline__ Merge(const QueryTile<C>& s, int filled) : s(s), filled(filled) { look(); }
    __device__ __forceinline__ void look() { head = next < filled ? s.chunk[next][lane_id()] : -1; }
    // The latest chunk left, -1 if there is none; the weight it has for this lane's token and which lanes chose it.
    __device__ __forceinline__ int pop(float& weight, u32& chosen_by) {
        int chunk = __reduce_max_sync(ALL_LANES, head);
        bool mine = chunk >= 0 && head == chunk;
        weight = 0.f;
        // A chunk chosen twice counts twice.
        while (head == chunk && head >= 0) {
            weight += s.weight[next++][lane_id()];
            // MUT query_twice: weight = s.weight[next++][lane_id()];
            look();
        }
        chosen_by = __ballot_sync(ALL_LANES, mine);
        return chunk;
    }
};

// q, o: rows of H·head_dim at their strides; keys: an array or pages of rows of h·head_dim; indices, weights [N, L, h, K];
// count [N, L, h]; all_rows is L·G; lse [N, L, H] of joint softmaxes, which read no weights.  One block per (sequence, key head,
// ROWS rows), in this order.
template <class C, class Keys, class W, class E>
__device__ __forceinline__ void attend_tile_of(E* lse, typename C::T* o, i64 o_stride, const typename C::T* q, i64 q_stride,
                                               const Keys& keys, const i32* indices, const i32* count,
                                               const W* weights, i32 all_rows, i32 l, i32 h) {
    using S = QueryTile<C>;
    using T = typename C::T;
    constexpr int D = S::D, G = S::G, K = C::slots, PIECE = 16 / sizeof(T);
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    extern __shared__ __align__(16) u8 shared[];
    S& s = *reinterpret_cast<S*>(shared);

    int blocks = (int)ceil_div(all_rows, S::ROWS);
    int block = blockIdx.x % blocks, kv_head = blockIdx.x / blocks % h;
    i64 sequence = blockIdx.x / blocks / h;
    int row0 = block * S::ROWS, rows = min_of(S::ROWS, all_rows - row0), token0 = row0 / G;
    int tokens = (row0 + rows - 1) / G - token0 + 1;
    int lane = lane_id(), warp = warp_id();

    // Setup: Q, choices by rank.
    const T* q0 = q + sequence * l * q_stride + (i64)kv_head * G * D;
    using Order = PieceOrder<S::ROWS, D / PIECE, S::P / PIECE>;
#pragma unroll 4
    for (int i = threadIdx.x; i < S::ROWS * (D / PIECE); i += S::THREADS) {
        int row = Order::row(i), col = Order::piece(i) * PIECE;
        bool valid = row < rows;
        int r = valid ? row0 + row : row0;
        copy16_async(s.q + row * S::P + col, q0 + r / G * q_stride + r % G * D + col, valid);
    }
    copies_commit();
    for (int i = threadIdx.x; i < tokens * K; i += S::THREADS)
        s.given[i % K][i / K] = indices[((sequence * l + token0 + i / K) * h + kv_head) * K + i % K];
    int filled = lane < tokens ? count[(sequence * l + token0 + lane) * h + kv_head] : 0;
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * K; i += S::THREADS) {
        i64 at = (sequence * l + token0 + i / K) * h + kv_head;
        int token = i / K, slot = i % K, n = count[at], mine = s.given[slot][token], rank = 0;
        if (slot >= n) continue;
        for (int j = 0; j < n; j++) {
            int other = s.given[j][token];
            rank += other > mine || (other == mine && j < slot);
            // MUT query_ties: rank += other > mine;
        }
        s.chunk[rank][token] = mine;
        if constexpr (C::joint) s.weight[rank][token] = 1.f;
        else s.weight[rank][token] = to_f32(weights[at * K + slot]);
    }
    __syncthreads();

    // Which lanes hold the tokens of this warp's rows and of this lane's two.
    int mine = row0 + warp * 16, last = min_of(mine + 15, row0 + rows - 1);
    u32 watch = 0;
    if (mine <= last) {
        int from = mine / G - token0, to = last / G - token0;
        watch = (ALL_LANES >> (31 - to)) & (ALL_LANES << from);
        // MUT query_watch: watch = 1u << from;
    }
    int low = min_of((mine + lane / 4) / G - token0, 31), high = min_of((mine + lane / 4 + 8) / G - token0, 31);

    auto fetch = [&](int stage, int chunk, int part) {
        i64 first = keys.first(sequence, chunk) + part * C::keys;
        copy_rows_wide<S::THREADS, C::keys, D, S::P>(s.kv[stage][0], keys.k + first * keys.k_stride + kv_head * D, keys.k_stride, C::keys);
        copy_rows_wide<S::THREADS, C::keys, D, S::P>(s.kv[stage][1], keys.v + first * keys.v_stride + kv_head * D, keys.v_stride, C::keys);
    };

    float out[D / 8][4];
    clear(out);
    Merge<C> merge(s, filled);
    float weight;
    u32 chosen_by;
    int chunk = merge.pop(weight, chosen_by), stage = 0;
    if (chunk >= 0) fetch(0, chunk, 0);
    copies_commit();
    ChunkSoftmax<C> softmax;
    softmax.start();
    while (chunk >= 0) {
        float w[2] = {__shfl_sync(ALL_LANES, weight, low), __shfl_sync(ALL_LANES, weight, high)};
        bool active = chosen_by & watch;
        int following = -1;
        if constexpr (!C::joint) softmax.start();
#pragma unroll 1
        for (int part = 0; part < S::PARTS; part++, stage ^= 1) {
            copies_wait<0>();
            // MUT query_wait: ;
            __syncthreads();
            // MUT query_ready: ;
            if (part + 1 < S::PARTS) {
                fetch(stage ^ 1, chunk, part + 1);
            } else {
                following = merge.pop(weight, chosen_by);
                if (following >= 0) fetch(stage ^ 1, following, 0);
                // MUT query_stage: if (following >= 0) fetch(stage, following, 0);
            }
            copies_commit();
            if (active)
                softmax.add(out, w, RowsA<T>{s.q + warp * 16 * S::P, S::P}, s.kv[stage][0], s.kv[stage][1]);
        }
        if (active && !C::joint) softmax.finish(out, w);
        chunk = following;
    }
    if constexpr (C::joint) {
        float all[2];
        softmax.finish_joint(out, all);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = warp * 16 + lane / 4 + 8 * i, r = row0 + row;
            if (lane % 4 == 0 && row < rows) lse[((sequence * l + r / G) * h + kv_head) * G + r % G] = from_f32<E>(all[i]);
            // MUT query_lse: if (lane % 4 == 0 && row < rows) lse[((sequence * l + r / G) * h + kv_head) * G] = from_f32<E>(all[i]);
        }
    }

    T* o0 = o + sequence * l * o_stride + (i64)kv_head * G * D;
    T* at[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int row = warp * 16 + lane / 4 + 8 * i, r = row0 + row;
        // MUT query_rows: int row = warp * 16 + lane / 4 + 8 * i, r = row0 + (row ^ 8);
        at[i] = row < rows ? o0 + r / G * o_stride + r % G * D : nullptr;
    }
    store_d_global(at[0], at[1], out);
}

template <class C, class W>
__device__ __forceinline__ void attend_query_tile(typename C::T* o, i64 o_stride, const typename C::T* q, i64 q_stride,
                                                  const typename C::T* k, i64 k_stride, const typename C::T* v,
                                                  i64 v_stride, const i32* indices, const i32* count,
                                                  const W* weights, i32 all_rows, i32 l, i32 tokens_kv, i32 h) {
    ArrayChunks<C> keys{k, v, k_stride, v_stride, tokens_kv};
    attend_tile_of<C>((float*)nullptr, o, o_stride, q, q_stride, keys, indices, count, weights, all_rows, l, h);
}
template <class C, class E>
__device__ __forceinline__ void attend_query_tile_joint(E* lse, typename C::T* o, i64 o_stride, const typename C::T* q, i64 q_stride,
                                                        const typename C::T* k, i64 k_stride, const typename C::T* v,
                                                        i64 v_stride, const i32* indices, const i32* count, i32 all_rows, i32 l,
                                                        i32 tokens_kv, i32 h) {
    ArrayChunks<C> keys{k, v, k_stride, v_stride, tokens_kv};
    attend_tile_of<C>(lse, o, o_stride, q, q_stride, keys, indices, count, (const float*)nullptr, all_rows, l, h);
}
// table: [N, chunks].
template <class C, class W>
__device__ __forceinline__ void attend_query_tile_paged(typename C::T* o, i64 o_stride, const typename C::T* q, i64 q_stride,
                                                        const typename C::Stored* k, i64 k_stride, const typename C::Stored* v,
                                                        i64 v_stride, const i32* table, const i32* indices, const i32* count,
                                                        const W* weights, i32 all_rows, i32 l, i32 chunks, i32 h) {
    PagedChunks<C> keys{k, v, k_stride, v_stride, table, chunks};
    attend_tile_of<C>((float*)nullptr, o, o_stride, q, q_stride, keys, indices, count, weights, all_rows, l, h);
}

}  // namespace rambac
