//! The selective scan of Mamba-2 in block form (state-space duality, arXiv 2405.21060).
//!
//! ```text
//! h_t = exp(dt_t a) h_{t-1} + dt_t x_t (x) b_t        y_t = h_t c_t + d x_t
//! ```
//!
//! With cs the running sum of dt a inside a block and h the state before it:
//!
//! ```text
//! y_t  = exp(cs_t) h c_t + sum_{s<=t} (c_t . b_s) exp(cs_t - cs_s) dt_s x_s + d x_t
//! h'   = exp(cs_end) h + sum_s exp(cs_end - cs_s) dt_s x_s (x) b_s
//! ```
//!
//! Two passes per window of blocks: states before every block (tasks: sequence, head, slice of head_dim; each walks the
//! window), then outputs (tasks: sequence, block, up to 8 heads of a group, which share c.b).  Backward (scan_backward.rs) adds a third
//! pass, the states' gradients walked in reverse.  Windows bound the workspace.
//! Invariants: exponents are differences with s <= t, so never positive; cs is kept as a sum of two floats, so a
//! difference is accurate even after a step of -1000; task and window sizes depend on shapes alone.

// Index loops over several arrays at once read like the formulas.
#![allow(clippy::needless_range_loop)]

use super::gemm_micro::small;
use super::transpose::transpose_small;
use super::vmath::{lane, simd_fn};
use crate::par::{self, SharedMut};
use crate::{Mat, MatMut};
use std::ops::Range;

/// Longer blocks only add work inside the block, so `SelectiveScan::block` is cut to this.
const MAX_BLOCK: usize = 64;
/// Up to this many steps the recurrence itself (scan_steps.rs) is cheaper than blocks.
const FEW_STEPS: usize = 6;
/// Rows taken together in products with a triangular matrix: whole vectors of columns.
pub(super) const STRIP: usize = 16;
/// Floats of one window's states in forward: what the walk writes, the outputs find in a cache.
const WINDOW: usize = 1 << 20;
/// Heads of an output task.  More heads share one c.b product; fewer make more tasks and smaller windows.
const HEADS: usize = 8;

/// Sizes of a scan: `n` sequences of `l` steps, `heads` of width `head_dim`, `groups` of b and c with `state` entries
/// (head m uses group m * groups / heads), in blocks of at most `block` steps.
#[derive(Clone, Copy, Debug)]
pub struct SelectiveScan {
    pub n: usize,
    pub l: usize,
    pub heads: usize,
    pub head_dim: usize,
    pub groups: usize,
    pub state: usize,
    pub block: usize,
}

/// What a scan reads beside the state: x (n * l, heads * head_dim); dt (n * l, heads) after softplus; a, d (heads), a
/// negative; b, c (n * l, groups * state).
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    pub x: Mat<'a>,
    pub dt: Mat<'a>,
    pub a: &'a [f32],
    pub b: Mat<'a>,
    pub c: Mat<'a>,
    pub d: &'a [f32],
}

/// Per-step factors of one block of one head.
pub(super) struct Decay<'a> {
    /// Running sum of dt * a, as hi + lo.
    pub hi: &'a mut [f32],
    pub lo: &'a mut [f32],
    pub dt: &'a mut [f32],
    /// exp(cs_t): what is left of the state before the block.
    pub from_start: &'a mut [f32],
    /// exp(cs_end - cs_s): what is left at the block's end.
    pub to_end: &'a mut [f32],
}

impl<'a> Decay<'a> {
    pub const LEN: usize = 5 * MAX_BLOCK;

    pub fn new(buf: &'a mut [f32], dt: &Mat, a: f32, first: usize, q: usize, head: usize) -> Self {
        let mut parts = buf[..Self::LEN].chunks_exact_mut(MAX_BLOCK).map(|c| &mut c[..q]);
        let mut next = || parts.next().expect("BUG: five parts");
        let (hi, lo, dts, from_start, to_end) = (next(), next(), next(), next(), next());
        let mut sum = 0.0f64;
        for i in 0..q {
            dts[i] = dt.row(first + i)[head];
            sum += dts[i] as f64 * a as f64;
            hi[i] = sum as f32;
            lo[i] = (sum - hi[i] as f64) as f32;
        }
        decay_ends(hi, lo, from_start, to_end);
        Self { hi, lo, dt: dts, from_start, to_end }
    }

