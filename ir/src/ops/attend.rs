//! Attention of every token within each chunk it selected: one softmax per selected chunk.
//!
//! `o[t, head, slot] = softmax_j(scale · q·k_j)·v` over the `chunk` keys of the slot's chunk.  `off_by_one` adds that
//! many zero logits to the denominator.  Query head `i` uses key head `i·h/H`.  Unfilled slots give 0.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, div, exactly, float, mismatch, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `attend q, k, v, indices, count`: `q: [N, L, H, d]`, `k, v: [N, T, h, d]`, `indices: i32[N, L, h, K]`,
    /// `count: i32[N, L, h]` → `[N, L, H, K, d]`.
    Attend = "attend" { chunk: usize, scale: f64, off_by_one: f64 = 0.0 }
}

op_struct! {
    /// `attend_grad q, k, v, indices, count, do` → `dq`, `dk`, `dv`.
    AttendGrad = "attend_grad" { chunk: usize, scale: f64, off_by_one: f64 = 0.0 }
}

/// Checks the five operands that attending ops share.
pub(super) fn check(x: &[&Ty], chunk: usize) -> Result<(), OpError> {
    float(x, 0)?;
    (0..4).try_for_each(|i| rank(x, i, 4))?;
    let (q, k, i) = (&x[0].shape, &x[1].shape, &x[3].shape);
    exactly(x, 1, x[0].dtype, &[&q[0], &k[1], &k[2], &q[3]])?;
    exactly(x, 2, x[0].dtype, &[&q[0], &k[1], &k[2], &q[3]])?;
    exactly(x, 3, DType::I32, &[&q[0], &q[1], &k[2], &i[3]])?;
    exactly(x, 4, DType::I32, &[&q[0], &q[1], &k[2]])?;
    div(&k[1], chunk, "chunk")?;
    match (q[2].as_int(), k[2].as_int()) {
        (Some(a), Some(b)) if b > 0 && a % b == 0 => Ok(()),
        _ => Err(mismatch(format!("query heads {} must be a multiple of key heads {}", q[2], k[2]))),
    }
}

/// FLOPs of the forward: two products per (token, head, filled slot) with a chunk.
pub(super) fn flops(x: &[ConcreteTy], chunk: usize) -> f64 {
    4.0 * x[0].elements() as f64 * (chunk * x[3].shape[3]) as f64
}

/// The reference's view of attending.
pub(super) struct Attending<'a> {
    q: &'a [f64],
    k: &'a [f64],
    v: &'a [f64],
    idx: &'a [i32],
    count: &'a [i32],
    n: usize,
    l: usize,
    t: usize,
    hq: usize,
    hk: usize,
    d: usize,
    slots: usize,
    chunk: usize,
    scale: f64,
    off: f64,
}

