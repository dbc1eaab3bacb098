//! The Mamba-2 recurrence: `h_t = exp(dt_t·A)·h_{t-1} + dt_t·x_t ⊗ B_t`, `y_t = C_t·h_t + D·x_t`.
//!
//! Defined here step by step; kernels use the block form (state-space duality).  The initial and the final state are
//! values, so that a scan can go on where another stopped.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `selective_scan x, dt, a, b, c, d, h0`: `x: [N, L, M, P]`, `dt: [N, L, M]` (positive), `a: [M]` (negative),
    /// `b, c: [N, L, g, R]`, `d: [M]`, `h0: [N, M, P, R]` → `y: [N, L, M, P]`, `h: [N, M, P, R]`.
    /// Head `m` uses group `m·g/M`.  `block` is the block length kernels use; it does not change the meaning.
    SelectiveScan = "selective_scan" { block: usize = 64 }
}

op_struct! {
    /// `selective_scan_grad x, dt, a, b, c, d, h0, dy, dh` → gradients at the seven operands.
    SelectiveScanGrad = "selective_scan_grad" { block: usize = 64 }
}

fn check(x: &[&Ty], block: usize) -> Result<(), OpError> {
    float(x, 0)?;
    rank(x, 0, 4)?;
    rank(x, 3, 4)?;
    let dt = x[0].dtype;
    let (n, l, m, p) = (&x[0].shape[0], &x[0].shape[1], &x[0].shape[2], &x[0].shape[3]);
    let (g, r) = (&x[3].shape[2], &x[3].shape[3]);
    exactly(x, 1, dt, &[n, l, m])?;
    exactly(x, 2, dt, &[m])?;
    exactly(x, 3, dt, &[n, l, g, r])?;
    exactly(x, 4, dt, &[n, l, g, r])?;
    exactly(x, 5, dt, &[m])?;
    exactly(x, 6, dt, &[n, m, p, r])?;
    if let (Some(m), Some(g)) = (m.as_int(), g.as_int())
        && (g == 0 || m % g != 0)
    {
        return Err(mismatch(format!("{m} heads do not divide into {g} groups")));
    }
    if block == 0 {
        return Err(mismatch("block must be at least 1"));
    }
    Ok(())
}

/// FLOPs of the block form per token: `C·Bᵀ` and the products with `x` and the state.
fn flops(x: &[ConcreteTy], block: usize) -> f64 {
    let s = &x[0].shape;
    let (g, r) = (x[3].shape[2] as f64, x[3].shape[3] as f64);
    let q = block.min(s[1].max(1)) as f64;
    let (m, p) = (s[2] as f64, s[3] as f64);
    s[0] as f64 * s[1] as f64 * (q * r * g + q * m * p + 4.0 * m * p * r)
}

struct Scan<'a> {
    n: usize,
    l: usize,
    m: usize,
    p: usize,
    g: usize,
    r: usize,
    v: Vec<&'a [f64]>,
}

