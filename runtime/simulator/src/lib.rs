//! Runs PTX on the CPU, as NVRTC emits it, and watches it run: accesses out of bounds, memory read before it is written,
//! races, copies read before their wait, barriers that don't match; and counts what costs time on a device.
//!
//! PTX → [`parse`] → [`decode`] → [`program::Program`] → [`exec`], with [`check`] and [`count`] looking on.  [`device`] is what
//! users call.  Knows nothing of our IR, programs or kernels.
//!
//! ```
//! use rambac_simulator::device::{Code, Device, Extent, Simulator};
//! # fn main() -> Result<(), rambac_driver::Error> {
//! let ptx = "
//! .version 8.0
//! .target sm_80
//! .address_size 64
//! .visible .entry twice(.param .u64 x) {
//!     .reg .b64 %rd<4>;
//!     .reg .b32 %r<4>;
//!     ld.param.u64 %rd1, [x];
//!     mov.u32 %r1, %tid.x;
//!     mul.wide.u32 %rd2, %r1, 4;
//!     add.s64 %rd3, %rd1, %rd2;
//!     ld.global.u32 %r2, [%rd3];
//!     add.s32 %r2, %r2, %r2;
//!     st.global.u32 [%rd3], %r2;
//!     ret;
//! }";
//! let mut s = Simulator::default();
//! let module = s.load(&Code::ptx(ptx))?;
//! let x = s.alloc("x", 32 * 4)?;
//! s.copy_in(x, 0, &[1; 32 * 4])?;
//! s.launch(module, "twice", Extent::line(1, 32), &[x.into()])?;
//! let mut out = [0; 32 * 4];
//! s.copy_out(x, 0, &mut out)?;
//! assert_eq!(out, [2; 32 * 4]);
//! assert!(s.take_findings().is_empty());
//! # Ok(())
//! # }
//! ```

#[macro_use]
pub mod math;
pub mod check;
pub mod count;
pub mod decode;
pub mod device;
pub mod error;
pub mod exec;
pub mod isa;
pub mod memory;
pub mod parse;
pub mod product;
pub mod program;
pub mod report;

pub use check::{Finding, Kind};
pub use error::Error;
pub use exec::Options;
