// Which chunks a token attends to (op `selection`): scores, causal mask, the K best, their order and weights in one kernel.
//
//   score[t, c] = scale · q[t]·landmark[c] for the chunks complete before token start + t;  the K best, ties to the smaller
//   chunk, latest or best first;  weights by stick breaking, softmax, sigmoid or 1
//
// A block owns ROWS tokens of one head and walks the visible landmarks, TILE at a time; scores never leave it:
//
//              landmarks  TILE x 128 B  ┐ stages of cp.async along r         scores [ROWS, 64] in shared memory,
//   q  ROWS x 128 B                     ┘ → 8 warps (4 x 2), mma         →   swizzled; a thread per row rejects against its
//                                                                            K-th best and inserts the rest
//
// A candidate is a u64: the score's bits in an order that integers keep, then the complement of the chunk, so that one
// comparison settles ties.  Memory O(L·K).  Traffic: landmarks once per block, q once per tile of landmarks, both from L2.
#pragma once
#include "tile.cuh"

namespace rambac {

enum class Weigh { STICK_BREAKING, SOFTMAX, SIGMOID, ONE };
enum class Order { RECENT, SCORE };

// Keeps order: greater floats are greater integers, -0 below +0.
__device__ __forceinline__ u32 ordered(float x) {
    u32 b = __float_as_uint(x);
    return b >> 31 ? ~b : b | 0x80000000u;
}
__device__ __forceinline__ float of_ordered(u32 x) { return __uint_as_float(x >> 31 ? x & 0x7fffffffu : ~x); }
__device__ __forceinline__ u64 candidate(float score, int chunk) { return (u64)ordered(score) << 32 | ~(u32)chunk; }
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * LOG2E); }
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + exp_fast(-x)); }
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + LN2 * __log2f(1.f + exp_fast(-fabsf(x))); }

// Weights of `n` scores in slot order, one every `pitch` elements.  (formulas: ir/src/ops/weigh.rs)
template <Weigh RULE> __device__ __forceinline__ void weigh(float* w, const float* s, int pitch, int n) {
    if constexpr (RULE == Weigh::STICK_BREAKING) {
        float used = 0.f;
        for (int i = 0; i < n; i++) {
            used += softplus(s[i * pitch]);
            w[i * pitch] = exp_fast(s[i * pitch] - used);
        }
    } else if constexpr (RULE == Weigh::SOFTMAX) {
        float top = -3e38f, sum = 0.f;
        for (int i = 0; i < n; i++) top = fmaxf(top, s[i * pitch]);
        for (int i = 0; i < n; i++) sum += exp_fast(s[i * pitch] - top);
        for (int i = 0; i < n; i++) w[i * pitch] = exp_fast(s[i * pitch] - top) / sum;
    } else {
        for (int i = 0; i < n; i++) w[i * pitch] = RULE == Weigh::SIGMOID ? sigmoid(s[i * pitch]) : 1.f;
    }
}

// C says: T, width (r), chunk, slots (K), scale, order, rule; of the choice: tile (64 or 128 landmarks), stages.
template <class C> struct Selecting {
    using T = typename C::T;
    static constexpr int ROWS = 128, THREADS = 256, K = C::slots, PIECE = 16 / sizeof(T);
    // A step along r: 128 bytes of a row.
    static constexpr int DEPTH = 4 * Mma<T>::K, STEPS = (int)ceil_div(C::width, DEPTH), P = PITCH<T, DEPTH>;
    static_assert(C::tile == 64 || C::tile == 128, "a warp has 32 or 64 columns");
    static_assert(C::width % PIECE == 0, "rows are whole 16-byte pieces");
    static_assert(K <= 64, "at most 64 slots");

    struct Search {
        T stage[C::stages][(ROWS + C::tile) * P];
        float scores[ROWS * 64];
    };
    // By slot, of the filled ones.  The pitch keeps apart what neighbouring threads write out.
    static constexpr int PITCH_FOUND = K > 32 ? ROWS : ROWS + 4;
    struct Found {
        i32 index[K][PITCH_FOUND];
        float score[K][PITCH_FOUND], weight[K][PITCH_FOUND];
    };
    union {
        Search search;
        Found found;
    };
    u64 best[K][ROWS];
    i32 count[ROWS];

    // Column of a score in its row: threads of a warp that read one column of 32 rows, and a fragment of 8 rows by 8
    // columns, each meet every bank once.
    static __device__ __forceinline__ int swizzle(int row, int col) {
        return col ^ ((row & 1) | (row >> 1 & 3) << 3 | (row >> 3 & 3) << 1);
    }
};

