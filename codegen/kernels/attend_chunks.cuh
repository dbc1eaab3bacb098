// Attention to selected chunks (op `chunk_attention`, see attend.cuh for the maths) chunk by chunk: the forward's second form.
//
// The inverted index (inverted_index.cuh) gives every chunk the pairs (token, slot) that chose it, cut in slabs.  A block owns
// a slab: the chunk's keys and values stay in shared memory, and a warp takes 16 rows (pair, query head) at a time:
//
//      K, V [chunk, D] once     Q rows of 16/G pairs, gathered     P = w·softmax(Q·Kᵀ) in registers     P·V → slots[token, slot]
//
// A slot's part of o is written by one row alone, in T; `attend_reduce_slots` adds a token's slots in order.  Deterministic.
// Traffic per pair: G·D of Q (from L2), of the slot written and of it read; K and V once per slab.
#pragma once
#include "chunk_softmax.cuh"
#include "inverted_index.cuh"

namespace rambac {

// C says besides what ChunkSoftmax wants: heads_per_kv (G), slots (K), warps, slab (pairs of one).  What a block works on:
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
    __device__ __forceinline__ bool find(i64 index, const i32* offsets, const i32* slab_first, const Slab* slabs, i32 h,
                                         i32 chunks, i32 max_slabs) {
        list = index / max_slabs, slab = (int)(index % max_slabs);
        sequence = list / h, kv_head = (int)(list % h);
        if (slab >= slab_first[list * (chunks + 1) + chunks]) return false;
        auto found = load<i32, 2>(&slabs[list * max_slabs + slab].chunk);
        chunk = found[0];
        pairs = min_of(C::slab, offsets[list * (chunks + 1) + chunk + 1] - found[1]);
        first = found[1];
        return true;
    }
    __device__ __forceinline__ void load_pairs(Pairs& to, const u32* entries, const T* weights, i32 l, i32 h) const {
        for (int i = threadIdx.x; i < pairs; i += THREADS) {
            u32 e = entries[list * l * K + first + i];
            to.entry[i] = e;
            to.weight[i] = to_f32(weights[((sequence * l + e / K) * h + kv_head) * K + e % K]);
        }
    }
    // ROWS rows from row `row0` of the slab on, of an operand [N, L, H·D], by LANES threads.
    template <int ROWS, int LANES>
    __device__ __forceinline__ void gather(T* to, const T* from, i64 stride, const Pairs& p, int row0, i32 l, int thread) const {
        constexpr int PIECE = 16 / sizeof(T), PER_ROW = D / PIECE;
        const T* base = from + sequence * l * stride + (i64)kv_head * G * D;
#pragma unroll
        for (int i = thread; i < ROWS * PER_ROW; i += LANES) {
            int row = i / PER_ROW, col = i % PER_ROW * PIECE, r = row0 + row;
            bool valid = r < pairs * G;
            int token = valid ? (int)(p.entry[r / G] / K) : 0;
            copy16_async(to + row * PITCH<T, D> + col, base + token * stride + r % G * D + col, valid);
        }
    }
    // Where a row's part of a slot is, in [N, L, K · parts, H, D]; null beyond the slab.
    __device__ __forceinline__ T* slot_at(T* slots, const Pairs& p, int row, i32 l, i32 h, int parts, int part) const {
        if (row >= pairs * G) return nullptr;
        i64 slot = (sequence * l * K + p.entry[row / G]) * parts + part;
        return slots + ((slot * h + kv_head) * G + row % G) * D;
    }

private:
    int first;
};

template <class C> struct ChunkMajor {
    using T = typename C::T;
    static constexpr int P = PITCH<T, C::head_dim>;
    T k[C::chunk * P], v[C::chunk * P];
    T q[C::warps][2][16 * P];
    typename SlabWork<C>::Pairs pairs;
};

template <class C>
__device__ __forceinline__ void attend_chunks(typename C::T* slots, const typename C::T* q, i64 q_stride,
                                              const typename C::T* k, i64 k_stride, const typename C::T* v, i64 v_stride,
                                              const typename C::T* weights, const u32* entries, const i32* offsets,
                                              const i32* slab_first, const Slab* slabs, i32 l, i32 h, i32 chunks,
                                              i32 max_slabs) {
    using S = ChunkMajor<C>;
    using T = typename C::T;
    constexpr int D = C::head_dim, G = C::heads_per_kv, PARTS = ChunkSoftmax<C>::PARTS, THREADS = 32 * C::warps;
    extern __shared__ __align__(16) u8 shared[];
    S& s = *reinterpret_cast<S*>(shared);
    SlabWork<C> work;
    if (!work.find(blockIdx.x, offsets, slab_first, slabs, h, chunks, max_slabs)) return;

    i64 row_kv = (work.sequence * chunks + work.chunk) * C::chunk;
    copy_rows_async<THREADS, C::chunk, D, S::P>(s.k, k + row_kv * k_stride + work.kv_head * D, k_stride, C::chunk);
    copy_rows_async<THREADS, C::chunk, D, S::P>(s.v, v + row_kv * v_stride + work.kv_head * D, v_stride, C::chunk);
    work.load_pairs(s.pairs, entries, weights, l, h);
    __syncthreads();

    int rows = work.pairs * G, warp = warp_id(), stage = 0;
    auto fetch = [&](int stage, int row) {
        if (row < rows) work.template gather<16, 32>(s.q[warp][stage], q, q_stride, s.pairs, row, l, lane_id());
        copies_commit();
    };
    fetch(0, 16 * warp);
    copies_wait<0>();
    __syncthreads();
    for (int row = 16 * warp; row < rows; row += 16 * C::warps, stage ^= 1) {
        fetch(stage ^ 1, row + 16 * C::warps);
        copies_wait<1>();
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

// out[N, L, H, D] = the sum of a token's filled slots in [N, L, K · PARTS, H, D], in order.  16 bytes of a row per thread.
template <class C, int PARTS>
__device__ __forceinline__ void attend_reduce_slots(typename C::T* out, i64 stride, const typename C::T* slots,
                                                    const i32* count, i32 tokens, i32 h) {
    using T = typename C::T;
    constexpr int D = C::head_dim, G = C::heads_per_kv, PIECE = 16 / sizeof(T);
    int width = h * G * D / PIECE;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, token = i / width;
    int col = (int)(i % width) * PIECE;
    if (token >= tokens) return;
    int n = count[token * h + col / (G * D)] * PARTS;
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

}  // namespace rambac
