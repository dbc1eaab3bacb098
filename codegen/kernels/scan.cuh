// The selective scan of Mamba-2 in block form (state-space duality, arXiv 2405.21060) on tensor cores.
//
//   h_t = exp(dt_t a) h_{t-1} + dt_t x_t (x) b_t        y_t = h_t c_t + d x_t
//
// With cs the running sum of dt a inside a block of Q tokens and h the state before the block:
//
//   y_t = exp(cs_t) h c_t + sum_{s<=t} g_ts x_s + d x_t          g_ts = (c_t . b_s) exp(cs_t - cs_s) dt_s
//   h'  = exp(cs_end) h + sum_s exp(cs_end - cs_s) dt_s x_s (x) b_s
//
// A CTA walks a segment of a sequence for `heads_per_cta` heads of a group, block by block.  A warp owns 16 rows of a
// head's state [P, R] and keeps them in registers as results (D) of products; that layout is also the one of an operand
// (B), so y's product with the state needs no exchange:
//
//            R                          P = 16 a warp
//        +-------+                     +---+                 +---------+   +---+
//   16 p | state |     y [Q, 16] = e * | C |·stateᵀ     +    | g (Q,Q) | · | x |      state = e_end·state + (w·x)ᵀ·B
//        +-------+                     +---+                 +---------+   +---+
//
// g is made together (16 rows x 32 columns a warp, the lower triangle alone) from c·bᵀ, which all heads of the CTA share.
// Blocks are copied ahead of their use (cp.async, `stages`).  cs is a sum of two floats, so that a difference is exact
// even after a step of -1000; exponents are never positive.
//
// Traffic: x, y once; b, c once per CTA, from L2 for all but one.  Limits: reading c, b and g from shared memory per
// warp (16 FLOP a byte) comes before tensor cores and memory; heads that share a CTA share c·bᵀ and the copies of b and c.
//
// Three passes where (sequence, head) pairs are few: `scan_states` walks each segment from zero, `scan_combine` adds the
// segments up, `scan_outputs` walks again from the right states.  All orders are fixed by shapes.
//
// C: T (x, b, c, y), Exact (dt, a, d and states: T or f32), heads, groups, head_dim (P), state (R), whole, block (Q), heads_per_cta, stages, shared (bytes, checked).
// Q is 16, 32 or 64.  `whole`: P and R are multiples of 16 and rows begin at multiples of 16 bytes; else P and R are filled
// up with zeros in shared memory and elements are moved one by one.  Grid (segments, heads / heads_per_cta, N).
#pragma once
#include "copy.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace rambac {

// How a walk goes: whether it makes y, from which end, whether it writes down its states; what does neither tells how much
// of a state is left behind the segment.
template <bool OUTPUTS, bool REVERSE, bool RECORD> struct ScanWay {
    static constexpr bool outputs = OUTPUTS, reverse = REVERSE, record = RECORD, totals = !OUTPUTS && !RECORD;
};

__device__ constexpr int up_to_16(int n) { return (n + 15) / 16 * 16; }

// HEADS neighbouring pieces of WIDTH elements of every row to pieces of up_to_16(WIDTH), filled up with zeros.
template <class C, int THREADS, int ROWS, int HEADS, int WIDTH, int PITCH, class T>
__device__ __forceinline__ void scan_copy(T* to, const T* from, i64 stride, int rows) {
    constexpr int FULL = up_to_16(WIDTH);
    if constexpr (C::whole) {
        copy_rows_async<THREADS, ROWS, HEADS * FULL, PITCH>(to, from, stride, rows);
    } else {
        for (int i = threadIdx.x; i < ROWS * HEADS * FULL; i += THREADS) {
            const int row = i / (HEADS * FULL), col = i % (HEADS * FULL), at = col % FULL;
            to[row * PITCH + col] = row < rows && at < WIDTH ? from[row * stride + col / FULL * WIDTH + at] : from_f32<T>(0.f);
        }
    }
}

// A tile [16, 16] of results to `rows` rows of `cols` columns.
template <class C, class T> __device__ __forceinline__ void scan_store(T* scratch, const float (&d)[2][4], T* to, i64 stride, int rows, int cols) {
    if constexpr (C::whole) {
        store_tile(scratch, d, to, stride, rows);
    } else {
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = lane_id() / 4 + i / 2 * 8, col = 8 * j + 2 * (lane_id() % 4) + i % 2;
                if (row < rows && col < cols) to[row * stride + col] = from_f32<T>(d[j][i]);
            }
    }
}

