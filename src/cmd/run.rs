//! `rambac run`: runs an executable, on this machine's cores, on a GPU or on the simulator.

use crate::cli::{Data, Run};
use crate::cmd::compile::{drawn, what};
use crate::cmd::generate::{Writing, write_on};
use crate::device::{Gpu, On};
use crate::error::{Result, warn, wrap};
use crate::model;
use crate::profile::Profile;
use crate::sample::Sampling;
use crate::show::{self, Table};
use miette::miette;
use rambac_codegen::cuda::Arch;
use rambac_ir::ops::SourceKind;
use rambac_ir::{Bindings, DType, Sym};
use rambac_models::data::Task;
use rambac_models::data::rng::stream;
use rambac_models::recipe::{Recipe, Rows};
use rambac_models::{Config, InitRule, Tokenizer};
use rambac_runtime::checkpoint::{Data as Values, TensorFile, TensorRef, write_safetensors};
use rambac_runtime::executable::{Mode, Part};
use rambac_runtime::gpu::{Bytes, ProgramId};
use rambac_runtime::session::DeviceMemory;
use rambac_runtime::tensor::Data as Elements;
use rambac_runtime::{Executable, Executor, Session, SessionOptions, Store, Tensor};
use rand::Rng;
use serde_json::json;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// Runs the verb.
pub fn run(a: &Run, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    if a.device == On::Reference {
        return Err(miette!("an executable runs on cpu, simulator and cuda:0, not by the ops' definitions"));
    }
    let e = pool.install(|| Executable::open(&a.file)).map_err(wrap)?;
    let config = match &e.config {
        Some(text) => Some(Config::from_json(text, &a.file.display().to_string()).map_err(wrap)?.config),
        None => None,
    };
    let weights = pool.install(|| e.weights()).map_err(wrap)?;
    let drawn_now = weights.is_none() && e.params().next().is_some();
    let store = match (weights, &config) {
        (Some(w), _) => w,
        (None, Some(c)) => {
            let bf16 = e.params().filter(|(_, t)| t.dtype == DType::BF16).map(|(n, _)| n).collect();
            model::load(c, None, InitRule::default(), a.seed, &bf16)?
        }
        (None, None) => drawn(e.params(), a.seed)?,
    };
    if drawn_now && !a.json {
        eprintln!("there are no weights in {}: they are drawn (--seed {})", a.file.display(), a.seed);
    }
    match e.mode {
        Mode::Infer => infer(a, &e, config.as_ref(), store, pool),
        Mode::Train => train(a, &e, config.as_ref(), store, pool),
        Mode::Graph => graph(a, &e, store, pool),
    }
}

/// What runs a part, with its params and states.
enum Runner {
    Cpu(Box<Executor>, Store),
    Gpu(Box<Gpu>, ProgramId),
}

impl Runner {
    /// States that `store` lacks begin at zero.
    fn new(
        a: &Run,
        e: &Executable,
        part: &Part,
        dims: &Bindings,
        mut store: Store,
        pool: Arc<rayon::ThreadPool>,
    ) -> Result<Runner> {
        for s in part.program.sources.iter().filter(|s| s.kind == SourceKind::State) {
            if store.get(&s.name).is_none() {
                store.insert(s.name.clone(), Tensor::zeros(&s.ty.bind(dims).map_err(wrap)?));
            }
        }
        if !a.device.gpu() {
            if a.target.is_some() {
                return Err(miette!("--target chooses what a GPU or the simulator runs: add --device simulator"));
            }
            return Ok(Runner::Cpu(Box::new(Executor::new((*part.program).clone(), pool)), store));
        }
        let mut gpu = Gpu::open(a.device)?;
        let arch = target(a, e, &mut gpu)?;
        let (program, code) = e.code(part, arch).map_err(wrap)?;
        let id = gpu.machine.load(program, &code).map_err(wrap)?;
        for s in part.program.sources.iter().filter(|s| s.kind != SourceKind::Input) {
            if let Some(t) = store.get(&s.name) {
                gpu.machine.set(&s.name, &Bytes::from_tensor(t.view())).map_err(wrap)?;
            }
        }
        Ok(Runner::Gpu(Box::new(gpu), id))
    }

