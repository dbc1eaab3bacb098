// Attention and selection of sizes that tiles do not take (any head_dim, chunk, width): a warp per row, no shared tiles.
//
//   any_stats   per row (token, query head) and slot: the largest logit, 1 / sum, and for gradients δ = Σ p·dp
//   any_mix     o = Σ w·p·v, or dq = Σ ds·k                      a warp per row and 32 columns; or a slot's part of o alone
//   any_keys    dk = Σ ds·q, dv = Σ w·p·dy                       a warp per key and 32 columns
//   any_heads   dw = Σ over heads of δ                           a thread per slot
//
// The same formulas and fixed orders as attend.cuh, attend_grad.cuh and attention.cuh; slow: every product is a warp's sum, read
// again for every 32 columns.  A hook says what a row attends to: `Chosen` chunks, the `Whole` sequence, a part that is `Ranged`,
// or keys that stand for `Units` of tokens.  Two flags say of slots: `joint`, one softmax over all of a row's, whose log-sum-exp is
// a result too (δ then less its gradient); `apart`, outputs and their gradients of every slot, unweighed.
#pragma once
#include "select_grad.cuh"

namespace rambac {

// Slots of a row of [N, L, h]; its keys' place, number and weight.
template <class C, class W> struct Chosen {
    const i32 *indices, *count;
    const W* weights;
    __device__ __forceinline__ int slots(i64 row) const { return count[row]; }
    __device__ __forceinline__ i64 first(i64 row, int slot) const { return (i64)indices[row * C::slots + slot] * C::chunk; }
    __device__ __forceinline__ int keys(int) const { return C::chunk; }
    __device__ __forceinline__ float weight(i64 row, int slot) const {
        if constexpr (C::weighed) return to_f32(weights[row * C::slots + slot]);
        else return 1.f;
    }
    __device__ __forceinline__ i64 since(int) const { return 0; }
    __device__ __forceinline__ i64 until(int, i64 l) const { return l; }
};
// The same of chunks in pages: places are those of the pool, which is one sequence to the operands.
template <class C, class W> struct ChosenPaged : Chosen<C, W> {
    const i32* table;
    i32 chunks;
    // Rows of a sequence, L·h.
    i64 own;
    __device__ __forceinline__ i64 first(i64 row, int slot) const {
        return (i64)table[row / own * chunks + this->indices[row * C::slots + slot]] * C::chunk;
    }
};
template <class C> struct Whole {
    i32 t;
    __device__ __forceinline__ int slots(i64) const { return 1; }
    __device__ __forceinline__ i64 first(i64, int) const { return 0; }
    __device__ __forceinline__ int keys(int token) const { return C::causal ? min_of(token + 1, t) : t; }
    __device__ __forceinline__ float weight(i64, int) const { return 1.f; }
    // Tokens that see a key: from .. until.
    __device__ __forceinline__ i64 since(int key) const { return C::causal ? key : 0; }
    __device__ __forceinline__ i64 until(int, i64 l) const { return l; }
};
// Keys that stand for units of tokens, each seen once its unit is complete.
template <class C> struct Units {
    i32 units;
    __device__ __forceinline__ int slots(i64) const { return 1; }
    __device__ __forceinline__ i64 first(i64, int) const { return 0; }
    __device__ __forceinline__ int keys(int token) const { return min_of(token / C::unit, units); }
    __device__ __forceinline__ float weight(i64, int) const { return 1.f; }
    __device__ __forceinline__ i64 since(int key) const { return ((i64)key + 1) * C::unit; }
    // MUT units_since: __device__ __forceinline__ i64 since(int key) const { return (i64)key * C::unit; }
    __device__ __forceinline__ i64 until(int, i64 l) const { return l; }
};
// Keys up to a token: the last `window` of them, and those of its own chunk of `local`; 0 is no bound.
template <class C> struct Ranged {
    i32 t, all_keys, h;
    const i32* start;
    __device__ __forceinline__ int begin(int token) const {
        int first = C::window > 0 ? token + 1 - C::window : 0, own = C::local > 0 ? token / max_of(C::local, 1) * C::local : 0;
        return max_of(max_of(first, own), 0);
    }
    __device__ __forceinline__ int slots(i64) const { return 1; }
    __device__ __forceinline__ i64 first(i64 row, int) const {
        return begin((int)(row / h % t) + (start ? max_of(start[row / h / t], 0) : 0));
        // MUT ranged_start: return begin((int)(row / h % t));
    }
    __device__ __forceinline__ int keys(int token) const { return min_of(token + 1, all_keys) - begin(token); }
    __device__ __forceinline__ float weight(i64, int) const { return 1.f; }
    __device__ __forceinline__ i64 since(int key) const { return key; }
    // The first token after a key that does not see it.
    __device__ __forceinline__ i64 until(int key, i64 l) const {
        i64 end = C::window > 0 ? (i64)key + C::window : l, own = C::local > 0 ? ((i64)key / max_of(C::local, 1) + 1) * C::local : l;
        return end < own ? (end < l ? end : l) : (own < l ? own : l);
    }
};

// Operands: rows of heads at their strides; keys and values are of E.
template <class C, class E = typename C::T> struct AnyOperands {
    using T = typename C::T;
    const T* q;
    const E *k, *v;
    const T* dy;
    // Of joint softmaxes, [N, L, H]: the log-sum-exp to write and its gradient, null where there is none.
    T* lse;
    const T* dlse;
    // Where a sequence's first token stands among its keys, null: at the first.
    const i32* start;
    i64 q_stride, k_stride, v_stride, dy_stride;
    i32 l, tokens_kv, h, d;

    __device__ __forceinline__ const T* query(i64 row) const { return q + row / heads() * q_stride + row % heads() * d; }
    __device__ __forceinline__ const T* gradient(i64 row, int slot) const {
        return C::apart ? dy + (row * C::slots + slot) * d : dy + row / heads() * dy_stride + row % heads() * d;
    }
    __device__ __forceinline__ const E* key(i64 at, int kv_head) const { return k + at * k_stride + (i64)kv_head * d; }
    __device__ __forceinline__ const E* value(i64 at, int kv_head) const { return v + at * v_stride + (i64)kv_head * d; }
    __device__ __forceinline__ i64 heads() const { return (i64)h * C::heads_per_kv; }
    // A warp's sum of a·b.
    template <class B> __device__ __forceinline__ float dot(const T* a, const B* b) const {
        float x = 0.f;
        for (int i = lane_id(); i < d; i += 32) x = fmaf(to_f32(a[i]), to_f32(b[i]), x);
        return warp_sum(x);
    }
    template <class B> __device__ __forceinline__ float logit(const T* a, const B* b) const { return dot(a, b) * (C::scale * LOG2E); }
};

// A query row: place of [N, L, h], first key of its sequence.
template <class C> struct AnyRow {
    i64 row, chooser, keys;
    int token, kv_head;
    template <class X> __device__ __forceinline__ AnyRow(i64 row, const X& x) : row(row) {
        i64 place = row / x.heads();
        token = (int)(place % x.l) + (x.start ? max_of(x.start[place / x.l], 0) : 0), kv_head = (int)(row % x.heads()) / C::heads_per_kv;
        chooser = place * x.h + kv_head, keys = place / x.l * x.tokens_kv;
    }
};

__device__ __forceinline__ i64 any_warp() { return ((i64)blockIdx.x * blockDim.x + threadIdx.x) / 32; }

// Where the three numbers of a row's slot are.
template <class C> __device__ __forceinline__ i64 any_stat(i64 row, int slot) { return (C::joint ? row : row * C::slots + slot) * 3; }

template <class C, class X, class From>
__device__ __forceinline__ void any_stats(float* stats, const X& x, const From& from, i64 rows) {
    if (any_warp() >= rows) return;
    AnyRow<C> r(any_warp(), x);
    float top, sum, delta;
    auto start = [&] { top = -3e38f, sum = delta = 0.f; };
    auto store = [&](int slot, float less) {
        float* to = stats + any_stat<C>(r.row, slot);
        if (lane_id() == 0) to[0] = top, to[1] = 1.f / sum, to[2] = delta / sum - less;
    };
    start();
    // Zero logits are keys that every row has.
    if (C::joint && C::off_by_one != 0.f) top = 0.f, sum = C::off_by_one;
    for (int slot = 0; slot < from.slots(r.chooser); slot++) {
        if constexpr (!C::joint) start();
        // MUT any_joint: start();
        i64 first = r.keys + from.first(r.chooser, slot);
        for (int j = 0; j < from.keys(r.token); j++) {
            float z = x.logit(x.query(r.row), x.key(first + j, r.kv_head));
            float more = fmaxf(top, z), shrink = exp2_fast(top - more), e = exp2_fast(z - more);
            if constexpr (C::gradient) delta = fmaf(delta, shrink, e * x.dot(x.gradient(r.row, slot), x.value(first + j, r.kv_head)));
            sum = fmaf(sum, shrink, e), top = more;
        }
        if constexpr (!C::joint) {
            if (C::off_by_one != 0.f) sum = fmaf(C::off_by_one, exp2_fast(-top), sum);
            store(slot, 0.f);
        }
    }
    if constexpr (C::joint) {
        store(0, x.dlse ? to_f32(x.dlse[r.row]) : 0.f);
        // MUT any_dlse: store(0, 0.f);
        if (x.lse && lane_id() == 0)
            x.lse[r.row] = from_f32<typename C::T>(sum > 0.f ? LN2 * (top + __log2f(sum)) : -infinity());
    }
}

// p of a key, and its part of dq and dk.
template <class C> struct AnyPair {
    float p, ds;
    template <class X>
    __device__ __forceinline__ AnyPair(const X& x, const float* stats, i64 row, int slot, i64 key, int kv_head, float w) {
        stats += any_stat<C>(row, slot);
        p = exp2_fast(x.logit(x.query(row), x.key(key, kv_head)) - stats[0]) * stats[1];
        if constexpr (C::gradient) ds = C::scale * w * p * (x.dot(x.gradient(row, slot), x.value(key, kv_head)) - stats[2]);
    }
};

template <class C, class X, class From>
__device__ __forceinline__ void any_mix(typename C::T* out, i64 stride, const float* stats, const X& x, const From& from, i64 rows) {
    // Outputs of slots are rows of their own.
    constexpr bool APART = C::apart && !C::gradient;
    constexpr int EACH = APART ? C::slots : 1;
    int blocks = (int)ceil_div(x.d, 32), col = (int)(any_warp() % blocks) * 32 + lane_id();
    i64 at = any_warp() / blocks;
    if (at >= rows * EACH) return;
    AnyRow<C> r(at / EACH, x);
    float sum = 0.f;
    int filled = from.slots(r.chooser), begin = APART ? (int)(at % EACH) : 0, end = APART ? min_of(begin + 1, filled) : filled;
    for (int slot = begin; slot < end; slot++) {
        i64 first = r.keys + from.first(r.chooser, slot);
        float w = from.weight(r.chooser, slot);
        for (int j = 0; j < from.keys(r.token); j++) {
            AnyPair<C> pair(x, stats, r.row, slot, first + j, r.kv_head, w);
            if (col >= x.d) continue;
            if constexpr (C::gradient) sum = fmaf(pair.ds, to_f32(x.key(first + j, r.kv_head)[col]), sum);
            else sum = fmaf(w * pair.p, to_f32(x.value(first + j, r.kv_head)[col]), sum);
        }
    }
    i64 to = APART ? at * x.d : r.row / x.heads() * stride + r.row % x.heads() * x.d;
    if (col < x.d) out[to + col] = from_f32<typename C::T>(sum);
}

// entries and offsets: the inverted index of `Chosen`; a sequence of `Whole` needs none.
template <class C, class X, class From>
__device__ __forceinline__ void any_keys(typename C::T* dk, i64 dk_stride, typename C::T* dv, i64 dv_stride, const float* stats,
                                         const X& x, const From& from, const i32* entries, const i32* offsets,
                                         i64 keys) {
    constexpr int K = C::slots, G = C::heads_per_kv;
    int blocks = (int)ceil_div(x.d, 32), col = (int)(any_warp() % blocks) * 32 + lane_id();
    i64 at = any_warp() / blocks, key = at / x.h, sequence = key / max_of(x.tokens_kv, 1);
    if (at >= keys) return;
    int kv_head = (int)(at % x.h), place = (int)(key % x.tokens_kv);
    i64 list = sequence * x.h + kv_head, begin = from.since(place), end = from.until(place, x.l);
    if constexpr (C::chunk > 0) {
        const i32* of = offsets + list * (x.tokens_kv / C::chunk + 1) + place / C::chunk;
        begin = of[0], end = of[1];
    }
    float sum_k = 0.f, sum_v = 0.f;
    for (i64 i = begin; i < end; i++) {
        i64 token = i;
        int slot = 0;
        if constexpr (C::chunk > 0) {
            i32 e = entries[list * x.l * K + i];
            token = e / K, slot = e % K;
        }
        i64 chooser = (sequence * x.l + token) * x.h + kv_head;
        float w = from.weight(chooser, slot);
        for (int g = 0; g < G; g++) {
            i64 row = chooser * G + g;
            AnyPair<C> pair(x, stats, row, slot, key, kv_head, w);
            if (col >= x.d) continue;
            sum_k = fmaf(pair.ds, to_f32(x.query(row)[col]), sum_k);
            sum_v = fmaf(w * pair.p, to_f32(x.gradient(row, slot)[col]), sum_v);
        }
    }
    if (col >= x.d) return;
    dk[key * dk_stride + (i64)kv_head * x.d + col] = from_f32<typename C::T>(sum_k);
    dv[key * dv_stride + (i64)kv_head * x.d + col] = from_f32<typename C::T>(sum_v);
}

template <class C, class W>
__device__ __forceinline__ void any_heads(W* dw, const float* stats, const i32* count, i64 choosers) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, chooser = i / C::slots;
    int slot = (int)(i % C::slots);
    if (chooser >= choosers) return;
    float sum = 0.f;
    if (slot < count[chooser])
        for (int g = 0; g < C::heads_per_kv; g++) sum += stats[((chooser * C::heads_per_kv + g) * C::slots + slot) * 3 + 2];
    dw[i] = from_f32<W>(sum);
}

