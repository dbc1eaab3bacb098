// The selective scan on Hopper: the walk of scan.cuh with products of warpgroups.
//
// A warpgroup owns 64 rows of a head's state [P, R] and keeps them in registers as results of products (D).  y is made
// transposed, so that the state is an operand (A) as it lies there, and x needs to be read once, by columns:
//
//            R                     t                 t                      s                  R
//        +-------+              +-----+           +-----+                +----+            +-------+
//   64 p | state |  ·  cᵀ,  e · |     |  +=  64 p |  xᵀ | · gᵀ       64 p|(wx)ᵀ|  ·  b  +=  | state |
//        +-------+              +-----+           +-----+                +----+            +-------+
//
//   state·cᵀ runs while g is made of c·bᵀ; g goes through shared memory (its lower triangle; the rest is zero from the
//   beginning); the state's own product and the next block's c·bᵀ run while y is written.
//
// b, c, x and g lie in panels (wgmma.cuh).  A warpgroup of its own copies blocks ahead (cp.async) and makes factors, a block and
// head per warp, so that what takes long is done once for several blocks, and warpgroups do products alone, each at its own
// pace.  Operands come from shared memory once per 64 rows in place of once per 16, which bounded scan.cuh.
//
// With C::panels a state is recorded as it lies in panels, by bulk copies: scan_grad_hopper.cuh reads it so.
//
// C: as for scan.cuh, and panels; 16-bit T, Q = 64, P a multiple of 64, R 64 or 128, `whole`.  128 threads per 64 rows of a head and 128 more; 3 stages or more.
#pragma once
#include "bulk.cuh"
#include "scan_backward.cuh"

namespace rambac {

// A warpgroup copies ROWS rows of 8·PIECES elements; rows from `rows` on become zeros.
template <int PIECES, int ROWS, class T> __device__ __forceinline__ void copy_panel_rows(Panels<ROWS> tile, const T* from, i64 stride, int rows) {
    constexpr int STEP = 128 / PIECES;
    static_assert(STEP % Panels<ROWS>::PERIOD == 0, "pieces of a thread lie a constant apart");
    const int first = threadIdx.x % 128 / PIECES, piece = threadIdx.x % PIECES;
    const u32 to = tile.at(first, piece);
    const T* at = from + first * stride + 8 * piece;
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP) {
        const bool valid = first + i < rows;
        copy16_async(to + i * Panels<ROWS>::ROW_BYTES, valid ? at : from, valid);
        at += STEP * stride;
    }
}

// Where a lane's row of [16, 16] lies in a tile of Q rows whose columns go over the warps: of what is transposed as it is moved.
template <int Q> __device__ __forceinline__ u32 across() {
    const int lane = lane_id();
    return Panels<Q>(0u).at(lane / 16 * 8 + lane % 8, warp_id() % 4 * 2 + lane / 8 % 2);
}
// What a step adds to the state by its x; in reverse, to the gradient by its dy.
template <int Q> __device__ __forceinline__ float scan_weight(const ScanDecay<Q>& decay, int t, bool reverse) {
    return reverse ? decay.from_start[t] : decay.to_end[t] * decay.dt[t];
}

