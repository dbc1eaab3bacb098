//! Axis permutation of contiguous arrays, by tiles that keep both sides' cache lines in use.
//!
//! Axes of length 1 are dropped and axes that stay neighbours are merged first, so what remains is either a copy of
//! runs or a batch of two-dimensional transposes.

use crate::par::{self, SharedMut};

/// Side of a tile of a two-dimensional transpose.
const TILE: usize = 32;

/// y = x permuted: y's axis i is x's axis `perm[i]`.  x has `shape`; x and y have the same number of elements.
pub fn permute<T: Copy + Send + Sync>(x: &[T], shape: &[usize], perm: &[usize], y: &mut [T]) {
    let len: usize = shape.iter().product();
    assert!(x.len() == len && y.len() == len && perm.len() == shape.len(), "BUG: permute {shape:?} by {perm:?}");
    let mut seen = vec![false; perm.len()];
    for &p in perm {
        assert!(p < seen.len() && !std::mem::replace(&mut seen[p], true), "BUG: {perm:?} is no permutation");
    }
    if len == 0 {
        return;
    }
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    // Output axes as (length, stride in x), merged where the inner one continues the outer.
    let mut axes: Vec<(usize, usize)> = Vec::new();
    for &p in perm.iter().filter(|&&p| shape[p] > 1) {
        match axes.last_mut() {
            Some(last) if last.1 == strides[p] * shape[p] => *last = (last.0 * shape[p], strides[p]),
            _ => axes.push((shape[p], strides[p])),
        }
    }
    let Some((inner, stride)) = axes.pop() else {
        y[0] = x[0];
        return;
    };
    if stride == 1 {
        copy_runs(x, y, &axes, inner);
    } else {
        transpose(x, y, &axes, inner, stride);
    }
}

/// Offset in x of the `index`-th combination of `axes`.
fn offset(axes: &[(usize, usize)], mut index: usize) -> usize {
    let mut at = 0;
    for &(n, s) in axes.iter().rev() {
        at += index % n * s;
        index /= n;
    }
    at
}

fn copy_runs<T: Copy + Send + Sync>(x: &[T], y: &mut [T], axes: &[(usize, usize)], run: usize) {
    let (len, runs) = (y.len(), y.len() / run);
    let out = SharedMut::new(y);
    if axes.is_empty() {
        const BLOCK: usize = 1 << 15;
        par::for_blocks(len, BLOCK, len, |_, s, e| {
            // SAFETY: blocks are disjoint.
            unsafe { out.slice(s, e - s) }.copy_from_slice(&x[s..e]);
        });
        return;
    }
    par::for_blocks(runs, par::rows_per_task(run + 8), len, |_, s, e| {
        for i in s..e {
            let from = offset(axes, i);
            // SAFETY: one run per index.
            unsafe { out.slice(i * run, run) }.copy_from_slice(&x[from..from + run]);
        }
    });
}

/// Output's last axis has `inner` elements `stride` apart in x; some other axis is x's contiguous one.
fn transpose<T: Copy + Send + Sync>(x: &[T], y: &mut [T], axes: &[(usize, usize)], inner: usize, stride: usize) {
    let mut rest = axes.to_vec();
    let at = axes.iter().position(|a| a.1 == 1).expect("BUG: some axis of x is contiguous");
    let (rows, _) = rest.remove(at);
    // Strides in y of the remaining axes and of the contiguous one.
    let mut y_strides = vec![inner; axes.len()];
    for i in (1..axes.len()).rev() {
        y_strides[i - 1] = y_strides[i] * axes[i].0;
    }
    let row_stride = y_strides.remove(at);
    let y_axes: Vec<_> = rest.iter().zip(&y_strides).map(|(a, &s)| (a.0, s)).collect();
    let batch: usize = rest.iter().map(|a| a.0).product();
    let blocks = rows.div_ceil(TILE);
    let len = y.len();
    let out = SharedMut::new(y);
    let per_task = par::rows_per_task(rows.min(TILE) * inner);
    par::for_blocks(batch * blocks, per_task, len, |_, s, e| {
        for t in s..e {
            let (b, r0) = (t / blocks, t % blocks * TILE);
            let r1 = (r0 + TILE).min(rows);
            let (from, to) = (offset(&rest, b), offset(&y_axes, b));
            for c0 in (0..inner).step_by(TILE) {
                let c1 = (c0 + TILE).min(inner);
                for r in r0..r1 {
                    // SAFETY: row r of batch b belongs to this task.
                    let row = unsafe { out.slice(to + r * row_stride + c0, c1 - c0) };
                    for (v, c) in row.iter_mut().zip(c0..c1) {
                        *v = x[from + c * stride + r];
                    }
                }
            }
        }
    });
}

/// dst (cols x rows, row stride `dst_stride`) = transpose of src (rows x cols), on one thread, inside other kernels.
pub(crate) fn transpose_small(src: crate::Mat, dst: &mut [f32], dst_stride: usize) {
    const T: usize = 16;
    let (rows, cols) = (src.rows(), src.cols());
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(rows <= dst_stride && dst.len() >= (cols - 1) * dst_stride + rows, "BUG: transpose of {rows}x{cols}");
    let to = dst.as_mut_ptr();
    for r0 in (0..rows).step_by(T) {
        let r1 = (r0 + T).min(rows);
        for c in 0..cols {
            // SAFETY: r < rows and c < cols; the destination's size was checked.
            unsafe {
                let (from, to) = (src.as_ptr().add(c), to.add(c * dst_stride));
                if r1 - r0 == T {
                    let column: [f32; T] = std::array::from_fn(|i| *from.add((r0 + i) * src.stride()));
                    to.add(r0).cast::<[f32; T]>().write(column);
                } else {
                    for r in r0..r1 {
                        *to.add(r) = *from.add(r * src.stride());
                    }
                }
            }
        }
    }
}
