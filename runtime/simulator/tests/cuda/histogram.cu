// Counts of bytes: into shared memory by atomics, then added to the device's; with everything else that is atomic.

extern "C" __global__ void histogram(unsigned int* counts, const unsigned char* x, int n) {
    __shared__ unsigned int s[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) s[i] = 0;
    // MUT no_zero: ;
    __syncthreads();
    // MUT zero_barrier: ;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&s[x[i]], 1u);
    // MUT plain_add: for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s[x[i]]++;
    // MUT bound: for (int i = blockIdx.x * blockDim.x + threadIdx.x; i <= n; i += gridDim.x * blockDim.x) atomicAdd(&s[x[i]], 1u);
    __syncthreads();
    // MUT add_barrier: ;
    for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&counts[i], s[i]);
    // MUT plain_total: for (int i = threadIdx.x; i < 256; i += blockDim.x) counts[i] += s[i];
    // MUT total_index: for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&counts[i + 1], s[i]);
}

extern "C" __global__ void kinds(unsigned int* u, int* s, unsigned long long* w, float* f, double* d) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicMax(&u[0], (unsigned)i * 7u);
    atomicMin(&u[1], (unsigned)i + 5u);
    atomicOr(&u[2], 1u << (i % 32));
    atomicAnd(&u[3], ~(1u << (i % 8)));
    atomicXor(&u[4], (unsigned)i);
    atomicInc(&u[5], 9u);
    atomicDec(&u[6], 9u);
    unsigned assumed, old = atomicAdd(&u[7], 0u);
    do {
        assumed = old;
        old = atomicCAS(&u[7], assumed, assumed + 3u);
    } while (old != assumed);
    atomicMin(&s[0], -i);
    atomicMax(&s[1], i - 1000);
    atomicAdd(&s[2], -1);
    atomicAdd(&w[0], 1ull << 33);
    atomicMax(&w[1], (unsigned long long)i << 40);
    atomicAdd(f, 0.5f);
    atomicAdd(d, 0.25);
}
