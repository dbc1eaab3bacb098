//! Kernels that move elements: copies between strides, constants, broadcasts, transposes, padding.

use super::reference::evaluate;
use super::{Arg, CpuKernel, KernelError, Shaped};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rambac_cpu::kernels::gemm::widen;
use rambac_cpu::kernels::transpose::permute;
use rambac_cpu::par::{self, SharedMut};
use rambac_ir::DType;
use rambac_ir::ops::*;

/// Copies `x` to `y`, either of which may be strided.
fn copy(x: &Arg, y: &Arg) {
    let size = x.ty.dtype.size();
    let ((_, cx, sx), (_, cy, sy)) = (x.rows(), y.rows());
    let n = x.len();
    if n == 0 {
        return;
    }
    // Runs that are contiguous on both sides, batched so that a task is worth its start.
    let run = if cx.is_multiple_of(cy) {
        cy
    } else if cy.is_multiple_of(cx) {
        cx
    } else {
        gcd(cx, cy)
    };
    let per_task = ((64 * 1024) / (run * size)).max(1);
    let runs = n / run;
    par::for_blocks(runs, per_task, n, |_, start, end| {
        for r in start..end {
            let i = r * run;
            let (from, to) = (i / cx * sx + i % cx, i / cy * sy + i % cy);
            // SAFETY: both lie inside their views; views of different buffers do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(x.ptr().add(from * size), y.ptr().add(to * size), run * size) };
        }
    });
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl CpuKernel for Reshape {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        copy(&x[0], &y[0]);
        Ok(())
    }
}

impl CpuKernel for Append {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let (shape, l, size) = (x[0].shape(), x[1].shape()[1], x[0].ty.dtype.size());
        if !y[0].is(&x[0]) {
            copy(&x[0], &y[0]);
        }
        let width = shape[2..].iter().product::<usize>() * size;
        for (n, &start) in x[2].i32().iter().enumerate() {
            let start = usize::try_from(start).map_err(|_| KernelError::Start { start, at: n })?;
            if start + l > shape[1] {
                return Err(KernelError::Memory { end: start + l, holds: shape[1] });
            }
            let (from, to) = (n * l * width, (n * shape[1] + start) * width);
            // SAFETY: whole rows of contiguous arrays, inside them as was tested; rows and memory are different buffers.
            unsafe { std::ptr::copy_nonoverlapping(x[1].ptr().add(from), y[0].ptr().add(to), l * width) };
        }
        Ok(())
    }
}

impl CpuKernel for Slice {
    fn run(&self, _: &[Arg], _: &[Arg]) -> Result<(), KernelError> {
        panic!("BUG: a slice is a view, not a step")
    }
}

impl CpuKernel for Concat {
    fn run(&self, _: &[Arg], _: &[Arg]) -> Result<(), KernelError> {
        panic!("BUG: a concat is lowered to copies")
    }
}

impl CpuKernel for Constant {
    fn run(&self, _: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        match self.ty.dtype {
            DType::I32 => y[0].i32_mut().fill(self.value as i32),
            // SAFETY: a contiguous result of one byte an element.
            DType::Bool => unsafe { std::ptr::write_bytes(y[0].ptr(), self.value as u8, y[0].len()) },
            DType::BF16 => y[0].bf16_mut().fill(bf16::from_f32(self.value as f32)),
            _ => y[0].f32_mut().fill(self.value as f32),
        }
        Ok(())
    }
}

impl CpuKernel for Cast {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        /// Elements of a task.
        const BLOCK: usize = 1 << 15;
        let n = y[0].len();
        match (x[0].ty.dtype, self.to) {
            (DType::BF16, DType::F32) => {
                let (from, to) = (x[0].bf16(), SharedMut::new(y[0].f32_mut()));
                // SAFETY: blocks are disjoint.
                par::for_blocks(n, BLOCK, n, |_, s, e| widen(&from[s..e], unsafe { to.slice(s, e - s) }));
            }
            (DType::F32, DType::BF16) => {
                let (from, to) = (x[0].f32(), SharedMut::new(y[0].bf16_mut()));
                par::for_blocks(n, BLOCK, n, |_, s, e| {
                    // SAFETY: blocks are disjoint.
                    unsafe { to.slice(s, e - s) }.convert_from_f32_slice(&from[s..e]);
                });
            }
            // Integers: tiny.
            _ => evaluate(self, x, y),
        }
        Ok(())
    }
}

