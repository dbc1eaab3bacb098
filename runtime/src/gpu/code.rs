//! What a program's kernels were compiled to.

use rambac_codegen::cuda::compile::compile;
use rambac_codegen::cuda::{GpuProgram, Kernel, Target};
use rambac_codegen::nvrtc::{Compiled, Nvrtc, NvrtcError};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Compiled kernels by name.
#[derive(Clone, Debug, Default)]
pub struct Code(pub BTreeMap<String, Compiled>);

impl Code {
    /// Compiles every kernel of a program, several at a time.
    ///
    /// # Errors
    /// The first kernel that does not compile, with the compiler's log.
    pub fn compile(nvrtc: &Nvrtc, program: &GpuProgram) -> Result<Code, NvrtcError> {
        Code::of(nvrtc, &program.kernels, &program.target)
    }

    /// Compiles these kernels.
    ///
    /// # Errors
    /// As [`compile`](Self::compile).
    pub fn of(nvrtc: &Nvrtc, kernels: &[Kernel], target: &Target) -> Result<Code, NvrtcError> {
        let one = |k: &Kernel| Ok((k.name.clone(), compile(nvrtc, k, target.arch)?));
        kernels.par_iter().map(one).collect::<Result<BTreeMap<_, _>, _>>().map(Code)
    }
}
