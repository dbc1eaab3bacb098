//! Products, norms, embeddings, loss, convolution, rotary, reductions.

use super::map::Region;
use super::{Arg, CpuKernel, KernelError};
use rambac_cpu::kernels::{conv, cross_entropy, embedding, gemm, norm, reduce, rotary};
use rambac_ir::DType;
use rambac_ir::ops::*;
use rambac_ir::ty::ConcreteTy;
use std::ops::Range;

fn last(x: &Arg) -> usize {
    x.shape().last().copied().unwrap_or(1)
}

impl CpuKernel for MatMul {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let r = x[0].shape().len();
        if x[1].shape().len() == 2 {
            // One matrix for all rows.
            let (a, c) = (x[0].mat(last(&x[0])), y[0].mat_mut(last(&y[0])));
            if x[1].ty.dtype == DType::BF16 {
                gemm::matmul_bf16(a, x[1].mat_bf16(last(&x[1])), c, None);
                return Ok(());
            }
            let b = x[1].mat(last(&x[1]));
            gemm::matmul(a, self.trans_a, b, self.trans_b, c, false);
            return Ok(());
        }
        let (m, n) = (y[0].shape()[r - 2], y[0].shape()[r - 1]);
        let k = x[0].shape()[r - if self.trans_a { 2 } else { 1 }];
        let batch = y[0].shape()[..r - 2].iter().product();
        gemm::batched_matmul(batch, x[0].f32(), x[1].f32(), y[0].f32_mut(), m, n, k, self.trans_a, self.trans_b);
        Ok(())
    }
}

impl CpuKernel for MatMulMap {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let n = last(&y[0]);
        // The product waits in the first result, or beside where that is no f32.
        let (mut beside, ty) = (vec![], ConcreteTy { dtype: DType::F32, shape: y[0].shape().to_vec() });
        let held = if y[0].ty.dtype == DType::F32 {
            y[0].reborrow()
        } else {
            beside.resize(ty.elements(), 0.0f32);
            Arg::new(beside.as_mut_ptr().cast(), 0, &ty, None)
        };
        let operands: Vec<&Arg> = std::iter::once(&held).chain(&x[2..]).collect();
        let region = Region::new(&self.body, &self.outs, operands, y);
        let then = |rows: Range<usize>, cols: Range<usize>| {
            // SAFETY: every element is in one part, and its product is finished.
            unsafe { region.part(n, rows, cols) }
        };
        let (a, c) = (x[0].mat(last(&x[0])), held.mat_mut(n));
        match x[1].ty.dtype {
            DType::BF16 => gemm::matmul_bf16(a, x[1].mat_bf16(last(&x[1])), c, Some(&then)),
            _ => gemm::matmul_then(a, self.trans_a, x[1].mat(last(&x[1])), self.trans_b, c, &then),
        }
        Ok(())
    }
}

impl CpuKernel for RmsNorm {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let d = x[0].rows_for(last(&x[0]), &[&y[0]]);
        norm::rms_norm(x[0].mat(d), x[1].f32(), self.eps as f32, y[0].mat_mut(d));
        Ok(())
    }
}

impl CpuKernel for RmsNormGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let others: Vec<&Arg> = x[2..].iter().chain([&y[0]]).collect();
        let d = x[0].rows_for(last(&x[0]), &others);
        let (dy, base) = (x[2].mat(d), x.get(3).map(|b| b.mat(d)));
        norm::rms_norm_backward(x[0].mat(d), x[1].f32(), self.eps as f32, dy, base, y[0].mat_mut(d), y[1].f32_mut());
        Ok(())
    }
}

impl CpuKernel for GatedRmsNorm {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let d = x[0].rows_for(last(&x[0]), &[&x[1], &y[0]]);
        norm::gated_rms_norm(x[0].mat(d), x[1].mat(d), x[2].f32(), self.eps as f32, y[0].mat_mut(d));
        Ok(())
    }
}

impl CpuKernel for GatedRmsNormGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let d = x[0].rows_for(last(&x[0]), &[&x[1], &x[3], &y[0], &y[1]]);
        norm::gated_rms_norm_backward(
            x[0].mat(d),
            x[1].mat(d),
            x[2].f32(),
            self.eps as f32,
            x[3].mat(d),
            y[0].mat_mut(d),
            y[1].mat_mut(d),
            y[2].f32_mut(),
        );
        Ok(())
    }
}

impl CpuKernel for Rotary {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let s = x[0].shape();
        let (t, h, d) = (s[s.len() - 3], s[s.len() - 2], s[s.len() - 1]);
        rotary::apply(x[0].mat(h * d), t, d, self.base as f32, &[], self.inverse, y[0].mat_mut(h * d));
        Ok(())
    }
}

fn check_ids(ids: &[i32], rows: usize) -> Result<(), KernelError> {
    match ids.iter().position(|&id| id < 0 || id as usize >= rows) {
        Some(at) => Err(KernelError::Id { id: ids[at], at, rows }),
        None => Ok(()),
    }
}