    fn run(
        &mut self,
        dims: &Bindings,
        inputs: &[(String, Tensor)],
        profile: &mut Option<Profile>,
    ) -> Result<Vec<(String, Tensor)>> {
        match self {
            Runner::Cpu(e, store) => {
                let views: Vec<_> = inputs.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
                let (began, mut times) = (Instant::now(), Profile::times(profile));
                let out = e.run_timed(dims, &views, store, times.as_mut()).map_err(wrap)?;
                if let (Some(p), Some(times)) = (profile, times) {
                    p.run(&e.program().name, e.program(), dims, (began, 1), &times, &[])?;
                }
                Ok(out)
            }
            Runner::Gpu(gpu, id) => {
                let bytes: Vec<Bytes> = inputs.iter().map(|(_, t)| Bytes::from_tensor(t.view())).collect();
                let views: Vec<(&str, &Bytes)> = inputs.iter().map(|(n, _)| n.as_str()).zip(&bytes).collect();
                let out = gpu.machine.run(*id, dims, &views).map_err(wrap)?;
                for t in gpu.machine.watched() {
                    let program = gpu.machine.program(t.program).clone();
                    if let Some(p) = profile {
                        p.device_run(&program.program.name, &program, &t, &[])?;
                    }
                }
                Ok(out.into_iter().map(|(n, b)| (n, b.to_tensor())).collect())
            }
        }
    }

    /// A trace of the first runs, if one was asked for.
    fn watched(&mut self, path: Option<&Path>, runs: u64) -> Result<Option<Profile>> {
        let Some(mut p) = path.map(|p| Profile::create(p, runs)).transpose()? else { return Ok(None) };
        if let Runner::Gpu(gpu, _) = self {
            p.device(&mut gpu.machine)?;
            gpu.machine.watch(runs as usize).map_err(wrap)?;
        }
        Ok(Some(p))
    }

    /// A param or a state as it is now.
    fn value(&mut self, name: &str) -> Result<Option<Tensor>> {
        Ok(match self {
            Runner::Cpu(_, store) => store.get(name).cloned(),
            Runner::Gpu(gpu, _) => gpu.machine.get(name).map_err(wrap)?.map(|b| b.to_tensor()),
        })
    }
}

/// What the device is to run of what the file holds.
fn target(a: &Run, e: &Executable, gpu: &mut Gpu) -> Result<Arch> {
    gpu.target(a.target.map(|t| t.arch()), &e.targets)?.ok_or_else(|| {
        let (model, file, arch) = (&e.model, a.file.display(), gpu.archs[0]);
        let train = if e.mode == Mode::Train { " --train" } else { "" };
        let have: Vec<&str> = std::iter::once("the cpu").chain(e.targets.iter().map(|t| t.name())).collect();
        miette!(
            help = format!("rambac compile {model}{train} --target {arch} -o {file}"),
            "{file}: {} runs GPU kernels, but this was compiled for {} alone",
            a.device,
            have.join(", ")
        )
    })
}

/// Values of a program's symbols.
fn dims(a: &Run, part: &Part) -> Result<Bindings> {
    let mut dims = Bindings::default();
    let syms = &part.program.syms;
    let named = [("N", a.batch), ("L", a.len)].into_iter().map(|(n, v)| (n.to_string(), v, false));
    for (name, value, asked) in named.chain(a.dims.iter().map(|(n, v)| (n.clone(), *v, true))) {
        match syms.iter().find(|s| s.as_str() == name) {
            Some(s) => dims.set(s.clone(), value),
            None if asked => {
                let known: Vec<&str> = syms.iter().map(Sym::as_str).collect();
                return Err(miette!("--dims {name}={value}: the program's symbols are {}", known.join(", ")));
            }
            None => {}
        }
    }
    if let Some(s) = syms.iter().find(|s| dims.get(s).is_none()) {
        return Err(miette!(help = format!("add --dims {s}=64"), "the symbol {s} has no value"));
    }
    Ok(dims)
}

/// The file of inputs; names that the graph does not know are told.
fn given_file(a: &Run, part: &Part) -> Result<Option<TensorFile>> {
    let file = a.inputs.as_ref().map(TensorFile::open).transpose().map_err(wrap)?;
    let is_input = |n: &str| part.program.source(n).is_some_and(|s| s.kind == SourceKind::Input);
    for n in file.iter().flat_map(TensorFile::names).filter(|n| !is_input(n)) {
        warn(format!("--inputs: the graph has no input {n:?}, it is left out"));
    }
    Ok(file)
}

/// Inputs that were given, else drawn; whole numbers and truth values are 0.
fn inputs(a: &Run, part: &Part, dims: &Bindings, file: Option<&TensorFile>, run: u64) -> Result<Vec<(String, Tensor)>> {
    let mut out = vec![];
    for s in part.program.sources.iter().filter(|s| s.kind == SourceKind::Input) {
        let ty = s.ty.bind(dims).map_err(wrap)?;
        let given = file.filter(|f| f.info(&s.name).is_some());
        let t = match (given, ty.dtype) {
            (Some(f), DType::I32) => f.get_i32(&s.name).map(|(shape, v)| Tensor::i32(&shape, v)).map_err(wrap)?,
            (Some(f), DType::F32) => f.get_f32(&s.name).map(|(shape, v)| Tensor::f32(&shape, v)).map_err(wrap)?,
            (Some(f), DType::BF16) => f.get_bf16(&s.name).map(|(shape, v)| Tensor::bf16(&shape, v)).map_err(wrap)?,
            (Some(_), d) => return Err(miette!("the input {:?} is {ty}: {d} can't be read from a file", s.name)),
            (None, d) if d.is_float() => {
                let mut rng = stream(a.seed, &s.name, &[run]);
                let mut t = Tensor::f32(&ty.shape, (0..ty.elements()).map(|_| rng.random_range(-1.0..1.0)).collect());
                if d == DType::BF16 {
                    t.narrow();
                }
                t
            }
            _ => Tensor::zeros(&ty),
        };
        out.push((s.name.clone(), t));
    }
    Ok(out)
}

