//! Softmax cross-entropy per row: `loss = logsumexp(logits) - logits[label]`; label -100 is ignored (loss, gradient 0).

use super::vmath::{fold, lane, simd_fn};
use crate::par::{self, SharedMut};
use crate::{Mat, MatMut};

/// The label of rows that do not count.
pub const IGNORE: i32 = -100;

simd_fn! {
    fn logsumexp<'a, S>(x: &'a [f32]) -> f32 {
        let max = fold::max(x);
        // All -inf, or a +inf or NaN: the maximum is the answer, and max - max would be NaN.
        if !max.is_finite() {
            return max;
        }
        max + fold::sum_exp::<S>(x, max).ln()
    }
}

simd_fn! {
    fn row_backward<'a, S>(x: &'a [f32], lse: f32, scale: f32, dx: &'a mut [f32]) {
        for (d, x) in dx.iter_mut().zip(x) {
            *d = scale * lane::exp::<S>(x - lse);
        }
    }
}

/// The label of a row that counts.
pub(super) fn label(labels: &[i32], row: usize, vocab: usize) -> Option<usize> {
    let l = labels[row];
    assert!(l == IGNORE || (l >= 0 && (l as usize) < vocab), "BUG: label {l} outside a vocabulary of {vocab}");
    (l != IGNORE).then_some(l as usize)
}

/// logits (rows, vocab), labels (rows) -> loss and logsumexp per row (rows each).
pub fn forward(logits: Mat, labels: &[i32], loss: &mut [f32], lse: &mut [f32]) {
    let (rows, vocab) = (logits.rows(), logits.cols());
    assert!(labels.len() == rows && loss.len() == rows && lse.len() == rows, "BUG: cross_entropy of {rows} rows");
    let (loss, lse) = (SharedMut::new(loss), SharedMut::new(lse));
    let cost = 12 * vocab;
    par::for_blocks(rows, par::rows_per_task(cost), rows * cost, |_, start, end| {
        // SAFETY: rows start..end belong to this task.
        let (loss, lse) = unsafe { (loss.slice(start, end - start), lse.slice(start, end - start)) };
        for i in start..end {
            let row = logits.row(i);
            let l = logsumexp(row);
            lse[i - start] = l;
            loss[i - start] = label(labels, i, vocab).map_or(0.0, |t| l - row[t]);
        }
    });
}

/// dlogits = dloss * (softmax(logits) - onehot(label)); `lse` from `forward`.
pub fn backward(logits: Mat, labels: &[i32], lse: &[f32], dloss: &[f32], dlogits: MatMut) {
    let (rows, vocab) = (logits.rows(), logits.cols());
    assert!(labels.len() == rows && dloss.len() == rows && lse.len() == rows, "BUG: cross_entropy of {rows} rows");
    assert!(dlogits.rows() == rows && dlogits.cols() == vocab, "BUG: gradient of {rows}x{vocab} logits");
    let cost = 12 * vocab;
    par::for_blocks(rows, par::rows_per_task(cost), rows * cost, |_, start, end| {
        for i in start..end {
            // SAFETY: row i belongs to this task.
            let out = unsafe { dlogits.row_unchecked(i) };
            match label(labels, i, vocab) {
                None => out.fill(0.0),
                Some(t) => {
                    row_backward(logits.row(i), lse[i], dloss[i], out);
                    out[t] -= dloss[i];
                }
            }
        }
    });
}
