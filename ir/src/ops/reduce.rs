//! Reductions over axes: sum and max.

use super::map::BinaryFn;
use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, float, mismatch, traffic};
use crate::dim::Dim;
use crate::host::{HostArray, indices, strides};
use crate::ty::{ConcreteTy, Ty};
use crate::{op_struct, word_enum};

word_enum! {
    /// How elements combine.
    ReduceFn { Sum = "sum", Max = "max" }
}

op_struct! {
    /// Combines over `axes` (increasing), which disappear, or stay with size 1 if `keep`.
    Reduce = "reduce" { f: ReduceFn, axes: Vec<usize>, keep: bool = false }
}

/// The larger; a NaN stays, as it should be seen.
fn greater(a: f64, b: f64) -> f64 {
    if b <= a || a.is_nan() { a } else { b }
}

impl OpDef for Reduce {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 1)?;
        float(x, 0)?;
        if !self.axes.is_sorted_by(|a, b| a < b) || self.axes.last().is_some_and(|&a| a >= x[0].rank()) {
            return Err(mismatch(format!("axes {:?} must increase and be axes of {}", self.axes, x[0])));
        }
        let shape = x[0].shape.iter().enumerate().filter_map(|(i, d)| match (self.axes.contains(&i), self.keep) {
            (false, _) => Some(d.clone()),
            (true, true) => Some(Dim::int(1)),
            (true, false) => None,
        });
        Ok(vec![Ty::new(x[0].dtype, shape)])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: x[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let kept: Vec<usize> = (0..x[0].shape.len()).filter(|i| !self.axes.contains(i)).collect();
        let kept_shape: Vec<usize> = kept.iter().map(|&k| x[0].shape[k]).collect();
        let st = strides(&kept_shape);
        let start = if self.f == ReduceFn::Sum { 0.0 } else { f64::NEG_INFINITY };
        let mut out = vec![start; y[0].elements()];
        for (ix, &v) in indices(&x[0].shape).zip(x[0].f()) {
            let at: usize = kept.iter().zip(&st).map(|(&k, s)| ix[k] * s).sum();
            out[at] = if self.f == ReduceFn::Sum { out[at] + v } else { greater(out[at], v) };
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let x = cx.x[0];
        let shape = cx.b.ty(x).shape.clone();
        let ones: Vec<Dim> = shape
            .iter()
            .enumerate()
            .map(|(i, d)| if self.axes.contains(&i) { Dim::int(1) } else { d.clone() })
            .collect();
        let dy = cx.dy(0);
        let b = &mut *cx.b;
        let dy = b.reshape(dy, ones.clone());
        let dy = b.broadcast(dy, shape.clone());
        if self.f == ReduceFn::Sum {
            return Ok(vec![Some(dy)]);
        }
        // Every element that attains the maximum gets the gradient; ties have no derivative anyway.
        let y = b.reshape(cx.y[0], ones);
        let y = b.broadcast(y, shape);
        let top = b.binary(BinaryFn::Eq, x, y);
        let zero = b.scalar_like(0.0, dy);
        Ok(vec![Some(b.select_where(top, dy, zero))])
    }
}
