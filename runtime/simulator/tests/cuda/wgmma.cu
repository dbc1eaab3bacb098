// sm_90a: one product of a warp group in each of its forms.  Operands come as bytes that the host laid out as the descriptors say.

typedef unsigned int u32;
typedef unsigned long long u64;
__device__ __forceinline__ u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }

#define D4 "{%0, %1, %2, %3}"
#define D8 "{%0, %1, %2, %3, %4, %5, %6, %7}"
#define D12 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11}"
#define D16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define O4(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define O8(d) O4(d), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define O12(d) O8(d), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define O16(d) O12(d), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])

// A and B in shared memory; D is [64, 2·REGS] and begins as `d0`; `scale` 0: D does not count.
#define BEGIN(REGS)                                                             \
    __shared__ __align__(1024) u32 as[4096];                                    \
    __shared__ __align__(1024) u32 bs[4096];                                    \
    int t = threadIdx.x;                                                        \
    for (int i = t; i < na; i += 128) as[i] = a[i];                             \
    for (int i = t; i < nb; i += 128) bs[i] = b[i];                             \
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                \
    __syncthreads();                                                            \
    u64 da = ma | at(as) >> 4, db = mb | at(bs) >> 4;                           \
    float d[REGS];                                                              \
    for (int i = 0; i < REGS; i++) d[i] = d0 + i;                               \
    for (int i = 0; i < REGS; i++) asm volatile("" : "+f"(d[i])::"memory")
// Registers are made before it: the compiler must not move that behind.
#define FENCE asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
#define FRAGMENTS                                                               \
    u32 r[4] = {as[4 * t], as[4 * t + 1], as[4 * t + 2], as[4 * t + 3]};        \
    asm volatile("" : "+r"(r[0]), "+r"(r[1]), "+r"(r[2]), "+r"(r[3])::"memory")
#define END(REGS)                                                               \
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory"); \
    for (int i = 0; i < REGS; i++) y[REGS * t + i] = d[i]
#define PARAMS float *y, const u32 *a, int na, const u32 *b, int nb, u64 ma, u64 mb, float d0, int scale
#define PRED "{\n.reg .pred p;\nsetp.ne.b32 p, "

extern "C" __global__ void __launch_bounds__(128) n8_f16_negated(PARAMS) {
    BEGIN(4);
    FENCE;
    asm volatile(PRED "%6, 0;\nwgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 " D4 ", %4, %5, p, -1, 1, 0, 0;\n}" : O4(d) : "l"(da), "l"(db), "r"(scale));
    END(4);
}
extern "C" __global__ void __launch_bounds__(128) n24_bf16_transposed(PARAMS) {
    BEGIN(12);
    FENCE;
    asm volatile(PRED "%14, 0;\nwgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 " D12 ", %12, %13, p, 1, 1, 1, 1;\n}" : O12(d) : "l"(da), "l"(db), "r"(scale));
    // MUT a_as_it_is: asm volatile(PRED "%14, 0;\nwgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 " D12 ", %12, %13, p, 1, 1, 0, 1;\n}" : O12(d) : "l"(da), "l"(db), "r"(scale));
    END(12);
}
extern "C" __global__ void __launch_bounds__(128) n32_f16_transposed(PARAMS) {
    BEGIN(16);
    FENCE;
    asm volatile(PRED "%18, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 " D16 ", %16, %17, p, 1, 1, 1, 1;\n}" : O16(d) : "l"(da), "l"(db), "r"(scale));
    END(16);
}
extern "C" __global__ void __launch_bounds__(128) n16_tf32(PARAMS) {
    BEGIN(8);
    FENCE;
    asm volatile(PRED "%10, 0;\nwgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 " D8 ", %8, %9, p, 1, 1;\n}" : O8(d) : "l"(da), "l"(db), "r"(scale));
    END(8);
}
// A in registers: the bytes of `a` are [128 threads, 4].
extern "C" __global__ void __launch_bounds__(128) n16_tf32_registers(PARAMS) {
    BEGIN(8);
    FRAGMENTS;
    FENCE;
    asm volatile(PRED "%13, 0;\nwgmma.mma_async.sync.aligned.m64n16k8.f32.tf32.tf32 " D8 ", {%8, %9, %10, %11}, %12, p, 1, 1;\n}"
                 : O8(d) : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(db), "r"(scale));
    // MUT registers: : O8(d) : "r"(r[0]), "r"(r[2]), "r"(r[1]), "r"(r[3]), "l"(db), "r"(scale));
    END(8);
}
extern "C" __global__ void __launch_bounds__(128) n32_bf16_registers(PARAMS) {
    BEGIN(16);
    FRAGMENTS;
    FENCE;
    asm volatile(PRED "%21, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 " D16 ", {%16, %17, %18, %19}, %20, p, 1, -1, 1;\n}"
                 : O16(d) : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(db), "r"(scale));
    END(16);
}
// One product's registers are another's: D of 16 columns, whose first 8 get more; A's fragments change between.  Products of one
// shape are in order by themselves.
extern "C" __global__ void __launch_bounds__(128) chained(PARAMS) {
    BEGIN(8);
    FRAGMENTS;
    FENCE;
#define N16 asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 " D8 ", {%8, %9, %10, %11}, %12, 1, 1, 1, 0;" : O8(d) : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(db))
    N16;
    N16;
    FENCE;
    // MUT other_shape: ;
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 " D4 ", {%4, %5, %6, %7}, %8, 1, 1, 1, 0;" : O4(d) : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "l"(db));
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    // MUT fragments_waited: ;
    for (int i = 0; i < 4; i++) asm volatile("xor.b32 %0, %0, 0x80008000;" : "+r"(r[i])::"memory");
    FENCE;
    // MUT other_fragments: ;
    N16;
    END(8);
}
// Sums in f16: a register holds two.  `y` gets their bits.
extern "C" __global__ void __launch_bounds__(128) n16_f16_sums(u32* y, const u32* a, int na, const u32* b, int nb, u64 ma, u64 mb, u32 d0, int scale) {
    __shared__ __align__(1024) u32 as[4096];
    __shared__ __align__(1024) u32 bs[4096];
    int t = threadIdx.x;
    for (int i = t; i < na; i += 128) as[i] = a[i];
    for (int i = t; i < nb; i += 128) bs[i] = b[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    // MUT proxy: ;
    __syncthreads();
    // MUT barrier: ;
    u64 da = ma | at(as) >> 4, db = mb | at(bs) >> 4;
    u32 d[4] = {d0, d0, d0, d0};
    asm volatile("" : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])::"memory");
    FENCE;
    // MUT unfenced: ;
    asm volatile(PRED "%6, 0;\nwgmma.mma_async.sync.aligned.m64n16k16.f16.f16.f16 " D4 ", %4, %5, p, 1, 1, 0, 0;\n}"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "l"(da), "l"(db), "r"(scale));
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    // MUT unwaited: ;
    for (int i = 0; i < 4; i++) y[4 * t + i] = d[i];
}