// Per-step factors of a block of a head, in shared memory.
template <int Q> struct alignas(8) ScanDecay {
    float hi[Q], lo[Q];      // running sum of dt a in units of log 2
    float dt[Q];
    float from_start[Q];     // exp(cs_t)
    float to_end[Q];         // exp(cs_end - cs_t)
};

// Steps of a block as a warp holds them before they become factors: lane l has steps l·EACH … of a head.
template <int Q> struct ScanSteps {
    static constexpr int EACH = max_of(Q / 32, 1);
    float dt[EACH];

    // Steps at and past `rows` are 0: they change nothing.
    template <class T> __device__ __forceinline__ void load(const T* at, i64 stride, int rows) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int t = lane_id() * EACH + i;
            dt[i] = t < min_of(rows, Q) ? to_f32(at[t * stride]) : 0.f;
        }
    }
    // Makes the factors; returns exp2's argument of the whole block in every lane.
    __device__ __forceinline__ double factors(ScanDecay<Q>& to, float a) const {
        const double scale = (double)a * 1.4426950408889634;
        double sum[EACH], all = 0.;
#pragma unroll
        for (int i = 0; i < EACH; i++) sum[i] = all += (double)dt[i] * scale;
        double before = all;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            double other = __shfl_up_sync(ALL_LANES, before, step);
            if (lane_id() >= step) before += other;
        }
        const double whole = __shfl_sync(ALL_LANES, before, 31);
        before -= all;
        float hi[EACH], lo[EACH], from_start[EACH], to_end[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            double s = before + sum[i];
            hi[i] = (float)s, lo[i] = (float)(s - hi[i]);
            from_start[i] = exp2_fast(hi[i]), to_end[i] = exp2_fast((float)(whole - s));
        }
        const int t = lane_id() * EACH;
        if (t < Q) {
            store_f32(to.hi + t, hi), store_f32(to.lo + t, lo), store_f32(to.dt + t, dt);
            store_f32(to.from_start + t, from_start), store_f32(to.to_end + t, to_end);
        }
        return whole;
    }
};

// exp(cs_t - cs_s); the low parts matter to f32 alone.
template <bool EXACT, int Q> __device__ __forceinline__ float scan_between(const ScanDecay<Q>& d, int t, int s) {
    float x = d.hi[t] - d.hi[s];
    if constexpr (EXACT) x += d.lo[t] - d.lo[s];
    return exp2_fast(x);
}

// What a walk goes over: a segment of a sequence, from the CTA's first head and group on.
template <class C, class Way> struct ScanPlace {
    using T = typename C::T;
    const T *x, *b, *c;
    const typename C::Exact *dt, *a, *d;
    i64 x_stride, dt_stride, b_stride, c_stride;
    T* y;
    i64 y_stride;
    // The state before every block (in reverse: the gradient behind it), where recorded: [N, blocks, heads, P, R]; P and R filled up.
    T* record;
    // exp of a head's sum of dt a, where the walk tells it.
    float* decays;
    // Tokens of this segment.
    int first, end;

    __device__ __forceinline__ int blocks() const { return (end - first + C::block - 1) / C::block; }
    // Token at which the k-th block of the walk begins.
    __device__ __forceinline__ int begin(int k) const { return first + (Way::reverse ? blocks() - 1 - k : k) * C::block; }
};

