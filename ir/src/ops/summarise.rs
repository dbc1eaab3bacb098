//! One vector per chunk.  A learned summary is any subgraph; this op is the parameter-free one.

use super::map::BinaryFn;
use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, div, float, operand, traffic};
use crate::dim::Dim;
use crate::graph::Value;
use crate::host::HostArray;
use crate::ty::{ConcreteTy, Ty};
use crate::{op_struct, word_enum};

word_enum! {
    /// What stands for a chunk.
    Summary {
        Mean = "mean",
        /// The largest of each component: with `min` a box around a chunk's keys.
        Max = "max",
        Min = "min",
    }
}

op_struct! {
    /// `summarise x`: `x: [N, T, ..]` → `[N, T/chunk, ..]`.
    Summarise = "summarise" { chunk: usize, mode: Summary = Summary::Mean }
}

impl OpDef for Summarise {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 1)?;
        float(x, 0)?;
        operand(x, 0, x[0].rank() >= 2, "of rank 2 or more: [N, T, ..]")?;
        let mut y = x[0].clone();
        y.shape[1] = div(&y.shape[1], self.chunk, "chunk")?;
        Ok(vec![y])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: x[0].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let w: usize = y[0].shape[2..].iter().product();
        let start = match self.mode {
            Summary::Mean => 0.0,
            Summary::Max => f64::NEG_INFINITY,
            Summary::Min => f64::INFINITY,
        };
        let mut out = vec![start; y[0].elements()];
        for (i, &v) in x[0].f().iter().enumerate() {
            let to = &mut out[i / w / self.chunk * w + i % w];
            *to = match self.mode {
                Summary::Mean => *to + v / self.chunk as f64,
                Summary::Max => to.max(v),
                Summary::Min => to.min(v),
            };
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let shape = cx.b.ty(cx.x[0]).shape.clone();
        let chunks = cx.b.ty(cx.y[0]).shape[1].clone();
        let split = |s: Dim| -> Vec<Dim> { [&shape[0], &chunks, &s].into_iter().chain(&shape[2..]).cloned().collect() };
        let (dy, y, x) = (cx.dy(0), cx.y[0], cx.x[0]);
        let spread = |cx: &mut Vjp, v: Value| {
            let v = cx.b.reshape(v, split(Dim::int(1)));
            let v = cx.b.broadcast(v, split(Dim::int(self.chunk)));
            cx.b.reshape(v, shape.clone())
        };
        if self.mode == Summary::Mean {
            let d = cx.b.scale(dy, 1.0 / self.chunk as f64);
            return Ok(vec![Some(spread(cx, d))]);
        }
        // Every element that attains the bound gets the gradient; ties have no derivative anyway.
        let (d, bound) = (spread(cx, dy), spread(cx, y));
        let attains = cx.b.binary(BinaryFn::Eq, x, bound);
        let zero = cx.b.scalar_like(0.0, d);
        Ok(vec![Some(cx.b.select_where(attains, d, zero))])
    }
}
