// Products of a warp's 16-row tiles, several K-steps at once, and what attention does with their rows.
//
// Tiles in shared memory have rows PITCH elements apart: an odd number of 16-byte pieces, so that neither ldmatrix nor the
// paired loads of f32 meet in a bank.  Where A comes from is a type: registers, rows, columns, or D of another product.
// `PAIRED` says in which order A has k, see mma.cuh.
#pragma once
#include "copy.cuh"
#include "warp.cuh"

namespace rambac {

template <class T, int COLS> constexpr int PITCH = COLS + 16 / (int)sizeof(T);

// A is [16, k], rows of a tile.
template <class T> struct RowsA {
    static constexpr bool PAIRED = false;
    const T* tile;
    int pitch;
    __device__ __forceinline__ void get(u32 (&a)[4], int step) const { load_a(a, tile + step * Mma<T>::K, pitch); }
};

// A is [16, k] where the tile's rows are k: tile[k * pitch + m]; with SPREAD, columns as `store_d` leaves them.
template <class T, bool SPREAD = false> struct ColumnsA {
    static constexpr bool PAIRED = true;
    const T* tile;
    int pitch;
    __device__ __forceinline__ void get(u32 (&a)[4], int step) const {
        load_a_km<SPREAD>(a, tile + step * Mma<T>::K * pitch, pitch);
    }
};

// A is D of another product, [16, 8·tiles].
template <class T> struct ProductA {
    static constexpr bool PAIRED = true;
    const float (*d)[4];
    __device__ __forceinline__ void get(u32 (&a)[4], int step) const { a_of_d<T>(a, d + step * (Mma<T>::K / 8)); }
};

// A is held in registers.
template <class T, int STEPS> struct HeldA {
    static constexpr bool PAIRED = false;
    u32 a[STEPS][4];
    __device__ __forceinline__ void get(u32 (&out)[4], int step) const {
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = a[step][i];
    }
};

// acc[16, N] += A[16, DEPTH] · B[N, DEPTH]ᵀ with B's rows in a tile.
template <class T, int DEPTH, int N, class A>
__device__ __forceinline__ void add_product_nt(float (*acc)[4], const A& a, const T* b, int pitch) {
    static_assert(DEPTH % Mma<T>::K == 0 && N % 16 == 0, "whole steps of the tensor core");
#pragma unroll
    for (int step = 0; step < DEPTH / Mma<T>::K; step++) {
        u32 fa[4];
        a.get(fa, step);
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            u32 fb[4];
            load_b_nk(fb, b + n * pitch + step * Mma<T>::K, pitch);
            Mma<T>::run(acc[n / 8], fa, fb[0], fb[1]);
            Mma<T>::run(acc[n / 8 + 1], fa, fb[2], fb[3]);
        }
    }
}

// acc[16, N] += A[16, DEPTH] · B[DEPTH, N] with B's rows in a tile.
template <class T, int DEPTH, int N, class A>
__device__ __forceinline__ void add_product_nn(float (*acc)[4], const A& a, const T* b, int pitch) {
    static_assert(DEPTH % Mma<T>::K == 0 && N % 16 == 0, "whole steps of the tensor core");
#pragma unroll
    for (int step = 0; step < DEPTH / Mma<T>::K; step++) {
        u32 fa[4];
        a.get(fa, step);
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            u32 fb[4];
            load_b_kn<A::PAIRED>(fb, b + step * Mma<T>::K * pitch + n, pitch);
            Mma<T>::run(acc[n / 8], fa, fb[0], fb[1]);
            Mma<T>::run(acc[n / 8 + 1], fa, fb[2], fb[3]);
        }
    }
}

template <int TILES> __device__ __forceinline__ void clear(float (&acc)[TILES][4]) {
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[i][j] = 0.f;
}

// A lane's two rows of a D tile: `x[0]` of row lane / 4, `x[1]` of the row eight below.
template <int TILES> __device__ __forceinline__ void row_max(float (&x)[2], const float (&d)[TILES][4]) {
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        x[0] = fmaxf(x[0], fmaxf(d[i][0], d[i][1]));
        x[1] = fmaxf(x[1], fmaxf(d[i][2], d[i][3]));
    }
    x[0] = warp_max<4>(x[0]), x[1] = warp_max<4>(x[1]);
}

// d becomes 2^(d·factor - top·factor); their sums.
template <int TILES>
__device__ __forceinline__ void row_exp2(float (&sum)[2], float (&d)[TILES][4], const float (&top)[2], float factor) {
    float low = -top[0] * factor, high = -top[1] * factor;
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        d[i][0] = exp2_fast(fmaf(d[i][0], factor, low));
        d[i][1] = exp2_fast(fmaf(d[i][1], factor, low));
        d[i][2] = exp2_fast(fmaf(d[i][2], factor, high));
        d[i][3] = exp2_fast(fmaf(d[i][3], factor, high));
        sum[0] += d[i][0] + d[i][1];
        sum[1] += d[i][2] + d[i][3];
    }
    sum[0] = warp_sum<4>(sum[0]), sum[1] = warp_sum<4>(sum[1]);
}

template <int TILES> __device__ __forceinline__ void row_scale(float (&d)[TILES][4], const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        d[i][0] *= by[0], d[i][1] *= by[0];
        d[i][2] *= by[1], d[i][3] *= by[1];
    }
}

// A D tile [16, 8·TILES] to rows of T in shared memory, columns as `store_spread` lays them.
template <class T, int TILES> __device__ __forceinline__ void store_d(T* tile, int pitch, const float (&d)[TILES][4]) {
    int row = lane_id() / 4, col = lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        store_spread(tile + row * pitch, 8 * i + col, d[i][0], d[i][1]);
        store_spread(tile + (row + 8) * pitch, 8 * i + col, d[i][2], d[i][3]);
    }
}

// A D tile to global rows of T: `low` is where this lane's first row begins, `high` the row eight below, null where there is
// none.  A quad writes whole 32-byte sectors: neighbours swap a half of two tiles where T has 16 bits.
template <class T, int TILES>
__device__ __forceinline__ void store_d_global(T* low, T* high, const float (&d)[TILES][4]) {
    static_assert(TILES % 2 == 0, "tiles in pairs");
    int c = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        T* row = half ? high : low;
        // Where this lane begins: 16-bit neighbours take a tile each.
        u64 to = __cvta_generic_to_global(row + (sizeof(T) == 2 ? 8 * (c & 1) + 4 * (c / 2) : 2 * c));
#pragma unroll
        for (int i = 0; i < TILES; i += 2) {
            const float *a = d[i] + 2 * half, *b = d[i + 1] + 2 * half;
            if constexpr (sizeof(T) == 2) {
                u32 mine[2] = {pack2<T>(a[0], a[1]), pack2<T>(b[0], b[1])};
                u32 other = __shfl_xor_sync(ALL_LANES, c & 1 ? mine[0] : mine[1], 1);
                Vec<u32, 2> x = c & 1 ? Vec<u32, 2>{{other, mine[1]}} : Vec<u32, 2>{{mine[0], other}};
                if (row) store_global(to + i * 16, x);
            } else if (row) {
                store_global(to + i * 32, Vec<float, 2>{{a[0], a[1]}});
                store_global(to + i * 32 + 32, Vec<float, 2>{{b[0], b[1]}});
            }
        }
    }
}

}  // namespace rambac
