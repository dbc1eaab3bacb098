//! Rotary position embedding in half-split form.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, operand, rank, traffic};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `rotary x[, start]`: `x: [.., T, heads, d]`, `d` even, position = index along `T`; of `[N, T, heads, d]` plus `start: i32[N]`,
    /// which is for inference.  Pairs are `(i, i + d/2)`, the angle is
    /// `position / base^(2i/d)`; `inverse` turns the other way.
    Rotary = "rotary" { base: f64, inverse: bool = false }
}

impl OpDef for Rotary {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        let started = x.len() == 2;
        arity(x, if started { 2 } else { 1 })?;
        if started {
            rank(x, 0, 4)?;
            exactly(x, 1, DType::I32, &[&x[0].shape[0]])?;
        }
        float(x, 0)?;
        operand(x, 0, x[0].rank() >= 3, "of rank 3 or more: [.., T, heads, d]")?;
        match x[0].shape.last().and_then(|d| d.as_int()) {
            Some(d) if d % 2 == 0 && d > 0 => Ok(vec![x[0].clone()]),
            _ => Err(mismatch(format!("the last axis of {} must have an even integer size", x[0]))),
        }
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 3.0 * y[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let s = &y[0].shape;
        let (t, h, d) = (s[s.len() - 3], s[s.len() - 2], s[s.len() - 1]);
        let v = x[0].f();
        let mut out = vec![0.0; v.len()];
        for (row, (v, o)) in v.chunks(d).zip(out.chunks_mut(d)).enumerate() {
            let pos = (row / h % t) as f64 + x.get(1).map_or(0.0, |s| s.get(row / (h * t)));
            for i in 0..d / 2 {
                let angle = pos / self.base.powf(2.0 * i as f64 / d as f64);
                let (sin, cos) = if self.inverse { (-angle).sin_cos() } else { angle.sin_cos() };
                o[i] = v[i] * cos - v[i + d / 2] * sin;
                o[i + d / 2] = v[i + d / 2] * cos + v[i] * sin;
            }
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        if cx.x.len() > 1 {
            return Err(mismatch("has no gradient with a start, which is for inference"));
        }
        // A rotation's transpose is its inverse.
        let dy = cx.dy(0);
        Ok(vec![Some(cx.b.push(Rotary { base: self.base, inverse: !self.inverse }, &[dy]))])
    }
}
