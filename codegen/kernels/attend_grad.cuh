// Gradients of attention to selected chunks (op `chunk_attention_grad`), chunk by chunk in one pass of five products.
//
// With p = softmax(scale·q·kᵀ) of a pair (token, slot) and a query head, and dp = dy·vᵀ:
//
//   δ = Σ_j p_j·dp_j      dw = Σ_heads δ      dv_j += w·p_j·dy      ds_j = scale·w·p_j·(dp_j - δ)      dq += ds·k      dk_j += ds_j·q
//
// A block owns a slab of a chunk's pairs (inverted_index.cuh) and goes through its rows (pair, query head), ROWS at a time:
//
//   warp by rows    S = Q·Kᵀ → p;  dP = dY·Vᵀ;  ds;  dQ = ds·K → slots[token, slot];  w·p and ds to shared memory
//   warp by keys    dV += (w·p)ᵀ·dY;  dK += dsᵀ·Q   in registers until the slab ends → partial[slab]
//
// No atomics: `attend_reduce_slots` adds dq of a token's slots in order, `attend_grad_heads` δ over heads to dw,
// `attend_grad_chunks` a chunk's partial dk and dv in order of its slabs.
//
// Of a joint softmax over all of a row's chunks (op `attend_grad`) the log-sum-exp is known, and δ = dy·o - dlse is a row's, which
// `attend_joint_stats` finds first; nothing is weighed.
//
// A chunk of more keys than a block takes comes in parts: `attend_grad_stats` first finds each row's log2-sum and δ over the
// whole chunk, a block then takes a slab and a part (two products more).
#pragma once
#include "attend_chunks.cuh"

