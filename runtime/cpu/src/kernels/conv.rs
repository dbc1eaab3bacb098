//! Causal depthwise convolution over time with bias and optional SiLU (Mamba-2, arXiv 2405.21060):
//! y_t = act(bias + sum_j w_j x_{t-(k-1)+j}), the inputs before the first coming from a carried state.
//!
//! Tasks own blocks of time steps; the arithmetic of an element does not depend on the block it falls in.  Backward
//! recomputes the pre-activation with a halo of k-1 steps; dw and db are summed per task, then over tasks in order.

// Index loops over several arrays at once read like the formulas.
#![allow(clippy::needless_range_loop)]

use super::vmath::{lane, simd_fn};
use crate::par::{self, SharedMut};
use crate::{Mat, MatMut};
use pulp::Simd;

/// Most steps of a backward task (longer tasks when the sequence is long, so that partial dw stay few).
const BLOCK: usize = 64;

/// Up to this many steps of all sequences the taps are used as they are stored.
const FEW_STEPS: usize = 6;
/// What a channel of such a step costs, in scalar operations: as a block of channels that two threads share counts.
const FEW_COST: usize = 32;

/// Sizes of a convolution: `n` sequences of `l` steps, `channels` wide, `kernel` taps.
#[derive(Clone, Copy, Debug)]
pub struct CausalConv1d {
    pub n: usize,
    pub l: usize,
    pub channels: usize,
    pub kernel: usize,
    /// Apply SiLU to the result.
    pub silu: bool,
}

/// Columns that a loop holds in registers: through local arrays, because with this many slices the compiler cannot
/// rule out that they overlap.
const LANES: usize = 32;

/// Columns c0..c0+W of act(bias + sum_j taps_j * rows_j).
#[inline(always)]
fn forward_part<S: Simd, const W: usize>(
    c0: usize,
    rows: &[&[f32]],
    taps: &[f32],
    bias: &[f32],
    silu: bool,
    out: &mut [f32],
) {
    let part = |x: &[f32], at: usize| -> [f32; W] { x[at..at + W].try_into().expect("BUG: slice of W") };
    let mut v = part(bias, c0);
    for (j, x) in rows.iter().enumerate() {
        let (x, w) = (part(x, c0), part(taps, j * bias.len() + c0));
        for i in 0..W {
            v[i] = lane::fma::<S>(w[i], x[i], v[i]);
        }
    }
    if silu {
        for v in &mut v {
            *v = lane::silu::<S>(*v);
        }
    }
    out[c0..c0 + W].copy_from_slice(&v);
}

simd_fn! {
    /// out = act(bias + sum_j taps_j * rows_j); taps (kernel, channels).
    fn row_forward<'a, S>(rows: &'a [&'a [f32]], taps: &'a [f32], bias: &'a [f32], silu: bool, out: &'a mut [f32]) {
        let full = bias.len() / LANES * LANES;
        for c0 in (0..full).step_by(LANES) {
            forward_part::<S, LANES>(c0, rows, taps, bias, silu, out);
        }
        for c0 in full..bias.len() {
            forward_part::<S, 1>(c0, rows, taps, bias, silu, out);
        }
    }
}

simd_fn! {
    /// As `row_forward` with four taps, as they are stored: for few steps, to which turning them would be most of the work.
    fn step_of_four<'a, S>(rows: [&'a [f32]; 4], w: &'a [[f32; 4]], bias: &'a [f32], silu: bool, out: &'a mut [f32]) {
        const W: usize = 16;
        let n = bias.len();
        let [r0, r1, r2, r3] = rows.map(|r| &r[..n]);
        let (w, out) = (&w[..n], &mut out[..n]);
        let mut c0 = 0;
        while c0 < n {
            // The last columns may be computed twice.
            let c = if n >= W { c0.min(n - W) } else { c0 };
            let width = W.min(n);
            let mut v = [0.0f32; W];
            for i in 0..width {
                let (w, c) = (w[c + i], c + i);
                let sum = lane::fma::<S>(w[0], r0[c], bias[c]);
                let sum = lane::fma::<S>(w[1], r1[c], sum);
                v[i] = lane::fma::<S>(w[3], r3[c], lane::fma::<S>(w[2], r2[c], sum));
            }
            if silu {
                for v in &mut v {
                    *v = lane::silu::<S>(*v);
                }
            }
            out[c..c + width].copy_from_slice(&v[..width]);
            c0 += W;
        }
    }
}

