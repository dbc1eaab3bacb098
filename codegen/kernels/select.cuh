// Which chunks a token attends to (op `selection`): scores, causal mask, the K best, their order and weights in one kernel.
//
//   score[t, c] = scale · q[t]·landmark[c] for the chunks complete before token start + t;  the K best, ties to the smaller
//   chunk, latest or best first;  weights by stick breaking, softmax, sigmoid or 1
//
// A block owns ROWS tokens of one head and walks the visible landmarks, TILE at a time; scores never leave it:
//
//              landmarks  TILE x 128 B  ┐ stages of cp.async along r         scores [ROWS, 64] in shared memory,
//   q  ROWS x 128 B                     ┘ → 8 warps (4 x 2) by mma, or   →   swizzled; a thread per row rejects against its
//                                           2 warpgroups by wgmma            K-th best and inserts the rest
//
// A candidate is a u64: the score's bits in an order that integers keep, then the complement of the chunk, so that one
// comparison settles ties.  Where tokens are few and chunks many, blocks share the chunks (`select_part`) and their bests are
// merged (`select_merge`).  Memory O(L·K).  Traffic: landmarks once per block, q once per tile of landmarks, both from L2.
#pragma once
#include "pages.cuh"
#include "wgmma.cuh"

namespace rambac {

enum class Weigh { STICK_BREAKING, SOFTMAX, SIGMOID, ONE, LOGIT };
enum class Order { RECENT, SCORE };

// Keeps order: greater floats are greater integers.  (-0 would be below +0: a candidate's score has none.)
__device__ __forceinline__ u32 ordered(float x) {
    u32 b = __float_as_uint(x);
    return b >> 31 ? ~b : b | 0x80000000u;
    // MUT select_negative: return b | 0x80000000u;
}
__device__ __forceinline__ float of_ordered(u32 x) { return __uint_as_float(x >> 31 ? x & 0x7fffffffu : ~x); }
__device__ __forceinline__ u64 candidate(float score, int chunk) { return (u64)ordered(score + 0.f) << 32 | ~(u32)chunk; }
// A candidate in memory: two words.
__device__ __forceinline__ u64 load_key(const i32* at) {
    auto x = load<u32, 2>((const u32*)at);
    return (u64)x[1] << 32 | x[0];
}
__device__ __forceinline__ void store_key(i32* at, u64 key) { store_global(at, Vec<i32, 2>{{(i32)key, (i32)(key >> 32)}}); }
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * LOG2E); }
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + exp_fast(-x)); }
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + LN2 * __log2f(1.f + exp_fast(-fabsf(x))); }

// Weights of `n` scores in slot order, one every `pitch` elements.  (formulas: ir/src/ops/weigh.rs)
template <Weigh RULE> __device__ __forceinline__ void weigh(float* w, const float* s, int pitch, int n) {
    if constexpr (RULE == Weigh::STICK_BREAKING) {
        float used = 0.f;
        for (int i = 0; i < n; i++) {
            used += softplus(s[i * pitch]);
            // MUT select_stick: used += i ? softplus(s[(i - 1) * pitch]) : 0.f;
            w[i * pitch] = exp_fast(s[i * pitch] - used);
        }
    } else if constexpr (RULE == Weigh::SOFTMAX) {
        float top = -3e38f, sum = 0.f;
        for (int i = 0; i < n; i++) top = fmaxf(top, s[i * pitch]);
        for (int i = 0; i < n; i++) sum += exp_fast(s[i * pitch] - top);
        for (int i = 0; i < n; i++) w[i * pitch] = exp_fast(s[i * pitch] - top) / sum;
    } else {
        for (int i = 0; i < n; i++)
            w[i * pitch] = RULE == Weigh::SIGMOID ? sigmoid(s[i * pitch]) : RULE == Weigh::LOGIT ? s[i * pitch] : 1.f;
    }
}
// What an unfilled slot weighs.
template <Weigh RULE> __device__ __forceinline__ float unfilled() { return RULE == Weigh::LOGIT ? -infinity() : 0.f; }

// From one slot of THREADS rows to the next in shared memory: rows are read slot by slot, too, so K begin in banks evenly apart.
__device__ constexpr int slot_pitch(int threads, int slots) { return threads + (slots < 32 ? 32 / slots : 1); }

