//! Graph → Graph passes of rambac.
//!
//! Every pass is a pure function; [`pipeline`] is the list of them in order.  After each one the verifier runs in
//! debug builds.  A pass sees numbers of its target, never a device, and never raises a graph's cost.

pub mod autodiff;
pub mod cse;
pub mod dce;
pub mod fold;
pub mod fuse_attention;
pub mod fuse_each;
pub mod fuse_epilogue;
pub mod fuse_loss;
pub mod fuse_map;
pub mod fuse_norm;
pub mod fuse_selection;
pub mod min_cut;
pub mod mixed;
pub mod narrow;
pub mod pipeline;
pub mod recompute;
pub mod rewrite;
pub mod simplify;
pub mod train_step;

pub use autodiff::{AutodiffError, gradients};
pub use pipeline::{Options, PASSES, Pass, Precision, optimise};
pub use recompute::{Recompute, Target};