simd_fn! {
    /// g = dy * silu'(g).
    fn activation_backward<'a, S>(dy: &'a [f32], g: &'a mut [f32]) {
        for (g, dy) in g.iter_mut().zip(dy) {
            *g = dy * lane::dsilu::<S>(*g);
        }
    }
}

simd_fn! {
    /// acc += x * y, elementwise.
    fn add_product<'a, S>(x: &'a [f32], y: &'a [f32], acc: &'a mut [f32]) {
        for ((a, x), y) in acc.iter_mut().zip(x).zip(y) {
            *a = lane::fma::<S>(*x, *y, *a);
        }
    }
}

/// Columns c0..c0+W of db += g, dw_j += g * rows_j.
#[inline(always)]
fn weight_part<S: Simd, const W: usize>(c0: usize, g: &[f32], rows: &[&[f32]], dw: &mut [f32], db: &mut [f32]) {
    let part = |x: &[f32], at: usize| -> [f32; W] { x[at..at + W].try_into().expect("BUG: slice of W") };
    let (channels, g, mut sum) = (g.len(), part(g, c0), part(db, c0));
    for i in 0..W {
        sum[i] += g[i];
    }
    db[c0..c0 + W].copy_from_slice(&sum);
    for (j, x) in rows.iter().enumerate() {
        let at = j * channels + c0;
        let (x, mut w) = (part(x, c0), part(dw, at));
        for i in 0..W {
            w[i] = lane::fma::<S>(g[i], x[i], w[i]);
        }
        dw[at..at + W].copy_from_slice(&w);
    }
}

simd_fn! {
    /// db += g and dw_j += g * rows_j; dw (kernel, channels).
    fn add_weight_gradients<'a, S>(g: &'a [f32], rows: &'a [&'a [f32]], dw: &'a mut [f32], db: &'a mut [f32]) {
        let full = g.len() / LANES * LANES;
        for c0 in (0..full).step_by(LANES) {
            weight_part::<S, LANES>(c0, g, rows, dw, db);
        }
        for c0 in full..g.len() {
            weight_part::<S, 1>(c0, g, rows, dw, db);
        }
    }
}

