// Softmax attention within a sequence (ops `attention`, `attention_grad`): to all keys, to those up to a token, to a window or the
// own chunk of them, or to keys that stand for units of tokens.
//
//   o = softmax_j(scale · q·k_j)·v      δ = Σ_j p_j·(dy·v_j)      ds_j = scale·p_j·(dy·v_j - δ)
//   dq = Σ_j ds_j·k_j                   dk_j = Σ ds_j·q           dv_j = Σ p_j·dy
//
// Which keys a token sees is a range whose ends only grow from token to token (`Sight`): a block walks from the first key that its
// first token sees to the last that its last one does.  The log-sum-exp can be a result; its gradient is taken from δ.  Of the
// forward, a sequence's queries may stand behind keys that came before (`attention_from`).
//
// A row is a (token, query head of one key head), token-major.  Forward and dq: a block owns 16 rows per warp and walks the
// keys, KEYS at a time, with the output in registers:
//
//      Q rows, once    K, V parts → two stages of cp.async    S = Q·Kᵀ, masked → P    O = O·shrink + P·V
//
// dk and dv: a block owns KEYS keys and walks the rows; p and ds pass through shared memory and warps then split the keys.
// Deterministic, no workspace but two numbers per row.  Traffic: q, o, dy once; of k, v what a block of rows sees, once per block.
#pragma once
#include "tile.cuh"

namespace rambac {

// Below any logit, and no infinity when it is scaled: the largest of none.
constexpr float LOWEST = -1e30f;

// The keys [begin, end) that a token sees, and the tokens [since, until) that see a key.  C says: causal; window, local, unit, each 0
// where there is none (meaning: ir/src/ops/attention.rs).
template <class C> struct Sight {
    static constexpr bool ALL = !C::causal && C::unit == 0, RANGED = C::window > 0 || C::local > 0;
    static constexpr int NEVER = 0x7fffffff;
    static __device__ __forceinline__ int begin(int token) {
        int window = C::window > 0 ? token + 1 - C::window : 0, own = C::local > 0 ? token / max_of(C::local, 1) * C::local : 0;
        return max_of(max_of(window, own), 0);
    }
    static __device__ __forceinline__ int end(int token, int keys) {
        return min_of(keys, C::unit > 0 ? token / max_of(C::unit, 1) : C::causal ? token + 1 : keys);
        // MUT attention_unit: return min_of(keys, C::unit > 0 ? token / max_of(C::unit, 1) + 1 : C::causal ? token + 1 : keys);
    }
    static __device__ __forceinline__ int since(int key) { return C::unit > 0 ? (key + 1) * C::unit : C::causal ? key : 0; }
    static __device__ __forceinline__ int until(int key, int t) {
        int window = C::window > 0 ? key + C::window : NEVER, own = C::local > 0 ? (key / max_of(C::local, 1) + 1) * C::local : NEVER;
        return min_of(t, min_of(window, own));
        // MUT attention_until: return min_of(t, min_of(window, own) - 1);
    }
};

// C says: T, head_dim, heads_per_kv (G), scale, what Sight wants, whole (all keys are one part), warps, keys.
template <class C> struct Attention {
    using T = typename C::T;
    static constexpr int D = C::head_dim, G = C::heads_per_kv, ROWS = 16 * C::warps, THREADS = 32 * C::warps;
    static constexpr int P = PITCH<T, D>, STAGES = C::whole ? 1 : 2, PIECE = 16 / sizeof(T);
    static constexpr float FACTOR = C::scale * LOG2E;
    using See = Sight<C>;

    struct Forward {
        T q[ROWS * P];
        T kv[STAGES][2][C::keys * P];
    };
    struct Rows {
        T q[ROWS * P], dy[ROWS * P];
        T kv[STAGES][2][C::keys * P];
    };
    static constexpr int PP = PITCH<T, C::keys>;
    struct Keys {
        T k[C::keys * P], v[C::keys * P];
        T q[2][ROWS * P], dy[2][ROWS * P];
        T p[ROWS * PP], ds[ROWS * PP];
    };

    // Rows from row0 on of an operand [B, T, H·D] whose key head begins at `from`.
    static __device__ __forceinline__ void gather(T* to, const T* from, i64 stride, int row0, int all_rows) {
        using Order = PieceOrder<ROWS, D / PIECE, P / PIECE>;
#pragma unroll
        for (int i = threadIdx.x; i < ROWS * (D / PIECE); i += THREADS) {
            int row = Order::row(i), col = Order::piece(i) * PIECE, r = row0 + row;
            bool valid = r < all_rows;
            copy16_async(to + row * P + col, from + (valid ? r / G * stride + r % G * D + col : 0), valid);
        }
    }
    // Logits of keys that a row does not see become -inf.  `row` is the lane's first, `key` the part's first.
    static __device__ __forceinline__ void mask(float (&logits)[C::keys / 8][4], int row, int key, int all_keys) {
        if (key + C::keys <= all_keys && See::ALL) return;
        int begin[2] = {See::begin(row / G), See::begin((row + 8) / G)}, end[2] = {See::end(row / G, all_keys), See::end((row + 8) / G, all_keys)};
#pragma unroll
        for (int i = 0; i < C::keys / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int at = key + 8 * i + lane_id() % 4 * 2 + j % 2;
                if (at >= end[j / 2] || (See::RANGED && at < begin[j / 2])) logits[i][j] = __uint_as_float(0xff800000u);
                // MUT attention_mask: if (at > end[j / 2] || (See::RANGED && at < begin[j / 2])) logits[i][j] = __uint_as_float(0xff800000u);
                // MUT attention_begin: if (at >= end[j / 2] || (See::RANGED && at + 1 < begin[j / 2])) logits[i][j] = __uint_as_float(0xff800000u);
            }
    }
    // The first part of keys that some row from `first` on sees, and how many keys rows up to `last` see.
    static __device__ __forceinline__ int from(int first) { return C::whole ? 0 : See::begin(first / G) / C::keys * C::keys; }
    static __device__ __forceinline__ int seen(int last, int all_keys) { return See::end(last / G, all_keys); }
    // Whether the rows first .. last see anything of the part at `key`.
    static __device__ __forceinline__ bool meets(int first, int last, int key, int all_keys) {
        return key < seen(last, all_keys) && key + C::keys > See::begin(first / G);
    }
    // Where the lane's two rows are in [B, T, H·D], null beyond the last.
    static __device__ __forceinline__ void places(T* (&at)[2], T* base, i64 stride, int row, int all_rows) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int r = row + 8 * i;
            at[i] = r < all_rows ? base + r / G * stride + r % G * D : nullptr;
        }
    }
};

