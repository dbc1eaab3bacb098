// y = x·Wᵀ for a few rows of x, and of its norm or gated norm: the products of a decoding step.
//
//   y[i, n] = end(Σ_k x[i, k]·W[n, k])                                      plain
//   u = x, or x·silu(z)     r = 1 / sqrt(mean(u²) + eps)     y[i, n] = end(r·Σ_k u[i, k]·g[k]·W[n, k])      normed
//
// Every weight is read once; that traffic limits it.  A block owns OUTS rows of W, its threads lie along k:
//
//   k →      thread 0: vec | thread 1: vec | … | thread 0: vec | …          OUTS·ROWS sums in registers, f32
//   then the sums of all threads, warp by warp in order; Σ u² is one of them, so that the norm costs no pass of its own
//
// What no kernel before it writes is asked for before it waits for them (earlier.cuh): W, as far as registers hold it, and what
// `end` holds.  So weights are on their way while what they are multiplied by is still made.
//
// C says: T (of x and z), G (of the norm's weight), W, Out, width (k), rows (most), outs, vec, threads, eps, early; x's rows are
// `x_stride` apart, W's `w_stride`, y's `y_stride`.  Grid (ceil(n / outs)).
#pragma once
#include "earlier.cuh"
#include "map.cuh"
#include "warp.cuh"