impl CpuKernel for Embedding {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (ids, d) = (x[0].i32(), last(&x[1]));
        check_ids(ids, x[1].shape()[0])?;
        match x[1].ty.dtype {
            DType::BF16 => embedding::gather_bf16(ids, x[1].mat_bf16(d), y[0].mat_mut(d)),
            _ => embedding::gather(ids, x[1].mat(d), y[0].mat_mut(d)),
        }
        Ok(())
    }
}

impl CpuKernel for EmbeddingGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (ids, d) = (x[0].i32(), last(&x[1]));
        check_ids(ids, y[0].shape()[0])?;
        embedding::scatter_add(ids, x[1].mat(d), y[0].mat_mut(d));
        Ok(())
    }
}

fn check_labels(labels: &[i32], classes: usize, ignore: i64) -> Result<(), KernelError> {
    let bad = |&l: &i32| l as i64 != ignore && (l < 0 || l as usize >= classes);
    match labels.iter().position(bad) {
        Some(at) => Err(KernelError::Label { label: labels[at], at, classes }),
        None => Ok(()),
    }
}

/// Labels with `ignore` as the kernels know it.
fn labels(x: &Arg, ignore: i64) -> Vec<i32> {
    x.i32().iter().map(|&l| if l as i64 == ignore { -100 } else { l }).collect()
}

impl CpuKernel for CrossEntropy {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let v = last(&x[0]);
        check_labels(x[1].i32(), v, self.ignore)?;
        let mut lse = vec![0.0; x[1].len()];
        cross_entropy::forward(x[0].mat(v), &labels(&x[1], self.ignore), y[0].f32_mut(), &mut lse);
        Ok(())
    }
}

impl CpuKernel for CrossEntropyGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let v = last(&x[0]);
        check_labels(x[1].i32(), v, self.ignore)?;
        let labels = labels(&x[1], self.ignore);
        let (mut loss, mut lse) = (vec![0.0; labels.len()], vec![0.0; labels.len()]);
        cross_entropy::forward(x[0].mat(v), &labels, &mut loss, &mut lse);
        cross_entropy::backward(x[0].mat(v), &labels, &lse, x[2].f32(), y[0].mat_mut(v));
        Ok(())
    }
}

fn conv_of(x: &[Arg], silu: bool) -> conv::CausalConv1d {
    let s = x[0].shape();
    conv::CausalConv1d { n: s[0], l: s[1], channels: s[2], kernel: x[1].shape()[2], silu }
}

impl CpuKernel for CausalConv1d {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let c = last(&x[0]);
        let (conv, out) = (conv_of(x, self.silu), y[0].mat_mut(c));
        if y[1].is(&x[3]) {
            conv.forward_in_place(x[0].mat(c), x[1].f32(), x[2].f32(), out, y[1].f32_mut());
        } else {
            conv.forward(x[0].mat(c), x[1].f32(), x[2].f32(), x[3].f32(), out, y[1].f32_mut());
        }
        Ok(())
    }
}

impl CpuKernel for CausalConv1dGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let c = last(&x[0]);
        conv_of(x, self.silu).backward(
            x[0].mat(c),
            x[1].f32(),
            x[2].f32(),
            x[3].f32(),
            x[4].mat(c),
            x[5].f32(),
            y[0].mat_mut(c),
            y[1].f32_mut(),
            y[2].f32_mut(),
            y[3].f32_mut(),
        );
        Ok(())
    }
}

impl CpuKernel for Reduce {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (mut shape, mut axes) = (x[0].shape().to_vec(), self.axes.clone());
        let mut held: Option<Vec<f32>> = None;
        // Runs of neighbouring axes reduce at once; from the last, so that earlier axes keep their place.
        while let Some(end) = axes.pop() {
            let mut first = end;
            while axes.last().is_some_and(|&a| a + 1 == first) {
                first = axes.pop().expect("BUG: tested in the loop");
            }
            let (outer, axis, inner) = (
                shape[..first].iter().product(),
                shape[first..=end].iter().product(),
                shape[end + 1..].iter().product::<usize>(),
            );
            let run = |src: &[f32], out: &mut [f32]| match self.f {
                ReduceFn::Sum => reduce::sum(src, outer, axis, inner, out),
                ReduceFn::Max => reduce::max(src, outer, axis, inner, out),
            };
            let src = held.as_deref().unwrap_or_else(|| x[0].f32());
            if axes.is_empty() {
                run(src, y[0].f32_mut());
                return Ok(());
            }
            let mut out = vec![0.0; outer * inner];
            run(src, &mut out);
            shape.drain(first..=end);
            held = Some(out);
        }
        y[0].f32_mut().copy_from_slice(x[0].f32());
        Ok(())
    }
}

impl CpuKernel for Summarise {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let s = y[0].shape();
        let inner = s[2..].iter().product();
        reduce::sum_scaled(x[0].f32(), s[0] * s[1], self.chunk, inner, 1.0 / self.chunk as f32, y[0].f32_mut());
        Ok(())
    }
}
