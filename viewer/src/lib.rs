//! The window: a graph that is panned, zoomed, opened and asked, over `rambac-picture`, which says what is drawn where.
//!
//! `app.rs` holds the state, `app/` the panels around the graph and the keys, `canvas.rs` the graph itself, `side.rs` what is told
//! of a node, `memory.rs` the memory plan.  Nothing here changes a graph.

mod app;
mod canvas;
mod memory;
mod side;

pub use app::{App, Measure, Opener, Tab, window_title};

use miette::{GraphicalReportHandler, GraphicalTheme, Report};
use rambac::{ViewArgs, view};
use rambac_codegen::cuda::Arch;

/// The GPU that the arguments name, else the one that newer ones run code for too.
pub fn arch(a: &ViewArgs) -> Arch {
    a.target.map_or(Arch::Sm80, |t| t.arch())
}

/// Opens files as the command does with these arguments.
pub fn opener(given: ViewArgs) -> Opener {
    Box::new(move |path| {
        let a = ViewArgs { model: path.display().to_string(), part: None, ..given.clone() };
        view::scene(&a).map_err(plain)
    })
}

/// An error as text without colours, as the window shows it.
fn plain(e: Report) -> String {
    let handler = GraphicalReportHandler::new_themed(GraphicalTheme::unicode_nocolor()).with_width(100);
    let one = |e: &Report| {
        let mut text = String::new();
        handler.render_report(&mut text, e.as_ref()).map_or_else(|_| e.to_string(), |()| text)
    };
    rambac::error::parts(e).iter().map(one).collect::<Vec<_>>().join("\n")
}