template <class C, class Way> struct ScanWalk : ScanPlace<C, Way> {
    using T = typename C::T;
    static constexpr int P = up_to_16(C::head_dim), R = up_to_16(C::state), Q = C::block, HEADS = C::heads_per_cta, STAGES = C::stages;
    static constexpr int K = Mma<T>::K, PAD = 16 / sizeof(T);
    static constexpr int SLICES = P / 16, WARPS = HEADS * SLICES, THREADS = 32 * WARPS;
    static constexpr int X_PITCH = HEADS * P + PAD, R_PITCH = R + PAD, G_PITCH = Q + PAD;
    static constexpr bool EXACT = sizeof(T) == 4;
    static_assert(!C::whole || (P == C::head_dim && R == C::state), "whole head_dim and state are multiples of 16");
    static_assert(Q == 16 || Q == 32 || Q == 64, "a block is 16, 32 or 64 tokens");
    static_assert(C::heads / C::groups % HEADS == 0, "the heads of a CTA are of one group");

    struct Stage {
        T x[Q * X_PITCH], b[Q * R_PITCH], c[Way::outputs ? Q * R_PITCH : PAD];
    };
    struct alignas(16) Shared {
        Stage stage[STAGES];
        T g[Way::outputs ? HEADS : 1][Way::outputs ? Q * G_PITCH : PAD];
        ScanDecay<Q> decay[HEADS];
        // y (16 bits) or recorded states on their way to memory, per warp.
        T out[WARPS][Way::record ? 16 * R_PITCH : Way::outputs && sizeof(T) == 2 ? 16 * 16 : PAD];
    };

    using Place = ScanPlace<C, Way>;
    using Place::x, Place::b, Place::c, Place::dt, Place::a, Place::d, Place::x_stride, Place::dt_stride, Place::b_stride, Place::c_stride;
    using Place::y, Place::y_stride, Place::record, Place::decays, Place::first, Place::end, Place::blocks, Place::begin;
    float h[R / 8][4];

    __device__ __forceinline__ static int head0() { return blockIdx.y * HEADS; }
    __device__ __forceinline__ static int head() { return head0() + warp_id() / SLICES; }
    // First row of the head's state that this warp owns, and the lane's place in a tile.
    __device__ __forceinline__ static int slice() { return warp_id() % SLICES * 16; }
    __device__ __forceinline__ static int row() { return lane_id() / 4; }
    // Column of a state's element i (0 or 1 of a row) in tile j.  In f32 the order is that of the products' K.
    __device__ __forceinline__ static int column(int j, int i) {
        int q = lane_id() % 4;
        return 8 * j + (sizeof(T) == 2 ? 2 * q + i : q + 4 * i);
    }

    // Calls f(register, place in [head_dim, state]) for every element that there is.
    template <class F> __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int j = 0; j < R / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int p = slice() + row() + i / 2 * 8, r = column(j, i % 2);
                if (C::whole || (p < C::head_dim && r < C::state)) f(h[j][i], p * C::state + r);
            }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int j = 0; j < R / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) h[j][i] = 0.f;
    }
    template <class S> __device__ __forceinline__ void load_state(const S* from) {
        if (!C::whole) clear();
        each([&](float& value, int at) { value = to_f32(from[at]); });
    }
    template <class S> __device__ __forceinline__ void store_state(S* to) {
        each([&](float& value, int at) { to[at] = from_f32<S>(value); });
    }

    // The pointers stand at this sequence and the CTA's first head and group.
    template <class Load> __device__ __forceinline__ void copy(Stage& to, int t0, const Load& load) const {
        const int rows = min_of(end - t0, Q);
        load.template operator()<C, THREADS, Q, HEADS, X_PITCH>(to.x, x, x_stride, t0, rows);
        scan_copy<C, THREADS, Q, 1, C::state, R_PITCH>(to.b, b + t0 * b_stride, b_stride, rows);
        if constexpr (Way::outputs) scan_copy<C, THREADS, Q, 1, C::state, R_PITCH>(to.c, c + t0 * c_stride, c_stride, rows);
    }

    // g of all heads.  Units of 16 x 32, whole ones first, then those of which the diagonal leaves 16 x 16.
    __device__ __forceinline__ void make_g(Shared& sh, const Stage& in) const {
        constexpr int STRIPS = Q / 16, WHOLE = (STRIPS / 2) * ((STRIPS + 1) / 2), UNITS = WHOLE + (STRIPS + 1) / 2;
        for (int unit = warp_id(); unit < UNITS; unit += WARPS) {
            int strip = STRIPS - 1, half = unit;
            if (unit < WHOLE) {
                while (half >= (strip + 1) / 2) half -= (strip + 1) / 2, strip--;
            } else {
                strip = 2 * (unit - WHOLE), half = strip / 2;
            }
            const bool whole = unit < WHOLE;
            float cb[4][4] = {};
#pragma unroll 4
            for (int k = 0; k < R; k += K) {
                u32 fa[4], fb[4];
                load_a(fa, in.c + 16 * strip * R_PITCH + k, R_PITCH);
                load_b_nk(fb, in.b + 32 * half * R_PITCH + k, R_PITCH);
                Mma<T>::run(cb[0], fa, fb[0], fb[1]);
                Mma<T>::run(cb[1], fa, fb[2], fb[3]);
                if (whole) {
                    load_b_nk(fb, in.b + (32 * half + 16) * R_PITCH + k, R_PITCH);
                    Mma<T>::run(cb[2], fa, fb[0], fb[1]);
                    Mma<T>::run(cb[3], fa, fb[2], fb[3]);
                }
            }
#pragma unroll
            for (int m = 0; m < HEADS; m++) {
                const ScanDecay<Q>& decay = sh.decay[m];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if (j >= 2 && !whole) break;
                    const int s = 32 * half + 8 * j + 2 * (lane_id() % 4);
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int t = 16 * strip + row() + 8 * i;
                        float lo = s <= t ? cb[j][2 * i] * (scan_between<EXACT>(decay, t, s) * decay.dt[s]) : 0.f;
                        float hi = s + 1 <= t ? cb[j][2 * i + 1] * (scan_between<EXACT>(decay, t, s + 1) * decay.dt[s + 1]) : 0.f;
                        // MUT scan_diagonal: float hi = s + 1 < t ? cb[j][2 * i + 1] * (scan_between<EXACT>(decay, t, s + 1) * decay.dt[s + 1]) : 0.f;
                        store_spread(sh.g[m] + t * G_PITCH, s, lo, hi);
                    }
                }
            }
        }
    }

    // The warp's columns of x as B fragments, K-step by K-step; registers 0, 2, 1, 3 are its transpose as an A fragment.
    using Columns = u32[Q / K][4];
    __device__ __forceinline__ void load_columns(Columns& f, const Stage& in) const {
#pragma unroll
        for (int k = 0; k < Q / K; k++)
            load_b_kn<true>(f[k], in.x + k * K * X_PITCH + (head() - head0()) * P + slice(), X_PITCH);
    }

    // The lane's values of y [Q, 16]: tiles of 16 rows, two of 8 columns each.
    template <class Finish> __device__ __forceinline__ void write_outputs(Shared& sh, const Stage& in, const Columns& f, int t0, const Finish& finish) const {
        const int m = head() - head0();
        float acc[Q / 16][2][4] = {};
#pragma unroll
        for (int k = 0; k < R / K; k++) {
            u32 b0[2], b1[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if constexpr (sizeof(T) == 2) {
                    b0[i] = pack2<T>(h[2 * k][2 * i], h[2 * k][2 * i + 1]);
                    b1[i] = pack2<T>(h[2 * k + 1][2 * i], h[2 * k + 1][2 * i + 1]);
                } else {
                    b0[i] = __float_as_uint(h[k][2 * i]);
                    b1[i] = __float_as_uint(h[k][2 * i + 1]);
                }
            }
#pragma unroll
            for (int i = 0; i < Q / 16; i++) {
                u32 fa[4];
                load_a(fa, in.c + 16 * i * R_PITCH + k * K, R_PITCH);
                Mma<T>::run(acc[i][0], fa, b0[0], b1[0]);
                Mma<T>::run(acc[i][1], fa, b0[1], b1[1]);
            }
        }
        const float skip = to_f32(d[m]);
#pragma unroll
        for (int i = 0; i < Q / 16; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[i][j][e] *= sh.decay[m].from_start[16 * i + row() + e / 2 * 8];
#pragma unroll
            for (int k = 0; k * K < 16 * (i + 1); k++) {
                // MUT scan_triangle: for (int k = 0; k * K < 16 * i; k++) {
                u32 fa[4];
                load_a(fa, sh.g[m] + 16 * i * G_PITCH + k * K, G_PITCH);
                Mma<T>::run(acc[i][0], fa, f[k][0], f[k][1]);
                Mma<T>::run(acc[i][1], fa, f[k][2], f[k][3]);
            }
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int t = 16 * i + row() + 8 * e, p = slice() + 8 * j + 2 * (lane_id() % 4);
                    float xs[2], out[2];
                    load_pair(xs, in.x + t * X_PITCH + m * P + p);
                    out[0] = fmaf(skip, xs[0], acc[i][j][2 * e]);
                    out[1] = fmaf(skip, xs[1], acc[i][j][2 * e + 1]);
                    finish(t0 + t, m, p, out);
                    acc[i][j][2 * e] = out[0], acc[i][j][2 * e + 1] = out[1];
                }
            const int t = t0 + 16 * i;
            scan_store<C>(sh.out[warp_id()], acc[i], y + t * y_stride + m * C::head_dim + slice(), y_stride, end - t, C::head_dim - slice());
        }
    }

    // state = whole·state + (factor·x)ᵀ·b
    __device__ __forceinline__ void update(const ScanDecay<Q>& decay, const Stage& in, const Columns& f) {
        const float whole = decay.from_start[Q - 1];
#pragma unroll
        for (int j = 0; j < R / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) h[j][i] *= whole;
#pragma unroll
        for (int k = 0; k < Q / K; k++) {
            u32 fa[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                // Register i of A: row i % 2 · 8 + …, K-half i / 2.
                const u32 v = f[k][i % 2 * 2 + i / 2];
                if constexpr (sizeof(T) == 2) {
                    const int s = k * K + i / 2 * 8 + 2 * (lane_id() % 4);
                    fa[i] = pack2<T>(to_f32(T{(u16)v}) * factor(decay, s), to_f32(T{(u16)(v >> 16)}) * factor(decay, s + 1));
                } else {
                    const int s = k * K + 2 * (lane_id() % 4) + i / 2;
                    fa[i] = __float_as_uint(__uint_as_float(v) * factor(decay, s));
                }
            }
#pragma unroll
            for (int j = 0; j < R / 16; j++) {
                u32 fb[4];
                if constexpr (sizeof(T) == 2) {
                    load_b_kn<true>(fb, in.b + k * K * R_PITCH + 16 * j, R_PITCH);
                } else {
                    // Columns so that element i of tile j is column(j, i).
                    const int n = lane_id() / 4, col = 16 * j + n / 2 + n % 2 * 4;
                    const T* at = in.b + (k * K + 2 * (lane_id() % 4)) * R_PITCH + col;
                    fb[0] = __float_as_uint(at[0]);
                    fb[1] = __float_as_uint(at[R_PITCH]);
                    fb[2] = __float_as_uint(at[8]);
                    fb[3] = __float_as_uint(at[R_PITCH + 8]);
                }
                Mma<T>::run(h[2 * j], fa, fb[0], fb[1]);
                Mma<T>::run(h[2 * j + 1], fa, fb[2], fb[3]);
            }
        }
    }
    __device__ __forceinline__ static float factor(const ScanDecay<Q>& decay, int s) {
        if constexpr (Way::reverse) return decay.from_start[s];
        else return decay.to_end[s] * decay.dt[s];
    }

    __device__ __forceinline__ void write_record(Shared& sh, int t0) const {
        T* out = sh.out[warp_id()];
#pragma unroll
        for (int j = 0; j < R / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                T* to = out + (row() + 8 * e) * R_PITCH;
                if constexpr (sizeof(T) == 2) {
                    *reinterpret_cast<u32*>(to + column(j, 0)) = pack2<T>(h[j][2 * e], h[j][2 * e + 1]);
                } else {
                    to[column(j, 0)] = h[j][2 * e];
                    to[column(j, 1)] = h[j][2 * e + 1];
                }
            }
        __syncwarp();
        T* to = record + (((i64)(t0 / Q) * C::heads + head()) * P + slice()) * R;
#pragma unroll
        for (int i = lane_id(); i < 16 * R / PAD; i += 32) {
            using Order = PieceOrder<16, R / PAD, R_PITCH / PAD>;
            const int line = Order::row(i), col = Order::piece(i) * PAD;
            const Vec<T, PAD> v = load<T, PAD>(out + line * R_PITCH + col);
            store_words<4>(to + (i64)line * R + col, reinterpret_cast<const u32*>(&v));
        }
        __syncwarp();
    }

    // Walks the segment from the state that `first_state` sets; then `last_state` sees the one behind it.
    template <class Load, class Finish, class First, class Last>
    __device__ __forceinline__ void walk(Shared& sh, const Load& load, const Finish& finish, const First& first_state, const Last& last_state) {
        first_state();
        const int count = blocks(), m = head() - head0();
        ScanSteps<Q> steps;
        float rate = 0.f;
        double total = 0.;
        if (warp_id() < HEADS) {
            rate = to_f32(a[warp_id()]);
            if (count > 0) steps.load(dt + begin(0) * dt_stride + warp_id(), dt_stride, end - begin(0));
        }
        if (count > 0) copy(sh.stage[0], begin(0), load);
        copies_commit();
        for (int k = 0; k < count; k++) {
            Stage& in = sh.stage[k % STAGES];
            if (STAGES > 1 && k + 1 < count) copy(sh.stage[(k + 1) % STAGES], begin(k + 1), load);
            copies_commit();
            if (warp_id() < HEADS) {
                total += steps.factors(sh.decay[warp_id()], rate);
                if (k + 1 < count) steps.load(dt + begin(k + 1) * dt_stride + warp_id(), dt_stride, end - begin(k + 1));
            }
            copies_wait<STAGES - 1>();
            // MUT scan_wait: copies_wait<STAGES>();
            __syncthreads();
            // MUT scan_ready: ;
            if constexpr (Way::record) write_record(sh, begin(k));
            Columns f;
            load_columns(f, in);
            if constexpr (Way::outputs) {
                make_g(sh, in);
                __syncthreads();
                // MUT scan_g: ;
                write_outputs(sh, in, f, begin(k), finish);
            }
            update(sh.decay[m], in, f);
            __syncthreads();
            // MUT scan_free: ;
            if (STAGES == 1 && k + 1 < count) copy(in, begin(k + 1), load);
        }
        if (Way::totals && warp_id() < HEADS && lane_id() == 0) decays[warp_id()] = exp2_fast((float)total);
        last_state();
    }
};

