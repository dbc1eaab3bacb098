//! Attention of every token within each chunk it selected: one softmax per selected chunk.
//!
//! `o[t, head, slot] = softmax_j(scale · q·k_j)·v` over the `chunk` keys of the slot's chunk.  `off_by_one` adds that
//! many zero logits to the denominator.  Query head `i` uses key head `i·h/H`.  Unfilled slots give 0.
//!
//! `joint`: one softmax over the keys of all chosen chunks, `o[t, head]`, and with it the log-sum-exp of the scaled scores,
//! by which [`Merge`](super::Merge) adds what was attended elsewhere, a token's own chunk for one.  It needs no weights and
//! no aggregation: no output of a chunk is ever in memory.

use super::softmax::softmax;
use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, div, exactly, float, mismatch, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `attend q, k, v, indices, count`: `q: [N, L, H, d]`, `k, v: [N, T, h, d]`, `indices: i32[N, L, h, K]`,
    /// `count: i32[N, L, h]` → `[N, L, H, K, d]`; with `joint` `[N, L, H, d]` and the log-sum-exp `[N, L, H]`.
    Attend = "attend" { chunk: usize, scale: f64, off_by_one: f64 = 0.0, joint: bool = false }
}

op_struct! {
    /// `attend_grad q, k, v, indices, count, do` → `dq`, `dk`, `dv`; with `joint` the operands are `q, k, v, indices, count,
    /// o, lse, do, dlse`.
    AttendGrad = "attend_grad" { chunk: usize, scale: f64, off_by_one: f64 = 0.0, joint: bool = false }
}

/// Checks the five operands that attending ops share.
pub(super) fn check(x: &[&Ty], chunk: usize) -> Result<(), OpError> {
    float(x, 0)?;
    (0..4).try_for_each(|i| rank(x, i, 4))?;
    let (q, k, i) = (&x[0].shape, &x[1].shape, &x[3].shape);
    exactly(x, 1, x[0].dtype, &[&q[0], &k[1], &k[2], &q[3]])?;
    exactly(x, 2, x[0].dtype, &[&q[0], &k[1], &k[2], &q[3]])?;
    if i[2] != k[2] {
        return Err(mismatch(format!(
            "chunks were chosen for {} heads, but there are {} key heads, and query heads that share one attend the same chunks: \
             score by the sum of their queries, reshape {{shape = [N, L, kv_heads, heads/kv_heads, dim]}}, reduce {{f = sum, axes = [3]}}",
            i[2], k[2]
        )));
    }
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
    // No more slots are filled than there are chunks.
    let slots = x[3].shape[3].min(x[1].shape[1] / chunk.max(1));
    4.0 * x[0].elements() as f64 * (chunk * slots) as f64
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
        self.scores(|row, slot, first, z| {
            let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let e: Vec<f64> = z.iter().map(|z| (z - top).exp()).collect();
            let sum = e.iter().sum::<f64>() + if self.off == 0.0 { 0.0 } else { self.off * (-top).exp() };
            let p: Vec<f64> = e.iter().map(|e| e / sum).collect();
            f(row, slot, first, &p);
        });
    }

    /// Calls `f(q row, slot, first key row, scaled scores)` for every filled slot of every query row.
    fn scores(&self, mut f: impl FnMut(usize, usize, usize, &[f64])) {
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
                f(row, slot, first, &z);
            }
        }
    }
    /// As [`each`](Self::each) for every query row at once: its filled slots' first key rows with the probabilities of one
    /// softmax over all of them, and the log-sum-exp.
    fn each_joint(&self, mut f: impl FnMut(usize, &[(usize, Vec<f64>)], f64)) {
        let mut rows: Vec<Vec<(usize, Vec<f64>)>> = vec![vec![]; self.n * self.l * self.hq];
        self.scores(|row, _, first, z| rows[row].push((first, z.to_vec())));
        for (row, mut slots) in rows.into_iter().enumerate() {
            let mut z: Vec<f64> = slots.iter().flat_map(|s| s.1.iter().copied()).collect();
            // A zero logit, so many times.
            z.push(if self.off == 0.0 { f64::NEG_INFINITY } else { self.off.ln() });
            let (p, lse) = softmax(&z);
            for (slot, p) in slots.iter_mut().zip(p.chunks(self.chunk)) {
                slot.1 = p[..self.chunk].to_vec();
            }
            f(row, &slots, lse);
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
        let dp: Vec<f64> = (0..p.len())
            .map(|j| g.iter().zip(&self.v[first + j * self.key_step()..]).map(|(g, v)| g * v).sum())
            .collect();
        let delta: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
        self.spread(row, first, p, g, (&dp, delta), out);
    }

    /// The rest of [`backward`](Self::backward) once `dp = g·v` and the mean that is subtracted from it are known.
    fn spread(&self, row: usize, first: usize, p: &[f64], g: &[f64], (dp, delta): (&[f64], f64), out: &mut [Vec<f64>]) {
        let q0 = row * self.d;
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
        if self.joint {
            return Ok(vec![x[0].clone(), Ty::new(x[0].dtype, q[..3].iter().cloned())]);
        }
        Ok(vec![Ty::new(x[0].dtype, [&q[0], &q[1], &q[2], &x[3].shape[3], &q[3]].map(Dim::clone))])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: flops(x, self.chunk), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let a = Attending::new(x, self.chunk, self.scale, self.off_by_one);
        let mut out = vec![0.0; y[0].elements()];
        if self.joint {
            let mut all = vec![];
            a.each_joint(|row, slots, lse| {
                all.push(lse);
                for (first, p) in slots {
                    a.mix(*first, p).iter().zip(&mut out[row * a.d..]).for_each(|(o, y)| *y += o);
                }
            });
            return vec![HostArray::from_f64(&y[0], out), HostArray::from_f64(&y[1], all)];
        }
        let (d, slots) = (y[0].shape[4], y[0].shape[3]);
        a.each(|row, slot, first, p| out[(row * slots + slot) * d..][..d].copy_from_slice(&a.mix(first, p)));
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let mut x = cx.x.to_vec();
        if self.joint {
            x.extend([cx.y[0], cx.y[1], cx.dy(0), cx.dy(1)]);
        } else {
            x.push(cx.dy(0));
        }
        let Attend { chunk, scale, off_by_one, joint } = *self;
        let d = cx.b.push_all(AttendGrad { chunk, scale, off_by_one, joint }, &x);
        Ok(vec![Some(d[0]), Some(d[1]), Some(d[2]), None, None])
    }
}

