// Depthwise causal convolution over time, with SiLU, and its gradient.
//
//   pre_t = bias + sum_j w_j x_{t-(k-1)+j}     y_t = act(pre_t)     x before time 0 is s0, oldest first
//   s     = the last k-1 inputs
//   g_t   = dy_t act'(pre_t)   dx_t = sum_j w_j g_{t+(k-1)-j} (+ ds)   dw_j = sum_t g_t x_{t-(k-1)+j}   dbias = sum_t g_t
//
// A thread owns VEC channels and walks over STEPS tokens with the last k inputs in registers:
//
//            lanes · vec channels
//   time   +---------------------+      rows · steps tokens a CTA; a thread reads k-1 tokens before its first
//     |    | thread row 0        |      (and, in backward, k-1 behind its last), which its neighbours read too:
//     v    | thread row 1 …      |      (steps + k-1) / steps of the minimum, from caches.
//
// Traffic: x once, y once; backward x, dy, dx once and k+1 floats per channel and CTA.  Memory limits both.
// s may lie over s0: whoever reads s0 (the threads of time 0) writes s, after reading.
//
// T: of x, y and their gradients; E: of w, bias and states, T or f32.
//
// C: channels, k, silu, aligned (w, to 16 bytes), vec, lanes, rows, steps.  Grid (ceil(L / (rows·steps)) or 1, ceil(channels / (lanes·vec)), N),
// lanes · rows threads.
#pragma once
#include "types.cuh"

namespace rambac {

// What a thread knows of its channels: the weights, and where rows of the padded input are.
template <class C, class T, class E> struct ConvThread {
    static constexpr int V = C::vec, K = C::k, H = C::k - 1;
    float w[V][K], bias[V];
    const T* x;
    const E* s0;
    i64 stride;

    __device__ __forceinline__ void load_weights(const E* w_at, const E* bias_at, int c) {
        float flat[V * K];
        if constexpr (C::aligned) {
            load_f32(flat, w_at + (i64)c * K);
        } else {
#pragma unroll
            for (int i = 0; i < V * K; i++) flat[i] = to_f32(w_at[(i64)c * K + i]);
        }
#pragma unroll
        for (int v = 0; v < V; v++)
#pragma unroll
            for (int j = 0; j < K; j++) w[v][j] = flat[v * K + j];
        load_f32(bias, bias_at + c);
    }
    // The input at time t >= -(k-1).
    __device__ __forceinline__ void load_input(float (&to)[V], int t) const {
        if (t < 0) load_f32(to, s0 + (i64)(t + H) * C::channels);
        // MUT conv_state_row: if (t < 0) load_f32(to, s0 + (i64)(t + H - 1) * C::channels);
        else load_f32(to, x + t * stride);
    }
    __device__ __forceinline__ float pre(const float (&window)[K][V], int v) const {
        float p = bias[v];
#pragma unroll
        for (int j = 0; j < K; j++) p = fmaf(w[v][j], window[j][v], p);
        return p;
    }
};

template <int K, int V> __device__ __forceinline__ void push(float (&window)[K][V], const float (&x)[V]) {
#pragma unroll
    for (int v = 0; v < V; v++) {
#pragma unroll
        for (int j = 0; j + 1 < K; j++) window[j][v] = window[j + 1][v];
        window[K - 1][v] = x[v];
    }
}

// A thread's walk forward.  INSIDE: nothing that it touches lies behind the sequence.
template <class C, class T, class E> struct ConvWalk : ConvThread<C, T, E> {
    static constexpr int V = C::vec, K = C::k, H = K - 1, BATCH = min_of(4, C::steps);
    using Piece = typename Word<sizeof(T) * V>::Type;
    T* y;
    i64 y_stride;
    int t1;
    float window[K][V] = {};
    Piece next[BATCH];

    template <bool INSIDE> __device__ __forceinline__ void fetch(int t, int i) {
        next[i] = INSIDE || t + i < t1 ? *reinterpret_cast<const Piece*>(this->x + (t + i) * this->stride) : none();
        // MUT conv_bound: next[i] = *reinterpret_cast<const Piece*>(this->x + (t + i) * this->stride);
    }
    template <bool INSIDE> __device__ __forceinline__ void walk(int t0) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) fetch<INSIDE>(t0, i);
        for (int t = t0; t < t1; t += BATCH) {
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                float in[V], value[V];
                unpack_f32<T>(in, next[i]);
                // A batch is on its way while the one before it is worked on.
                fetch<INSIDE>(t + BATCH, i);
                push(window, in);
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float p = this->pre(window, v);
                    value[v] = C::silu ? p * sigmoid_fast(p) : p;
                }
                if (INSIDE || t + i < t1) store_f32(y + (t + i) * y_stride, value);
            }
        }
    }
    __device__ __forceinline__ static Piece none() {
        Piece x;
        memset(&x, 0, sizeof(x));
        return x;
    }
};

