//! The sum of all squares of many tensors: a global norm in one op.

use super::{Cost, Gradients, OpDef, OpError, Vjp, float, mismatch, traffic};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `sum_squares x0, x1, …` → a scalar; operands of any shapes and one float type.
    SumSquares = "sum_squares" {}
}

impl OpDef for SumSquares {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        let Some(first) = x.first() else { return Err(mismatch("at least one operand is wanted")) };
        float(x, 0)?;
        if let Some(t) = x.iter().find(|t| t.dtype != first.dtype) {
            return Err(mismatch(format!("element types {} vs {}", first.dtype, t.dtype)));
        }
        Ok(vec![Ty::scalar(first.dtype)])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 2.0 * x.iter().map(|t| t.elements() as f64).sum::<f64>(), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        vec![HostArray::from_f64(&y[0], vec![x.iter().flat_map(|a| a.f()).map(|v| v * v).sum()])]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let dy = cx.dy(0);
        let twice = cx.b.scale(dy, 2.0);
        Ok(cx.x.iter().map(|&x| Some(cx.b.mul(x, twice))).collect())
    }
}