// The K best so far of a row, best first, for the thread that owns it: in registers while a tile is looked through where
// they are few.
template <class C> struct Best {
    static constexpr int K = C::slots;
    static constexpr bool HELD = K <= 16;
    Selecting<C>& s;
    u64 held[HELD ? K : 1];

    __device__ __forceinline__ Best(Selecting<C>& s, int row) : s(s) {
        if constexpr (HELD)
#pragma unroll
            for (int i = 0; i < K; i++) held[i] = s.best[i][row];
    }
    __device__ __forceinline__ u64 least(int row) const {
        if constexpr (HELD) return held[K - 1];
        else return s.best[K - 1][row];
    }
    __device__ __forceinline__ void insert(u64 key, int row) {
        if constexpr (HELD) {
#pragma unroll
            for (int i = K - 1; i > 0; i--) held[i] = key > held[i - 1] ? held[i - 1] : key > held[i] ? key : held[i];
            held[0] = max_of(held[0], key);
        } else {
            int i = K - 1;
            for (; i > 0 && s.best[i - 1][row] < key; i--) s.best[i][row] = s.best[i - 1][row];
            s.best[i][row] = key;
        }
    }
    __device__ __forceinline__ void keep(int row) {
        if constexpr (HELD)
#pragma unroll
            for (int i = 0; i < K; i++) s.best[i][row] = held[i];
    }
};

// q: rows of h·r at its stride; landmarks [N, C, h, r] at its stride; start [N].  Results [N, L, h, K] and count [N, L, h].
// One block per (sequence, head, ROWS tokens), in this order.
template <class C>
__device__ __forceinline__ void select(i32* indices, i32* count, typename C::T* weights, typename C::T* scores,
                                       const typename C::T* q, i64 q_stride, const typename C::T* landmarks,
                                       i64 landmark_stride, const i32* start, i32 l, i32 h, i32 chunks) {
    using S = Selecting<C>;
    using T = typename C::T;
    constexpr int K = C::slots, ROWS = S::ROWS, P = S::P, COLS = C::tile / 2, PER_ROW = S::DEPTH / S::PIECE;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    extern __shared__ __align__(16) u8 shared[];
    S& s = *reinterpret_cast<S*>(shared);
    int blocks = (int)ceil_div(l, ROWS), token0 = blockIdx.x % blocks * ROWS, head = blockIdx.x / blocks % h;
    i64 sequence = blockIdx.x / blocks / h;
    int tokens = min_of(ROWS, l - token0), lane = lane_id(), warp = warp_id(), row0 = warp / 2 * 32, col0 = warp % 2 * COLS;
    int own = threadIdx.x;
    // Chunks that a row sees: those that end at its position or before.
    int position = start[sequence] + token0;
    int visible = own < tokens ? max_of(0, min_of(chunks, (position + own) / C::chunk)) : 0;
    int most = max_of(0, min_of(chunks, (position + tokens - 1) / C::chunk)), tiles = (int)ceil_div(most, C::tile);
    if (own < ROWS)
        for (int i = 0; i < K; i++) s.best[i][own] = 0;

    const T* q0 = q + (sequence * l + token0) * q_stride + head * C::width;
    const T* landmark0 = landmarks + sequence * chunks * landmark_stride + head * C::width;
    auto fetch = [&](int step) {
        if (step < tiles * S::STEPS) {
            T* to = s.search.stage[step % C::stages];
            int chunk0 = step / S::STEPS * C::tile, k0 = step % S::STEPS * S::DEPTH;
#pragma unroll
            for (int i = threadIdx.x; i < (ROWS + C::tile) * PER_ROW; i += S::THREADS) {
                int row = i / PER_ROW, col = i % PER_ROW * S::PIECE, chunk = chunk0 + row - ROWS;
                bool query = row < ROWS, valid = (query ? row < tokens : chunk < most) && k0 + col < C::width;
                const T* from = query ? q0 + row * q_stride : landmark0 + chunk * landmark_stride;
                copy16_async(to + row * P + col, valid ? from + k0 + col : q0, valid);
            }
        }
        copies_commit();
    };

#pragma unroll
    for (int i = 0; i < C::stages - 1; i++) fetch(i);
    int step = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        float acc[2][COLS / 8][4];
        clear(acc[0]), clear(acc[1]);
#pragma unroll 1
        for (int k = 0; k < S::STEPS; k++, step++) {
            copies_wait<C::stages - 2>();
            __syncthreads();
            fetch(step + C::stages - 1);
            const T* a = s.search.stage[step % C::stages] + row0 * P;
            const T* b = s.search.stage[step % C::stages] + (ROWS + col0) * P;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 fa[2][4];
                load_a(fa[0], a + i * Mma<T>::K, P);
                load_a(fa[1], a + 16 * P + i * Mma<T>::K, P);
#pragma unroll
                for (int n = 0; n < COLS; n += 16) {
                    u32 fb[4];
                    load_b_nk(fb, b + n * P + i * Mma<T>::K, P);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        Mma<T>::run(acc[m][n / 8], fa[m], fb[0], fb[1]);
                        Mma<T>::run(acc[m][n / 8 + 1], fa[m], fb[2], fb[3]);
                    }
                }
            }
        }
        // Look through 64 columns at a time; the barriers of the next step keep the scores until all have.