template <class C, class Way> struct ScanWalkHopper : ScanPlace<C, Way> {
    using T = typename C::T;
    static constexpr int P = C::head_dim, R = C::state, Q = C::block, HEADS = C::heads_per_cta, STAGES = C::stages;
    static constexpr int SLICES = P / 64, GROUPS = HEADS * SLICES, THREADS = 128 * GROUPS + 128;
    static_assert(sizeof(T) == 2 && C::whole && Q == 64 && P % 64 == 0 && (R == 64 || R == 128), "whole tiles of warpgroups");
    static_assert(STAGES >= 3, "a block is told ready when the next is under way");
    static_assert(C::heads / C::groups % HEADS == 0, "the heads of a CTA are of one group");
    using Tile = Panels<Q>;

    // Bytes; all tiles are Q rows in panels.  A stage is x of every group, b, c; then g of every group and y on its way out.
    static constexpr u32 TILE = Q * 128, WIDE = TILE * R / 64, OF_B = GROUPS * TILE, OF_C = OF_B + WIDE, STAGE = OF_C + (Way::outputs ? WIDE : 0);
    static constexpr u32 OF_G = STAGES * STAGE, OF_OUT = OF_G + (Way::outputs ? GROUPS * TILE : 0);
    // Then two states on their way out.
    static constexpr bool PANELS = Way::record && C::panels;
    static constexpr u32 OF_RECORD = OF_OUT + (Way::outputs ? GROUPS * TILE : 0), TILES = OF_RECORD + (PANELS ? 2 * WIDE : 0);
    static_assert(!PANELS || P * HEADS == 64, "a state of a warpgroup");
    // Factors of so many blocks are made at once, and kept while they are used.
    static constexpr int BATCH = 4 / HEADS, KEPT = STAGES - 1 + BATCH;
    static_assert(HEADS <= 2, "a warp per block and head");
    struct alignas(1024) Shared {
        u8 tiles[TILES];
        ScanDecay<Q> decay[KEPT][HEADS];
        double total[4];
        Mbarrier full[STAGES], empty[STAGES];
    };

    using Place = ScanPlace<C, Way>;
    using Place::x, Place::b, Place::c, Place::dt, Place::a, Place::d, Place::x_stride, Place::dt_stride, Place::b_stride, Place::c_stride;
    using Place::y, Place::y_stride, Place::record, Place::decays, Place::first, Place::end, Place::blocks, Place::begin;
    float h[R / 8][4];

    __device__ __forceinline__ static int head0() { return blockIdx.y * HEADS; }
    __device__ __forceinline__ static int group() { return warp_id() / 4; }
    __device__ __forceinline__ static int head() { return head0() + group() / SLICES; }
    // First of the warp's 16 rows of the head's state.
    __device__ __forceinline__ static int slice() { return group() % SLICES * 64 + warp_id() % 4 * 16; }

    // Calls f(pair, place in [P, R]) for every pair of neighbouring elements.
    template <class F> __device__ __forceinline__ void each(F f) {
        const int lane = anew(lane_id()), at = (slice() + lane / 4) * R + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < R / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) f(h[j] + 2 * e, at + e * 8 * R + 8 * j);
    }
    __device__ __forceinline__ void clear() { rambac::clear(h); }
    template <class S> __device__ __forceinline__ void load_state(const S* from) {
        each([&](float* pair, int at) {
            float v[2];
            load_f32(v, from + at);
            pair[0] = v[0], pair[1] = v[1];
        });
    }
    template <class S> __device__ __forceinline__ void store_state(S* to) {
        each([&](float* pair, int at) {
            const float v[2] = {pair[0], pair[1]};
            store_f32(to + at, v);
        });
    }

    __device__ __forceinline__ void copy(u32 stage, int t0) const {
        const int rows = min_of(end - t0, Q);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) copy_panel_rows<8>(Tile(stage + g * TILE), x + t0 * x_stride + 64 * g, x_stride, rows);
        copy_panel_rows<R / 8>(Tile(stage + OF_B), b + t0 * b_stride, b_stride, rows);
        if constexpr (Way::outputs) copy_panel_rows<R / 8>(Tile(stage + OF_C), c + t0 * c_stride, c_stride, rows);
    }

    // The last warpgroup copies blocks ahead; a warp each makes the factors of a head of the next blocks.
    __device__ __forceinline__ void produce(Shared& sh) {
        const int count = blocks(), warp = warp_id() % 4, m = warp % HEADS, ahead = warp / HEADS;
        const u32 tiles = shared_address(sh.tiles);
        const float rate = to_f32(a[m]);
        ScanSteps<Q> steps;
        double total = 0.;
        auto load = [&](int k) {
            if (k < count) steps.load(dt + begin(k) * dt_stride + m, dt_stride, end - begin(k));
        };
        load(ahead);
        Ring<STAGES> to, done;
        auto ready = [&] {
            shared_to_products();
            sh.full[done.at].arrive();
            done.next();
        };
#pragma unroll 1
        for (int k = 0; k < count; k++) {
            if (k >= STAGES) sh.empty[to.at].wait(to.parity ^ 1);
            // MUT scan_hopper_free: ;
            copy(tiles + to.at * STAGE, begin(k));
            copies_commit();
            if (k > 0) {
                copies_wait<1>();
                // MUT scan_hopper_wait: copies_wait<2>();
                ready();
            }
            if (k % BATCH == 0) {
                if (k + ahead < count) total += steps.factors(sh.decay[(k + ahead) % KEPT][m], rate);
                load(k + BATCH + ahead);
            }
            to.next();
        }
        copies_wait<0>();
        if (count > 0) ready();
        if constexpr (Way::totals) {
            if (lane_id() == 0) sh.total[warp] = total;
            warpgroup_sync(GROUPS);
            if (ahead > 0 || lane_id() > 0) return;
#pragma unroll
            for (int i = 1; i < BATCH; i++) total += sh.total[i * HEADS + m];
            decays[m] = exp2_fast((float)total);
        }
    }

    // xᵀ [16, Q] as fragments of A.
    using Columns = u32[Q / 16][4];

    // The warp's rows of g from those of c·bᵀ, to a tile whose upper triangle is zero.
    __device__ __forceinline__ static void make_g(u32 tile, const ScanDecay<Q>& decay, const float (&cb)[Q / 8][4]) {
        const int w = warp_id() % 4, row = lane_id() / 4, q = 2 * (lane_id() % 4);
        const float now[2] = {decay.hi[16 * w + row], decay.hi[16 * w + row + 8]};
        const u32 to = Tile(tile).at(16 * w + lane_id() % 16, lane_id() / 16);
        // 16 columns; `last`: with the diagonal.
        auto columns = [&](int k, bool last) {
            u32 out[4];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float hi[2], dt[2], g[2][2];
                load_f32(hi, decay.hi + 16 * k + 8 * j + q);
                load_f32(dt, decay.dt + 16 * k + 8 * j + q);
#pragma unroll
                for (int e = 0; e < 2; e++) {
#pragma unroll
                    for (int f = 0; f < 2; f++) {
                        g[e][f] = cb[2 * k + j][2 * e + f] * (exp2_fast(now[e] - hi[f]) * dt[f]);
                        if (last && 8 * j + q + f > row + 8 * e) g[e][f] = 0.f;
                        // MUT scan_hopper_diagonal: if (last && 8 * j + q + f >= row + 8 * e) g[e][f] = 0.f;
                    }
                    out[2 * j + e] = pack2<T>(g[e][0], g[e][1]);
                }
            }
            stmatrix4(to ^ 32 * k, out);
        };
