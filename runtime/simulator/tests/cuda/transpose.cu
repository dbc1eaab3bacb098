// y = xᵀ by tiles of 32 × 32 in shared memory, blocks of 32 × 8 threads; with a pitch of 33 no bank conflicts, with 32
// all 32 rows of a column meet in one bank.

template <int PITCH> __device__ __forceinline__ void transpose(float* y, const float* x, int rows, int cols) {
    __shared__ float tile[32 * PITCH];
    int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
    for (int i = 0; i < 32; i += 8)
        if (r + i < rows && c < cols) tile[(threadIdx.y + i) * PITCH + threadIdx.x] = x[(size_t)(r + i) * cols + c];
        // MUT read_bound: if (c < cols) tile[(threadIdx.y + i) * PITCH + threadIdx.x] = x[(size_t)(r + i) * cols + c];
        // MUT tile_index: if (r + i < rows && c < cols) tile[threadIdx.x * PITCH + threadIdx.y + i] = x[(size_t)(r + i) * cols + c];
        // MUT tile_pitch: if (r + i < rows && c < cols) tile[(threadIdx.y + i) * (PITCH + 3) + threadIdx.x] = x[(size_t)(r + i) * cols + c];
    __syncthreads();
    // MUT barrier: ;
    int tc = blockIdx.y * 32 + threadIdx.x, tr = blockIdx.x * 32 + threadIdx.y;
    // MUT swapped: int tc = blockIdx.x * 32 + threadIdx.x, tr = blockIdx.y * 32 + threadIdx.y;
    for (int i = 0; i < 32; i += 8)
        if (tr + i < cols && tc < rows) y[(size_t)(tr + i) * rows + tc] = tile[threadIdx.x * PITCH + threadIdx.y + i];
        // MUT write_bound: if (tr + i < cols) y[(size_t)(tr + i) * rows + tc] = tile[threadIdx.x * PITCH + threadIdx.y + i];
        // MUT write_pitch: if (tr + i < cols && tc < rows) y[(size_t)(tr + i) * cols + tc] = tile[threadIdx.x * PITCH + threadIdx.y + i];
}

extern "C" __global__ void transpose33(float* y, const float* x, int rows, int cols) { transpose<33>(y, x, rows, cols); }
extern "C" __global__ void transpose32(float* y, const float* x, int rows, int cols) { transpose<32>(y, x, rows, cols); }
