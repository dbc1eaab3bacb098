//! Softmax over the last axis, and the log-sum-exp by which parts of a softmax are put together again.
//!
//! -inf weighs 0; a row of nothing but -inf gives zeros and the log-sum-exp -inf.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, float, operand, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `softmax x`: `x: [.., K]` → `[.., K]` and the log-sum-exp `[..]`.
    Softmax = "softmax" {}
}

/// `softmax` and log-sum-exp of `x`.
pub(super) fn softmax(x: &[f64]) -> (Vec<f64>, f64) {
    let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if top == f64::NEG_INFINITY {
        return (vec![0.0; x.len()], top);
    }
    let e: Vec<f64> = x.iter().map(|x| (x - top).exp()).collect();
    let sum: f64 = e.iter().sum();
    (e.iter().map(|e| e / sum).collect(), top + sum.ln())
}

impl OpDef for Softmax {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 1)?;
        float(x, 0)?;
        operand(x, 0, x[0].rank() >= 1, "of rank 1 or more")?;
        let rows = &x[0].shape[..x[0].rank() - 1];
        Ok(vec![x[0].clone(), Ty::new(x[0].dtype, rows.iter().cloned())])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 4.0 * x[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let k = y[0].shape[y[0].shape.len() - 1];
        let (mut p, mut lse) = (vec![], vec![]);
        for row in 0..y[1].elements() {
            let (w, z) = softmax(&x[0].f()[row * k..][..k]);
            p.extend(w);
            lse.push(z);
        }
        vec![HostArray::from_f64(&y[0], p), HostArray::from_f64(&y[1], lse)]
    }
    /// `dx = p ∘ (dp - Σ p·dp + dlse)`
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let (dp, dlse, p) = (cx.dy(0), cx.dy(1), cx.y[0]);
        let shape = cx.b.ty(p).shape.clone();
        let mut rows = shape.clone();
        let last = rows.len() - 1;
        rows[last] = Dim::int(1);
        let dot = cx.b.mul(p, dp);
        let dot = cx.b.sum(dot, vec![last], true);
        let dlse = cx.b.reshape(dlse, rows);
        let shift = cx.b.sub(dlse, dot);
        let shift = cx.b.broadcast(shift, shape);
        let d = cx.b.add(dp, shift);
        Ok(vec![Some(cx.b.mul(p, d))])
    }
}