// Which sequence, key head and tile a block has.
struct Part {
    i64 sequence;
    int kv_head, tile;
    __device__ __forceinline__ Part(int tiles, int h)
        : sequence(blockIdx.x / tiles / h), kv_head(blockIdx.x / tiles % h), tile(blockIdx.x % tiles) {}
};

// lse: [B, T, H], or null.  start: where a sequence's first query stands among its keys, null: at the first.
template <class C>
__device__ __forceinline__ void attention_of(const i32* start, typename C::T* lse, typename C::T* o, i64 o_stride, const typename C::T* q,
                                             i64 q_stride, const typename C::T* k, i64 k_stride, const typename C::T* v,
                                             i64 v_stride, i32 all_rows, i32 t, i32 all_keys, i32 h) {
    using A = Attention<C>;
    using T = typename C::T;
    using S = typename A::Forward;
    constexpr int D = A::D, P = A::P, KEYS = C::keys;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    extern __shared__ __align__(16) u8 shared[];
    S& s = *reinterpret_cast<S*>(shared);
    Part at((int)ceil_div(all_rows, A::ROWS), h);
    int row0 = at.tile * A::ROWS, own = row0 + 16 * warp_id(), row = own + lane_id() / 4;
    // What rows see is that of rows so many further on.
    int ahead = start ? max_of(start[at.sequence], 0) * A::G : 0;
    // MUT attention_start: int ahead = start ? max_of(start[0], 0) * A::G : 0;
    int from = A::from(row0 + ahead), keys = A::seen(min_of(row0 + A::ROWS, all_rows) - 1 + ahead, all_keys);
    // MUT attention_seen: int from = A::from(row0 + ahead), keys = A::seen(min_of(row0 + A::ROWS, all_rows) - 1, all_keys);
    i64 heads = (i64)at.kv_head * A::G * D, token = at.sequence * t, key_row = at.sequence * all_keys;
    A::gather(s.q, q + token * q_stride + heads, q_stride, row0, all_rows);
    auto fetch = [&](int stage, int key) {
        const T* k0 = k + (key_row + key) * k_stride + at.kv_head * D;
        const T* v0 = v + (key_row + key) * v_stride + at.kv_head * D;
        copy_rows_async<A::THREADS, KEYS, D, P>(s.kv[stage][0], k0, k_stride, all_keys - key);
        copy_rows_async<A::THREADS, KEYS, D, P>(s.kv[stage][1], v0, v_stride, all_keys - key);
    };
    if (from < keys) fetch(0, from);
    copies_commit();
    float out[D / 8][4], top[2] = {LOWEST, LOWEST}, sum[2] = {0.f, 0.f};
    clear(out);
#pragma unroll 1
    for (int key = from, stage = 0; key < keys; key += KEYS, stage ^= A::STAGES - 1) {
        copies_wait<0>();
        // MUT attention_wait: ;
        __syncthreads();
        if (!C::whole && key + KEYS < keys) fetch(stage ^ 1, key + KEYS);
        copies_commit();
        if (!A::meets(own + ahead, own + 15 + ahead, key, all_keys)) continue;
        float logits[KEYS / 8][4], before[2] = {top[0], top[1]}, more[2], shrink[2];
        clear(logits);
        add_product_nt<T, D, KEYS>(logits, RowsA<T>{s.q + 16 * warp_id() * P, P}, s.kv[stage][0], P);
        A::mask(logits, row + ahead, key, all_keys);
        row_max(top, logits);
        row_exp2(more, logits, top, A::FACTOR);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            shrink[i] = exp2_fast((before[i] - top[i]) * A::FACTOR);
            sum[i] = fmaf(sum[i], shrink[i], more[i]);
        }
        if (!C::whole) row_scale(out, shrink);
        // MUT attention_shrink: ;
        add_product_nn<T, KEYS, D>(out, ProductA<T>{logits}, s.kv[stage][1], P);
    }
    copies_wait<0>();
    // Who sees nothing gets 0.
    float by[2] = {sum[0] > 0.f ? 1.f / sum[0] : 0.f, sum[1] > 0.f ? 1.f / sum[1] : 0.f};
    row_scale(out, by);
    T* to[2];
    A::places(to, o + token * o_stride + heads, o_stride, row, all_rows);
    store_d_global(to[0], to[1], out);
    if (lse == nullptr || lane_id() % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int r = row + 8 * i;
        float x = sum[i] > 0.f ? LN2 * fmaf(top[i], A::FACTOR, __log2f(sum[i])) : -infinity();
        if (r < all_rows) lse[((token + r / A::G) * h + at.kv_head) * A::G + r % A::G] = from_f32<T>(x);
    }
}
template <class C>
__device__ __forceinline__ void attention(typename C::T* o, i64 o_stride, const typename C::T* q, i64 q_stride,
                                          const typename C::T* k, i64 k_stride, const typename C::T* v, i64 v_stride,
                                          i32 all_rows, i32 t, i32 all_keys, i32 h) {
    attention_of<C>(nullptr, nullptr, o, o_stride, q, q_stride, k, k_stride, v, v_stride, all_rows, t, all_keys, h);
}
template <class C>
__device__ __forceinline__ void attention_lse(typename C::T* lse, typename C::T* o, i64 o_stride, const typename C::T* q,
                                              i64 q_stride, const typename C::T* k, i64 k_stride, const typename C::T* v,
                                              i64 v_stride, i32 all_rows, i32 t, i32 all_keys, i32 h) {
    attention_of<C>(nullptr, lse, o, o_stride, q, q_stride, k, k_stride, v, v_stride, all_rows, t, all_keys, h);
}
template <class C>
__device__ __forceinline__ void attention_from(const i32* start, typename C::T* o, i64 o_stride, const typename C::T* q, i64 q_stride,
                                               const typename C::T* k, i64 k_stride, const typename C::T* v, i64 v_stride,
                                               i32 all_rows, i32 t, i32 all_keys, i32 h) {
    attention_of<C>(start, nullptr, o, o_stride, q, q_stride, k, k_stride, v, v_stride, all_rows, t, all_keys, h);
}
template <class C>
__device__ __forceinline__ void attention_lse_from(const i32* start, typename C::T* lse, typename C::T* o, i64 o_stride,
                                                   const typename C::T* q, i64 q_stride, const typename C::T* k, i64 k_stride,
                                                   const typename C::T* v, i64 v_stride, i32 all_rows, i32 t, i32 all_keys, i32 h) {
    attention_of<C>(start, lse, o, o_stride, q, q_stride, k, k_stride, v, v_stride, all_rows, t, all_keys, h);
}

