// Gradients of a block of the selective scan on Hopper: `scan_grad` of scan_backward.cuh with products of warpgroups.
//
// Two warpgroups go through the heads of a group together; one has a row per t, the other a row per s, so that neither waits
// for the other before the end.  With g' = (c·bᵀ)∘e, which is g without dt_s:
//
//   t:  m = dy·xᵀ, from it E and F's sums over s      dc += (exp(cs)·dy)·h      c·hᵀ, whose dots with dy are c_t·z_t
//   s:  dx' = to_end∘(b·Dᵀ) + g'ᵀ·dy (g' in registers)      db += (w·x)·D      dots x·dx' are F's sums over t and b_s·v_s
//   at the end  dc += E·b  and, by way of shared memory,  db += Eᵀ·c
//
// A third copies the next heads' tiles (h and D, which lie in panels in memory, too, by bulk copies), makes their factors, <D, h>,
// and from the dots da, dd and ddt.  F's sums over s take
// g' as rounded as the other's product has it: in what is left of their differences their errors cancel, too.
//
// Traffic per head and block, 2·(3·Q·P + 2·P·R) bytes, is what limits it.
//
// C: as for scan_grad; 16-bit T, Q = P = 64, R 64 or 128, `whole`; 384 threads.  Grid as for scan_grad.
#pragma once
#include "scan_hopper.cuh"