// The entry points take the walk as an argument: scan_hopper.cuh has another.
//
// Hooks.  How x of tokens t0 … t0 + rows - 1 and the CTA's heads comes to shared memory: as it is.  `x` stands at the sequence
// and its first head.  A convolution would be computed here, from rows t0 - (k-1) on.
struct ScanRows {
    template <class C, int THREADS, int ROWS, int HEADS, int PITCH, class T>
    __device__ __forceinline__ void operator()(T* to, const T* x, i64 stride, int t0, int rows) const {
        scan_copy<C, THREADS, ROWS, HEADS, C::head_dim, PITCH>(to, x + t0 * stride, stride, rows);
    }
};
// What is done to two neighbouring outputs of token t, head m of the CTA, in f32 before they are stored: nothing.  A gate
// would be multiplied here.
struct ScanAsIs {
    __device__ __forceinline__ void operator()(int t, int m, int p, float (&y)[2]) const {}
};

extern __shared__ __align__(1024) unsigned char scan_memory[];

// Common setup: pointers at the sequence and the CTA's heads.
template <class Walk, class C>
__device__ __forceinline__ void scan_place(Walk& w, const typename C::T* x, i64 x_stride, const typename C::Exact* dt, i64 dt_stride, const typename C::Exact* a,
                                           const typename C::T* b, i64 b_stride, i32 l, i32 segment) {
    static_assert(sizeof(typename Walk::Shared) <= C::shared, "the stub gives the shared memory that the kernel takes");
    const i64 row = (i64)blockIdx.z * l;
    const int group = Walk::head0() / (C::heads / C::groups);
    w.x = x + row * x_stride + Walk::head0() * C::head_dim, w.x_stride = x_stride;
    w.dt = dt + row * dt_stride + Walk::head0(), w.dt_stride = dt_stride;
    w.a = a + Walk::head0();
    w.b = b + row * b_stride + group * C::state, w.b_stride = b_stride;
    w.first = blockIdx.x * segment;
    w.end = min_of(w.first + segment, l);
}
// Element offset of a head's state in [outer, heads, head_dim, state].
template <class C> __device__ __forceinline__ i64 scan_state_at(i64 outer, int head) {
    return (outer * C::heads + head) * (C::head_dim * C::state);
}

