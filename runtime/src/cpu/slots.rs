//! The vocabulary of attention that selects, op by op, where it is composed in ways that no fused kernel knows.

use super::attention::{chunked, order, weighting};
use super::reference::{copies, evaluate};
use super::{Arg, CpuKernel, KernelError, Shaped};
use rambac_cpu::kernels::slots::{self, Choice, Mix, Scores};
use rambac_ir::ops::*;
use rambac_ir::ty::ConcreteTy;

fn scores(x: &[Arg], scale: f64) -> Scores {
    let (q, lm) = (x[0].shape(), x[1].shape());
    Scores { n: q[0], l: q[1], heads: q[2], landmark_heads: lm[2], dim: q[3], units: lm[1], scale: scale as f32 }
}

fn checked_start<'a>(start: &'a Arg) -> Result<&'a [i32], KernelError> {
    match start.i32().iter().position(|&s| s < 0) {
        Some(at) => Err(KernelError::Start { start: start.i32()[at], at }),
        None => Ok(start.i32()),
    }
}

impl CpuKernel for Score {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let start = checked_start(&x[2])?;
        scores(x, self.scale).forward(x[0].f32(), x[1].f32(), start, self.chunk, y[0].f32_mut());
        Ok(())
    }
}

impl CpuKernel for ScoreGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        scores(x, self.scale).backward(x[0].f32(), x[1].f32(), x[2].f32(), y[0].f32_mut(), y[1].f32_mut());
        Ok(())
    }
}

impl CpuKernel for Mask {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let s = x[0].shape();
        slots::mask(x[0].f32(), checked_start(&x[1])?, (s[1], s[2], s[3]), self.chunk, y[0].f32_mut());
        Ok(())
    }
}

impl CpuKernel for Select {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let Select { k, sinks, recent, .. } = *self;
        let choice = Choice { units: x[0].shape()[3], k, order: order(self.order), sinks, recent };
        choice.run(x[0].f32(), y[0].i32_mut(), y[1].i32_mut());
        Ok(())
    }
}

impl CpuKernel for Weigh {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (units, k) = (x[0].shape()[3], x[1].shape()[3]);
        slots::weigh_chosen(weighting(self.rule), x[0].f32(), units, x[1].i32(), x[2].i32(), k, y[0].f32_mut());
        Ok(())
    }
}

impl CpuKernel for WeighGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (units, k, rule) = (x[0].shape()[3], x[1].shape()[3], weighting(self.rule));
        let (s, i, n) = (x[0].f32(), x[1].i32(), x[2].i32());
        slots::weigh_chosen_backward(rule, s, units, i, n, k, x[3].f32(), y[0].f32_mut());
        Ok(())
    }
}

impl CpuKernel for Softmax {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let k = x[0].shape().last().copied().unwrap_or(1);
        slots::softmax(x[0].f32(), k, y[0].f32_mut(), y[1].f32_mut());
        Ok(())
    }
}

fn mix(y: &impl Shaped) -> Mix {
    let s = y.shape();
    Mix { rows: s[0] * s[1] * s[2], heads: s[2], dim: s[3] }
}

impl CpuKernel for Aggregate {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (w, o) = x.split_last().expect("BUG: inference asked for weights");
        let o: Vec<&[f32]> = o.iter().map(Arg::f32).collect();
        mix(&y[0]).aggregate(&o, w.f32(), w.shape()[2], w.shape()[3], y[0].f32_mut());
        Ok(())
    }
}

impl CpuKernel for AggregateGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (o, w, dy) = (&x[..x.len() - 2], &x[x.len() - 2], &x[x.len() - 1]);
        let o: Vec<&[f32]> = o.iter().map(Arg::f32).collect();
        let mut d_o: Vec<&mut [f32]> = y[..o.len()].iter().map(Arg::f32_mut).collect();
        let dw = y[o.len()].f32_mut();
        mix(dy).aggregate_backward(&o, w.f32(), w.shape()[2], w.shape()[3], dy.f32(), &mut d_o, dw);
        Ok(())
    }
}

fn parts<'a>(x: &'a [Arg]) -> Vec<(&'a [f32], &'a [f32], usize)> {
    x.chunks_exact(2).map(|p| (p[0].f32(), p[1].f32(), p[1].shape()[2])).collect()
}

impl CpuKernel for Merge {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        mix(&y[0]).merge(&parts(x), y[0].f32_mut(), y[1].f32_mut());
        Ok(())
    }
}

impl CpuKernel for MergeGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (dy, dlse) = (&x[x.len() - 2], &x[x.len() - 1]);
        let mut d: Vec<_> = y.chunks_exact(2).map(|p| (p[0].f32_mut(), p[1].f32_mut())).collect();
        mix(dy).merge_backward(&parts(&x[..x.len() - 2]), dy.f32(), dlse.f32(), &mut d);
        Ok(())
    }
}

impl CpuKernel for Attend {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        if !self.joint {
            evaluate(self, x, y);
            return Ok(());
        }
        let (q, kv) = (x[0].shape()[2] * x[0].shape()[3], x[1].shape()[2] * x[1].shape()[3]);
        chunked(x, self.chunk, self.scale, self.off_by_one).forward_joint(
            x[0].mat(q),
            x[1].chunk_rows(kv),
            x[2].chunk_rows(kv),
            x[3].i32(),
            x[4].i32(),
            y[0].mat_mut(q),
            y[1].f32_mut(),
        );
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> usize {
        if self.joint { chunked(x, self.chunk, self.scale, self.off_by_one).joint_scratch() } else { copies(x, y) }
    }
}

impl CpuKernel for AttendGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        if !self.joint {
            evaluate(self, x, y);
            return Ok(());
        }
        let (q, kv) = (x[0].shape()[2] * x[0].shape()[3], x[1].shape()[2] * x[1].shape()[3]);
        chunked(x, self.chunk, self.scale, self.off_by_one).backward_joint(
            x[0].mat(q),
            x[1].mat(kv),
            x[2].mat(kv),
            x[3].i32(),
            x[4].i32(),
            (x[5].mat(q), x[6].f32()),
            (x[7].mat(q), x[8].f32()),
            y[0].mat_mut(q),
            y[1].mat_mut(kv),
            y[2].mat_mut(kv),
        );
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> usize {
        if self.joint { chunked(x, self.chunk, self.scale, self.off_by_one).backward_scratch() } else { copies(x, y) }
    }
}
