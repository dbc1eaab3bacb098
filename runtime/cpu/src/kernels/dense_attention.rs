//! Softmax attention within sequences: the chunk encoder's bidirectional attention, causal attention, and a range of keys
//! per token: a window, its own chunk, complete units.
//!
//! `y_t,head = softmax(q_t · kᵀ * scale) v`, head → kv head: `head / (heads / kv_heads)`.
//!
//! One task per (sequence, kv head): the keys that a tile of rows sees are one block of `attn_micro`, so the softmax
//! needs no rescaling, and the backward recomputes it and sums dK and dV inside the task in token order.  Where every tile
//! may see every key, they are packed once.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::attn_micro::{
    Attend, AttendBackward, Block, LN_2, LOG2_E, Upstream, carve, carved, pack_row, pack_rows, pack_transposed, padded,
};
use crate::par::{SharedMut, with_scratch};
use crate::{Mat, MatMut, simd};
use std::ops::Range;

/// Query rows (token, head) of one tile.
const ROWS: usize = 48;

/// Shapes of a batch of sequences: `q` and `y` are (batch·t x heads·dim), `k` and `v` (batch·keys x kv_heads·dim).
#[derive(Clone, Copy, Debug)]
pub struct DenseAttention {
    pub batch: usize,
    /// Tokens per sequence.
    pub t: usize,
    /// Keys per sequence: as many as tokens, or with `unit` whole units, or more of which tokens see those up to themselves.
    pub keys: usize,
    /// Where the first token stands among the keys.
    pub start: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub scale: f32,
    /// Whether token i sees keys 0..=i only.
    pub causal: bool,
    /// A token sees so many of the last keys; 0: no bound.
    pub window: usize,
    /// A token sees keys of its own chunk of so many; 0: no bound.
    pub local: usize,
    /// Key `c` is seen from token `(c + 1)·unit` on; 0: keys are tokens.
    pub unit: usize,
}

