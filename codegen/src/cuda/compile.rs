//! Stubs → PTX and CUBIN by NVRTC.

use super::form::Kernel;
use super::headers::included;
use super::target::Arch;
use crate::nvrtc::{Compiled, Nvrtc, NvrtcError};

/// Options of every compilation; the architecture comes before them.
pub const OPTIONS: &[&str] = &["--std=c++17", "-lineinfo", "--ptxas-options=-v", "--fmad=true"];

/// Compiles a kernel for an architecture: PTX, CUBIN and what ptxas says of registers, spills and shared memory.
///
/// # Errors
/// The compiler's log, with the stub's name; or the library fails.
pub fn compile(nvrtc: &Nvrtc, kernel: &Kernel, arch: Arch) -> Result<Compiled, NvrtcError> {
    let arch = format!("--gpu-architecture={arch}");
    let options: Vec<&str> = std::iter::once(arch.as_str()).chain(OPTIONS.iter().copied()).collect();
    nvrtc.compile(&format!("{}.cu", kernel.name), &kernel.source, &included(&kernel.source), &options)
}