namespace rambac {

template <class C> struct ScanGradHopper {
    using T = typename C::T;
    static constexpr int P = C::head_dim, R = C::state, Q = C::block, STAGES = C::stages, HEADS = C::heads / C::groups / C::parts;
    static constexpr int STEPS = R / 16, DT_PITCH = HEADS | 1;
    static_assert(sizeof(T) == 2 && C::whole && Q == 64 && P == 64 && (R == 64 || R == 128), "whole tiles of warpgroups");
    static_assert(STAGES == 3, "a warp each makes the factors of a stage");
    using Tile = Panels<64>;

    // Bytes: x, dy, h and D of every stage; b, c, E, and c·bᵀ in f32.
    static constexpr u32 TILE = 64 * 128, WIDE = TILE * R / 64, OF_DY = TILE, OF_H = 2 * TILE, OF_D = OF_H + WIDE, STAGE = OF_D + WIDE;
    static constexpr u32 OF_B = STAGES * STAGE, OF_C = OF_B + WIDE, OF_E = OF_C + WIDE, OF_CB = OF_E + TILE, TILES = OF_CB + 2 * TILE;
    // Dots of a head that make its steps' gradients: F's sums over s with c·z, and x·dx' without and with what is inside the block.
    struct Partial {
        float row[Q], outside[Q], direct[Q];
        float product[4], diagonal[4];
    };
    struct alignas(1024) Shared {
        u8 tiles[TILES];
        ScanDecay<Q> decay[STAGES];
        Partial partial[STAGES];
        // dt of all heads; ddt takes its place head by head.
        typename C::Exact dt[Q * DT_PITCH];
        // Of every head: a, d, and the gradients of both.
        float rate[HEADS], skip[HEADS], da[HEADS], dd[HEADS];
        Mbarrier full[STAGES], empty[STAGES];
    };

    Shared& sh;
    u32 tiles;
    int w, row, q;

    __device__ __forceinline__ ScanGradHopper(Shared& shared)
        : sh(shared), tiles(shared_address(shared.tiles)), w(warp_id() % 4), row(16 * (warp_id() % 4) + lane_id() / 4), q(2 * (lane_id() % 4)) {}

    // Rows of a warp in a tile [64, 64] as fragments of A.
    using Rows = u32[4][4];
    __device__ __forceinline__ void load_rows(Rows& f, u32 tile) const {
        const u32 at = Tile(tile).at(16 * w + lane_id() % 16, lane_id() / 16);
#pragma unroll
        for (int k = 0; k < 4; k++) ldmatrix4(f[k], at ^ 32 * k);
    }
    // The same times a factor per row.
    __device__ __forceinline__ static void scale_rows(Rows& out, const Rows& f, const float (&by)[2]) {
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) out[k][i] = pack2<T>(to_f32(T{(u16)f[k][i]}) * by[i % 2], to_f32(T{(u16)(f[k][i] >> 16)}) * by[i % 2]);
    }
    // Dots of rows of A with those of D.
    __device__ __forceinline__ static void dots(float (&sum)[2], const Rows& f, const float (&d)[8][4]) {
        sum[0] = sum[1] = 0.f;
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* with = d[2 * k + i / 2] + i % 2 * 2;
                sum[i % 2] = fmaf(to_f32(T{(u16)f[k][i]}), with[0], fmaf(to_f32(T{(u16)(f[k][i] >> 16)}), with[1], sum[i % 2]));
            }
    }
    // Calls f(k, last) for the pieces of 16 columns on one side of the diagonal of the warp's rows; `last` has it inside.
    template <class F> __device__ __forceinline__ void below(F f) const {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (k < w) f(k, false);
            else if (k == w) f(k, true);
        }
    }

    // The side of t.
    __device__ __forceinline__ void rows_t(typename C::Sum* dc, i64 stride, int rows) {
        float e_sum[8][4], sum[R / 8][4], acc[8][4];
        clear(e_sum), clear(sum);
        // A single head's would be cleared behind products_begin.
        in_flight(sum);
        const Tile bs(tiles + OF_B), cs(tiles + OF_C);
        const u32 cb_at = tiles + OF_CB + threadIdx.x % 128 * 16;
        // dy·xᵀ of a head is made while the one before it is finished.
        auto begin = [&](u32 stage) {
            products_begin();
            in_flight(acc);
#pragma unroll
            for (int i = 0; i < 4; i++) Wgmma<T, 64, 0, 0>::run(acc, Tile(stage + OF_DY).along_rows(i), Tile(stage).along_rows(i), i > 0);
            products_commit();
        };
        Ring<STAGES> from, next;
        sh.full[next.at].wait(next.parity);
        // MUT grad_hopper_ready: ;
        {
            // c·bᵀ is the same for all heads; every thread keeps its own in shared memory.
            float cb[8][4];
            products_begin();
            // MUT grad_hopper_unfenced_cb: ;
#pragma unroll
            for (int i = 0; i < STEPS; i++) Wgmma<T, 64, 0, 0>::run(cb, cs.along_rows(i), bs.along_rows(i), i > 0);
            products_commit();
            products_wait<0>();
            in_flight(cb);
#pragma unroll
            for (int j = 0; j < 8; j++) store_shared16(cb_at + j * 2048, {__float_as_uint(cb[j][0]), __float_as_uint(cb[j][1]), __float_as_uint(cb[j][2]), __float_as_uint(cb[j][3])});
        }
        begin(tiles);
#pragma unroll 1
        for (int m = 0; m < HEADS; m++) {
            const u32 stage = tiles + from.at * STAGE;
            const Tile hs(stage + OF_H);
            const ScanDecay<Q>& decay = sh.decay[from.at];
            Partial& partial = sh.partial[from.at];
            Rows dy, weighted;
            float total[2] = {}, dot[2], diagonal = 0.f;
            const float now[2] = {decay.hi[row], decay.hi[row + 8]};
            load_rows(dy, stage + OF_DY);
            scale_rows(weighted, dy, {decay.from_start[row], decay.from_start[row + 8]});
            products_wait<0>();
            // MUT grad_hopper_m: ;
            in_flight(acc);
            products_begin();
            // MUT grad_hopper_unfenced_dc: ;
            in_flight(sum);
#pragma unroll
            for (int i = 0; i < 4; i++) Wgmma<T, R, 0, 1>::run(sum, weighted[i], hs.along_columns(i), true);
            products_commit();
            below([&](int k, bool last) {
#pragma unroll
                for (int j = 2 * k; j < 2 * k + 2; j++) {
                    const uint4 words = load_shared16(cb_at + j * 2048);
                    const float cb[4] = {__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z), __uint_as_float(words.w)};
                    float hi[2], dt[2];
                    load_f32(hi, decay.hi + 8 * j + q);
                    load_f32(dt, decay.dt + 8 * j + q);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float between[2], value[2];
#pragma unroll
                        for (int f = 0; f < 2; f++) {
                            between[f] = exp2_fast(now[e] - hi[f]);
                            if (last && 8 * j + q + f > row + 8 * e) between[f] = 0.f;
                            value[f] = acc[j][2 * e + f];
                            if (last && 8 * j + q + f == row + 8 * e) diagonal += value[f];
                            // MUT grad_hopper_diagonal: if (last && 8 * j + q + f == row + 8 * e + 1) diagonal += value[f];
                            value[f] *= dt[f];
                            e_sum[j][2 * e + f] = fmaf(value[f], between[f], e_sum[j][2 * e + f]);
                        }
                        const u32 g = pack2<T>(cb[2 * e] * between[0], cb[2 * e + 1] * between[1]);
                        total[e] = fmaf(value[0], to_f32(T{(u16)g}), fmaf(value[1], to_f32(T{(u16)(g >> 16)}), total[e]));
                    }
                }
            });
            float through[8][4];
            products_begin();
