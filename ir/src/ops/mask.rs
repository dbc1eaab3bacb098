//! Dense scores of any making, with units that a token may not choose yet set to -inf.
//!
//! Token `start + t` sees unit `c` exactly if `start + t >= (c + 1)·chunk`: as [`Score`](super::Score) sees its chunks.

use super::score::visible;
use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, rank, traffic};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `mask s, start`: `s: [N, L, h, C]`, `start: i32[N]` → `[N, L, h, C]`.
    Mask = "mask" { chunk: usize }
}

impl OpDef for Mask {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 2)?;
        float(x, 0)?;
        rank(x, 0, 4)?;
        exactly(x, 1, DType::I32, &[&x[0].shape[0]])?;
        if self.chunk == 0 {
            return Err(mismatch("chunk must be at least 1"));
        }
        Ok(vec![x[0].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 0.0, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let s = &x[0].shape;
        let keep = |(i, &v): (usize, &f64)| {
            let (b, t) = (i / (s[1] * s[2] * s[3]), i / (s[2] * s[3]) % s[1]);
            if visible(x[1].i()[b] as i64 + t as i64, i % s[3], self.chunk) { v } else { f64::NEG_INFINITY }
        };
        vec![HostArray::from_f64(&y[0], x[0].f().iter().enumerate().map(keep).collect())]
    }
    /// What is -inf gets no gradient from what follows, as with [`Score`](super::Score).
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        Ok(vec![Some(cx.dy(0)), None])
    }
}