impl OpDef for AttendGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, if self.joint { 9 } else { 6 })?;
        check(x, self.chunk)?;
        let q = &x[0].shape;
        if self.joint {
            for i in [5, 7] {
                exactly(x, i, x[0].dtype, &q.iter().collect::<Vec<_>>())?;
                exactly(x, i + 1, x[0].dtype, &[&q[0], &q[1], &q[2]])?;
            }
        } else {
            exactly(x, 5, x[0].dtype, &[&q[0], &q[1], &q[2], &x[3].shape[3], &q[3]])?;
        }
        Ok(x[..3].iter().map(|t| (*t).clone()).collect())
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 2.5 * flops(x, self.chunk), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let a = Attending::new(x, self.chunk, self.scale, self.off_by_one);
        let mut out: Vec<Vec<f64>> = y.iter().map(|t| vec![0.0; t.elements()]).collect();
        if self.joint {
            let (g, dlse) = (x[7].f(), x[8].f());
            a.each_joint(|row, slots, _| {
                let g = &g[row * a.d..][..a.d];
                let dot =
                    |first: usize, j: usize| g.iter().zip(&a.v[first + j * a.key_step()..]).map(|(g, v)| g * v).sum();
                let dp: Vec<Vec<f64>> =
                    slots.iter().map(|(first, p)| (0..p.len()).map(|j| dot(*first, j)).collect()).collect();
                let terms = slots.iter().zip(&dp).flat_map(|((_, p), dp)| p.iter().zip(dp).map(|(p, d)| p * d));
                let delta = terms.sum::<f64>() - dlse[row];
                for ((first, p), dp) in slots.iter().zip(&dp) {
                    a.spread(row, *first, p, g, (dp, delta), &mut out);
                }
            });
        } else {
            let (d, slots) = (x[5].shape[4], x[5].shape[3]);
            let g = x[5].f();
            a.each(|row, slot, first, p| a.backward(row, first, p, &g[(row * slots + slot) * d..][..d], &mut out));
        }
        out.into_iter().zip(y).map(|(o, t)| HostArray::from_f64(t, o)).collect()
    }
}
