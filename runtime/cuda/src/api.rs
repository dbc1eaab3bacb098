//! Results of the driver's functions as errors.

use cudarc::driver::sys::{self, CUresult};
use rambac_driver::{Error, Result};
use std::ffi::CStr;

/// `an illegal memory access was encountered (CUDA_ERROR_ILLEGAL_ADDRESS)`
pub(crate) fn words(code: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: a valid pointer; the text is static.
    let known = unsafe { sys::cuGetErrorString(code, &raw mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
    match known {
        // SAFETY: the driver gave a static string.
        true => format!("{} ({code:?})", unsafe { CStr::from_ptr(text) }.to_string_lossy()),
        false => format!("{code:?}"),
    }
}

/// Whether the context is dead after it.
fn fatal(code: CUresult) -> bool {
    use CUresult::*;
    matches!(
        code,
        CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_INVALID_CONTEXT
            | CUDA_ERROR_DEINITIALIZED
            | CUDA_ERROR_EXTERNAL_DEVICE
            | CUDA_ERROR_CONTAINED
            | CUDA_ERROR_TENSOR_MEMORY_LEAK
            | CUDA_ERROR_UNKNOWN
    )
}

/// What to do about an error, where that is known.
fn remedy(code: CUresult) -> &'static str {
    use CUresult::*;
    match code {
        CUDA_ERROR_NO_DEVICE => {
            ": the driver sees no GPU; in a container give it one, and look at CUDA_VISIBLE_DEVICES"
        }
        CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => ": the driver's library and its kernel module differ; restart the machine",
        CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            ": the compiler is newer than the driver; install a newer driver, or compile with an older NVRTC (RAMBAC_NVRTC)"
        }
        CUDA_ERROR_NO_BINARY_FOR_GPU | CUDA_ERROR_INVALID_PTX => {
            ": the code is for another GPU; compile it for this one"
        }
        CUDA_ERROR_DEVICE_UNAVAILABLE => ": another process has the GPU for itself",
        CUDA_ERROR_ILLEGAL_ADDRESS | CUDA_ERROR_MISALIGNED_ADDRESS => {
            ": a kernel is wrong; `--device simulator` on a small size shows where"
        }
        _ => "",
    }
}

/// `call` gave `code`.
///
/// # Errors
/// It did not succeed.
pub(crate) fn check(call: &str, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let what = format!("CUDA fails at {call}, {}{}", words(code), remedy(code));
    Err(match code {
        CUresult::CUDA_ERROR_NO_DEVICE | CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => Error::Absent(what),
        code if fatal(code) => Error::Lost { what, finished: None },
        _ => Error::refused(what),
    })
}
