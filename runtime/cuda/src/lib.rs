//! A CUDA device behind the interface of `rambac-driver`.
//!
//! The driver and cuBLASLt are loaded when they are asked for: what a machine lacks is an ordinary error that says what to
//! do.  [`survey`] tells what is here without opening anything; [`CudaDevice::open`] opens a device.
//!
//! - *Invariant:* nothing panics for want of a library, a device or memory, nor after a fault.
//! - *Invariant:* every call of CUDA's happens with the device's context current on the calling thread, in one stream.

mod api;
mod device;
mod gemm;
mod host;
mod library;
mod ranges;
mod survey;
mod tensor;

pub use device::CudaDevice;
pub use library::{CUBLASLT, CUBLASLT_HELP, DRIVER_HELP, Library};
pub use ranges::RANGES;
pub use survey::{Gpu, Survey, survey};
