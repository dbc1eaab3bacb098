//! Graph → Program: views instead of copies, steps, buffers with lifetimes, the memory plan.
//!
//! - [`program`]: what a Program is.
//! - [`mod@lower`]: makes one from an optimised graph.
//! - [`traits`]: what each op's kernels accept, from the one list of ops.
//! - [`mod@plan`]: addresses and the peak at concrete dims.
//! - [`mod@fit`]: what to compute again so that the peak stays below a limit.
//! - [`describe`]: a Program as JSON, for the executable file and its readers.
//! - [`cuda`]: Program → GPU program: forms, launches, stubs over the templates of `kernels/`.
//! - [`libraries`]: where NVIDIA's may lie.
//! - [`nvrtc`]: CUDA C++ → PTX and CUBIN, where NVIDIA's compiler library is installed.

pub mod cuda;
pub mod describe;
pub mod fit;
pub mod hash;
pub mod libraries;
pub mod lower;
mod narrow;
pub mod nvrtc;
mod overlay;
pub mod plan;
pub mod program;
pub mod traits;

pub use fit::{Fit, FitError, Machine, Memory, fit};
pub use lower::{lower, lower_for};
pub use plan::{MemoryPlan, Scratch, no_scratch, plan, plan_with};
pub use program::{Buffer, BufferId, BufferKind, Program, Step, View};
pub use traits::Kernels;