template <class C, class T, class E>
__device__ __forceinline__ void causal_conv(const T* x, i64 x_stride, const E* w, const E* bias, const E* s0, T* y, i64 y_stride, E* s, i32 l) {
    constexpr int V = C::vec, H = C::k - 1;
    const int c = (blockIdx.y * C::lanes + threadIdx.x % C::lanes) * V;
    const int t0 = (blockIdx.x * C::rows + threadIdx.x / C::lanes) * C::steps;
    if (c >= C::channels || (t0 >= l && t0 > 0)) return;
    const i64 n = blockIdx.z;

    using Walk = ConvWalk<C, T, E>;
    Walk own;
    own.x = x + n * l * x_stride + c, own.stride = x_stride;
    own.s0 = s0 + n * H * C::channels + c;
    own.y = y + n * l * y_stride + c, own.y_stride = y_stride;
    own.t1 = min_of(t0 + C::steps, l);
    own.load_weights(w, bias, c);
#pragma unroll
    for (int j = 0; j < H; j++) own.load_input(own.window[j + 1], t0 - H + j);
    if (t0 == 0) {
        float last[C::k][V];
#pragma unroll
        for (int j = 0; j < H; j++) own.load_input(last[j], l - H + j);
#pragma unroll
        for (int j = 0; j < H; j++) store_f32(s + (n * H + j) * C::channels + c, last[j]);
    }
    if (C::steps % Walk::BATCH == 0 && t0 + C::steps + Walk::BATCH <= l) own.template walk<true>(t0);
    else own.template walk<false>(t0);
}

// A thread's walk backward; `dw` gathers its weights' gradients.  INSIDE: nothing that it touches lies beyond either end of the
// sequence.
template <class C, class T, class E> struct ConvWalkGrad : ConvThread<C, T, E> {
    static constexpr int V = C::vec, K = C::k, H = K - 1, BATCH = min_of(4, C::steps);
    using Piece = typename Word<sizeof(T) * V>::Type;
    const T* dy;
    const E* ds;
    T* dx;
    E* ds0;
    i64 dy_stride, dx_stride;
    int t0, t1, l;
    float window[K][V] = {}, g[K][V] = {}, dw[K + 1][V] = {};
    Piece next_x[BATCH], next_dy[BATCH];

    template <bool INSIDE> __device__ __forceinline__ void fetch(int u, int i) {
        const bool here = INSIDE || u + i < min_of(t1 + H, l);
        // MUT conv_ahead: const bool here = u + i < t1 + H;
        next_x[i] = here ? *reinterpret_cast<const Piece*>(this->x + (u + i) * this->stride) : ConvWalk<C, T, E>::none();
        next_dy[i] = here ? *reinterpret_cast<const Piece*>(dy + (u + i) * dy_stride) : ConvWalk<C, T, E>::none();
    }
    // Time u gives g_u and with it completes dx_{u-(k-1)}.  BEHIND: of g_u for tokens before t1 alone.
    template <bool INSIDE, bool BEHIND> __device__ __forceinline__ void batch(int u0) {
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (BEHIND && i == H) break;
            const int u = u0 + i, t = u - H;
            float in[V], grad[V];
            unpack_f32<T>(in, next_x[i]), unpack_f32<T>(grad, next_dy[i]);
            // A batch is on its way while the one before it is worked on.
            if (!BEHIND) fetch<INSIDE>(u0 + BATCH, i);
            push(window, in);
            if (C::silu) {
#pragma unroll
                for (int v = 0; v < V; v++) {
                    float p = this->pre(window, v), s = sigmoid_fast(p);
                    grad[v] *= s * fmaf(p, 1.f - s, 1.f);
                }
            }
            push(g, grad);
            if (!BEHIND && (INSIDE || u < t1)) {
                // MUT conv_halo: if (u < t1 + H) {
#pragma unroll
                for (int v = 0; v < V; v++) {
#pragma unroll
                    for (int j = 0; j < K; j++) dw[j][v] = fmaf(grad[v], window[j][v], dw[j][v]);
                    dw[K][v] += grad[v];
                }
            }
            if (INSIDE ? t >= t0 : t < t1 && (t >= t0 || t0 == 0)) {
                // MUT conv_before: if (t < t1) {
                float d[V] = {};
                if (!INSIDE && t + H >= l) load_f32(d, ds + (i64)(t + H - l) * C::channels);
#pragma unroll
                for (int v = 0; v < V; v++)
#pragma unroll
                    for (int j = 0; j < K; j++) d[v] = fmaf(this->w[v][j], g[K - 1 - j][v], d[v]);
                if (!INSIDE && t < 0) store_f32(ds0 + (i64)(t + H) * C::channels, d);
                else store_f32(dx + t * dx_stride, d);
            }
        }
    }
    template <bool INSIDE> __device__ __forceinline__ void walk() {
#pragma unroll
        for (int i = 0; i < BATCH; i++) fetch<INSIDE>(t0, i);
        if constexpr (INSIDE) {
            int u = t0;
            for (; u < t1; u += BATCH) batch<true, false>(u);
            batch<true, true>(u);
        } else {
            for (int u = t0; u < t1 + H; u += BATCH) batch<false, false>(u);
        }
    }
};

