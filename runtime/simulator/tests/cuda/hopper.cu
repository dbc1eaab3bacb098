// sm_90a: bulk copies and tensor maps with mbarriers, clusters with shared memory of each other, wgmma.

typedef unsigned int u32;
typedef unsigned long long u64;
__device__ __forceinline__ u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init(u64* bar, u32 n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at(bar)), "r"(n) : "memory");
}
__device__ __forceinline__ void expect(u64* bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at(bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(u64* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at(bar)) : "memory");
}
__device__ __forceinline__ void wait(u64* bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(at(bar)),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void load(void* to, const void* from, u32 bytes, u64* bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at(to)), "l"(from), "r"(bytes),
                 "r"(at(bar))
                 : "memory");
}

struct __align__(64) Map {
    char bytes[128];
};

__device__ __forceinline__ void load2(void* to, const Map* map, int x, int y, u64* bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(at(to)),
                 "l"(map), "r"(x), "r"(y), "r"(at(bar))
                 : "memory");
}

// y = 2x through shared memory: bulk in, threads, bulk out; 4 stages of 1 KiB with a full and an empty barrier each.
extern "C" __global__ void bulk(float* y, const float* x, int stages) {
    __shared__ __align__(128) float in[2][256];
    __shared__ __align__(128) float out[256];
    __shared__ u64 full[2], empty[2];
    int t = threadIdx.x;
    if (t == 0) {
        for (int i = 0; i < 2; i++) {
            init(&full[i], 1);
            init(&empty[i], 64);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (t >= 64) {
        if (t == 64)
            for (int i = 0; i < stages; i++) {
                if (i >= 2) wait(&empty[i & 1], (i / 2 - 1) & 1);
                // MUT empty: ;
                expect(&full[i & 1], 1024);
                // MUT too_few: expect(&full[i & 1], 1008);
                load(in[i & 1], x + 256 * i, 1024, &full[i & 1]);
                // MUT stage: load(in[0], x + 256 * i, 1024, &full[i & 1]);
                // MUT past: load(in[i & 1], x + 256 * i + 4, 1024, &full[i & 1]);
            }
        return;
    }
    for (int i = 0; i < stages; i++) {
        wait(&full[i & 1], i / 2 & 1);
        // MUT full: ;
        // MUT parity: wait(&full[i & 1], 0);
        for (int k = t; k < 256; k += 64) out[k] = 2 * in[i & 1][k];
        arrive(&empty[i & 1]);
        // MUT no_arrive: ;
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        // MUT proxy: ;
        asm volatile("bar.sync 1, 64;" ::: "memory");
        // MUT barrier: ;
        if (t == 0) {
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 1024;" ::"l"(y + 256 * i), "r"(at(out)) : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
            // MUT read_wait: ;
        }
        asm volatile("bar.sync 1, 64;" ::: "memory");
        // MUT second_barrier: ;
    }
}

// Every block of a cluster of two reads the other's shared memory.
extern "C" __global__ void __cluster_dims__(2, 1, 1) pair(float* y, const float* x) {
    __shared__ float s[64];
    int t = threadIdx.x;
    u32 rank, other, a;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    s[t] = x[blockIdx.x * 64 + t];
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    // MUT before: ;
    other = rank ^ 1;
    // MUT rank: other = rank;
    // MUT too_far: other = rank + 1;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(at(&s[63 - t])), "r"(other));
    float v;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(a) : "memory");
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    y[blockIdx.x * 64 + t] = v + s[t];
}

// C[64, 64] = A[64, K] · B[64, K]ᵀ in bf16: tensor maps bring 64 × 64 tiles with 128-byte swizzle, wgmma multiplies.
extern "C" __global__ void __launch_bounds__(128) gemm(float* c, const __grid_constant__ Map a, const __grid_constant__ Map b, int k) {
    __shared__ __align__(1024) unsigned short as[64 * 64];
    __shared__ __align__(1024) unsigned short bs[64 * 64];
    __shared__ u64 full;
    int t = threadIdx.x;
    if (t == 0) {
        init(&full, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    float d[32] = {};
    for (int s = 0; s < k / 64; s++) {
        if (t == 0) {
            expect(&full, 2 * 64 * 64 * 2);
            load2(as, &a, 64 * s, 0, &full);
            // MUT column: load2(as, &a, 32 * s, 0, &full);
            load2(bs, &b, 64 * s, 0, &full);
            // MUT no_b: ;
        }
        wait(&full, s & 1);
        // MUT full: ;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        for (int i = 0; i < 4; i++) {
            // Start, leading 1, 1024 bytes from 8 rows to the next, 128-byte swizzle.
            u64 base = (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16;
            // MUT swizzle: u64 base = (u64)2 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16;
            // MUT pitch: u64 base = (u64)1 << 62 | (u64)(512 >> 4) << 32 | (u64)1 << 16;
            u64 da = base | (at(as) + 32 * i) >> 4, db = base | (at(bs) + 32 * i) >> 4;
            // MUT step: u64 da = base | (at(as) + 32 * i) >> 4, db = base | (at(bs) + 16 * i) >> 4;
            asm volatile(
                "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
                  "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),
                  "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
                  "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                : "l"(da), "l"(db));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        // MUT product: ;
        __syncthreads();
        // MUT free: ;
    }
    int row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 4; i++) c[(row + 8 * (i / 2)) * 64 + 8 * j + col + i % 2] = d[4 * j + i];
}

// 64 rows of 128 bytes from column `at` on of an array [64, k], swizzled by 128 bytes: pieces of 16 bytes, asynchronously.
__device__ __forceinline__ void copy_tile(unsigned short* to, const unsigned short* from, int k, int at0) {
    for (int i = threadIdx.x; i < 64 * 8; i += 128) {
        int row = i / 8, piece = i % 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at(to) + row * 128 + (piece ^ row & 7) * 16), "l"(from + row * k + at0 + 8 * piece)
                     : "memory");
    }
}

// As gemm, with K = 192 in two stages that threads fill themselves: a step's product still runs while the next step's begins.
extern "C" __global__ void __launch_bounds__(128) gemm_copied(float* c, const unsigned short* a, const unsigned short* b) {
    __shared__ __align__(1024) unsigned short s[2][2][64 * 64];
    int t = threadIdx.x;
    float d[32] = {};
    copy_tile(s[0][0], a, 192, 0);
    copy_tile(s[0][1], b, 192, 0);
#pragma unroll
    for (int step = 0; step < 3; step++) {
        asm volatile("cp.async.wait_all;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        // MUT copies_fence: ;
        __syncthreads();
        for (int i = 0; i < 32; i++) asm volatile("" : "+f"(d[i])::"memory");
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        // MUT unfenced: ;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u64 base = (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)1 << 16;
            u64 da = base | (at(s[step & 1][0]) + 32 * i) >> 4, db = base | (at(s[step & 1][1]) + 32 * i) >> 4;
            asm volatile(
                "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, 0, 0;"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
                  "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),
                  "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
                  "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
                : "l"(da), "l"(db));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        // The product before this one is over, so its stage may be filled.
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        // MUT stage_wait: asm volatile("wgmma.wait_group.sync.aligned 2;" ::: "memory");
        __syncthreads();
        // MUT stage_free: ;
        if (step < 2) {
            copy_tile(s[~step & 1][0], a, 192, 64 * (step + 1));
            copy_tile(s[~step & 1][1], b, 192, 64 * (step + 1));
        }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    // MUT last_wait: asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    int row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 4; i++) c[(row + 8 * (i / 2)) * 64 + 8 * j + col + i % 2] = d[4 * j + i];
}
