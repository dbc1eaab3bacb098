//! Softmax attention within short sequences: the chunk encoder's bidirectional attention, or causal.
//!
//! `y_t,head = softmax(q_t · kᵀ * scale) v`, head → kv head: `head / (heads / kv_heads)`.
//!
//! One task per (sequence, kv head): its keys are one block of `attn_micro`, so the softmax
//! needs no rescaling, and the backward recomputes it and sums dK and dV inside the task in token order.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::attn_micro::{
    Attend, AttendBackward, Block, LN_2, LOG2_E, carve, carved, pack_row, pack_rows, pack_transposed, padded,
};
use crate::par::with_scratch;
use crate::{Mat, MatMut, simd};

/// Query rows (token, head) of one tile.
const ROWS: usize = 48;

/// Shapes of a batch of short sequences: `q` and `y` are (batch·t x heads·dim), `k` and `v` (batch·t x kv_heads·dim).
#[derive(Clone, Copy, Debug)]
pub struct DenseAttention {
    pub batch: usize,
    /// Tokens per sequence.
    pub t: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub scale: f32,
    /// Whether token i sees keys 0..=i only.
    pub causal: bool,
}

impl DenseAttention {
    /// Attention; `y` is overwritten.
    pub fn forward(&self, q: Mat, k: Mat, v: Mat, y: MatMut) {
        self.check(q, k, v);
        assert!(y.rows() == q.rows() && y.cols() == q.cols(), "BUG: y");
        let arch = simd::arch();
        self.tasks().for_each(|(seq, head)| {
            with_scratch(carved(&self.forward_sizes()), |scratch| {
                arch.dispatch(Forward {
                    shape: self,
                    scratch,
                    q: self.queries(q, seq, head),
                    k: self.keys(k, seq, head),
                    v: self.keys(v, seq, head),
                    y: self.queries_mut(&y, seq, head),
                })
            })
        });
    }

    /// Gradients of all three inputs from `dy`; all are overwritten.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(&self, q: Mat, k: Mat, v: Mat, dy: Mat, dq: MatMut, dk: MatMut, dv: MatMut) {
        self.check(q, k, v);
        assert!(dy.rows() == q.rows() && dy.cols() == q.cols(), "BUG: dy");
        assert!(dq.rows() == q.rows() && dq.cols() == q.cols(), "BUG: dq");
        assert!([&dk, &dv].iter().all(|x| x.rows() == k.rows() && x.cols() == k.cols()), "BUG: dk, dv");
        let arch = simd::arch();
        self.tasks().for_each(|(seq, head)| {
            with_scratch(carved(&self.backward_sizes()), |scratch| {
                arch.dispatch(Backward {
                    shape: self,
                    scratch,
                    q: self.queries(q, seq, head),
                    k: self.keys(k, seq, head),
                    v: self.keys(v, seq, head),
                    dy: self.queries(dy, seq, head),
                    dq: self.queries_mut(&dq, seq, head),
                    dk: self.keys_mut(&dk, seq, head),
                    dv: self.keys_mut(&dv, seq, head),
                })
            })
        });
    }

    fn check(&self, q: Mat, k: Mat, v: Mat) {
        let (rows, width) = (self.batch * self.t, self.kv_heads * self.dim);
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "BUG: {} heads", self.heads);
        assert!(q.rows() == rows && q.cols() == self.heads * self.dim, "BUG: q");
        assert!(k.rows() == rows && k.cols() == width && v.rows() == rows && v.cols() == width, "BUG: k, v");
    }

    /// All (sequence, kv head); none when there is nothing to do.
    fn tasks(&self) -> impl IndexedParallelIterator<Item = (usize, usize)> {
        let empty = self.t * self.heads * self.dim == 0;
        let kv_heads = self.kv_heads;
        let tasks = if empty { 0 } else { self.batch * kv_heads };
        (0..tasks).into_par_iter().map(move |i| (i / kv_heads, i % kv_heads))
    }

    /// Query heads per kv head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Tokens per tile.
    fn tile(&self) -> usize {
        (ROWS / self.group()).clamp(1, self.t)
    }

    /// Kᵀ, V; queries, exponentials, outputs and denominators of a tile.
    fn forward_sizes(&self) -> [usize; 6] {
        let (wide, width, rows) = (padded(self.dim), padded(self.t), self.tile() * self.group());
        [self.dim * width, self.t * wide, rows * wide, rows * width, rows * wide, rows]
    }

    /// Kᵀ, Vᵀ, K, dK, dV; of a tile queries, dy, dq, exponentials, their gradient, dots and weights.
    fn backward_sizes(&self) -> [usize; 12] {
        let [turned, keys, queries, square, _, rows] = self.forward_sizes();
        [turned, turned, keys, keys, keys, queries, queries, queries, square, square, rows, rows]
    }

    /// The rows of a sequence and the columns of a kv head's group.
    fn queries<'a>(&self, x: Mat<'a>, seq: usize, head: usize) -> Mat<'a> {
        let width = self.group() * self.dim;
        x.block(seq * self.t, self.t, head * width, width)
    }

    fn keys<'a>(&self, x: Mat<'a>, seq: usize, head: usize) -> Mat<'a> {
        x.block(seq * self.t, self.t, head * self.dim, self.dim)
    }

    fn queries_mut<'a>(&self, x: &'a MatMut, seq: usize, head: usize) -> MatMut<'a> {
        let width = self.group() * self.dim;
        // SAFETY: tasks differ in sequence or head, so their blocks are disjoint.
        unsafe { x.block_unchecked(seq * self.t, self.t, head * width, width) }
    }

    fn keys_mut<'a>(&self, x: &'a MatMut, seq: usize, head: usize) -> MatMut<'a> {
        // SAFETY: as above.
        unsafe { x.block_unchecked(seq * self.t, self.t, head * self.dim, self.dim) }
    }
}

