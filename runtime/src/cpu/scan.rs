//! The selective scan.

use super::{Arg, CpuKernel, KernelError, Shaped};
use rambac_cpu::kernels::scan;
use rambac_ir::ops::*;
use rambac_ir::ty::ConcreteTy;

fn shape(x: &[impl Shaped], block: usize) -> scan::SelectiveScan {
    let (s, b) = (x[0].shape(), x[3].shape());
    scan::SelectiveScan { n: s[0], l: s[1], heads: s[2], head_dim: s[3], groups: b[2], state: b[3], block }
}

impl CpuKernel for SelectiveScan {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let s = shape(x, self.block);
        let (e, gr) = (s.heads * s.head_dim, s.groups * s.state);
        let operands = scan::Operands {
            x: x[0].mat(e),
            dt: x[1].mat(s.heads),
            a: x[2].f32(),
            b: x[3].mat(gr),
            c: x[4].mat(gr),
            d: x[5].f32(),
        };
        if y[1].is(&x[6]) {
            s.forward_in_place(&operands, y[0].mat_mut(e), y[1].f32_mut());
        } else {
            s.forward(&operands, x[6].f32(), y[0].mat_mut(e), y[1].f32_mut());
        }
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        shape(x, self.block).forward_scratch()
    }
}

impl CpuKernel for SelectiveScanGrad {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
        let s = shape(x, self.block);
        let (e, gr) = (s.heads * s.head_dim, s.groups * s.state);
        s.backward(
            x[0].mat(e),
            x[1].mat(s.heads),
            x[2].f32(),
            x[3].mat(gr),
            x[4].mat(gr),
            x[5].f32(),
            x[6].f32(),
            x[7].mat(e),
            x[8].f32(),
            y[0].mat_mut(e),
            y[1].mat_mut(s.heads),
            y[2].f32_mut(),
            y[3].mat_mut(gr),
            y[4].mat_mut(gr),
            y[5].f32_mut(),
            y[6].f32_mut(),
        );
        Ok(())
    }
    fn scratch(&self, x: &[ConcreteTy], _: &[ConcreteTy]) -> usize {
        shape(x, self.block).backward_scratch()
    }
}
