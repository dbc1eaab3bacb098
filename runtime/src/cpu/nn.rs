//! Products, norms, embeddings, loss, convolution, rotary, reductions.

use super::map::Region;
use super::{Arg, CpuKernel, KernelError, Shaped};
use rambac_cpu::kernels::{conv, cross_entropy, embedding, gemm, linear_cross_entropy as lce, norm, reduce, rotary};
use rambac_cpu::par;
use rambac_ir::DType;
use rambac_ir::ops::*;
use rambac_ir::ty::ConcreteTy;
use std::ops::Range;

fn last(x: &impl Shaped) -> usize {
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
    fn scratch(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> usize {
        let r = x[0].shape.len();
        let (rows, n) = (y[0].shape[..r - 1].iter().product(), last(&y[0]));
        let k = x[0].shape[r - if self.trans_a { 2 } else { 1 }];
        // Batched products are tasks.
        match x[1].shape.len() {
            2 if x[1].dtype == DType::BF16 => gemm::scratch_bf16(rows, n, k),
            2 => gemm::scratch(rows, n, k, self.trans_a, self.trans_b),
            _ => 0,
        }
    }
}

impl CpuKernel for MatMulMap {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let n = last(&y[0]);
        // The product waits in the first result, or beside where that is no f32.
        let (mut beside, ty);
        let held = if y[0].ty.dtype == DType::F32 {
            y[0].reborrow()
        } else {
            ty = ConcreteTy { dtype: DType::F32, shape: y[0].shape().to_vec() };
            beside = vec![0.0f32; ty.elements()];
            Arg::new(beside.as_mut_ptr().cast(), 0, &ty, None)
        };
        let region = Region::new(&self.body, &self.outs, Some(&held), &x[2..], y);
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
    fn scratch(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> usize {
        self.product().scratch(&x[..2], &y[..1])
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
        let d = x[0].rows_for(last(&x[0]), &[&x[2], x.get(3).unwrap_or(&x[2]), &y[0]]);
        let (dy, base) = (x[2].mat(d), x.get(3).map(|b| b.mat(d)));
        norm::rms_norm_backward(x[0].mat(d), x[1].f32(), self.eps as f32, dy, base, y[0].mat_mut(d), y[1].f32_mut());
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        let width = last(&x[0]);
        norm::rms_norm_backward_scratch(x[0].elements().checked_div(width).unwrap_or(0), width, width)
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
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        let width = last(&x[0]);
        norm::gated_rms_norm_backward_scratch(x[0].elements().checked_div(width).unwrap_or(0), width, width)
    }
}

impl CpuKernel for Rotary {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let s = x[0].shape();
        let (t, h, d) = (s[s.len() - 3], s[s.len() - 2], s[s.len() - 1]);
        let start = x.get(1).map_or(&[][..], Arg::i32);
        rotary::apply(x[0].mat(h * d), t, d, self.base as f32, start, self.inverse, y[0].mat_mut(h * d));
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        let s = x[0].shape();
        // With starts, every row has a table of its own.
        let rows = if x.len() > 1 { s[0] * s[1] } else { s[s.len() - 3] };
        rotary::scratch(rows, s[s.len() - 1])
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
    fn scratch(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> usize {
        par::rounded(embedding::scatter_scratch(x[0].elements(), y[0].shape[0]))
    }
}

fn check_labels(labels: &[i32], classes: usize, ignore: i64) -> Result<(), KernelError> {
    let bad = |&l: &i32| l as i64 != ignore && (l < 0 || l as usize >= classes);
    match labels.iter().position(bad) {
        Some(at) => Err(KernelError::Label { label: labels[at], at, classes }),
        None => Ok(()),
    }
}

/// Calls `f` with the labels, `ignore` among them as the kernels know it.
fn with_labels(x: &Arg, ignore: i64, f: impl FnOnce(&[i32])) {
    if ignore == i64::from(cross_entropy::IGNORE) {
        return f(x.i32());
    }
    par::with_plain(x.len(), |labels: &mut [i32]| {
        let known = |l: i32| if i64::from(l) == ignore { cross_entropy::IGNORE } else { l };
        labels.iter_mut().zip(x.i32()).for_each(|(to, &l)| *to = known(l));
        f(labels);
    });
}

/// Floats of scratch that [`with_labels`] takes.
fn labels_scratch(x: &ConcreteTy, ignore: i64) -> usize {
    if ignore == i64::from(cross_entropy::IGNORE) { 0 } else { par::rounded(x.elements()) }
}

impl CpuKernel for CrossEntropy {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let v = last(&x[0]);
        check_labels(x[1].i32(), v, self.ignore)?;
        with_labels(&x[1], self.ignore, |labels| {
            par::with_scratch(labels.len(), |lse| {
                cross_entropy::forward(x[0].mat(v), labels, y[0].f32_mut(), lse);
            });
        });
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        labels_scratch(&x[1], self.ignore) + par::rounded(x[1].elements())
    }
}

impl CpuKernel for CrossEntropyGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let v = last(&x[0]);
        check_labels(x[1].i32(), v, self.ignore)?;
        with_labels(&x[1], self.ignore, |labels| {
            par::with_scratch(2 * labels.len(), |buf| {
                let (loss, lse) = buf.split_at_mut(labels.len());
                cross_entropy::forward(x[0].mat(v), labels, loss, lse);
                cross_entropy::backward(x[0].mat(v), labels, lse, x[2].f32(), y[0].mat_mut(v));
            });
        });
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        labels_scratch(&x[1], self.ignore) + par::rounded(2 * x[1].elements())
    }
}