#pragma unroll
        for (int k = 0; k < Q / 16; k++) {
            if (k < w) columns(k, false);
            else if (k == w) columns(k, true);
        }
    }

    // yᵀ [64, Q] to rows of y, by way of a tile.
    __device__ __forceinline__ void write_outputs(u32 tile, const float (&acc)[Q / 8][4], int t0) const {
        const int thread = threadIdx.x % 128, rows = end - t0 - thread / 8;
        const u32 to = tile + across<Q>(), from = Tile(tile).at(thread / 8, thread % 8);
#pragma unroll
        for (int j = 0; j < Q / 8; j += 2) {
            u32 v[4];
            a_of_d<T>(v, acc + j);
            stmatrix4_trans(to + 8 * j * Tile::ROW_BYTES, v);
        }
        warpgroup_sync(group());
        // MUT scan_hopper_out: ;
        T* out = y + (t0 + thread / 8) * y_stride + 64 * group() + thread % 8 * 8;
#pragma unroll
        for (int i = 0; i < Q; i += 16) {
            const uint4 v = load_shared16(from + i * Tile::ROW_BYTES);
            const u32 words[4] = {v.x, v.y, v.z, v.w};
            if (i < rows) store_words<4>(out, words);
            out += 16 * y_stride;
        }
    }

    // The warp's rows of the state go to memory in panels, by way of shared memory.
    __device__ __forceinline__ void begin_record(u32 tile) const {
        const u32 at = Panels<64>(tile).at(warp_id() % 4 * 16 + lane_id() % 16, lane_id() / 16);
        if (lane_id() == 0) bulk_wait_read<1>();
        // MUT scan_hopper_record: ;
        __syncwarp();
#pragma unroll
        for (int k = 0; k < R / 16; k++) {
            u32 v[4];
            a_of_d<T>(v, h + 2 * k);
            stmatrix4((at ^ 32 * (k % 4)) + k / 4 * TILE, v);
        }
    }
    __device__ __forceinline__ static void write_record(u32 tile, T* to) {
        const int w = warp_id() % 4;
        shared_to_products();
        // MUT scan_hopper_record_fence: ;
        __syncwarp();
        if (lane_id() == 0) {
            constexpr u32 ROWS = 16 * 128;
#pragma unroll
            for (int i = 0; i < R / 64; i++) bulk_store(to + i * (TILE / 2) + w * (ROWS / 2), tile + i * TILE + w * ROWS, ROWS);
            bulk_commit();
        }
    }

    __device__ __forceinline__ void consume(Shared& sh) {
        const int count = blocks(), m = group() / SLICES;
        const u32 tiles = shared_address(sh.tiles), g = tiles + OF_G + group() * TILE, out = tiles + OF_OUT + group() * TILE;
        const u32 mine = group() * TILE + across<Q>();
        const float skip = Way::outputs ? to_f32(d[m]) : 0.f;
        if constexpr (Way::outputs) {
            for (int i = threadIdx.x % 128; i < Q * 32; i += 128) store_shared(g + 4 * i, 0);
            warpgroup_sync(group());
        }
        // Where the next state is recorded.
        T* place = record;
        if constexpr (Way::record) {
            if (count > 0) place += ((i64)(begin(0) / Q) * C::heads + head()) * P * R;
        }
        // c·bᵀ of a block is made while the one before it is finished; behind the last one its own once more, which is not used.
        float cb[Way::outputs ? Q / 8 : 2][4];
        Ring<STAGES> from, next;
        Ring<KEPT> kept;
        // x of a block as it lies, and what it adds to the state by.
        Columns xs, weighted;
        auto load_x = [&](int stage) {
#pragma unroll
            for (int i = 0; i < Q / 16; i++) ldmatrix4_trans(xs[i], tiles + stage * STAGE + mine + 16 * i * Tile::ROW_BYTES);
        };
        auto weigh_x = [&](int at) {
            const ScanDecay<Q>& decay = sh.decay[at][m];
#pragma unroll
            for (int i = 0; i < Q / 16; i++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int t = 16 * i + 8 * half + 2 * (lane_id() % 4);
                    const float lo = scan_weight(decay, t, Way::reverse), hi = scan_weight(decay, t + 1, Way::reverse);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const u32 v = xs[i][2 * half + e];
                        weighted[i][2 * half + e] = pack2<T>(to_f32(T{(u16)v}) * lo, to_f32(T{(u16)(v >> 16)}) * hi);
                    }
                }
        };
        auto begin_next = [&](int k) {
            const int at = k < count ? next.at : from.at;
            if (k < count) {
                sh.full[next.at].wait(next.parity);
                // MUT scan_hopper_ready: ;
                next.next();
            }
            if constexpr (Way::outputs) {
                const Tile bs(tiles + at * STAGE + OF_B), cs(tiles + at * STAGE + OF_C);
                products_begin();
                in_flight(cb);
#pragma unroll
                for (int i = 0; i < R / 16; i++) Wgmma<T, Q, 0, 0>::run(cb, cs.along_rows(i), bs.along_rows(i), i > 0);
                products_commit();
            }
        };
        if (count == 0) return;
        if constexpr (Way::outputs) begin_next(0);
