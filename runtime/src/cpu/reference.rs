//! Ops that run by their reference evaluation: those that fusion should have removed, and a few that move little data.
//!
//! For the former the Program says so (`KernelTraits::reference`) and `explain` prints it.

use super::{Arg, CpuKernel, KernelError};
use rambac_ir::HostArray;
use rambac_ir::ops::*;

pub(super) fn evaluate(op: &dyn OpDef, x: &[Arg], y: &[Arg]) {
    let x: Vec<HostArray> = x.iter().map(Arg::to_host).collect();
    let tys: Vec<_> = y.iter().map(|a| a.ty.clone()).collect();
    let out = op.eval(&x.iter().collect::<Vec<_>>(), &tys);
    y.iter().zip(&out).for_each(|(y, v)| y.write_host(v));
}

macro_rules! by_reference {
    ($($op:ident),*) => {
        $(impl CpuKernel for $op {
            fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
                evaluate(self, x, y);
                Ok(())
            }
        })*
    };
}
by_reference! { Score, ScoreGrad, Select, Weigh, WeighGrad, Attend, AttendGrad, Aggregate, AggregateGrad }
// Integers only (floats become maps), or counters: tiny.  So are bools that a kernel of four-byte elements moves.
by_reference! { Unary, Binary, Where, Iota }

impl CpuKernel for Source {
    fn run(&self, _: &[Arg], _: &[Arg]) -> Result<(), KernelError> {
        panic!("BUG: a source is no step")
    }
}