namespace rambac {

// In how many parts the columns go so that every warp has a tile of keys, as far as whole tiles allow.
__device__ constexpr int column_parts(int warps, int key_tiles, int column_tiles) {
    int by = max_of(1, warps / key_tiles);
    while (column_tiles % by) by--;
    return by;
}

template <class C> struct ChunkGrad {
    using T = typename C::T;
    static constexpr int D = C::head_dim, ROWS = 16 * C::warps, P = PITCH<T, D>, PP = PITCH<T, C::keys>;
    // Tiles of 16 keys by columns of D: how the warps share dk and dv.
    static constexpr int KEY_TILES = C::keys / 16;
    static constexpr int COLUMNS = column_parts(C::warps, KEY_TILES, D / 16), WIDTH = D / COLUMNS;
    static constexpr int PER_WARP = (int)ceil_div(KEY_TILES * COLUMNS, C::warps);

    T k[C::keys * P], v[C::keys * P];
    T q[2][ROWS * P], dy[2][ROWS * P];
    T p[ROWS * PP], ds[ROWS * PP];
    typename SlabWork<C>::Pairs pairs;
};

// partial: [lists, max_slabs, PARTS, 2 (dk, dv), keys, D]; delta, and log2_sum of several parts: [N·L·h·K, G], if joint both
// [N·L·h, G].
// One block per (list, slab, part).
template <class C, class W>
__device__ __forceinline__ void attend_grad(typename C::T* slots, float* partial, float* delta, const float* log2_sum,
                                            const typename C::T* q, i64 q_stride, const typename C::T* k, i64 k_stride,
                                            const typename C::T* v, i64 v_stride, const W* weights,
                                            const typename C::T* dy, i64 dy_stride, const i32* entries, const i32* offsets,
                                            const i32* slab_first, const i32* slabs, i32 l, i32 h, i32 chunks,
                                            i32 max_slabs) {
    using S = ChunkGrad<C>;
    using T = typename C::T;
    constexpr int D = C::head_dim, G = C::heads_per_kv, PARTS = C::chunk / C::keys, THREADS = 32 * C::warps;
    constexpr float FACTOR = C::scale * LOG2E;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    extern __shared__ __align__(16) u8 shared[];
    S& s = *reinterpret_cast<S*>(shared);
    SlabWork<C> work;
    int part = blockIdx.x % PARTS;
    if (!work.find(blockIdx.x / PARTS, offsets, slab_first, slabs, h, chunks, max_slabs)) return;

    i64 row_kv = (work.sequence * chunks + work.chunk) * C::chunk + part * C::keys;
    copy_rows_async<THREADS, C::keys, D, S::P>(s.k, k + row_kv * k_stride + work.kv_head * D, k_stride, C::keys);
    copy_rows_async<THREADS, C::keys, D, S::P>(s.v, v + row_kv * v_stride + work.kv_head * D, v_stride, C::keys);
    work.load_pairs(s.pairs, entries, weights, l, h);
    __syncthreads();

    int rows = work.pairs * G, warp = warp_id(), own = 16 * warp, stage = 0;
    auto fetch = [&](int stage, int row) {
        if (row < rows) {
            work.template gather<S::ROWS, THREADS>(Pitched<T, D>(s.q[stage]), q, q_stride, s.pairs, row, l, threadIdx.x);
            work.template gather<S::ROWS, THREADS>(Pitched<T, D>(s.dy[stage]), dy, dy_stride, s.pairs, row, l, threadIdx.x);
        }
        copies_commit();
    };
    float dk[S::PER_WARP][S::WIDTH / 8][4], dv[S::PER_WARP][S::WIDTH / 8][4];
#pragma unroll
    for (int i = 0; i < S::PER_WARP; i++) clear(dk[i]), clear(dv[i]);

    fetch(0, 0);
#pragma unroll 1
    for (int row0 = 0; row0 < rows; row0 += S::ROWS, stage ^= 1) {
        copies_wait<0>();
        __syncthreads();
        fetch(stage ^ 1, row0 + S::ROWS);

        // By rows.
        float p[C::keys / 8][4], ds[C::keys / 8][4], w[2], d[2] = {0.f, 0.f};
        clear(p);
        add_product_nt<T, D, C::keys>(p, RowsA<T>{s.q[stage] + own * S::P, S::P}, s.k, S::P);
        clear(ds);
        add_product_nt<T, D, C::keys>(ds, RowsA<T>{s.dy[stage] + own * S::P, S::P}, s.v, S::P);
        i64 at[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = row0 + own + lane_id() / 4 + 8 * i;
            w[i] = r < rows ? s.pairs.weight[(u32)r / G] : 0.f;
            at[i] = C::joint ? work.shared_at(s.pairs, r, l, h) : work.number_at(s.pairs, r, l, h);
        }
        if constexpr (PARTS == 1 && !C::joint) {
            float top[2] = {-3e38f, -3e38f}, sum[2];
            row_max(top, p);
            row_exp2(sum, p, top, FACTOR);
            const float one[2] = {1.f, 1.f};
            ChunkSoftmax<C>::share(sum, one, sum, top);
            row_scale(p, sum);
#pragma unroll
            for (int i = 0; i < C::keys / 8; i++) {
                d[0] = fmaf(p[i][0], ds[i][0], fmaf(p[i][1], ds[i][1], d[0]));
                d[1] = fmaf(p[i][2], ds[i][2], fmaf(p[i][3], ds[i][3], d[1]));
            }
            d[0] = warp_sum<4>(d[0]), d[1] = warp_sum<4>(d[1]);
            if (lane_id() % 4 == 0) {
                if (at[0] >= 0) delta[at[0]] = d[0];
                if (at[1] >= 0) delta[at[1]] = d[1];
            }
        } else {
            float sum[2] = {0.f, 0.f};
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (at[i] >= 0) d[i] = delta[at[i]], sum[i] = log2_sum[at[i]];
#pragma unroll
            for (int i = 0; i < C::keys / 8; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) p[i][j] = exp2_fast(fmaf(p[i][j], FACTOR, -sum[j / 2]));
        }
        row_scale(p, w);
        // MUT grad_weight: ;
#pragma unroll
        for (int i = 0; i < C::keys / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) ds[i][j] = C::scale * p[i][j] * (ds[i][j] - d[j / 2]);
            // MUT grad_delta: for (int j = 0; j < 4; j++) ds[i][j] = C::scale * p[i][j] * ds[i][j];
        store_d(s.p + own * S::PP, S::PP, p);
        store_d(s.ds + own * S::PP, S::PP, ds);
        float dq[D / 8][4];
        clear(dq);
        add_product_nn<T, C::keys, D>(dq, ProductA<T>{ds}, s.k, S::P);
        T* to[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            to[i] = work.slot_at(slots, s.pairs, row0 + own + lane_id() / 4 + 8 * i, l, h, PARTS, part);
        store_d_global(to[0], to[1], dq);
        __syncthreads();
        // MUT grad_exchanged: ;

        // By keys.
#pragma unroll
        for (int i = 0; i < S::PER_WARP; i++) {
            int tile = warp + i * C::warps, key = tile % S::KEY_TILES * 16, col = tile / S::KEY_TILES * S::WIDTH;
            if (tile >= S::KEY_TILES * S::COLUMNS) continue;
            add_product_nn<T, S::ROWS, S::WIDTH>(dv[i], ColumnsA<T, true>{s.p + key, S::PP}, s.dy[stage] + col, S::P);
            add_product_nn<T, S::ROWS, S::WIDTH>(dk[i], ColumnsA<T, true>{s.ds + key, S::PP}, s.q[stage] + col, S::P);
        }
    }

    float* to = partial + ((work.list * max_slabs + work.slab) * PARTS + part) * 2 * C::keys * D;
#pragma unroll
    for (int i = 0; i < S::PER_WARP; i++) {
        int tile = warp + i * C::warps, key = tile % S::KEY_TILES * 16, col = tile / S::KEY_TILES * S::WIDTH;
        if (tile >= S::KEY_TILES * S::COLUMNS) continue;
        float* at = to + (key + lane_id() / 4) * D + col;
        store_d_global(at, at + 8 * D, dk[i]);
        at += C::keys * D;
        store_d_global(at, at + 8 * D, dv[i]);
    }
}

// log2_sum, delta: [rows] of joint softmaxes with o, dy [tokens, heads, D] at their strides and lse, dlse [rows].  A warp per row.
template <class C, class E>
__device__ __forceinline__ void attend_joint_stats(float* log2_sum, float* delta, const typename C::T* o, i64 o_stride,
                                                   const E* lse, const typename C::T* dy, i64 dy_stride,
                                                   const typename C::T* dlse, i64 rows, i32 heads) {
    i64 row = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (row >= rows) return;
    const typename C::T *a = o + row / heads * o_stride + row % heads * C::head_dim, *b = dy + row / heads * dy_stride + row % heads * C::head_dim;
    float sum = 0.f;
    for (int i = lane_id(); i < C::head_dim; i += 32) sum = fmaf(to_f32(a[i]), to_f32(b[i]), sum);
    sum = warp_sum(sum);
    if (lane_id() == 0) log2_sum[row] = to_f32(lse[row]) * LOG2E, delta[row] = sum - to_f32(dlse[row]);
    // MUT grad_joint: if (lane_id() == 0) log2_sum[row] = to_f32(lse[row]) * LOG2E, delta[row] = sum;
}

template <class C>
__device__ __forceinline__ void attend_grad_joint(typename C::T* slots, float* partial, float* delta, const float* log2_sum,
                                                  const typename C::T* q, i64 q_stride, const typename C::T* k, i64 k_stride,
                                                  const typename C::T* v, i64 v_stride, const typename C::T* dy, i64 dy_stride,
                                                  const i32* entries, const i32* offsets, const i32* slab_first,
                                                  const i32* slabs, i32 l, i32 h, i32 chunks, i32 max_slabs) {
    attend_grad<C>(slots, partial, delta, log2_sum, q, q_stride, k, k_stride, v, v_stride, (const float*)nullptr, dy, dy_stride,
                   entries, offsets, slab_first, slabs, l, h, chunks, max_slabs);
}

// Each row's log2 of its denominator (top included) and δ, over all parts of a chunk.  One block per (list, slab).  C::held keys are
// in shared memory at once: the whole chunk where it fits, so that rows come once; else rows come again for each part of it.
template <class C> struct GradStats {
    using T = typename C::T;
    static constexpr int ROWS = 16 * C::warps, P = PITCH<T, C::head_dim>, SPANS = C::chunk / C::held;
    // Rows that are remembered from one span to the next.
    static constexpr int KEPT = SPANS > 1 ? C::slab * C::heads_per_kv : 1;
    T k[C::held * P], v[C::held * P];
    T q[ROWS * P], dy[ROWS * P];
    typename SlabWork<C>::Pairs pairs;
    float top[KEPT], sum[KEPT], delta[KEPT];
};

template <class C, class W>
__device__ __forceinline__ void attend_grad_stats(float* log2_sum, float* delta, const typename C::T* q, i64 q_stride,
                                                  const typename C::T* k, i64 k_stride, const typename C::T* v, i64 v_stride,
                                                  const W* weights, const typename C::T* dy, i64 dy_stride,
                                                  const i32* entries, const i32* offsets, const i32* slab_first,
                                                  const i32* slabs, i32 l, i32 h, i32 chunks, i32 max_slabs) {
    using S = GradStats<C>;
    using T = typename C::T;
    constexpr int D = C::head_dim, G = C::heads_per_kv, THREADS = 32 * C::warps;
    constexpr float FACTOR = C::scale * LOG2E;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    extern __shared__ __align__(16) u8 shared[];
    S& s = *reinterpret_cast<S*>(shared);
    SlabWork<C> work;
    if (!work.find(blockIdx.x, offsets, slab_first, slabs, h, chunks, max_slabs)) return;
    work.load_pairs(s.pairs, entries, weights, l, h);
    int rows = work.pairs * G, own = 16 * warp_id();
#pragma unroll 1
    for (int span = 0; span < S::SPANS; span++) {
        i64 row_kv = (work.sequence * chunks + work.chunk) * C::chunk + span * C::held;
#pragma unroll 1
        for (int row0 = 0; row0 < rows; row0 += S::ROWS) {
            // Nobody reads the tiles any more, the pairs are there.
            __syncthreads();
            if (row0 == 0) {
                copy_rows_async<THREADS, C::held, D, S::P>(s.k, k + row_kv * k_stride + work.kv_head * D, k_stride, C::held);
                copy_rows_async<THREADS, C::held, D, S::P>(s.v, v + row_kv * v_stride + work.kv_head * D, v_stride, C::held);
            }
            work.template gather<S::ROWS, THREADS>(Pitched<T, D>(s.q), q, q_stride, s.pairs, row0, l, threadIdx.x);
            work.template gather<S::ROWS, THREADS>(Pitched<T, D>(s.dy), dy, dy_stride, s.pairs, row0, l, threadIdx.x);
            copies_commit();
            copies_wait<0>();
            __syncthreads();
            // Of the keys so far: the row's greatest, its sum, and the lane's share of δ.
            float top[2] = {-3e38f, -3e38f}, sum[2] = {0.f, 0.f}, d[2] = {0.f, 0.f};
            int r[2] = {row0 + own + lane_id() / 4, row0 + own + lane_id() / 4 + 8};
            if (span > 0) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (r[i] >= rows) continue;
                    top[i] = s.top[r[i]], sum[i] = s.sum[r[i]];
                    if (lane_id() % 4 == 0) d[i] = s.delta[r[i]];
                }
            }
#pragma unroll 1
            for (int part = 0; part < C::held / C::keys; part++) {
                float p[C::keys / 8][4], dp[C::keys / 8][4], more[2];
                const float before[2] = {top[0], top[1]};
                clear(p);
                add_product_nt<T, D, C::keys>(p, RowsA<T>{s.q + own * S::P, S::P}, s.k + part * C::keys * S::P, S::P);
                clear(dp);
                add_product_nt<T, D, C::keys>(dp, RowsA<T>{s.dy + own * S::P, S::P}, s.v + part * C::keys * S::P, S::P);
                row_max(top, p);
                row_exp2(more, p, top, FACTOR);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float shrink = exp2_fast((before[i] - top[i]) * FACTOR);
                    sum[i] = fmaf(sum[i], shrink, more[i]), d[i] *= shrink;
                    // MUT grad_parts: sum[i] += more[i];
                }
#pragma unroll
                for (int i = 0; i < C::keys / 8; i++) {
                    d[0] = fmaf(p[i][0], dp[i][0], fmaf(p[i][1], dp[i][1], d[0]));
                    d[1] = fmaf(p[i][2], dp[i][2], fmaf(p[i][3], dp[i][3], d[1]));
                }
            }
            d[0] = warp_sum<4>(d[0]), d[1] = warp_sum<4>(d[1]);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (lane_id() % 4 != 0 || r[i] >= rows) continue;
                if (span + 1 < S::SPANS) {
                    s.top[r[i]] = top[i], s.sum[r[i]] = sum[i], s.delta[r[i]] = d[i];
                    // MUT grad_spans: ;
                    continue;
                }
                float all = C::off_by_one == 0.f ? sum[i] : fmaf(C::off_by_one, exp2_fast(-top[i] * FACTOR), sum[i]);
                i64 at = work.number_at(s.pairs, r[i], l, h);
                log2_sum[at] = fmaf(top[i], FACTOR, __log2f(all));
                delta[at] = d[i] / all;
            }
            __syncwarp();
        }
    }
}