    /// exp of the whole block's sum.
    pub fn whole(&self) -> f32 {
        *self.from_start.last().expect("BUG: empty block")
    }
}

simd_fn! {
    fn decay_ends<'a, S>(hi: &'a [f32], lo: &'a [f32], from_start: &'a mut [f32], to_end: &'a mut [f32]) {
        let q = hi.len();
        let (h, l) = (hi[q - 1], lo[q - 1]);
        for i in 0..q {
            from_start[i] = lane::exp::<S>(hi[i] + lo[i]);
            to_end[i] = lane::exp::<S>((h - hi[i]) + (l - lo[i]));
        }
    }
}

simd_fn! {
    /// m_ts = cb_ts exp(cs_t - cs_s) for s <= t, 0 up to the end of t's strip; both (q, q).
    fn weigh<'a, S>(q: usize, cb: &'a [f32], hi: &'a [f32], lo: &'a [f32], m: &'a mut [f32]) {
        for t in 0..q {
            let n = strip_end(t, q);
            let (h, l) = (hi[t], lo[t]);
            let (out, cb, hi, lo) = (&mut m[t * q..][..n], &cb[t * q..][..n], &hi[..n], &lo[..n]);
            for s in 0..n {
                let v = cb[s] * lane::exp::<S>((h - hi[s]) + (l - lo[s]));
                out[s] = if s as u32 <= t as u32 { v } else { 0.0 };
            }
        }
    }
}

simd_fn! {
    /// y_t = from_start_t y_t + d x_t for the rows of one block.
    fn skip<'a, S>(from_start: &'a [f32], d: f32, x: Mat<'a>, y: MatMut<'a>) {
        let mut y = y;
        for (t, &f) in from_start.iter().enumerate() {
            for (y, x) in y.row_mut(t).iter_mut().zip(x.row(t)) {
                *y = lane::fma::<S>(f, *y, d * x);
            }
        }
    }
}

simd_fn! {
    /// out_t = f_t g_t x_t for the rows of x.
    fn scale_rows<'a, S>(f: &'a [f32], g: &'a [f32], x: Mat<'a>, out: &'a mut [f32]) {
        for (t, out) in out.chunks_exact_mut(x.cols()).enumerate() {
            let scale = f[t] * g[t];
            for (o, x) in out.iter_mut().zip(x.row(t)) {
                *o = scale * x;
            }
        }
    }
}

simd_fn! {
    /// out = f * x.
    fn scaled_copy<'a, S>(f: f32, x: &'a [f32], out: &'a mut [f32]) {
        for (o, x) in out.iter_mut().zip(x) {
            *o = f * x;
        }
    }
}

/// The same matrix for a callee that takes it by value.
pub(super) fn reborrow<'a>(m: &'a mut MatMut) -> MatMut<'a> {
    // SAFETY: exclusive through `m`.
    unsafe { m.block_unchecked(0, m.rows(), 0, m.cols()) }
}

/// End of the strip of rows that holds row `t`.
pub(super) fn strip_end(t: usize, q: usize) -> usize {
    ((t / STRIP + 1) * STRIP).min(q)
}

/// Lower triangle (whole strips) of c bᵀ: out (q, q) from the block's c (q, state) and bᵀ (state, q).
pub(super) fn lower_product(q: usize, c: &Mat, b_t: &[f32], out: &mut [f32]) {
    for t0 in (0..q).step_by(STRIP) {
        let end = strip_end(t0, q);
        // SAFETY: rows t0..end of c and out, the first `end` columns of b_t and out.
        unsafe {
            let a = (c.row(t0).as_ptr(), c.stride(), 1);
            small(end - t0, end, c.cols(), a, (b_t.as_ptr(), q), (out[t0 * q..].as_mut_ptr(), q), false);
        }
    }
}