#pragma unroll 1
        for (int k = 0; k < count; k++) {
            const u32 stage = tiles + from.at * STAGE;
            const ScanDecay<Q>& decay = sh.decay[kept.at][m];
            const Tile bs(stage + OF_B);
            const u32 recorded = tiles + OF_RECORD + k % 2 * WIDE;
            u32 state[Way::outputs ? R / 16 : 1][4];
            float acc[Q / 8][4];
            if constexpr (Way::outputs) {
#pragma unroll
                for (int i = 0; i < R / 16; i++) a_of_d<T>(state[i], h + 2 * i);
            }
            if constexpr (PANELS) begin_record(recorded);
            if constexpr (Way::record && !PANELS) {
                const int row = slice() + lane_id() / 4;
                store_d_global(place + row * R, place + (row + 8) * R, h);
            }
            if constexpr (!Way::outputs) {
                begin_next(k);
                load_x(from.at);
                weigh_x(kept.at);
            }
            if constexpr (Way::outputs) {
                const Tile cs(stage + OF_C);
                products_begin();
                // MUT scan_hopper_unfenced: ;
#pragma unroll
                for (int i = 0; i < R / 16; i++) Wgmma<T, Q, 0, 0>::run(acc, state[i], cs.along_rows(i), i > 0);
                products_commit();
                load_x(from.at);
                products_wait<1>();
                in_flight(cb);
                make_g(g, decay, cb);
                shared_to_products();
                products_wait<0>();
                in_flight(acc);
#pragma unroll
                for (int j = 0; j < Q / 8; j++) {
                    float by[2];
                    load_f32(by, decay.from_start + 8 * j + 2 * (lane_id() % 4));
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[j][e] *= by[e % 2];
                }
                warpgroup_sync(group());
                // MUT scan_hopper_g: ;
                products_begin();
                // MUT scan_hopper_unfenced_xs: ;
                in_flight(acc);
#pragma unroll
                for (int i = 0; i < Q / 16; i++) Wgmma<T, Q, 0, 0>::run(acc, xs[i], Tile(g).along_rows(i), true);
                products_commit();
                // Before the next product: what writes registers between products makes them wait for each other.
                weigh_x(kept.at);
            }
            // state = whole·state + (factor·x)ᵀ·b
            const float whole = decay.from_start[Q - 1];
#pragma unroll
            for (int j = 0; j < R / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) h[j][i] *= whole;
            products_begin();
            // MUT scan_hopper_unfenced_h: ;
            in_flight(h);
#pragma unroll
            for (int i = 0; i < Q / 16; i++) Wgmma<T, R, 0, 1>::run(h, weighted[i], bs.along_columns(i), true);
            products_commit();
            if constexpr (PANELS) write_record(recorded, place);
            if constexpr (Way::record) place += Way::reverse ? -C::heads * P * R : C::heads * P * R;
            kept.next();
            if constexpr (Way::outputs) {
                begin_next(k + 1);
                products_wait<2>();
                // MUT scan_hopper_y: ;
                in_flight(acc);
#pragma unroll
                for (int i = 0; i < Q / 16; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float* to = acc[2 * i + j / 2] + j % 2 * 2;
                        to[0] = fmaf(skip, to_f32(T{(u16)xs[i][j]}), to[0]);
                        to[1] = fmaf(skip, to_f32(T{(u16)(xs[i][j] >> 16)}), to[1]);
                    }
                write_outputs(out, acc, begin(k));
            }
            products_wait<Way::outputs ? 1 : 0>();
            in_flight(h);
            __syncwarp();
            if (lane_id() == 0) sh.empty[from.at].arrive();
            from.next();
        }
        if constexpr (PANELS) bulk_wait<0>();
    }

    // As ScanWalk::walk.
    template <class First, class Last>
    __device__ __forceinline__ void walk(Shared& sh, const ScanRows&, const ScanAsIs&, const First& first_state, const Last& last_state) {
        if (threadIdx.x < STAGES) sh.full[threadIdx.x].init(128), sh.empty[threadIdx.x].init(4 * GROUPS);
        __syncthreads();
        if (group() == GROUPS) {
            if constexpr (GROUPS > 1) fewer_registers<56>();
            produce(sh);
        } else {
            if constexpr (GROUPS > 1) more_registers<224>();
            first_state();
            consume(sh);
            last_state();
        }
    }
};

template <class C, class... A> __device__ __forceinline__ void selective_scan_hopper(A... a) { selective_scan<C, ScanWalkHopper>(a...); }
template <class C, class... A> __device__ __forceinline__ void scan_states_hopper(A... a) { scan_states<C, ScanWalkHopper>(a...); }
template <class C, class... A> __device__ __forceinline__ void scan_outputs_hopper(A... a) { scan_outputs<C, ScanWalkHopper>(a...); }
template <class C, class... A> __device__ __forceinline__ void scan_record_hopper(A... a) { scan_record<C, ScanWalkHopper>(a...); }
template <class C, class... A> __device__ __forceinline__ void scan_record_to_start_hopper(A... a) { scan_record_to_start<C, ScanWalkHopper>(a...); }

}  // namespace rambac