// dq, and for the other kernel log2 of each row's denominator and its δ, less dlse if there is one: [B, h, T·G].
template <class C>
__device__ __forceinline__ void attention_grad_rows_of(const typename C::T* dlse, typename C::T* dq, i64 dq_stride, float* log2_sum,
                                                       float* delta, const typename C::T* q, i64 q_stride,
                                                       const typename C::T* k, i64 k_stride, const typename C::T* v,
                                                       i64 v_stride, const typename C::T* dy, i64 dy_stride, i32 all_rows,
                                                       i32 t, i32 all_keys, i32 h) {
    using A = Attention<C>;
    using T = typename C::T;
    using S = typename A::Rows;
    constexpr int D = A::D, P = A::P, KEYS = C::keys;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    extern __shared__ __align__(16) u8 shared[];
    S& s = *reinterpret_cast<S*>(shared);
    Part at((int)ceil_div(all_rows, A::ROWS), h);
    int row0 = at.tile * A::ROWS, own = row0 + 16 * warp_id(), row = own + lane_id() / 4;
    int from = A::from(row0), keys = A::seen(min_of(row0 + A::ROWS, all_rows) - 1, all_keys);
    i64 heads = (i64)at.kv_head * A::G * D, token = at.sequence * t, key_row = at.sequence * all_keys;
    A::gather(s.q, q + token * q_stride + heads, q_stride, row0, all_rows);
    A::gather(s.dy, dy + token * dy_stride + heads, dy_stride, row0, all_rows);
    auto fetch = [&](int stage, int key) {
        const T* k0 = k + (key_row + key) * k_stride + at.kv_head * D;
        const T* v0 = v + (key_row + key) * v_stride + at.kv_head * D;
        copy_rows_async<A::THREADS, KEYS, D, P>(s.kv[stage][0], k0, k_stride, all_keys - key);
        copy_rows_async<A::THREADS, KEYS, D, P>(s.kv[stage][1], v0, v_stride, all_keys - key);
    };
    if (from < keys) fetch(0, from);
    copies_commit();
    float out[D / 8][4], top[2] = {LOWEST, LOWEST}, sum[2] = {0.f, 0.f}, d[2] = {0.f, 0.f}, log2[2], less[2] = {0.f, 0.f};
    clear(out);
    int parts = from < keys ? (int)ceil_div(keys - from, KEYS) : 0, stage = 0;
    // Of what is known so far: log2 of the denominators, and δ.
    auto known = [&](int i) {
        bool some = sum[i] > 0.f;
        log2[i] = some ? fmaf(top[i], A::FACTOR, __log2f(sum[i])) : 3e38f;
        return some ? d[i] / sum[i] - less[i] : 0.f;
    };
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int r = row + 8 * i;
        if (dlse != nullptr && r < all_rows) less[i] = to_f32(dlse[((token + r / A::G) * h + at.kv_head) * A::G + r % A::G]);
    }
    // Twice through the keys: denominators and δ, then dq.  Where all keys are one part, once.
