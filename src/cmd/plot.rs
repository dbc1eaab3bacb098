//! `rambac plot`: the curves of one or several training runs as SVG or PNG.

use crate::cli::Plot;
use crate::curves::{self, Style};
use crate::error::{Result, wrap};
use crate::metrics::{Quantity, RunMetrics};
use miette::miette;
use rambac_picture::raster;
use std::path::Path;
use std::process::ExitCode;

/// Runs the verb.
pub fn run(a: &Plot) -> Result<ExitCode> {
    let extension = a.out.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    if !matches!(extension.as_str(), "svg" | "png") {
        return Err(miette!("--out {}: a name that ends in .svg or .png is wanted", a.out.display()));
    }
    let mut runs = a.runs.iter().map(|p| RunMetrics::read(p)).collect::<Result<Vec<_>>>()?;
    name_apart(&mut runs);
    let quantities = quantities(&a.only)?;
    let style = Style { axis: a.axis, smooth: a.smooth, log_loss: a.log };
    let svg = curves::svg(&runs, &quantities, &style)?;
    write_picture(&a.out, &svg, extension == "png")?;
    println!("{}", a.out.display());
    Ok(ExitCode::SUCCESS)
}

/// Writes an SVG, or the PNG of it at twice its size.
///
/// # Errors
/// What the system refuses.
pub fn write_picture(path: &Path, svg: &str, png: bool) -> Result<()> {
    let bytes = if png { raster::png(svg, 2.0).map_err(wrap)? } else { svg.as_bytes().to_vec() };
    std::fs::write(path, bytes).map_err(|e| miette!("{}: {e}", path.display()))
}

/// Those that were asked for by name; all if none.
fn quantities(only: &[String]) -> Result<Vec<Quantity>> {
    if only.is_empty() {
        return Ok(Quantity::ALL.to_vec());
    }
    let of = |name: &String| {
        let known = || Quantity::ALL.map(|q| q.key).join(", ");
        let found = Quantity::ALL.into_iter().find(|q| q.key == name || q.title == name);
        found.ok_or_else(|| miette!("--only {name}: there are curves of {}", known()))
    };
    only.iter().map(of).collect()
}

/// Runs whose folders have one name go by their paths.
fn name_apart(runs: &mut [RunMetrics]) {
    let names: Vec<String> = runs.iter().map(|r| r.name.clone()).collect();
    for r in runs {
        if names.iter().filter(|n| **n == r.name).count() > 1 {
            r.name = r.folder.display().to_string();
        }
    }
}
