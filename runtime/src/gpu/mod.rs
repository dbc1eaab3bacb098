//! Runs GPU programs on any [`Device`]: the simulator, a CUDA device.
//!
//! [`Code`] is what a program's kernels were compiled to; a [`Machine`] is a device with the values and programs that share it;
//! [`Bytes`] is what goes in and comes out; a [`Measurer`] runs candidates of a step against each other.

mod bound;
mod bytes;
mod code;
mod error;
mod machine;
mod measure;

pub use bytes::Bytes;
pub use code::{Code, archs};
pub use error::GpuError;
pub use machine::{Machine, Placement, ProgramId};
pub use measure::{Measurer, Timed};
pub use rambac_driver::{Device, Error as DeviceError};
