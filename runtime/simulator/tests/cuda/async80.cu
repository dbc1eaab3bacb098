// Asynchronous copies with an mbarrier (sm_80) and with bytes beyond an end filled with zeros; stmatrix's counterpart by
// transposed ldmatrix.

typedef unsigned int u32;
typedef unsigned long long u64;
__device__ __forceinline__ u32 at(const void* p) { return (u32)__cvta_generic_to_shared(p); }

extern "C" __global__ void mbarrier_copy(float* y, const float* x) {
    __shared__ __align__(16) float s[256];
    __shared__ __align__(8) u64 bar;
    int t = threadIdx.x;
    if (t == 0) asm volatile("mbarrier.init.shared.b64 [%0], 64;" ::"r"(at(&bar)) : "memory");
    // MUT count: if (t == 0) asm volatile("mbarrier.init.shared.b64 [%0], 65;" ::"r"(at(&bar)) : "memory");
    __syncthreads();
    // MUT init_barrier: ;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at(&s[4 * t])), "l"(x + blockIdx.x * 256 + 4 * t) : "memory");
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at(&bar)) : "memory");
    // MUT not_bound: asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(at(&bar)) : "memory");
    asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.test_wait.parity.shared.b64 p, [%0], 0;\n@!p bra WAIT;\n}" ::"r"(at(&bar)) : "memory");
    // MUT wait: ;
    // MUT parity: asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.test_wait.parity.shared.b64 p, [%0], 1;\n@!p bra WAIT;\n}" ::"r"(at(&bar)) : "memory");
    for (int i = t; i < 256; i += 64) y[blockIdx.x * 256 + i] = s[255 - i];
}

extern "C" __global__ void zero_fill(float* y, const float* x, int n) {
    __shared__ __align__(16) float s[128];
    int t = threadIdx.x;
    int left = (n - 4 * t) * 4;
    int bytes = left < 0 ? 0 : left > 16 ? 16 : left;
    // MUT all_bytes: int bytes = 16;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(at(&s[4 * t])), "l"(x + 4 * t), "r"(bytes) : "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    // MUT wait: ;
    __syncthreads();
    // MUT barrier: ;
    for (int i = t; i < 128; i += 32) y[i] = s[i ^ 1];
}

extern "C" __global__ void transposed(unsigned short* y, const unsigned short* x) {
    __shared__ __align__(16) unsigned short s[4 * 64];
    int t = threadIdx.x;
    for (int i = t; i < 256; i += 32) s[i] = x[i];
    __syncwarp();
    // MUT barrier: ;
    u32 r[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at(&s[8 * t]))
                 : "memory");
    // Element (row, col) of matrix k comes out at (col, row).
    for (int k = 0; k < 4; k++) {
        y[64 * k + t / 4 * 8 + t % 4 * 2] = (unsigned short)r[k];
        y[64 * k + t / 4 * 8 + t % 4 * 2 + 1] = (unsigned short)(r[k] >> 16);
    }
}

extern "C" __global__ void products(float* f, int* s, const u32* a, const u32* b) {
    int t = threadIdx.x;
    float c[4] = {1.f, 2.f, 3.f, 4.f};
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[4 * t]), "r"(a[4 * t + 1]), "r"(a[4 * t + 2]), "r"(a[4 * t + 3]), "r"(b[2 * t]), "r"(b[2 * t + 1]));
    int d[4] = {t, -t, 2 * t, 0};
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[4 * t]), "r"(a[4 * t + 1]), "r"(a[4 * t + 2]), "r"(a[4 * t + 3]), "r"(b[2 * t]), "r"(b[2 * t + 1]));
    for (int k = 0; k < 4; k++) {
        f[4 * t + k] = c[k];
        s[4 * t + k] = d[k];
    }
}
