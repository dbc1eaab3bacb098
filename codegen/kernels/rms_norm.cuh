// Root-mean-square normalisation of rows, and its gradient; with a gate or without.
//
//   u = x, or gated x silu(z)         r = 1 / sqrt(mean(u²) + eps)       y = w u r
//   du = r (w dy - u r² mean(w dy u))       dw = sum over rows of dy u r
//   dx = du (+ base), or gated du silu(z), dz = du x silu'(z)
//
// `lanes` threads own a row and hold it in registers: part of a warp, a warp, or the whole CTA for wide rows.
//
//   row   | lane 0: vec | lane 1: vec | … | lane 0: vec | …      `pieces` vectors a lane
//
// Traffic: x (and z) and y once; backward x (and z), dy, dx (and dz, and a copy of dx in 16 bits) once, and per CTA a slot of dw
// [width] in f32 (slots.cuh adds them).  Memory limits both.  y may lie over x, dx over dy: a row is read whole before it is written.
//
// Every operand has a type of its own: f32 for a residual stream and weights, 16 bits for what products read.
//
// C: width, eps, vec, lanes, threads.  Grid (ceil(rows / (threads / lanes))); backward fewer, CTAs then take every
// grid-th group of rows.
#pragma once
#include "warp.cuh"

namespace rambac {

template <class C> struct NormRow {
    static constexpr int V = C::vec, LANES = C::lanes, PIECES = (C::width + V * LANES - 1) / (V * LANES);
    static constexpr int GROUPS = C::threads / LANES;
    static_assert(C::width % V == 0, "rows are whole vectors");
    static_assert(LANES <= 32 || LANES == C::threads, "a row belongs to lanes of a warp or to all of a CTA");
    using Values = float[PIECES][V];

    static __device__ __forceinline__ int column(int piece) { return (piece * LANES + threadIdx.x % LANES) * V; }
    // Whether this lane has such a piece: the last may be short.
    static __device__ __forceinline__ bool has(int piece) { return C::width % (V * LANES) == 0 || column(piece) < C::width; }

    static __device__ __forceinline__ float sum(float x, float* scratch) {
        if constexpr (LANES <= 32) return warp_sum<LANES>(x);
        else return block_sum<LANES>(x, scratch);
    }
    // Two at once: half as many barriers.
    static __device__ __forceinline__ void sums(float& a, float& b, float* scratch) {
        a = warp_sum<min_of(LANES, 32)>(a), b = warp_sum<min_of(LANES, 32)>(b);
        if constexpr (LANES > 32) {
            constexpr int WARPS = LANES / 32;
            if (lane_id() == 0) scratch[warp_id()] = a, scratch[WARPS + warp_id()] = b;
            __syncthreads();
            a = b = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) a += scratch[w], b += scratch[WARPS + w];
            __syncthreads();
        }
    }
    template <class T> static __device__ __forceinline__ void load(Values& v, int piece, const T* row) { load_f32(v[piece], row + column(piece)); }
};

// Hooks: what the row is multiplied by before the norm (nothing, or silu(z)), what is added to its gradient, and where that is
// written once more.
struct NoGate {
    static constexpr bool on = false;
};
template <class Z, class DZ = Z> struct SiluGate {
    static constexpr bool on = true;
    const Z* z;
    i64 z_stride;
    DZ* dz;
    i64 dz_stride;
};
struct NoBase {
    static constexpr bool on = false;
};
template <class T> struct RowBase {
    static constexpr bool on = true;
    const T* base;
    i64 stride;
};

struct NoCopy {
    static constexpr bool on = false;
};
template <class T> struct RowCopy {
    static constexpr bool on = true;
    T* copy;
    i64 stride;
};