/// Gathers the heads of `tokens` rows from `first` on into padded rows.
#[inline(always)]
fn gather(x: Mat, first: usize, tokens: usize, dim: usize, factor: f32, out: &mut [f32]) {
    let mut rows = out.chunks_exact_mut(padded(dim));
    for t in first..first + tokens {
        for (head, out) in x.row(t).chunks_exact(dim).zip(&mut rows) {
            pack_row(head, factor, out, dim);
        }
    }
}

/// One (sequence, kv head).
struct Forward<'a> {
    shape: &'a DenseAttention,
    scratch: &'a mut [f32],
    q: Mat<'a>,
    k: Mat<'a>,
    v: Mat<'a>,
    y: MatMut<'a>,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let shape = self.shape;
        let (t, dim, group) = (shape.t, shape.dim, shape.group());
        let (width, wide) = (padded(t), padded(dim));
        let [keys_t, values, qs, s, o, sums] = carve(self.scratch, shape.forward_sizes());
        pack_transposed(self.k, width, keys_t);
        pack_rows(self.v, 1.0, values);
        let block = Block { keys: t, dim, zeros: 0.0, keys_t, rows: values, values_t: &[] };
        for first in (0..t).step_by(shape.tile()) {
            let tokens = shape.tile().min(t - first);
            gather(self.q, first, tokens, dim, shape.scale * LOG2_E, qs);
            let visible = |row: usize| if shape.causal { first + row / group + 1 } else { t };
            simd.vectorize(Attend { block, rows: tokens * group, visible: &visible, q: qs, s, o, sums });
            let mut lines = o.chunks_exact(wide).zip(&*sums);
            for token in first..first + tokens {
                for (y, (o, sum)) in self.y.row_mut(token).chunks_exact_mut(dim).zip(&mut lines) {
                    pack_row(&o[..dim], 1.0 / sum, y, dim);
                }
            }
        }
    }
}

/// The gradients of one (sequence, kv head).
struct Backward<'a> {
    shape: &'a DenseAttention,
    scratch: &'a mut [f32],
    q: Mat<'a>,
    k: Mat<'a>,
    v: Mat<'a>,
    dy: Mat<'a>,
    dq: MatMut<'a>,
    dk: MatMut<'a>,
    dv: MatMut<'a>,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let shape = self.shape;
        let (t, dim, group) = (shape.t, shape.dim, shape.group());
        let (width, wide) = (padded(t), padded(dim));
        let [keys_t, values_t, keys, dks, dvs, qs, dys, dqs, s, ds, dots, weights] =
            carve(self.scratch, shape.backward_sizes());
        weights.fill(1.0);
        pack_transposed(self.k, width, keys_t);
        pack_transposed(self.v, width, values_t);
        pack_rows(self.k, 1.0, keys);
        let block = Block { keys: t, dim, zeros: 0.0, keys_t, rows: keys, values_t };
        for first in (0..t).step_by(shape.tile()) {
            let tokens = shape.tile().min(t - first);
            gather(self.q, first, tokens, dim, shape.scale * LOG2_E, qs);
            gather(self.dy, first, tokens, dim, 1.0, dys);
            let visible = |row: usize| if shape.causal { first + row / group + 1 } else { t };
            simd.vectorize(AttendBackward {
                block,
                rows: tokens * group,
                visible: &visible,
                weights,
                q: qs,
                dy: dys,
                s,
                ds,
                dots,
                dq: dqs,
                dk: dks,
                dv: dvs,
                first: first == 0,
            });
            let mut lines = dqs.chunks_exact(wide);
            for token in first..first + tokens {
                for (dq, line) in self.dq.row_mut(token).chunks_exact_mut(dim).zip(&mut lines) {
                    pack_row(&line[..dim], shape.scale, dq, dim);
                }
            }
        }
        for (i, (dk, dv)) in dks.chunks_exact(wide).zip(dvs.chunks_exact(wide)).enumerate() {
            pack_row(&dk[..dim], LN_2, self.dk.row_mut(i), dim);
            pack_row(&dv[..dim], 1.0, self.dv.row_mut(i), dim);
        }
    }
}
