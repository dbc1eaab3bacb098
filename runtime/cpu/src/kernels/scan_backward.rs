//! Backward of the selective scan (scan.rs), block by block with the states before each block recomputed.
//!
//! Per block and head, with h the state before it, g the gradient of the state after it, l_ts = exp(cs_t - cs_s),
//! e_t = exp(cs_t), w_s = exp(cs_end - cs_s), dm = dy xᵀ, f = dm * cb * l:
//!
//! ```text
//! dx_s  = sum_t m_ts dy_t + dt_s w_s g b_s + d dy_s          dcb = sum over heads dm * l * dt
//! dc_t  = sum_s dcb_ts b_s + sum over heads e_t hᵀ dy_t      db_s = sum_t dcb_ts c_t + sum over heads dt_s w_s gᵀ x_s
//! ddt_s = sum_t f_ts + w_s x_s g b_s + a da_s                 da_u = sum_{t>=u} dcs_t
//! dcs_t = sum_{s<t} f_ts dt_s - dt_t sum_{t'>t} f_t't + e_t dy_t h c_t - dt_t w_t x_t g b_t;   the last step also
//!         gets sum_s dt_s w_s x_s g b_s + e_end <g, h>
//! ```
//!
//! Heads of a group are added in order by the task that owns (sequence, block, group); da and dd are partial sums per
//! block, added in order in float64.

// Index loops over several arrays at once read like the formulas.
#![allow(clippy::needless_range_loop)]

use super::attn_micro::{carve, carved};
use super::gemm_micro::small;
use super::scan::{Decay, Layout, STRIP, SelectiveScan, Walk, add_lower, lower_product, reborrow, strip_end};
use super::transpose::transpose_small;
use super::vmath::{fold, lane, simd_fn};
use crate::par::{self, SharedMut};
use crate::{Mat, MatMut};
use pulp::Simd;

/// Floats of one window's states, and as many of their gradients.
const WINDOW: usize = 1 << 23;

/// Inputs of the scan and the incoming gradient of y.
struct Inputs<'a> {
    x: Mat<'a>,
    dt: Mat<'a>,
    a: &'a [f32],
    b: Mat<'a>,
    c: Mat<'a>,
    d: &'a [f32],
    dy: Mat<'a>,
}

/// Outputs that parallel tasks share; partial da and dd are (n * blocks, heads).
struct Outputs<'a> {
    dx: MatMut<'a>,
    ddt: MatMut<'a>,
    db: MatMut<'a>,
    dc: MatMut<'a>,
    da: SharedMut<'a>,
    dd: SharedMut<'a>,
}

/// Sums over the triangle of one head: `flow[t]` = sum_{s<t} e_ts - sum_{t'>t} e_t't with e_ts = f_ts dt_s,
/// `columns[s]` = sum_{t>=s} f_ts.
struct Sums {
    flow: [f64; 64],
    columns: [f32; 64],
}

/// Row `t` of the triangle at columns s0..s0+W; results in local arrays, so that the loop is free of aliases.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn triangle_part<S: Simd, const W: usize>(
    t: usize,
    s0: usize,
    (cb, dm): (&[f32], &[f32]),
    f: &Decay,
    m: &mut [f32],
    dcb: &mut [f32],
    sums: &mut Sums,
) -> f64 {
    let part = |x: &[f32]| -> [f32; W] { std::array::from_fn(|i| x[s0..s0 + W][i]) };
    let (h, l, cb, dm) = (f.hi[t], f.lo[t], part(cb), part(dm));
    let (hi, lo, dt) = (part(f.hi), part(f.lo), part(f.dt));
    let (mut m_new, mut dcb_new, mut columns) = ([0.0; W], part(dcb), part(&sums.columns));
    let mut e = [0.0f32; W];
    for i in 0..W {
        let decay = lane::exp::<S>((h - hi[i]) + (l - lo[i]));
        // Beyond the diagonal the exponent is positive; cb and dm are defined to the strip's end.
        let decay = if (s0 + i) as u32 <= t as u32 { decay } else { 0.0 };
        let scaled = decay * dt[i];
        let f = dm[i] * cb[i];
        m_new[i] = cb[i] * scaled;
        dcb_new[i] = lane::fma::<S>(dm[i], scaled, dcb_new[i]);
        columns[i] = lane::fma::<S>(f, decay, columns[i]);
        e[i] = if ((s0 + i) as u32) < t as u32 { f * scaled } else { 0.0 };
    }
    m[s0..s0 + W].copy_from_slice(&m_new);
    dcb[s0..s0 + W].copy_from_slice(&dcb_new);
    sums.columns[s0..s0 + W].copy_from_slice(&columns);
    let flow = &mut sums.flow[s0..s0 + W];
    for i in 0..W {
        flow[i] -= e[i] as f64;
    }
    // In halves, an order of additions that vectorises.
    let mut wide: [f64; W] = e.map(|e| e as f64);
    let mut width = W / 2;
    while width > 0 {
        for i in 0..width {
            wide[i] += wide[i + width];
        }
        width /= 2;
    }
    wide[0]
}