/// Four-byte elements of a contiguous operand.
fn words<'a>(x: &'a Arg) -> &'a [u32] {
    assert!(x.ty.dtype.size() == 4 && x.is_contiguous(), "BUG: contiguous four-byte elements wanted, got {}", x.ty);
    // SAFETY: `Arg`'s contract; f32 and i32 have the size and alignment of u32.
    unsafe { std::slice::from_raw_parts(x.ptr().cast(), x.len()) }
}

#[allow(clippy::mut_from_ref)]
fn words_mut<'a>(x: &'a Arg) -> &'a mut [u32] {
    assert!(x.ty.dtype.size() == 4 && x.is_contiguous(), "BUG: contiguous four-byte elements wanted, got {}", x.ty);
    // SAFETY: as `words`; a kernel takes each result once.
    unsafe { std::slice::from_raw_parts_mut(x.ptr().cast(), x.len()) }
}

/// Calls `f` with every row of `len` elements of `y` and its index.
fn for_rows(y: &mut [u32], len: usize, f: impl Fn(usize, &mut [u32]) + Sync + Send) {
    let (rows, all) = (y.len() / len, SharedMut::new(y));
    par::for_blocks(rows, (16 * 1024 / len).max(1), rows * len, |_, start, end| {
        // SAFETY: rows are disjoint.
        (start..end).for_each(|r| f(r, unsafe { all.slice(r * len, len) }));
    });
}

impl CpuKernel for Transpose {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        if y[0].ty.dtype.size() != 4 {
            evaluate(self, x, y);
            return Ok(());
        }
        if x[0].len() > 0 {
            permute(words(&x[0]), x[0].shape(), &self.perm, words_mut(&y[0]));
        }
        Ok(())
    }
}

impl CpuKernel for Broadcast {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        if y[0].ty.dtype.size() != 4 {
            evaluate(self, x, y);
            return Ok(());
        }
        if y[0].len() == 0 {
            return Ok(());
        }
        let (from, to) = (x[0].shape(), y[0].shape());
        let skip = to.len() - from.len();
        let inner = to.last().copied().unwrap_or(1);
        let repeats = from.last().is_none_or(|&d| d == 1);
        let src = words(&x[0]);
        // Where row r of the result begins in the operand: its last axis aside, axis by axis from the right.
        let place = |r: usize| {
            let (mut rest, mut at) = (r, 0);
            let mut stride = from.last().copied().unwrap_or(1);
            for k in (0..to.len().saturating_sub(1)).rev() {
                let index = rest % to[k];
                rest /= to[k];
                if k >= skip {
                    at += if from[k - skip] == 1 { 0 } else { index * stride };
                    stride *= from[k - skip];
                }
            }
            at
        };
        for_rows(words_mut(&y[0]), inner, |r, out| {
            let at = place(r);
            if repeats { out.fill(src[at]) } else { out.copy_from_slice(&src[at..at + inner]) }
        });
        Ok(())
    }
}

impl CpuKernel for Pad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        if y[0].ty.dtype.size() != 4 {
            evaluate(self, x, y);
            return Ok(());
        }
        let inner: usize = y[0].shape()[self.axis + 1..].iter().product();
        let (from, to) = (x[0].shape()[self.axis] * inner, y[0].shape()[self.axis] * inner);
        if to == 0 {
            return Ok(());
        }
        let skip = self.before * inner;
        let src = words(&x[0]);
        for_rows(words_mut(&y[0]), to, |r, out| {
            out[..skip].fill(0);
            out[skip..skip + from].copy_from_slice(&src[r * from..(r + 1) * from]);
            out[skip + from..].fill(0);
        });
        Ok(())
    }
}
