//! The CPU device: one kernel per op of the list, over the plain functions of `rambac-cpu`.

mod arg;
mod attention;
mod map;
mod move_;
mod nn;
mod reference;
mod scan;
mod slots;

pub use arg::Arg;
use rambac_ir::for_each_op;
use rambac_ir::ops::*;
use rambac_ir::ty::ConcreteTy;

/// Why a kernel refused its operands.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error(
        "id {id} at position {at} is outside the table of {rows} rows; the tokenizer and the model do not belong together"
    )]
    Id { id: i32, at: usize, rows: usize },
    #[error("start {start} of sequence {at} is negative; positions count from 0")]
    Start { start: i32, at: usize },
    #[error("tokens up to {end} do not fit a memory of {holds}: open a session for a longer text")]
    Memory { end: usize, holds: usize },
    #[error("label {label} at position {at} is outside the {classes} classes (and is not the ignored label)")]
    Label { label: i32, at: usize, classes: usize },
}

/// Runs an op on bound operands and results.
pub(crate) trait CpuKernel {
    fn run(&self, x: &[Arg], y: &[Arg]) -> Result<(), KernelError>;

    /// Floats of scratch that `run` takes on its own thread, from the types of operands and results: the executor lends
    /// them from the arena.  What tasks take lies on their threads' stacks, see `rambac_cpu::par`.
    fn scratch(&self, _x: &[ConcreteTy], _y: &[ConcreteTy]) -> usize {
        0
    }
}

/// What has a concrete shape: an operand, or its type alone.
pub(crate) trait Shaped {
    fn shape(&self) -> &[usize];
}

impl Shaped for Arg<'_> {
    fn shape(&self) -> &[usize] {
        &self.ty.shape
    }
}

impl Shaped for ConcreteTy {
    fn shape(&self) -> &[usize] {
        &self.shape
    }
}

macro_rules! dispatch {
    ($($op:ident),* $(,)?) => {
        /// Runs any op.
        pub(crate) fn run_kernel(op: &Op, x: &[Arg], y: &[Arg]) -> Result<(), KernelError> {
            match op { $(Op::$op(o) => o.run(x, y)),* }
        }

        /// Bytes of scratch of any op's kernel, for the memory plan.
        pub fn scratch(op: &Op, x: &[ConcreteTy], y: &[ConcreteTy]) -> usize {
            let floats = match op { $(Op::$op(o) => CpuKernel::scratch(o, x, y)),* };
            floats * size_of::<f32>()
        }
    };
}
for_each_op!(dispatch);
