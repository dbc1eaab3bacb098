//! Cross-entropy of a linear layer's logits `z = h wᵀ`, without ever holding them all.
//!
//! Rows are taken in blocks, and for a block of rows the vocabulary in blocks whose logits lie in a cache while they are
//! used.  Logits are made transposed, (vocab, rows): so the weight, which is large, is read in place, and only the few
//! rows of `h` are packed.
//!
//! ```text
//! forward    per block of the vocabulary: z, its maximum and sum of exponentials per row; joined in order:
//!            lse = ln Σ exp z,  loss = lse - z[label]
//! backward   the same with exp(z - max) kept for the whole vocabulary; then per block of the vocabulary
//!            dz = dloss (exp(z - lse) - onehot),  dh += dzᵀ w,  dw += dz h
//! ```
//! So the backward makes the logits once, and the losses fall out of it.
//! Invariants: blocks depend on shapes alone and sums run in their order; losses have the same bits in both directions;
//! scratch does not depend on the number of rows: at most `HELD` floats of logits (`LEAST_ROWS · vocab` if that is
//! more), see [`LinearCrossEntropy::forward_scratch`].

use super::attn_micro::{carve, carved};
use super::cross_entropy::{IGNORE, label};
use super::gemm::{self, matmul};
use super::vmath::{lane, simd_fn};
use crate::par::{self, SharedMut};
use crate::{Mat, MatMut};

/// Floats of logits that the backward holds for a block of rows.
const HELD: usize = 1 << 24;
/// Fewer rows would read the weight too often.
const LEAST_ROWS: usize = 64;
const MOST_ROWS: usize = 1024;
/// Floats of logits that are made, and used, at a time.
const BLOCK: usize = 1 << 20;
/// Floats of logits of a task, and its share of the vocabulary at most.
const TASK: usize = 1 << 16;
const TASK_VOCAB: usize = 256;

/// Sizes: h (rows, dim), w (vocab, dim).
#[derive(Clone, Copy, Debug)]
pub struct LinearCrossEntropy {
    pub rows: usize,
    pub vocab: usize,
    pub dim: usize,
}

simd_fn! {
    /// z (.., r) becomes exp(z - max) with each column's maximum; also the columns' sums.
    fn exponentials<'a, S>(z: &'a mut [f32], max: &'a mut [f32], sum: &'a mut [f32]) {
        let r = max.len();
        max.fill(f32::NEG_INFINITY);
        for row in z.chunks_exact(r) {
            for (m, &x) in max.iter_mut().zip(row) {
                *m = if x > *m { x } else { *m };
            }
        }
        sum.fill(0.0);
        for row in z.chunks_exact_mut(r) {
            for ((x, s), &m) in row.iter_mut().zip(sum.iter_mut()).zip(max.iter()) {
                // All -inf: 0 each, not NaN.
                let m = if m == f32::NEG_INFINITY { 0.0 } else { m };
                let e = lane::exp::<S>(*x - m);
                *x = e;
                *s += e;
            }
        }
    }
}

simd_fn! {
    /// The columns of z (.., r) times their factors; 0 where a factor is 0, whatever z is.
    fn scale_columns<'a, S>(z: &'a mut [f32], factor: &'a [f32]) {
        for row in z.chunks_exact_mut(factor.len()) {
            for (x, &f) in row.iter_mut().zip(factor) {
                let y = *x * f;
                *x = if f == 0.0 { 0.0 } else { y };
            }
        }
    }
}

simd_fn! {
    /// factor = scale exp(max - top).
    fn factors<'a, S>(max: &'a [f32], top: &'a [f32], scale: &'a [f32], factor: &'a mut [f32]) {
        for (((f, &m), &t), &s) in factor.iter_mut().zip(max).zip(top).zip(scale) {
            let y = s * lane::exp::<S>(m - t);
            *f = if s == 0.0 { 0.0 } else { y };
        }
    }
}

/// A block of rows at work.
struct Strip<'a> {
    h: Mat<'a>,
    w: Mat<'a>,
    labels: &'a [i32],
    /// Rows of the vocabulary per task.
    task: usize,
    /// Per task of the vocabulary: maxima and sums, (2, rows).
    partials: &'a mut [f32],
    /// The logit of each row's label.
    picked: &'a mut [f32],
    /// The largest logit of each row, and the sum of exp(z - top).
    top: &'a mut [f32],
    sum: &'a mut [f32],
}

