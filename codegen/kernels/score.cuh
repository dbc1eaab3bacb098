// Dense scores of units for tokens (op `score`), their gradients, and the mask alone (op `mask`).
//
//   s[t, head, c] = scale · q[t, head]·landmark[c, head / G]   where start + t >= (c + 1)·chunk, else -∞
//   dq[t, head] = scale · Σ_c ds[t, head, c]·landmark[c]        dlandmark[c] = scale · Σ_{t, heads} ds[t, head, c]·q[t, head]
//
// A block owns a tile of 64 tokens of a head by 64 units, or a tile's rows or columns and walks the other axis; a warp has 16
// rows of it:
//
//   score            q [64, r], landmarks [64, r] → mma → masked → s       a tile that nobody sees is -∞ without a product
//   score_queries    a block per 64 tokens of a query head: ds [64, 64] · landmarks, over all units
//   score_landmarks  a block per 64 units of a key head and part of the tokens: dsᵀ · q → partial[part], added up by reduce.cuh
//
// Gradients skip tiles of ds that are all 0, as those that nobody sees are.  What tiles do not take (a width of no whole steps of
// 16) goes element by element.  Traffic: s or ds once, the other operands once per tile, from L2: bound by the scores.
#pragma once
#include "tile.cuh"

namespace rambac {

constexpr int SCORE_TILE = 64, SCORE_THREADS = 128;

// Whether the token at `pos` sees unit `c` of `chunk` tokens.
__device__ __forceinline__ bool sees(i64 pos, i64 c, int chunk) { return pos >= (c + 1) * chunk; }
// MUT score_sees: __device__ __forceinline__ bool sees(i64 pos, i64 c, int chunk) { return pos > (c + 1) * chunk; }

// C says: T, width (r), heads_per_kv (G), chunk, scale.
template <class C> struct ScoreTile {
    using T = typename C::T;
    static constexpr int P = PITCH<T, C::width>, PD = PITCH<T, SCORE_TILE>;
    T a[SCORE_TILE * P], b[SCORE_TILE * P];
};
template <class C> struct ScoreGradTile {
    using T = typename C::T;
    static constexpr int P = PITCH<T, C::width>, PD = PITCH<T, SCORE_TILE>;
    T rows[SCORE_TILE * P], ds[SCORE_TILE * PD];
};

// s: [N, L, H, C], q: [N, L, H, r], landmarks: [N, C, h, r].
template <class C>
__device__ __forceinline__ void score(typename C::T* s, const typename C::T* q, const typename C::T* landmarks, const i32* start,
                                      i32 l, i32 h, i32 chunks) {
    using S = ScoreTile<C>;
    using T = typename C::T;
    constexpr int R = C::width, G = C::heads_per_kv, P = S::P;
    extern __shared__ __align__(16) u8 shared[];
    S& tile = *reinterpret_cast<S*>(shared);
    int tiles = (int)ceil_div(chunks, SCORE_TILE), heads = h * G;
    i64 rest = blockIdx.x / tiles;
    int c0 = blockIdx.x % tiles * SCORE_TILE, head = (int)(rest % heads);
    rest /= heads;
    int blocks = (int)ceil_div(l, SCORE_TILE), t0 = (int)(rest % blocks) * SCORE_TILE;
    i64 sequence = rest / blocks, begin = start[sequence], r_q = (i64)heads * R, r_l = (i64)h * R;
    float acc[SCORE_TILE / 8][4];
    clear(acc);
    int last = min_of(t0 + SCORE_TILE, l) - 1;
    if (sees(begin + last, c0, C::chunk)) {
        copy_rows_async<SCORE_THREADS, SCORE_TILE, R, P>(tile.a, q + (sequence * l + t0) * r_q + head * R, r_q, l - t0);
        copy_rows_async<SCORE_THREADS, SCORE_TILE, R, P>(tile.b, landmarks + (sequence * chunks + c0) * r_l + head / G * R, r_l, chunks - c0);
        // MUT score_head: copy_rows_async<SCORE_THREADS, SCORE_TILE, R, P>(tile.b, landmarks + (sequence * chunks + c0) * r_l, r_l, chunks - c0);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
        add_product_nt<T, R, SCORE_TILE>(acc, RowsA<T>{tile.a + 16 * warp_id() * P, P}, tile.b, P);
    }
#pragma unroll
    for (int n = 0; n < SCORE_TILE / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int t = t0 + 16 * warp_id() + lane_id() / 4 + j / 2 * 8, c = c0 + 8 * n + lane_id() % 4 * 2 + j % 2;
            if (t >= l || c >= chunks) continue;
            float x = sees(begin + t, c, C::chunk) ? C::scale * acc[n][j] : -infinity();
            s[((sequence * l + t) * heads + head) * chunks + c] = from_f32<T>(x);
        }
}

// A tile [64 tokens, 64 units] of ds to shared memory, zeros beyond; whether anything in it is not 0.
template <class C>
__device__ __forceinline__ bool load_ds(typename C::T* to, const typename C::T* ds, i64 row0, int heads, int t0, int l, int c0, int chunks) {
    using T = typename C::T;
    constexpr int PD = PITCH<T, SCORE_TILE>;
    bool some = false;
    for (int i = threadIdx.x; i < SCORE_TILE * SCORE_TILE; i += SCORE_THREADS) {
        int t = i / SCORE_TILE, c = i % SCORE_TILE;
        float x = t0 + t < l && c0 + c < chunks ? to_f32(ds[(row0 + (i64)t * heads) * chunks + c0 + c]) : 0.f;
        some |= x != 0.f;
        to[t * PD + c] = from_f32<T>(x);
    }
    return __syncthreads_or(some);
}

// One block per (sequence, 64 tokens, query head).
template <class C>
__device__ __forceinline__ void score_queries(typename C::T* dq, const typename C::T* landmarks, const typename C::T* ds, i32 l,
                                              i32 h, i32 chunks) {
    using S = ScoreGradTile<C>;
    using T = typename C::T;
    constexpr int R = C::width, G = C::heads_per_kv, P = S::P;
    extern __shared__ __align__(16) u8 shared[];
    S& tile = *reinterpret_cast<S*>(shared);
    int heads = h * G, head = blockIdx.x % heads, blocks = (int)ceil_div(l, SCORE_TILE);
    i64 rest = blockIdx.x / heads, sequence = rest / blocks, r_l = (i64)h * R;
    int t0 = (int)(rest % blocks) * SCORE_TILE, own = 16 * warp_id();
    i64 row0 = (sequence * l + t0) * heads + head;
    float acc[R / 8][4];
    clear(acc);
    for (int c0 = 0; c0 < chunks; c0 += SCORE_TILE) {
        // All have read what is there.
        __syncthreads();
        if (!load_ds<C>(tile.ds, ds, row0, heads, t0, l, c0, chunks)) continue;
        copy_rows_async<SCORE_THREADS, SCORE_TILE, R, P>(tile.rows, landmarks + (sequence * chunks + c0) * r_l + head / G * R, r_l, chunks - c0);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
        add_product_nn<T, SCORE_TILE, R>(acc, RowsA<T>{tile.ds + own * S::PD, S::PD}, tile.rows, P);
    }
    float by[2] = {C::scale, C::scale};
    row_scale(acc, by);
    T* to[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int t = t0 + own + lane_id() / 4 + 8 * i;
        to[i] = t < l ? dq + ((sequence * l + t) * heads + head) * R : nullptr;
    }
    store_d_global(to[0], to[1], acc);
}

// partial: [parts, N, C, h, r], a part of `part` tokens, whole tiles of them.  One block per (part, sequence, 64 units, key head).
template <class C>
__device__ __forceinline__ void score_landmarks(float* partial, const typename C::T* q, const typename C::T* ds, i64 sequences,
                                                i32 l, i32 h, i32 chunks, i32 part) {
    using S = ScoreGradTile<C>;
    using T = typename C::T;
    constexpr int R = C::width, G = C::heads_per_kv, P = S::P;
    extern __shared__ __align__(16) u8 shared[];
    S& tile = *reinterpret_cast<S*>(shared);
    int heads = h * G, kv_head = blockIdx.x % h, tiles = (int)ceil_div(chunks, SCORE_TILE), own = 16 * warp_id();
    i64 rest = blockIdx.x / h;
    int c0 = (int)(rest % tiles) * SCORE_TILE;
    rest /= tiles;
    i64 sequence = rest % sequences, at = rest / sequences, r_q = (i64)heads * R;
    int first = (int)at * part, end = min_of(first + part, l);
    float acc[R / 8][4];
    clear(acc);
    for (int t0 = first; t0 < end; t0 += SCORE_TILE)
        for (int head = kv_head * G; head < kv_head * G + G; head++) {
        // MUT score_group: for (int head = kv_head * G; head < kv_head * G + 1; head++) {
            i64 row0 = (sequence * l + t0) * heads + head;
            __syncthreads();
            if (!load_ds<C>(tile.ds, ds, row0, heads, t0, end, c0, chunks)) continue;
            copy_rows_async<SCORE_THREADS, SCORE_TILE, R, P>(tile.rows, q + (sequence * l + t0) * r_q + head * R, r_q, end - t0);
            copies_commit();
            copies_wait<0>();
            __syncthreads();
            add_product_nn<T, SCORE_TILE, R>(acc, ColumnsA<T>{tile.ds + own, S::PD}, tile.rows, P);
        }
    float by[2] = {C::scale, C::scale};
    row_scale(acc, by);
    float* to[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int c = c0 + own + lane_id() / 4 + 8 * i;
        to[i] = c < chunks ? partial + (((at * sequences + sequence) * chunks + c) * h + kv_head) * R : nullptr;
    }
    store_d_global(to[0], to[1], acc);
}

// An element a thread, for widths that tiles do not take.
template <class C>
__device__ __forceinline__ void score_any(typename C::T* s, const typename C::T* q, const typename C::T* landmarks, const i32* start,
                                          i64 n, i32 l, i32 heads, i32 h, i32 chunks, i32 r) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    i64 row = i / chunks, token = row / heads, sequence = token / l;
    int c = (int)(i % chunks), kv_head = (int)(row % heads) / (heads / h);
    float x = 0.f;
    const typename C::T* b = landmarks + ((sequence * chunks + c) * h + kv_head) * r;
    bool seen = sees(start[sequence] + token % l, c, C::chunk);
    for (int j = 0; seen && j < r; j++) x = fmaf(to_f32(q[row * r + j]), to_f32(b[j]), x);
    s[i] = from_f32<typename C::T>(seen ? C::scale * x : -infinity());
}
// C says: T, scale.
template <class C>
__device__ __forceinline__ void score_queries_any(typename C::T* dq, const typename C::T* landmarks, const typename C::T* ds, i64 n,
                                                  i32 l, i32 heads, i32 h, i32 chunks, i32 r) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, row = i / r;
    if (i >= n) return;
    int kv_head = (int)(row % heads) / (heads / h);
    const typename C::T* b = landmarks + (row / heads / l * chunks * h + kv_head) * r + i % r;
    float x = 0.f;
    for (int c = 0; c < chunks; c++) x = fmaf(to_f32(ds[row * chunks + c]), to_f32(b[(i64)c * h * r]), x);
    dq[i] = from_f32<typename C::T>(C::scale * x);
}
template <class C>
__device__ __forceinline__ void score_landmarks_any(typename C::T* dlandmarks, const typename C::T* q, const typename C::T* ds, i64 n,
                                                    i32 l, i32 heads, i32 h, i32 chunks, i32 r) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, at = i / r;
    if (i >= n) return;
    int g = heads / h, kv_head = (int)(at % h), c = (int)(at / h % chunks);
    i64 sequence = at / h / chunks;
    float x = 0.f;
    for (i64 t = sequence * l; t < (sequence + 1) * l; t++)
        for (int head = kv_head * g; head < kv_head * g + g; head++)
            x = fmaf(to_f32(ds[(t * heads + head) * chunks + c]), to_f32(q[(t * heads + head) * r + i % r]), x);
    dlandmarks[i] = from_f32<typename C::T>(C::scale * x);
}

// y[N, L, h, C] = s where it is seen.  C says: T, chunk.
template <class C>
__device__ __forceinline__ void mask(typename C::T* y, const typename C::T* s, const i32* start, i64 n, i32 l, i32 h, i32 chunks) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    i64 token = i / chunks / h;
    y[i] = sees(start[token / l] + token % l, i % chunks, C::chunk) ? s[i] : from_f32<typename C::T>(-infinity());
}

}  // namespace rambac
