//! Constant folding: an elementwise op on splats is a splat; moving a splat gives a splat.

use crate::rewrite::rewrite;
use rambac_ir::ops::{Binary, Cast, Constant, Op, OpDef, Unary};
use rambac_ir::{DType, Graph, Value};

fn splat(g: &Graph, v: Value) -> Option<f64> {
    match &g.node(v.node).op {
        Op::Constant(c) => Some(c.value),
        _ => None,
    }
}

/// See the module's comment.
pub fn fold(g: &Graph) -> Graph {
    rewrite(g, |b, _, n, x| {
        let c = |i: usize| splat(b.graph(), x[i]);
        let value = match &n.op {
            Op::Unary(Unary { f }) => f.eval(c(0)?),
            Op::Binary(Binary { f }) => f.eval(c(0)?, c(1)?),
            Op::Where(_) => match c(0)? {
                0.0 => return Some(vec![x[2]]),
                _ => return Some(vec![x[1]]),
            },
            Op::Cast(Cast { to }) => match to {
                DType::I32 => c(0)?.trunc(),
                DType::Bool => (c(0)? != 0.0) as u8 as f64,
                _ => c(0)?,
            },
            Op::Broadcast(_) | Op::Reshape(_) | Op::Transpose(_) | Op::Slice(_) => c(0)?,
            Op::Pad(_) if c(0)? == 0.0 => 0.0,
            _ => return None,
        };
        let k = Constant { value, ty: n.tys[0].clone() };
        // A folded NaN or infinity would hide where it came from; an integer out of range is no constant.
        (value.is_finite() && k.infer(&[]).is_ok()).then(|| vec![b.push(k, &[])])
    })
}
