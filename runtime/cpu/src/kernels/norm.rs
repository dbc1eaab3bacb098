//! Root-mean-square norms: y = w * u / sqrt(mean(u^2) + eps), with u = x or u = x * silu(z) (Mamba-2, arXiv 2405.21060).
//!
//! The norm runs over groups of `weight.len()` columns; `cols` must be a multiple of it, so that one call norms every
//! head of a row.  Backward, with xhat = u r, g = w dy: du = r (g - xhat mean(g xhat)), dw = sum over groups dy xhat.
//! dw is summed per block of rows, then over blocks in order.

use super::vmath::{fold, lane, simd_fn};
use crate::par::{self, SharedMut};
use crate::{Mat, MatMut};

/// Scalar operations of `rms_norm_backward` per element.
const BACKWARD_COST: usize = 10;
/// As [`BACKWARD_COST`], with a gate.
const GATED_BACKWARD_COST: usize = 40;
/// Most partial weight gradients of one call.
const MAX_PARTS: usize = 64;

fn check(x: &Mat, width: usize, others: &[(usize, usize)]) {
    assert!(width > 0 && x.cols().is_multiple_of(width), "BUG: norm over {width} of {} columns", x.cols());
    for &(r, c) in others {
        assert!((r, c) == (x.rows(), x.cols()), "BUG: norm of {}x{} with {r}x{c}", x.rows(), x.cols());
    }
}

simd_fn! {
    fn row_forward<'a, S>(x: &'a [f32], weight: &'a [f32], eps: f32, y: &'a mut [f32]) {
        let width = weight.len();
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let r = 1.0 / (fold::dot::<S>(x, x) / width as f32 + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = w * (x * r);
            }
        }
    }
}

simd_fn! {
    /// du of one row; `g` holds at least a group; dw is added to.
    fn row_backward<'a, S>(
        u: &'a [f32], weight: &'a [f32], eps: f32, dy: &'a [f32], g: &'a mut [f32], du: &'a mut [f32], dw: &'a mut [f32],
    ) {
        let width = weight.len();
        let g = &mut g[..width];
        let groups = u.chunks_exact(width).zip(dy.chunks_exact(width)).zip(du.chunks_exact_mut(width));
        for ((u, dy), du) in groups {
            let r = 1.0 / (fold::dot::<S>(u, u) / width as f32 + eps).sqrt();
            for ((g, dy), w) in g.iter_mut().zip(dy).zip(weight) {
                *g = dy * w;
            }
            let mean = fold::dot::<S>(g, u) * r / width as f32;
            for ((du, g), u) in du.iter_mut().zip(&*g).zip(u) {
                *du = r * (g - u * (r * mean));
            }
            for ((dw, dy), u) in dw.iter_mut().zip(dy).zip(u) {
                *dw += dy * (u * r);
            }
        }
    }
}

simd_fn! {
    fn gate<'a, S>(x: &'a [f32], z: &'a [f32], u: &'a mut [f32]) {
        for ((u, x), &z) in u.iter_mut().zip(x).zip(z) {
            *u = x * lane::silu::<S>(z);
        }
    }
}

simd_fn! {
    /// From u = x silu(z): dx = du silu(z), dz = du x silu'(z).
    fn ungate<'a, S>(x: &'a [f32], z: &'a [f32], du: &'a [f32], dx: &'a mut [f32], dz: &'a mut [f32]) {
        let n = x.len();
        let (z, du, dx, dz) = (&z[..n], &du[..n], &mut dx[..n], &mut dz[..n]);
        for i in 0..n {
            let (silu, slope) = lane::silu_with_derivative::<S>(z[i]);
            dx[i] = du[i] * silu;
            dz[i] = du[i] * x[i] * slope;
        }
    }
}

/// y = weight * x / sqrt(mean(x^2) + eps).  x, y (rows, k * weight.len()).
pub fn rms_norm(x: Mat, weight: &[f32], eps: f32, y: MatMut) {
    check(&x, weight.len(), &[(y.rows(), y.cols())]);
    let cost = 4 * x.cols();
    par::for_blocks(x.rows(), par::rows_per_task(cost), x.rows() * cost, |_, start, end| {
        for i in start..end {
            // SAFETY: row i belongs to this task.
            row_forward(x.row(i), weight, eps, unsafe { y.row_unchecked(i) });
        }
    });
}

simd_fn! {
    fn add<'a, S>(x: &'a [f32], y: &'a mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }
}

/// Floats of scratch that [`rms_norm_backward`] takes on the calling thread.
pub fn rms_norm_backward_scratch(rows: usize, cols: usize, width: usize) -> usize {
    par::rounded(rows.div_ceil(block_rows(rows, BACKWARD_COST * cols)) * width)
}

