// Matrix products of a warp on tensor cores: D[16, 8] += A[16, K]·B[K, 8] with f32 sums.
//
// One interface for bf16, f16 (K = 16) and f32 (K = 8): a fragment of A is 4 registers, of B 2, and a row of a K-step is
// 32 bytes in all of them, so that tiles in shared memory are addressed in bytes alike.  f32 is three products of TF32
// parts (big·big + big·small + small·big): errors of about 2^-21, near f32's own.
//
//   A, row-major [m, k]    ldmatrix x4       lane l gives row l % 16, 16-byte column l / 16
//   B, row-major [n, k]    ldmatrix x4       two 8-wide tiles of n at once
//   B, row-major [k, n]    ldmatrix.trans (16 bits) or plain loads (f32)
//   D                      d[0], d[1] at row l / 4, columns 2·(l % 4) and the next; d[2], d[3] eight rows below
#pragma once
#include "types.cuh"

namespace rambac {

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void ldmatrix4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix4_trans(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

template <class T> struct Mma;

template <> struct Mma<bf16> {
    static constexpr int K = 16;
    static __device__ __forceinline__ void run(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

template <> struct Mma<f16> {
    static constexpr int K = 16;
    static __device__ __forceinline__ void run(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

template <> struct Mma<float> {
    static constexpr int K = 8;
    static __device__ __forceinline__ void tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
    static __device__ __forceinline__ u32 big(u32 x) {
        u32 y;
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
        return y;
    }
    static __device__ __forceinline__ u32 small(u32 x, u32 big) {
        u32 y;
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x) - __uint_as_float(big)));
        return y;
    }
    static __device__ __forceinline__ void run(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        u32 ab[4], as[4];
#pragma unroll
        for (int i = 0; i < 4; i++) ab[i] = big(a[i]), as[i] = small(a[i], ab[i]);
        u32 b0b = big(b0), b1b = big(b1);
        tf32(d, as, b0b, b1b);
        tf32(d, ab, small(b0, b0b), small(b1, b1b));
        tf32(d, ab, b0b, b1b);
    }
};

// A [16, K] from shared memory: `tile` points at its first element, rows are `pitch` elements apart.
template <class T> __device__ __forceinline__ void load_a(u32 (&a)[4], const T* tile, int pitch) {
    int lane = threadIdx.x & 31;
    ldmatrix4(a, shared_address(tile + (lane % 16) * pitch) + lane / 16 * 16);
}

// A [16, K] from rows of k: `tile[k * pitch + m]`, in the order of k that load_b_kn<true> has.  With SPREAD, f32 columns lie
// as `spread_column` says.
template <bool SPREAD, class T> __device__ __forceinline__ void load_a_km(u32 (&a)[4], const T* tile, int pitch) {
    int lane = threadIdx.x & 31;
    if constexpr (sizeof(T) == 2) {
        ldmatrix4_trans(a, shared_address(tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8));
    } else {
        int k = 2 * (lane % 4), m = lane / 4;
        if (SPREAD) m = m / 2 + m % 2 * 4;
        a[0] = __float_as_uint(tile[k * pitch + m]);
        a[1] = __float_as_uint(tile[k * pitch + m + 8]);
        a[2] = __float_as_uint(tile[(k + 1) * pitch + m]);
        a[3] = __float_as_uint(tile[(k + 1) * pitch + m + 8]);
    }
}

// Two B tiles (n 0..7 in b[0], b[1]; n 8..15 in b[2], b[3]) from rows of n: `tile[n * pitch + k]`.
template <class T> __device__ __forceinline__ void load_b_nk(u32 (&b)[4], const T* tile, int pitch) {
    int lane = threadIdx.x & 31;
    ldmatrix4(b, shared_address(tile + (lane % 8 + lane / 16 * 8) * pitch) + lane / 8 % 2 * 16);
}

// Two B tiles from rows of k: `tile[k * pitch + n]`.  With PAIRED, k is in the order that `a_of_d` gives (matters for
// f32 alone: its positions t and t + 4 are columns 2t and 2t + 1 of D).
template <bool PAIRED, class T> __device__ __forceinline__ void load_b_kn(u32 (&b)[4], const T* tile, int pitch) {
    int lane = threadIdx.x & 31;
    if constexpr (sizeof(T) == 2) {
        ldmatrix4_trans(b, shared_address(tile + (lane % 16) * pitch + lane / 16 * 8));
    } else {
        int k0 = PAIRED ? 2 * (lane % 4) : lane % 4, k1 = PAIRED ? k0 + 1 : k0 + 4, n = lane / 4;
        b[0] = __float_as_uint(tile[k0 * pitch + n]);
        b[1] = __float_as_uint(tile[k1 * pitch + n]);
        b[2] = __float_as_uint(tile[k0 * pitch + n + 8]);
        b[3] = __float_as_uint(tile[k1 * pitch + n + 8]);
    }
}

// D tiles that stand side by side become a fragment of A of one K-step, without leaving registers: K / 8 tiles from
// `d` on.
template <class T> __device__ __forceinline__ void a_of_d(u32 (&a)[4], const float (*d)[4]) {
    if constexpr (sizeof(T) == 2) {
        a[0] = pack2<T>(d[0][0], d[0][1]);
        a[1] = pack2<T>(d[0][2], d[0][3]);
        a[2] = pack2<T>(d[1][0], d[1][1]);
        a[3] = pack2<T>(d[1][2], d[1][3]);
    } else {
        a[0] = __float_as_uint(d[0][0]);
        a[1] = __float_as_uint(d[0][2]);
        a[2] = __float_as_uint(d[0][1]);
        a[3] = __float_as_uint(d[0][3]);
    }
}

// Two neighbouring results (columns col, col + 1; col even) to a tile that load_a and load_a_km<true> read.  In f32 the
// columns of each group of 8 change places (0 2 4 6 1 3 5 7), so that load_a gives K in the order of load_b_kn<true>.
template <class T> __device__ __forceinline__ void store_spread(T* row, int col, float lo, float hi) {
    if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<u32*>(row + col) = pack2<T>(lo, hi);
    } else {
        row[col - col % 8 / 2] = lo;
        row[col - col % 8 / 2 + 4] = hi;
    }
}

// The two neighbouring elements of a row that a lane has of D.  f32 rows lie 4 banks apart: odd ones are read in the other order,
// so that no two rows meet.
template <class T> __device__ __forceinline__ void load_pair(float (&x)[2], const T* at) {
    if constexpr (sizeof(T) == 2) {
        load_f32(x, at);
    } else {
        const int odd = threadIdx.x / 4 & 1;
        const float first = at[odd], second = at[odd ^ 1];
        x[0] = odd ? second : first, x[1] = odd ? first : second;
    }
}

// A [16, K] from shared memory as load_a, with k in the order of load_b_kn<true>.
template <class T> __device__ __forceinline__ void load_a_paired(u32 (&a)[4], const T* tile, int pitch) {
    if constexpr (sizeof(T) == 2) {
        load_a(a, tile, pitch);
    } else {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float x[2];
            load_pair(x, tile + (lane / 4 + 8 * i) * pitch + 2 * (lane % 4));
            a[i] = __float_as_uint(x[0]), a[i + 2] = __float_as_uint(x[1]);
        }
    }
}

// A tile [16, 16] of results (two D side by side) to rows in global memory, `rows` of them, in whole sectors.  16-bit types
// go by way of `scratch`, 16 x 16 elements of the warp's own.
template <class T> __device__ __forceinline__ void store_tile(T* scratch, const float (&d)[2][4], T* to, i64 stride, int rows) {
    const int lane = threadIdx.x & 31, row = lane / 4, q = lane % 4;
    if constexpr (sizeof(T) == 2) {
        // Rows of 32 bytes; the two halves change places in every second group of 4 rows, for the banks.
        u32* at = reinterpret_cast<u32*>(scratch) + row * 8 + q;
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) at[64 * e + 4 * (j ^ (row / 4 % 2))] = pack2<T>(d[j][2 * e], d[j][2 * e + 1]);
        __syncwarp();
        // MUT tile_ready: ;
        const int r = lane / 2, part = lane % 2;
        // 16 bytes at once, whatever the compiler thinks.
        u32 words[4];
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(shared_address(scratch + r * 16 + 8 * (part ^ (r / 4 % 2))))
                     : "memory");
        if (r < rows) store_words<4>(to + r * stride + 8 * part, words);
        // MUT tile_rows: store_words<4>(to + r * stride + 8 * part, words);
        __syncwarp();
        // MUT tile_free: ;
    } else {
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (row + 8 * e < rows) {
                    const u32 words[2] = {__float_as_uint(d[j][2 * e]), __float_as_uint(d[j][2 * e + 1])};
                    store_words<2>(to + (row + 8 * e) * stride + 8 * j + 2 * q, words);
                }
    }
}

}  // namespace rambac
