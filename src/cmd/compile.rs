//! `rambac compile`: a model or a graph as one file that runs: programs, GPU kernels, weights.

use crate::cli::{Compile, PrecisionArg, Weights};
use crate::cmd::explain::{ir_step, model_step};
use crate::error::{self, Result, warn, wrap};
use crate::model::{self, Named};
use crate::show::{self, Table};
use crate::workbench::gate::{self, Use};
use miette::miette;
use rambac_codegen::Machine;
use rambac_codegen::cuda::{Arch, Cache, Target};
use rambac_codegen::nvrtc::Nvrtc;
use rambac_ir::ops::SourceKind;
use rambac_ir::{Bindings, Graph};
use rambac_models::{Config, InitRule};
use rambac_passes::Options;
use rambac_passes::train_step::AdamW;
use rambac_runtime::cpu::scratch;
use rambac_runtime::executable::{Contents, ExecutableError, Mode, Part, write};
use rambac_runtime::gpu::Code;
use rambac_runtime::session::room;
use rambac_runtime::{Store, Tensor};
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// Runs the verb.
pub fn run(a: &Compile, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    // Before minutes are spent.
    let folder = a.out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if a.out.is_dir() || !folder.is_dir() {
        return Err(miette!("--out {}: a file in a folder that exists is wanted", a.out.display()));
    }
    if !(a.lr > 0.0 && a.lr <= 10.0) || a.steps == 0 {
        return Err(miette!("--lr {} --steps {}: above 0 and at most 10, and at least 1, are wanted", a.lr, a.steps));
    }
    pool.install(|| compile(a))
}