fn loss_of(x: &[impl Shaped]) -> lce::LinearCrossEntropy {
    let w = x[1].shape();
    lce::LinearCrossEntropy { rows: x[2].shape().iter().product(), vocab: w[0], dim: w[1] }
}

impl CpuKernel for LinearCrossEntropy {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let loss = loss_of(x);
        check_labels(x[2].i32(), loss.vocab, self.ignore)?;
        with_labels(&x[2], self.ignore, |labels| {
            loss.forward(x[0].mat(loss.dim), x[1].mat(loss.dim), labels, y[0].f32_mut());
        });
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        labels_scratch(&x[2], self.ignore) + loss_of(x).forward_scratch()
    }
}

impl CpuKernel for LinearCrossEntropyGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let loss = loss_of(x);
        check_labels(x[2].i32(), loss.vocab, self.ignore)?;
        let d = loss.dim;
        with_labels(&x[2], self.ignore, |labels| {
            let (dh, dw) = (y[0].mat_mut(d), y[1].mat_mut(d));
            loss.backward(x[0].mat(d), x[1].mat(d), labels, x[3].f32(), dh, dw, y[2].f32_mut());
        });
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        labels_scratch(&x[2], self.ignore) + loss_of(x).backward_scratch()
    }
}

fn conv_of(x: &[impl Shaped], silu: bool) -> conv::CausalConv1d {
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
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        conv_of(x, self.silu).backward_scratch()
    }
}

/// One run of neighbouring axes of a [`Reduce`].  Runs are taken from the last, so that earlier axes keep their place.
struct AxisRun<'a> {
    outer: usize,
    axis: usize,
    inner: usize,
    /// The axes before it that are still to be reduced.
    rest: &'a [usize],
}

impl<'a> AxisRun<'a> {
    /// The last run of `axes`, the first ones of `all`: what follows them is gone already.
    fn last(shape: &[usize], axes: &'a [usize], all: &[usize]) -> Option<Self> {
        let (&end, mut rest) = axes.split_last()?;
        let mut first = end;
        while let Some((&axis, before)) = rest.split_last().filter(|(a, _)| **a + 1 == first) {
            (first, rest) = (axis, before);
        }
        let outer = shape[..first].iter().product();
        let axis = shape[first..=end].iter().product();
        let inner = (end + 1..shape.len()).filter(|i| !all.contains(i)).map(|i| shape[i]).product();
        Some(Self { outer, axis, inner, rest })
    }

    fn scratch(&self) -> usize {
        let own = reduce::scratch(self.outer, self.axis, self.inner);
        if self.rest.is_empty() { own } else { own + par::rounded(self.outer * self.inner) }
    }
}

fn reduce_axes(f: ReduceFn, src: &[f32], shape: &[usize], axes: &[usize], all: &[usize], y: &mut [f32]) {
    let Some(AxisRun { outer, axis, inner, rest }) = AxisRun::last(shape, axes, all) else {
        return y.copy_from_slice(src);
    };
    let run = |out: &mut [f32]| match f {
        ReduceFn::Sum => reduce::sum(src, outer, axis, inner, out),
        ReduceFn::Max => reduce::max(src, outer, axis, inner, out),
    };
    if rest.is_empty() {
        return run(y);
    }
    par::with_scratch(outer * inner, |out| {
        run(out);
        reduce_axes(f, out, shape, rest, all, y);
    });
}

impl CpuKernel for Reduce {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        reduce_axes(self.f, x[0].f32(), x[0].shape(), &self.axes, &self.axes, y[0].f32_mut());
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        let (mut axes, mut all) = (&self.axes[..], 0);
        while let Some(run) = AxisRun::last(&x[0].shape, axes, &self.axes) {
            all += run.scratch();
            axes = run.rest;
        }
        all
    }
}

impl CpuKernel for SumSquares {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        y[0].f32_mut()[0] = x.iter().map(|x| reduce::sum_squares(x.f32())).sum::<f64>() as f32;
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        x.iter().map(|t| reduce::scratch(1, t.elements(), 1)).max().unwrap_or(0)
    }
}

impl CpuKernel for Summarise {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let s = y[0].shape();
        let inner = s[2..].iter().product();
        let better: Option<fn(f32, f32) -> bool> = match self.mode {
            Summary::Mean => None,
            Summary::Max => Some(|a, b| a > b),
            Summary::Min => Some(|a, b| a < b),
        };
        if let Some(better) = better {
            let (x, w): (&[f32], usize) = (x[0].f32(), inner);
            for (rows, y) in x.chunks_exact((self.chunk * w).max(1)).zip(y[0].f32_mut().chunks_exact_mut(w.max(1))) {
                y.copy_from_slice(&rows[..w]);
                for row in rows[w..].chunks_exact(w) {
                    y.iter_mut().zip(row).filter(|(y, x)| better(**x, **y)).for_each(|(y, x)| *y = *x);
                }
            }
            return Ok(());
        }
        reduce::sum_scaled(x[0].f32(), s[0] * s[1], self.chunk, inner, 1.0 / self.chunk as f32, y[0].f32_mut());
        Ok(())
    }
    fn scratch(&self, _: &[ConcreteTy], y: &[ConcreteTy]) -> usize {
        let s = y[0].shape();
        reduce::scratch(s[0] * s[1], self.chunk, s[2..].iter().product())
    }
}
