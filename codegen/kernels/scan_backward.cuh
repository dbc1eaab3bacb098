// Gradients of the selective scan, from states at block boundaries.
//
// With the names of scan.cuh, D the gradient of the state behind a block, m_ts = dy_t · x_s, e_ts = exp(cs_t - cs_s):
//
//   dx_s  = sum_{t>=s} g_ts dy_t + exp(cs_end - cs_s) dt_s D b_s + d dy_s
//   dc_t  = sum_{s<=t} E_ts b_s + z_t          E_ts = sum over heads of m_ts e_ts dt_s     z_t = exp(cs_t) hᵀ dy_t
//   db_s  = sum_{t>=s} E_ts c_t + dt_s v_s                                                 v_s = exp(cs_end - cs_s) Dᵀ x_s
//   D     before the block = exp(cs_end) D + sum_t exp(cs_t) dy_t (x) c_t
//   dcs_t = sum_s F_ts dt_s - dt_t sum_u F_ut + c_t·z_t - dt_t b_t·v_t                     F_ts = m_ts e_ts (c_t·b_s)
//   da    = sum_t dt_t S_t    ddt_t = sum_u F_ut + b_t·v_t + a S_t    dd = sum_t m_tt
//   S_t   = sum_{u>=t} dcs_u + exp(cs_end) <D, h> + sum_u dt_u b_u·v_u
//
// Three passes.  `scan_record` walks forward and writes the state before every block, and in reverse (on dy and c) the
// gradient behind every block.  `scan_grad` takes a block of a sequence and goes through the heads of a group (or a part of
// them): db and dc gather in registers over the heads, E over the heads before its two products, so nothing is added in
// memory.  da and dd go to a slot per block, db and dc to a slot per part where there are parts (slots.cuh).
//
//   warp (wr, wc):  rows 16·wr of Q in every product; of its columns every `columns`-th 16, from wc on
//
//     m = dy·xᵀ [Q, Q]    dx = b·Dᵀ, then + gᵀ·dy [Q, P]    z = dy·h, v = x·D [Q, R]    at the end E·b, Eᵀ·c [Q, R]
//
// Traffic per head and block: x, dy, dx and two states in T (2·P·R); the states are written once before.  Limits: the
// products' operands from shared memory, about as long as the traffic.
//
// C: T, Exact (as in scan.cuh; gradients have the types of what they are of), heads, groups, head_dim (P), state (R), whole, block (Q), stages, columns, parts (of a group's heads), shared (bytes, checked).
// 2·Q·columns threads.  Grid (max(blocks, 1), groups · parts, N).
#pragma once
#include "scan.cuh"