/// Gradients of `rms_norm`: dx (rows, cols), to which `base` is added, and dw (weight.len()).
pub fn rms_norm_backward(x: Mat, weight: &[f32], eps: f32, dy: Mat, base: Option<Mat>, dx: MatMut, dw: &mut [f32]) {
    check(&x, weight.len(), &[(dy.rows(), dy.cols()), (dx.rows(), dx.cols())]);
    if let Some(base) = &base {
        check(&x, weight.len(), &[(base.rows(), base.cols())]);
    }
    blocks_with_dw(x.rows(), BACKWARD_COST * x.cols(), weight.len(), dw, |start, end, dw| {
        par::with_scratch(weight.len(), |g| {
            for i in start..end {
                // SAFETY: row i belongs to this task.
                let dx = unsafe { dx.row_unchecked(i) };
                row_backward(x.row(i), weight, eps, dy.row(i), g, dx, dw);
                if let Some(base) = &base {
                    add(base.row(i), dx);
                }
            }
        });
    });
}

/// y = weight * u / sqrt(mean(u^2) + eps) with u = x * silu(z): the gate comes first.
pub fn gated_rms_norm(x: Mat, z: Mat, weight: &[f32], eps: f32, y: MatMut) {
    check(&x, weight.len(), &[(z.rows(), z.cols()), (y.rows(), y.cols())]);
    let cost = 20 * x.cols();
    par::for_blocks(x.rows(), par::rows_per_task(cost), x.rows() * cost, |_, start, end| {
        par::with_scratch(x.cols(), |u| {
            for i in start..end {
                gate(x.row(i), z.row(i), u);
                // SAFETY: row i belongs to this task.
                row_forward(u, weight, eps, unsafe { y.row_unchecked(i) });
            }
        });
    });
}

/// Floats of scratch that [`gated_rms_norm_backward`] takes on the calling thread.
pub fn gated_rms_norm_backward_scratch(rows: usize, cols: usize, width: usize) -> usize {
    par::rounded(rows.div_ceil(block_rows(rows, GATED_BACKWARD_COST * cols)) * width)
}

/// Gradients of `gated_rms_norm`: dx, dz (rows, cols), dw (weight.len()).
#[allow(clippy::too_many_arguments)]
pub fn gated_rms_norm_backward(
    x: Mat,
    z: Mat,
    weight: &[f32],
    eps: f32,
    dy: Mat,
    dx: MatMut,
    dz: MatMut,
    dw: &mut [f32],
) {
    let dims = [(z.rows(), z.cols()), (dy.rows(), dy.cols()), (dx.rows(), dx.cols()), (dz.rows(), dz.cols())];
    check(&x, weight.len(), &dims);
    let cols = x.cols();
    blocks_with_dw(x.rows(), GATED_BACKWARD_COST * cols, weight.len(), dw, |start, end, dw| {
        par::with_scratch(2 * cols + weight.len(), |buf| {
            let (u, rest) = buf.split_at_mut(cols);
            let (du, g) = rest.split_at_mut(cols);
            for i in start..end {
                gate(x.row(i), z.row(i), u);
                row_backward(u, weight, eps, dy.row(i), g, du, dw);
                // SAFETY: row i belongs to this task.
                let (dx, dz) = unsafe { (dx.row_unchecked(i), dz.row_unchecked(i)) };
                ungate(x.row(i), z.row(i), du, dx, dz);
            }
        });
    });
}

/// Rows of a block with its own dw.
fn block_rows(rows: usize, cost: usize) -> usize {
    par::rows_per_task(cost).max(rows.div_ceil(MAX_PARTS)).max(1)
}

/// Runs `f(start, end, dw)` over blocks of rows, each with its own zeroed dw, and sums those in order.
fn blocks_with_dw(
    rows: usize,
    cost: usize,
    width: usize,
    dw: &mut [f32],
    f: impl Fn(usize, usize, &mut [f32]) + Sync + Send,
) {
    assert_eq!(dw.len(), width, "BUG: weight gradient of {} for {width}", dw.len());
    let block = block_rows(rows, cost);
    par::with_scratch(rows.div_ceil(block) * width, |partials| {
        let shared = SharedMut::new(partials);
        par::for_blocks(rows, block, rows * cost, |b, start, end| {
            // SAFETY: one partial per block.
            let dw = unsafe { shared.slice(b * width, width) };
            dw.fill(0.0);
            f(start, end, dw);
        });
        par::sum_partials(partials, dw);
    });
}
