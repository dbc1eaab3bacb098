//! Program → GPU program: per step the forms it can run in, each a list of launches and library calls.
//!
//! - [`target`]: numbers of a GPU that choices depend on.  - [`expr`]: sizes of launches.  - [`form`]: kernels, launches,
//!   forms.  - [`stub`]: writes the short texts that instantiate the templates of `codegen/kernels`.
//! - [`ops`]: one file per family; **from the one list of ops**, so an op without an answer does not compile.
//! - [`headers`]: the templates, compiled in.  - [`emit()`]: all steps of a Program.  - [`pages`]: a memory in pages.
//!   [`join`]: steps within the
//!   steps beside them.
//! - [`tune`]: measures forms and tiles where there is a device; [`choices`]: what came of it.
//! - [`cache`]: what was compiled once.  - [`describe()`]: a GPU program as JSON.
//!
//! A kernel's text is a pure function of op, types and target.  Sizes that symbols decide are arguments, so nothing is
//! compiled again for another batch or length.

pub mod cache;
pub mod choices;
pub mod compile;
mod describe;
mod emit;
pub mod expr;
pub mod form;
pub mod headers;
pub mod join;
pub mod ops;
pub mod pages;
pub mod stub;
pub mod target;
pub mod tune;

pub use cache::{Cache, CompileError};
pub use describe::{describe, kernel};
pub use emit::{EmitError, GpuProgram, GpuStep, emit};
pub use expr::Expr;
pub use form::{Call, Condition, Form, Gemm, GemmOperand, Kernel, Launch, Operand, Param, TensorParam, Workspace};
pub use pages::{PagesError, paged};
pub use target::{Arch, Target};