// dw[N, L, h, K] = Σ over the G heads of δ, 0 for unfilled slots.  A thread per slot.
template <class C, class W>
__device__ __forceinline__ void attend_grad_heads(W* dw, const float* delta, const i32* count, i64 lists_tokens) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, row = i / C::slots;
    if (row >= lists_tokens) return;
    constexpr int G = C::heads_per_kv, EACH = min_of(4, G & -G);
    float sum = 0.f;
    if ((int)(i % C::slots) < count[row])
#pragma unroll 4
        for (int g = 0; g < G; g += EACH) {
        // MUT grad_heads: for (int g = EACH; g < G; g += EACH) {
            auto x = load<float, EACH>(delta + i * G + g);
#pragma unroll
            for (int j = 0; j < EACH; j++) sum += x[j];
        }
    dw[i] = from_f32<W>(sum);
}

// dk, dv of a chunk: its slabs' partial sums in order.  One block per (list, chunk).
template <class C>
__device__ __forceinline__ void attend_grad_chunks(typename C::T* dk, i64 dk_stride, typename C::T* dv, i64 dv_stride,
                                                   const float* partial, const i32* slab_first, i32 h, i32 chunks,
                                                   i32 max_slabs) {
    using T = typename C::T;
    constexpr int D = C::head_dim, EACH = 4, SIZE = C::chunk * D;
    i64 list = blockIdx.x / chunks, sequence = list / h;
    int chunk = blockIdx.x % chunks, kv_head = (int)(list % h);
    const i32* first = slab_first + list * (chunks + 1) + chunk;
    int from = first[0], to = first[1];
    for (int i = threadIdx.x * EACH; i < 2 * SIZE; i += blockDim.x * EACH) {
        int second = i / SIZE, row = i % SIZE / D, col = i % D;
        const float* at = partial + (((list * max_slabs + from) * (C::chunk / C::keys) + row / C::keys) * 2 + second) * C::keys * D +
                          row % C::keys * D + col;
        float sum[EACH] = {};
#pragma unroll 4
        for (int slab = from; slab < to; slab++, at += 2 * SIZE) {
        // MUT grad_slabs: for (int slab = from + 1; slab < to; slab++, at += 2 * SIZE) {
            auto x = load<float, EACH>(at);
#pragma unroll
            for (int j = 0; j < EACH; j++) sum[j] += x[j];
        }
        Vec<T, EACH> y;
#pragma unroll
        for (int j = 0; j < EACH; j++) y[j] = from_f32<T>(sum[j]);
        i64 r = (sequence * chunks + chunk) * C::chunk + row;
        store_global((second ? dv + r * dv_stride : dk + r * dk_stride) + kv_head * D + col, y);
    }
}

}  // namespace rambac