namespace rambac {

// Hooks: what a row is multiplied by.
struct PlainRow {
    static constexpr bool normed = false, gated = false;
};
template <class G> struct NormedRow {
    static constexpr bool normed = true, gated = false;
    const G* weight;
};
template <class G, class T> struct GatedRow {
    static constexpr bool normed = true, gated = true;
    const G* weight;
    const T* z;
    i64 z_stride;
};

// Hooks: what becomes of a sum.  `ahead` asks for what is there before the kernel waits, `beside` for the rest.
struct AsItIs {
    struct Held {};
    __device__ __forceinline__ Held ahead(int, int) const { return {}; }
    __device__ __forceinline__ void beside(Held&, int, int) const {}
    __device__ __forceinline__ float operator()(float v, int, int, const Held&) const { return v; }
};

// Columns from `first` on are the inputs of a causal convolution too, of one token (conv.cuh): its state [rows, K - 1, channels]
// goes on by it.  Whoever has a channel reads and writes its state alone, so s may lie over s0.
template <class T, class E, int K, bool SILU> struct Convolved {
    i32 first, channels;
    const E* w;
    const E* bias;
    const E* s0;
    T* y;
    i64 y_stride;
    E* s;

    struct Held {
        float w[K], state[K - 1], bias;
    };
    __device__ __forceinline__ bool mine(int c) const { return c >= first && c < first + channels; }
    __device__ __forceinline__ i64 at(int r, int j, int c) const { return ((i64)r * (K - 1) + j) * channels + c - first; }
    __device__ __forceinline__ Held ahead(int r, int c) const {
        Held h = {};
        if (!mine(c)) return h;
#pragma unroll
        for (int j = 0; j < K; j++) h.w[j] = to_f32(w[(i64)(c - first) * K + j]);
#pragma unroll
        for (int j = 0; j < K - 1; j++) h.state[j] = to_f32(s0[at(r, j, c)]);
        h.bias = to_f32(bias[c - first]);
        return h;
    }
    __device__ __forceinline__ void beside(Held&, int, int) const {}
    __device__ __forceinline__ float operator()(float v, int r, int c, const Held& h) const {
        if (!mine(c)) return v;
        const float x = to_f32(from_f32<T>(v));
        float pre = h.bias;
#pragma unroll
        for (int j = 0; j < K - 1; j++) pre = fmaf(h.w[j], h.state[j], pre);
        pre = fmaf(h.w[K - 1], x, pre);
        // MUT few_conv_last: pre = fmaf(h.w[K - 1], h.state[K - 2], pre);
#pragma unroll
        for (int j = 0; j < K - 1; j++) s[at(r, j, c)] = from_f32<E>(j + 2 < K ? h.state[j + 1] : x);
        // MUT few_conv_state: for (int j = 0; j < K - 1; j++) s[at(r, j, c)] = from_f32<E>(h.state[j]);
        y[r * y_stride + c - first] = from_f32<T>(SILU ? pre * sigmoid_fast(pre) : pre);
        return v;
    }
};

template <class C, class Row, class End>
__device__ __forceinline__ void few_rows(typename C::Out* y, i64 y_stride, const typename C::T* x, i64 x_stride,
                                         const typename C::W* w, i64 w_stride, i32 rows, i32 n, const Row& row, const End& end) {
    constexpr int V = C::vec, OUTS = C::outs, ROWS = C::rows, WARPS = C::threads / 32, SUMS = ROWS * (OUTS + Row::normed);
    static_assert(C::width % V == 0, "rows are whole vectors");
    static_assert(ROWS * OUTS <= C::threads, "a thread ends a sum");
    __shared__ float sums[WARPS][SUMS];
    const int n0 = blockIdx.x * OUTS, own_r = threadIdx.x / OUTS, own_n = n0 + threadIdx.x % OUTS;
    const bool ends = own_r < min_of(rows, ROWS) && own_n < n;
    let_next_begin<C>();
    // Vectors of at most 16 bytes; so many pieces of W are asked for ahead.
    constexpr int STRIDE = C::threads * V, PIECES = (C::width + STRIDE - 1) / STRIDE, EACH = VECTOR<typename C::W, V>;
    constexpr int AHEAD = min_of(PIECES, max_of(1, 8 / OUTS));
    auto at = [](int piece) { return piece * STRIDE + (int)threadIdx.x * V; };
    auto within = [](int k) { return C::width % STRIDE == 0 || k < C::width; };
    Vec<typename C::W, EACH> ws[AHEAD][OUTS][V / EACH];
    auto weights = [&](int into, int k) {
#pragma unroll
        for (int o = 0; o < OUTS; o++)
#pragma unroll
            for (int j = 0; j < V; j += EACH) ws[into][o][j / EACH] = load<typename C::W, EACH>(w + min_of(n0 + o, n - 1) * w_stride + k + j);
    };
#pragma unroll
    for (int piece = 0; piece < AHEAD; piece++)
        if (within(at(piece))) weights(piece, at(piece));
    typename End::Held held = {};
    if (ends) held = end.ahead(own_r, own_n);
    wait_for_earlier<C>();
    // MUT few_wait: ;
    if (ends) end.beside(held, own_r, own_n);

    float acc[ROWS][OUTS] = {}, squares[ROWS] = {};
    auto multiply = [&](int into, int k) {
        float g[V], u[V], z[V];
        if constexpr (Row::normed) load_f32(g, row.weight + k);
        auto fetch = [&](int i) {
            load_f32(u, x + i * x_stride + k);
            if constexpr (Row::gated) load_f32(z, row.z + i * row.z_stride + k);
        };
        if (rows > 0) fetch(0);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            if (ROWS > 1 && i >= rows) break;
            if (i > 0) fetch(i);
            if constexpr (Row::gated) {
#pragma unroll
                for (int j = 0; j < V; j++) u[j] *= z[j] * sigmoid_fast(z[j]);
            }
            if constexpr (Row::normed) {
#pragma unroll
                for (int j = 0; j < V; j++) {
                    squares[i] = fmaf(u[j], u[j], squares[i]);
                    u[j] *= g[j];
                }
            }
#pragma unroll
            for (int o = 0; o < OUTS; o++)
#pragma unroll
                for (int j = 0; j < V; j++) acc[i][o] = fmaf(u[j], to_f32(ws[into][o][j / EACH][j % EACH]), acc[i][o]);
        }
    };
#pragma unroll
    for (int piece = 0; piece < AHEAD; piece++)
        if (within(at(piece))) multiply(piece, at(piece));
#pragma unroll 2
    for (int piece = AHEAD; piece < PIECES; piece++) {
        if (!within(at(piece))) break;
        weights(0, at(piece));
        multiply(0, at(piece));
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        if (ROWS > 1 && i >= rows) break;
        const float sum = warp_sums(acc[i]);
        if (lane_id() % (32 / OUTS) == 0) sums[warp_id()][i * OUTS + lane_id() / (32 / OUTS)] = sum;
        if constexpr (Row::normed) {
            const float square = warp_sum(squares[i]);
            if (lane_id() == 0) sums[warp_id()][ROWS * OUTS + i] = square;
        }
    }
    __syncthreads();
    // MUT few_ready: ;
    if (ends) {
        float sum = 0.f, square = 0.f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) {
            sum += sums[warp][threadIdx.x];
            if constexpr (Row::normed) square += sums[warp][ROWS * OUTS + own_r];
            // MUT few_square: if constexpr (Row::normed) square += sums[0][ROWS * OUTS + own_r];
        }
        if constexpr (Row::normed) sum *= rsqrtf(square * (1.f / C::width) + C::eps);
        // MUT few_eps: if constexpr (Row::normed) sum *= rsqrtf(square * (1.f / C::width));
        y[own_r * y_stride + own_n] = from_f32<typename C::Out>(end(sum, own_r, own_n, held));
    }
}

}  // namespace rambac
