// Gradients of the choice of chunks (op `selection_grad`): through the weights into the scores of the chosen, from there into
// queries and landmarks; no array has tokens by chunks.
//
//   select_grad_scores      ds[t, k] from dw by the weighting's rule                                  a thread per row
//   select_grad_queries     dq[t] = scale · Σ_k ds[t, k]·landmark[c(t, k)]                            a warp per row
//   select_grad_landmarks   partial[slab] = scale · Σ ds·q over a slab's pairs (inverted_index.cuh)   a block per slab
//   select_grad_chunks      dlandmark[c] = a chunk's partial sums in order of its slabs               a block per chunk
//
// All sums in a fixed order.  Traffic: r elements of a landmark and r of a query per filled slot, from L2.
#pragma once
#include "inverted_index.cuh"
#include "select.cuh"

namespace rambac {

// dL/ds of `n` scores, in place of the weights' gradients `g`.  (formulas: ir/src/ops/weigh.rs)
template <Weigh RULE> __device__ __forceinline__ void weigh_grad(float* g, float* w, const float* s, int pitch, int n) {
    weigh<RULE>(w, s, pitch, n);
    if constexpr (RULE == Weigh::STICK_BREAKING) {
        float tail = 0.f;
        for (int i = n - 1; i >= 0; i--) {
            float wg = w[i * pitch] * g[i * pitch];
            tail += wg;
            // MUT choice_tail: tail = wg;
            g[i * pitch] = wg - sigmoid(s[i * pitch]) * tail;
        }
    } else if constexpr (RULE == Weigh::SOFTMAX) {
        float dot = 0.f;
        for (int i = 0; i < n; i++) dot = fmaf(w[i * pitch], g[i * pitch], dot);
        for (int i = 0; i < n; i++) g[i * pitch] = w[i * pitch] * (g[i * pitch] - dot);
    } else {
        for (int i = 0; i < n; i++)
            g[i * pitch] = RULE == Weigh::SIGMOID ? g[i * pitch] * w[i * pitch] * (1.f - w[i * pitch]) : RULE == Weigh::LOGIT ? g[i * pitch] : 0.f;
    }
}

// scores, dweights, ds [rows, K], count [rows].  THREADS rows per block; nobody reads ds of unfilled slots.
// C says: slots (K), rule, threads.
template <class C, class W>
__device__ __forceinline__ void select_grad_scores(float* ds, const W* scores, const W* dweights,
                                                   const i32* count, i64 rows) {
    constexpr int K = C::slots, THREADS = C::threads;
    constexpr int PITCH_ROW = slot_pitch(THREADS, K);
    extern __shared__ __align__(16) u8 shared[];
    float *s = reinterpret_cast<float*>(shared), *g = s + K * PITCH_ROW, *w = g + K * PITCH_ROW;
    i64 row0 = (i64)blockIdx.x * THREADS;
    int n = (int)min_of((i64)THREADS, rows - row0);
    for (int i = threadIdx.x; i < n * K; i += THREADS) {
        s[i % K * PITCH_ROW + i / K] = to_f32(scores[row0 * K + i]);
        g[i % K * PITCH_ROW + i / K] = to_f32(dweights[row0 * K + i]);
    }
    __syncthreads();
    if (threadIdx.x < n) {
        weigh_grad<C::rule>(g + threadIdx.x, w + threadIdx.x, s + threadIdx.x, PITCH_ROW, count[row0 + threadIdx.x]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n * K; i += THREADS) ds[row0 * K + i] = g[i % K * PITCH_ROW + i / K];
}

// C says: T, width (r), slots (K), scale; warps.  Rows [N, L, h]; a warp per row.
template <class C>
__device__ __forceinline__ void select_grad_queries(typename C::T* dq, i64 dq_stride, const typename C::T* landmarks,
                                                    i64 landmark_stride, const i32* indices, const i32* count,
                                                    const float* ds, i64 rows, i32 l, i32 h, i32 chunks) {
    using T = typename C::T;
    constexpr int R = C::width, K = C::slots, PIECE = 16 / sizeof(T);
    i64 row = (i64)blockIdx.x * C::warps + warp_id(), token = row / h;
    if (row >= rows) return;
    int head = (int)(row % h), n = count[row];
    const T* landmark0 = landmarks + token / l * chunks * landmark_stride + head * R;
    for (int col = lane_id() * PIECE; col < R; col += 32 * PIECE) {
        float sum[PIECE] = {};
#pragma unroll 4
        for (int k = 0; k < n; k++) {
            float by = ds[row * K + k];
            auto x = load<T, PIECE>(landmark0 + indices[row * K + k] * landmark_stride + col);
#pragma unroll
            for (int j = 0; j < PIECE; j++) sum[j] = fmaf(by, to_f32(x[j]), sum[j]);
        }
        Vec<T, PIECE> y;
#pragma unroll
        for (int j = 0; j < PIECE; j++) y[j] = from_f32<T>(C::scale * sum[j]);
        store_global(dq + token * dq_stride + head * R + col, y);
    }
}

// How a block of C::warps warps shares a slab: threads along r, groups along the pairs.
template <class C> struct LandmarkGrad {
    static constexpr int THREADS = 32 * C::warps, PIECE = 16 / sizeof(typename C::T);
    static constexpr int ACROSS = min_of(THREADS, (int)ceil_div(C::width, PIECE)), GROUPS = THREADS / ACROSS;
};

// partial [lists, max_slabs, r] in f32.  One block per (list, slab).
template <class C>
__device__ __forceinline__ void select_grad_landmarks(float* partial, const typename C::T* q, i64 q_stride, const float* ds,
                                                      const i32* entries, const i32* offsets, const i32* slab_first,
                                                      const i32* slabs, i32 l, i32 h, i32 chunks, i32 max_slabs) {
    using S = LandmarkGrad<C>;
    using T = typename C::T;
    constexpr int R = C::width, K = C::slots, PIECE = S::PIECE;
    __shared__ float sums[S::GROUPS > 1 ? (S::GROUPS - 1) * S::ACROSS * PIECE : 1];
    i64 list = blockIdx.x / max_slabs, sequence = list / h;
    int slab = blockIdx.x % max_slabs, head = (int)(list % h);
    if (slab >= slab_first[list * (chunks + 1) + chunks]) return;
    auto found = load<i32, 2>(slabs + (list * max_slabs + slab) * 2);
    int end = min_of(found[1] + C::slab, offsets[list * (chunks + 1) + found[0] + 1]);
    // MUT choice_end: int end = offsets[list * (chunks + 1) + found[0] + 1];
    int group = threadIdx.x / S::ACROSS, across = threadIdx.x % S::ACROSS;
    const T* q0 = q + sequence * l * q_stride + head * R;
    for (int col0 = 0; col0 < R; col0 += S::ACROSS * PIECE) {
        int col = col0 + across * PIECE;
        float sum[PIECE] = {};
        if (group < S::GROUPS && col < R) {
#pragma unroll 4
            for (int i = found[1] + group; i < end; i += S::GROUPS) {
                i32 e = entries[list * l * K + i];
                float by = ds[((sequence * l + e / K) * h + head) * K + e % K];
                auto x = load<T, PIECE>(q0 + e / K * q_stride + col);
#pragma unroll
                for (int j = 0; j < PIECE; j++) sum[j] = fmaf(by, to_f32(x[j]), sum[j]);
            }
        }
        if constexpr (S::GROUPS > 1) {
            if (group > 0 && group < S::GROUPS)
#pragma unroll
                for (int j = 0; j < PIECE; j++) sums[(j * (S::GROUPS - 1) + group - 1) * S::ACROSS + across] = sum[j];
            __syncthreads();
            // MUT choice_groups: ;
            if (group == 0)
                for (int g = 0; g < S::GROUPS - 1; g++)
#pragma unroll
                    for (int j = 0; j < PIECE; j++) sum[j] += sums[(j * (S::GROUPS - 1) + g) * S::ACROSS + across];
            __syncthreads();
        }
        if (group == 0 && col < R)
#pragma unroll
            for (int j = 0; j < PIECE; j += 4)
                store_global(partial + (list * max_slabs + slab) * R + col + j,
                             Vec<float, 4>{{C::scale * sum[j], C::scale * sum[j + 1], C::scale * sum[j + 2], C::scale * sum[j + 3]}});
    }
}

// One block per (list, chunk).
template <class C>
__device__ __forceinline__ void select_grad_chunks(typename C::T* dlandmarks, i64 stride, const float* partial,
                                                   const i32* slab_first, i32 h, i32 chunks, i32 max_slabs) {
    constexpr int R = C::width;
    i64 list = blockIdx.x / chunks, sequence = list / h;
    int chunk = blockIdx.x % chunks, head = (int)(list % h);
    const i32* first = slab_first + list * (chunks + 1) + chunk;
    int from = first[0], to = first[1];
    for (int col = threadIdx.x * 4; col < R; col += blockDim.x * 4) {
        float sum[4] = {};
#pragma unroll 4
        for (int slab = from; slab < to; slab++) {
            auto x = load<float, 4>(partial + (list * max_slabs + slab) * R + col);
#pragma unroll
            for (int j = 0; j < 4; j++) sum[j] += x[j];
        }
        Vec<typename C::T, 4> y;
#pragma unroll
        for (int j = 0; j < 4; j++) y[j] = from_f32<typename C::T>(sum[j]);
        store_global(dlandmarks + (sequence * chunks + chunk) * stride + head * R + col, y);
    }
}

}  // namespace rambac