#pragma unroll
        for (int part = 0; part < C::tile / 64; part++) {
            if (part > 0) __syncthreads();
            if (C::tile == 64 || warp % 2 == part) {
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int n = 0; n < COLS / 8; n++)
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            int row = row0 + 16 * m + lane / 4 + j / 2 * 8;
                            int col = (col0 + 8 * n + lane % 4 * 2 + j % 2) % 64;
                            s.search.scores[row * 64 + S::swizzle(row, col)] = acc[m][n][j] * C::scale;
                        }
            }
            __syncthreads();
            int chunk0 = tile * C::tile + part * 64, n = min_of(64, visible - chunk0);
            if (own < ROWS && n > 0) {
                Best<C> best(s, own);
                u64 least = best.least(own);
#pragma unroll 1
                for (int c = 0; c < n; c++) {
                    float x = s.search.scores[own * 64 + S::swizzle(own, c)];
                    u64 key = candidate(x, chunk0 + c);
                    // Neither -inf nor NaN is a choice.
                    if (key <= least || !(x > __uint_as_float(0xff800000u))) continue;
                    best.insert(key, own);
                    least = best.least(own);
                }
                best.keep(own);
            }
        }
    }
    copies_wait<0>();
    __syncthreads();

    // Order, weights.
    for (int i = threadIdx.x; i < ROWS * K; i += S::THREADS) {
        int row = i % ROWS, slot = i / ROWS, to = slot;
        u64 key = s.best[slot][row];
        if (key == 0) continue;
        if constexpr (C::order == Order::RECENT) {
            to = 0;
            // The complement of the chunk: the smaller, the later.
            for (int j = 0; j < K; j++) {
                u64 other = s.best[j][row];
                to += other != 0 && (u32)other < (u32)key;
            }
        }
        s.found.index[to][row] = (i32) ~(u32)key;
        s.found.score[to][row] = of_ordered((u32)(key >> 32));
    }
    __syncthreads();
    if (own < ROWS) {
        int n = 0;
        while (n < K && s.best[n][own] != 0) n++;
        s.count[own] = n;
        weigh<C::rule>(&s.found.weight[0][own], &s.found.score[0][own], S::PITCH_FOUND, n);
    }
    __syncthreads();
    i64 first = (sequence * l + token0) * h + head;
    for (int i = threadIdx.x; i < tokens * K; i += S::THREADS) {
        int row = i / K, slot = i % K;
        bool filled = slot < s.count[row];
        i64 at = (first + (i64)row * h) * K + slot;
        indices[at] = filled ? s.found.index[slot][row] : 0;
        weights[at] = from_f32<T>(filled ? s.found.weight[slot][row] : 0.f);
        scores[at] = from_f32<T>(filled ? s.found.score[slot][row] : 0.f);
    }
    if (own < tokens) count[first + (i64)own * h] = s.count[own];
}

}  // namespace rambac