/// out += m v with m (q, q) lower triangular by strips, v and out (q, cols).
pub(super) fn add_lower(q: usize, m: &[f32], v: &Mat, out: &mut MatMut) {
    for t0 in (0..q).step_by(STRIP) {
        let end = strip_end(t0, q);
        // SAFETY: rows t0..end of m and out, rows 0..end of v.
        unsafe {
            let c = (out.row_mut(t0).as_mut_ptr(), out.stride());
            small(end - t0, v.cols(), end, (m[t0 * q..].as_ptr(), q, 1), (v.as_ptr(), v.stride()), c, true);
        }
    }
}

/// Which operand of a state update is the left one.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Layout {
    /// State as (head_dim, state).
    HeadMajor,
    /// State as (state, head_dim).
    StateMajor,
}

/// A walk over a window of blocks that carries states: forward, state <- whole * state + (to_end dt x) (x) b;
/// backward, gradient <- whole * gradient + (from_start dy) (x) c.
pub(super) struct Walk<'a> {
    pub x: Mat<'a>,
    pub dt: Mat<'a>,
    pub a: &'a [f32],
    pub b: Mat<'a>,
    pub layout: Layout,
    pub reverse: bool,
}

impl SelectiveScan {
    pub(super) fn q(&self) -> usize {
        self.block.clamp(1, MAX_BLOCK).min(self.l.max(1))
    }
    pub(super) fn blocks(&self) -> usize {
        self.l.div_ceil(self.q())
    }
    /// Floats of one head's state, and of all heads of all sequences.
    pub(super) fn head_state(&self) -> usize {
        self.head_dim * self.state
    }
    pub(super) fn all_states(&self) -> usize {
        self.n * self.heads * self.head_state()
    }
    /// Blocks of a window: few enough for a workspace of `floats`, enough for parallel tasks (`tasks` per block).
    pub(super) fn window(&self, floats: usize, tasks: usize) -> usize {
        (floats / self.all_states().max(1)).max(16usize.div_ceil(tasks.max(1))).clamp(1, self.blocks().max(1))
    }
    /// Output tasks of a block: parts of the heads of each group.
    fn head_chunks(&self) -> usize {
        (self.heads / self.groups).div_ceil(HEADS) * self.groups
    }
    fn forward_window(&self) -> usize {
        self.window(WINDOW, self.n * self.head_chunks())
    }

    /// Floats of scratch that `forward` takes on the calling thread.
    pub fn forward_scratch(&self) -> usize {
        if self.l <= FEW_STEPS { 0 } else { par::rounded((self.forward_window() + 1) * self.all_states()) }
    }

