//! Sums and maxima over a middle axis: x seen as (outer, axis, inner) gives y (outer, inner).
//!
//! The axis is cut in blocks by shape; a block is reduced in float32 lanes, blocks are combined in order in float64.
//! A block of a contiguous axis (inner = 1) is 4096 elements in 64 lanes, so at most 64 additions before float64.

use super::vmath::{fold, simd_fn};
use crate::par::{self, SharedMut};

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Sum,
    Max,
}

/// y[o, i] = sum over a of x[o, a, i].
pub fn sum(x: &[f32], outer: usize, axis: usize, inner: usize, y: &mut [f32]) {
    reduce(Kind::Sum, x, outer, axis, inner, 1.0, y);
}

/// The sum of squares of x.
pub fn sum_squares(x: &[f32]) -> f64 {
    let block = block(1);
    par::with_scratch(x.len().div_ceil(block), |partials| {
        let shared = SharedMut::new(partials);
        par::for_blocks(x.len().div_ceil(block), par::rows_per_task(block), x.len(), |_, start, end| {
            for b in start..end {
                // SAFETY: one place per block.
                let out = unsafe { shared.slice(b, 1) };
                out[0] = squares(&x[b * block..x.len().min((b + 1) * block)]);
            }
        });
        partials.iter().map(|&v| v as f64).sum()
    })
}

/// y[o, i] = scale * sum over a of x[o, a, i]; scale = 1 / axis gives the mean.
pub fn sum_scaled(x: &[f32], outer: usize, axis: usize, inner: usize, scale: f32, y: &mut [f32]) {
    reduce(Kind::Sum, x, outer, axis, inner, scale, y);
}

/// y[o, i] = max over a of x[o, a, i]; -inf over an empty axis, NaN if any element is.
pub fn max(x: &[f32], outer: usize, axis: usize, inner: usize, y: &mut [f32]) {
    reduce(Kind::Max, x, outer, axis, inner, 1.0, y);
}

fn greater(a: f32, b: f32) -> f32 {
    if b <= a || a.is_nan() { a } else { b }
}

simd_fn! {
    fn fold_row<'a, S>(kind: Kind, x: &'a [f32]) -> f32 {
        match kind {
            Kind::Sum => fold::sum(x),
            Kind::Max => fold::max(x),
        }
    }
}

simd_fn! {
    fn squares<'a, S>(x: &'a [f32]) -> f32 {
        let mut lanes = [0.0f32; 64];
        for part in x.chunks(64) {
            for (l, v) in lanes.iter_mut().zip(part) {
                *l += v * v;
            }
        }
        let mut n = lanes.len();
        while n > 1 {
            n /= 2;
            for i in 0..n {
                lanes[i] += lanes[i + n];
            }
        }
        lanes[0]
    }
}

simd_fn! {
    /// Reduces rows of x (rows, stride), columns 0..acc.len(), into acc.
    fn fold_columns<'a, S>(kind: Kind, x: &'a [f32], stride: usize, acc: &'a mut [f32]) {
        let n = acc.len();
        match kind {
            Kind::Sum => {
                acc.fill(0.0);
                for row in x.chunks(stride) {
                    for (a, v) in acc.iter_mut().zip(&row[..n]) {
                        *a += v;
                    }
                }
            }
            Kind::Max => {
                acc.fill(f32::NEG_INFINITY);
                for row in x.chunks(stride) {
                    for (a, &v) in acc.iter_mut().zip(&row[..n]) {
                        *a = greater(*a, v);
                    }
                }
            }
        }
    }
}

/// Elements of the axis in a block.
fn block(inner: usize) -> usize {
    if inner == 1 { 4096 } else { 128 }
}

/// Floats of scratch that a reduction takes on the calling thread.
pub fn scratch(outer: usize, axis: usize, inner: usize) -> usize {
    par::rounded(axis.div_ceil(block(inner)) * outer * inner)
}

fn reduce(kind: Kind, x: &[f32], outer: usize, axis: usize, inner: usize, scale: f32, y: &mut [f32]) {
    assert!(
        x.len() == outer * axis * inner && y.len() == outer * inner,
        "BUG: reduce ({outer}, {axis}, {inner}) over {} elements into {}",
        x.len(),
        y.len()
    );
    if axis == 0 || y.is_empty() {
        y.fill(if kind == Kind::Sum { 0.0 } else { f32::NEG_INFINITY });
        return;
    }
    let block = block(inner);
    let blocks = axis.div_ceil(block);
    let width = inner.min(512); // columns a task keeps in L1
    let col_blocks = inner.div_ceil(width);
    par::with_scratch(blocks * outer * inner, |partials| {
        // partials (outer, blocks, inner); small rows are grouped so that a task is worth starting.
        let shared = SharedMut::new(partials);
        let items = outer * blocks * col_blocks;
        let cost = axis.min(block) * width;
        par::for_blocks(items, par::rows_per_task(cost), x.len(), |_, start, end| {
            for t in start..end {
                let (o, b, c) = (t / (blocks * col_blocks), t / col_blocks % blocks, t % col_blocks * width);
                let (a0, a1) = (b * block, ((b + 1) * block).min(axis));
                let n = width.min(inner - c);
                // SAFETY: one range per item.
                let out = unsafe { shared.slice((o * blocks + b) * inner + c, n) };
                let base = (o * axis + a0) * inner;
                if inner == 1 {
                    out[0] = fold_row(kind, &x[base..base + a1 - a0]);
                } else {
                    fold_columns(kind, &x[base + c..base + (a1 - a0 - 1) * inner + c + n], inner, out);
                }
            }
        });
        for (o, y) in y.chunks_exact_mut(inner).enumerate() {
            let parts = &partials[o * blocks * inner..(o + 1) * blocks * inner];
            for (i, y) in y.iter_mut().enumerate() {
                let column = parts[i..].iter().step_by(inner);
                *y = match kind {
                    Kind::Sum if blocks == 1 => parts[i] * scale,
                    Kind::Sum => (column.map(|&v| v as f64).sum::<f64>() * scale as f64) as f32,
                    Kind::Max => column.fold(f32::NEG_INFINITY, |a, &v| greater(a, v)),
                };
            }
        }
    });
}
