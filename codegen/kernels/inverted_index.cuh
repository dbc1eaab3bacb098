// Chunk → the (token, slot) pairs that chose it, by counting sort; no order depends on a schedule.
//
// A sequence and key head is a list (`g` of N·h).  Its tokens are cut in blocks:
//
//   index_count   table[g, block, chunk] = how often                                    a block of threads per block
//   index_scan    table becomes the first position of (chunk, block); offsets, slabs    a block of threads per list
//   index_fill    entries[g, position] = token·K + slot, a warp walks a block in order   a warp per block
//
// A slab is at most SLAB neighbouring pairs of one chunk: a unit of work.  There are slab_first[g, C] ≤ L·K / SLAB + C of
// them; a chunk's are slab_first[g, c] up to slab_first[g, c + 1].  Traffic: indices and table twice, entries once.  With
// blocks of at least C / K tokens the table is no larger than the entries.
#pragma once
#include "warp.cuh"

namespace rambac {

// C says: slots (K), threads, slab (pairs of one).  slabs [lists, max_slabs, 2]: chunk, first of its pairs in entries.
template <class C>
__device__ __forceinline__ void index_count(i32* table, const i32* indices, const i32* count, i32 l, i32 h, i32 chunks,
                                            i32 block_tokens) {
    constexpr int K = C::slots, THREADS = C::threads;
    int blocks = (int)ceil_div(l, block_tokens), block = blockIdx.x % blocks;
    i64 list = blockIdx.x / blocks;
    i32* row = table + (list * blocks + block) * chunks;
    for (int c = threadIdx.x; c < chunks; c += THREADS) row[c] = 0;
    __syncthreads();
    int token0 = block * block_tokens, tokens = min_of(block_tokens, l - token0);
    i64 first = (list / h * l + token0) * h + list % h;
    // Several pairs are on their way at once.
#pragma unroll 8
    for (int i = threadIdx.x; i < tokens * K; i += THREADS) {
        i64 at = first + (i64)(i / K) * h;
        i32 n = count[at], chunk = indices[at * K + i % K];
        if (i % K < n) atomicAdd(row + chunk, 1);
        // MUT index_filled: atomicAdd(row + chunk, 1);
    }
}

template <class C>
__device__ __forceinline__ void index_scan(i32* offsets, i32* slab_first, i32* slabs, i32* table, i32 blocks, i32 chunks,
                                           i32 max_slabs) {
    constexpr int SLAB = C::slab, THREADS = C::threads;
    __shared__ u64 sums[THREADS / 32];
    i64 list = blockIdx.x;
    table += list * blocks * chunks, offsets += list * (chunks + 1), slab_first += list * (chunks + 1);
    slabs += list * max_slabs * 2;
    // Pairs in the low half, slabs in the high.
    u64 before = 0;
    for (int base = 0; base < chunks; base += THREADS) {
        int c = base + threadIdx.x, total = 0;
        if (c < chunks) {
#pragma unroll 8
            for (int b = 0; b < blocks; b++) total += table[(i64)b * chunks + c];
        }
        u64 own = (u64)ceil_div(total, SLAB) << 32 | (u32)total, sum = own;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            u64 left = __shfl_up_sync(ALL_LANES, sum, d);
            if (lane_id() >= d) sum += left;
        }
        if (lane_id() == 31) sums[warp_id()] = sum;
        __syncthreads();
        u64 all = 0, at = before + sum - own;
#pragma unroll
        for (int w = 0; w < THREADS / 32; w++) {
            at += w < warp_id() ? sums[w] : 0;
            // MUT index_warps: ;
            all += sums[w];
        }
        before += all;
        // MUT index_tiles: ;
        __syncthreads();
        if (c >= chunks) continue;
        i32 pair = (i32)at, slab = (i32)(at >> 32), position = pair;
        offsets[c] = pair, slab_first[c] = slab;
        for (int i = 0; i * SLAB < total; i++) store_global(slabs + 2 * (i64)(slab + i), Vec<i32, 2>{{c, pair + i * SLAB}});
        // Several loads are under way at once.
        constexpr int EACH = 8;
        for (int b = 0; b < blocks; b += EACH) {
            i32 n[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) n[i] = b + i < blocks ? table[(i64)(b + i) * chunks + c] : 0;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                if (b + i < blocks) table[(i64)(b + i) * chunks + c] = position;
                position += n[i];
                // MUT index_blocks: ;
            }
        }
    }
    if (threadIdx.x == 0) offsets[chunks] = (i32)before, slab_first[chunks] = (i32)(before >> 32);
}

// `pairs` is L·K.
template <class C>
__device__ __forceinline__ void index_fill(i32* entries, i32* table, const i32* indices, const i32* count, i32 pairs,
                                           i32 n_lists, i32 l, i32 h, i32 chunks, i32 block_tokens) {
    constexpr int K = C::slots, WARPS = C::threads / 32;
    int blocks = (int)ceil_div(l, block_tokens);
    i64 work = (i64)blockIdx.x * WARPS + warp_id(), list = work / blocks;
    if (list >= n_lists) return;
    int block = (int)(work % blocks), token0 = block * block_tokens, tokens = min_of(block_tokens, l - token0);
    i32* row = table + work * chunks;
    entries += list * pairs;
    i64 first = (list / h * l + token0) * h + list % h;
    // Counts at or below zero have none.
    bool any = false;
#pragma unroll 8
    for (int i = lane_id(); i < tokens; i += 32) any |= count[first + (i64)i * h] > 0;
    if (!__any_sync(ALL_LANES, any)) return;
    constexpr int AHEAD = 8;
    for (int first_pair = 0; first_pair < tokens * K; first_pair += 32 * AHEAD) {
        // Several pairs are on their way at once; unfilled slots have an index, too.
        int chunks_of[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int i = first_pair + 32 * j + lane_id();
            i64 at = first + (i64)(min_of(i, tokens * K - 1) / K) * h;
            i32 n = count[at], chunk = indices[at * K + i % K];
            chunks_of[j] = i < tokens * K && i % K < n ? chunk : -1;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int chunk = chunks_of[j];
            bool filled = chunk >= 0;
            u32 same = __match_any_sync(ALL_LANES, chunk);
            int rank = __popc(same & ((1u << lane_id()) - 1));
            // MUT index_rank: int rank = 0;
            int position = filled ? row[chunk] : 0;
            // All have read before one writes, and it has written before any reads again.
            __syncwarp();
            if (filled && rank == 0) row[chunk] = position + __popc(same);
            __syncwarp();
            // MUT index_written: ;
            if (filled) entries[position + rank] = token0 * K + first_pair + 32 * j + lane_id();
        }
    }
}

}  // namespace rambac