impl DenseAttention {
    /// Attention; `y` is overwritten, and `lse`, the natural log-sum-exps (batch, t, heads), if wanted.
    pub fn forward(&self, q: Mat, k: Mat, v: Mat, y: MatMut, lse: Option<&mut [f32]>) {
        self.check(q, k, v);
        assert!(y.rows() == q.rows() && y.cols() == q.cols(), "BUG: y");
        assert!(lse.as_ref().is_none_or(|l| l.len() == self.batch * self.t * self.heads), "BUG: lse");
        let lse = lse.map(SharedMut::new);
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
                    lse,
                    place: (seq, head),
                })
            })
        });
    }

    /// Gradients of all three inputs from `dy` and the gradient at `lse` if it was wanted; all are overwritten.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(&self, q: Mat, k: Mat, v: Mat, dy: Mat, dlse: Option<&[f32]>, dq: MatMut, dk: MatMut, dv: MatMut) {
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
                    dlse,
                    place: (seq, head),
                })
            })
        });
    }

    fn check(&self, q: Mat, k: Mat, v: Mat) {
        let (rows, keys, width) = (self.batch * self.t, self.batch * self.keys, self.kv_heads * self.dim);
        let fits = self.keys == self.t || self.causal && self.keys >= self.start + self.t;
        assert!(self.unit > 0 || fits, "BUG: {} keys", self.keys);
        assert!(self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads), "BUG: {} heads", self.heads);
        assert!(q.rows() == rows && q.cols() == self.heads * self.dim, "BUG: q");
        assert!(k.rows() == keys && k.cols() == width && v.rows() == keys && v.cols() == width, "BUG: k, v");
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

    /// Keys that token `t` sees.
    fn visible(&self, t: usize) -> Range<usize> {
        let t = self.start + t;
        if let Some(units) = t.checked_div(self.unit) {
            return 0..self.keys.min(units);
        }
        let end = if self.causal { t + 1 } else { self.keys };
        let window = if self.window > 0 { (t + 1).saturating_sub(self.window) } else { 0 };
        let local = t.checked_div(self.local).unwrap_or(0) * self.local;
        window.max(local)..end
    }

    /// Whether a tile sees fewer keys than there are, so that it packs its own.
    fn is_ranged(&self) -> bool {
        self.window > 0 || self.local > 0 || (self.unit == 0 && self.keys != self.t)
    }

    /// The most keys that a tile sees.
    fn block(&self) -> usize {
        let bound = |n: usize| if n > 0 { n + self.tile() } else { self.keys };
        self.keys.min(bound(self.window)).min(bound(self.local))
    }

    /// The keys of the tile of `tokens` tokens from `first` on.
    fn tile_keys(&self, first: usize, tokens: usize) -> Range<usize> {
        if self.is_ranged() { self.visible(first).start..self.visible(first + tokens - 1).end } else { 0..self.keys }
    }

    /// Kᵀ, V; queries, exponentials, outputs, denominators and maxima of a tile.
    fn forward_sizes(&self) -> [usize; 7] {
        let keys = self.block();
        let (wide, width, rows) = (padded(self.dim), padded(keys), self.tile() * self.group());
        [self.dim * width, keys * wide, rows * wide, rows * width, rows * wide, rows, rows]
    }

    /// Kᵀ, Vᵀ, K, dK, dV; of a tile queries, dy, dq, exponentials, their gradient, dots, maxima and what comes from above.
    fn backward_sizes(&self) -> [usize; 13] {
        let [turned, keys, queries, square, _, rows, _] = self.forward_sizes();
        [turned, turned, keys, keys, keys, queries, queries, queries, square, square, rows, rows, rows]
    }

    /// Where the log-sum-exp of a task's row is: token, then head of the group.
    fn lse_at(&self, (seq, head): (usize, usize), token: usize) -> usize {
        (seq * self.t + token) * self.heads + head * self.group()
    }

    /// The rows of a sequence and the columns of a kv head's group.
    fn queries<'a>(&self, x: Mat<'a>, seq: usize, head: usize) -> Mat<'a> {
        let width = self.group() * self.dim;
        x.block(seq * self.t, self.t, head * width, width)
    }

    fn keys<'a>(&self, x: Mat<'a>, seq: usize, head: usize) -> Mat<'a> {
        x.block(seq * self.keys, self.keys, head * self.dim, self.dim)
    }

    fn queries_mut<'a>(&self, x: &'a MatMut, seq: usize, head: usize) -> MatMut<'a> {
        let width = self.group() * self.dim;
        // SAFETY: tasks differ in sequence or head, so their blocks are disjoint.
        unsafe { x.block_unchecked(seq * self.t, self.t, head * width, width) }
    }

    fn keys_mut<'a>(&self, x: &'a MatMut, seq: usize, head: usize) -> MatMut<'a> {
        // SAFETY: as above.
        unsafe { x.block_unchecked(seq * self.keys, self.keys, head * self.dim, self.dim) }
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
    lse: Option<SharedMut<'a>>,
    place: (usize, usize),
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let shape = self.shape;
        let (t, dim, group) = (shape.t, shape.dim, shape.group());
        let wide = padded(dim);
        let [keys_t, values, qs, s, o, sums, tops] = carve(self.scratch, shape.forward_sizes());
        for first in (0..t).step_by(shape.tile()) {
            let tokens = shape.tile().min(t - first);
            let range = shape.tile_keys(first, tokens);
            let keys = range.len();
            if first == 0 || shape.is_ranged() {
                pack_transposed(self.k.block(range.start, keys, 0, dim), padded(keys), keys_t);
                pack_rows(self.v.block(range.start, keys, 0, dim), 1.0, values);
            }
            let block = Block { keys, dim, zeros: 0.0, keys_t, rows: values, values_t: &[] };
            gather(self.q, first, tokens, dim, shape.scale * LOG2_E, qs);
            let visible = |row: usize| {
                let v = shape.visible(first + row / group);
                v.start - range.start..v.end - range.start
            };
            simd.vectorize(Attend { block, rows: tokens * group, visible: &visible, q: qs, s, o, sums, tops });
            let mut lines = o.chunks_exact(wide).zip(&*sums);
            for token in first..first + tokens {
                for (y, (o, sum)) in self.y.row_mut(token).chunks_exact_mut(dim).zip(&mut lines) {
                    pack_row(&o[..dim], 1.0 / sum, y, dim);
                }
            }
            let Some(lse) = self.lse else { continue };
            for i in 0..tokens {
                // SAFETY: every task has its own sequence and heads.
                let out = unsafe { lse.slice(shape.lse_at(self.place, first + i), group) };
                for (g, y) in out.iter_mut().enumerate() {
                    *y = (tops[i * group + g] + sums[i * group + g].log2()) * LN_2;
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
    dlse: Option<&'a [f32]>,
    place: (usize, usize),
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let shape = self.shape;
        let (t, dim, group) = (shape.t, shape.dim, shape.group());
        let wide = padded(dim);
        let [keys_t, values_t, keys, dks, dvs, qs, dys, dqs, s, ds, dots, tops, above] =
            carve(self.scratch, shape.backward_sizes());
        above.fill(if self.dlse.is_some() { 0.0 } else { 1.0 });
        if shape.is_ranged() {
            for row in 0..shape.keys {
                self.dk.row_mut(row).fill(0.0);
                self.dv.row_mut(row).fill(0.0);
            }
        }
        for first in (0..t).step_by(shape.tile()) {
            let tokens = shape.tile().min(t - first);
            let range = shape.tile_keys(first, tokens);
            let fresh = first == 0 || shape.is_ranged();
            let n = range.len();
            if fresh {
                let (k, v) = (self.k.block(range.start, n, 0, dim), self.v.block(range.start, n, 0, dim));
                pack_transposed(k, padded(n), keys_t);
                pack_transposed(v, padded(n), values_t);
                pack_rows(k, 1.0, keys);
            }
            let block = Block { keys: n, dim, zeros: 0.0, keys_t, rows: keys, values_t };
            gather(self.q, first, tokens, dim, shape.scale * LOG2_E, qs);
            gather(self.dy, first, tokens, dim, 1.0, dys);
            let visible = |row: usize| {
                let v = shape.visible(first + row / group);
                v.start - range.start..v.end - range.start
            };
            if let Some(dlse) = self.dlse {
                for (i, out) in above.chunks_exact_mut(group).take(tokens).enumerate() {
                    out.copy_from_slice(&dlse[shape.lse_at(self.place, first + i)..][..group]);
                }
            }
            let upstream = if self.dlse.is_some() { Upstream::LogSumExp(above) } else { Upstream::Weighted(above) };
            simd.vectorize(AttendBackward {
                block,
                rows: tokens * group,
                visible: &visible,
                upstream,
                q: qs,
                dy: dys,
                s,
                ds,
                dots,
                tops,
                dq: dqs,
                dk: dks,
                dv: dvs,
                first: fresh,
            });
            let mut lines = dqs.chunks_exact(wide);
            for token in first..first + tokens {
                for (dq, line) in self.dq.row_mut(token).chunks_exact_mut(dim).zip(&mut lines) {
                    pack_row(&line[..dim], shape.scale, dq, dim);
                }
            }
            if shape.is_ranged() {
                for (i, (dk, dv)) in dks.chunks_exact(wide).zip(dvs.chunks_exact(wide)).take(n).enumerate() {
                    let add = |out: &mut [f32], line: &[f32], factor: f32| {
                        out.iter_mut().zip(line).for_each(|(y, x)| *y += factor * x)
                    };
                    add(self.dk.row_mut(range.start + i), dk, LN_2);
                    add(self.dv.row_mut(range.start + i), dv, 1.0);
                }
            }
        }
        if shape.is_ranged() {
            return;
        }
        for (i, (dk, dv)) in dks.chunks_exact(wide).zip(dvs.chunks_exact(wide)).take(shape.keys).enumerate() {
            pack_row(&dk[..dim], LN_2, self.dk.row_mut(i), dim);
            pack_row(&dv[..dim], 1.0, self.dv.row_mut(i), dim);
        }
    }
}
