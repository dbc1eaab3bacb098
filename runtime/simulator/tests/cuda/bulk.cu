// sm_90a: reductions and stores by the asynchronous engine, copies to several blocks and between blocks, stmatrix.

typedef unsigned int u32;
typedef unsigned long long u64;
__device__ __forceinline__ u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
struct __align__(64) Map {
    char bytes[128];
};

__device__ __forceinline__ void init(u64* bar, u32 n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;" ::"r"(at(bar)), "r"(n) : "memory");
}
__device__ __forceinline__ void expect(u64* bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(u64* bar, u32 parity) {
    asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra WAIT;\n}" ::"r"(at(bar)), "r"(parity) : "memory");
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void out() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
}

// Every block adds its 64 numbers to the same ones; largest and bits likewise.
extern "C" __global__ void reductions(float* sum, int* most, u32* bits, const float* x) {
    __shared__ __align__(16) float s[64];
    __shared__ __align__(16) int m[64];
    __shared__ __align__(16) u32 b[64];
    int t = threadIdx.x;
    s[t] = x[blockIdx.x * 64 + t];
    m[t] = (int)s[t] * 3;
    b[t] = 1u << ((u32)(t + blockIdx.x) % 32);
    written();
    // MUT proxy: ;
    __syncthreads();
    // MUT barrier: ;
    if (t == 0) {
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], 256;" ::"l"(sum), "r"(at(s)) : "memory");
        // MUT stored: asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 256;" ::"l"(sum), "r"(at(s)) : "memory");
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.max.s32 [%0], [%1], 256;" ::"l"(most), "r"(at(m)) : "memory");
        // MUT least: asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.min.s32 [%0], [%1], 256;" ::"l"(most), "r"(at(m)) : "memory");
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.or.b32 [%0], [%1], 256;" ::"l"(bits), "r"(at(b)) : "memory");
        out();
        // MUT unwaited: ;
    }
}

// The first block of a pair brings a row to both.
extern "C" __global__ void __cluster_dims__(2, 1, 1) everyone(float* y, const float* x) {
    __shared__ __align__(128) float s[64];
    __shared__ u64 full;
    int t = threadIdx.x;
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (t == 0) {
        init(&full, 1);
        expect(&full, 256);
        // MUT expects_half: expect(&full, 128);
    }
    cluster_sync();
    // MUT not_ready: ;
    if (rank == 0 && t == 0)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], 256, [%2], %3;" ::"r"(at(s)),
                     "l"(x + blockIdx.x / 2 * 64), "r"(at(&full)), "h"((short)3)
                     // MUT one_only: "l"(x + blockIdx.x / 2 * 64), "r"(at(&full)), "h"((short)1)
                     : "memory");
    wait(&full, 0);
    // MUT unwaited: ;
    y[blockIdx.x * 64 + t] = s[63 - t] + rank;
}

// Every block sends a row to the other's shared memory.
extern "C" __global__ void __cluster_dims__(2, 1, 1) across(float* y, const float* x) {
    __shared__ __align__(128) float from[64];
    __shared__ __align__(128) float to[64];
    __shared__ u64 full;
    int t = threadIdx.x;
    u32 rank, far, bar;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    from[t] = x[blockIdx.x * 64 + t];
    written();
    // MUT proxy: ;
    if (t == 0) {
        init(&full, 1);
        expect(&full, 256);
    }
    cluster_sync();
    // MUT before: __syncthreads();
    if (t == 0) {
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(far) : "r"(at(to)), "r"(rank ^ 1));
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(bar) : "r"(at(&full)), "r"(rank ^ 1));
        // MUT own_bar: bar = at(&full);
        asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];" ::"r"(far), "r"(at(from)), "r"(bar)
                     : "memory");
    }
    wait(&full, 0);
    // MUT unwaited: ;
    y[blockIdx.x * 64 + t] = to[t ^ 1];
    cluster_sync();
}

// A box of 8 x 16 numbers is stored where the tensor ends within it, and added in another.
extern "C" __global__ void boxes(const __grid_constant__ Map stored, const __grid_constant__ Map added, const float* x, int col, int row) {
    __shared__ __align__(128) float s[128];
    int t = threadIdx.x;
    s[t] = x[t];
    written();
    __syncthreads();
    if (t == 0) {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&stored), "r"(col), "r"(row), "r"(at(s))
                     // MUT exchanged: asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&stored), "r"(row), "r"(col), "r"(at(s))
                     : "memory");
        asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&added), "r"(col), "r"(row),
                     "r"(at(s))
                     : "memory");
        out();
    }
}

// A box of 64 x 8 halves that the tensor ends within: what is outside is zero.
extern "C" __global__ void edges(unsigned short* y, const __grid_constant__ Map x, int col, int row) {
    __shared__ __align__(1024) unsigned short s[64 * 8];
    __shared__ u64 full;
    int t = threadIdx.x;
    if (t == 0) init(&full, 1);
    __syncthreads();
    if (t == 0) {
        expect(&full, sizeof(s));
        // MUT edges_bytes: expect(&full, sizeof(s) - 16);
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(at(s)),
                     "l"(&x), "r"(col), "r"(row), "r"(at(&full))
                     : "memory");
    }
    wait(&full, 0);
    // MUT edges_unwaited: ;
    // Pieces of eight are exchanged by the row.
    for (int i = t; i < 64 * 8; i += 128) y[i] = s[i ^ i / 64 % 8 * 8];
    // MUT edges_swizzle: for (int i = t; i < 64 * 8; i += 128) y[i] = s[i];
}

// Registers to shared memory as 8 x 8 matrices, four as they are and two transposed.
extern "C" __global__ void matrices(unsigned short* y, const u32* x) {
    __shared__ __align__(16) unsigned short s[6 * 64];
    int t = threadIdx.x;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at(&s[8 * t])), "r"(x[t]), "r"(x[32 + t]), "r"(x[64 + t]),
                 "r"(x[96 + t])
                 // MUT registers: "r"(x[64 + t])
                 : "memory");
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at(&s[256 + 8 * (t % 16)])), "r"(x[128 + t]), "r"(x[160 + t]) : "memory");
    // MUT plain: asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(at(&s[256 + 8 * (t % 16)])), "r"(x[128 + t]), "r"(x[160 + t]) : "memory");
    __syncwarp();
    // MUT sync: ;
    for (int i = t; i < 6 * 64; i += 32) y[i] = s[i];
}
