//! Attend and aggregate as one op: per-chunk outputs never reach memory, in either direction.
//!
//! Made by the pass `fuse_attention`; means exactly `aggregate(attend(..), w)`.

use super::attend::{Attending, check, flops};
use super::{Cost, OpDef, OpError, arity, exactly, traffic};
use crate::host::HostArray;
use crate::op_struct;
use crate::ty::{ConcreteTy, Ty};

op_struct! {
    /// `chunk_attention q, k, v, indices, count, w` → `[N, L, H, d]`.  Operands as [`Attend`](super::Attend) and
    /// [`Aggregate`](super::Aggregate).
    ChunkAttention = "chunk_attention" { chunk: usize, scale: f64, off_by_one: f64 = 0.0 }
}

op_struct! {
    /// `chunk_attention_grad q, k, v, indices, count, w, dy` → `dq`, `dk`, `dv`, `dw`.
    ChunkAttentionGrad = "chunk_attention_grad" { chunk: usize, scale: f64, off_by_one: f64 = 0.0 }
}

impl OpDef for ChunkAttention {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 6)?;
        check(x, self.chunk)?;
        exactly(x, 5, x[0].dtype, &x[3].shape.iter().collect::<Vec<_>>())?;
        Ok(vec![x[0].clone()])
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: flops(x, self.chunk), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let a = Attending::new(x, self.chunk, self.scale, self.off_by_one);
        let (w, d) = (x[5].f(), a.dim());
        let mut out = vec![0.0; y[0].elements()];
        a.each(|row, slot, first, p| {
            let w = w[a.weight_at(row) + slot];
            a.mix(first, p).iter().zip(&mut out[row * d..]).for_each(|(o, y)| *y += w * o);
        });
        vec![HostArray::from_f64(&y[0], out)]
    }
}

impl OpDef for ChunkAttentionGrad {
    fn infer(&self, x: &[&Ty]) -> Result<Vec<Ty>, OpError> {
        arity(x, 7)?;
        check(x, self.chunk)?;
        exactly(x, 5, x[0].dtype, &x[3].shape.iter().collect::<Vec<_>>())?;
        exactly(x, 6, x[0].dtype, &x[0].shape.iter().collect::<Vec<_>>())?;
        Ok([0, 1, 2, 5].map(|i| x[i].clone()).to_vec())
    }
    fn cost(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> Cost {
        Cost { flops: 2.5 * flops(x, self.chunk), bytes: traffic(x, y) }
    }
    fn eval(&self, x: &[&HostArray], y: &[ConcreteTy]) -> Vec<HostArray> {
        let a = Attending::new(x, self.chunk, self.scale, self.off_by_one);
        let (w, dy, d) = (x[5].f(), x[6].f(), a.dim());
        let mut out: Vec<Vec<f64>> = y.iter().map(|t| vec![0.0; t.elements()]).collect();
        a.each(|row, slot, first, p| {
            let at = a.weight_at(row) + slot;
            let dy = &dy[row * d..][..d];
            let g: Vec<f64> = dy.iter().map(|g| w[at] * g).collect();
            a.backward(row, first, p, &g, &mut out);
            out[3][at] += a.mix(first, p).iter().zip(dy).map(|(o, g)| o * g).sum::<f64>();
        });
        out.into_iter().zip(y).map(|(o, t)| HostArray::from_f64(t, o)).collect()
    }
}
