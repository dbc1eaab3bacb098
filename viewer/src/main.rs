//! `rambac-viewer`: a window on what a model is compiled to.  `rambac view` starts it.

use clap::Parser;
use rambac::{ViewArgs, error, view};
use rambac_viewer::{App, Measure, arch, opener, window_title};
use std::process::ExitCode;
use std::time::Instant;

/// Shows a model's graph: layers, passes, work, memory, kernels.
#[derive(Parser)]
#[command(name = "rambac-viewer", version, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    view: ViewArgs,
    /// Taken for `rambac view --threads`; the window computes nothing that would use them
    #[arg(long, default_value_t = 0, hide = true)]
    threads: usize,
    /// Look around for some seconds, print frames per second, and close
    #[arg(long)]
    measure: bool,
}

fn main() -> ExitCode {
    let began = Instant::now();
    let cli = Cli::parse();
    let _ = cli.threads;
    match run(&cli.view, cli.measure.then_some(began)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            error::report(e);
            ExitCode::FAILURE
        }
    }
}

/// `measured` is when the process began, if frames are to be counted.
fn run(a: &ViewArgs, measured: Option<Instant>) -> error::Result<()> {
    if a.export.is_some() {
        return view::export(a);
    }
    let scene = view::scene(a)?;
    let look = view::look(a, &scene)?;
    let arch = arch(a);
    let viewport = eframe::egui::ViewportBuilder::default()
        .with_title(window_title(&scene))
        .with_app_id("rambac")
        .with_inner_size([1440.0, 900.0])
        .with_min_inner_size([640.0, 400.0]);
    // There are no gradients here that noise would smooth, and in software it takes half of a frame.
    let mut options = eframe::NativeOptions { viewport, dithering: false, ..Default::default() };
    options.glow_options.vsync = measured.is_none();
    let opener = opener(a.clone());
    let create = move |cx: &eframe::CreationContext| -> Box<dyn eframe::App> {
        let app = App::new(&cx.egui_ctx, scene, look, arch).with_opener(opener);
        match measured {
            Some(began) => Box::new(Measure::new(app, began)),
            None => Box::new(app),
        }
    };
    eframe::run_native("rambac", options, Box::new(|cx| Ok(create(cx)))).map_err(|e| {
        // Less the place in a library's source where it was found.
        let text = e.to_string();
        let why = text.rsplit_once(".rs:").and_then(|(_, rest)| rest.split_once(": ")).map_or(text.as_str(), |w| w.1);
        miette::miette!(help = "pictures need no window: --export FILE.svg", "the window does not open: {why}")
    })
}