// The choice of chunks, a warp per row of [N, L, h]: K times the best below the last, of the landmarks that are there and of the
// `K` in `found`, if any.  Returns how many there are.
template <class C, class Landmarks>
__device__ __forceinline__ int any_best(u64* best, const i32* found, const typename C::T* q, i64 q_stride, const Landmarks& landmarks,
                                        const i32* start, i32 l, i32 h, i32 r) {
    constexpr int K = C::slots;
    const i64 row = blockIdx.x, token = row / h, sequence = token / l;
    const Window here = landmarks.here(sequence);
    const int head = (int)(row % h), visible = max_of(0, min_of(landmarks.chunks, (start[sequence] + (int)(token % l)) / C::chunk));
    const typename C::T* a = q + token * q_stride + (i64)head * r;
    u64 before = ~0ull;
    int n = 0;
    for (; n < K; n++) {
        u64 most = 0;
        for (int c = here.first * LANDMARK_PAGE + lane_id(); c < min_of(visible, here.end * LANDMARK_PAGE); c += 32) {
            auto b = landmarks.row(sequence, c) + (i64)head * r;
            float x = 0.f;
            for (int i = 0; i < r; i++) x = fmaf(to_f32(a[i]), to_f32(b[i]), x);
            x *= C::scale;
            u64 key = candidate(x, c);
            if (key < before && x > __uint_as_float(0xff800000u)) most = max_of(most, key);
        }
        for (int i = lane_id(); found != nullptr && i < K; i += 32) {
            u64 key = load_key(found + i * 2);
            if (key < before) most = max_of(most, key);
        }
#pragma unroll
        for (int d = 16; d > 0; d /= 2) most = max_of(most, (u64)__shfl_xor_sync(ALL_LANES, most, d));
        if (most == 0) break;
        before = most;
        if (lane_id() == 0) best[n] = most;
    }
    return n;
}
template <class C, class W>
__device__ __forceinline__ void any_select(i32* indices, i32* count, W* weights, W* scores,
                                           const typename C::T* q, i64 q_stride, const typename C::T* landmarks,
                                           i64 landmark_stride, const i32* start, i64 rows, i32 l, i32 h, i32 chunks, i32 r) {
    constexpr int K = C::slots;
    __shared__ u64 best[K];
    __shared__ float score[K], weight[K];
    __shared__ i32 index[K];
    const i64 row = blockIdx.x;
    const int n = any_best<C>(best, nullptr, q, q_stride, ArrayLandmarks<C>{landmarks, landmark_stride, chunks}, start, l, h, r);
    if (lane_id() != 0) return;
    for (int i = 0; i < n; i++) {
        int to = i;
        if constexpr (C::order == Order::RECENT) {
            to = 0;
            for (int j = 0; j < n; j++) to += (u32)best[j] < (u32)best[i];
        }
        index[to] = (i32) ~(u32)best[i];
        score[to] = of_ordered((u32)(best[i] >> 32));
    }
    weigh<C::rule>(weight, score, 1, n);
    count[row] = n;
    for (int i = n; i < K; i++) index[i] = 0, weight[i] = unfilled<C::rule>(), score[i] = 0.f;
    for (int i = 0; i < K; i++) {
        indices[row * K + i] = index[i];
        weights[row * K + i] = from_f32<W>(weight[i]);
        scores[row * K + i] = from_f32<W>(score[i]);
    }
}
// keys [rows, K], for `select_merge`.
template <class C>
__device__ __forceinline__ void any_select_part(i32* keys, const typename C::T* q, i64 q_stride, const typename C::Stored* landmarks,
                                                i64 landmark_stride, const i32* table, const i32* window, const i32* start,
                                                i32 l, i32 h, i32 chunks, i32 r) {
    constexpr int K = C::slots;
    __shared__ u64 best[K];
    const PagedLandmarks<C> at{landmarks, landmark_stride, table, window, chunks};
    const Window here = at.here(blockIdx.x / h / l);
    // What was found before stays.
    if (!here.fresh() && here.first >= here.end) return;
    i32* kept = keys + (i64)blockIdx.x * K * 2;
    const int n = any_best<C>(best, here.fresh() ? nullptr : kept, q, q_stride, at, start, l, h, r);
    __syncwarp();
    for (int i = lane_id(); i < K; i += 32) store_key(kept + i * 2, i < n ? best[i] : 0);
}

