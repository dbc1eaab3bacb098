//! Scores of chunks for tokens: `score[t, c] = scale · q_t · landmark_c`, `-inf` unless the chunk is complete.
//!
//! Token `start + t` sees chunk `c` exactly if `start + t >= (c + 1)·chunk`.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, rank, traffic};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `score q, landmarks, start`: `q: [N, L, H, r]`, `landmarks: [N, C, h, r]`, `start: i32[N]` (the position of a
    /// sequence's first query) → `[N, L, H, C]`; query head `i` uses landmarks of head `i·h/H`.
    Score = "score" { chunk: usize, scale: f64 }
}

op_struct! {
    /// `score_grad q, landmarks, ds` → `dq`, `dlandmarks`.  `ds` is 0 where the score is `-inf`.
    ScoreGrad = "score_grad" { scale: f64 }
}

/// Checks `q: [N, L, H, r]` and `landmarks: [N, C, h, r]` with `H` a multiple of `h`.
fn check_heads(x: &[&Ty]) -> Result<(), OpError> {
    float(x, 0)?;
    rank(x, 0, 4)?;
    rank(x, 1, 4)?;
    let (q, lm) = (&x[0].shape, &x[1].shape);
    exactly(x, 1, x[0].dtype, &[&q[0], &lm[1], &lm[2], &q[3]])?;
    match (q[2].as_int(), lm[2].as_int()) {
        (Some(a), Some(b)) if b > 0 && a % b == 0 => Ok(()),
        _ => Err(mismatch(format!(
            "query heads {} must be a multiple of the landmarks' heads {}: sum the queries of each group alone, reshape {{shape = \
             [N, L, kv_heads, heads/kv_heads, dim]}}, reduce {{f = sum, axes = [3]}}",
            q[2], lm[2]
        ))),
    }
}

/// Checks `q: [N, L, h, r]` and `landmarks: [N, C, h, r]`.
pub(super) fn check_q_landmarks(x: &[&Ty]) -> Result<(), OpError> {
    float(x, 0)?;
    rank(x, 0, 4)?;
    rank(x, 1, 4)?;
    let (q, c) = (&x[0].shape, &x[1].shape[1]);
    exactly(x, 1, x[0].dtype, &[&q[0], c, &q[2], &q[3]])
}

/// Whether the token at `pos` sees chunk `c`, which is complete then.
pub(super) fn visible(pos: i64, c: usize, chunk: usize) -> bool {
    pos >= ((c + 1) * chunk) as i64
}

/// All scores, row-major `[N, L, h, C]`.
pub(super) fn scores(q: &HostArray, lm: &HostArray, start: &[i32], chunk: usize, scale: f64) -> Vec<f64> {
    let (n, l, h, r, c, hl) = (q.shape[0], q.shape[1], q.shape[2], q.shape[3], lm.shape[1], lm.shape[2]);
    let mut out = Vec::with_capacity(n * l * h * c);
    for row in 0..n * l * h {
        let (b, t, head) = (row / (l * h), row / h % l, row % h * hl / h);
        for k in 0..c {
            out.push(if visible(start[b] as i64 + t as i64, k, chunk) {
                let lm = &lm.f()[((b * c + k) * hl + head) * r..][..r];
                scale * q.f()[row * r..][..r].iter().zip(lm).map(|(a, b)| a * b).sum::<f64>()
            } else {
                f64::NEG_INFINITY
            });
        }
    }
    out
}

/// Gradients at `q` and `landmarks` from dense `ds`.
pub(super) fn scores_grad(q: &HostArray, lm: &HostArray, ds: &[f64], scale: f64) -> (Vec<f64>, Vec<f64>) {
    let (l, h, r, c, hl) = (q.shape[1], q.shape[2], q.shape[3], lm.shape[1], lm.shape[2]);
    let (mut dq, mut dl) = (vec![0.0; q.len()], vec![0.0; lm.len()]);
    for (i, &g) in ds.iter().enumerate().filter(|(_, g)| **g != 0.0) {
        let (row, k) = (i / c, i % c);
        let at = ((row / (l * h) * c + k) * hl + row % h * hl / h) * r;
        for j in 0..r {
            dq[row * r + j] += scale * g * lm.f()[at + j];
            dl[at + j] += scale * g * q.f()[row * r + j];
        }
    }
    (dq, dl)
}

impl OpDef for Score {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 3)?;
        check_heads(x)?;
        exactly(x, 2, DType::I32, &[&x[0].shape[0]])?;
        if self.chunk == 0 {
            return Err(mismatch("chunk must be at least 1"));
        }
        let q = &x[0].shape;
        Ok(vec![Ty::new(x[0].dtype, [&q[0], &q[1], &q[2], &x[1].shape[1]].map(Clone::clone))])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 2.0 * x[0].shape[3] as f64 * y[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        vec![HostArray::from_f64(&y[0], scores(x[0], x[1], x[2].i(), self.chunk, self.scale))]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let ds = cx.dy(0);
        let d = cx.b.push_all(ScoreGrad { scale: self.scale }, &[cx.x[0], cx.x[1], ds]);
        Ok(vec![Some(d[0]), Some(d[1]), None])
    }
}

impl OpDef for ScoreGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 3)?;
        check_heads(x)?;
        let q = &x[0].shape;
        exactly(x, 2, x[0].dtype, &[&q[0], &q[1], &q[2], &x[1].shape[1]])?;
        Ok(vec![x[0].clone(), x[1].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 4.0 * x[0].shape[3] as f64 * x[2].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let (dq, dl) = scores_grad(x[0], x[1], x[2].f(), self.scale);
        vec![HostArray::from_f64(&y[0], dq), HostArray::from_f64(&y[1], dl)]
    }
}
