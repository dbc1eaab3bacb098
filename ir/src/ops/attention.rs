//! Softmax attention within a sequence: the chunk encoder's, full causal attention, and the parts of sparse attention whose
//! keys need no choice: a window, a token's own chunk, compressed keys.
//!
//! Which keys a token at `t` sees is a range, given by attributes that cut it down together:
//!
//! - all; `causal`: keys up to `t`;
//! - `window = W`: the last `W` of them, `t - W + 1 ..= t`;
//! - `local = S`: those of `t`'s own chunk, `⌊t/S⌋·S ..= t`;
//! - `unit = S`: key `c` stands for the chunk `c` of `S` tokens and is seen once that is complete, `t >= (c + 1)·S`.
//!
//! A fourth operand `start: i32[N]` says where a sequence's first query stands among keys that came before it: inference.  Then
//! there may be more keys than queries, and `t` above is `start + t`.
//!
//! With `lse` the second result is the log-sum-exp of each row's scaled scores, by which [`Merge`](super::Merge) puts
//! attentions together.  A row that sees nothing gives 0 and -inf.

use super::softmax::softmax;
use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};
use std::ops::Range;

op_struct! {
    /// `attention q, k, v[, start]`: `q: [B, T, H, d]`, `k, v: [B, T, h, d]` (with `unit` `[B, C, h, d]`) → `[B, T, H, d]` and
    /// with `lse` `[B, T, H]`; query head `i` uses key head `i·h/H`.
    Attention = "attention" {
        scale: f64, causal: bool = false, window: usize = 0, local: usize = 0, unit: usize = 0, lse: bool = false,
    }
}

op_struct! {
    /// `attention_grad q, k, v, dy`, with `lse` `, dlse` → `dq`, `dk`, `dv`.
    AttentionGrad = "attention_grad" {
        scale: f64, causal: bool = false, window: usize = 0, local: usize = 0, unit: usize = 0, lse: bool = false,
    }
}

impl Attention {
    /// Attention to all keys, or to those up to each token.
    pub fn new(scale: f64, causal: bool) -> Self {
        Self { scale, causal, window: 0, local: 0, unit: 0, lse: false }
    }
    /// Keys that the token at `t` sees, of `keys`.
    pub fn visible(&self, t: usize, keys: usize) -> Range<usize> {
        if let Some(units) = t.checked_div(self.unit) {
            return 0..keys.min(units);
        }
        let end = if self.causal { keys.min(t + 1) } else { keys };
        let window = if self.window > 0 { (t + 1).saturating_sub(self.window) } else { 0 };
        let local = t.checked_div(self.local).unwrap_or(0) * self.local;
        window.max(local).min(end)..end
    }
    /// Whether rows see other keys than all, or all up to themselves.
    pub fn is_ranged(&self) -> bool {
        self.window > 0 || self.local > 0 || self.unit > 0
    }
    fn grad(&self) -> AttentionGrad {
        let Attention { scale, causal, window, local, unit, lse } = *self;
        AttentionGrad { scale, causal, window, local, unit, lse }
    }
    fn check(&self, x: &[&Ty], started: bool) -> Result<(), OpError> {
        float(x, 0)?;
        rank(x, 0, 4)?;
        rank(x, 1, 4)?;
        let (b, t, d) = (&x[0].shape[0], &x[0].shape[1], &x[0].shape[3]);
        let keys = if self.unit > 0 || started { &x[1].shape[1] } else { t };
        if started && !self.causal && self.unit == 0 {
            return Err(mismatch("queries that start behind keys see those up to themselves: say causal = true"));
        }
        let h = &x[1].shape[2];
        if x[1].shape[1] != *keys {
            return Err(mismatch(format!(
                "{} keys for {t} tokens: say unit = S, if a key stands for a chunk of S tokens",
                x[1].shape[1]
            )));
        }
        exactly(x, 1, x[0].dtype, &[b, keys, h, d])?;
        exactly(x, 2, x[0].dtype, &[b, keys, h, d])?;
        if self.unit > 0 && (self.causal || self.window > 0 || self.local > 0) {
            return Err(mismatch(
                "keys that stand for units are seen when they are complete: leave causal, window and local out",
            ));
        }
        if !self.causal && (self.window > 0 || self.local > 0) {
            return Err(mismatch("window and local are counted back from a token: say causal = true"));
        }
        match (x[0].shape[2].as_int(), h.as_int()) {
            (Some(q), Some(k)) if k > 0 && q % k == 0 => Ok(()),
            _ => Err(mismatch(format!("query heads {} must be a multiple of key heads {h}", x[0].shape[2]))),
        }
    }
    /// (row, key) pairs of one sequence and head.
    fn pairs(&self, x: &[ConcreteTy]) -> f64 {
        let (t, keys) = (x[0].shape[1], x[1].shape[1]);
        let (tf, c) = (t as f64, keys as f64);
        match self {
            _ if self.unit > 0 || self.local > 0 && self.window > 0 => {
                (0..t).map(|t| self.visible(t, keys).len() as f64).sum()
            }
            _ if self.local > 0 => tf * 0.5 * (self.local + 1) as f64,
            _ if self.window > 0 => {
                let w = (self.window as f64).min(tf);
                tf * w - 0.5 * w * (w - 1.0)
            }
            _ => tf * c * if self.causal { 0.5 } else { 1.0 },
        }
    }
    fn flops(&self, x: &[ConcreteTy]) -> f64 {
        let s = &x[0].shape;
        4.0 * s[0] as f64 * s[2] as f64 * s[3] as f64 * self.pairs(x)
    }
}

