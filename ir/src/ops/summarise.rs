//! One vector per chunk.  A learned summary is any subgraph; this op is the parameter-free one.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, div, float, operand, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::ty::{ConcreteTy, Ty};
use crate::{op_struct, word_enum};

word_enum! {
    /// What stands for a chunk.
    Summary { Mean = "mean" }
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
        let mut out = vec![0.0; y[0].elements()];
        for (i, v) in x[0].f().iter().enumerate() {
            out[i / w / self.chunk * w + i % w] += v / self.chunk as f64;
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let shape = cx.b.ty(cx.x[0]).shape.clone();
        let chunks = cx.b.ty(cx.y[0]).shape[1].clone();
        let split = |s: Dim| -> Vec<Dim> { [&shape[0], &chunks, &s].into_iter().chain(&shape[2..]).cloned().collect() };
        let dy = cx.dy(0);
        let d = cx.b.scale(dy, 1.0 / self.chunk as f64);
        let d = cx.b.reshape(d, split(Dim::int(1)));
        let d = cx.b.broadcast(d, split(Dim::int(self.chunk)));
        Ok(vec![Some(cx.b.reshape(d, shape))])
    }
}
