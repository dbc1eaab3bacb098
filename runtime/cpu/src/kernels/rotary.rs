//! Rotary position embedding in the half-split form: with angle = position * base^(-2i/dim),
//! (x_i, x_{i+dim/2}) turns by the angle.  The inverse turns back and is also the gradient.
//!
//! Angles are taken in float64: a float32 angle at position 10^6 would be off by 0.06.

use super::vmath::{lane, simd_fn};
use crate::par::{self, SharedMut};
use crate::{Mat, MatMut};

simd_fn! {
    /// One row: every head of `dim` columns turns by the same angles; cs = cosines then sines, dim/2 each.
    fn row<'a, S>(x: &'a [f32], cs: &'a [f32], sign: f32, y: &'a mut [f32]) {
        let half = cs.len() / 2;
        let (cos, sin) = cs.split_at(half);
        for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
            let ((a, b), (ya, yb)) = (x.split_at(half), y.split_at_mut(half));
            for i in 0..half {
                let s = sign * sin[i];
                ya[i] = lane::fma::<S>(a[i], cos[i], -(b[i] * s));
                yb[i] = lane::fma::<S>(b[i], cos[i], a[i] * s);
            }
        }
    }
}

fn table(position: i64, dim: usize, base: f64, cs: &mut [f32]) {
    let half = dim / 2;
    for i in 0..half {
        let (sin, cos) = (position as f64 * base.powf(-2.0 * i as f64 / dim as f64)).sin_cos();
        cs[i] = cos as f32;
        cs[half + i] = sin as f32;
    }
}

/// Floats of scratch that [`apply`] takes on the calling thread for positions that all sequences share.
pub fn scratch(t: usize, dim: usize) -> usize {
    par::rounded(t * dim)
}

/// Rotates every head of x (outer * t, heads * dim) into y.  Row r has position start + r % t, where `start` is empty
/// (zero), one number, or one per outer index.  `inverse` turns the other way.
#[allow(clippy::too_many_arguments)]
pub fn apply(x: Mat, t: usize, dim: usize, base: f32, start: &[i32], inverse: bool, y: MatMut) {
    let (rows, cols) = (x.rows(), x.cols());
    assert!(y.rows() == rows && y.cols() == cols, "BUG: rotary of {rows}x{cols} into {}x{}", y.rows(), y.cols());
    assert!(dim > 0 && dim.is_multiple_of(2) && cols.is_multiple_of(dim), "BUG: rotary dim {dim} of {cols} columns");
    if rows == 0 {
        return;
    }
    assert!(t > 0 && rows.is_multiple_of(t), "BUG: {rows} rows are not sequences of {t}");
    assert!(start.len() <= 1 || start.len() == rows / t, "BUG: {} starts for {} sequences", start.len(), rows / t);
    let sign = if inverse { -1.0 } else { 1.0 };
    let shared_start = start.len() <= 1;
    let entries = if shared_start { t } else { rows };
    let begin = |r: usize| match start {
        [] => 0,
        [s] => *s as i64,
        all => all[r / t] as i64,
    };
    par::with_scratch(entries * dim, |tables| {
        let shared = SharedMut::new(tables);
        // A sine, cosine and power in float64 cost about 100 operations a pair.
        par::for_blocks(entries, par::rows_per_task(50 * dim), 50 * dim * entries, |_, s, e| {
            for r in s..e {
                // SAFETY: one entry per row.
                table(begin(r) + (r % t) as i64, dim, base as f64, unsafe { shared.slice(r * dim, dim) });
            }
        });
        let tables = &*tables;
        par::for_blocks(rows, par::rows_per_task(4 * cols), 4 * rows * cols, |_, s, e| {
            for r in s..e {
                let entry = if shared_start { r % t } else { r };
                // SAFETY: row r belongs to this task.
                row(x.row(r), &tables[entry * dim..][..dim], sign, unsafe { y.row_unchecked(r) });
            }
        });
    });
}
