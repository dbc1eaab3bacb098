//! A linear layer and the cross-entropy of its logits as one op: `[.., V]` logits never reach memory, in either direction.
//!
//! Made by the pass `fuse_loss`; means exactly `cross_entropy(matmul(h, w {trans_b}), labels)`.  The gradient gives the
//! losses too: it has the logits at hand, so a training step computes them once.

use super::cross_entropy::lse;
use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, rank, traffic};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `linear_cross_entropy h, w, labels`: `h: [.., D]`, `w: [V, D]`, `labels: i32[..]` → losses `[..]` of the logits
    /// `h·wᵀ`.  Rows labelled `ignore` give 0.
    LinearCrossEntropy = "linear_cross_entropy" { ignore: i64 = -100 }
}

op_struct! {
    /// `linear_cross_entropy_grad h, w, labels, dloss` → `dh`, `dw` and the losses.
    LinearCrossEntropyGrad = "linear_cross_entropy_grad" { ignore: i64 = -100 }
}

fn check(x: &[&Ty]) -> Result<Ty, OpError> {
    float(x, 0)?;
    rank(x, 1, 2)?;
    let Some((d, rows)) = x[0].shape.split_last() else { return Err(mismatch("h must have an axis")) };
    exactly(x, 1, x[0].dtype, &[&x[1].shape[0], d])?;
    exactly(x, 2, DType::I32, &rows.iter().collect::<Vec<_>>())?;
    Ok(x[2].with_dtype(x[0].dtype))
}

/// Number of logits, and FLOPs of one product with the weight.
fn sizes(x: &[ConcreteTy]) -> (f64, f64) {
    let logits = x[2].elements() as f64 * x[1].shape[0] as f64;
    (logits, 2.0 * logits * x[1].shape[1] as f64)
}

/// A row's logits, their log-sum-exp, and its label unless it is ignored.
struct Row<'a> {
    h: &'a [f64],
    logits: Vec<f64>,
    lse: f64,
    label: Option<i32>,
}

impl Row<'_> {
    fn loss(&self) -> f64 {
        self.label.map_or(0.0, |l| self.lse - self.logits.get(l as usize).copied().unwrap_or(0.0))
    }
}

fn rows<'a>(x: &[&'a HostArray], ignore: i64) -> impl Iterator<Item = Row<'a>> {
    let (d, h, w, labels) = (x[1].shape[1], x[0].f(), x[1].f(), x[2].i());
    let v = x[1].shape[0];
    labels.iter().enumerate().map(move |(i, &label)| {
        let h = &h[i * d..][..d];
        let logits: Vec<f64> = (0..v).map(|v| h.iter().zip(&w[v * d..]).map(|(a, b)| a * b).sum()).collect();
        Row { h, lse: lse(&logits), logits, label: (label as i64 != ignore).then_some(label) }
    })
}

impl OpDef for LinearCrossEntropy {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 3)?;
        Ok(vec![check(x)?])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        let (logits, product) = sizes(x);
        Cost { flops: product + 4.0 * logits, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        vec![HostArray::from_f64(&y[0], rows(x, self.ignore).map(|r| r.loss()).collect())]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dy = cx.dy(0);
        let d = cx.b.push_all(LinearCrossEntropyGrad { ignore: self.ignore }, &[cx.x[0], cx.x[1], cx.x[2], dy]);
        Ok(vec![Some(d[0]), Some(d[1]), None])
    }
}

impl OpDef for LinearCrossEntropyGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 4)?;
        let losses = check(x)?;
        exactly(x, 3, losses.dtype, &losses.shape.iter().collect::<Vec<_>>())?;
        Ok(vec![x[0].clone(), x[1].clone(), losses])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        let (logits, product) = sizes(x);
        Cost { flops: 3.0 * product + 9.0 * logits, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let (w, d) = (x[1].f(), x[1].shape[1]);
        let (mut dh, mut dw, mut losses) = (vec![0.0; x[0].len()], vec![0.0; w.len()], vec![]);
        for (i, (row, &g)) in rows(x, self.ignore).zip(x[3].f()).enumerate() {
            losses.push(row.loss());
            let Some(label) = row.label else { continue };
            for (v, z) in row.logits.iter().enumerate() {
                let dz = g * ((z - row.lse).exp() - (v as i64 == label as i64) as u8 as f64);
                for j in 0..d {
                    dh[i * d + j] += dz * w[v * d + j];
                    dw[v * d + j] += dz * row.h[j];
                }
            }
        }
        [dh, dw, losses].into_iter().zip(y).map(|(v, t)| HostArray::from_f64(t, v)).collect()
    }
}
