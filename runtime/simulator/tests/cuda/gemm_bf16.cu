// C[M,N] = A[M,K] * B[N,K]^T in bf16 with f32 sums: 64x64 tiles, ldmatrix, mma.sync, cp.async with two stages.
// One CTA of 128 threads per tile; warp w owns rows 16w..16w+15.  M and N are multiples of 64, K of 32.
// Shared rows are 40 elements apart (80 bytes), so that the 8 rows of an ldmatrix fall into distinct banks.

typedef unsigned int u32;

static const int TILE = 64, STEP = 32, PITCH = 40;

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ void ldmatrix4(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern "C" __global__ void gemm_bf16(float* c, const unsigned short* a, const unsigned short* b, int m, int n, int k) {
    __shared__ __align__(16) unsigned short as[2][TILE * PITCH], bs[2][TILE * PITCH];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned short* a0 = a + (size_t)blockIdx.y * TILE * k;
    const unsigned short* b0 = b + (size_t)blockIdx.x * TILE * k;

    auto load = [&](int stage, int step) {
        // 64 rows of 32 elements are 256 pieces of 16 bytes for either operand.
        for (int i = threadIdx.x; i < 256; i += 128) {
            int row = i / 4, col = i % 4 * 8;
            // MUT misaligned: int row = i / 4, col = i % 4 * 8 + 1;
            copy16(shared_address(&as[stage][row * PITCH + col]), a0 + (size_t)row * k + step * STEP + col);
            // MUT a_stage: copy16(shared_address(&as[0][row * PITCH + col]), a0 + (size_t)row * k + step * STEP + col);
            // MUT a_column: copy16(shared_address(&as[stage][row * PITCH + col]), a0 + (size_t)row * k + step * STEP + row);
            copy16(shared_address(&bs[stage][row * PITCH + col]), b0 + (size_t)row * k + step * STEP + col);
        }
        commit();
        // MUT no_commit: ;
    };

    float acc[8][4] = {};
    int steps = k / STEP;
    load(0, 0);
    for (int s = 0; s < steps; s++) {
        // MUT one_more: for (int s = 0; s <= steps; s++) {
        if (s + 1 < steps) {
            load((s + 1) & 1, s + 1);
            wait<1>();
            // MUT wait: wait<2>();
        } else {
            wait<0>();
            // MUT last_wait: wait<1>();
        }
        __syncthreads();
        // MUT ready: ;
        const unsigned short *ta = as[s & 1], *tb = bs[s & 1];
#pragma unroll
        for (int kk = 0; kk < STEP; kk += 16) {
            u32 fa[4];
            ldmatrix4(fa, shared_address(ta + (16 * warp + lane % 16) * PITCH + kk + lane / 16 * 8));
            // MUT lane: ldmatrix4(fa, shared_address(ta + (16 * warp + lane % 8) * PITCH + kk + lane / 16 * 8));
#pragma unroll
            for (int nn = 0; nn < 8; nn += 2) {
                u32 fb[4];
                ldmatrix4(fb, shared_address(tb + (8 * nn + lane % 8 + lane / 16 * 8) * PITCH + kk + lane / 8 % 2 * 8));
                mma(acc[nn], fa, fb[0], fb[1]);
                mma(acc[nn + 1], fa, fb[2], fb[3]);
                // MUT fragment: mma(acc[nn + 1], fa, fb[3], fb[2]);
            }
        }
        __syncthreads();
        // MUT free: ;
    }
    size_t row = (size_t)blockIdx.y * TILE + 16 * warp + lane / 4;
    // MUT row: size_t row = (size_t)blockIdx.y * TILE + 8 * warp + lane / 4;
    for (int nn = 0; nn < 8; nn++) {
        size_t col = (size_t)blockIdx.x * TILE + 8 * nn + lane % 4 * 2;
        *(float2*)&c[row * n + col] = make_float2(acc[nn][0], acc[nn][1]);
        *(float2*)&c[(row + 8) * n + col] = make_float2(acc[nn][2], acc[nn][3]);
    }
}
