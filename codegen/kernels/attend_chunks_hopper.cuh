// Attention to selected chunks chunk by chunk on Hopper: attend_chunks.cuh and attend_grad.cuh with products of warpgroups.
//
// The same order of work: a block owns a slab of a chunk's pairs, keys and values stay in shared memory.  A warpgroup takes 64
// rows (pair, query head) at a time; operands come from shared memory once per 64 rows in place of once per 16:
//
//   forward    S = Q·Kᵀ (wgmma)   P = w·softmax(S) in registers   P·V (A from registers) → slots[token, slot]
//   gradient   S, dP = dY·Vᵀ      p, ds to shared memory          dQ = ds·K → slots;  dV += pᵀ·dY;  dK += dsᵀ·Q
//
// Queries are gathered by cp.async (rows lie anywhere), the next tile's while this one is worked on; warpgroups of a
// multiprocessor hide each other's softmax.  16-bit types, head_dim 64 or 128, chunks of 64 or 128 keys.
#pragma once
#include "attend_grad.cuh"
#include "wgmma.cuh"

namespace rambac {

// C says what ChunkMajor wants; warps are four per warpgroup.
template <class C> struct ChunkMajorHopper {
    using T = typename C::T;
    static constexpr int D = C::head_dim;
    static_assert(sizeof(T) == 2 && C::warps % 4 == 0, "16 bits, whole warpgroups");
    T k[C::chunk * D], v[C::chunk * D];
    T q[C::warps / 4][2][64 * D];
    typename SlabWork<C>::Pairs pairs;
};

template <class C, class W>
__device__ __forceinline__ void attend_chunks_hopper(typename C::T* slots, const typename C::T* q, i64 q_stride,
                                                     const typename C::T* k, i64 k_stride, const typename C::T* v,
                                                     i64 v_stride, const W* weights, const i32* entries,
                                                     const i32* offsets, const i32* slab_first, const i32* slabs, i32 l,
                                                     i32 h, i32 chunks, i32 max_slabs) {
    using S = ChunkMajorHopper<C>;
    using T = typename C::T;
    constexpr int D = C::head_dim, G = C::heads_per_kv, KEYS = C::chunk, THREADS = 32 * C::warps, GROUPS = C::warps / 4;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    extern __shared__ __align__(1024) u8 panels[];
    S& s = *reinterpret_cast<S*>(panels);
    SlabWork<C> work;
    if (!work.find(blockIdx.x, offsets, slab_first, slabs, h, chunks, max_slabs)) return;

    const Panels<KEYS> keys(s.k), values(s.v);
    i64 row_kv = (work.sequence * chunks + work.chunk) * C::chunk;
    copy_panels_async<THREADS, KEYS, D>(keys, k + row_kv * k_stride + work.kv_head * D, k_stride);
    copy_panels_async<THREADS, KEYS, D>(values, v + row_kv * v_stride + work.kv_head * D, v_stride);
    work.load_pairs(s.pairs, entries, weights, l, h);
    __syncthreads();

    int rows = work.pairs * G, group = warp_id() / 4, thread = threadIdx.x % 128, stage = 0;
    auto fetch = [&](int stage, int row) {
        if (row < rows)
            work.template gather<64, 128>(Panels<64>(s.q[group][stage]), q, q_stride, s.pairs, row, l, thread);
        copies_commit();
    };
    fetch(0, 64 * group);
    // Keys and values are all threads' work.
    copies_wait<0>();
    shared_to_products();
    __syncthreads();
#pragma unroll 1
    for (int row0 = 64 * group; row0 < rows; row0 += 64 * GROUPS, stage ^= 1) {
        copies_wait<0>();
        shared_to_products();
        // The group has the tile and has done with the one before, whose place is free.
        warpgroup_sync(group);
        // MUT hopper_ready: ;
        fetch(stage ^ 1, row0 + 64 * GROUPS);

        const Panels<64> queries(s.q[group][stage]);
        float logits[KEYS / 8][4], out[D / 8][4], w[2], top[2] = {-3e38f, -3e38f}, by[2];
        products_begin();
        // MUT hopper_unfenced_q: ;
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            Wgmma<T, KEYS, 0, 0>::run(logits, queries.along_rows(i), keys.along_rows(i), i > 0);
        products_commit();
        T* at[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = row0 + warp_id() % 4 * 16 + lane_id() / 4 + 8 * i;
            w[i] = r < rows ? s.pairs.weight[r / G] : 0.f;
            at[i] = work.slot_at(slots, s.pairs, r, l, h, 1, 0);
        }
        products_wait<0>();
        // MUT hopper_logits: ;
        in_flight(logits);
        row_max(top, logits);
        row_exp2(by, logits, top, ChunkSoftmax<C>::FACTOR);
        ChunkSoftmax<C>::share(by, w, by, top);
        row_scale(logits, by);
        u32 p[KEYS / 16][4];
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) a_of_d<T>(p[i], logits + 2 * i);
        products_begin();
        // MUT hopper_unfenced: ;
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) Wgmma<T, D, 0, 1>::run(out, p[i], values.along_columns(i), i > 0);
        products_commit();
        products_wait<0>();
        in_flight(out);
        store_d_global(at[0], at[1], out);
    }
}