fn infer(
    a: &Run,
    e: &Executable,
    config: Option<&Config>,
    store: Store,
    pool: Arc<rayon::ThreadPool>,
) -> Result<ExitCode> {
    let name = a.file.display().to_string();
    let config = config.ok_or_else(|| miette!("{name}: it holds no config.json; compile it again"))?;
    let sampling = Sampling { temperature: a.temperature, top_k: None, top_p: None };
    if let Some(problem) = sampling.problem() {
        return Err(miette!("{problem}"));
    }
    let tokenizer = match e.tokenizer() {
        Some(json) => Tokenizer::from_json(json, &name).map_err(wrap)?,
        None => Tokenizer::bytes(),
    };
    tokenizer.check_vocab(config.vocab_size).map_err(wrap)?;
    let mut prompts = vec![];
    if a.ids.is_empty() {
        for text in &a.prompt {
            prompts.push(tokenizer.encode(text).map_err(wrap)?);
        }
    } else {
        prompts.push(a.ids.clone());
    }
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(miette!("give a text to go on from with --prompt TEXT, or ids with --ids 1,2,3"));
    }
    if let Some(id) = prompts.iter().flatten().find(|&&id| id < 0 || id as usize >= config.vocab_size) {
        return Err(miette!("the id {id} is not in the vocabulary of {}", config.vocab_size));
    }
    let need = |n: &str| e.part(n).ok_or_else(|| miette!("{name}: the part {n} is missing; compile it again"));
    let parts = model::session_parts(
        config,
        (need("lower")?, e.part("chunks"), e.part("upper"), e.part("upper_flash"), need("head")?),
    );
    let options = SessionOptions { sequences: prompts.len(), ..SessionOptions::default() };
    let mut session = if a.device.gpu() {
        let mut gpu = Gpu::open(a.device)?;
        let arch = target(a, e, &mut gpu)?;
        let load = |p: &&Part| {
            let (program, code) = e.code(p, arch).map_err(wrap)?;
            gpu.machine.load(program, &code).map_err(wrap)
        };
        let parts = parts.try_map(load)?;
        let memory = DeviceMemory { limit: a.device_memory, segment: a.segment };
        Session::on_device(gpu.machine, parts, store, pool, &options, memory).map_err(wrap)?
    } else {
        Session::compiled(&parts.map(|p| (*p.program).clone()), store, pool, &options).map_err(wrap)?
    };
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    session.fits(longest.saturating_add(a.tokens)).map_err(|why| {
        let model = &e.model;
        miette!(
            help = format!("ask for fewer --tokens, or compile {model} again with a larger --context"),
            "{name}: {why}"
        )
    })?;
    let w = Writing {
        from: &name,
        ids: !a.ids.is_empty(),
        tokens: a.tokens,
        sampling,
        seed: a.seed,
        segment: a.segment,
        flash: false,
        profile: a.profile.as_deref(),
    };
    write_on(&mut session, config, &tokenizer, &prompts, &w)
}

