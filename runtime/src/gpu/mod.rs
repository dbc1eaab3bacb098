//! Runs GPU programs on any [`Device`]: the simulator, a CUDA device.
//!
//! [`Code`] is what a program's kernels were compiled to; a [`Machine`] is a device with the values and programs that share it;
//! [`Bytes`] is what goes in and comes out.

mod bound;
mod bytes;
mod code;
mod error;
mod machine;

pub use bytes::Bytes;
pub use code::{Code, archs};
pub use error::GpuError;
pub use machine::{Chosen, Machine, Placement, ProgramId};
pub use rambac_driver::{Device, Error as DeviceError};