simd_fn! {
    /// Lower triangle of one head: from cb and dm makes m (with zeros to the strip's end) and the sums, adds to dcb.
    /// The flow is summed in float64 from the same rounded products, because over time its parts must cancel exactly.
    fn triangle<'a, S>(
        q: usize, cb: &'a [f32], dm: &'a [f32], f: &'a Decay<'a>, m: &'a mut [f32], dcb: &'a mut [f32],
    ) -> Sums {
        let mut out = Sums { flow: [0.0; 64], columns: [0.0; 64] };
        for t in 0..q {
            let n = strip_end(t, q);
            let row = t * q..t * q + n;
            let given = (&cb[row.clone()], &dm[row.clone()]);
            let (m, dcb) = (&mut m[row.clone()], &mut dcb[row]);
            let (mut sum, mut s) = (0.0, 0);
            while s + STRIP <= n {
                sum += triangle_part::<S, STRIP>(t, s, given, f, m, dcb, &mut out);
                s += STRIP;
            }
            for s in s..n {
                sum += triangle_part::<S, 1>(t, s, given, f, m, dcb, &mut out);
            }
            out.flow[t] += sum;
        }
        out
    }
}

simd_fn! {
    /// dx_s = dt_s w_s dx_s + d dy_s; returns sum dy . x.
    fn through_input<'a, S>(
        dt: &'a [f32], w: &'a [f32], d: f32, x: Mat<'a>, dy: Mat<'a>, dx: MatMut<'a>,
    ) -> f64 {
        let mut dx = dx;
        let mut dd = 0.0f64;
        for s in 0..dt.len() {
            let scale = dt[s] * w[s];
            dd += fold::dot::<S>(x.row(s), dy.row(s)) as f64;
            for (dx, dy) in dx.row_mut(s).iter_mut().zip(dy.row(s)) {
                *dx = lane::fma::<S>(scale, *dx, d * dy);
            }
        }
        dd
    }
}

simd_fn! {
    /// out_t (+)= f_t g_t v_t and dots_t = v_t . u_t for the rows of v (q, cols).
    fn through_state<'a, S>(
        f: &'a [f32], g: &'a [f32], v: &'a [f32], u: Mat<'a>, add: bool, out: MatMut<'a>, dots: &'a mut [f32],
    ) {
        let mut out = out;
        for (t, v) in v.chunks_exact(u.cols()).enumerate() {
            dots[t] = fold::dot::<S>(v, u.row(t));
            let scale = f[t] * g[t];
            let out = out.row_mut(t);
            if add {
                for (o, v) in out.iter_mut().zip(v) {
                    *o = lane::fma::<S>(scale, *v, *o);
                }
            } else {
                for (o, v) in out.iter_mut().zip(v) {
                    *o = scale * v;
                }
            }
        }
    }
}

/// out += mᵀ v with m (q, q) lower triangular by strips, v and out (q, cols).
fn add_lower_transposed(q: usize, m: &[f32], v: &Mat, out: &mut MatMut) {
    for s0 in (0..q).step_by(STRIP) {
        let end = strip_end(s0, q);
        // SAFETY: columns s0..end of m's rows from s0 on, rows s0.. of v, rows s0..end of out.
        unsafe {
            let c = (out.row_mut(s0).as_mut_ptr(), out.stride());
            let a = (m[s0 * q + s0..].as_ptr(), 1, q);
            small(end - s0, v.cols(), q - s0, a, (v.row(s0).as_ptr(), v.stride()), c, true);
        }
    }
}

/// out (q, r) = left (q, p) right (p, r).
fn to_state(q: usize, left: &Mat, right: &[f32], r: usize, out: &mut [f32]) {
    let p = left.cols();
    assert!(left.rows() == q && right.len() == p * r && out.len() == q * r, "BUG: state product");
    // SAFETY: sizes as asserted.
    unsafe {
        let a = (left.as_ptr(), left.stride(), 1);
        small(q, r, p, a, (right.as_ptr(), r), (out.as_mut_ptr(), r), false);
    }
}