namespace rambac {

// Walks and writes the states before every block to record [N, blocks, heads, P, R] (P, R filled up to multiples of 16); with C::reverse on x = dy, b = c, the
// gradients behind every block.  `Start` is the type of the states that segments begin with: Exact [N, heads, P, R] where there is
// one segment, f32 [N, segments, heads, P, R] from scan_combine otherwise.  The last state goes to `last`, where there is one.
template <class C, template <class, class> class Walker, class Start>
__device__ __forceinline__ void scan_walk_recording(const typename C::T* x, i64 x_stride, const typename C::Exact* dt, i64 dt_stride, const typename C::Exact* a,
                                                    const typename C::T* b, i64 b_stride, const Start* start, typename C::T* record, i32 l, i32 segment, typename C::Exact* last) {
    using Walk = Walker<C, ScanWay<false, C::reverse, true>>;
    Walk w;
    scan_place<Walk, C>(w, x, x_stride, dt, dt_stride, a, b, b_stride, l, segment);
    w.record = record + blockIdx.z * ceil_div(l, C::block) * (C::heads * Walk::P * Walk::R);
    start += scan_state_at<C>((i64)blockIdx.z * gridDim.x + blockIdx.x, Walk::head());
    w.walk(*reinterpret_cast<typename Walk::Shared*>(scan_memory), ScanRows{}, ScanAsIs{}, [&] { w.load_state(start); }, [&] {
        if (last) w.store_state(last + scan_state_at<C>(blockIdx.z, Walk::head()));
    });
}
template <class C, template <class, class> class Walker = ScanWalk>
__device__ __forceinline__ void scan_record(const typename C::T* x, i64 x_stride, const typename C::Exact* dt, i64 dt_stride, const typename C::Exact* a,
                                            const typename C::T* b, i64 b_stride, const typename C::Start* start, typename C::T* record, i32 l, i32 segment) {
    scan_walk_recording<C, Walker>(x, x_stride, dt, dt_stride, a, b, b_stride, start, record, l, segment, nullptr);
}
// As scan_record over one segment, in reverse; the gradient before it is dh0.
template <class C, template <class, class> class Walker = ScanWalk>
__device__ __forceinline__ void scan_record_to_start(const typename C::T* dy, i64 dy_stride, const typename C::Exact* dt, i64 dt_stride, const typename C::Exact* a,
                                                     const typename C::T* c, i64 c_stride, const typename C::Exact* dh, typename C::T* record, typename C::Exact* dh0, i32 l) {
    scan_walk_recording<C, Walker>(dy, dy_stride, dt, dt_stride, a, c, c_stride, dh, record, l, l, dh0);
}

// Of a warp whose lanes have EACH steps of a block each: calls store(i, ddt) for every step and returns da.  `tail`: what S has
// behind the block.
template <int EACH, class Store>
__device__ __forceinline__ float scan_step_gradients(const float (&dcs)[EACH], const float (&direct)[EACH], const float (&dt)[EACH], float tail, float a, const Store& store) {
    float all = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) all += dcs[i];
    // Sums from the end: of the lanes behind this one, then inside it.
    float behind = all;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_down_sync(ALL_LANES, behind, step);
        if (lane_id() + step < 32) behind += other;
    }
    float sum = behind - all + tail, own = 0.f;
#pragma unroll
    for (int i = EACH - 1; i >= 0; i--) {
        sum += dcs[i];
        own = fmaf(dt[i], sum, own);
        store(i, fmaf(a, sum, direct[i]));
    }
    return warp_sum(own);
}