impl Strip<'_> {
    fn rows(&self) -> usize {
        self.h.rows()
    }

    /// exp(z - max) of logits `first..` into z (.., rows), with maxima, sums and the labels' logits.
    fn exponentials(&mut self, first: usize, z: &mut [f32]) {
        let (r, task, labels) = (self.rows(), self.task, self.labels);
        let count = z.len() / r;
        let out = MatMut::new(z, count, r);
        matmul(self.w.block(first, count, 0, self.w.cols()), false, self.h, true, out, false);
        let at = first / task * 2 * r;
        let partials = SharedMut::new(&mut self.partials[at..]);
        let (picked, z) = (SharedMut::new(self.picked), SharedMut::new(z));
        par::for_blocks(count, task, 12 * count * r, |i, start, end| {
            // SAFETY: a task has its own rows of z and its own partials; a label lies in one task.
            unsafe {
                let z = z.slice(start * r, (end - start) * r);
                for (j, &l) in labels.iter().enumerate() {
                    if l != IGNORE && (first + start..first + end).contains(&(l as usize)) {
                        picked.slice(j, 1)[0] = z[(l as usize - first - start) * r + j];
                    }
                }
                let (max, sum) = partials.slice(i * 2 * r, 2 * r).split_at_mut(r);
                exponentials(z, max, sum);
            }
        });
    }

    /// Joins the tasks' maxima and sums, in order, to the losses.
    fn losses(&mut self, loss: &mut [f32]) {
        let r = self.rows();
        for j in 0..r {
            let parts = || self.partials.chunks_exact(2 * r).map(|p| (p[j], p[r + j]));
            let top = parts().fold(f32::NEG_INFINITY, |t, (m, _)| if m > t { m } else { t });
            let sum: f64 = parts().map(|(m, s)| f64::from(s) * f64::from(m - top).exp()).sum();
            (self.top[j], self.sum[j]) = (top, sum as f32);
            let used = self.labels[j] != IGNORE;
            loss[j] = if used { (f64::from(top) + sum.ln() - f64::from(self.picked[j])) as f32 } else { 0.0 };
        }
    }

    /// Turns the exponentials of `first..` into dz, with `scale` = dloss / sum.
    fn gradient(&self, first: usize, z: &mut [f32], dloss: &[f32], scale: &[f32]) {
        let (r, task) = (self.rows(), self.task);
        let count = z.len() / r;
        let z = SharedMut::new(z);
        par::for_blocks(count, task, 2 * count * r, |i, start, end| {
            // SAFETY: a task has its own rows of z.
            let z = unsafe { z.slice(start * r, (end - start) * r) };
            let max = &self.partials[(first / task + i) * 2 * r..][..r];
            par::with_scratch(r, |factor| {
                factors(max, self.top, scale, factor);
                scale_columns(z, factor);
            });
            for (j, &l) in self.labels.iter().enumerate() {
                if l != IGNORE && (first + start..first + end).contains(&(l as usize)) {
                    z[(l as usize - first - start) * r + j] -= dloss[j];
                }
            }
        });
    }
}

impl LinearCrossEntropy {
    /// Rows of a block: as many as [`HELD`] allows, so that the weight is read rarely.
    fn row_block(&self) -> usize {
        ((HELD / self.vocab.max(1)).clamp(LEAST_ROWS, MOST_ROWS) / 16 * 16).min(self.rows.max(1))
    }
    fn task(&self) -> usize {
        (TASK / self.row_block()).clamp(1, TASK_VOCAB)
    }
    /// Rows of the vocabulary at a time: whole tasks.
    fn vocab_block(&self) -> usize {
        (BLOCK / (self.row_block() * self.task())).max(1) * self.task()
    }
    /// Floats of logits held, partials, picked, top, sum, scale.
    fn sizes(&self, vocab: usize) -> [usize; 6] {
        let r = self.row_block();
        [vocab * r, 2 * r * self.vocab.div_ceil(self.task()), r, r, r, r]
    }

    /// Floats of scratch on the calling thread.
    pub fn forward_scratch(&self) -> usize {
        let vocab = self.vocab_block().min(self.vocab);
        carved(&self.sizes(vocab)) + self.product_scratch(|v, r| gemm::scratch(v, r, self.dim, false, true))
    }

    /// Floats of scratch on the calling thread.
    pub fn backward_scratch(&self) -> usize {
        let products = self.product_scratch(|v, r| {
            let logits = gemm::scratch(v, r, self.dim, false, true);
            let dw = gemm::scratch(v, self.dim, r, false, false);
            logits.max(dw).max(gemm::scratch(r, self.dim, v, true, false))
        });
        carved(&self.sizes(self.vocab)) + products
    }

