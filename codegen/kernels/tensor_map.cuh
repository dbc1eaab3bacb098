// Boxes of tensors, copied to shared memory by one instruction of one thread (TMA, sm_90a): a tensor map says where the tensor is,
// an mbarrier tells when a box is there.
//
// Rows of a box are 128 bytes, swizzled as Panels are (wgmma.cuh), so that wgmma reads them as they come; what of a box lies outside
// the tensor is zero.  Dims count from the innermost.
#pragma once
#include "wgmma.cuh"

namespace rambac {

// What the driver makes of a tensor; a kernel has it as a parameter.
struct alignas(64) TensorMap {
    u64 words[16];
};
__device__ __forceinline__ void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// The box at these coordinates to shared memory at `to`, a multiple of 1024; it counts towards the bytes that `full` expects.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, Mbarrier& full, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
                 "l"(&map), "r"(shared_address(&full.state)), "r"(x), "r"(y), "r"(z) : "memory");
}
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, Mbarrier& full, int x, int y, int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
                 "l"(&map), "r"(shared_address(&full.state)), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

}  // namespace rambac
