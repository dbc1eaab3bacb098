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

template <class C, class T, class E>
__device__ __forceinline__ void causal_conv(const T* x, i64 x_stride, const E* w, const E* bias, const E* s0, T* y, i64 y_stride, E* s, i32 l) {
    constexpr int V = C::vec, K = C::k, H = K - 1, BATCH = min_of(4, C::steps);
    const int c = (blockIdx.y * C::lanes + threadIdx.x % C::lanes) * V;
    const int t0 = (blockIdx.x * C::rows + threadIdx.x / C::lanes) * C::steps;
    const int t1 = min_of(t0 + C::steps, l);
    if (c >= C::channels || (t0 >= l && t0 > 0)) return;
    const i64 n = blockIdx.z;

    ConvThread<C, T, E> own;
    own.x = x + n * l * x_stride + c;
    own.s0 = s0 + n * H * C::channels + c;
    own.stride = x_stride;
    own.load_weights(w, bias, c);

    float window[K][V] = {};
#pragma unroll
    for (int j = 0; j < H; j++) own.load_input(window[j + 1], t0 - H + j);
    if (t0 == 0) {
        float last[K][V];
#pragma unroll
        for (int j = 0; j < H; j++) own.load_input(last[j], l - H + j);
#pragma unroll
        for (int j = 0; j < H; j++) store_f32(s + (n * H + j) * C::channels + c, last[j]);
    }
    T* out = y + n * l * y_stride + c;
    for (int t = t0; t < t1; t += BATCH) {
        float in[BATCH][V] = {};
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            if (t + i < t1) load_f32(in[i], own.x + (t + i) * x_stride);
        // MUT conv_bound: load_f32(in[i], own.x + (t + i) * x_stride);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            push(window, in[i]);
            float value[V];
#pragma unroll
            for (int v = 0; v < V; v++) {
                float p = own.pre(window, v);
                value[v] = C::silu ? p * sigmoid_fast(p) : p;
            }
            if (t + i < t1) store_f32(out + (t + i) * y_stride, value);
        }
    }
}

// Weights' gradients go to slots [N · time tiles, k + 1, channels]: row j is dw_j, row k is dbias.
template <class C, class T, class E>
__device__ __forceinline__ void causal_conv_grad(const T* x, i64 x_stride, const E* w, const E* bias, const E* s0, const T* dy, i64 dy_stride, const E* ds,
                                                 T* dx, i64 dx_stride, E* ds0, float* slots, i32 l) {
    constexpr int V = C::vec, K = C::k, H = K - 1, BATCH = min_of(4, C::steps);
    // Columns of a vector's elements lie apart, so that both writing by threads and reading by columns spread over banks.
    constexpr int PITCH = C::lanes + (V <= 32 ? 32 / V : 1);
    __shared__ float sums[C::rows][V * PITCH];
    const int lane = threadIdx.x % C::lanes, row = threadIdx.x / C::lanes;
    const int c = (blockIdx.y * C::lanes + lane) * V;
    const int t0 = (blockIdx.x * C::rows + row) * C::steps;
    const int t1 = min_of(t0 + C::steps, l);
    const i64 n = blockIdx.z;

    float dw[K + 1][V] = {};
    if (c < C::channels && (t0 < l || t0 == 0)) {
        ConvThread<C, T, E> own;
        own.x = x + n * l * x_stride + c;
        own.s0 = s0 + n * H * C::channels + c;
        own.stride = x_stride;
        own.load_weights(w, bias, c);
        const T* dy_at = dy + n * l * dy_stride + c;
        const E* ds_at = ds + n * H * C::channels + c;
        T* dx_at = dx + n * l * dx_stride + c;
        E* ds0_at = ds0 + n * H * C::channels + c;

        float window[K][V] = {}, g[K][V] = {};
#pragma unroll
        for (int j = 0; j < H; j++) own.load_input(window[j + 1], t0 - H + j);
        // Time u gives g_u and with it completes dx_{u-(k-1)}.
        for (int u0 = t0; u0 < t1 + H; u0 += BATCH) {
            float in[BATCH][V] = {}, grad[BATCH][V] = {};
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                if (u0 + i < min_of(t1 + H, l)) {
                    load_f32(in[i], own.x + (u0 + i) * x_stride);
                    load_f32(grad[i], dy_at + (u0 + i) * dy_stride);
                }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const int u = u0 + i, t = u - H;
                push(window, in[i]);
                if (C::silu) {
#pragma unroll
                    for (int v = 0; v < V; v++) {
                        float p = own.pre(window, v), s = sigmoid_fast(p);
                        grad[i][v] *= s * fmaf(p, 1.f - s, 1.f);
                    }
                }
                push(g, grad[i]);
                if (u < t1) {
                    // MUT conv_halo: if (u < t1 + H) {
#pragma unroll
                    for (int v = 0; v < V; v++) {
#pragma unroll
                        for (int j = 0; j < K; j++) dw[j][v] = fmaf(grad[i][v], window[j][v], dw[j][v]);
                        dw[K][v] += grad[i][v];
                    }
                }
                if (t < t1 && (t >= t0 || t0 == 0)) {
                    // MUT conv_before: if (t < t1) {
                    float d[V] = {};
                    if (t + H >= l) load_f32(d, ds_at + (i64)(t + H - l) * C::channels);
#pragma unroll
                    for (int v = 0; v < V; v++)
#pragma unroll
                        for (int j = 0; j < K; j++) d[v] = fmaf(own.w[v][j], g[K - 1 - j][v], d[v]);
                    if (t < 0) store_f32(ds0_at + (i64)(t + H) * C::channels, d);
                    else store_f32(dx_at + t * dx_stride, d);
                }
            }
        }
    }

    float* slot = slots + (n * gridDim.x + blockIdx.x) * (K + 1) * (i64)C::channels;
#pragma unroll
    for (int j = 0; j <= K; j++) {
        if (j > 0) __syncthreads();
        // MUT conv_reuse: ;
#pragma unroll
        for (int v = 0; v < V; v++) sums[row][v * PITCH + lane] = dw[j][v];
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