    /// First row and number of rows of block `blk` of sequence `i`.
    pub(super) fn rows(&self, i: usize, blk: usize) -> (usize, usize) {
        let start = blk * self.q();
        (i * self.l + start, self.q().min(self.l - start))
    }
    pub(super) fn group(&self, head: usize) -> usize {
        head * self.groups / self.heads
    }
    /// Scalar operations of one pass over `blocks` blocks.
    pub(super) fn work(&self, blocks: usize) -> usize {
        self.n * blocks * self.q() * self.heads * self.head_state() * 4
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn check(&self, x: &Mat, dt: &Mat, a: &[f32], b: &Mat, c: &Mat, d: &[f32], h0: &[f32]) {
        let rows = self.n * self.l;
        let is = |m: &Mat, cols: usize| m.rows() == rows && m.cols() == cols;
        assert!(self.groups > 0 && self.heads.is_multiple_of(self.groups), "BUG: {self:?}");
        assert!(is(x, self.heads * self.head_dim) && is(dt, self.heads), "BUG: x or dt of {self:?}");
        assert!(is(b, self.groups * self.state) && is(c, self.groups * self.state), "BUG: b or c of {self:?}");
        assert!(a.len() == self.heads && d.len() == self.heads, "BUG: a or d of {self:?}");
        assert!(h0.len() == self.all_states(), "BUG: states of {self:?}");
    }

    /// y (n * l, heads * head_dim) and the final state from h0; h0, h_final (n, heads, head_dim, state).
    pub fn forward(&self, o: &Operands, h0: &[f32], y: MatMut, h_final: &mut [f32]) {
        assert_eq!(h_final.len(), h0.len(), "BUG: states of {self:?}");
        self.run(o, Some(h0), y, h_final);
    }

    /// As [`forward`](Self::forward), from the state in `h`, which the final one replaces.
    pub fn forward_in_place(&self, o: &Operands, y: MatMut, h: &mut [f32]) {
        self.run(o, None, y, h);
    }

    /// `h` becomes the final state; it holds the first one where `h0` does not.
    fn run(&self, o: &Operands, h0: Option<&[f32]>, y: MatMut, h: &mut [f32]) {
        let &Operands { x, dt, a, b, c, d } = o;
        self.check(&x, &dt, a, &b, &c, d, h);
        assert!((y.rows(), y.cols()) == (x.rows(), x.cols()), "BUG: outputs of {self:?}");
        if self.l <= FEW_STEPS {
            return self.steps(o, h0, y, h);
        }
        let (p, r, all) = (self.head_dim, self.state, self.all_states());
        let per_group = self.heads / self.groups;
        let (head_step, chunks) = (HEADS.min(per_group), self.head_chunks());
        let window = self.forward_window();
        let walk = Walk { x, dt, a, b, layout: Layout::StateMajor, reverse: false };
        // states[j] is the state before block j of the window, the last one that after it; (state, head_dim) each.
        par::with_scratch((window + 1) * all, |states| {
            for (h, s) in h0.unwrap_or(h).chunks_exact(p * r).zip(states.chunks_exact_mut(p * r)) {
                transpose_small(Mat::new(h, p, r), s, p);
            }
            let mut first = 0;
            while first < self.blocks() {
                let count = window.min(self.blocks() - first);
                self.walk(&walk, first, count, states);
                let before = &*states;
                par::for_each(self.n * count * chunks, self.work(count), |t| {
                    let (i, j, chunk) = (t / (count * chunks), t / chunks % count, t % chunks);
                    let (g, part) = (chunk * self.groups / chunks, chunk % (chunks / self.groups));
                    let m = g * per_group + part * head_step;
                    let heads = m..(m + head_step).min((g + 1) * per_group);
                    self.outputs(&x, &dt, a, &b, &c, d, &before[j * all..(j + 1) * all], &y, i, first + j, heads);
                });
                states.copy_within(count * all..(count + 1) * all, 0);
                first += count;
            }
            for (s, h) in states.chunks_exact(p * r).zip(h.chunks_exact_mut(p * r)) {
                transpose_small(Mat::new(s, r, p), h, r);
            }
        });
    }

    /// Carries the states through blocks first..first+count: forward fills states[1..=count] from states[0],
    /// in reverse states[..count] from states[count], each `all_states` long.
    pub(super) fn walk(&self, w: &Walk, first: usize, count: usize, states: &mut [f32]) {
        let (p, r, all) = (self.head_dim, self.state, self.all_states());
        // Slices of head_dim are independent; cut them when there are few heads.
        let slice = if self.n * self.heads >= 8 { p } else { p.div_ceil(2).next_multiple_of(16).min(p) };
        let slices = p.div_ceil(slice);
        let shared = SharedMut::new(states);
        par::for_each(self.n * self.heads * slices, self.work(count) / 2, |t| {
            let (i, m, p0) = (t / (self.heads * slices), t / slices % self.heads, t % slices * slice);
            let (g, pn) = (self.group(m), slice.min(p - p0));
            let base = (i * self.heads + m) * self.head_state();
            par::with_scratch(Decay::LEN + MAX_BLOCK * pn, |buf| {
                let (decay, scaled) = buf.split_at_mut(Decay::LEN);
                for j in 0..count {
                    let j = if w.reverse { count - 1 - j } else { j };
                    let (row, q) = self.rows(i, first + j);
                    let decay = Decay::new(decay, &w.dt, w.a[m], row, q, m);
                    let x = w.x.block(row, q, m * p + p0, pn);
                    let b = w.b.block(row, q, g * r, r);
                    let scaled = &mut scaled[..q * pn];
                    let (from, to) = if w.reverse { (j + 1, j) } else { (j, j + 1) };
                    if w.reverse {
                        scale_rows(decay.from_start, &[1.0; MAX_BLOCK], x, scaled);
                    } else {
                        scale_rows(decay.to_end, decay.dt, x, scaled);
                    }
                    let whole = decay.whole();
                    // SAFETY: this task owns its slice of head (i, m) in every state.
                    unsafe {
                        if w.layout == Layout::HeadMajor {
                            let old = shared.slice(from * all + base + p0 * r, pn * r);
                            let new = shared.slice(to * all + base + p0 * r, pn * r);
                            scaled_copy(whole, old, new);
                            let (a, b) = ((scaled.as_ptr(), 1, pn), (b.as_ptr(), b.stride()));
                            small(pn, r, q, a, b, (new.as_mut_ptr(), r), true);
                        } else {
                            for s in 0..r {
                                let old = shared.slice(from * all + base + s * p + p0, pn);
                                scaled_copy(whole, old, shared.slice(to * all + base + s * p + p0, pn));
                            }
                            let new = shared.slice(to * all + base + p0, (r - 1) * p + pn);
                            let (a, b) = ((b.as_ptr(), 1, b.stride()), (scaled.as_ptr(), pn));
                            small(r, pn, q, a, b, (new.as_mut_ptr(), p), true);
                        }
                    }
                }
            });
        });
    }

    /// y of block `blk` of sequence `i` for some heads of one group; `states` before the block, (state, head_dim).
    #[allow(clippy::too_many_arguments)]
    fn outputs(
        &self,
        x: &Mat,
        dt: &Mat,
        a: &[f32],
        b: &Mat,
        c: &Mat,
        d: &[f32],
        states: &[f32],
        y: &MatMut,
        i: usize,
        blk: usize,
        heads: Range<usize>,
    ) {
        let (p, r, g) = (self.head_dim, self.state, self.group(heads.start));
        let (row, q) = self.rows(i, blk);
        let (b, c) = (b.block(row, q, g * r, r), c.block(row, q, g * r, r));
        par::with_scratch(Decay::LEN + 2 * q * q + r * q + p * q, |buf| {
            let (decay, rest) = buf.split_at_mut(Decay::LEN);
            let (cb, rest) = rest.split_at_mut(q * q);
            let (m_ts, rest) = rest.split_at_mut(q * q);
            let (b_t, x_dt) = rest.split_at_mut(r * q);
            let x_dt = &mut x_dt[..p * q];
            transpose_small(b, b_t, q);
            lower_product(q, &c, b_t, cb);
            for m in heads {
                let decay = Decay::new(decay, dt, a[m], row, q, m);
                let x = x.block(row, q, m * p, p);
                // SAFETY: rows of this block, columns of this head.
                let mut y = unsafe { y.block_unchecked(row, q, m * p, p) };
                let h = &states[(i * self.heads + m) * self.head_state()..][..p * r];
                // SAFETY: c (q, r), h (r, p), y (q, p).
                unsafe {
                    let out = (y.as_mut_ptr(), y.stride());
                    small(q, p, r, (c.as_ptr(), c.stride(), 1), (h.as_ptr(), p), out, false);
                }
                skip(decay.from_start, d[m], x, reborrow(&mut y));
                weigh(q, cb, decay.hi, decay.lo, m_ts);
                // A compact copy: rows of x may be a power of two apart and evict each other.
                scale_rows(decay.dt, &[1.0; MAX_BLOCK], x, x_dt);
                add_lower(q, m_ts, &Mat::new(x_dt, q, p), &mut y);
            }
        });
    }
}
