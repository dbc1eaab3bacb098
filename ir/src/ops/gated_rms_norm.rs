//! Root-mean-square normalisation of a gated value: `y = rms_norm(x * silu(z), w)` (Mamba-2, arXiv 2405.21060).
//!
//! Made by the pass `fuse_norm`.  Neither the gate nor the gated value is kept: both directions compute them row by row.

use super::map::sigmoid;
use super::rms_norm::RmsNormGrad;
use super::{Cost, Gradients, OpDef, OpError, RmsNorm, Vjp, arity, exactly, traffic};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `gated_rms_norm x, z, w`: `x`, `z`: `[.., D]`, `w: [D]`.
    GatedRmsNorm = "gated_rms_norm" { eps: f64 }
}

op_struct! {
    /// `gated_rms_norm_grad x, z, w, dy` → `dx`, `dz`, `dw`.
    GatedRmsNormGrad = "gated_rms_norm_grad" { eps: f64 }
}

/// `x` and another operand of its type, beside what the norm itself checks.
fn alike(x: &[&Ty], i: usize) -> Result<(), OpError> {
    exactly(x, i, x[0].dtype, &x[0].shape.iter().collect::<Vec<_>>())
}

/// `x * silu(z)`.
fn gated(x: &HostArray, z: &HostArray, ty: &ConcreteTy) -> HostArray {
    HostArray::from_f64(ty, x.f().iter().zip(z.f()).map(|(x, z)| x * z * sigmoid(*z)).collect())
}

impl OpDef for GatedRmsNorm {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 3)?;
        alike(x, 1)?;
        RmsNorm { eps: self.eps }.infer(&[x[0], x[2]])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        // The norm's four, a product and a function.
        Cost { flops: 6.0 * y[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        RmsNorm { eps: self.eps }.eval(&[&gated(x[0], x[1], &y[0]), x[2]], y)
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dy = cx.dy(0);
        let d = cx.b.push_all(GatedRmsNormGrad { eps: self.eps }, &[cx.x[0], cx.x[1], cx.x[2], dy]);
        Ok(d.into_iter().map(Some).collect())
    }
}

impl OpDef for GatedRmsNormGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 4)?;
        alike(x, 1)?;
        let norm = RmsNormGrad { eps: self.eps }.infer(&[x[0], x[2], x[3]])?;
        Ok(vec![x[0].clone(), x[1].clone(), norm[1].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        // The norm's ten, the gated value again, and through the gate.
        Cost { flops: 20.0 * x[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let u = gated(x[0], x[1], &y[0]);
        let norm = RmsNormGrad { eps: self.eps }.eval(&[&u, x[2], x[3]], &[y[0].clone(), y[2].clone()]);
        let [du, dw]: [HostArray; 2] = norm.try_into().expect("BUG: two gradients");
        let (mut dx, mut dz) = (vec![], vec![]);
        for ((du, x), &z) in du.f().iter().zip(x[0].f()).zip(x[1].f()) {
            let s = sigmoid(z);
            dx.push(du * z * s);
            dz.push(du * x * s * (1.0 + z * (1.0 - s)));
        }
        vec![HostArray::from_f64(&y[0], dx), HostArray::from_f64(&y[1], dz), dw]
    }
}
