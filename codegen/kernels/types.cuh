// Numbers: fixed-width names, the two 16-bit float formats with f32 arithmetic, and 16-byte vectors of any of them.
//
// No header of CUDA is included: NVRTC then needs no include path and has little to read.
#pragma once

namespace rambac {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(i32 x) { return (float)x; }
__device__ __forceinline__ float to_f32(u8 x) { return (float)x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Rounds to nearest even; to i32 truncates.
template <class T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ i32 from_f32<i32>(float x) { return (i32)x; }
template <> __device__ __forceinline__ u8 from_f32<u8>(float x) { return x != 0.f; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
template <> __device__ __forceinline__ f16 from_f32<f16>(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two values in a register, the first in the low half.
template <class T> __device__ __forceinline__ u32 pack2(float lo, float hi);
template <> __device__ __forceinline__ u32 pack2<bf16>(float lo, float hi) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <> __device__ __forceinline__ u32 pack2<f16>(float lo, float hi) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}

// N values that are loaded and stored at once; at most 16 bytes.
template <class T, int N> struct alignas(sizeof(T) * N) Vec {
    static_assert(sizeof(T) * N <= 16, "a vector is at most 16 bytes");
    T v[N];
    __device__ __forceinline__ T& operator[](int i) { return v[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};
// A type of so many bytes that one instruction moves: a struct of small parts would be moved part by part.
template <int BYTES> struct Word;
template <> struct Word<1> { using Type = u8; };
template <> struct Word<2> { using Type = u16; };
template <> struct Word<4> { using Type = u32; };
template <> struct Word<8> { using Type = uint2; };
template <> struct Word<16> { using Type = uint4; };
template <class T, int N> __device__ __forceinline__ Vec<T, N> load(const T* p) {
    Vec<T, N> x;
    auto word = *reinterpret_cast<const typename Word<sizeof(x)>::Type*>(p);
    memcpy(&x, &word, sizeof(x));
    return x;
}
template <class T, int N> __device__ __forceinline__ void store(T* p, const Vec<T, N>& x) {
    typename Word<sizeof(x)>::Type word;
    memcpy(&word, &x, sizeof(x));
    *reinterpret_cast<decltype(word)*>(p) = word;
}

// The same to global memory, by one instruction whatever the compiler thinks of the address.
template <class T, int N> __device__ __forceinline__ void store_global(u64 at, const Vec<T, N>& x) {
    typename Word<sizeof(x)>::Type word;
    memcpy(&word, &x, sizeof(x));
    if constexpr (sizeof(x) == 16)
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w) : "memory");
    else if constexpr (sizeof(x) == 8)
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(word.x), "r"(word.y) : "memory");
    else if constexpr (sizeof(x) == 4)
        asm volatile("st.global.b32 [%0], %1;" ::"l"(at), "r"(word) : "memory");
    else
        asm volatile("st.global.b16 [%0], %1;" ::"l"(at), "h"(word) : "memory");
}
template <class T, int N> __device__ __forceinline__ void store_global(T* p, const Vec<T, N>& x) {
    store_global((u64)__cvta_generic_to_global(p), x);
}
// 4, 8 or 16 bytes at once, whatever the compiler thinks: it may cut a struct's store into those of its members.
template <int N> __device__ __forceinline__ void store_words(void* p, const u32* x) {
    static_assert(N == 1 || N == 2 || N == 4, "a vector is 4, 8 or 16 bytes");
    if constexpr (N == 4) asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
    else if constexpr (N == 2) asm volatile("st.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(x[0]), "r"(x[1]) : "memory");
    else *reinterpret_cast<u32*>(p) = x[0];
}

// The most elements of N that are a vector: a power of two that divides N, of at most 16 bytes.
template <class T, int N> constexpr int VECTOR = (N & -N) * sizeof(T) <= 16 ? (N & -N) : 16 / sizeof(T);

// The N values of T that lie in a Word, as f32; those of 16 bits take an instruction each.
template <class T, int N, class W> __device__ __forceinline__ void unpack_f32(float (&to)[N], const W& word) {
    static_assert(sizeof(W) == N * sizeof(T), "a word of N values");
    if constexpr (sizeof(T) == 2 && N % 2 == 0) {
        u32 pairs[N / 2];
        memcpy(pairs, &word, sizeof(W));
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = to_f32(T{(u16)(pairs[i / 2] >> 16 * (i % 2))});
    } else {
        Vec<T, N> x;
        memcpy(&x, &word, sizeof(W));
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = to_f32(x[i]);
    }
}

// N values of any type as f32, and back; `p` is aligned to VECTOR elements.
template <int N, class T> __device__ __forceinline__ void load_f32(float (&to)[N], const T* p) {
    constexpr int EACH = VECTOR<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += EACH) {
        Vec<T, EACH> x = load<T, EACH>(p + i);
#pragma unroll
        for (int j = 0; j < EACH; j++) to[i + j] = to_f32(x[j]);
    }
}
template <int N, class T> __device__ __forceinline__ void store_f32(T* p, const float (&from)[N]) {
    constexpr int EACH = VECTOR<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += EACH) {
        if constexpr (sizeof(T) == 2 && EACH >= 2) {
            u32 x[EACH / 2];
#pragma unroll
            for (int j = 0; j < EACH; j += 2) x[j / 2] = pack2<T>(from[i + j], from[i + j + 1]);
            store_words<EACH / 2>(p + i, x);
        } else {
            Vec<T, EACH> x;
#pragma unroll
            for (int j = 0; j < EACH; j++) x[j] = from_f32<T>(from[i + j]);
            store(p + i, x);
        }
    }
}

// A kernel that has nothing to do before: the next may begin, and this one waits for all before it (earlier.cuh).
__device__ __forceinline__ void after_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class A> __device__ __forceinline__ constexpr A min_of(A a, A b) { return a < b ? a : b; }
template <class A> __device__ __forceinline__ constexpr A max_of(A a, A b) { return a > b ? a : b; }
__device__ __forceinline__ constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// 2^x: the special function unit's, within 2 ulp.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / (1 + e^-x), within a few ulp.
__device__ __forceinline__ float sigmoid_fast(float x) { return __fdividef(1.f, 1.f + exp2_fast(-LOG2E * x)); }

}  // namespace rambac