/// Slices for up to eight taps live on the stack.
fn with_rows<'a>(kernel: usize, row: impl Fn(usize) -> &'a [f32], f: impl FnOnce(&[&'a [f32]])) {
    if kernel <= 8 {
        let mut rows: [&[f32]; 8] = [&[]; 8];
        for (j, r) in rows[..kernel].iter_mut().enumerate() {
            *r = row(j);
        }
        f(&rows[..kernel]);
    } else {
        f(&(0..kernel).map(row).collect::<Vec<_>>());
    }
}

impl CausalConv1d {
    /// x, y (n * l, channels); w (channels, 1, kernel); bias (channels); s0, s_final (n, kernel - 1, channels):
    /// the inputs before the first step and the last kernel - 1 inputs.
    pub fn forward(&self, x: Mat, w: &[f32], bias: &[f32], s0: &[f32], y: MatMut, s_final: &mut [f32]) {
        let &Self { n, l, channels: c, kernel, .. } = self;
        assert_eq!(s_final.len(), s0.len(), "BUG: final conv state");
        self.convolve(&x, w, bias, s0, y);
        for b in 0..n {
            for j in 0..kernel - 1 {
                let out = &mut s_final[(b * (kernel - 1) + j) * c..][..c];
                out.copy_from_slice(self.input(&x, s0, b, (l + j) as isize - (kernel - 1) as isize));
            }
        }
    }

    /// As [`forward`](Self::forward), from the state in `s`, which the final one replaces.
    pub fn forward_in_place(&self, x: Mat, w: &[f32], bias: &[f32], y: MatMut, s: &mut [f32]) {
        let &Self { n, l, channels: c, kernel, .. } = self;
        self.convolve(&x, w, bias, s, y);
        let back = kernel - 1;
        for b in 0..n {
            for j in 0..back {
                let to = (b * back + j) * c;
                // Entries move towards the front: none is overwritten before it is read.
                match l + j {
                    from if from < back => s.copy_within((b * back + from) * c..(b * back + from + 1) * c, to),
                    from => s[to..to + c].copy_from_slice(x.row(b * l + from - back)),
                }
            }
        }
    }

    /// y of all steps.
    fn convolve(&self, x: &Mat, w: &[f32], bias: &[f32], s0: &[f32], y: MatMut) {
        let &Self { n, l, channels: c, kernel, silu } = self;
        self.check(x, w, bias, s0, (y.rows(), y.cols()));
        if kernel == 4 && n * l <= FEW_STEPS {
            let w = w.as_chunks().0;
            // What a step reads comes from memory: two threads wait for it half as long.
            par::for_blocks(c, par::rows_per_task(FEW_COST), FEW_COST * n * l * c, |_, start, end| {
                for i in 0..n * l {
                    let rows = [0, 1, 2, 3].map(|j| &self.input(x, s0, i / l, (i % l + j) as isize - 3)[start..end]);
                    // SAFETY: one block of channels per task, one row after another.
                    let mut out = unsafe { y.block_unchecked(i, 1, start, end - start) };
                    step_of_four(rows, &w[start..end], &bias[start..end], silu, out.row_mut(0));
                }
            });
            return;
        }
        self.with_taps(w, |taps| {
            let cost = c * (2 * kernel + 16);
            let block = par::rows_per_task(cost);
            let blocks = l.div_ceil(block);
            par::for_each(n * blocks, n * l * cost, |t| {
                let (b, start) = (t / blocks, t % blocks * block);
                for i in start..(start + block).min(l) {
                    // SAFETY: row belongs to this task.
                    let out = unsafe { y.row_unchecked(b * l + i) };
                    self.pre(x, s0, b, i, taps, bias, silu, out);
                }
            });
        });
    }

    /// Steps of a block of `backward`.
    fn backward_rows(&self) -> usize {
        BLOCK.max((self.n * self.l).div_ceil(BLOCK)).min(self.l.max(1))
    }

    /// Floats of scratch that `backward` takes on the calling thread.
    pub fn backward_scratch(&self) -> usize {
        let (taps, part) = (self.channels * self.kernel, (self.kernel + 1) * self.channels);
        let partials = self.n * self.l.div_ceil(self.backward_rows()) * part;
        [taps, partials, part].map(par::rounded).iter().sum()
    }

    /// Gradients of `forward`: dx (n * l, channels), dw (channels, 1, kernel), db (channels),
    /// ds0 (n, kernel - 1, channels), from dy and ds_final.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        x: Mat,
        w: &[f32],
        bias: &[f32],
        s0: &[f32],
        dy: Mat,
        ds_final: &[f32],
        dx: MatMut,
        dw: &mut [f32],
        db: &mut [f32],
        ds0: &mut [f32],
    ) {
        let &Self { n, l, channels: c, kernel, .. } = self;
        let back = kernel - 1;
        self.check(&x, w, bias, s0, (dy.rows(), dy.cols()));
        assert!((dx.rows(), dx.cols()) == (n * l, c) && dw.len() == w.len() && db.len() == c, "BUG: conv gradients");
        assert!(ds0.len() == s0.len() && ds_final.len() == s0.len(), "BUG: conv state gradients");
        let block = self.backward_rows();
        let blocks = l.div_ceil(block);
        let part = (kernel + 1) * c; // dw as (kernel, channels), then db
        self.with_taps(w, |taps| {
            par::with_scratch(n * blocks * part, |partials| {
                let (shared, ds0) = (SharedMut::new(partials), SharedMut::new(&mut *ds0));
                par::for_each(n * blocks, n * l * c * (4 * kernel + 32), |t| {
                    let (b, start) = (t / blocks, t % blocks * block);
                    let end = (start + block).min(l);
                    // SAFETY: each task has its own partial; the first block of a sequence owns its ds0.
                    let (sums, ds0) = unsafe {
                        let ds0 = ds0.slice(b * back * c, if start == 0 { back * c } else { 0 });
                        (shared.slice(t * part, part), ds0)
                    };
                    self.backward_block(&x, taps, bias, s0, &dy, ds_final, &dx, b, start, end, sums, ds0);
                });
                par::with_scratch(part, |sums| {
                    par::sum_partials(partials, sums);
                    for (j, row) in sums[..kernel * c].chunks_exact(c.max(1)).enumerate() {
                        for (i, v) in row.iter().enumerate() {
                            dw[i * kernel + j] = *v;
                        }
                    }
                    db.copy_from_slice(&sums[kernel * c..]);
                });
            });
        });
    }

    /// Steps start..end of sequence b.
    #[allow(clippy::too_many_arguments)]
    fn backward_block(
        &self,
        x: &Mat,
        taps: &[f32],
        bias: &[f32],
        s0: &[f32],
        dy: &Mat,
        ds_final: &[f32],
        dx: &MatMut,
        b: usize,
        start: usize,
        end: usize,
        sums: &mut [f32],
        ds0: &mut [f32],
    ) {
        let &Self { l, channels: c, kernel, silu, .. } = self;
        let back = kernel - 1;
        let (dw, db) = sums.split_at_mut(kernel * c);
        dw.fill(0.0);
        db.fill(0.0);
        // A ring of the last `kernel` pre-activation gradients: step s is at s % kernel.
        par::with_scratch((kernel + 1) * c, |buf| {
            let (ring, zeros) = buf.split_at_mut(kernel * c);
            zeros.fill(0.0);
            let halo_end = (end + back).min(l);
            for s in start..halo_end {
                let g = &mut ring[s % kernel * c..][..c];
                if silu {
                    self.pre(x, s0, b, s, taps, bias, false, g);
                    activation_backward(dy.row(b * l + s), g);
                } else {
                    g.copy_from_slice(dy.row(b * l + s));
                }
                if s < end {
                    let input = |j| self.input(x, s0, b, (s + j) as isize - back as isize);
                    with_rows(kernel, input, |rows| add_weight_gradients(g, rows, dw, db));
                }
                // All steps that use input s - back are now in the ring, if it is this block's.
                if s >= start + back {
                    self.input_gradient(ring, zeros, taps, ds_final, b, (s - back) as isize, s, dx, ds0);
                }
            }
            // The last inputs: later steps do not exist.
            let done = (halo_end.saturating_sub(back)).max(start);
            for i in done..end {
                self.input_gradient(ring, zeros, taps, ds_final, b, i as isize, halo_end - 1, dx, ds0);
            }
        });
        if start == 0 {
            // Inputs before the first step; their steps may have left the ring, so take the first ones again.
            par::with_scratch((kernel + 1) * c, |buf| {
                let (ring, zeros) = buf.split_at_mut(kernel * c);
                zeros.fill(0.0);
                let last = back.min(l);
                for s in 0..last {
                    let g = &mut ring[s % kernel * c..][..c];
                    if silu {
                        self.pre(x, s0, b, s, taps, bias, false, g);
                        activation_backward(dy.row(b * l + s), g);
                    } else {
                        g.copy_from_slice(dy.row(b * l + s));
                    }
                }
                for i in 0..back {
                    self.input_gradient(ring, zeros, taps, ds_final, b, i as isize - back as isize, last - 1, dx, ds0);
                }
            });
        }
    }

    /// Gradient of the input at time `at` (negative: of the initial state) from steps `at..=at + back` that exist
    /// (not after `last`), found in the ring, and from the final state.
    #[allow(clippy::too_many_arguments)]
    fn input_gradient(
        &self,
        ring: &[f32],
        zeros: &[f32],
        taps: &[f32],
        ds_final: &[f32],
        b: usize,
        at: isize,
        last: usize,
        dx: &MatMut,
        ds0: &mut [f32],
    ) {
        let &Self { l, channels: c, kernel, .. } = self;
        let back = kernel - 1;
        let out = if at >= 0 {
            // SAFETY: the task owning step `at` is the only one to write its row.
            unsafe { dx.row_unchecked(b * l + at as usize) }
        } else {
            &mut ds0[(at + back as isize) as usize * c..][..c]
        };
        // at = l - back + i for entry i of the final state.
        let from_state = match at + back as isize - l as isize {
            i if i >= 0 => Some(&ds_final[(b * back + i as usize) * c..][..c]),
            _ => None,
        };
        if at >= 0 && at + back as isize <= last as isize && from_state.is_none() {
            // All taps present and no state involved: the convolution turned round, in one pass.
            let g = |j: usize| &ring[(at as usize + back - j) % kernel * c..][..c];
            return with_rows(kernel, g, |rows| row_forward(rows, taps, zeros, false, out));
        }
        out.copy_from_slice(from_state.unwrap_or(zeros));
        for s in at.max(0)..=(at + back as isize).min(last as isize) {
            let j = (at + back as isize - s) as usize;
            add_product(&taps[j * c..][..c], &ring[s as usize % kernel * c..][..c], out);
        }
    }

    /// Pre-activation (or activation) of step `i` of sequence `b`.
    #[inline]
    #[allow(clippy::too_many_arguments)]
    fn pre(&self, x: &Mat, s0: &[f32], b: usize, i: usize, taps: &[f32], bias: &[f32], silu: bool, out: &mut [f32]) {
        let back = self.kernel as isize - 1;
        let input = |j| self.input(x, s0, b, i as isize - back + j as isize);
        with_rows(self.kernel, input, |rows| row_forward(rows, taps, bias, silu, out));
    }

    /// Input of sequence `b` at time `at`, which may reach kernel - 1 steps before the first.
    #[inline]
    fn input<'a>(&self, x: &Mat<'a>, s0: &'a [f32], b: usize, at: isize) -> &'a [f32] {
        if at >= 0 {
            x.row(b * self.l + at as usize)
        } else {
            let back = self.kernel - 1;
            &s0[(b * back + (at + back as isize) as usize) * self.channels..][..self.channels]
        }
    }

    /// w (channels, 1, kernel) as (kernel, channels).
    fn with_taps(&self, w: &[f32], f: impl FnOnce(&[f32])) {
        par::with_scratch(w.len(), |taps| {
            for (i, w) in w.chunks_exact(self.kernel).enumerate() {
                for (j, &v) in w.iter().enumerate() {
                    taps[j * self.channels + i] = v;
                }
            }
            f(taps)
        });
    }

    fn check(&self, x: &Mat, w: &[f32], bias: &[f32], s0: &[f32], y: (usize, usize)) {
        let &Self { n, l, channels: c, kernel, .. } = self;
        assert!(kernel > 0, "BUG: convolution without taps");
        assert!((x.rows(), x.cols()) == (n * l, c) && y == (n * l, c), "BUG: conv of {}x{}", x.rows(), x.cols());
        assert!(w.len() == c * kernel && bias.len() == c && s0.len() == n * (kernel - 1) * c, "BUG: conv weights");
    }
}