template <class C> struct ChunkGradHopper {
    using T = typename C::T;
    static constexpr int D = C::head_dim;
    static_assert(sizeof(T) == 2 && C::warps == 4 && D == 64 && C::chunk == 64, "one warpgroup, tiles of 64 by 64");
    T k[64 * D], v[64 * D];
    T q[2][64 * D], dy[2][64 * D];
    T p[64 * 64], ds[64 * 64];
    typename SlabWork<C>::Pairs pairs;
};

// As `attend_grad`.
template <class C, class W>
__device__ __forceinline__ void attend_grad_hopper(typename C::T* slots, float* partial, float* delta, const float*,
                                                   const typename C::T* q, i64 q_stride, const typename C::T* k,
                                                   i64 k_stride, const typename C::T* v, i64 v_stride,
                                                   const W* weights, const typename C::T* dy, i64 dy_stride,
                                                   const i32* entries, const i32* offsets, const i32* slab_first,
                                                   const i32* slabs, i32 l, i32 h, i32 chunks, i32 max_slabs) {
    using S = ChunkGradHopper<C>;
    using T = typename C::T;
    constexpr int D = C::head_dim, G = C::heads_per_kv, KEYS = 64;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    extern __shared__ __align__(1024) u8 panels[];
    S& s = *reinterpret_cast<S*>(panels);
    SlabWork<C> work;
    if (!work.find(blockIdx.x, offsets, slab_first, slabs, h, chunks, max_slabs)) return;

    const Panels<KEYS> keys(s.k), values(s.v);
    i64 row_kv = (work.sequence * chunks + work.chunk) * C::chunk;
    copy_panels_async<128, KEYS, D>(keys, k + row_kv * k_stride + work.kv_head * D, k_stride);
    copy_panels_async<128, KEYS, D>(values, v + row_kv * v_stride + work.kv_head * D, v_stride);
    work.load_pairs(s.pairs, entries, weights, l, h);
    __syncthreads();

    int rows = work.pairs * G, own = 16 * warp_id(), stage = 0;
    auto fetch = [&](int stage, int row) {
        if (row < rows) {
            work.template gather<64, 128>(Panels<64>(s.q[stage]), q, q_stride, s.pairs, row, l, threadIdx.x);
            work.template gather<64, 128>(Panels<64>(s.dy[stage]), dy, dy_stride, s.pairs, row, l, threadIdx.x);
        }
        copies_commit();
    };
    // Where the lane's first row of each tile of p goes; ds lies behind p.
    const Panels<64> probabilities(s.p), dlogits(s.ds);
    u32 place[KEYS / 8];
#pragma unroll
    for (int i = 0; i < KEYS / 8; i++) place[i] = probabilities.at(own + lane_id() / 4, i) + lane_id() % 4 * 4;
    float dk[D / 8][4], dv[D / 8][4];
    clear(dk), clear(dv);
    fetch(0, 0);
#pragma unroll 1
    for (int row0 = 0; row0 < rows; row0 += 64, stage ^= 1) {
        copies_wait<0>();
        shared_to_products();
        __syncthreads();
        fetch(stage ^ 1, row0 + 64);

        const Panels<64> queries(s.q[stage]), dys(s.dy[stage]);
        float p[KEYS / 8][4], ds[KEYS / 8][4], w[2], d[2] = {0.f, 0.f}, top[2] = {-3e38f, -3e38f}, by[2];
        products_begin();
        // MUT hopper_unfenced_s: ;
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            Wgmma<T, KEYS, 0, 0>::run(p, queries.along_rows(i), keys.along_rows(i), i > 0);
        products_commit();
#pragma unroll
        for (int i = 0; i < D / 16; i++)
            Wgmma<T, KEYS, 0, 0>::run(ds, dys.along_rows(i), values.along_rows(i), i > 0);
        products_commit();
        i64 at[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = row0 + own + lane_id() / 4 + 8 * i;
            w[i] = r < rows ? s.pairs.weight[(u32)r / G] : 0.f;
            at[i] = work.number_at(s.pairs, r, l, h);
        }
        products_wait<1>();
        in_flight(p);
        row_max(top, p);
        row_exp2(by, p, top, ChunkSoftmax<C>::FACTOR);
        const float one[2] = {1.f, 1.f};
        ChunkSoftmax<C>::share(by, one, by, top);
        row_scale(p, by);
        products_wait<0>();
        in_flight(ds);
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++) {
            d[0] = fmaf(p[i][0], ds[i][0], fmaf(p[i][1], ds[i][1], d[0]));
            d[1] = fmaf(p[i][2], ds[i][2], fmaf(p[i][3], ds[i][3], d[1]));
        }
        d[0] = warp_sum<4>(d[0]), d[1] = warp_sum<4>(d[1]);
        if (lane_id() % 4 == 0) {
            if (at[0] >= 0) delta[at[0]] = d[0];
            if (at[1] >= 0) delta[at[1]] = d[1];
        }
        row_scale(p, w);
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) ds[i][j] = C::scale * p[i][j] * (ds[i][j] - d[j / 2]);
        u32 a[KEYS / 16][4];
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                u32 x = pack2<T>(ds[i][2 * j], ds[i][2 * j + 1]), to = place[i] + 8 * j * Panels<64>::ROW_BYTES;
                a[i / 2][i % 2 * 2 + j] = x;
                store_shared(to, pack2<T>(p[i][2 * j], p[i][2 * j + 1]));
                store_shared(to + sizeof(s.p), x);
            }
        shared_to_products();
        // MUT hopper_exchanged: ;
        __syncthreads();
        // MUT hopper_barrier: ;

        float dq[D / 8][4];
        products_begin();
        // MUT hopper_unfenced_sums: ;
        in_flight(dk), in_flight(dv);
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) Wgmma<T, D, 0, 1>::run(dq, a[i], keys.along_columns(i), i > 0);
        products_commit();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            Wgmma<T, D, 1, 1>::run(dv, probabilities.along_columns(i), dys.along_columns(i), true);
            Wgmma<T, D, 1, 1>::run(dk, dlogits.along_columns(i), queries.along_columns(i), true);
        }
        products_commit();
        T* to[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            to[i] = work.slot_at(slots, s.pairs, row0 + own + lane_id() / 4 + 8 * i, l, h, 1, 0);
        products_wait<1>();
        // MUT hopper_dq: ;
        in_flight(dq);
        store_d_global(to[0], to[1], dq);
        products_wait<0>();
        in_flight(dk), in_flight(dv);
    }

    float* to = partial + (work.list * max_slabs + work.slab) * 2 * KEYS * D + (own + lane_id() / 4) * D;
    store_d_global(to, to + 8 * D, dk);
    store_d_global(to + KEYS * D, to + KEYS * D + 8 * D, dv);
}

}  // namespace rambac
