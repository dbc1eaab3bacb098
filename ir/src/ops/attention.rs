//! Softmax attention within short sequences: the chunk encoder's, or full causal attention as a baseline.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, rank, traffic};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `attention q, k, v`: `q: [B, T, H, d]`, `k, v: [B, T, h, d]` → `[B, T, H, d]`; query head `i` uses key head `i·h/H`.
    Attention = "attention" { scale: f64, causal: bool = false }
}

op_struct! {
    /// `attention_grad q, k, v, dy` → `dq`, `dk`, `dv`.
    AttentionGrad = "attention_grad" { scale: f64, causal: bool = false }
}

fn check(x: &[&Ty]) -> Result<(), OpError> {
    float(x, 0)?;
    rank(x, 0, 4)?;
    rank(x, 1, 4)?;
    let (b, t, d) = (&x[0].shape[0], &x[0].shape[1], &x[0].shape[3]);
    let h = &x[1].shape[2];
    exactly(x, 1, x[0].dtype, &[b, t, h, d])?;
    exactly(x, 2, x[0].dtype, &[b, t, h, d])?;
    match (x[0].shape[2].as_int(), h.as_int()) {
        (Some(q), Some(k)) if k > 0 && q % k == 0 => Ok(()),
        (q, k) => Err(mismatch(format!("query heads {q:?} must be a multiple of key heads {k:?}"))),
    }
}

struct Attn<'a> {
    b: usize,
    t: usize,
    hq: usize,
    hk: usize,
    d: usize,
    v: Vec<&'a [f64]>,
    scale: f64,
    causal: bool,
}

impl<'a> Attn<'a> {
    fn new(x: &[&'a HostArray], scale: f64, causal: bool) -> Self {
        let s = &x[0].shape;
        let v = x.iter().map(|a| a.f()).collect();
        Self { b: s[0], t: s[1], hq: s[2], hk: x[1].shape[2], d: s[3], v, scale, causal }
    }
    fn q(&self, b: usize, t: usize, h: usize) -> usize {
        ((b * self.t + t) * self.hq + h) * self.d
    }
    fn k(&self, b: usize, t: usize, h: usize) -> usize {
        ((b * self.t + t) * self.hk + h * self.hk / self.hq) * self.d
    }
    /// Softmax row of query `(b, t, h)`.
    fn probs(&self, b: usize, t: usize, h: usize) -> Vec<f64> {
        let q = &self.v[0][self.q(b, t, h)..][..self.d];
        let keys = if self.causal { t + 1 } else { self.t };
        let z: Vec<f64> = (0..keys)
            .map(|s| self.scale * q.iter().zip(&self.v[1][self.k(b, s, h)..]).map(|(a, c)| a * c).sum::<f64>())
            .collect();
        let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let e: Vec<f64> = z.iter().map(|z| (z - top).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.iter().map(|e| e / sum).collect()
    }
}

fn flops(x: &[ConcreteTy], causal: bool) -> f64 {
    let s = &x[0].shape;
    let pairs = s[1] as f64 * s[1] as f64 * if causal { 0.5 } else { 1.0 };
    4.0 * s[0] as f64 * s[2] as f64 * s[3] as f64 * pairs
}

impl OpDef for Attention {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 3)?;
        check(x)?;
        Ok(vec![x[0].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: flops(x, self.causal), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let a = Attn::new(x, self.scale, self.causal);
        let mut out = vec![0.0; y[0].elements()];
        for (b, t, h) in (0..a.b).flat_map(|b| (0..a.t).flat_map(move |t| (0..a.hq).map(move |h| (b, t, h)))) {
            for (s, p) in a.probs(b, t, h).into_iter().enumerate() {
                (0..a.d).for_each(|i| out[a.q(b, t, h) + i] += p * a.v[2][a.k(b, s, h) + i]);
            }
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dy = cx.dy(0);
        let g = AttentionGrad { scale: self.scale, causal: self.causal };
        Ok(cx.b.push_all(g, &[cx.x[0], cx.x[1], cx.x[2], dy])[..3].iter().map(|&v| Some(v)).collect())
    }
}

impl OpDef for AttentionGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 4)?;
        check(x)?;
        exactly(x, 3, x[0].dtype, &x[0].shape.iter().collect::<Vec<_>>())?;
        Ok(x[..3].iter().map(|t| (*t).clone()).collect())
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 2.5 * flops(x, self.causal), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let a = Attn::new(x, self.scale, self.causal);
        let mut d: Vec<Vec<f64>> = y.iter().map(|t| vec![0.0; t.elements()]).collect();
        for (b, t, h) in (0..a.b).flat_map(|b| (0..a.t).flat_map(move |t| (0..a.hq).map(move |h| (b, t, h)))) {
            let q = a.q(b, t, h);
            let p = a.probs(b, t, h);
            let dp: Vec<f64> =
                (0..p.len()).map(|s| (0..a.d).map(|i| a.v[3][q + i] * a.v[2][a.k(b, s, h) + i]).sum()).collect();
            let delta: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
            for s in 0..p.len() {
                let k = a.k(b, s, h);
                let ds = p[s] * (dp[s] - delta) * a.scale;
                for i in 0..a.d {
                    d[0][q + i] += ds * a.v[1][k + i];
                    d[1][k + i] += ds * a.v[0][q + i];
                    d[2][k + i] += p[s] * a.v[3][q + i];
                }
            }
        }
        d.into_iter().zip(y).map(|(d, t)| HostArray::from_f64(t, d)).collect()
    }
}
