//! The window: a graph that is panned, zoomed, opened and asked, over `rambac-picture`, which says what is drawn where.
//!
//! `app.rs` holds the state and the panels around the graph, `canvas.rs` the graph itself, `side.rs` what is told of a node,
//! `memory.rs` the memory plan.  Nothing here changes a graph or measures anything.

mod app;
mod canvas;
mod memory;
mod side;

pub use app::{App, Tab};

use rambac::ViewArgs;
use rambac_codegen::cuda::Arch;

/// The GPU that the arguments name, else the one that newer ones run code for too.
pub fn arch(a: &ViewArgs) -> Arch {
    a.target.map_or(Arch::Sm80, |t| t.arch())
}
