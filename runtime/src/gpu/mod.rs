//! Runs GPU programs on any [`Device`]: the simulator, a CUDA device.
//!
//! [`Code`] is what a program's kernels were compiled to; a [`Machine`] is a device with the values and programs that share it;
//! [`Bytes`] is what goes in and comes out; a [`Link`] is a program of several that run as one; [`RunTimes`] tell where the time
//! of a run went, [`Rates`] how fast the device is; a [`Measurer`] runs candidates of a step against each other.

mod bound;
mod bytes;
mod chain;
mod code;
mod error;
mod machine;
mod measure;
mod profile;
mod rates;
mod run;
mod stage;

pub use bytes::Bytes;
pub use chain::{Link, Read};
pub use code::{Code, archs};
pub use error::GpuError;
pub use machine::{Machine, Pager, Placement, ProgramId, Warn};
pub use measure::{Measurer, Timed, clock};
pub use profile::RunTimes;
pub use rambac_driver::{Device, Error as DeviceError};
pub use rates::{Floor, Rates};
pub use run::{Results, Ticket};