#pragma unroll
            for (int i = 0; i < STEPS; i++) Wgmma<T, 64, 0, 0>::run(through, cs.along_rows(i), hs.along_rows(i), i > 0);
            products_commit();
            // Behind the last head its own product is made once more, and not used.
            if (m + 1 < HEADS) {
                next.next();
                sh.full[next.at].wait(next.parity);
                // MUT grad_hopper_ready_next: ;
            }
            begin(tiles + next.at * STAGE);
            diagonal = warp_sum(diagonal);
            if (lane_id() == 0) partial.diagonal[w] = diagonal;
            products_wait<1>();
            in_flight(sum), in_flight(through);
            // Loaded again: they take no registers in between.
            load_rows(dy, stage + OF_DY);
            dots(dot, dy, through);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                total[e] = warp_sum<4>(fmaf(decay.from_start[row + 8 * e], dot[e], total[e]));
                if (q == 0) partial.row[row + 8 * e] = total[e];
            }
            __syncwarp();
            if (lane_id() == 0) sh.empty[from.at].arrive();
            from.next();
        }
        products_wait<0>();
        in_flight(acc);
        // E takes its place and goes on as an operand.
        u32 e[4][4];
        const u32 to = Tile(tiles + OF_E).at(16 * w + lane_id() % 16, lane_id() / 16);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            a_of_d<T>(e[k], e_sum + 2 * k);
            stmatrix4(to ^ 32 * k, e[k]);
        }
        shared_to_products();
        // MUT grad_hopper_e: ;
        both_sync();
        products_begin();
        // MUT grad_hopper_unfenced_e: ;
        in_flight(sum);
#pragma unroll
        for (int i = 0; i < 4; i++) Wgmma<T, R, 0, 1>::run(sum, e[i], bs.along_columns(i), true);
        products_commit();
        products_wait<0>();
        in_flight(sum);
        write_rows(dc, stride, rows, sum);
    }

    // The side of s.
    __device__ __forceinline__ void rows_s(T* dx, i64 dx_stride, typename C::Sum* db, i64 stride, int rows) {
        float bc[8][4], sum[R / 8][4];
        clear(sum);
        in_flight(sum);
        const Tile bs(tiles + OF_B), cs(tiles + OF_C);
        Ring<STAGES> from;
#pragma unroll 1
        for (int m = 0; m < HEADS; m++) {
            const u32 stage = tiles + from.at * STAGE;
            const Tile ds(stage + OF_D);
            const ScanDecay<Q>& decay = sh.decay[from.at];
            Partial& partial = sh.partial[from.at];
            sh.full[from.at].wait(from.parity);
            // MUT grad_hopper_ready_s: ;
            if (m == 0) {
                products_begin();
#pragma unroll
                for (int i = 0; i < STEPS; i++) Wgmma<T, 64, 0, 0>::run(bc, bs.along_rows(i), cs.along_rows(i), i > 0);
                products_commit();
                products_wait<0>();
                in_flight(bc);
            }
            float acc[8][4], dot[2];
            Rows x, weighted, g;
            products_begin();
            // MUT grad_hopper_unfenced_bd: ;
#pragma unroll
            for (int i = 0; i < STEPS; i++) Wgmma<T, 64, 0, 0>::run(acc, bs.along_rows(i), ds.along_rows(i), i > 0);
            products_commit();
            const float now[2] = {decay.hi[row], decay.hi[row + 8]};
            load_rows(x, stage);
            scale_rows(weighted, x, {decay.to_end[row] * decay.dt[row], decay.to_end[row + 8] * decay.dt[row + 8]});
            products_begin();
            // MUT grad_hopper_unfenced_db: ;
            in_flight(sum);
#pragma unroll
            for (int i = 0; i < 4; i++) Wgmma<T, R, 0, 1>::run(sum, weighted[i], ds.along_columns(i), true);
            products_commit();
#pragma unroll
            for (int k = 0; k < 4; k++) {
                if (k < w) {
#pragma unroll
                    for (int i = 0; i < 4; i++) g[k][i] = 0;
                    continue;
                }
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float hi[2];
                    load_f32(hi, decay.hi + 16 * k + 8 * j + q);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float value[2];
#pragma unroll
                        for (int f = 0; f < 2; f++) {
                            value[f] = bc[2 * k + j][2 * e + f] * exp2_fast(hi[f] - now[e]);
                            if (k == w && 16 * k + 8 * j + q + f < row + 8 * e) value[f] = 0.f;
                            // MUT grad_hopper_triangle: if (k == w && 16 * k + 8 * j + q + f <= row + 8 * e) value[f] = 0.f;
                        }
                        g[k][2 * j + e] = pack2<T>(value[0], value[1]);
                    }
                }
            }
            products_wait<1>();
            // MUT grad_hopper_outside: ;
            in_flight(acc);
            row_scale(acc, {decay.to_end[row], decay.to_end[row + 8]});
            dots(dot, x, acc);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                dot[e] = warp_sum<4>(dot[e]);
                if (q == 0) partial.outside[row + 8 * e] = dot[e];
            }
            products_begin();
            // MUT grad_hopper_unfenced_dx: ;
            in_flight(acc);