    /// The most that `f(vocab, rows)` gives for whole blocks and for what is left at the end.
    fn product_scratch(&self, f: impl Fn(usize, usize) -> usize) -> usize {
        let ends = |len: usize, block: usize| [block.min(len), len % block];
        let rows = ends(self.rows, self.row_block());
        let vocab = ends(self.vocab, self.vocab_block());
        vocab.iter().flat_map(|&v| rows.iter().map(move |&r| (v, r))).map(|(v, r)| f(v, r)).max().unwrap_or(0)
    }

    fn check(&self, h: Mat, w: Mat, labels: &[i32], loss: &[f32]) {
        let &Self { rows, vocab, dim } = self;
        assert!(h.rows() == rows && h.cols() == dim && w.rows() == vocab && w.cols() == dim, "BUG: h or w of {self:?}");
        assert!(labels.len() == rows && loss.len() == rows, "BUG: labels or losses of {self:?}");
        assert!((0..rows).all(|i| label(labels, i, vocab).is_none_or(|l| l < vocab)), "BUG: labels of {self:?}");
    }

    /// Calls `f(strip, z, first row)` for every block of rows, with room for `held` rows of the vocabulary in z.
    fn strips(
        &self,
        h: Mat,
        w: Mat,
        labels: &[i32],
        held: usize,
        mut f: impl FnMut(Strip, &mut [f32], &mut [f32], usize),
    ) {
        let sizes = self.sizes(held);
        par::with_scratch(carved(&sizes), |scratch| {
            let [z, partials, picked, top, sum, scale] = carve(scratch, sizes);
            for first in (0..self.rows).step_by(self.row_block()) {
                let r = self.row_block().min(self.rows - first);
                let strip = Strip {
                    h: h.block(first, r, 0, self.dim),
                    w,
                    labels: &labels[first..first + r],
                    task: self.task(),
                    partials: &mut partials[..2 * r * self.vocab.div_ceil(self.task())],
                    picked: &mut picked[..r],
                    top: &mut top[..r],
                    sum: &mut sum[..r],
                };
                f(strip, z, &mut scale[..r], first);
            }
        });
    }

    /// The losses; rows labelled [`IGNORE`] give 0.
    pub fn forward(&self, h: Mat, w: Mat, labels: &[i32], loss: &mut [f32]) {
        self.check(h, w, labels, loss);
        let block = self.vocab_block();
        self.strips(h, w, labels, block.min(self.vocab), |mut strip, z, _, row| {
            let r = strip.rows();
            for first in (0..self.vocab).step_by(block) {
                strip.exponentials(first, &mut z[..block.min(self.vocab - first) * r]);
            }
            strip.losses(&mut loss[row..row + r]);
        });
    }

    /// The losses and, from their gradient `dloss`, those of `h` and `w`; all are overwritten.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(&self, h: Mat, w: Mat, labels: &[i32], dloss: &[f32], dh: MatMut, dw: MatMut, loss: &mut [f32]) {
        let &Self { rows, vocab, dim } = self;
        self.check(h, w, labels, loss);
        assert!(dh.rows() == rows && dh.cols() == dim && dloss.len() == rows, "BUG: dh or dloss of {self:?}");
        assert!(dw.rows() == vocab && dw.cols() == dim, "BUG: dw of {self:?}");
        if rows == 0 || vocab == 0 {
            // SAFETY: exclusive borrows.
            (0..rows).for_each(|i| unsafe { dh.row_unchecked(i) }.fill(0.0));
            (0..vocab).for_each(|i| unsafe { dw.row_unchecked(i) }.fill(0.0));
            loss.fill(0.0);
            return;
        }
        let block = self.vocab_block();
        self.strips(h, w, labels, vocab, |mut strip, z, scale, row| {
            let r = strip.rows();
            let part = |first: usize| first * r..(first + block.min(vocab - first)) * r;
            for first in (0..vocab).step_by(block) {
                strip.exponentials(first, &mut z[part(first)]);
            }
            strip.losses(&mut loss[row..row + r]);
            let dloss = &dloss[row..row + r];
            for (j, s) in scale.iter_mut().enumerate() {
                *s = if strip.labels[j] == IGNORE { 0.0 } else { dloss[j] / strip.sum[j] };
            }
            for first in (0..vocab).step_by(block) {
                let z = &mut z[part(first)];
                strip.gradient(first, z, dloss, scale);
                let count = z.len() / r;
                let z = Mat::new(z, count, r);
                // SAFETY: nothing else borrows these blocks.
                let (dw, dh) =
                    unsafe { (dw.block_unchecked(first, count, 0, dim), dh.block_unchecked(row, r, 0, dim)) };
                matmul(z, false, strip.h, false, dw, row > 0);
                matmul(z, true, w.block(first, count, 0, dim), false, dh, first > 0);
            }
        });
    }
}
