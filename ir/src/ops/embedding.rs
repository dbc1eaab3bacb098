//! Rows of a table picked by ids, and the gradient that adds them back.

use super::{Cost, Gradients, OpDef, OpError, Vjp, arity, exactly, float, mismatch, operand, rank, traffic};
use crate::dim::Dim;
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, DType, Ty};

op_struct! {
    /// `embedding ids, table`: `ids: i32[..]`, `table: [V, D]` → `[.., D]`.  An id outside `0..V` gives zeros here; the
    /// runtime refuses it before it runs.
    Embedding = "embedding" {}
}

op_struct! {
    /// `embedding_grad ids, dy` → `dtable: [vocab, D]`.
    EmbeddingGrad = "embedding_grad" { vocab: Dim }
}

fn row(id: i32, rows: usize) -> Option<usize> {
    usize::try_from(id).ok().filter(|&i| i < rows)
}

impl OpDef for Embedding {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 2)?;
        operand(x, 0, x[0].dtype == DType::I32, "of type i32")?;
        float(x, 1)?;
        rank(x, 1, 2)?;
        Ok(vec![Ty::new(x[1].dtype, x[0].shape.iter().chain([&x[1].shape[1]]).cloned())])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 0.0, bytes: x[0].bytes() as f64 + 2.0 * y[0].bytes() as f64 }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let (rows, d, table) = (x[1].shape[0], x[1].shape[1], x[1].f());
        let pick = |&id: &i32| match row(id, rows) {
            Some(r) => table[r * d..(r + 1) * d].to_vec(),
            None => vec![0.0; d],
        };
        vec![HostArray::from_f64(&y[0], x[0].i().iter().flat_map(pick).collect())]
    }
    fn vjp(&self, cx: &mut Vjp) -> Gradients {
        let vocab = cx.b.ty(cx.x[1]).shape[0].clone();
        let dy = cx.dy(0);
        Ok(vec![None, Some(cx.b.push(EmbeddingGrad { vocab }, &[cx.x[0], dy]))])
    }
}

impl OpDef for EmbeddingGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 2)?;
        operand(x, 0, x[0].dtype == DType::I32, "of type i32")?;
        float(x, 1)?;
        let Some(d) = x[1].shape.last() else { return Err(mismatch("dy must have an axis")) };
        exactly(x, 1, x[1].dtype, &x[0].shape.iter().chain([d]).collect::<Vec<_>>())?;
        Ok(vec![Ty::new(x[1].dtype, [self.vocab.clone(), d.clone()])])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: x[1].elements() as f64, bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let (rows, d) = (y[0].shape[0], y[0].shape[1]);
        let mut out = vec![0.0; rows * d];
        for (i, &id) in x[0].i().iter().enumerate() {
            if let Some(r) = row(id, rows) {
                (0..d).for_each(|j| out[r * d + j] += x[1].f()[i * d + j]);
            }
        }
        vec![HostArray::from_f64(&y[0], out)]
    }
}