// One pass: h0 → y, h.  Grid.x is 1 and `segment` at least l.  h may lie over h0.
template <class C, template <class, class> class Walker = ScanWalk, class Load = ScanRows, class Finish = ScanAsIs>
__device__ __forceinline__ void selective_scan(const typename C::T* x, i64 x_stride, const typename C::Exact* dt, i64 dt_stride, const typename C::Exact* a,
                                               const typename C::T* b, i64 b_stride, const typename C::T* c, i64 c_stride, const typename C::Exact* d,
                                               const typename C::Exact* h0, typename C::T* y, i64 y_stride, typename C::Exact* h, i32 l, Load load = {}, Finish finish = {}) {
    using Walk = Walker<C, ScanWay<true, false, false>>;
    Walk w;
    scan_place<Walk, C>(w, x, x_stride, dt, dt_stride, a, b, b_stride, l, l);
    const i64 row = (i64)blockIdx.z * l;
    w.c = c + row * c_stride + (w.b - b - row * b_stride), w.c_stride = c_stride;
    w.d = d + Walk::head0();
    w.y = y + row * y_stride + Walk::head0() * C::head_dim, w.y_stride = y_stride;
    const i64 at = scan_state_at<C>(blockIdx.z, Walk::head());
    w.walk(*reinterpret_cast<typename Walk::Shared*>(scan_memory), load, finish, [&] { w.load_state(h0 + at); }, [&] { w.store_state(h + at); });
}