#pragma unroll 1
    for (int i = 0; i < (C::whole ? parts : 2 * parts); i++, stage ^= A::STAGES - 1) {
        int key = from + i % parts * KEYS;
        bool second = C::whole || i >= parts;
        // MUT attention_second: bool second = C::whole || i > parts;
        copies_wait<0>();
        __syncthreads();
        if (!C::whole && i + 1 < 2 * parts) fetch(stage ^ 1, from + (i + 1) % parts * KEYS);
        copies_commit();
        if (!A::meets(own, own + 15, key, all_keys)) continue;
        float p[KEYS / 8][4], dp[KEYS / 8][4];
        clear(p);
        add_product_nt<T, D, KEYS>(p, RowsA<T>{s.q + 16 * warp_id() * P, P}, s.kv[stage][0], P);
        A::mask(p, row, key, all_keys);
        clear(dp);
        add_product_nt<T, D, KEYS>(dp, RowsA<T>{s.dy + 16 * warp_id() * P, P}, s.kv[stage][1], P);
        if (C::whole || !second) {
            float before[2] = {top[0], top[1]}, more[2], dot[2] = {0.f, 0.f};
            row_max(top, p);
            row_exp2(more, p, top, A::FACTOR);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                dot[0] = fmaf(p[n][0], dp[n][0], fmaf(p[n][1], dp[n][1], dot[0]));
                dot[1] = fmaf(p[n][2], dp[n][2], fmaf(p[n][3], dp[n][3], dot[1]));
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                float shrink = exp2_fast((before[n] - top[n]) * A::FACTOR);
                sum[n] = fmaf(sum[n], shrink, more[n]);
                d[n] = fmaf(d[n], shrink, warp_sum<4>(dot[n]));
            }
        }
        if (!second) continue;
        float less_mean[2] = {known(0), known(1)};
        if (C::whole) {
            float by[2] = {sum[0] > 0.f ? 1.f / sum[0] : 0.f, sum[1] > 0.f ? 1.f / sum[1] : 0.f};
            row_scale(p, by);
        } else {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int j = 0; j < 4; j++) p[n][j] = exp2_fast(fmaf(p[n][j], A::FACTOR, -log2[j / 2]));
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) dp[n][j] = C::scale * p[n][j] * (dp[n][j] - less_mean[j / 2]);
        add_product_nn<T, KEYS, D>(out, ProductA<T>{dp}, s.kv[stage][0], P);
    }
    copies_wait<0>();
    T* to[2];
    A::places(to, dq + token * dq_stride + heads, dq_stride, row, all_rows);
    store_d_global(to[0], to[1], out);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int r = row + 8 * i;
        float less_mean = known(i);
        // MUT attention_dlse: float less_mean = known(i) + less[i];
        if (lane_id() % 4 != 0 || r >= all_rows) continue;
        i64 place = (at.sequence * h + at.kv_head) * all_rows + r;
        log2_sum[place] = log2[i];
        delta[place] = less_mean;
    }
}
template <class C>
__device__ __forceinline__ void attention_grad_rows(typename C::T* dq, i64 dq_stride, float* log2_sum, float* delta,
                                                    const typename C::T* q, i64 q_stride, const typename C::T* k,
                                                    i64 k_stride, const typename C::T* v, i64 v_stride,
                                                    const typename C::T* dy, i64 dy_stride, i32 all_rows, i32 t, i32 all_keys,
                                                    i32 h) {
    attention_grad_rows_of<C>(nullptr, dq, dq_stride, log2_sum, delta, q, q_stride, k, k_stride, v, v_stride, dy, dy_stride,
                              all_rows, t, all_keys, h);
}
template <class C>
__device__ __forceinline__ void attention_grad_rows_lse(const typename C::T* dlse, typename C::T* dq, i64 dq_stride, float* log2_sum,
                                                        float* delta, const typename C::T* q, i64 q_stride,
                                                        const typename C::T* k, i64 k_stride, const typename C::T* v,
                                                        i64 v_stride, const typename C::T* dy, i64 dy_stride, i32 all_rows,
                                                        i32 t, i32 all_keys, i32 h) {
    attention_grad_rows_of<C>(dlse, dq, dq_stride, log2_sum, delta, q, q_stride, k, k_stride, v, v_stride, dy, dy_stride, all_rows,
                              t, all_keys, h);
}

