//! The intermediate representation of rambac: a typed, append-only SSA graph with symbolic dims.
//!
//! Pure data and meaning: no IO, no threads, no devices.  An op's [`eval`](ops::OpDef::eval) is its definition;
//! everything else in the workspace must agree with it.
//!
//! - [`dim`], [`ty`]: symbolic dims, element types, tensor types.
//! - [`ops`]: the one list of ops, one file each: shape inference, cost, reference evaluation, gradient.
//! - [`graph`], [`builder`]: the graph and how to make one.
//! - [`diagnostic`]: what is wrong, where, and what to do.
//! - [`text`]: the text form; `parse(print(g)) == g`.
//! - [`verify`]: everything that must hold, reported all at once.
//! - `testing` (feature): graphs grown at random.
//! - [`host`], [`interp`]: host arrays and the reference interpreter.

pub mod attr;
pub mod builder;
pub mod diagnostic;
pub mod dim;
pub mod graph;
pub mod host;
pub mod interp;
pub mod ops;
#[cfg(feature = "testing")]
pub mod testing;
pub mod text;
pub mod ty;
pub mod verify;

pub use builder::{BuildErrors, Builder};
pub use diagnostic::{Diagnostic, Severity};
pub use dim::{Bindings, Dim, DimError, Sym};
pub use graph::{Graph, Loc, Node, NodeId, Output, Value};
pub use host::HostArray;
pub use ops::{Cost, Op, OpDef, OpError};
pub use ty::{ConcreteTy, DType, Ty};
