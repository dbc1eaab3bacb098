// Attention to selected chunks (op `chunk_attention`, see attend.cuh for the maths) chunk by chunk: the forward's second form.
//
// The inverted index (inverted_index.cuh) gives every chunk the pairs (token, slot) that chose it, cut in slabs.  A block owns
// a slab: the chunk's keys and values stay in shared memory, and a warp takes 16 rows (pair, query head) at a time:
//
//      K, V [chunk, D] once     Q rows of 16/G pairs, gathered     P = w·softmax(Q·Kᵀ) in registers     P·V → slots[token, slot]
//
// A slot's part of o is written by one row alone, in T; `attend_reduce_slots` adds a token's slots in order.  Deterministic.
// Where tokens are few, `attend_pairs` gives every pair a block of its own and needs no index.
// Traffic per pair: G·D of Q (from L2), of the slot written and of it read; K and V once per slab.
#pragma once
#include "chunk_softmax.cuh"
#include "inverted_index.cuh"

namespace rambac {

// C says besides what ChunkSoftmax wants: heads_per_kv (G), slots (K), warps, slab (pairs of one).  Pairs of joint softmaxes weigh 1.  What a block works on:
template <class C> struct SlabWork {
    using T = typename C::T;
    static constexpr int D = C::head_dim, G = C::heads_per_kv, K = C::slots, THREADS = 32 * C::warps;
    // Pairs of the slab as token·K + slot, and their weights.
    struct Pairs {
        u32 entry[C::slab];
        float weight[C::slab];
    };

    i64 list, sequence;
    int kv_head, chunk, pairs, slab;

    // Whether there is work for block `index` of lists · max_slabs.
    __device__ __forceinline__ bool find(i64 index, const i32* offsets, const i32* slab_first, const i32* slabs, i32 h,
                                         i32 chunks, i32 max_slabs) {
        list = index / max_slabs, slab = (int)(index % max_slabs);
        sequence = list / h, kv_head = (int)(list % h);
        if (slab >= slab_first[list * (chunks + 1) + chunks]) return false;
        auto found = load<i32, 2>(slabs + (list * max_slabs + slab) * 2);
        chunk = found[0];
        pairs = min_of(C::slab, offsets[list * (chunks + 1) + chunk + 1] - found[1]);
        // MUT chunks_end: pairs = offsets[list * (chunks + 1) + chunk + 1] - found[1] > 0;
        first = found[1];
        return true;
    }
    template <class W>
    __device__ __forceinline__ void load_pairs(Pairs& to, const i32* entries, const W* weights, i32 l, i32 h) const {
        for (int i = threadIdx.x; i < pairs; i += THREADS) {
            u32 e = entries[list * l * K + first + i];
            to.entry[i] = e;
            if constexpr (C::joint) to.weight[i] = 1.f;
            else to.weight[i] = to_f32(weights[((sequence * l + e / K) * h + kv_head) * K + e % K]);
        }
    }
    // The one pair of row (sequence, token, key head) `row` and a slot.
    __device__ __forceinline__ void take(i64 row, int slot, int chosen, float weight, Pairs& to, i32 l, i32 h) {
        kv_head = (int)(row % h), sequence = row / h / l, list = sequence * h + kv_head;
        chunk = chosen, pairs = 1, slab = 0, first = 0;
        if (threadIdx.x == 0) to.entry[0] = (u32)(row / h % l) * K + slot, to.weight[0] = weight;
    }
    // ROWS rows from row `row0` of the slab on, of an operand [N, L, H·D], by LANES threads, to a tile of `Layout`.
    template <int ROWS, int LANES, class Layout>
    __device__ __forceinline__ void gather(Layout to, const T* from, i64 stride, const Pairs& p, int row0, i32 l, int thread) const {
        constexpr int PIECE = 16 / sizeof(T), PER_ROW = D / PIECE;
        const T* base = from + sequence * l * stride + (i64)kv_head * G * D;
        u32 last = pairs * G - 1;
        auto place = [&](u32 row, u32 piece) {
            u32 r = min_of(row0 + row, last);
            return base + p.entry[r / G] / K * stride + (r % G * D + piece * PIECE);
        };
        using Order = PieceOrder<ROWS, PER_ROW, Layout::ROW_BYTES / 16>;
        if constexpr (LANES % Order::PERIOD == 0 && ROWS * PER_ROW % LANES == 0 && LANES / PER_ROW % Layout::PERIOD == 0) {
            // A thread's rows lie evenly; all are looked up before the first is copied.
            constexpr u32 STEP = LANES / PER_ROW, COUNT = ROWS / STEP;
            u32 row = Order::row(thread), piece = Order::piece(thread), at = to.at(row, piece);
            const T* places[COUNT];
#pragma unroll
            for (u32 i = 0; i < COUNT; i++) places[i] = place(row + i * STEP, piece);
#pragma unroll
            for (u32 i = 0; i < COUNT; i++) copy16_async(at + i * STEP * Layout::ROW_BYTES, places[i], row0 + row + i * STEP <= last);
        } else {
#pragma unroll
            for (u32 i = thread; i < ROWS * PER_ROW; i += LANES)
                copy16_async(to.at(Order::row(i), Order::piece(i)), place(Order::row(i), Order::piece(i)), row0 + Order::row(i) <= last);
        }
    }
    // Where a row's part of a slot is, in [N, L, K · parts, H, D]; null beyond the slab.
    __device__ __forceinline__ T* slot_at(T* slots, const Pairs& p, int row, i32 l, i32 h, int parts, int part) const {
        if (row >= pairs * G) return nullptr;
        // MUT chunks_last: row = min_of(row, C::slab * G - 1);
        T* base = slots + ((sequence * l * K * parts + part) * h + kv_head) * G * D;
        return base + (i64)p.entry[(u32)row / G] * (parts * h * G * D) + (u32)row % G * D;
    }
    // Where a row's numbers are, in [N, L, h, K, G]; -1 beyond the slab.
    __device__ __forceinline__ i64 number_at(const Pairs& p, int row, i32 l, i32 h) const {
        if (row >= pairs * G) return -1;
        u32 e = p.entry[(u32)row / G];
        return ((sequence * l * h + kv_head) * K + (i64)(e / K) * (h * K) + e % K) * G + (u32)row % G;
    }
    // Where a row's numbers are that all of its slots share, in [N, L, h, G]; -1 beyond the slab.
    __device__ __forceinline__ i64 shared_at(const Pairs& p, int row, i32 l, i32 h) const {
        if (row >= pairs * G) return -1;
        return ((sequence * l + p.entry[(u32)row / G] / K) * h + kv_head) * G + (u32)row % G;
    }

private:
    int first;
};

// A tile whose rows are PITCH apart: the address of a row's 16-byte piece, and after how many rows the next is a constant
// away.
template <class T, int D> struct Pitched {
    static constexpr int PERIOD = 1, ROW_BYTES = PITCH<T, D> * sizeof(T);
    u32 tile;
    __device__ __forceinline__ explicit Pitched(const T* tile) : tile(shared_address(tile)) {}
    __device__ __forceinline__ u32 at(u32 row, u32 piece) const { return tile + row * ROW_BYTES + piece * 16; }
};

template <class C> struct ChunkMajor {
    using T = typename C::T;
    static constexpr int P = PITCH<T, C::head_dim>;
    T k[C::chunk * P], v[C::chunk * P];
    T q[C::warps][2][16 * P];
    typename SlabWork<C>::Pairs pairs;
};

// The slab's pairs are in shared memory, or on their way there.
template <class C, class Keys>
__device__ __forceinline__ void attend_slab(ChunkMajor<C>& s, const SlabWork<C>& work, typename C::T* slots,
                                            const typename C::T* q, i64 q_stride, const Keys& keys, i32 l, i32 h) {
    using S = ChunkMajor<C>;
    using T = typename C::T;
    constexpr int D = C::head_dim, G = C::heads_per_kv, PARTS = ChunkSoftmax<C>::PARTS, THREADS = 32 * C::warps;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    i64 row_kv = keys.first(work.sequence, work.chunk);
    copy_rows_wide<THREADS, C::chunk, D, S::P>(s.k, keys.k + row_kv * keys.k_stride + work.kv_head * D, keys.k_stride, C::chunk);
    copy_rows_wide<THREADS, C::chunk, D, S::P>(s.v, keys.v + row_kv * keys.v_stride + work.kv_head * D, keys.v_stride, C::chunk);
    __syncthreads();

    int rows = work.pairs * G, warp = warp_id(), stage = 0;
    auto fetch = [&](int stage, int row) {
        if (row < rows) work.template gather<16, 32>(Pitched<T, D>(s.q[warp][stage]), q, q_stride, s.pairs, row, l, lane_id());
        copies_commit();
    };
    fetch(0, 16 * warp);
    copies_wait<0>();
    __syncthreads();
    for (int row = 16 * warp; row < rows; row += 16 * C::warps, stage ^= 1) {
        fetch(stage ^ 1, row + 16 * C::warps);
        copies_wait<1>();
        // MUT chunks_wait: copies_wait<2>();
        __syncwarp();
        float out[D / 8][4], w[2];
        T* at[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = row + lane_id() / 4 + 8 * i;
            w[i] = r < rows ? s.pairs.weight[r / G] : 0.f;
            at[i] = work.slot_at(slots, s.pairs, r, l, h, 1, 0);
        }
        clear(out);
        ChunkSoftmax<C> softmax;
        softmax.start();
#pragma unroll 1
        for (int part = 0; part < PARTS; part++) {
            int key = part * C::keys * S::P;
            softmax.add(out, w, RowsA<T>{s.q[warp][stage], S::P}, s.k + key, s.v + key);
        }
        softmax.finish(out, w);
        store_d_global(at[0], at[1], out);
        // All lanes have read this stage before it is written again.
        __syncwarp();
    }
}

template <class C, class W>
__device__ __forceinline__ void attend_chunks(typename C::T* slots, const typename C::T* q, i64 q_stride,
                                              const typename C::T* k, i64 k_stride, const typename C::T* v, i64 v_stride,
                                              const W* weights, const i32* entries, const i32* offsets,
                                              const i32* slab_first, const i32* slabs, i32 l, i32 h, i32 chunks,
                                              i32 max_slabs) {
    extern __shared__ __align__(16) u8 shared[];
    ChunkMajor<C>& s = *reinterpret_cast<ChunkMajor<C>*>(shared);
    SlabWork<C> work;
    if (!work.find(blockIdx.x, offsets, slab_first, slabs, h, chunks, max_slabs)) return;
    work.load_pairs(s.pairs, entries, weights, l, h);
    attend_slab<C>(s, work, slots, q, q_stride, ArrayChunks<C>{k, v, k_stride, v_stride, (i64)chunks * C::chunk}, l, h);
}

// One block per (token, key head, slot), in this order.
template <class C, class Keys, class W>
__device__ __forceinline__ void attend_pairs_of(typename C::T* slots, const typename C::T* q, i64 q_stride, const Keys& keys,
                                                const i32* indices, const i32* count, const W* weights, i32 l, i32 h) {
    extern __shared__ __align__(16) u8 shared[];
    ChunkMajor<C>& s = *reinterpret_cast<ChunkMajor<C>*>(shared);
    i64 row = blockIdx.x / C::slots;
    int slot = blockIdx.x % C::slots;
    if (slot >= count[row]) return;
    SlabWork<C> work;
    work.take(row, slot, indices[blockIdx.x], to_f32(weights[blockIdx.x]), s.pairs, l, h);
    attend_slab<C>(s, work, slots, q, q_stride, keys, l, h);
}
template <class C, class W>
__device__ __forceinline__ void attend_pairs(typename C::T* slots, const typename C::T* q, i64 q_stride,
                                             const typename C::T* k, i64 k_stride, const typename C::T* v, i64 v_stride,
                                             const i32* indices, const i32* count, const W* weights, i32 l,
                                             i32 h, i32 chunks) {
    attend_pairs_of<C>(slots, q, q_stride, ArrayChunks<C>{k, v, k_stride, v_stride, (i64)chunks * C::chunk}, indices, count, weights, l, h);
}
// table: [N, chunks].
template <class C, class W>
__device__ __forceinline__ void attend_pairs_paged(typename C::T* slots, const typename C::T* q, i64 q_stride,
                                                   const typename C::Stored* k, i64 k_stride, const typename C::Stored* v,
                                                   i64 v_stride, const i32* table, const i32* indices, const i32* count,
                                                   const W* weights, i32 l, i32 h, i32 chunks) {
    attend_pairs_of<C>(slots, q, q_stride, PagedChunks<C>{k, v, k_stride, v_stride, table, chunks}, indices, count, weights, l, h);
}

// out[N, L, H, D] = the sum of a token's filled slots in [N, L, K · parts, H, D], in order; tokens whose count is below zero are
// passed over.  16 bytes of a row per thread, TIMES of them one after the other.
// C says: T, head_dim, heads_per_kv, slots, parts, times.
template <class C>
__device__ __forceinline__ void attend_reduce_slots(typename C::T* out, i64 stride, const typename C::T* slots,
                                                    const i32* count, i64 tokens, i32 h) {
    using T = typename C::T;
    constexpr int D = C::head_dim, G = C::heads_per_kv, PARTS = C::parts, PIECE = 16 / sizeof(T);
    int width = h * G * D / PIECE;
    auto at_time = [&](int time) { return ((i64)blockIdx.x * C::times + time) * blockDim.x + threadIdx.x; };
    auto count_of = [&](i64 i) { return i / width < tokens ? count[i / width * h + (int)(i % width) * PIECE / (G * D)] : -1; };
    // Where all are passed over, none waits for the one before.
    bool any = false;
#pragma unroll
    for (int time = 0; time < C::times; time++) any |= count_of(at_time(time)) >= 0;
    if (!any) return;
#pragma unroll 1
    for (int time = 0; time < C::times; time++) {
        i64 i = at_time(time), token = i / width;
        int col = (int)(i % width) * PIECE;
        int n = count_of(i) * PARTS;
        // MUT chunks_count: int n = C::slots * PARTS;
        if (n < 0) continue;
        // MUT chunks_others: ;
        const T* at = slots + token * C::slots * PARTS * h * G * D + col;
        float sum[PIECE] = {};
#pragma unroll 4
        for (int k = 0; k < n; k++) {
            auto x = load<T, PIECE>(at + (i64)k * h * G * D);
#pragma unroll
            for (int j = 0; j < PIECE; j++) sum[j] += to_f32(x[j]);
        }
        Vec<T, PIECE> y;
#pragma unroll
        for (int j = 0; j < PIECE; j++) y[j] = from_f32<T>(sum[j]);
        store_global(out + token * stride + col, y);
    }
}

}  // namespace rambac
