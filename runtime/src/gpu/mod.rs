//! Runs GPU programs on any device that takes PTX: the simulator, and what else implements its [`Device`].
//!
//! [`Code`] is what a program's kernels were compiled to; [`GpuExecutor`] owns the device's memory and runs steps; [`Bytes`] is
//! what goes in and comes out; [`Hosted`] takes a store in place of them.

mod bytes;
mod code;
mod executor;
mod hosted;

pub use bytes::Bytes;
pub use code::Code;
pub use executor::{GpuError, GpuExecutor, Placement};
pub use hosted::Hosted;
pub use rambac_simulator::device::Device;