// dq of a thread's element.
template <class C>
__device__ __forceinline__ void any_select_queries(typename C::T* dq, i64 dq_stride, const typename C::T* landmarks,
                                                   i64 landmark_stride, const i32* indices, const i32* count,
                                                   const float* ds, i64 rows, i32 l, i32 h, i32 chunks, i32 r) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, row = i / r, token = row / h;
    if (row >= rows) return;
    i64 col = row % h * r + i % r;
    float sum = 0.f;
    for (int k = 0; k < count[row]; k++) {
        i64 chunk = token / l * chunks + indices[row * C::slots + k];
        sum = fmaf(ds[row * C::slots + k], to_f32(landmarks[chunk * landmark_stride + col]), sum);
    }
    dq[token * dq_stride + col] = from_f32<typename C::T>(C::scale * sum);
}

// dlandmark of a thread's element, through the inverted index.
template <class C>
__device__ __forceinline__ void any_select_landmarks(typename C::T* dlandmarks, i64 stride, const typename C::T* q, i64 q_stride,
                                                     const float* ds, const i32* entries, const i32* offsets, i64 elements,
                                                     i32 l, i32 h, i32 chunks, i32 r) {
    constexpr int K = C::slots;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= elements) return;
    i64 chunk = i / r / h, sequence = chunk / chunks, list = sequence * h + i / r % h, col = i % ((i64)h * r);
    const i32* of = offsets + list * (chunks + 1) + chunk % chunks;
    float sum = 0.f;
    for (i32 p = of[0]; p < of[1]; p++) {
        i32 e = entries[list * l * K + p];
        i64 token = sequence * l + e / K;
        sum = fmaf(ds[(token * h + i / r % h) * K + e % K], to_f32(q[token * q_stride + col]), sum);
    }
    dlandmarks[chunk * stride + col] = from_f32<typename C::T>(C::scale * sum);
}

}  // namespace rambac
