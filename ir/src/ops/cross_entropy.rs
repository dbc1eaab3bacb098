//! Cross-entropy of logits against labels, per row: `ln Σ exp(z) - z[label]`.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, traffic};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `cross_entropy logits, labels`: `logits: [.., V]`, `labels: i32[..]` → `[..]`.  Rows labelled `ignore` give 0.
    CrossEntropy = "cross_entropy" { ignore: i64 = -100 }
}

op_struct! {
    /// `cross_entropy_grad logits, labels, dloss` → `dlogits`.
    CrossEntropyGrad = "cross_entropy_grad" { ignore: i64 = -100 }
}

fn check(x: &[&Ty]) -> Result<(), OpError> {
    float(x, 0)?;
    let Some((_, rows)) = x[0].shape.split_last() else { return Err(mismatch("logits must have an axis")) };
    exactly(x, 1, DType::I32, &rows.iter().collect::<Vec<_>>())
}

/// `ln Σ exp(z)`.
pub(super) fn lse(row: &[f64]) -> f64 {
    let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    top + row.iter().map(|z| (z - top).exp()).sum::<f64>().ln()
}

impl OpDef for CrossEntropy {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 2)?;
        check(x)?;
        Ok(vec![x[1].with_dtype(x[0].dtype)])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 4.0 * x[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let v = x[0].shape[x[0].shape.len() - 1];
        let out = x[0].f().chunks(v.max(1)).zip(x[1].i()).map(|(row, &label)| {
            if label as i64 == self.ignore { 0.0 } else { lse(row) - row.get(label as usize).copied().unwrap_or(0.0) }
        });
        vec![HostArray::from_f64(&y[0], out.collect())]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dy = cx.dy(0);
        let d = cx.b.push(CrossEntropyGrad { ignore: self.ignore }, &[cx.x[0], cx.x[1], dy]);
        Ok(vec![Some(d), None])
    }
}

impl OpDef for CrossEntropyGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 3)?;
        check(x)?;
        exactly(x, 2, x[0].dtype, &x[1].shape.iter().collect::<Vec<_>>())?;
        Ok(vec![x[0].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 5.0 * x[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let v = x[0].shape[x[0].shape.len() - 1];
        let mut out = Vec::with_capacity(x[0].len());
        for ((row, &label), &g) in x[0].f().chunks(v.max(1)).zip(x[1].i()).zip(x[2].f()) {
            let (z, used) = (lse(row), label as i64 != self.ignore);
            out.extend(
                row.iter().enumerate().map(|(j, &x)| {
                    if used { g * ((x - z).exp() - (j as i64 == label as i64) as u8 as f64) } else { 0.0 }
                }),
            );
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
}
