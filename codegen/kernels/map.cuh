// Elementwise regions: one pass over memory for any number of ops.  The stub holds the region's arithmetic; here is how
// operands are read and results written.
//
// A thread has W neighbouring elements of the region, i .. i + W, counted row-major.  An operand's place follows from i:
//
//   same     its own element; rows may be `stride` apart        x[i / COLS · stride + i % COLS]
//   suffix   repeats with period COLS (a row for all rows)      x[i % COLS]
//   prefix   an element for COLS neighbours (a number per row)  x[i / COLS]
//   scalar   one number                                         x[0]
//
// W divides COLS and strides wherever it is not 1, so that a vector never crosses a row.
#pragma once
#include "types.cuh"

namespace rambac {

// W elements in registers, in the type that arithmetic is done in.
template <class A, int W> struct Values {
    A v[W];
    __device__ __forceinline__ A& operator[](int i) { return v[i]; }
    __device__ __forceinline__ const A& operator[](int i) const { return v[i]; }
};

template <class T> struct Arithmetic {
    using Type = float;
    static __device__ __forceinline__ float of(T x) { return to_f32(x); }
};
template <> struct Arithmetic<i32> {
    using Type = i32;
    static __device__ __forceinline__ i32 of(i32 x) { return x; }
};

// i / cols and i % cols; in 32 bits where the region has fewer than 2^31 elements.
template <int COLS> struct Place {
    i64 row;
    i64 col;
    __device__ __forceinline__ Place(i64 i, i64 n, i64 cols) {
        i64 c = COLS > 0 ? COLS : cols;
        if (n < (1ll << 31) && c < (1ll << 31)) {
            u32 q = (u32)i / (u32)c;
            row = q;
            col = (u32)i - q * (u32)c;
        } else {
            row = i / c;
            col = i - row * c;
        }
    }
};

template <int W, class T> __device__ __forceinline__ Values<typename Arithmetic<T>::Type, W> load_at(const T* p) {
    // At most 16 bytes are loaded at once.
    constexpr int EACH = W * sizeof(T) > 16 ? 16 / sizeof(T) : W;
    Values<typename Arithmetic<T>::Type, W> y;
#pragma unroll
    for (int k = 0; k < W; k += EACH) {
        Vec<T, EACH> x = load<T, EACH>(p + k);
#pragma unroll
        for (int e = 0; e < EACH; e++) y[k + e] = Arithmetic<T>::of(x[e]);
    }
    return y;
}
template <int W, class T> __device__ __forceinline__ Values<typename Arithmetic<T>::Type, W> repeated(T x) {
    Values<typename Arithmetic<T>::Type, W> y;
#pragma unroll
    for (int e = 0; e < W; e++) y[e] = Arithmetic<T>::of(x);
    return y;
}

template <int W, class T> __device__ __forceinline__ auto load_same(const T* p, i64 i) { return load_at<W>(p + i); }
template <int W, int COLS, class T>
__device__ __forceinline__ auto load_rows(const T* p, i64 stride, i64 i, i64 n, i64 cols) {
    Place<COLS> at(i, n, cols);
    return load_at<W>(p + at.row * stride + at.col);
}
template <int W, int COLS, class T> __device__ __forceinline__ auto load_suffix(const T* p, i64 i, i64 n, i64 cols) {
    return load_at<W>(p + Place<COLS>(i, n, cols).col);
}
template <int W, int COLS, class T> __device__ __forceinline__ auto load_prefix(const T* p, i64 i, i64 n, i64 cols) {
    return repeated<W>(p[Place<COLS>(i, n, cols).row]);
}
template <int W, class T> __device__ __forceinline__ auto load_scalar(const T* p) { return repeated<W>(p[0]); }

template <class T> __device__ __forceinline__ T as_element(float x) { return from_f32<T>(x); }
template <class T> __device__ __forceinline__ T as_element(i32 x) {
    if constexpr (sizeof(T) == 4) return (T)x;
    else return from_f32<T>((float)x);
}

template <int W, class T, class A> __device__ __forceinline__ void store_at(T* p, const Values<A, W>& y) {
    constexpr int EACH = W * sizeof(T) > 16 ? 16 / sizeof(T) : W;
#pragma unroll
    for (int k = 0; k < W; k += EACH) {
        Vec<T, EACH> x;
#pragma unroll
        for (int e = 0; e < EACH; e++) x[e] = as_element<T>(y[k + e]);
        store<T, EACH>(p + k, x);
    }
}
template <int W, class T, class A> __device__ __forceinline__ void store_same(T* p, i64 i, const Values<A, W>& y) {
    store_at<W>(p + i, y);
}
template <int W, int COLS, class T, class A>
__device__ __forceinline__ void store_rows(T* p, i64 stride, i64 i, i64 n, i64 cols, const Values<A, W>& y) {
    Place<COLS> at(i, n, cols);
    store_at<W>(p + at.row * stride + at.col, y);
}

// The functions of ir/src/ops/map.rs, accurate to a few ulp.  Maxima and minima ignore a NaN, as there.
namespace fn {
__device__ __forceinline__ float neg(float x) { return -x; }
__device__ __forceinline__ float exp(float x) { return ::expf(x); }
__device__ __forceinline__ float log(float x) { return ::logf(x); }
__device__ __forceinline__ float sqrt(float x) { return ::sqrtf(x); }
__device__ __forceinline__ float rsqrt(float x) { return 1.f / ::sqrtf(x); }
__device__ __forceinline__ float recip(float x) { return 1.f / x; }
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + ::expf(-x)); }
__device__ __forceinline__ float silu(float x) { return x == x && x < -88.f ? x * ::expf(x) : x / (1.f + ::expf(-x)); }
__device__ __forceinline__ float softplus(float x) { return ::fmaxf(x, 0.f) + ::log1pf(::expf(-::fabsf(x))); }
__device__ __forceinline__ float tanh(float x) { return ::tanhf(x); }
__device__ __forceinline__ float relu(float x) { return x < 0.f ? 0.f : x; }
__device__ __forceinline__ float abs(float x) { return ::fabsf(x); }
__device__ __forceinline__ float square(float x) { return x * x; }
__device__ __forceinline__ float sin(float x) { return ::sinf(x); }
__device__ __forceinline__ float cos(float x) { return ::cosf(x); }
__device__ __forceinline__ float detach(float x) { return x; }
template <class A> __device__ __forceinline__ A add(A a, A b) { return a + b; }
template <class A> __device__ __forceinline__ A sub(A a, A b) { return a - b; }
template <class A> __device__ __forceinline__ A mul(A a, A b) { return a * b; }
__device__ __forceinline__ float div(float a, float b) { return a / b; }
__device__ __forceinline__ float max(float a, float b) { return ::fmaxf(a, b); }
__device__ __forceinline__ float min(float a, float b) { return ::fminf(a, b); }
__device__ __forceinline__ i32 max(i32 a, i32 b) { return a > b ? a : b; }
__device__ __forceinline__ i32 min(i32 a, i32 b) { return a < b ? a : b; }
template <class A> __device__ __forceinline__ float lt(A a, A b) { return a < b; }
template <class A> __device__ __forceinline__ float le(A a, A b) { return a <= b; }
template <class A> __device__ __forceinline__ float gt(A a, A b) { return a > b; }
template <class A> __device__ __forceinline__ float ge(A a, A b) { return a >= b; }
template <class A> __device__ __forceinline__ float eq(A a, A b) { return a == b; }
template <class A> __device__ __forceinline__ float ne(A a, A b) { return a != b; }
template <class A> __device__ __forceinline__ A where(float c, A a, A b) { return c != 0.f ? a : b; }
__device__ __forceinline__ float truth(float x) { return x != 0.f; }
__device__ __forceinline__ float trunc(float x) { return ::truncf(x); }
}  // namespace fn

}  // namespace rambac