fn compile(a: &Compile) -> Result<ExitCode> {
    let began = Instant::now();
    let named = model::resolve_with(&a.model, &a.attention)?;
    match (&named, a.attention.file()) {
        (Named::Model { config, .. }, Some(path)) => {
            let len = Some(if a.train { a.len } else { a.context });
            gate::pass(path, config, Use { trained: a.train, len, anyway: a.anyway })?;
        }
        // Whatever it is for: it may be no attention of a model.
        (Named::Ir { path, text, .. }, _) => gate::tell(path, text, a.train),
        _ => {}
    }
    let mut targets: Vec<Arch> = a.target.iter().filter_map(|t| t.arch()).collect();
    targets.sort();
    targets.dedup();
    let adamw = AdamW { lr: a.lr, steps: a.steps, warmup: AdamW::default().warmup.min(a.steps), ..AdamW::default() };
    let (mode, graphs) = graphs(a, &named, &adamw)?;
    let options = options(a, &graphs)?;
    let parts = graphs.iter().map(|(name, g)| Part::compile(name, g, &options, &targets));
    let parts = parts.collect::<std::result::Result<Vec<Part>, _>>().map_err(|e| unsupported(a, e))?;

    let cache = Cache::standard();
    let targets = kernels(a, &parts, &targets, &cache)?;
    if let Some(t) = cache.trouble() {
        warn(t);
    }
    let (config, weights) = match &named {
        Named::Model { config, weights } => (Some(config), weights.as_deref()),
        Named::Ir { .. } => (None, None),
    };
    let store = store(a, config, weights, &parts)?;
    let tokenizer = match weights.map(|w| std::fs::read(w.join("tokenizer.json"))) {
        Some(Ok(t)) => Some(t),
        Some(Err(e)) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(miette!("{}: tokenizer.json: {e}", a.model));
        }
        _ => None,
    };
    let mut settings = json!({ "weights": if a.weights == Weights::Bf16 { "bf16" } else { "f32" } });
    if a.train {
        settings = json!({ "recompute": a.memory.recompute, "memory_limit": a.memory.memory_limit, "lr": a.lr, "steps": a.steps, "warmup": adamw.warmup });
    }
    let room = room(parts.iter().map(|p| &*p.program));
    if let Some(room) = room {
        settings["context"] = json!(room);
    }
    let json = config.map(Config::to_json);
    let contents = Contents {
        mode,
        model: &a.model,
        config: json.as_deref(),
        tokenizer: tokenizer.as_deref(),
        settings,
        parts: &parts,
        targets: &targets,
        weights: store.as_ref(),
    };
    let written = write(&a.out, &contents).map_err(wrap)?;
    let uses = cache.uses();
    let seconds = began.elapsed().as_secs_f64();
    let spilling = |code: &Code| {
        let usage = code.0.values().flat_map(|c| &c.usage);
        usage.filter(|u| u.spill_stores + u.spill_loads > 0).count()
    };
    if a.json {
        let all: Vec<_> = targets
            .iter()
            .map(|(arch, code, compiler)| {
                let kernels = code.0.len();
                json!({ "target": arch.name(), "kernels": kernels, "spilling": spilling(code), "compiler": compiler })
            })
            .collect();
        let line = json!({
            "file": a.out, "model": a.model, "mode": mode.name(), "bytes": written.all, "header_bytes": written.header,
            "kernel_bytes": written.kernels, "weight_bytes": written.weights, "targets": all, "seconds": seconds,
            "cache": { "found": uses.found, "compiled": uses.compiled, "damaged": uses.damaged },
        });
        println!("{line}");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{}: {} of {}", a.out.display(), what(mode), a.model);
    let mut t = Table::new(1, &["part", "nodes", "after passes", "steps", "kernels"]);
    for (p, (_, g)) in parts.iter().zip(&graphs) {
        let kernels: Vec<String> = p.gpu.iter().map(|g| g.kernels.len().to_string()).collect();
        let counts = [g.nodes.len(), p.program.graph.nodes.len(), p.program.steps.len()].map(|n| n.to_string());
        let kernels = if kernels.is_empty() { "-".into() } else { kernels.join(", ") };
        t.row([p.name.clone()].into_iter().chain(counts).chain([kernels]));
    }
    t.print();
    if let Some(room) = room {
        println!("  room for {} tokens of a text, prompt and answer together", show::count(room as u64));
    }
    for (arch, code, compiler) in &targets {
        let spills = match spilling(code) {
            0 => "none spills registers".to_string(),
            n => format!("{n} of them spill registers: rambac inspect {}", a.out.display()),
        };
        println!("  {arch}: {} by {compiler}, {spills}", show::plural(code.0.len(), "kernel"));
    }
    if !targets.is_empty() {
        let damaged = if uses.damaged > 0 { format!(" ({} were damaged)", uses.damaged) } else { String::new() };
        println!("  {} from the cache, {} compiled{damaged}", uses.found, uses.compiled);
    }
    println!(
        "  {} in {}: programs {}, kernels {}, {}",
        show::bytes(written.all),
        show::seconds(seconds),
        show::bytes(written.header),
        show::bytes(written.kernels),
        match (&store, has_params(&parts)) {
            (Some(_), _) => format!("weights {}", show::bytes(written.weights)),
            (None, true) => "no weights (`run` draws them)".into(),
            (None, false) => "no weights needed".into(),
        }
    );
    Ok(ExitCode::SUCCESS)
}

/// What an executable does.
pub fn what(mode: Mode) -> &'static str {
    match mode {
        Mode::Train => "a training step",
        Mode::Infer => "inference",
        Mode::Graph => "the graph",
    }
}

fn has_params(parts: &[Part]) -> bool {
    parts.iter().flat_map(|p| &p.program.sources).any(|s| s.kind == SourceKind::Param)
}

