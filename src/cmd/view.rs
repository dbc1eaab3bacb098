//! `rambac view`: a model's graph as a picture, or in the viewer's window, which is a program of its own.

use super::explain::{dims, ir_step, model_step};
use crate::cli::{Colours, View};
use crate::cmd::plot::write_picture;
use crate::error::{Result, findings, wrap};
use crate::model::{self, Named};
use miette::{IntoDiagnostic, miette};
use rambac_ir::{Bindings, Graph, Sym, text};
use rambac_models::stack::{self, Carry};
use rambac_models::variants;
use rambac_passes::train_step::AdamW;
use rambac_picture::{ColourBy, Look, Open, Scene, export, memory};
use rambac_runtime::Executable;
use rambac_runtime::checkpoint::TensorFile;
use std::path::Path;
use std::process::{Command, ExitCode};

/// The viewer's program, which lies beside this one.
const VIEWER: &str = "rambac-viewer";

/// Runs the verb.
pub fn run(a: &View) -> Result<ExitCode> {
    if a.export.is_some() {
        export(a)?;
        return Ok(ExitCode::SUCCESS);
    }
    let own = std::env::current_exe().into_diagnostic()?;
    let viewer = own.with_file_name(format!("{VIEWER}{}", std::env::consts::EXE_SUFFIX));
    if !viewer.exists() {
        return Err(miette!(
            help = "build it: cargo build --release -p rambac-viewer; pictures need no window: --export FILE.svg",
            "the viewer is not built: there is no {}",
            viewer.display()
        ));
    }
    // What the viewer takes is what this verb takes.
    let status = Command::new(&viewer).args(std::env::args_os().skip_while(|x| x != "view").skip(1)).status();
    let status = status.map_err(|e| miette!("{}: it does not start: {e}", viewer.display()))?;
    Ok(ExitCode::from(status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1)))
}

/// What the arguments name, compiled.
///
/// # Errors
/// A model that is none; sizes that do not fit it.
pub fn scene(a: &View) -> Result<Scene> {
    let path = Path::new(&a.model);
    if path.is_file() && path.extension().is_none_or(|e| e != "ir" && e != "json") {
        return executable(a, path);
    }
    if a.part.is_some() {
        return Err(miette!("--part: only executables have parts"));
    }
    let built_in = variants::built_in(&a.model).filter(|_| !path.exists());
    let named = match built_in {
        Some(v) => {
            let graph = text::parse(v.text).map_err(|e| findings(path, v.text, e))?;
            Named::Ir { path: path.into(), text: v.text.into(), graph }
        }
        None => model::resolve(&a.model)?,
    };
    let named = model::with_attention(&a.model, named, &a.attention)?;
    let (graph, what) = match named {
        Named::Model { config, .. } if a.train => (model_step(&config, &AdamW::default())?, ", a training step"),
        Named::Model { config, .. } => (stack::loss(&config, Carry::Zero, false).map_err(wrap)?, ""),
        Named::Ir { graph, .. } if a.train => (ir_step(&graph, &AdamW::default())?, ", a training step"),
        Named::Ir { graph, .. } => (graph, ""),
    };
    let with = a.attention.attention.as_ref().map(|v| format!(" with {v}")).unwrap_or_default();
    let dims = dims(&graph, a.batch, a.len, &a.dims)?;
    Scene::new(&format!("{}{with}{what}", a.model), &graph, &dims).map_err(wrap)
}

fn executable(a: &View, path: &Path) -> Result<Scene> {
    let file = TensorFile::open(path).map_err(wrap)?;
    if !file.metadata().contains_key("rambac_executable") {
        return Err(miette!(
            help = "give a preset, a folder with config.json, a config, an .ir file, or what rambac compile made",
            "{}: this file holds weights, but no graph",
            path.display()
        ));
    }
    let e = Executable::open(path).map_err(wrap)?;
    let part = match &a.part {
        Some(name) => e.part(name).ok_or_else(|| {
            let all: Vec<&str> = e.parts.iter().map(|p| p.name.as_str()).collect();
            miette!("--part {name}: {} has {}", path.display(), all.join(", "))
        })?,
        None => e.parts.iter().max_by_key(|p| p.program.steps.len()).ok_or_else(|| miette!("BUG: no parts"))?,
    };
    let parse = |source: &str| text::parse(source).map_err(|f| findings(path, source, f));
    let (before, after) = (parse(&part.before)?, parse(&part.after)?);
    let dims = executable_dims(a, &before)?;
    Scene::compiled(&format!("{}, {}", path.display(), part.name), before, after, &dims).map_err(wrap)
}

/// As for models; what only an executable's parts have, chunks, gets a value too.
fn executable_dims(a: &View, g: &Graph) -> Result<Bindings> {
    let mut given = a.dims.clone();
    for name in ["B", "C"] {
        if g.syms.contains(&Sym::new(name)) && !given.iter().any(|(n, _)| n == name) {
            given.push((name.into(), 64));
        }
    }
    dims(g, a.batch, a.len, &given)
}

/// How the arguments want the scene to be seen.
///
/// # Errors
/// A pass that is none.
pub fn look(a: &View, scene: &Scene) -> Result<Look> {
    let stage = match &a.pass {
        None => scene.last(),
        // A pass that runs twice: the first time that it did something.
        Some(name) => {
            let all = (0..scene.stages.len()).filter(|&i| scene.stages[i].name == name);
            let acted = |i: usize| i > 0 && scene.stages[i].graph != scene.stages[i - 1].graph;
            let found = all.clone().find(|&i| acted(i)).or_else(|| all.clone().next());
            found.ok_or_else(|| {
                let names: Vec<&str> = scene.stages.iter().map(|s| s.name).collect();
                miette!("--pass {name}: there are {}", names.join(", "))
            })?
        }
    };
    let colour = match a.colour {
        Colours::Family => ColourBy::Family,
        Colours::Flops => ColourBy::Flops,
        Colours::Bytes => ColourBy::Bytes,
        Colours::Time => ColourBy::Time,
        Colours::Memory => ColourBy::Memory,
    };
    Ok(Look { stage, before: a.before, colour, open: if a.open { Open::All } else { Open::default() } })
}

/// Writes the picture that the arguments ask for.
///
/// # Errors
/// No picture of this kind; what the system refuses.
pub fn export(a: &View) -> Result<()> {
    let Some(path) = &a.export else { return Ok(()) };
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    let kinds = if a.memory { ".svg or .png" } else { ".svg, .png or .dot" };
    if !matches!(extension.as_str(), "svg" | "png" | "dot") || (a.memory && extension == "dot") {
        return Err(miette!("--export {}: a name that ends in {kinds} is wanted", path.display()));
    }
    let scene = scene(a)?;
    let look = look(a, &scene)?;
    if extension == "dot" {
        std::fs::write(path, export::dot(&scene, &look)).map_err(|e| miette!("{}: {e}", path.display()))?;
    } else {
        let svg = match a.memory {
            true => memory::svg(&scene.program, &scene.plan, &format!("{}, memory at {}", scene.title, scene.dims)),
            false => export::svg(&scene, &look),
        };
        write_picture(path, &svg, extension == "png")?;
    }
    println!("{}", path.display());
    Ok(())
}
