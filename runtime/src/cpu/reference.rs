//! Ops that run by their reference evaluation: per-chunk attention that was not fused, and a few that move little data.
//!
//! For the former the Program says so (`KernelTraits::reference`) and `explain` prints it.

use super::{Arg, CpuKernel, KernelError};
use rambac_ir::ops::*;
use rambac_ir::ty::ConcreteTy;
use rambac_ir::{DType, HostArray};

pub(super) fn evaluate(op: &dyn OpDef, x: &[Arg], y: &[Arg]) {
    let x: Vec<HostArray> = x.iter().map(Arg::to_host).collect();
    let tys: Vec<_> = y.iter().map(|a| a.ty.clone()).collect();
    let out = op.eval(&x.iter().collect::<Vec<_>>(), &tys);
    y.iter().zip(&out).for_each(|(y, v)| y.write_host(v));
}

/// Floats that an evaluation takes: copies on the heap, in f64; planned as if they were ours, so that the peak holds.
pub(super) fn copies(x: &[ConcreteTy], y: &[ConcreteTy]) -> usize {
    x.iter().chain(y).map(|t| 3 * t.elements()).sum()
}

macro_rules! by_reference {
    ($($op:ident),*) => {
        $(impl CpuKernel for $op {
            fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
                evaluate(self, x, y);
                Ok(())
            }
            fn scratch(&self, x: &[ConcreteTy], y: &[ConcreteTy]) -> usize {
                copies(x, y)
            }
        })*
    };
}
// Integers only (floats become maps), or counters: tiny.  So are bools that a kernel of four-byte elements moves.
by_reference! { Unary, Where, Iota }

impl CpuKernel for Binary {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        // Comparisons of integers are in every loss.
        if x[0].ty.dtype != DType::I32 || y[0].ty.dtype != DType::Bool {
            evaluate(self, x, y);
            return Ok(());
        }
        let pairs = x[0].i32().iter().zip(x[1].i32());
        pairs.zip(y[0].bool_mut()).for_each(|((&a, &b), y)| *y = self.f.eval(a as f64, b as f64) as u8);
        Ok(())
    }
}

impl CpuKernel for Source {
    fn run(&self, _: &[Arg], _: &[Arg]) -> Result<(), KernelError> {
        panic!("BUG: a source is no step")
    }
}