// First of three passes: each segment from zero, forward or in reverse → its last state and exp of its sum of dt a, in
// ends [N, segments, heads, P, R] and decays [N, segments, heads].
template <class C, template <class, class> class Walker = ScanWalk>
__device__ __forceinline__ void scan_states(const typename C::T* x, i64 x_stride, const typename C::Exact* dt, i64 dt_stride, const typename C::Exact* a,
                                            const typename C::T* b, i64 b_stride, float* ends, float* decays, i32 l, i32 segment) {
    using Walk = Walker<C, ScanWay<false, C::reverse, false>>;
    Walk w;
    scan_place<Walk, C>(w, x, x_stride, dt, dt_stride, a, b, b_stride, l, segment);
    const i64 outer = (i64)blockIdx.z * gridDim.x + blockIdx.x;
    w.decays = decays + outer * C::heads + Walk::head0();
    w.walk(*reinterpret_cast<typename Walk::Shared*>(scan_memory), ScanRows{}, ScanAsIs{}, [&] { w.clear(); }, [&] { w.store_state(ends + scan_state_at<C>(outer, Walk::head())); });
}

// Second pass: the states at the segments' ends, from zero, become those at their starts, from h0; the last goes to h.
// In reverse: from the gradient behind the last segment to those behind every segment; the one before the first goes to h.
// A thread owns `vec` elements of a state.  Grid (ceil(P·R / (vec·threads)), heads, N).
template <class C>
__device__ __forceinline__ void scan_combine(float* ends, const float* decays, const typename C::Exact* h0, typename C::Exact* h, i32 segments) {
    const int at = (blockIdx.x * C::threads + threadIdx.x) * C::vec, head = blockIdx.y;
    if (at >= C::head_dim * C::state) return;
    const i64 n = blockIdx.z;
    float now[C::vec];
    load_f32(now, h0 + scan_state_at<C>(n, head) + at);
    for (int k = 0; k < segments; k++) {
        const i64 outer = n * segments + (C::reverse ? segments - 1 - k : k);
        float* place = ends + scan_state_at<C>(outer, head) + at;
        const float decay = decays[outer * C::heads + head];
        float own[C::vec];
        load_f32(own, place);
        store_f32(place, now);
#pragma unroll
        for (int i = 0; i < C::vec; i++) now[i] = fmaf(decay, now[i], own[i]);
        // MUT scan_combine: for (int i = 0; i < C::vec; i++) now[i] = decay * now[i] + now[i];
    }
    store_f32(h + scan_state_at<C>(n, head) + at, now);
}

