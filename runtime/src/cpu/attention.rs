//! Attention, selection and their gradients.

use super::{Arg, CpuKernel, KernelError, Shaped};
use rambac_cpu::kernels::{chunk_attention as ca, dense_attention as da, selection as sel};
use rambac_ir::ops::*;
use rambac_ir::ty::ConcreteTy;

fn width(x: &Arg) -> usize {
    x.shape()[2] * x.shape()[3]
}

fn dense(x: &[Arg], op: &Attention) -> da::DenseAttention {
    let s = x[0].shape();
    let (batch, t, heads, dim) = (s[0], s[1], s[2], s[3]);
    let (keys, kv_heads) = (x[1].shape()[1], x[1].shape()[2]);
    let Attention { scale, causal, window, local, unit, .. } = *op;
    da::DenseAttention {
        batch,
        t,
        keys,
        start: 0,
        heads,
        kv_heads,
        dim,
        scale: scale as f32,
        causal,
        window,
        local,
        unit,
    }
}

impl CpuKernel for Attention {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (q, kv) = (width(&x[0]), width(&x[1]));
        let lse = y.get(1).map(Arg::f32_mut);
        let all = dense(x, self);
        if let Some(starts) = x.get(3) {
            let rows = all.t * all.heads;
            let mut lse = lse.map(|l| l.chunks_exact_mut(rows.max(1)));
            let [q, k, v] = [x[0].mat(q), x[1].mat(kv), x[2].mat(kv)];
            let y = y[0].mat_mut(q.cols());
            for (b, &start) in starts.i32().iter().enumerate() {
                let start = usize::try_from(start).map_err(|_| KernelError::Start { start, at: b })?;
                if self.unit == 0 && start + all.t > all.keys {
                    return Err(KernelError::Memory { end: start + all.t, holds: all.keys });
                }
                let one = da::DenseAttention { batch: 1, start, ..all };
                // SAFETY: sequences have rows of their own, and one runs after the other.
                let out = unsafe { y.block_unchecked(b * all.t, all.t, 0, q.cols()) };
                let lse = lse.as_mut().and_then(Iterator::next);
                let [k, v] = [k, v].map(|m| m.block(b * all.keys, all.keys, 0, m.cols()));
                one.forward(q.block(b * all.t, all.t, 0, q.cols()), k, v, out, lse);
            }
            return Ok(());
        }
        all.forward(x[0].mat(q), x[1].mat(kv), x[2].mat(kv), y[0].mat_mut(q), lse);
        Ok(())
    }
}

impl CpuKernel for AttentionGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (q, kv) = (width(&x[0]), width(&x[1]));
        dense(x, &self.forward()).backward(
            x[0].mat(q),
            x[1].mat(kv),
            x[2].mat(kv),
            x[3].mat(q),
            x.get(4).map(Arg::f32),
            y[0].mat_mut(q),
            y[1].mat_mut(kv),
            y[2].mat_mut(kv),
        );
        Ok(())
    }
}

pub(super) fn weighting(rule: Weighting) -> sel::Weighting {
    match rule {
        Weighting::StickBreaking => sel::Weighting::StickBreaking,
        Weighting::Softmax => sel::Weighting::Softmax,
        Weighting::Sigmoid => sel::Weighting::Sigmoid,
        Weighting::One => sel::Weighting::One,
        Weighting::Logit => sel::Weighting::Logit,
    }
}

pub(super) fn order(order: Order) -> sel::Order {
    match order {
        Order::Recent => sel::Order::Recent,
        Order::Score => sel::Order::Score,
    }
}

fn selecting(op: &Selection, x: &[impl Shaped]) -> sel::Selection {
    let s = x[0].shape();
    sel::Selection {
        n: s[0],
        l: s[1],
        heads: s[2],
        dim: s[3],
        chunks: x[1].shape()[1],
        k: op.k,
        chunk: op.chunk,
        scale: op.scale as f32,
        order: order(op.order),
        weighting: weighting(op.rule),
    }
}

fn selecting_back(op: &SelectionGrad, x: &[impl Shaped]) -> sel::Selection {
    // Chunk length and order do not matter to the gradient.
    let (k, chunk, order) = (x[2].shape()[3], 1, Order::Recent);
    let scale = op.scale;
    selecting(&Selection { chunk, scale, k, order, rule: op.rule }, x)
}

impl CpuKernel for Selection {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        if let Some(at) = x[2].i32().iter().position(|&s| s < 0) {
            return Err(KernelError::Start { start: x[2].i32()[at], at });
        }
        selecting(self, x).forward(
            x[0].mat(width(&x[0])),
            x[1].chunk_rows(width(&x[1])),
            x[2].i32(),
            y[0].i32_mut(),
            y[1].i32_mut(),
            y[2].f32_mut(),
            y[3].f32_mut(),
        );
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        selecting(self, x).forward_scratch()
    }
}

impl CpuKernel for SelectionGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        selecting_back(self, x).backward(
            x[0].mat(width(&x[0])),
            x[1].f32(),
            x[2].i32(),
            x[3].i32(),
            x[4].f32(),
            x[5].f32(),
            x[6].f32(),
            y[0].mat_mut(width(&x[0])),
            y[1].f32_mut(),
        );
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        selecting_back(self, x).backward_scratch()
    }
}

pub(super) fn chunked(x: &[impl Shaped], chunk: usize, scale: f64, off_by_one: f64) -> ca::ChunkAttention {
    let (q, k) = (x[0].shape(), x[1].shape());
    ca::ChunkAttention {
        n: q[0],
        l: q[1],
        keys: k[1],
        heads: q[2],
        kv_heads: k[2],
        dim: q[3],
        k: x[3].shape()[3],
        chunk,
        scale: scale as f32,
        off_by_one: off_by_one as f32,
    }
}

impl CpuKernel for ChunkAttention {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (q, kv) = (width(&x[0]), width(&x[1]));
        chunked(x, self.chunk, self.scale, self.off_by_one).forward(
            x[0].mat(q),
            x[1].chunk_rows(kv),
            x[2].chunk_rows(kv),
            x[3].i32(),
            x[4].i32(),
            x[5].f32(),
            y[0].mat_mut(q),
        );
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        chunked(x, self.chunk, self.scale, self.off_by_one).forward_scratch()
    }
}

impl CpuKernel for ChunkAttentionGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (q, kv) = (width(&x[0]), width(&x[1]));
        chunked(x, self.chunk, self.scale, self.off_by_one).backward(
            x[0].mat(q),
            x[1].mat(kv),
            x[2].mat(kv),
            x[3].i32(),
            x[4].i32(),
            x[5].f32(),
            x[6].mat(q),
            y[0].mat_mut(q),
            y[1].mat_mut(kv),
            y[2].mat_mut(kv),
            y[3].f32_mut(),
        );
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        chunked(x, self.chunk, self.scale, self.off_by_one).backward_scratch()
    }
}