impl SelectiveScan {
    fn backward_window(&self) -> usize {
        self.window(WINDOW, self.n * self.groups)
    }
    /// Partial sums of da, and of dd.
    fn partials(&self) -> usize {
        self.n * self.blocks() * self.heads
    }
    /// Floats of a window's states and gradients, and of the states before each window but the last.
    fn backward_states(&self) -> usize {
        let window = self.backward_window();
        (2 * (window + 1) + self.blocks().div_ceil(window).max(1) - 1) * self.all_states()
    }

    /// Floats of scratch that `backward` takes on the calling thread.
    pub fn backward_scratch(&self) -> usize {
        carved(&[self.partials(), self.partials(), self.backward_states()])
    }

    /// Gradients of `forward` from dy (like y) and dh_final (like h_final): every output like its input.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        x: Mat,
        dt: Mat,
        a: &[f32],
        b: Mat,
        c: Mat,
        d: &[f32],
        h0: &[f32],
        dy: Mat,
        dh_final: &[f32],
        dx: MatMut,
        ddt: MatMut,
        da: &mut [f32],
        db: MatMut,
        dc: MatMut,
        dd: &mut [f32],
        dh0: &mut [f32],
    ) {
        self.check(&x, &dt, a, &b, &c, d, h0);
        let like = |m: &MatMut, r: &Mat| (m.rows(), m.cols()) == (r.rows(), r.cols());
        assert!(like(&dx, &x) && like(&dx, &dy) && like(&ddt, &dt), "BUG: dx, dy or ddt of {self:?}");
        assert!(like(&db, &b) && like(&dc, &c), "BUG: db or dc of {self:?}");
        assert!(da.len() == a.len() && dd.len() == d.len() && dh0.len() == h0.len(), "BUG: gradients of {self:?}");
        assert!(dh_final.len() == h0.len(), "BUG: final gradient of {self:?}");
        let (all, blocks) = (self.all_states(), self.blocks());
        let window = self.backward_window();
        let windows = blocks.div_ceil(window);
        let forward = Walk { x, dt, a, b, layout: Layout::HeadMajor, reverse: false };
        let reverse = Walk { x: dy, dt, a, b: c, layout: Layout::HeadMajor, reverse: true };
        let inputs = Inputs { x, dt, a, b, c, d, dy };
        let sizes = [self.partials(), self.partials(), self.backward_states()];
        par::with_scratch(carved(&sizes), |buf| {
            let [pa, pd, buf] = carve(buf, sizes);
            let out = Outputs { dx, ddt, db, dc, da: SharedMut::new(pa), dd: SharedMut::new(pd) };
            let (states, rest) = buf.split_at_mut((window + 1) * all);
            let (grads, starts) = rest.split_at_mut((window + 1) * all);
            states[..all].copy_from_slice(h0);
            // With several windows: the state before each, by a first walk.
            for w in 0..windows - 1 {
                starts[w * all..(w + 1) * all].copy_from_slice(&states[..all]);
                self.walk(&forward, w * window, window, states);
                states.copy_within(window * all..(window + 1) * all, 0);
            }
            let mut carried = dh_final;
            for w in (0..windows).rev() {
                let (first, count) = (w * window, window.min(blocks - w * window));
                if w + 1 < windows {
                    states[..all].copy_from_slice(&starts[w * all..(w + 1) * all]);
                }
                grads[count * all..(count + 1) * all].copy_from_slice(carried);
                self.walk(&forward, first, count, states);
                self.walk(&reverse, first, count, grads);
                let (before, after) = (&*states, &*grads);
                par::for_each(self.n * count * self.groups, 3 * self.work(count), |t| {
                    let (i, j, g) = (t / (count * self.groups), t / self.groups % count, t % self.groups);
                    let (h, gh) = (&before[j * all..(j + 1) * all], &after[(j + 1) * all..(j + 2) * all]);
                    self.backward_block(&inputs, &out, h, gh, i, first + j, g);
                });
                dh0.copy_from_slice(&grads[..all]);
                carried = dh0;
            }
            for m in 0..self.heads {
                let own = |parts: &[f32]| parts[m..].iter().step_by(self.heads).map(|&v| v as f64).sum::<f64>() as f32;
                da[m] = own(pa);
                dd[m] = own(pd);
            }
        });
    }

    /// All gradients of block `blk` of sequence `i` through the heads of group `g`.
    #[allow(clippy::too_many_arguments)]
    fn backward_block(&self, v: &Inputs, out: &Outputs, states: &[f32], grads: &[f32], i: usize, blk: usize, g: usize) {
        let (p, r, len) = (self.head_dim, self.state, self.head_state());
        let (row, q) = self.rows(i, blk);
        let (b, c) = (v.b.block(row, q, g * r, r), v.c.block(row, q, g * r, r));
        let sizes = [Decay::LEN, q * q, q * q, q * q, q * q, r * q.max(p), p * q, q * r, 2 * q];
        par::with_scratch(sizes.iter().sum(), |buf| {
            let mut rest = buf;
            let mut take = |n: usize| rest.split_off_mut(..n).expect("BUG: scratch of a block");
            let [decay, cb, dm, m_ts, dcb, across, x_t, by_state, dots] = sizes.map(&mut take);
            transpose_small(b, &mut across[..r * q], q);
            lower_product(q, &c, &across[..r * q], cb);
            dcb.fill(0.0);
            let ones = [1.0f32; 64];
            // SAFETY: rows of this block, columns of this group.
            let mut db = unsafe { out.db.block_unchecked(row, q, g * r, r) };
            let mut dc = unsafe { out.dc.block_unchecked(row, q, g * r, r) };
            let per_group = self.heads / self.groups;
            for m in g * per_group..(g + 1) * per_group {
                let add = m > g * per_group;
                let f = Decay::new(decay, &v.dt, v.a[m], row, q, m);
                let (x, dy) = (v.x.block(row, q, m * p, p), v.dy.block(row, q, m * p, p));
                // SAFETY: rows of this block, columns of this head.
                let mut dx = unsafe { out.dx.block_unchecked(row, q, m * p, p) };
                let base = (i * self.heads + m) * len;
                let (h, gh) = (&states[base..base + len], &grads[base..base + len]);
                let (dots_c, dots_b) = dots.split_at_mut(q);

                transpose_small(x, x_t, q);
                lower_product(q, &dy, x_t, dm);
                let sums = triangle(q, cb, dm, &f, m_ts, dcb);

                transpose_small(Mat::new(gh, p, r), across, p);
                // SAFETY: b (q, r) by gᵀ (r, p).
                unsafe {
                    let to = (dx.as_mut_ptr(), dx.stride());
                    small(q, p, r, (b.as_ptr(), b.stride(), 1), (across.as_ptr(), p), to, false);
                }
                let dd = through_input(f.dt, f.to_end, v.d[m], x, dy, reborrow(&mut dx));
                add_lower_transposed(q, m_ts, &dy, &mut dx);
                to_state(q, &dy, h, r, by_state);
                through_state(f.from_start, &ones, by_state, c, add, reborrow(&mut dc), dots_c);
                to_state(q, &x, gh, r, by_state);
                through_state(f.to_end, f.dt, by_state, b, add, reborrow(&mut db), dots_b);

                // Gradient of cs, summed backwards over time; the last step's own terms cancel and are left out.
                let whole = f.whole() as f64 * super::gemm::dot(gh, h) as f64;
                let state_term = |s: usize| f.to_end[s] as f64 * dots_b[s] as f64;
                let mut tail = whole + (0..q - 1).map(|s| f.dt[s] as f64 * state_term(s)).sum::<f64>();
                let mut da = 0.0f64;
                for s in (0..q).rev() {
                    let own = if s + 1 < q { state_term(s) } else { 0.0 };
                    tail += sums.flow[s] + f.from_start[s] as f64 * dots_c[s] as f64 - f.dt[s] as f64 * own;
                    da += f.dt[s] as f64 * tail;
                    let direct = sums.columns[s] as f64 + state_term(s);
                    // SAFETY: this task owns (row, head) of ddt.
                    unsafe { out.ddt.row_unchecked(row + s)[m] = (direct + v.a[m] as f64 * tail) as f32 };
                }
                let at = (i * self.blocks() + blk) * self.heads + m;
                // SAFETY: one entry per (sequence, block, head).
                unsafe {
                    out.da.slice(at, 1)[0] = da as f32;
                    out.dd.slice(at, 1)[0] = dd as f32;
                }
            }
            add_lower(q, dcb, &b, &mut dc);
            add_lower_transposed(q, dcb, &c, &mut db);
        });
    }
}