// C says: T, width (r), chunk, slots (K), scale, order, rule; of the choice: tile (64 or 128 landmarks), stages, warpgroups
// (whether these make the products: 16 bits, Hopper).
template <class C> struct Selecting {
    using T = typename C::T;
    static constexpr int ROWS = 128, THREADS = 256, K = C::slots, PIECE = 16 / sizeof(T);
    // A step along r: 128 bytes of a row.
    static constexpr int DEPTH = 4 * Mma<T>::K, STEPS = (int)ceil_div(C::width, DEPTH), P = C::warpgroups ? DEPTH : PITCH<T, DEPTH>;
    static_assert(C::tile == 64 || C::tile == 128, "a warp has 32 or 64 columns");
    static_assert(C::width % PIECE == 0, "rows are whole 16-byte pieces");
    static_assert(K <= 64, "at most 64 slots");

    struct Search {
        T stage[C::stages][(ROWS + C::tile) * P];
        float scores[ROWS * 64];
    };
    // By slot, of the filled ones.  The pitch keeps apart what neighbouring threads write out.
    static constexpr int PITCH_FOUND = K > 32 ? ROWS : slot_pitch(ROWS, K);
    struct Found {
        i32 index[K][PITCH_FOUND];
        float score[K][PITCH_FOUND], weight[K][PITCH_FOUND];
    };
    union {
        Search search;
        Found found;
    };
    // The pitch keeps apart the slots of neighbouring rows.
    static constexpr int PITCH_BEST = ROWS + (K < 16 ? 16 / K : 1);
    u64 best[K][PITCH_BEST];
    i32 count[ROWS];

    // Column of a score in its row: threads of a warp that read one column of 32 rows, and a fragment of 8 rows by 8
    // columns, each meet every bank once.
    static __device__ __forceinline__ int swizzle(int row, int col) {
        return col ^ ((row & 1) | (row >> 1 & 3) << 3 | (row >> 3 & 3) << 1);
    }
};