impl<'a> Scan<'a> {
    fn new(x: &[&'a HostArray]) -> Self {
        let (s, b) = (&x[0].shape, &x[3].shape);
        Self { n: s[0], l: s[1], m: s[2], p: s[3], g: b[2], r: b[3], v: x.iter().map(|a| a.f()).collect() }
    }
    fn x(&self, n: usize, t: usize, m: usize) -> usize {
        ((n * self.l + t) * self.m + m) * self.p
    }
    fn dt(&self, n: usize, t: usize, m: usize) -> usize {
        (n * self.l + t) * self.m + m
    }
    fn b(&self, n: usize, t: usize, m: usize) -> usize {
        ((n * self.l + t) * self.g + m * self.g / self.m) * self.r
    }
    fn h(&self, n: usize, m: usize) -> usize {
        (n * self.m + m) * self.p * self.r
    }
    /// `h_t` from `h_{t-1}`, in place.
    fn advance(&self, h: &mut [f64], n: usize, t: usize, m: usize) {
        let dt = self.v[1][self.dt(n, t, m)];
        let decay = (dt * self.v[2][m]).exp();
        for i in 0..self.p {
            for j in 0..self.r {
                let add = dt * self.v[0][self.x(n, t, m) + i] * self.v[3][self.b(n, t, m) + j];
                h[i * self.r + j] = decay * h[i * self.r + j] + add;
            }
        }
    }
}

impl OpDef for SelectiveScan {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 7)?;
        check(x, self.block)?;
        Ok(vec![x[0].clone(), x[6].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: flops(x, self.block), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let s = Scan::new(x);
        let (mut out, mut h) = (vec![0.0; y[0].elements()], s.v[6].to_vec());
        for n in 0..s.n {
            for m in 0..s.m {
                let h = &mut h[s.h(n, m)..][..s.p * s.r];
                for t in 0..s.l {
                    s.advance(h, n, t, m);
                    for i in 0..s.p {
                        let ch: f64 = (0..s.r).map(|j| h[i * s.r + j] * s.v[4][s.b(n, t, m) + j]).sum();
                        out[s.x(n, t, m) + i] = ch + s.v[5][m] * s.v[0][s.x(n, t, m) + i];
                    }
                }
            }
        }
        vec![HostArray::from_f64(&y[0], out), HostArray::from_f64(&y[1], h)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let (dy, dh) = (cx.dy(0), cx.dy(1));
        let x = [cx.x, &[dy, dh]].concat();
        Ok(cx.b.push_all(SelectiveScanGrad { block: self.block }, &x)[..7].iter().map(|&v| Some(v)).collect())
    }
}

impl OpDef for SelectiveScanGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 9)?;
        check(x, self.block)?;
        exactly(x, 7, x[0].dtype, &x[0].shape.iter().collect::<Vec<&Dim>>())?;
        exactly(x, 8, x[0].dtype, &x[6].shape.iter().collect::<Vec<&Dim>>())?;
        Ok(x[..7].iter().map(|t| (*t).clone()).collect())
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 3.0 * flops(x, self.block), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let s = Scan::new(x);
        let (dy, dh_final) = (s.v[7], s.v[8]);
        let mut d: Vec<Vec<f64>> = y.iter().map(|t| vec![0.0; t.elements()]).collect();
        for n in 0..s.n {
            for m in 0..s.m {
                let mut states = vec![s.v[6][s.h(n, m)..][..s.p * s.r].to_vec()];
                for t in 0..s.l {
                    let mut h = states[t].clone();
                    s.advance(&mut h, n, t, m);
                    states.push(h);
                }
                let mut dh = dh_final[s.h(n, m)..][..s.p * s.r].to_vec();
                for t in (0..s.l).rev() {
                    let (xi, ti, bi) = (s.x(n, t, m), s.dt(n, t, m), s.b(n, t, m));
                    let (dt, a) = (s.v[1][ti], s.v[2][m]);
                    let decay = (dt * a).exp();
                    for i in 0..s.p {
                        let (g, xv) = (dy[xi + i], s.v[0][xi + i]);
                        d[5][m] += g * xv;
                        d[0][xi + i] += g * s.v[5][m];
                        for j in 0..s.r {
                            let k = i * s.r + j;
                            d[4][bi + j] += g * states[t + 1][k];
                            dh[k] += g * s.v[4][bi + j];
                            let bv = s.v[3][bi + j];
                            d[0][xi + i] += dh[k] * dt * bv;
                            d[3][bi + j] += dh[k] * dt * xv;
                            d[1][ti] += dh[k] * (xv * bv + a * decay * states[t][k]);
                            d[2][m] += dh[k] * dt * decay * states[t][k];
                            dh[k] *= decay;
                        }
                    }
                }
                d[6][s.h(n, m)..][..s.p * s.r].copy_from_slice(&dh);
            }
        }
        d.into_iter().zip(y).map(|(d, t)| HostArray::from_f64(t, d)).collect()
    }
}
