//! `rambac-viewer`: a window on what a model is compiled to.  `rambac view` starts it.

use clap::Parser;
use rambac::{ViewArgs, error, view};
use rambac_viewer::{App, arch};
use std::process::ExitCode;

/// Shows a model's graph: layers, passes, work, memory, kernels.
#[derive(Parser)]
#[command(name = "rambac-viewer", version, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    view: ViewArgs,
    /// Taken for `rambac view --threads`; the window computes nothing that would use them
    #[arg(long, default_value_t = 0, hide = true)]
    threads: usize,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let _ = cli.threads;
    match run(&cli.view) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error::report(e);
            ExitCode::FAILURE
        }
    }
}

fn run(a: &ViewArgs) -> error::Result<()> {
    if a.export.is_some() {
        return view::export(a);
    }
    let scene = view::scene(a)?;
    let look = view::look(a, &scene)?;
    let arch = arch(a);
    let viewport = eframe::egui::ViewportBuilder::default()
        .with_title(format!("rambac: {}", scene.title))
        .with_inner_size([1440.0, 900.0])
        .with_min_inner_size([640.0, 400.0]);
    let options = eframe::NativeOptions { viewport, ..Default::default() };
    eframe::run_native("rambac", options, Box::new(move |cx| Ok(Box::new(App::new(&cx.egui_ctx, scene, look, arch)))))
        .map_err(|e| {
            miette::miette!(help = "pictures need no window: --export FILE.svg", "the window does not open: {e}")
        })
}
