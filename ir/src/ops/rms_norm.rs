//! Root-mean-square normalisation over the last axis: `y = w * x / sqrt(mean(x^2) + eps)`.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, traffic};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `rms_norm x, w`: `x: [.., D]`, `w: [D]`.
    RmsNorm = "rms_norm" { eps: f64 }
}

op_struct! {
    /// `rms_norm_grad x, w, dy` → `dx`, `dw`; with a fourth operand, which the pass `fuse_residual` gives, that is added to
    /// `dx`.
    RmsNormGrad = "rms_norm_grad" { eps: f64 }
}

fn check(x: &[&Ty]) -> Result<(), OpError> {
    float(x, 0)?;
    let Some(d) = x[0].shape.last() else { return Err(mismatch("operand 0 must have an axis to normalise")) };
    exactly(x, 1, x[0].dtype, &[d])
}

fn rstd(row: &[f64], eps: f64) -> f64 {
    1.0 / (row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64 + eps).sqrt()
}

impl OpDef for RmsNorm {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 2)?;
        check(x)?;
        Ok(vec![x[0].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 4.0 * y[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let w = x[1].f();
        let rows = x[0].f().chunks(w.len().max(1));
        let out = rows.flat_map(|row| {
            let r = rstd(row, self.eps);
            row.iter().zip(w).map(move |(v, w)| w * v * r).collect::<Vec<_>>()
        });
        vec![HostArray::from_f64(&y[0], out.collect())]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dy = cx.dy(0);
        let d = cx.b.push_all(RmsNormGrad { eps: self.eps }, &[cx.x[0], cx.x[1], dy]);
        Ok(vec![Some(d[0]), Some(d[1])])
    }
}

impl OpDef for RmsNormGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        if x.len() != 4 {
            arity(x, 3)?;
        }
        check(x)?;
        for i in 2..x.len() {
            exactly(x, i, x[0].dtype, &x[0].shape.iter().collect::<Vec<_>>())?;
        }
        Ok(vec![x[0].clone(), x[1].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: (7 + x.len()) as f64 * x[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let w = x[1].f();
        let d = w.len().max(1);
        let (mut dx, mut dw) = (vec![], vec![0.0; w.len()]);
        for (row, dy) in x[0].f().chunks(d).zip(x[2].f().chunks(d)) {
            let r = rstd(row, self.eps);
            // With n = x r: dx = r (w dy - n mean(w dy n)).
            let m = row.iter().zip(dy).zip(w).map(|((x, g), w)| w * g * x * r).sum::<f64>() / d as f64;
            for j in 0..row.len() {
                dx.push(r * (w[j] * dy[j] - row[j] * r * m));
                dw[j] += dy[j] * row[j] * r;
            }
        }
        if let Some(base) = x.get(3) {
            dx.iter_mut().zip(base.f()).for_each(|(d, b)| *d += b);
        }
        vec![HostArray::from_f64(&y[0], dx), HostArray::from_f64(&y[1], dw)]
    }
}