// Third pass: y of each segment from its first state.
template <class C, template <class, class> class Walker = ScanWalk, class Load = ScanRows, class Finish = ScanAsIs>
__device__ __forceinline__ void scan_outputs(const typename C::T* x, i64 x_stride, const typename C::Exact* dt, i64 dt_stride, const typename C::Exact* a,
                                             const typename C::T* b, i64 b_stride, const typename C::T* c, i64 c_stride, const typename C::Exact* d,
                                             const float* starts, typename C::T* y, i64 y_stride, i32 l, i32 segment, Load load = {}, Finish finish = {}) {
    using Walk = Walker<C, ScanWay<true, false, false>>;
    Walk w;
    scan_place<Walk, C>(w, x, x_stride, dt, dt_stride, a, b, b_stride, l, segment);
    const i64 row = (i64)blockIdx.z * l;
    w.c = c + row * c_stride + (w.b - b - row * b_stride), w.c_stride = c_stride;
    w.d = d + Walk::head0();
    w.y = y + row * y_stride + Walk::head0() * C::head_dim, w.y_stride = y_stride;
    const float* start = starts + scan_state_at<C>((i64)blockIdx.z * gridDim.x + blockIdx.x, Walk::head());
    w.walk(*reinterpret_cast<typename Walk::Shared*>(scan_memory), load, finish, [&] { w.load_state(start); }, [&] {});
}

}  // namespace rambac
