// What a warp's 16 rows draw from one chunk: softmax over its keys, in one part or several, times V, times a weight per row.
//
// In one part the probabilities are scaled by weight / sum before the second product, which then adds to the output itself;
// in several parts (a chunk of more keys than registers hold logits for) an output of its own is rescaled as the maximum
// grows.
#pragma once
#include "pages.cuh"
#include "tile.cuh"

namespace rambac {

// C says: T, head_dim, chunk, keys (of a part; divides chunk), scale, off_by_one.
template <class C> struct ChunkSoftmax {
    using T = typename C::T;
    static constexpr int D = C::head_dim, PARTS = C::chunk / C::keys, P = PITCH<T, D>;
    static constexpr float FACTOR = C::scale * LOG2E;
    static_assert(D % 16 == 0 && C::keys % 16 == 0, "tiles of 16");
    static_assert(C::chunk % C::keys == 0, "parts fill a chunk");

    float out[PARTS > 1 ? D / 8 : 1][4], top[2], sum[2];

    __device__ __forceinline__ void start() {
        clear(out);
        top[0] = top[1] = -3e38f;
        sum[0] = sum[1] = 0.f;
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
        row_max(top, logits);
        row_exp2(more, logits, top, FACTOR);
        if constexpr (PARTS == 1) {
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