/// The graphs to compile, by the names of their parts.
fn graphs(a: &Compile, named: &Named, adamw: &AdamW) -> Result<(Mode, Vec<(&'static str, Graph)>)> {
    Ok(match named {
        Named::Model { config, .. } if a.train => (Mode::Train, vec![("step", model_step(config, adamw)?)]),
        Named::Model { config, .. } => {
            let graphs = model::session_graphs(config, a.context)?;
            (Mode::Infer, graphs.named().into_iter().map(|(name, g)| (name, g.clone())).collect())
        }
        Named::Ir { graph, .. } if a.train => (Mode::Train, vec![("step", ir_step(graph, adamw)?)]),
        Named::Ir { path, .. } if a.infer => {
            return Err(miette!(
                help = "leave --infer out to compile the graph as it is",
                "{}: inference needs a model, this is a graph in text form",
                path.display()
            ));
        }
        Named::Ir { graph, .. } => (Mode::Graph, vec![("graph", graph.clone())]),
    })
}

/// How the passes run.
fn options(a: &Compile, graphs: &[(&str, Graph)]) -> Result<Options> {
    if !a.train {
        if a.memory.recompute || a.memory.memory_limit.is_some() {
            return Err(miette!("--recompute and --memory-limit are about training: add --train, or leave them out"));
        }
        return Ok(a.weights.options());
    }
    let dims = Bindings::new([("N", a.batch), ("L", a.len)]);
    let memory = a.memory.choice(vec![dims]);
    let options = Options { precision: a.precision.into(), ..Options::default() };
    let gpu = a.target.iter().filter_map(|t| t.arch()).max();
    let machine = match (a.precision, gpu) {
        (PrecisionArg::F32, _) => Machine::Cpu(scratch),
        (PrecisionArg::Bf16, Some(arch)) => Machine::Gpu(Target::of(arch)),
        (PrecisionArg::Bf16, None) => {
            return Err(miette!(
                help = "add --target sm_90a (or sm_80), or leave --precision out",
                "--precision bf16: the CPU trains in f32 alone"
            ));
        }
    };
    rambac_codegen::fit::options(&graphs[0].1, &memory, &machine, 0, &options).map_err(error::unfit)
}

/// What to do about a step without a kernel.
fn unsupported(a: &Compile, e: ExecutableError) -> miette::Report {
    match &e {
        ExecutableError::Emit(step) => {
            let train = if a.train { " --train" } else { "" };
            let (model, arch) = (&a.model, step.arch);
            miette!(
                help = format!(
                    "--target cpu compiles it for the CPU alone; all such steps: rambac explain {model}{train} --target {arch}"
                ),
                "{e}"
            )
        }
        _ => wrap(e),
    }
}

/// Every target's kernels, and who compiled them.
fn kernels(a: &Compile, parts: &[Part], targets: &[Arch], cache: &Cache) -> Result<Vec<(Arch, Code, String)>> {
    if targets.is_empty() {
        return Ok(vec![]);
    }
    let nvrtc = Nvrtc::open_any().map_err(wrap)?;
    let compiler = nvrtc.name();
    let one = |(i, arch): (usize, &Arch)| {
        let programs: Vec<_> = parts.iter().map(|p| &*p.gpu[i]).collect();
        if !a.json {
            eprintln!("kernels for {arch} …");
        }
        let code = Code::compile(&nvrtc, &programs, cache).map_err(wrap)?;
        Ok::<_, miette::Report>((*arch, code, compiler.clone()))
    };
    targets.iter().enumerate().map(one).collect()
}

/// The weights that go into the file.
fn store(a: &Compile, config: Option<&Config>, weights: Option<&Path>, parts: &[Part]) -> Result<Option<Store>> {
    if a.no_weights || (weights.is_none() && a.init.is_none()) {
        return Ok(None);
    }
    let wanted: Vec<_> =
        parts.iter().flat_map(|p| &p.program.sources).filter(|s| s.kind == SourceKind::Param).collect();
    match config {
        Some(c) => {
            let weights = weights.filter(|_| a.init.is_none());
            let bf16 =
                wanted.iter().filter(|s| s.ty.dtype == rambac_ir::DType::BF16).map(|s| s.name.as_str()).collect();
            model::load(c, weights, InitRule::default(), a.init.unwrap_or(0), &bf16).map(Some)
        }
        None => drawn(wanted.iter().map(|s| (s.name.as_str(), &s.ty)), a.init.unwrap_or(0)).map(Some),
    }
}

/// Fresh params of a graph in text form: N(0, 1/√fan_in), where the last axis is summed over.
pub fn drawn<'a>(params: impl Iterator<Item = (&'a str, &'a rambac_ir::Ty)>, seed: u64) -> Result<Store> {
    let mut store = Store::default();
    for (name, ty) in params {
        let ty = ty.bind(&Bindings::default()).map_err(wrap)?;
        if !ty.dtype.is_float() {
            return Err(miette!("the param {name:?} is {ty}: fresh ones are drawn for floats only"));
        }
        let fan_in = ty.shape.last().copied().unwrap_or(1);
        let spec = rambac_models::ParamSpec {
            name: name.into(),
            shape: ty.shape.clone(),
            init: rambac_models::Init::FanIn { fan_in },
            decay: false,
        };
        let mut t = Tensor::f32(&ty.shape, rambac_models::init_tensor(&spec, seed));
        if ty.dtype == rambac_ir::DType::BF16 {
            t.narrow();
        }
        store.insert(name, t);
    }
    Ok(store)
}