#pragma unroll
            for (int i = 0; i < 4; i++) Wgmma<T, 64, 0, 1>::run(acc, g[i], Tile(stage + OF_DY).along_columns(i), true);
            products_commit();
            Rows dy;
            // x again: it takes no registers in between.
            load_rows(x, stage), load_rows(dy, stage + OF_DY);
            const float dt[2] = {decay.dt[row], decay.dt[row + 8]};
            products_wait<0>();
            in_flight(acc), in_flight(sum);
            dots(dot, x, acc);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                dot[e] = warp_sum<4>(dot[e]);
                if (q == 0) partial.direct[row + 8 * e] = dot[e];
            }
            __syncwarp();
            if (lane_id() == 0) sh.empty[from.at].arrive();
            from.next();
            const float skip = sh.skip[m];
            row_scale(acc, dt);
#pragma unroll
            for (int k = 0; k < 4; k++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float* to = acc[2 * k + i / 2] + i % 2 * 2;
                    to[0] = fmaf(skip, to_f32(T{(u16)dy[k][i]}), to[0]);
                    to[1] = fmaf(skip, to_f32(T{(u16)(dy[k][i] >> 16)}), to[1]);
                }
            write_rows(dx + m * P, dx_stride, rows, acc);
        }
        both_sync();
        // MUT grad_hopper_exchange: ;
        products_begin();
        in_flight(sum);
