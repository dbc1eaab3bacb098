// Kernels that begin before those before them have ended (programmatic dependent launch, sm_90).
//
//   let_next_begin        the next kernel may begin once every block of this one has come here
//   wait_for_earlier      until every kernel before has ended, and what they wrote is here
//
// Kernels that have nothing to do before call `after_earlier` (types.cuh), which does both.
//
// Before it waits a kernel may read what none before it in its run writes, and write nothing.  Every thread waits, so that whoever
// waits for this kernel has waited for all before it.
//
// C: early, whether the kernel may be launched so.
#pragma once
#include "types.cuh"

namespace rambac {

template <class C> __device__ __forceinline__ void let_next_begin() {
    if constexpr (C::early) asm volatile("griddepcontrol.launch_dependents;");
}
template <class C> __device__ __forceinline__ void wait_for_earlier() {
    if constexpr (C::early) asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace rambac