// Scores of a tile by mma.sync: a warp has 32 rows and half of the columns.
template <class C> struct WarpScores {
    using S = Selecting<C>;
    using T = typename C::T;
    static constexpr int COLS = C::tile / 2, P = S::P;
    float acc[2][COLS / 8][4];
    int row0 = warp_id() / 2 * 32, col0 = warp_id() % 2 * COLS;

    static __device__ __forceinline__ u32 place(u32 stage, u32 row, u32 piece) { return stage + row * (P * sizeof(T)) + piece * 16; }
    __device__ __forceinline__ void start() { clear(acc[0]), clear(acc[1]); }
    __device__ __forceinline__ void before_barrier() {}
    __device__ __forceinline__ void step(const T* stage) {
        const T *a = stage + row0 * P, *b = stage + (S::ROWS + col0) * P;
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
    __device__ __forceinline__ void finish() {}
    // Calls f(row, column of 64, product) for what the warp has of columns 64·part on.
    template <class F> __device__ __forceinline__ void each(int part, F f) const {
        if (C::tile == 128 && warp_id() % 2 != part) return;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int n = 0; n < COLS / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    f(row0 + 16 * m + lane_id() / 4 + j / 2 * 8, (col0 + 8 * n + lane_id() % 4 * 2 + j % 2) % 64, acc[m][n][j]);
    }
};

// The same by wgmma: a warpgroup has 64 rows and all columns.
template <class C> struct GroupScores {
    using S = Selecting<C>;
    using T = typename C::T;
    float acc[C::tile / 8][4];
    bool fresh;

    static __device__ __forceinline__ u32 place(u32 stage, u32 row, u32 piece) { return Panels<1>(stage).at(row, piece); }
    __device__ __forceinline__ void start() { fresh = true; }
    // The stage before is free when the barrier is passed, and what was copied is seen by wgmma.
    __device__ __forceinline__ void before_barrier() {
        products_wait<0>();
        shared_to_products();
    }
    __device__ __forceinline__ void step(const T* stage) {
        const Panels<64> queries(stage + warp_id() / 4 * 64 * S::P), landmarks(stage + S::ROWS * S::P);
        products_begin();
        // MUT select_unfenced: ;
#pragma unroll
        for (int i = 0; i < 4; i++) Wgmma<T, C::tile, 0, 0>::run(acc, queries.along_rows(i), landmarks.along_rows(i), !fresh || i > 0);
        products_commit();
        fresh = false;
    }
    __device__ __forceinline__ void finish() {
        products_wait<0>();
        in_flight(acc);
    }
    template <class F> __device__ __forceinline__ void each(int part, F f) const {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                f(16 * warp_id() + lane_id() / 4 + j / 2 * 8, 8 * n + lane_id() % 4 * 2 + j % 2, acc[8 * part + n][j]);
    }
};

template <class C, bool GROUPS> struct ScoresOf { using Type = WarpScores<C>; };
template <class C> struct ScoresOf<C, true> { using Type = GroupScores<C>; };

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

// Where a block's tokens are, and what they see.
template <class C> struct SelectRows {
    using T = typename C::T;
    i64 sequence;
    int head, token0, tokens, position;

    __device__ __forceinline__ SelectRows(i64 block, const i32* start, i32 l, i32 h) {
        int blocks = (int)ceil_div(l, Selecting<C>::ROWS);
        token0 = (int)(block % blocks) * Selecting<C>::ROWS, head = (int)(block / blocks % h), sequence = block / blocks / h;
        tokens = min_of(Selecting<C>::ROWS, l - token0), position = start[sequence] + token0;
    }
    // Chunks that end at a row's position or before.
    __device__ __forceinline__ int visible(int row, int chunks) const {
        return max_of(0, min_of(chunks, (position + row) / C::chunk));
        // MUT select_visible: return max_of(0, min_of(chunks, (position + row + 1) / C::chunk));
    }
    // A row's place among those of [N, L, h].
    __device__ __forceinline__ i64 place(int row, i32 l, i32 h) const { return (sequence * l + token0 + row) * h + head; }
};

// Fills s.best, which begins as `before(slot, row)`, from tiles from `tile0` on, before `tile1`, and lets all threads see it.
template <class C, class Landmarks, class Before>
__device__ __forceinline__ void find_best(Selecting<C>& s, const SelectRows<C>& at, const typename C::T* q, i64 q_stride,
                                          const Landmarks& landmarks, i32 l, int tile0, int tile1, const Before& before) {
    using S = Selecting<C>;
    using T = typename C::T;
    using Scores = typename ScoresOf<C, C::warpgroups>::Type;
    constexpr int K = C::slots, ROWS = S::ROWS, PER_ROW = S::DEPTH / S::PIECE, STEP = S::THREADS / PER_ROW;
    int own = threadIdx.x, tokens = at.tokens, visible = own < tokens ? at.visible(own, landmarks.chunks) : 0;
    int most = at.visible(tokens - 1, landmarks.chunks), tiles = min_of(tile1, (int)ceil_div(most, C::tile));
    if (own < ROWS)
        for (int i = 0; i < K; i++) s.best[i][own] = before(i, own);

    // A thread copies one 16-byte piece of every STEP-th row.
    const T* q0 = q + (at.sequence * l + at.token0) * q_stride + at.head * C::width;
    const int first = own / PER_ROW, col = own % PER_ROW * S::PIECE;
    const T* q_at = q0 + first * q_stride + col;
    auto fetch = [&](int step) {
        if (step < tiles * S::STEPS) {
            int chunk = step / S::STEPS * C::tile + first, k = step % S::STEPS * S::DEPTH;
            bool inside = C::width % S::DEPTH == 0 || k + col < C::width;
            u32 to = Scores::place(shared_address(s.search.stage[step % C::stages]), first, own % PER_ROW);
            auto landmark_at = landmarks.row(at.sequence, step / S::STEPS * C::tile) + first * landmarks.stride + at.head * C::width + col + k;
#pragma unroll 2
            for (int i = 0; i < ROWS; i += STEP) {
                bool valid = inside && first + i < tokens;
                copy16_async(to + i * (u32)(S::P * sizeof(T)), valid ? q_at + i * q_stride + k : q0, valid);
            }
#pragma unroll 2
            for (int i = 0; i < C::tile; i += STEP) {
                bool valid = inside && chunk + i < most;
                copy16_wide<T>(to + (ROWS + i) * (u32)(S::P * sizeof(T)), valid ? landmark_at + i * landmarks.stride : landmarks.at, valid);
            }
        }
        copies_commit();
    };

#pragma unroll
    for (int i = 0; i < C::stages - 1; i++) fetch(tile0 * S::STEPS + i);
    int step = tile0 * S::STEPS;
#pragma unroll 1
    for (int tile = tile0; tile < tiles; tile++) {
        Scores products;
        products.start();
#pragma unroll 1
        for (int k = 0; k < S::STEPS; k++, step++) {
            copies_wait<C::stages - 2>();
            // MUT select_wait: copies_wait<C::stages - 1>();
            products.before_barrier();
            __syncthreads();
            fetch(step + C::stages - 1);
            products.step(s.search.stage[step % C::stages]);
        }
        products.finish();
        // Look through 64 columns at a time; the barriers of the next step keep the scores until all have.
#pragma unroll
        for (int part = 0; part < C::tile / 64; part++) {
            if (part > 0) __syncthreads();
            // MUT select_part: ;
            products.each(part, [&](int row, int col, float x) { s.search.scores[row * 64 + S::swizzle(row, col)] = x * C::scale; });
            __syncthreads();
            // MUT select_scores: ;
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
    // MUT select_best: ;
}

// q: rows of h·r at its stride; landmarks: an array [N, C, h, r] or pages; start [N].  Results [N, L, h, K] and count
// [N, L, h].  One block per (sequence, head, ROWS tokens), in this order.
template <class C, class Landmarks, class W>
__device__ __forceinline__ void select_of(i32* indices, i32* count, W* weights, W* scores,
                                          const typename C::T* q, i64 q_stride, const Landmarks& landmarks,
                                          const i32* start, i32 l, i32 h) {
    using S = Selecting<C>;
    constexpr int K = C::slots, ROWS = S::ROWS;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    extern __shared__ __align__(1024) u8 panels[];
    S& s = *reinterpret_cast<S*>(panels);
    SelectRows<C> at(blockIdx.x, start, l, h);
    int own = threadIdx.x;
    find_best<C>(s, at, q, q_stride, landmarks, l, 0, 0x7fffffff, [](int, int) { return (u64)0; });

    // Order, weights.  A warp has all slots of a row, whose ranks differ: so no two write to one bank.
    for (int i = threadIdx.x; i < ROWS * K; i += S::THREADS) {
        int row = i / K, slot = i % K, to = slot;
        u64 key = s.best[slot][row];
        if (key == 0) continue;
        if constexpr (C::order == Order::RECENT) {
            to = 0;
            // The complement of the chunk: the smaller, the later.
            for (int j = 0; j < K; j++) {
                u64 other = s.best[j][row];
                to += other != 0 && (u32)other < (u32)key;
                // MUT select_order: to += other != 0 && (u32)other > (u32)key;
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
    for (int i = threadIdx.x; i < at.tokens * K; i += S::THREADS) {
        int row = i / K, slot = i % K;
        bool filled = slot < s.count[row];
        i64 to = at.place(row, l, h) * K + slot;
        indices[to] = filled ? s.found.index[slot][row] : 0;
        weights[to] = from_f32<W>(filled ? s.found.weight[slot][row] : unfilled<C::rule>());
        scores[to] = from_f32<W>(filled ? s.found.score[slot][row] : 0.f);
    }
    if (own < at.tokens) count[at.place(own, l, h)] = s.count[own];
}
template <class C, class W>
__device__ __forceinline__ void select(i32* indices, i32* count, W* weights, W* scores,
                                       const typename C::T* q, i64 q_stride, const typename C::T* landmarks,
                                       i64 landmark_stride, const i32* start, i32 l, i32 h, i32 chunks) {
    select_of<C>(indices, count, weights, scores, q, q_stride, ArrayLandmarks<C>{landmarks, landmark_stride, chunks}, start, l, h);
}
// table: [N, chunks / LANDMARK_PAGE]; every page is there.
template <class C, class W>
__device__ __forceinline__ void select_paged(i32* indices, i32* count, W* weights, W* scores,
                                             const typename C::T* q, i64 q_stride, const typename C::Stored* landmarks,
                                             i64 landmark_stride, const i32* table, const i32* start, i32 l, i32 h, i32 chunks) {
    select_of<C>(indices, count, weights, scores, q, q_stride, PagedLandmarks<C>{landmarks, landmark_stride, table, nullptr, chunks}, start, l, h);
}

// The best of `tiles_each` tiles of landmarks: keys [segments, N·L·h, K], two words each.  A block per (what `select` has a
// block for, segment).
template <class C, class Landmarks>
__device__ __forceinline__ void select_part_of(i32* keys, const typename C::T* q, i64 q_stride, const Landmarks& landmarks,
                                               const i32* start, i32 l, i32 h, i32 segments, i32 tiles_each, i64 rows) {
    using S = Selecting<C>;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    extern __shared__ __align__(1024) u8 panels[];
    S& s = *reinterpret_cast<S*>(panels);
    SelectRows<C> at(blockIdx.x / segments, start, l, h);
    int segment = blockIdx.x % segments;
    const Window here = landmarks.here(at.sequence);
    constexpr int EACH = LANDMARK_PAGE / C::tile;
    const int tile0 = max_of(segment * tiles_each, here.first * EACH), tile1 = min_of((segment + 1) * tiles_each, here.end * EACH);
    // MUT select_window: const int tile0 = segment * tiles_each, tile1 = (segment + 1) * tiles_each;
    // What was found before stays.
    if (!here.fresh() && tile0 >= tile1) return;
    auto kept = [&](int slot, int row) { return keys + ((segment * rows + at.place(row, l, h)) * C::slots + slot) * 2; };
    find_best<C>(s, at, q, q_stride, landmarks, l, tile0, tile1, [&](int slot, int row) {
        return here.fresh() || row >= at.tokens ? (u64)0 : load_key(kept(slot, row));
    });
    for (int i = threadIdx.x; i < at.tokens * C::slots; i += S::THREADS)
        store_key(kept(i % C::slots, i / C::slots), s.best[i % C::slots][i / C::slots]);
}
template <class C>
__device__ __forceinline__ void select_part(i32* keys, const typename C::T* q, i64 q_stride, const typename C::T* landmarks,
                                            i64 landmark_stride, const i32* start, i32 l, i32 h, i32 chunks, i32 segments,
                                            i32 tiles_each, i64 rows) {
    select_part_of<C>(keys, q, q_stride, ArrayLandmarks<C>{landmarks, landmark_stride, chunks}, start, l, h, segments, tiles_each, rows);
}
template <class C>
__device__ __forceinline__ void select_part_paged(i32* keys, const typename C::T* q, i64 q_stride, const typename C::Stored* landmarks,
                                                  i64 landmark_stride, const i32* table, const i32* window, const i32* start,
                                                  i32 l, i32 h, i32 chunks, i32 segments, i32 tiles_each, i64 rows) {
    select_part_of<C>(keys, q, q_stride, PagedLandmarks<C>{landmarks, landmark_stride, table, window, chunks}, start, l, h, segments, tiles_each, rows);
}

// The best of all segments, their order and weights.  A block of C::threads threads per row.
template <class C, class W>
__device__ __forceinline__ void select_merge(i32* indices, i32* count, W* weights, W* scores,
                                             const i32* keys, i32 segments, i64 rows) {
    constexpr int K = C::slots, WARPS = C::threads / 32;
    __shared__ u64 most[2][WARPS], best[K];
    __shared__ float score[K], weight[K];
    __shared__ i32 index[K];
    const i64 row = blockIdx.x;
    const int own = threadIdx.x;
    u64 before = ~0ull;
    int n = 0;
    // The largest, then the largest below it; no two are equal.
    for (; n < K; n++) {
        u64 mine = 0;
        for (int i = own; i < segments * K; i += C::threads) {
            u64 key = load_key(keys + ((i / K * rows + row) * K + i % K) * 2);
            if (key < before) mine = max_of(mine, key);
        }
#pragma unroll
        for (int d = 16; d > 0; d /= 2) mine = max_of(mine, (u64)__shfl_xor_sync(ALL_LANES, mine, d));
        if (lane_id() == 0) most[n % 2][warp_id()] = mine;
        __syncthreads();
        // MUT select_merged: ;
        before = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) before = max_of(before, most[n % 2][w]);
        if (before == 0) break;
        if (own == 0) best[n] = before;
    }
    __syncthreads();
    for (int i = own; i < n; i += C::threads) {
        int to = i;
        if constexpr (C::order == Order::RECENT) {
            to = 0;
            for (int j = 0; j < n; j++) to += (u32)best[j] < (u32)best[i];
        }
        index[to] = (i32) ~(u32)best[i];
        score[to] = of_ordered((u32)(best[i] >> 32));
    }
    for (int i = n + own; i < K; i += C::threads) index[i] = 0, weight[i] = unfilled<C::rule>(), score[i] = 0.f;
    __syncthreads();
    if (own == 0) weigh<C::rule>(weight, score, 1, n), count[row] = n;
    __syncthreads();
    for (int i = own; i < K; i += C::threads) {
        indices[row * K + i] = index[i];
        weights[row * K + i] = from_f32<W>(weight[i]);
        scores[row * K + i] = from_f32<W>(score[i]);
    }
}

}  // namespace rambac