// Weights' gradients go to slots [N · time tiles, k + 1, channels]: row j is dw_j, row k is dbias.
template <class C, class T, class E>
__device__ __forceinline__ void causal_conv_grad(const T* x, i64 x_stride, const E* w, const E* bias, const E* s0, const T* dy, i64 dy_stride, const E* ds,
                                                 T* dx, i64 dx_stride, E* ds0, float* slots, i32 l) {
    constexpr int V = C::vec, K = C::k, H = K - 1;
    // Columns of a vector's elements lie apart, so that both writing by threads and reading by columns spread over banks.
    constexpr int PITCH = C::lanes + (V <= 32 ? 32 / V : 1);
    __shared__ float sums[C::rows][V * PITCH];
    const int lane = threadIdx.x % C::lanes, row = threadIdx.x / C::lanes;
    const int c = (blockIdx.y * C::lanes + lane) * V;
    const i64 n = blockIdx.z;

    using Walk = ConvWalkGrad<C, T, E>;
    Walk own;
    own.t0 = (blockIdx.x * C::rows + row) * C::steps, own.t1 = min_of(own.t0 + C::steps, l), own.l = l;
    if (c < C::channels && (own.t0 < l || own.t0 == 0)) {
        own.x = x + n * l * x_stride + c, own.stride = x_stride;
        own.s0 = s0 + n * H * C::channels + c;
        own.dy = dy + n * l * dy_stride + c, own.dy_stride = dy_stride;
        own.ds = ds + n * H * C::channels + c;
        own.dx = dx + n * l * dx_stride + c, own.dx_stride = dx_stride;
        own.ds0 = ds0 + n * H * C::channels + c;
        own.load_weights(w, bias, c);
#pragma unroll
        for (int j = 0; j < H; j++) own.load_input(own.window[j + 1], own.t0 - H + j);
        if (C::steps % Walk::BATCH == 0 && H <= Walk::BATCH && own.t0 > 0 && own.t0 + C::steps + Walk::BATCH <= l) own.template walk<true>();
        else own.template walk<false>();
    }

    float* slot = slots + (n * gridDim.x + blockIdx.x) * (K + 1) * (i64)C::channels;
#pragma unroll
    for (int j = 0; j <= K; j++) {
        if (j > 0) __syncthreads();
        // MUT conv_reuse: ;
#pragma unroll
        for (int v = 0; v < V; v++) sums[row][v * PITCH + lane] = own.dw[j][v];
        __syncthreads();
        for (int i = threadIdx.x; i < C::lanes * V; i += C::lanes * C::rows) {
            int column = blockIdx.y * C::lanes * V + i;
            float sum = 0.f;
#pragma unroll
            for (int r = 0; r < C::rows; r++) sum += sums[r][i % V * PITCH + i / V];
            if (column < C::channels) slot[j * (i64)C::channels + column] = sum;
        }
    }
}

// One token.  A thread owns VEC channels of a sequence; `s` may be `s0`.  Grid (ceil(channels / (threads·vec)), N).
template <class C, class T, class E>
__device__ __forceinline__ void causal_conv_step(const T* x, i64 x_stride, const E* w, const E* bias, const E* s0, T* y, i64 y_stride, E* s) {
    constexpr int V = C::vec, K = C::k, H = K - 1;
    const int c = (blockIdx.x * C::lanes + threadIdx.x) * V;
    if (c >= C::channels) return;
    const i64 n = blockIdx.y;
    ConvThread<C, T, E> own;
    own.load_weights(w, bias, c);
    float window[K][V], value[V];
#pragma unroll
    for (int j = 0; j < H; j++) load_f32(window[j], s0 + (n * H + j) * C::channels + c);
    load_f32(window[H], x + n * x_stride + c);
#pragma unroll
    for (int v = 0; v < V; v++) {
        float p = own.pre(window, v);
        value[v] = C::silu ? p * sigmoid_fast(p) : p;
    }
    store_f32(y + n * y_stride + c, value);
#pragma unroll
    for (int j = 0; j < H; j++) store_f32(s + (n * H + j) * C::channels + c, window[j + 1]);
    // MUT conv_step_shift: for (int j = 0; j < H; j++) store_f32(s + (n * H + j) * C::channels + c, window[j]);
}

}  // namespace rambac