impl AttentionGrad {
    /// The op that this is the gradient of.
    pub fn forward(&self) -> Attention {
        let AttentionGrad { scale, causal, window, local, unit, lse } = *self;
        Attention { scale, causal, window, local, unit, lse }
    }
}

struct Attn<'a> {
    op: Attention,
    b: usize,
    t: usize,
    keys: usize,
    hq: usize,
    hk: usize,
    d: usize,
    v: Vec<&'a [f64]>,
    start: Option<&'a [i32]>,
}

impl<'a> Attn<'a> {
    fn new(x: &[&'a HostArray], op: Attention) -> Self {
        let s = &x[0].shape;
        let v = x.iter().filter(|a| a.dtype.is_float()).map(|a| a.f()).collect();
        let start = x.iter().find(|a| a.dtype == DType::I32).map(|a| a.i());
        Self { op, b: s[0], t: s[1], keys: x[1].shape[1], hq: s[2], hk: x[1].shape[2], d: s[3], v, start }
    }
    fn rows(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<> {
        let (b, t, hq) = (self.b, self.t, self.hq);
        (0..b * t * hq).map(move |row| (row / (t * hq), row / hq % t, row % hq))
    }
    fn q(&self, b: usize, t: usize, h: usize) -> usize {
        ((b * self.t + t) * self.hq + h) * self.d
    }
    fn k(&self, b: usize, t: usize, h: usize) -> usize {
        ((b * self.keys + t) * self.hk + h * self.hk / self.hq) * self.d
    }
    /// Keys, softmax row and log-sum-exp of query `(b, t, h)`.
    fn probs(&self, b: usize, t: usize, h: usize) -> (Range<usize>, Vec<f64>, f64) {
        let q = &self.v[0][self.q(b, t, h)..][..self.d];
        let keys = self.op.visible(t + self.start.map_or(0, |s| s[b].max(0) as usize), self.keys);
        let dot = |s| q.iter().zip(&self.v[1][self.k(b, s, h)..]).map(|(a, c)| a * c).sum::<f64>();
        let z: Vec<f64> = keys.clone().map(|s| self.op.scale * dot(s)).collect();
        let (p, lse) = softmax(&z);
        (keys, p, lse)
    }
}

impl OpDef for Attention {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        let started = x.len() == 4;
        arity(x, if started { 4 } else { 3 })?;
        self.check(x, started)?;
        let s = &x[0].shape;
        if started {
            exactly(x, 3, DType::I32, &[&s[0]])?;
        }
        let lse = self.lse.then(|| Ty::new(x[0].dtype, [&s[0], &s[1], &s[2]].map(Dim::clone)));
        Ok([x[0].clone()].into_iter().chain(lse).collect())
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: self.flops(x), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let a = Attn::new(x, self.clone());
        let (mut out, mut all) = (vec![0.0; y[0].elements()], vec![]);
        for (b, t, h) in a.rows() {
            let (keys, p, lse) = a.probs(b, t, h);
            all.push(lse);
            for (s, p) in keys.zip(p) {
                (0..a.d).for_each(|i| out[a.q(b, t, h) + i] += p * a.v[2][a.k(b, s, h) + i]);
            }
        }
        let lse = y.get(1).map(|t| HostArray::from_f64(t, all));
        [HostArray::from_f64(&y[0], out)].into_iter().chain(lse).collect()
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        if cx.x.len() > 3 {
            return Err(mismatch("has no gradient where queries start behind keys, which is for inference"));
        }
        let mut x = vec![cx.x[0], cx.x[1], cx.x[2], cx.dy(0)];
        if self.lse {
            x.push(cx.dy(1));
        }
        Ok(cx.b.push_all(self.grad(), &x)[..3].iter().map(|&v| Some(v)).collect())
    }
}

impl OpDef for AttentionGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, if self.lse { 5 } else { 4 })?;
        self.forward().check(x, false)?;
        let s = &x[0].shape;
        exactly(x, 3, x[0].dtype, &s.iter().collect::<Vec<_>>())?;
        if self.lse {
            exactly(x, 4, x[0].dtype, &[&s[0], &s[1], &s[2]])?;
        }
        Ok(x[..3].iter().map(|t| (*t).clone()).collect())
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 2.5 * self.forward().flops(x), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let a = Attn::new(x, self.forward());
        let mut d: Vec<Vec<f64>> = y.iter().map(|t| vec![0.0; t.elements()]).collect();
        for (b, t, h) in a.rows() {
            let q = a.q(b, t, h);
            let (keys, p, _) = a.probs(b, t, h);
            let dp: Vec<f64> =
                keys.clone().map(|s| (0..a.d).map(|i| a.v[3][q + i] * a.v[2][a.k(b, s, h) + i]).sum()).collect();
            let delta: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
            let dlse = if self.lse { a.v[4][q / a.d.max(1)] } else { 0.0 };
            for (j, s) in keys.enumerate() {
                let k = a.k(b, s, h);
                let ds = p[j] * (dp[j] - delta + dlse) * self.scale;
                for i in 0..a.d {
                    d[0][q + i] += ds * a.v[1][k + i];
                    d[1][k + i] += ds * a.v[0][q + i];
                    d[2][k + i] += p[j] * a.v[3][q + i];
                }
            }
        }
        d.into_iter().zip(y).map(|(d, t)| HostArray::from_f64(t, d)).collect()
    }
}