#pragma unroll
        for (int i = 0; i < 4; i++) Wgmma<T, R, 1, 1>::run(sum, Tile(tiles + OF_E).along_columns(i), cs.along_columns(i), true);
        products_commit();
        products_wait<0>();
        in_flight(sum);
        write_rows(db, stride, rows, sum);
    }
    __device__ __forceinline__ static void both_sync() { asm volatile("bar.sync 4, 256;" ::: "memory"); }
    template <class O, int TILES> __device__ __forceinline__ void write_rows(O* to, i64 stride, int rows, const float (&d)[TILES][4]) const {
        store_d_global(row < rows ? to + row * stride : nullptr, row + 8 < rows ? to + (row + 8) * stride : nullptr, d);
    }

    // <D, h>, per warp.
    __device__ __forceinline__ void product(u32 stage, Partial& partial) const {
        // Diagonals of D·hᵀ, 8 rows of h at a time.
        const u32 at = Panels<P>(stage).at(16 * w + lane_id() % 16, lane_id() / 16);
        float low[4] = {}, high[4] = {};
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            const u32 place = (at ^ 32 * (k % 4)) + k / 4 * TILE;
            u32 of_d[4], of_h[4];
            ldmatrix4(of_d, place + OF_D), ldmatrix4(of_h, place + OF_H);
            Mma<T>::run(low, of_d, of_h[0], of_h[2]);
            Mma<T>::run(high, of_d, of_h[1], of_h[3]);
        }
        const bool even = q == lane_id() / 4, odd = q + 1 == lane_id() / 4;
        const float sum = warp_sum(even ? low[0] + high[2] : odd ? low[1] + high[3] : 0.f);
        if (lane_id() == 0) partial.product[w] = sum;
    }

    // A warp puts a head's dots together: ddt, and da and dd of the block.
    __device__ __forceinline__ void steps(const ScanDecay<Q>& decay, const Partial& partial, int m) {
        const float a = sh.rate[m];
        constexpr int EACH = Q / 32;
        const int t0 = lane_id() * EACH;
        float dcs[EACH], direct[EACH], dt[EACH], tail = 0.f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            dt[i] = decay.dt[t0 + i];
            direct[i] = partial.direct[t0 + i];
            dcs[i] = partial.row[t0 + i] - dt[i] * direct[i];
            tail = fmaf(dt[i], partial.outside[t0 + i], tail);
        }
        float product = 0.f, diagonal = 0.f;
#pragma unroll
        for (int i = 0; i < 4; i++) product += partial.product[i], diagonal += partial.diagonal[i];
        tail = fmaf(decay.from_start[Q - 1], product, warp_sum(tail));
        // MUT grad_hopper_tail: tail = warp_sum(tail);
        const float own = scan_step_gradients(dcs, direct, dt, tail, a, [&](int i, float g) { sh.dt[(t0 + i) * DT_PITCH + m] = from_f32<typename C::Exact>(g); });
        if (lane_id() == 0) sh.da[m] = own, sh.dd[m] = diagonal;
    }

    // The third warpgroup.  `copy(stage, m, full)` begins a head's copies.
    template <class Copy> __device__ __forceinline__ void produce(const Copy& copy) {
        Ring<STAGES> to, done;
        auto finish = [&] {
            sh.full[done.at].wait(done.parity);
            product(tiles + done.at * STAGE, sh.partial[done.at]);
            __syncwarp();
            if (lane_id() == 0) sh.empty[done.at].arrive();
            done.next();
        };
#pragma unroll 1
        for (int m = 0; m < HEADS; m++) {
            if (m >= STAGES) sh.empty[to.at].wait(to.parity ^ 1);
            // MUT grad_hopper_free: ;
            copy(tiles + to.at * STAGE, m, sh.full[to.at]);
            copies_commit();
            // While it is copied: the head before it, and the factors.
            if (m > 0) finish();
            if (w == to.at) {
                if (m >= STAGES) steps(sh.decay[to.at], sh.partial[to.at], m - STAGES);
                __syncwarp();
                ScanSteps<Q> steps;
                steps.load(sh.dt + m, DT_PITCH, Q);
                steps.factors(sh.decay[to.at], sh.rate[m]);
            }
            copies_wait<0>();
            // MUT grad_hopper_wait: copies_wait<1>();
            shared_to_products();
            sh.full[to.at].arrive();
            to.next();
        }
        finish();
        constexpr int LEFT = min_of(STAGES, HEADS);
#pragma unroll
        for (int m = HEADS - LEFT; m < HEADS; m++) {
            sh.empty[m % STAGES].wait(m / STAGES % 2);
            if (w == m % STAGES) steps(sh.decay[m % STAGES], sh.partial[m % STAGES], m);
        }
    }
};