// dk and dv.  A block per KEYS keys.
template <class C>
__device__ __forceinline__ void attention_grad_keys(typename C::T* dk, i64 dk_stride, typename C::T* dv, i64 dv_stride,
                                                    const float* log2_sum, const float* delta, const typename C::T* q,
                                                    i64 q_stride, const typename C::T* k, i64 k_stride,
                                                    const typename C::T* v, i64 v_stride, const typename C::T* dy,
                                                    i64 dy_stride, i32 all_rows, i32 t, i32 all_keys, i32 h) {
    using A = Attention<C>;
    using T = typename C::T;
    using S = typename A::Keys;
    constexpr int D = A::D, P = A::P, PP = A::PP, KEYS = C::keys;
    static_assert(sizeof(S) == C::shared, "the launch gives what the layout takes");
    static_assert(KEYS <= A::ROWS, "a warp has a tile of keys");
    extern __shared__ __align__(16) u8 shared[];
    S& s = *reinterpret_cast<S*>(shared);
    Part at((int)ceil_div(all_keys, KEYS), h);
    int key = at.tile * KEYS, own = 16 * warp_id(), stage = 0;
    i64 heads = (i64)at.kv_head * A::G * D, token = at.sequence * t, key_row = at.sequence * all_keys + key;
    i64 rows = (at.sequence * h + at.kv_head) * all_rows;
    // Rows before and after see none of these keys.
    int first = A::See::since(key) * A::G / A::ROWS * A::ROWS;
    // MUT attention_first: int first = A::See::since(key + KEYS) * A::G / A::ROWS * A::ROWS;
    int last = A::See::until(min_of(key + KEYS, all_keys) - 1, t) * A::G;
    copy_rows_async<A::THREADS, KEYS, D, P>(s.k, k + key_row * k_stride + at.kv_head * D, k_stride, all_keys - key);
    copy_rows_async<A::THREADS, KEYS, D, P>(s.v, v + key_row * v_stride + at.kv_head * D, v_stride, all_keys - key);
    auto fetch = [&](int stage, int row0) {
        if (row0 < last) {
            A::gather(s.q[stage], q + token * q_stride + heads, q_stride, row0, all_rows);
            A::gather(s.dy[stage], dy + token * dy_stride + heads, dy_stride, row0, all_rows);
        }
        copies_commit();
    };
    fetch(0, first);
    float gk[D / 8][4], gv[D / 8][4];
    clear(gk), clear(gv);
#pragma unroll 1
    for (int row0 = first; row0 < last; row0 += A::ROWS, stage ^= 1) {
        copies_wait<0>();
        __syncthreads();
        fetch(stage ^ 1, row0 + A::ROWS);
        float p[KEYS / 8][4], ds[KEYS / 8][4], log2[2], d[2];
        int row = row0 + own + lane_id() / 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            bool valid = row + 8 * i < all_rows;
            log2[i] = valid ? log2_sum[rows + row + 8 * i] : 3e38f, d[i] = valid ? delta[rows + row + 8 * i] : 0.f;
        }
        clear(p);
        add_product_nt<T, D, KEYS>(p, RowsA<T>{s.q[stage] + own * P, P}, s.k, P);
        A::mask(p, row, key, all_keys);
        clear(ds);
        add_product_nt<T, D, KEYS>(ds, RowsA<T>{s.dy[stage] + own * P, P}, s.v, P);
#pragma unroll
        for (int i = 0; i < KEYS / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                p[i][j] = exp2_fast(fmaf(p[i][j], A::FACTOR, -log2[j / 2]));
                ds[i][j] = C::scale * p[i][j] * (ds[i][j] - d[j / 2]);
            }
        store_d(s.p + own * PP, PP, p);
        store_d(s.ds + own * PP, PP, ds);
        __syncthreads();
        // MUT attention_exchanged: ;
        if (own < KEYS) {
            add_product_nn<T, A::ROWS, D>(gv, ColumnsA<T, true>{s.p + own, PP}, s.dy[stage], P);
            add_product_nn<T, A::ROWS, D>(gk, ColumnsA<T, true>{s.ds + own, PP}, s.q[stage], P);
        }
    }
    copies_wait<0>();
    if (own >= KEYS) return;
    T *to_k[2], *to_v[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int r = key + own + lane_id() / 4 + 8 * i;
        to_k[i] = r < all_keys ? dk + (key_row - key + r) * dk_stride + at.kv_head * D : nullptr;
        to_v[i] = r < all_keys ? dv + (key_row - key + r) * dv_stride + at.kv_head * D : nullptr;
    }
    store_d_global(to_k[0], to_k[1], gk);
    store_d_global(to_v[0], to_v[1], gv);
}

}  // namespace rambac
