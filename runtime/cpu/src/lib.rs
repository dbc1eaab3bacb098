//! CPU kernels of rambac: plain functions over `f32` matrices and slices.
//!
//! Nothing here knows the IR.  Every kernel is deterministic: work is split by shape alone, never by the
//! number of threads, and partial sums are combined in a fixed order.  Kernels run on rayon's current pool and on
//! the instruction set that [`simd`] chooses.

pub mod kernels;
pub mod mat;
pub mod par;
pub mod rows;
pub mod simd;
pub mod team;

pub use mat::{Mat, MatMut};
pub use rows::{ChunkRows, RowShape, Rows};