fn train(
    a: &Run,
    e: &Executable,
    config: Option<&Config>,
    store: Store,
    pool: Arc<rayon::ThreadPool>,
) -> Result<ExitCode> {
    let part = &e.parts[0];
    let mut dims = dims(a, part)?;
    let has = |n: &str| part.program.source(n).is_some();
    // A model's step is fed with rows of a task, any other graph with what is drawn.
    let task = match config {
        Some(c) if has("input_ids") && has("labels") && has("loss_weights") => {
            let rows = if a.task == Data::Copy { Rows::Copy } else { Rows::Passkey };
            let recipe = Recipe { seed: a.seed, ..Recipe::plain(rows, a.len, a.batch, a.steps) };
            let task = recipe.tasks(None).map_err(wrap)?.remove(0);
            if task.vocab_size() > c.vocab_size {
                let (most, v) = (task.vocab_size() - 1, c.vocab_size);
                return Err(miette!("the task has ids up to {most}, the model's vocabulary is {v}"));
            }
            if !a.dims.is_empty() {
                return Err(miette!("--dims is for graphs; a model's step takes --batch and --len"));
            }
            dims = Bindings::new([("N", a.batch), ("L", a.len)]);
            Some(task)
        }
        _ => None,
    };
    let file = given_file(a, part)?;
    let mut runner = Runner::new(a, e, part, &dims, store, pool)?;
    let mut profile = runner.watched(a.profile.as_deref(), a.steps)?;
    if !a.json {
        println!("{}: {} of {} at {dims}", a.file.display(), what(e.mode), e.model);
    }
    for step in 0..a.steps {
        let given = match &task {
            Some(t) => {
                let b = t.batch(step, a.batch, a.len).map_err(wrap)?;
                let shape = [a.batch, a.len];
                vec![
                    ("input_ids".to_string(), Tensor::i32(&shape, b.input_ids)),
                    ("labels".to_string(), Tensor::i32(&shape, b.labels)),
                    ("loss_weights".to_string(), Tensor::f32(&shape, b.loss_weights)),
                ]
            }
            None => inputs(a, part, &dims, file.as_ref(), step)?,
        };
        let began = Instant::now();
        let out = runner.run(&dims, &given, &mut profile)?;
        let seconds = began.elapsed().as_secs_f64();
        let of = |name: &str| {
            let t = out.iter().find(|(n, _)| n == name).and_then(|(_, t)| t.as_f32());
            t.and_then(|v| v.first().copied()).unwrap_or(f32::NAN)
        };
        let (loss, norm, lr) = (of("loss"), of("grad_norm"), of("lr"));
        if !loss.is_finite() || !norm.is_finite() {
            return Err(miette!("step {}: the loss is {loss} and the gradient's norm {norm}", step + 1));
        }
        if a.json {
            println!("{}", json!({ "step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr, "seconds": seconds }));
        } else {
            println!("  step {:>4}  loss {loss:.4}  gradient {norm:.3}  {}", step + 1, show::seconds(seconds));
        }
    }
    if let Some(path) = &a.save {
        let mut params = vec![];
        for (name, _) in e.params() {
            params.extend(runner.value(name)?.map(|t| (name, t)));
        }
        save(path, &params.iter().map(|(n, t)| (*n, t)).collect::<Vec<_>>())?;
        if !a.json {
            println!("  the weights are in {}", path.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn graph(a: &Run, e: &Executable, store: Store, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let part = &e.parts[0];
    let dims = dims(a, part)?;
    let file = given_file(a, part)?;
    let mut runner = Runner::new(a, e, part, &dims, store, pool)?;
    let mut profile = runner.watched(a.profile.as_deref(), a.steps)?;
    let mut out = vec![];
    let began = Instant::now();
    for run in 0..a.steps {
        let given = inputs(a, part, &dims, file.as_ref(), run)?;
        out = runner.run(&dims, &given, &mut profile)?;
    }
    let seconds = began.elapsed().as_secs_f64() / a.steps as f64;
    let mut t = Table::new(2, &["output", "type", "min", "max", "mean", "not finite"]);
    for (name, y) in &out {
        let y = y.to_host();
        let values = || (0..y.len()).map(|i| y.get(i));
        let finite = values().filter(|v| v.is_finite());
        let (n, sum, min, max) = finite.fold((0usize, 0.0, f64::INFINITY, f64::NEG_INFINITY), |(n, s, l, h), v| {
            (n + 1, s + v, l.min(v), h.max(v))
        });
        let (mean, broken) = (sum / n.max(1) as f64, y.len() - n);
        let ty = y.ty().to_string();
        if a.json {
            println!(
                "{}",
                json!({ "output": name, "type": ty, "min": min, "max": max, "mean": mean, "not_finite": broken })
            );
        }
        let number = |v: f64| if v.is_finite() { format!("{v:.4}") } else { "-".into() };
        t.row([name.clone(), ty, number(min), number(max), number(mean), broken.to_string()]);
    }
    if !a.json {
        println!("{}: {} of {} at {dims}, {} a run", a.file.display(), what(e.mode), e.model, show::seconds(seconds));
        t.print();
    }
    if let Some(path) = &a.save {
        let all: Vec<(&str, &Tensor)> = out.iter().map(|(n, t)| (n.as_str(), t)).collect();
        save(path, &all)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes f32 and i32 tensors; others are left out with a word.
fn save(path: &Path, all: &[(&str, &Tensor)]) -> Result<()> {
    let mut tensors = vec![];
    for (name, t) in all {
        let data = match &t.data {
            Elements::F32(v) => Values::F32(v),
            Elements::I32(v) => Values::I32(v),
            Elements::Bool(v) => Values::U8(v),
            Elements::Bf16(_) => {
                warn(format!("{name} is bf16 and not saved"));
                continue;
            }
        };
        tensors.push(TensorRef { name: (*name).into(), shape: t.shape.as_slice().into(), data });
    }
    write_safetensors(path, &tensors, &[]).map_err(wrap)
}
