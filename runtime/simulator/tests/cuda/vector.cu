// y = a + b, one element per thread; and the same by four elements at a time over a grid-wide stride.

extern "C" __global__ void add(float* y, const float* a, const float* __restrict__ b, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    // MUT block_index: int i = blockIdx.x * blockDim.y + threadIdx.x;
    if (i < n) y[i] = a[i] + b[i];
    // MUT off_by_one: if (i <= n) y[i] = a[i] + b[i];
    // MUT no_bound: y[i] = a[i] + b[i];
    // MUT neighbour: if (i < n) y[i] = a[i] + b[i ^ 1];
    // MUT write_input: if (i < n) ((float*)a)[i] = a[i] + b[i];
    // MUT before: if (i < n) y[i - 1] = a[i] + b[i];
}

extern "C" __global__ void add4(float4* y, const float4* a, const float4* b, int n4) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n4; i += gridDim.x * blockDim.x) {
        // MUT stride: for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n4; i += 2 * gridDim.x * blockDim.x) {
        float4 u = a[i], v = b[i];
        // MUT half_step: float4 u = *(float4*)((float*)a + 2 * i), v = b[i];
        y[i] = make_float4(u.x + v.x, u.y + v.y, u.z + v.z, u.w + v.w);
        // MUT swap: y[i] = make_float4(u.x + v.x, u.y + v.z, u.z + v.y, u.w + v.w);
    }
}
