// Divergent control flow: loops of different lengths, nested branches, switches, functions that are not inlined, early
// exits, warp votes under divergence, and threads of one warp that wait for each other.

extern "C" __global__ void collatz(unsigned int* steps, const unsigned int* start, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned int x = start[i], k = 0;
    while (x != 1) {
        if (x % 2) x = 3 * x + 1;
        else x /= 2;
        k++;
    }
    steps[i] = k;
    // MUT index: steps[i ^ 32] = k;
}

__device__ __noinline__ int weigh(int kind, int x) {
    switch (kind) {
        case 0: return x + 1;
        case 1: return x * 3;
        case 2: return x - 7;
        case 3: return x ^ 0x55;
        case 4: return -x;
        case 5: return x / 3;
        case 6: return x << 2;
        default: return x % 11;
    }
}

__device__ __noinline__ double horner(double x, int n) {
    double s = 0;
    for (int i = n; i > 0; i--) s = s * x + 1.0 / i;
    return s;
}

struct Pair {
    float a;
    int b;
    double c;
};

__device__ __noinline__ Pair both(Pair p, int by) {
    p.a += by;
    p.b = weigh(p.b & 7, by);
    p.c = horner(p.c, by & 3);
    return p;
}

extern "C" __global__ void functions(int* out, double* real, const int* x, Pair first) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    int v = x[i];
    for (int k = 0; k < (i & 3) + 1; k++) v = weigh((i + k) & 7, v);
    Pair p = first;
    p.b += i;
    if (i % 3 == 0) p = both(p, i);
    out[i] = v + p.b;
    real[i] = horner(1.0 / (i + 1), 5) + p.c + p.a;
}

// Every eighth lane of a warp that is awake votes with those that are.
extern "C" __global__ void votes(unsigned int* out, const int* x) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned int r = 0;
    if (x[i] > 0) {
        unsigned int m = __activemask();
        r = __ballot_sync(m, x[i] % 2);
        r ^= __match_any_sync(m, x[i] % 5) << 1;
    }
    __syncwarp();
    unsigned int all = __ballot_sync(0xffffffffu, x[i] > 0);
    // MUT mask: unsigned int all = __ballot_sync(0x0fffffffu, x[i] > 0);
    int least = __reduce_min_sync(0xffffffffu, x[i]);
    out[i] = (x[i] > 0 ? (unsigned)__popc(all) : all) + (unsigned)least + (unsigned)__any_sync(0xffffffffu, x[i] == 3);
    // MUT in_branch: if (x[i] > 0) out[i] = __popc(__ballot_sync(0xffffffffu, x[i] > 0));
}

// A lock that lanes of one warp take in turn: needs each thread to make progress of its own.
extern "C" __global__ void locked(int* counter, int* lock) {
    bool done = false;
    while (!done) {
        if (atomicCAS(lock, 0, 1) == 0) {
            __threadfence();
            *(volatile int*)counter = *(volatile int*)counter + 1;
            // MUT forgets: ;
            __threadfence();
            atomicExch(lock, 0);
            // MUT never_frees: ;
            done = true;
        }
    }
}

// Producer and consumer halves of a block with named barriers.
extern "C" __global__ void named(float* out, const float* x, int rounds) {
    __shared__ float slot[2][64];
    int t = threadIdx.x;
    float sum = 0;
    for (int r = 0; r < rounds; r++) {
        if (t < 64) {
            if (r >= 2) asm volatile("bar.sync %0, 128;" ::"r"(3 + (r & 1)) : "memory");
            // MUT empty: ;
            slot[r & 1][t] = x[r * 64 + t];
            // MUT one_slot: slot[0][t] = x[r * 64 + t];
            __threadfence_block();
            asm volatile("bar.arrive %0, 128;" ::"r"(1 + (r & 1)) : "memory");
            // MUT full: ;
            // MUT wrong_name: asm volatile("bar.arrive %0, 128;" ::"r"(1) : "memory");
        } else {
            asm volatile("bar.sync %0, 128;" ::"r"(1 + (r & 1)) : "memory");
            // MUT waits: ;
            sum += slot[r & 1][(t + 1) % 64];
            if (r + 2 < rounds) asm volatile("bar.arrive %0, 128;" ::"r"(3 + (r & 1)) : "memory");
            // MUT no_release: ;
        }
    }
    if (t >= 64) out[t - 64] = sum;
}