impl<'a> Attending<'a> {
    pub(super) fn new(x: &[&'a HostArray], chunk: usize, scale: f64, off: f64) -> Self {
        let (s, ks) = (&x[0].shape, &x[1].shape);
        Self {
            q: x[0].f(),
            k: x[1].f(),
            v: x[2].f(),
            idx: x[3].i(),
            count: x[4].i(),
            n: s[0],
            l: s[1],
            t: ks[1],
            hq: s[2],
            hk: ks[2],
            d: s[3],
            slots: x[3].shape[3],
            chunk,
            scale,
            off,
        }
    }

    /// Calls `f(q row, slot, output row, first key row, probabilities)` for every filled slot of every query row; `key row`
    /// steps by `key_step` per token of the chunk.
    pub(super) fn each(&self, mut f: impl FnMut(usize, usize, usize, &[f64])) {
        for row in 0..self.n * self.l * self.hq {
            let (b, t, h) = (row / (self.l * self.hq), row / self.hq % self.l, row % self.hq);
            let kv = h * self.hk / self.hq;
            let sel = (b * self.l + t) * self.hk + kv;
            for slot in 0..self.count[sel] as usize {
                let c = self.idx[sel * self.slots + slot] as usize;
                let first = ((b * self.t + c * self.chunk) * self.hk + kv) * self.d;
                let q = &self.q[row * self.d..][..self.d];
                let z: Vec<f64> = (0..self.chunk)
                    .map(|j| {
                        let k = &self.k[first + j * self.key_step()..][..self.d];
                        self.scale * q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>()
                    })
                    .collect();
                let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let e: Vec<f64> = z.iter().map(|z| (z - top).exp()).collect();
                let sum = e.iter().sum::<f64>() + if self.off == 0.0 { 0.0 } else { self.off * (-top).exp() };
                let p: Vec<f64> = e.iter().map(|e| e / sum).collect();
                f(row, slot, first, &p);
            }
        }
    }
    pub(super) fn key_step(&self) -> usize {
        self.hk * self.d
    }
    /// Position of slot 0's weight for query row `row` in `[N, L, h, K]`.
    pub(super) fn weight_at(&self, row: usize) -> usize {
        let (bt, h) = (row / self.hq, row % self.hq);
        (bt * self.hk + h * self.hk / self.hq) * self.slots
    }
    pub(super) fn dim(&self) -> usize {
        self.d
    }

    /// `Σ_j p_j v_j`.
    pub(super) fn mix(&self, first: usize, p: &[f64]) -> Vec<f64> {
        (0..self.d)
            .map(|i| p.iter().enumerate().map(|(j, p)| p * self.v[first + j * self.key_step() + i]).sum())
            .collect()
    }

    /// Adds the gradients that `g`, the gradient at one slot's output, causes at `q`, `k`, `v`.
    pub(super) fn backward(&self, row: usize, first: usize, p: &[f64], g: &[f64], out: &mut [Vec<f64>]) {
        let q0 = row * self.d;
        let dp: Vec<f64> = (0..p.len())
            .map(|j| g.iter().zip(&self.v[first + j * self.key_step()..]).map(|(g, v)| g * v).sum())
            .collect();
        let delta: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
        for j in 0..p.len() {
            let k0 = first + j * self.key_step();
            let dz = p[j] * (dp[j] - delta) * self.scale;
            for i in 0..self.d {
                out[0][q0 + i] += dz * self.k[k0 + i];
                out[1][k0 + i] += dz * self.q[q0 + i];
                out[2][k0 + i] += p[j] * g[i];
            }
        }
    }
}

impl OpDef for Attend {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 5)?;
        check(x, self.chunk)?;
        let q = &x[0].shape;
        Ok(vec![Ty::new(x[0].dtype, [&q[0], &q[1], &q[2], &x[3].shape[3], &q[3]].map(Dim::clone))])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: flops(x, self.chunk), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let a = Attending::new(x, self.chunk, self.scale, self.off_by_one);
        let (d, slots) = (y[0].shape[4], y[0].shape[3]);
        let mut out = vec![0.0; y[0].elements()];
        a.each(|row, slot, first, p| out[(row * slots + slot) * d..][..d].copy_from_slice(&a.mix(first, p)));
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dy = cx.dy(0);
        let g = AttendGrad { chunk: self.chunk, scale: self.scale, off_by_one: self.off_by_one };
        let d = cx.b.push_all(g, &[cx.x, &[dy]].concat());
        Ok(vec![Some(d[0]), Some(d[1]), Some(d[2]), None, None])
    }
}

impl OpDef for AttendGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 6)?;
        check(x, self.chunk)?;
        let q = &x[0].shape;
        exactly(x, 5, x[0].dtype, &[&q[0], &q[1], &q[2], &x[3].shape[3], &q[3]])?;
        Ok(x[..3].iter().map(|t| (*t).clone()).collect())
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 2.5 * flops(x, self.chunk), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let a = Attending::new(x, self.chunk, self.scale, self.off_by_one);
        let mut out: Vec<Vec<f64>> = y.iter().map(|t| vec![0.0; t.elements()]).collect();
        let (d, slots) = (x[5].shape[4], x[5].shape[3]);
        a.each(|row, slot, first, p| a.backward(row, first, p, &x[5].f()[(row * slots + slot) * d..][..d], &mut out));
        out.into_iter().zip(y).map(|(o, t)| HostArray::from_f64(t, o)).collect()
    }
}