template <class C> struct ScanGrad {
    using T = typename C::T;
    static constexpr int P = up_to_16(C::head_dim), R = up_to_16(C::state), Q = C::block, STAGES = C::stages, HEADS = C::heads / C::groups / C::parts;
    static constexpr int K = Mma<T>::K, PAD = 16 / sizeof(T);
    static constexpr int ROWS = Q / 16, COLS = C::columns, WARPS = ROWS * COLS, THREADS = 32 * WARPS;
    static constexpr int P_PITCH = P + PAD, R_PITCH = R + PAD, G_PITCH = Q + PAD, DT_PITCH = HEADS | 1;
    static constexpr bool EXACT = sizeof(T) == 4;
    // 16-column pieces that a warp owns.
    static constexpr int OWN_Q = (Q / 16 + COLS - 1) / COLS, OWN_P = (P / 16 + COLS - 1) / COLS, OWN_R = (R / 16 + COLS - 1) / COLS;
    static_assert(!C::whole || (P == C::head_dim && R == C::state), "whole head_dim and state are multiples of 16");
    static_assert(Q == 16 || Q == 32 || Q == 64, "a block is 16, 32 or 64 tokens");
    static_assert(C::heads / C::groups % C::parts == 0, "parts are equal");

    struct Stage {
        T x[Q * P_PITCH], dy[Q * P_PITCH], h[P * R_PITCH], dh[P * R_PITCH];
    };
    // Sums over a row or column that several warps make together.
    struct Partial {
        float f_row[COLS][Q], f_col[ROWS][Q], z[COLS][Q], v[COLS][Q];
        float product[WARPS], diagonal[WARPS];
    };
    struct alignas(16) Shared {
        Stage stage[STAGES];
        T b[Q * R_PITCH], c[Q * R_PITCH];
        T g[Q * G_PITCH];
        T tile[WARPS][sizeof(T) == 2 ? 256 : PAD];
        ScanDecay<Q> decay[2];
        Partial partial[2];
        // dt of all heads; ddt takes its place head by head.
        typename C::Exact dt[Q * DT_PITCH];
    };

    Shared& sh;
    int wr, wc, row, q;

    __device__ __forceinline__ ScanGrad(Shared& shared) : sh(shared), wr(warp_id() / COLS), wc(warp_id() % COLS), row(lane_id() / 4), q(lane_id() % 4) {}

    // One head's g into shared memory, E's sums, and partial sums over rows and columns of F.
    __device__ __forceinline__ void inside(const Stage& in, const ScanDecay<Q>& decay, Partial& partial, const float (&cb)[OWN_Q][2][4], float (&e_sum)[OWN_Q][2][4]) {
        float m[OWN_Q][2][4] = {};
#pragma unroll (sizeof(T) == 2 ? 4 : 1)
        for (int k = 0; k < P; k += K) {
            u32 fa[4], fb[4];
            load_a(fa, in.dy + 16 * wr * P_PITCH + k, P_PITCH);
#pragma unroll
            for (int j = 0; j < OWN_Q; j++) {
                if (COLS * j + wc > wr) break;
                load_b_nk(fb, in.x + 16 * (COLS * j + wc) * P_PITCH + k, P_PITCH);
                Mma<T>::run(m[j][0], fa, fb[0], fb[1]);
                Mma<T>::run(m[j][1], fa, fb[2], fb[3]);
            }
        }
        float f_row[2] = {}, diagonal = 0.f;
#pragma unroll
        for (int j = 0; j < OWN_Q; j++) {
            if (COLS * j + wc > wr) break;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int s0 = 16 * (COLS * j + wc) + 8 * i + 2 * q;
                float f_col[2] = {}, g[2][2];
#pragma unroll
                for (int e = 0; e < 2; e++)
#pragma unroll
                    for (int f = 0; f < 2; f++) {
                        const int t = 16 * wr + row + 8 * e, s = s0 + f;
                        const float between = s <= t ? scan_between<EXACT>(decay, t, s) : 0.f;
                        const float value = m[j][i][2 * e + f], weight = cb[j][i][2 * e + f];
                        if (s == t) diagonal += value;
                        // MUT grad_diagonal: if (s == t + 1) diagonal += value;
                        const float own = value * between, product = own * weight;
                        f_row[e] = fmaf(product, decay.dt[s], f_row[e]);
                        f_col[f] += product;
                        e_sum[j][i][2 * e + f] = fmaf(own, decay.dt[s], e_sum[j][i][2 * e + f]);
                        g[e][f] = weight * (between * decay.dt[s]);
                    }
#pragma unroll
                for (int e = 0; e < 2; e++) store_spread(sh.g + (16 * wr + row + 8 * e) * G_PITCH, s0, g[e][0], g[e][1]);
#pragma unroll
                for (int f = 0; f < 2; f++) {
#pragma unroll
                    for (int step = 4; step < 32; step *= 2) f_col[f] += __shfl_xor_sync(ALL_LANES, f_col[f], step);
                    if (row == 0) partial.f_col[wr][s0 + f] = f_col[f];
                }
            }
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            f_row[e] = warp_sum<4>(f_row[e]);
            if (q == 0) partial.f_row[wc][16 * wr + row + 8 * e] = f_row[e];
        }
        diagonal = warp_sum(diagonal);
        if (lane_id() == 0) partial.diagonal[warp_id()] = diagonal;
    }

    __device__ __forceinline__ void write_dx(const Stage& in, const ScanDecay<Q>& decay, float skip, T* dx, i64 stride, int rows) {
        float acc[OWN_P][2][4] = {};
#pragma unroll (sizeof(T) == 2 ? 4 : 1)
        for (int k = 0; k < R; k += K) {
            u32 fa[4], fb[4];
            load_a(fa, sh.b + 16 * wr * R_PITCH + k, R_PITCH);
#pragma unroll
            for (int j = 0; j < OWN_P; j++) {
                if (COLS * j + wc >= P / 16) break;
                load_b_nk(fb, in.dh + 16 * (COLS * j + wc) * R_PITCH + k, R_PITCH);
                Mma<T>::run(acc[j][0], fa, fb[0], fb[1]);
                Mma<T>::run(acc[j][1], fa, fb[2], fb[3]);
            }
        }
        float scale[2];
#pragma unroll
        for (int e = 0; e < 2; e++) scale[e] = decay.to_end[16 * wr + row + 8 * e] * decay.dt[16 * wr + row + 8 * e];
#pragma unroll
        for (int j = 0; j < OWN_P; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) acc[j][i][e] *= scale[e / 2];
#pragma unroll 1
        for (int k = 16 * wr; k < Q; k += K) {
            // MUT grad_triangle: for (int k = 16 * wr + 16; k < Q; k += K) {
            u32 fa[4], fb[4];
            load_a_km<true>(fa, sh.g + k * G_PITCH + 16 * wr, G_PITCH);
#pragma unroll
            for (int j = 0; j < OWN_P; j++) {
                if (COLS * j + wc >= P / 16) break;
                load_b_kn<true>(fb, in.dy + k * P_PITCH + 16 * (COLS * j + wc), P_PITCH);
                Mma<T>::run(acc[j][0], fa, fb[0], fb[1]);
                Mma<T>::run(acc[j][1], fa, fb[2], fb[3]);
            }
        }
#pragma unroll
        for (int j = 0; j < OWN_P; j++) {
            const int col = 16 * (COLS * j + wc);
            if (col >= P) break;
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float dy[2];
                    load_pair(dy, in.dy + (16 * wr + row + 8 * e) * P_PITCH + col + 8 * i + 2 * q);
                    acc[j][i][2 * e] = fmaf(skip, dy[0], acc[j][i][2 * e]);
                    acc[j][i][2 * e + 1] = fmaf(skip, dy[1], acc[j][i][2 * e + 1]);
                }
            scan_store<C>(sh.tile[warp_id()], acc[j], dx + 16 * wr * stride + col, stride, rows - 16 * wr, C::head_dim - col);
        }
    }

    // sum += weight · w and dots with `with`, where w = scale · rows·state: (dy, h, c) make z, (x, D, b) make v.
    __device__ __forceinline__ void through(float (&sum)[OWN_R][2][4], float* dots, const T* rows, const T* state, const T* with, const float* scale, const float* weight) {
        u32 fa[P / K][4];
#pragma unroll
        for (int k = 0; k < P / K; k++) load_a_paired(fa[k], rows + 16 * wr * P_PITCH + k * K, P_PITCH);
        float factor[2], more[2], dot[2] = {};
#pragma unroll
        for (int e = 0; e < 2; e++) {
            factor[e] = scale[16 * wr + row + 8 * e];
            more[e] = weight ? weight[16 * wr + row + 8 * e] : 1.f;
        }
#pragma unroll
        for (int j = 0; j < OWN_R; j++) {
            const int col = 16 * (COLS * j + wc);
            if (col >= R) break;
            float w[2][4] = {};
#pragma unroll
            for (int k = 0; k < P / K; k++) {
                u32 fb[4];
                load_b_kn<true>(fb, state + k * K * R_PITCH + col, R_PITCH);
                Mma<T>::run(w[0], fa[k], fb[0], fb[1]);
                Mma<T>::run(w[1], fa[k], fb[2], fb[3]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float other[2];
                    load_pair(other, with + (16 * wr + row + 8 * e) * R_PITCH + col + 8 * i + 2 * q);
#pragma unroll
                    for (int f = 0; f < 2; f++) {
                        const float value = w[i][2 * e + f] * factor[e];
                        dot[e] = fmaf(value, other[f], dot[e]);
                        sum[j][i][2 * e + f] = fmaf(more[e], value, sum[j][i][2 * e + f]);
                    }
                }
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            dot[e] = warp_sum<4>(dot[e]);
            if (q == 0) dots[wc * Q + 16 * wr + row + 8 * e] = dot[e];
        }
    }

    // <D, h>, per warp.
    __device__ __forceinline__ void product(const Stage& in, Partial& partial) {
        using Order = PieceOrder<P, R / PAD, R_PITCH / PAD>;
        float sum = 0.f;
#pragma unroll 2
        for (int i = threadIdx.x; i < P * R / PAD; i += THREADS) {
            const int line = Order::row(i), col = Order::piece(i) * PAD;
            float a[PAD], b[PAD];
            load_f32(a, in.h + line * R_PITCH + col);
            load_f32(b, in.dh + line * R_PITCH + col);
#pragma unroll
            for (int j = 0; j < PAD; j++) sum = fmaf(a[j], b[j], sum);
        }
        sum = warp_sum(sum);
        if (lane_id() == 0) partial.product[warp_id()] = sum;
    }

    // A warp puts a head's partial sums together: ddt, and da and dd of the block.
    __device__ __forceinline__ void steps(const ScanDecay<Q>& decay, const Partial& partial, float a, int m, float* da, float* dd) {
        constexpr int EACH = max_of(Q / 32, 1);
        float dcs[EACH], direct[EACH], dt[EACH], tail = 0.f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int t = lane_id() * EACH + i;
            dcs[i] = direct[i] = dt[i] = 0.f;
            if (t >= Q) break;
            float f_row = 0.f, f_col = 0.f, z = 0.f, v = 0.f;
#pragma unroll
            for (int w = 0; w < COLS; w++) {
                f_row += partial.f_row[w][t];
                z += partial.z[w][t];
                v += partial.v[w][t];
            }
            for (int w = t / 16; w < ROWS; w++) f_col += partial.f_col[w][t];
            dt[i] = decay.dt[t];
            direct[i] = f_col + v;
            dcs[i] = f_row + z - dt[i] * direct[i];
            tail = fmaf(dt[i], v, tail);
        }
        float product = 0.f, diagonal = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) product += partial.product[w], diagonal += partial.diagonal[w];
        tail = fmaf(decay.from_start[Q - 1], product, warp_sum(tail));
        // MUT grad_tail: tail = warp_sum(tail);
        const float own = scan_step_gradients(dcs, direct, dt, tail, a, [&](int i, float g) {
            const int t = lane_id() * EACH + i;
            if (t < Q) sh.dt[t * DT_PITCH + m] = from_f32<typename C::Exact>(g);
        });
        if (lane_id() == 0) *da = own, *dd = diagonal;
    }

    // A [Q, R] that gathered in registers, to rows in memory.
    template <class O> __device__ __forceinline__ void write_rows(const float (&sum)[OWN_R][2][4], O* to, i64 stride, int rows) {
#pragma unroll
        for (int j = 0; j < OWN_R; j++) {
            const int col = 16 * (COLS * j + wc);
            if (col < R) scan_store<C>(reinterpret_cast<O*>(sh.tile[warp_id()]), sum[j], to + 16 * wr * stride + col, stride, rows - 16 * wr, C::state - col);
        }
    }
};

