// Arithmetic of many kinds, as compilers and inline PTX emit it.

extern "C" __global__ void integers(unsigned int* out, const unsigned int* a, const unsigned int* b, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned int x = a[i], y = b[i];
    int sx = (int)x, sy = (int)y;
    unsigned int r[12];
    r[0] = x / (y | 1) + x % (y | 1);
    r[1] = (unsigned)(sx / (sy | 1)) ^ (unsigned)(sx % (sy | 1));
    r[2] = __umulhi(x, y) ^ (unsigned)__mulhi(sx, sy);
    r[3] = __popc(x) + __clz((int)y) * 64 + __ffs((int)x) * 4096;
    r[4] = __brev(x) ^ __byte_perm(x, y, x & 0x7777);
    r[5] = __funnelshift_l(x, y, x & 31) ^ __funnelshift_r(x, y, y & 63);
    r[6] = (unsigned)(((unsigned long long)x * y + (((unsigned long long)y << 32) | x)) >> 17);
    r[7] = min(x, y) + (unsigned)max(sx, sy) + (unsigned)abs(sx);
    unsigned int f, g;
    asm("bfe.u32 %0, %1, 5, 11;" : "=r"(f) : "r"(x));
    asm("bfi.b32 %0, %1, %2, 7, 13;" : "=r"(g) : "r"(x), "r"(y));
    r[8] = f ^ g;
    unsigned long long lo, hi;
    asm("add.cc.u64 %0, %2, %3;\n\taddc.u64 %1, %4, %5;"
        : "=l"(lo), "=l"(hi)
        : "l"(((unsigned long long)x << 32) | y), "l"(((unsigned long long)y << 32) | x), "l"((unsigned long long)x), "l"((unsigned long long)y));
    r[9] = (unsigned)(lo ^ hi ^ (hi >> 32));
    r[10] = (unsigned)((long long)sx * sy % 1000003ll);
    r[11] = (x & y) ^ (~x | (y >> 3)) ^ (sx >> 5);
    for (int k = 0; k < 12; k++) out[12 * i + k] = r[k];
}

extern "C" __global__ void floats(float* out, double* wide, const float* a, const float* b, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float x = a[i], y = b[i];
    float r[10];
    r[0] = x / y;
    r[1] = sqrtf(fabsf(x));
    r[2] = expf(x);
    r[3] = logf(fabsf(x) + 0.1f);
    r[4] = sinf(x) + cosf(y);
    r[5] = tanhf(x);
    r[6] = rsqrtf(fabsf(y) + 0.5f);
    r[7] = powf(fabsf(x), 1.5f);
    r[8] = __fmaf_rn(x, y, 1.0f) + __fadd_rz(x, y) - __fmul_ru(x, y);
    r[9] = floorf(x) + rintf(y) + truncf(x * 3.0f) + fminf(x, y) * fmaxf(x, 0.5f);
    for (int k = 0; k < 10; k++) out[10 * i + k] = r[k];
    double d = x, e = y;
    wide[4 * i] = d / e + sqrt(fabs(d));
    wide[4 * i + 1] = exp(d) - log(fabs(e) + 0.5);
    wide[4 * i + 2] = sin(d) * cos(e);
    wide[4 * i + 3] = fma(d, e, 1.0 / 3.0);
}

extern "C" __global__ void halves(unsigned int* out, const float* a, const float* b, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float x = a[i], y = b[i];
    unsigned int p, q, r, s, t;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(p) : "f"(x), "f"(y));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(q) : "f"(x), "f"(y));
    asm("fma.rn.bf16x2 %0, %1, %1, %1;" : "=r"(r) : "r"(p));
    asm("mul.f16x2 %0, %1, %1;" : "=r"(s) : "r"(q));
    asm("add.f16x2 %0, %1, %2;" : "=r"(t) : "r"(s), "r"(q));
    unsigned short h;
    asm("cvt.rz.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
    out[6 * i] = p;
    out[6 * i + 1] = q;
    out[6 * i + 2] = r;
    out[6 * i + 3] = s;
    out[6 * i + 4] = t;
    out[6 * i + 5] = h;
}
