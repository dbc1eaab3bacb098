//! Score, causal mask, top-k, order and weights as one op: scores never reach memory, in either direction.
//!
//! Made by the pass `fuse_selection` from `score`, `select` and `weigh` (and their gradients); means exactly their
//! composition.

use super::score::{check_q_landmarks, scores, scores_grad};
use super::select::{Order, choose};
use super::weigh::Weighting;
use super::{Cost, OpDef, OpError, arity, exactly, mismatch, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `selection q, landmarks, start` → indices `i32[N, L, h, k]`, count `i32[N, L, h]`, weights `[N, L, h, k]`, and the
    /// scores of the filled slots `[N, L, h, k]` (0 elsewhere).  Operands as [`Score`](super::Score).
    Selection = "selection" { chunk: usize, scale: f64, k: usize, order: Order = Order::Recent, rule: Weighting }
}

op_struct! {
    /// `selection_grad q, landmarks, indices, count, scores, weights, dweights` → `dq`, `dlandmarks`.
    SelectionGrad = "selection_grad" { scale: f64, rule: Weighting }
}

impl OpDef for Selection {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 3)?;
        check_q_landmarks(x)?;
        exactly(x, 2, DType::I32, &[&x[0].shape[0]])?;
        if self.chunk == 0 || self.k == 0 {
            return Err(mismatch("chunk and k must be at least 1"));
        }
        let rows = &x[0].shape[..3];
        let slots = Ty::i32(rows.iter().chain([&Dim::int(self.k)]).cloned());
        let weights = slots.with_dtype(x[0].dtype);
        Ok(vec![slots, Ty::i32(rows.iter().cloned()), weights.clone(), weights])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        let pairs = y[1].elements() as f64 * x[1].shape[1] as f64;
        Cost { flops: 2.0 * x[0].shape[3] as f64 * pairs, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let c = x[1].shape[1];
        let all = scores(x[0], x[1], x[2].i(), self.chunk, self.scale);
        let (mut idx, mut count) = (vec![], vec![]);
        let (mut w, mut s) = (vec![self.rule.unfilled(); y[2].elements()], vec![0.0; y[3].elements()]);
        for row in 0..y[1].elements() {
            let r = &all[row * c..][..c];
            let chosen = choose(r, self.k, self.order, (0, 0));
            let picked: Vec<f64> = chosen.iter().map(|&c| r[c]).collect();
            count.push(chosen.len() as i32);
            idx.extend((0..self.k).map(|i| chosen.get(i).map_or(0, |&c| c as i32)));
            w[row * self.k..][..chosen.len()].copy_from_slice(&self.rule.weights(&picked));
            s[row * self.k..][..chosen.len()].copy_from_slice(&picked);
        }
        vec![
            HostArray::i32(&y[0].shape, idx),
            HostArray::i32(&y[1].shape, count),
            HostArray::from_f64(&y[2], w),
            HostArray::from_f64(&y[3], s),
        ]
    }
}

impl OpDef for SelectionGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 7)?;
        check_q_landmarks(x)?;
        rank(x, 2, 4)?;
        let (q, k) = (&x[0].shape, &x[2].shape[3]);
        exactly(x, 2, DType::I32, &[&q[0], &q[1], &q[2], k])?;
        exactly(x, 3, DType::I32, &[&q[0], &q[1], &q[2]])?;
        (4..7).try_for_each(|i| exactly(x, i, x[0].dtype, &[&q[0], &q[1], &q[2], k]))?;
        Ok(vec![x[0].clone(), x[1].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        // No more slots are filled than there are chunks.
        let slots = x[3].elements() * x[2].shape[3].min(x[1].shape[1]);
        Cost { flops: 4.0 * x[0].shape[3] as f64 * slots as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let (c, k) = (x[1].shape[1], x[2].shape[3]);
        let mut ds = vec![0.0; x[3].len() * c];
        for row in 0..x[3].len() {
            let n = x[3].i()[row] as usize;
            let g = self.rule.grad(&x[4].f()[row * k..][..n], &x[6].f()[row * k..][..n]);
            for (i, g) in g.into_iter().enumerate() {
                ds[row * c + x[2].i()[row * k + i] as usize] += g;
            }
        }
        let (dq, dl) = scores_grad(x[0], x[1], &ds, self.scale);
        vec![HostArray::from_f64(&y[0], dq), HostArray::from_f64(&y[1], dl)]
    }
}