// As `scan_grad`.
template <class C>
__device__ __forceinline__ void scan_grad_hopper(const typename C::T* x, i64 x_stride, const typename C::Exact* dt, i64 dt_stride, const typename C::Exact* a,
                                                 const typename C::T* b, i64 b_stride, const typename C::T* c, i64 c_stride, const typename C::Exact* d,
                                                 const typename C::T* dy, i64 dy_stride, const typename C::T* states, const typename C::T* gradients,
                                                 typename C::T* dx, i64 dx_stride, typename C::Exact* ddt, i64 ddt_stride, typename C::Sum* db, i64 db_stride,
                                                 typename C::Sum* dc, i64 dc_stride, float* da, float* dd, i32 l) {
    using G = ScanGradHopper<C>;
    using T = typename C::T;
    constexpr int P = G::P, R = G::R, Q = G::Q, HEADS = G::HEADS;
    static_assert(sizeof(typename G::Shared) <= C::shared, "the stub gives the shared memory that the kernel takes");
    typename G::Shared& sh = *reinterpret_cast<typename G::Shared*>(scan_memory);
    G own(sh);
    const int t0 = blockIdx.x * Q, rows = min_of(l - t0, Q), group = blockIdx.y / C::parts, part = blockIdx.y % C::parts;
    const int head0 = blockIdx.y * HEADS, side = warp_id() / 4;
    const i64 n = blockIdx.z, token = n * l + t0, blocks = ceil_div(l, Q), slot = n * gridDim.x + blockIdx.x;
    if (rows <= 0) {
        for (int m = threadIdx.x; m < HEADS; m += blockDim.x) da[slot * C::heads + head0 + m] = dd[slot * C::heads + head0 + m] = 0.f;
        return;
    }
    if (threadIdx.x < G::STAGES) sh.full[threadIdx.x].init(128 + 1), sh.empty[threadIdx.x].init(12);
    __syncthreads();
    const i64 to = (i64)part * gridDim.z * l + token;
    if (side == 2) {
        fewer_registers<72>();
        const int thread = threadIdx.x % 128;
        x += token * x_stride + head0 * P, dy += token * dy_stride + head0 * P;
        dt += token * dt_stride + head0;
        const i64 state = ((n * blocks + blockIdx.x) * C::heads + head0) * (P * R);
        auto copy = [&](u32 stage, int m, Mbarrier& full) {
            copy_panel_rows<8>(Panels<Q>(stage), x + m * P, x_stride, rows);
            copy_panel_rows<8>(Panels<Q>(stage + G::OF_DY), dy + m * P, dy_stride, rows);
            if (thread == 0) {
                // States lie in panels.
                full.expect(2 * G::WIDE);
                // MUT grad_hopper_bytes: full.expect(G::WIDE);
                bulk_load(stage + G::OF_H, states + state + m * (P * R), G::WIDE, full);
                bulk_load(stage + G::OF_D, gradients + state + m * (P * R), G::WIDE, full);
            }
        };
        copy_panel_rows<R / 8>(Panels<Q>(own.tiles + G::OF_B), b + token * b_stride + group * R, b_stride, rows);
        copy_panel_rows<R / 8>(Panels<Q>(own.tiles + G::OF_C), c + token * c_stride + group * R, c_stride, rows);
        for (int i = thread; i < Q * HEADS; i += 128) {
            const int t = i / HEADS, m = i % HEADS;
            sh.dt[t * G::DT_PITCH + m] = t < rows ? dt[t * dt_stride + m] : from_f32<typename C::Exact>(0.f);
        }
        for (int m = thread; m < HEADS; m += 128) sh.rate[m] = to_f32(a[head0 + m]), sh.skip[m] = to_f32(d[head0 + m]);
        warpgroup_sync(side);
        own.produce(copy);
        warpgroup_sync(side);
        // MUT grad_hopper_steps: ;
        // Places are computed anew: they take no registers in the loop.
        asm volatile("" : "+r"(l));
        const i64 row = (i64)blockIdx.z * l + blockIdx.x * Q, at = ((i64)blockIdx.z * gridDim.x + blockIdx.x) * C::heads + head0;
        ddt += row * ddt_stride + head0;
        for (int i = thread; i < min_of(l - (int)blockIdx.x * Q, Q) * HEADS; i += 128) {
            const int t = i / HEADS, m = i % HEADS;
            ddt[t * ddt_stride + m] = sh.dt[t * G::DT_PITCH + m];
        }
        for (int m = thread; m < HEADS; m += 128) da[at + m] = sh.da[m], dd[at + m] = sh.dd[m];
    } else {
        more_registers<216>();
        if (side == 0) own.rows_t(dc + to * dc_stride + group * R, dc_stride, rows);
        else own.rows_s(dx + token * dx_stride + head0 * P, dx_stride, db + to * db_stride + group * R, db_stride, rows);
    }
}

}  // namespace rambac
