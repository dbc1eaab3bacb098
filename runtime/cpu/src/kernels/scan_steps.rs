//! The selective scan step by step: for a few steps, as in decoding, where blocks would only add work.
//!
//! The state is read and written once per step, in one pass that also takes its product with c; four rows of it at a
//! time share the loads of b and c.

// Index loops over several arrays at once read like the formulas.
#![allow(clippy::needless_range_loop)]

use super::matvec::prefetch;
use super::scan::{Operands, SelectiveScan};
use crate::MatMut;
use crate::par::{self, SharedMut};
use crate::simd::dispatch;
use pulp::{Simd, WithSimd};

impl SelectiveScan {
    /// `h` becomes the final state; it holds the first one where `h0` does not.
    pub(super) fn steps(&self, o: &Operands, h0: Option<&[f32]>, y: MatMut, h: &mut [f32]) {
        let &Operands { x, dt, a, b, c, d } = o;
        let (p, r, len) = (self.head_dim, self.state, self.head_state());
        let out = SharedMut::new(h);
        let tasks = self.n * self.heads;
        par::for_blocks(tasks, par::rows_per_task(4 * self.l * len), 4 * self.l * tasks * len, |_, start, end| {
            for task in start..end {
                let (i, m) = (task / self.heads, task % self.heads);
                let g = self.group(m);
                // SAFETY: one state per (sequence, head).
                let h = unsafe { out.slice(task * len, len) };
                if let Some(h0) = h0 {
                    h.copy_from_slice(&h0[task * len..(task + 1) * len]);
                }
                for row in i * self.l..(i + 1) * self.l {
                    let dt = dt.row(row)[m];
                    // SAFETY: one column range of y per (sequence, head).
                    let mut y = unsafe { y.block_unchecked(row, 1, m * p, p) };
                    dispatch(Step {
                        decay: (dt * a[m]).exp(),
                        dt,
                        d: d[m],
                        x: &x.row(row)[m * p..][..p],
                        b: &b.row(row)[g * r..][..r],
                        c: &c.row(row)[g * r..][..r],
                        h: &mut *h,
                        y: y.row_mut(0),
                    });
                }
            }
        });
    }
}

/// One step of the recurrence for one head: h (x.len(), b.len()) in place.
struct Step<'a> {
    decay: f32,
    dt: f32,
    d: f32,
    x: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    h: &'a mut [f32],
    y: &'a mut [f32],
}

impl WithSimd for Step<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let p = self.x.len();
        for q in (0..p / 4 * 4).step_by(4) {
            self.rows::<S, 4>(simd, q);
        }
        for q in p / 4 * 4..p {
            self.rows::<S, 1>(simd, q);
        }
    }
}

impl Step<'_> {
    /// Rows q..q + N of h.
    #[inline(always)]
    fn rows<S: Simd, const N: usize>(&mut self, simd: S, q: usize) {
        let r = self.b.len();
        let h: &mut [f32] = &mut self.h[q * r..(q + N) * r];
        let dx: [f32; N] = std::array::from_fn(|i| self.dt * self.x[q + i]);
        let ((bs, b_rest), (cs, c_rest)) = (S::as_simd_f32s(self.b), S::as_simd_f32s(self.c));
        let full = bs.len() * S::F32_LANES;
        let decay = simd.splat_f32s(self.decay);
        let scale: [S::f32s; N] = std::array::from_fn(|i| simd.splat_f32s(dx[i]));
        let mut acc = [simd.splat_f32s(0.0); N];
        let at = h.as_mut_ptr();
        for (v, (b, c)) in bs.iter().zip(cs).enumerate() {
            for i in 0..N {
                // SAFETY: vector v of row i lies inside h.
                unsafe {
                    let at = at.add(i * r + v * S::F32_LANES).cast::<S::f32s>();
                    if !S::IS_SCALAR {
                        // The same place of the next rows, or of the next head.
                        prefetch(at.wrapping_byte_add(N * r * size_of::<f32>()));
                    }
                    let new = simd.mul_add_e_f32s(scale[i], *b, simd.mul_f32s(decay, at.read_unaligned()));
                    at.write_unaligned(new);
                    acc[i] = simd.mul_add_e_f32s(new, *c, acc[i]);
                }
            }
        }
        for i in 0..N {
            let mut sum = simd.reduce_sum_f32s(acc[i]);
            let rest = h[i * r + full..].iter_mut();
            for ((h, b), c) in rest.zip(b_rest).zip(c_rest) {
                *h = self.decay * *h + dx[i] * b;
                sum += *h * c;
            }
            self.y[q + i] = sum + self.d * self.x[q + i];
        }
    }
}
