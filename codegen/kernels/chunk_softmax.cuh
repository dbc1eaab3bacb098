// What a warp's 16 rows draw from one chunk: softmax over its keys, in one part or several, times V, times a weight per row.
//
// In one part the probabilities are scaled by weight / sum before the second product, which then adds to the output itself;
// in several parts (a chunk of more keys than registers hold logits for) an output of its own is rescaled as the maximum
// grows.  A joint softmax goes over all of a row's chunks as if they were parts of one: rows that did not choose a chunk take no
// part in it, and its log-sum-exp is known at the end.
#pragma once
#include "pages.cuh"
#include "tile.cuh"

namespace rambac {

// C says: T, head_dim, chunk, keys (of a part; divides chunk), scale, off_by_one, joint.
template <class C> struct ChunkSoftmax {
    using T = typename C::T;
    static constexpr int D = C::head_dim, PARTS = C::chunk / C::keys, P = PITCH<T, D>;
    static constexpr float FACTOR = C::scale * LOG2E;
    static constexpr bool RESCALED = PARTS > 1 || C::joint;
    static_assert(D % 16 == 0 && C::keys % 16 == 0, "tiles of 16");
    static_assert(C::chunk % C::keys == 0, "parts fill a chunk");

    float out[RESCALED ? D / 8 : 1][4], top[2], sum[2];

    __device__ __forceinline__ void start() {
        clear(out);
        // No infinity when it is scaled.
        top[0] = top[1] = -1e30f;
        sum[0] = sum[1] = 0.f;
        // Zero logits are keys that every row has.
        if constexpr (C::joint && C::off_by_one != 0.f) top[0] = top[1] = 0.f, sum[0] = sum[1] = C::off_by_one;
    }
    // weight / (sum + off_by_one zero logits).
    static __device__ __forceinline__ void share(float (&by)[2], const float (&w)[2], const float (&sum)[2], const float (&top)[2]) {
#pragma unroll
        for (int i = 0; i < 2; i++)
            by[i] = w[i] / (C::off_by_one == 0.f ? sum[i] : fmaf(C::off_by_one, exp2_fast(-top[i] * FACTOR), sum[i]));
            // MUT softmax_off: by[i] = w[i] / sum[i];
    }
    // The next part's keys and values, tiles [keys, D].
    template <class A>
    __device__ __forceinline__ void add(float (&total)[D / 8][4], const float (&w)[2], const A& q, const T* k, const T* v) {
        float logits[C::keys / 8][4], before[2] = {top[0], top[1]}, more[2], by[2];
        clear(logits);
        add_product_nt<T, D, C::keys>(logits, q, k, P);
        if constexpr (C::joint) {
#pragma unroll
            for (int i = 0; i < C::keys / 8; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) logits[i][j] = w[j / 2] == 0.f ? -infinity() : logits[i][j];
        }
        row_max(top, logits);
        row_exp2(more, logits, top, FACTOR);
        // A chunk chosen twice counts twice.
        if constexpr (C::joint) row_scale(logits, w), more[0] *= w[0], more[1] *= w[1];
        if constexpr (!RESCALED) {
            share(by, w, more, top);
            row_scale(logits, by);
            add_product_nn<T, C::keys, D>(total, ProductA<T>{logits}, v, P);
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                by[i] = exp2_fast((before[i] - top[i]) * FACTOR);
                // MUT softmax_shrink: by[i] = 1.f;
                sum[i] = fmaf(sum[i], by[i], more[i]);
            }
            row_scale(out, by);
            add_product_nn<T, C::keys, D>(out, ProductA<T>{logits}, v, P);
        }
    }
    // Of a joint softmax: what it gives, and the log-sum-exp of the lane's two rows.
    __device__ __forceinline__ void finish_joint(float (&total)[D / 8][4], float (&lse)[2]) {
        float by[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            by[i] = sum[i] > 0.f ? 1.f / sum[i] : 0.f;
            // MUT softmax_joint: by[i] = 1.f;
            lse[i] = sum[i] > 0.f ? LN2 * fmaf(top[i], FACTOR, __log2f(sum[i])) : -infinity();
        }
#pragma unroll
        for (int i = 0; i < D / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) total[i][j] = out[i][j] * by[j / 2];
    }
    __device__ __forceinline__ void finish(float (&total)[D / 8][4], const float (&w)[2]) {
        if constexpr (PARTS > 1) {
            float by[2];
            share(by, w, sum, top);
            // MUT softmax_finish: share(by, sum, sum, top);
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                total[i][0] = fmaf(out[i][0], by[0], total[i][0]), total[i][1] = fmaf(out[i][1], by[0], total[i][1]);
                total[i][2] = fmaf(out[i][2], by[1], total[i][2]), total[i][3] = fmaf(out[i][3], by[1], total[i][3]);
            }
        }
    }
};

}  // namespace rambac