// Gradients of a block.  db and dc are T where C::parts is 1, else f32 slots [parts, N · L, groups · R].  da, dd: slots [N · blocks, heads].
template <class C>
__device__ __forceinline__ void scan_grad(const typename C::T* x, i64 x_stride, const typename C::Exact* dt, i64 dt_stride, const typename C::Exact* a,
                                          const typename C::T* b, i64 b_stride, const typename C::T* c, i64 c_stride, const typename C::Exact* d,
                                          const typename C::T* dy, i64 dy_stride, const typename C::T* states, const typename C::T* gradients,
                                          typename C::T* dx, i64 dx_stride, typename C::Exact* ddt, i64 ddt_stride, typename C::Sum* db, i64 db_stride,
                                          typename C::Sum* dc, i64 dc_stride, float* da, float* dd, i32 l) {
    using G = ScanGrad<C>;
    using T = typename C::T;
    constexpr int P = G::P, R = G::R, Q = G::Q, K = G::K, HEADS = G::HEADS, THREADS = G::THREADS, STAGES = G::STAGES;
    static_assert(sizeof(typename G::Shared) <= C::shared, "the stub gives the shared memory that the kernel takes");
    typename G::Shared& sh = *reinterpret_cast<typename G::Shared*>(scan_memory);
    G own(sh);
    const int t0 = blockIdx.x * Q, rows = min_of(l - t0, Q), group = blockIdx.y / C::parts, part = blockIdx.y % C::parts;
    const int head0 = blockIdx.y * HEADS;
    const i64 n = blockIdx.z, token = n * l + t0, blocks = ceil_div(l, Q), slot = n * gridDim.x + blockIdx.x;
    if (rows <= 0) {
        for (int m = threadIdx.x; m < HEADS; m += THREADS) da[slot * C::heads + head0 + m] = dd[slot * C::heads + head0 + m] = 0.f;
        return;
    }
    x += token * x_stride + head0 * C::head_dim;
    dy += token * dy_stride + head0 * C::head_dim;
    dx += token * dx_stride + head0 * C::head_dim;
    dt += token * dt_stride + head0;
    ddt += token * ddt_stride + head0;
    const i64 state = ((n * blocks + blockIdx.x) * C::heads + head0) * (P * R);
    auto copy = [&](typename G::Stage& to, int m) {
        scan_copy<C, THREADS, Q, 1, C::head_dim, G::P_PITCH>(to.x, x + m * C::head_dim, x_stride, rows);
        scan_copy<C, THREADS, Q, 1, C::head_dim, G::P_PITCH>(to.dy, dy + m * C::head_dim, dy_stride, rows);
        copy_rows_async<THREADS, P, R, G::R_PITCH>(to.h, states + state + (i64)m * (P * R), R, P);
        copy_rows_async<THREADS, P, R, G::R_PITCH>(to.dh, gradients + state + (i64)m * (P * R), R, P);
    };
    scan_copy<C, THREADS, Q, 1, C::state, G::R_PITCH>(sh.b, b + token * b_stride + group * C::state, b_stride, rows);
    scan_copy<C, THREADS, Q, 1, C::state, G::R_PITCH>(sh.c, c + token * c_stride + group * C::state, c_stride, rows);
    copies_commit();
    copy(sh.stage[0], 0);
    copies_commit();
    for (int i = threadIdx.x; i < Q * HEADS; i += THREADS) {
        const int t = i / HEADS, m = i % HEADS;
        sh.dt[t * G::DT_PITCH + m] = t < rows ? dt[t * dt_stride + m] : from_f32<typename C::Exact>(0.f);
    }
    copies_wait<1>();
    __syncthreads();
    // MUT grad_first: ;

    // c·bᵀ is the same for all heads.
    float cb[G::OWN_Q][2][4] = {}, e_sum[G::OWN_Q][2][4] = {}, dc_sum[G::OWN_R][2][4] = {}, db_sum[G::OWN_R][2][4] = {};
#pragma unroll (sizeof(T) == 2 ? 4 : 1)
    for (int k = 0; k < R; k += K) {
        u32 fa[4], fb[4];
        load_a(fa, sh.c + 16 * own.wr * G::R_PITCH + k, G::R_PITCH);
#pragma unroll
        for (int j = 0; j < G::OWN_Q; j++) {
            if (G::COLS * j + own.wc > own.wr) break;
            load_b_nk(fb, sh.b + 16 * (G::COLS * j + own.wc) * G::R_PITCH + k, G::R_PITCH);
            Mma<T>::run(cb[j][0], fa, fb[0], fb[1]);
            Mma<T>::run(cb[j][1], fa, fb[2], fb[3]);
        }
    }

    for (int m = 0; m < HEADS; m++) {
        typename G::Stage& in = sh.stage[m % STAGES];
        ScanDecay<Q>& decay = sh.decay[m % 2];
        typename G::Partial& partial = sh.partial[m % 2];
        if (STAGES > 1 && m + 1 < HEADS) copy(sh.stage[(m + 1) % STAGES], m + 1);
        copies_commit();
        const float rate = to_f32(a[head0 + m]);
        if (own.wr == G::ROWS - 1 - m % G::ROWS && own.wc == 0) {
            ScanSteps<Q> steps;
            steps.load(sh.dt + m, G::DT_PITCH, Q);
            steps.factors(decay, rate);
        }
        copies_wait<STAGES - 1>();
        // MUT grad_wait: copies_wait<STAGES>();
        __syncthreads();
        // MUT grad_ready: ;
        own.inside(in, decay, partial, cb, e_sum);
        __syncthreads();
        // MUT grad_g: ;
        own.write_dx(in, decay, to_f32(d[head0 + m]), dx + m * C::head_dim, dx_stride, rows);
        own.through(dc_sum, &partial.z[0][0], in.dy, in.h, sh.c, decay.from_start, nullptr);
        own.through(db_sum, &partial.v[0][0], in.x, in.dh, sh.b, decay.to_end, decay.dt);
        own.product(in, partial);
        __syncthreads();
        // MUT grad_partial: ;
        if (STAGES == 1 && m + 1 < HEADS) copy(in, m + 1);
        if (own.wr == m % G::ROWS && own.wc == 1) own.steps(decay, partial, rate, m, da + slot * C::heads + head0 + m, dd + slot * C::heads + head0 + m);
    }

    // E takes g's place.
#pragma unroll
    for (int j = 0; j < G::OWN_Q; j++) {
        if (G::COLS * j + own.wc > own.wr) break;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                store_spread(sh.g + (16 * own.wr + own.row + 8 * e) * G::G_PITCH, 16 * (G::COLS * j + own.wc) + 8 * i + 2 * own.q, e_sum[j][i][2 * e], e_sum[j][i][2 * e + 1]);
    }
    __syncthreads();
    // MUT grad_e: ;
#pragma unroll 1
    for (int k = 0; k < 16 * (own.wr + 1); k += K) {
        u32 fa[4], fb[4];
        load_a(fa, sh.g + 16 * own.wr * G::G_PITCH + k, G::G_PITCH);
#pragma unroll
        for (int j = 0; j < G::OWN_R; j++) {
            if (16 * (G::COLS * j + own.wc) >= R) break;
            load_b_kn<true>(fb, sh.b + k * G::R_PITCH + 16 * (G::COLS * j + own.wc), G::R_PITCH);
            Mma<T>::run(dc_sum[j][0], fa, fb[0], fb[1]);
            Mma<T>::run(dc_sum[j][1], fa, fb[2], fb[3]);
        }
    }
#pragma unroll 1
    for (int k = 16 * own.wr; k < Q; k += K) {
        u32 fa[4], fb[4];
        load_a_km<true>(fa, sh.g + k * G::G_PITCH + 16 * own.wr, G::G_PITCH);
#pragma unroll
        for (int j = 0; j < G::OWN_R; j++) {
            if (16 * (G::COLS * j + own.wc) >= R) break;
            load_b_kn<true>(fb, sh.c + k * G::R_PITCH + 16 * (G::COLS * j + own.wc), G::R_PITCH);
            Mma<T>::run(db_sum[j][0], fa, fb[0], fb[1]);
            Mma<T>::run(db_sum[j][1], fa, fb[2], fb[3]);
        }
    }
    const i64 to = (i64)part * gridDim.z * l + token;
    own.write_rows(db_sum, db + to * db_stride + group * C::state, db_stride, rows);
    own.write_rows(dc_sum, dc + to * dc_stride + group * C::state, dc_stride, rows);
    for (int i = threadIdx.x; i < rows * HEADS; i += THREADS) {
        const int t = i / HEADS, m = i % HEADS;
        ddt[t * ddt_stride + m] = sh.dt[t * G::DT_PITCH + m];
    }
}

}  // namespace rambac