template <class C, class X, class W, class Y, class Gate>
__device__ __forceinline__ void norm_rows(const X* x, i64 x_stride, const W* w, Y* y, i64 y_stride, i64 rows, const Gate& gate) {
    using R = NormRow<C>;
    __shared__ float scratch[max_of(C::threads / 32, 1)];
    const i64 row = (i64)blockIdx.x * R::GROUPS + threadIdx.x / C::lanes;
    // Lanes of a row past the end take part in sums of their warp.
    const bool mine = row < rows;
    typename R::Values v = {};
    float squares = 0.f;
#pragma unroll
    for (int p = 0; p < R::PIECES; p++) {
        if (mine && R::has(p)) {
            R::load(v, p, x + row * x_stride);
            if constexpr (Gate::on) {
                float z[C::vec];
                load_f32(z, gate.z + row * gate.z_stride + R::column(p));
#pragma unroll
                for (int i = 0; i < C::vec; i++) v[p][i] *= z[i] * sigmoid_fast(z[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < C::vec; i++) squares = fmaf(v[p][i], v[p][i], squares);
    }
    const float r = rsqrtf(R::sum(squares, scratch) * (1.f / C::width) + C::eps);
    // MUT norm_eps: const float r = rsqrtf(R::sum(squares, scratch) * (1.f / C::width));
#pragma unroll
    for (int p = 0; p < R::PIECES; p++) {
        if (!(mine && R::has(p))) continue;
        float weight[C::vec];
        load_f32(weight, w + R::column(p));
#pragma unroll
        for (int i = 0; i < C::vec; i++) v[p][i] *= r * weight[i];
        store_f32(y + row * y_stride + R::column(p), v[p]);
    }
}

template <class C, class X, class W, class DY, class DX, class Gate, class Base, class Copy = NoCopy>
__device__ __forceinline__ void norm_rows_grad(const X* x, i64 x_stride, const W* w, const DY* dy, i64 dy_stride, DX* dx, i64 dx_stride, float* slots, i64 rows,
                                               const Gate& gate, const Base& base, const Copy& copy = {}) {
    using R = NormRow<C>;
    __shared__ float scratch[2 * max_of(C::threads / 32, 1)];
    __shared__ float sums[R::GROUPS > 1 ? R::PIECES * C::vec * C::lanes : 1];
    const int lane = threadIdx.x % C::lanes, group = threadIdx.x / C::lanes;

    typename R::Values weight = {}, dw = {};
#pragma unroll
    for (int p = 0; p < R::PIECES; p++)
        if (R::has(p)) R::load(weight, p, w);

    for (i64 at = (i64)blockIdx.x * R::GROUPS; at < rows; at += (i64)gridDim.x * R::GROUPS) {
        const i64 row = at + group;
        const bool mine = row < rows;
        // u, and under a gate x and z beside it.
        typename R::Values v = {}, g = {}, xs = {}, zs = {};
        float squares = 0.f, dot = 0.f;
#pragma unroll
        for (int p = 0; p < R::PIECES; p++) {
            if (mine && R::has(p)) {
                R::load(v, p, x + row * x_stride);
                R::load(g, p, dy + row * dy_stride);
                if constexpr (Gate::on) {
                    R::load(zs, p, gate.z + row * gate.z_stride);
#pragma unroll
                    for (int i = 0; i < C::vec; i++) {
                        xs[p][i] = v[p][i];
                        v[p][i] *= zs[p][i] * sigmoid_fast(zs[p][i]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < C::vec; i++) {
                squares = fmaf(v[p][i], v[p][i], squares);
                dot = fmaf(v[p][i] * weight[p][i], g[p][i], dot);
            }
        }
        R::sums(squares, dot, scratch);
        const float r = rsqrtf(squares * (1.f / C::width) + C::eps);
        const float m = dot * (1.f / C::width) * r * r;
        // MUT norm_mean: const float m = dot * (1.f / C::width) * r;
#pragma unroll
        for (int p = 0; p < R::PIECES; p++) {
            float d[C::vec], dz[C::vec], more[C::vec] = {};
            if constexpr (Base::on)
                if (mine && R::has(p)) load_f32(more, base.base + row * base.stride + R::column(p));
#pragma unroll
            for (int i = 0; i < C::vec; i++) {
                d[i] = r * fmaf(weight[p][i], g[p][i], -v[p][i] * m);
                dw[p][i] = fmaf(g[p][i], v[p][i] * r, dw[p][i]);
                if constexpr (Gate::on) {
                    const float z = zs[p][i], s = sigmoid_fast(z);
                    dz[i] = d[i] * xs[p][i] * s * fmaf(z, 1.f - s, 1.f);
                    // MUT norm_gate: dz[i] = d[i] * xs[p][i] * s;
                    d[i] *= z * s;
                }
                if constexpr (Base::on) d[i] += more[i];
            }
            if (mine && R::has(p)) {
                store_f32(dx + row * dx_stride + R::column(p), d);
                if constexpr (Gate::on) store_f32(gate.dz + row * gate.dz_stride + R::column(p), dz);
                if constexpr (Copy::on) store_f32(copy.copy + row * copy.stride + R::column(p), d);
                // MUT norm_copy: if constexpr (Copy::on) store_f32(copy.copy + row * copy.stride + R::column(p), g[p]);
            }
        }
    }

    // Groups of lanes add up one after another.
    if constexpr (R::GROUPS > 1) {
        auto place = [&](int p, int i) -> float& { return sums[(p * C::vec + i) * C::lanes + lane]; };
        if (group == 0) {
#pragma unroll
            for (int p = 0; p < R::PIECES; p++)
#pragma unroll
                for (int i = 0; i < C::vec; i++) place(p, i) = dw[p][i];
        }
        for (int turn = 1; turn < R::GROUPS; turn++) {
            __syncthreads();
            // MUT norm_turns: ;
            if (turn == group) {
#pragma unroll
                for (int p = 0; p < R::PIECES; p++)
#pragma unroll
                    for (int i = 0; i < C::vec; i++) place(p, i) = dw[p][i] += place(p, i);
            }
        }
    }
    if (group == R::GROUPS - 1) {
#pragma unroll
        for (int p = 0; p < R::PIECES; p++)
            if (R::has(p)) store_f32(slots + (i64)blockIdx.x * C::width + R::column(p), dw[p]);
    }
}

template <class C, class X, class W, class Y>
__device__ __forceinline__ void rms_norm(const X* x, i64 x_stride, const W* w, Y* y, i64 y_stride, i64 rows) {
    norm_rows<C>(x, x_stride, w, y, y_stride, rows, NoGate{});
}
template <class C, class X, class Z, class W, class Y>
__device__ __forceinline__ void gated_rms_norm(const X* x, i64 x_stride, const Z* z, i64 z_stride, const W* w, Y* y, i64 y_stride, i64 rows) {
    norm_rows<C>(x, x_stride, w, y, y_stride, rows, SiluGate<Z>{z, z_stride, nullptr, 0});
}
template <class C, class X, class W, class DY, class DX>
__device__ __forceinline__ void rms_norm_grad(const X* x, i64 x_stride, const W* w, const DY* dy, i64 dy_stride, DX* dx, i64 dx_stride, float* slots, i64 rows) {
    norm_rows_grad<C>(x, x_stride, w, dy, dy_stride, dx, dx_stride, slots, rows, NoGate{}, NoBase{});
}
// dx is the norm's gradient plus `base`.
template <class C, class X, class W, class DY, class B, class DX>
__device__ __forceinline__ void rms_norm_grad_add(const X* x, i64 x_stride, const W* w, const DY* dy, i64 dy_stride, const B* base, i64 base_stride, DX* dx,
                                                  i64 dx_stride, float* slots, i64 rows) {
    norm_rows_grad<C>(x, x_stride, w, dy, dy_stride, dx, dx_stride, slots, rows, NoGate{}, RowBase<B>{base, base_stride});
}
// As the two above, with dx in another type too.
template <class C, class X, class W, class DY, class DX, class T>
__device__ __forceinline__ void rms_norm_grad_copy(const X* x, i64 x_stride, const W* w, const DY* dy, i64 dy_stride, DX* dx, i64 dx_stride, T* copy,
                                                   i64 copy_stride, float* slots, i64 rows) {
    norm_rows_grad<C>(x, x_stride, w, dy, dy_stride, dx, dx_stride, slots, rows, NoGate{}, NoBase{}, RowCopy<T>{copy, copy_stride});
}
template <class C, class X, class W, class DY, class B, class DX, class T>
__device__ __forceinline__ void rms_norm_grad_add_copy(const X* x, i64 x_stride, const W* w, const DY* dy, i64 dy_stride, const B* base, i64 base_stride, DX* dx,
                                                       i64 dx_stride, T* copy, i64 copy_stride, float* slots, i64 rows) {
    norm_rows_grad<C>(x, x_stride, w, dy, dy_stride, dx, dx_stride, slots, rows, NoGate{}, RowBase<B>{base, base_stride}, RowCopy<T>{copy, copy_stride});
}
template <class C, class X, class Z, class W, class DY, class DX, class DZ>
__device__ __forceinline__ void gated_rms_norm_grad(const X* x, i64 x_stride, const Z* z, i64 z_stride, const W* w, const DY* dy, i64 dy_stride, DX* dx,
                                                    i64 dx_stride, DZ* dz, i64 dz_stride, float* slots, i64 rows) {
    norm_rows_grad<C>(x, x_stride, w, dy, dy_stride, dx, dx_stride, slots, rows, SiluGate<Z, DZ>{z, z_stride, dz, dz_stride}, NoBase{});
}

}  // namespace rambac
