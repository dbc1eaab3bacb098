// Bulk copies (sm_90): one thread moves a contiguous piece between global and shared memory.  An mbarrier is told of what came
// into shared memory, a group of the thread's own of what left it.
//
// Addresses and sizes are multiples of 16.
#pragma once
#include "wgmma.cuh"

namespace rambac {

// Told to `full`, which expects so many bytes.
__device__ __forceinline__ void bulk_load(u32 to, const void* from, u32 bytes, Mbarrier& full) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&full.state)) : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, u32 from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)), "r"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but LEFT of the thread's groups no longer read shared memory; or are written.
template <int LEFT> __device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(LEFT) : "memory"); }
template <int LEFT> __device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(LEFT) : "memory"); }

}  // namespace rambac
