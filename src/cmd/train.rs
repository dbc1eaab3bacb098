//! `rambac train`: a recipe's steps, with checkpoints, metrics, a progress bar and a clean stop.
//!
//! A step depends on the store, the recipe and its planned number alone, so a run that was stopped goes on bit for bit.

mod steps;

use crate::cli::{Data, MemoryArgs, PrecisionArg, Train, TrainPlace};
use crate::dashboard::{About, Dashboard};
use crate::device::{Gpu, On};
use crate::error::{self, Result, warn, wrap};
use crate::metrics::Metrics;
use crate::profile::Profile;
use crate::workbench::gate::{self, Use};
use crate::{machine, model, show};
use miette::{IntoDiagnostic, Report, miette};
use rambac_codegen::Memory;
use rambac_ir::{Bindings, Graph};
use rambac_models::data::{MixTask, Split, Task, Text, TextTask};
use rambac_models::recipe::{Recipe, Rows};
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, InitRule, Tokenizer};
use rambac_passes::train_step::{AdamW, STEP, moment_names};
use rambac_runtime::checkpoint::{Checkpoint, CheckpointDir, Snapshot, TensorRef};
use rambac_runtime::{Store, Tensor, Trainer};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Where a run stands; with the store all that a run is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Position {
    /// Steps done.
    pub step: u64,
    /// The next step of the plan; ahead of `step` where a stage ended early.
    pub planned: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// The loss, smoothed within the stage.
    pub smooth: Option<f32>,
    /// Seconds spent in steps.
    pub seconds: f64,
}

/// trainer.json.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunState {
    pub recipe: Recipe,
    pub position: Position,
    pub recompute: bool,
    /// What activations are kept in.
    #[serde(default, skip_serializing_if = "is_f32")]
    pub precision: PrecisionArg,
    /// Bytes that a step may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<DataFile>,
}

fn is_f32(p: &PrecisionArg) -> bool {
    *p == PrecisionArg::F32
}

/// A text to train on, with what tells that it has changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataFile {
    path: PathBuf,
    bytes: u64,
    /// FNV-1a of the contents.
    hash: u64,
}

impl DataFile {
    fn open(path: &Path) -> Result<Self> {
        let fail = |e: std::io::Error| miette!("{}: cannot read this text: {e}", path.display());
        let kind = path.metadata().map_err(fail)?.file_type();
        if !kind.is_file() && !kind.is_dir() {
            return Err(miette!(
                help = "save it to a file first: a text is read again when a run goes on",
                "{}: a text must be a file, not a pipe or a device",
                path.display()
            ));
        }
        let full = path.canonicalize().map_err(fail)?;
        let mut file = std::fs::File::open(&full).map_err(fail)?;
        let (mut bytes, mut hash) = (0, 0xcbf2_9ce4_8422_2325u64);
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = std::io::Read::read(&mut file, &mut buffer).map_err(fail)?;
            if n == 0 {
                return Ok(Self { path: full, bytes, hash });
            }
            bytes += n as u64;
            hash = buffer[..n].iter().fold(hash, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        }
    }

    /// An error if the file is no longer what it was.
    fn check(&self) -> Result<()> {
        if Self::open(&self.path)? == *self {
            return Ok(());
        }
        Err(miette!(
            help =
                "put the old text back, or start a new run from these weights: rambac train RUN --data FILE --out DIR",
            "{}: the text has changed since the run began, so the run cannot go on as it was",
            self.path.display()
        ))
    }
}

/// Set by Ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);

/// Lets Ctrl-C end the run after the current step; a second one ends the process.
pub fn catch_interrupt() {
    if let Err(e) = ctrlc::set_handler(interrupt) {
        warn(format!("Ctrl-C will not save a checkpoint: {e}"));
    }
}

/// What Ctrl-C does.
fn interrupt() {
    if STOP.swap(true, Ordering::SeqCst) {
        std::process::exit(130);
    }
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    STOP.load(Ordering::SeqCst)
}

/// Runs the verb.
pub fn run(a: &Train, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let mut run = match &a.resume {
        Some(dir) => Run::resume(dir, a.out.as_deref(), a.place, pool)?,
        None => {
            let name = a.model.as_deref().ok_or_else(|| miette!("give a MODEL to train, or --resume DIR"))?;
            let out = a.out.clone().ok_or_else(|| miette!(help = "add --out DIR", "where should checkpoints go?"))?;
            let (config, weights) = model::config(name)?;
            let config = a.attention.apply(config)?;
            let recipe = recipe(a)?;
            if let Some(path) = a.attention.file() {
                let len = recipe.stages.iter().map(|s| s.len).max();
                pool.install(|| gate::pass(path, &config, Use { trained: true, len, anyway: a.anyway }))?;
            }
            let state = RunState {
                recipe,
                position: Position { step: 0, planned: 0, tokens: 0, smooth: None, seconds: 0.0 },
                recompute: a.memory.recompute,
                precision: a.place.precision.unwrap_or_default(),
                memory_limit: a.memory.memory_limit,
                data: a.data.as_deref().map(DataFile::open).transpose()?,
            };
            let tokenizer = match &a.tokenizer {
                Some(p) => {
                    let json = std::fs::read(p).map_err(|e| miette!("{}: cannot read it: {e}", p.display()))?;
                    Some(TokenizerFile { origin: p.display().to_string(), json })
                }
                None => None,
            };
            Run::start(config, weights.as_deref(), state, tokenizer, &out, a.place.device, pool)?
        }
    };
    run.save_every = a.save_every;
    run.json = a.json;
    run.tui = a.tui;
    run.attention = a.attention.file().map(Path::to_path_buf);
    if let Some(path) = &a.profile {
        run.profile = Some(run.watched(path, a.profile_steps)?);
    }
    catch_interrupt();
    let done = run.train()?;
    if a.json {
        let latest = run.folder().join("latest");
        println!("{}", serde_json::json!({ "done": done, "step": run.state.position.step, "checkpoint": latest }));
        return Ok(if done { ExitCode::SUCCESS } else { ExitCode::from(130) });
    }
    if done {
        println!("done: {}", run.folder().join("latest").display());
        Ok(ExitCode::SUCCESS)
    } else {
        println!("stopped and saved; go on with: rambac train --resume {}", run.folder().display());
        Ok(ExitCode::from(130))
    }
}

/// The recipe that the flags describe.
fn recipe(a: &Train) -> Result<Recipe> {
    if a.len == 0 || a.batch == 0 || a.steps == 0 || a.accumulate == 0 {
        return Err(miette!("--len, --batch, --steps and --accumulate must be at least 1"));
    }
    let inside = [
        ("--lr", a.lr.unwrap_or(1e-3), f64::MIN_POSITIVE, 10.0),
        ("--lr-floor", a.lr_floor, 0.0, 1.0),
        ("--weight-decay", a.weight_decay, 0.0, 10.0),
        ("--clip", a.clip, 0.0, f64::MAX),
        ("--state-passing", a.state_passing, 0.0, 1.0),
    ];
    if let Some((flag, v, low, high)) = inside.into_iter().find(|(_, v, low, high)| !(low..=high).contains(&v)) {
        let range = match flag {
            "--lr" => "above 0 and at most 10".to_string(),
            "--clip" => "0 (no clipping) or above".to_string(),
            _ => format!("{low} to {high}"),
        };
        return Err(miette!("{flag} {v}: a number in the range {range} is wanted"));
    }
    let rows = match (&a.data, a.task) {
        (Some(_), _) => Rows::Text,
        (None, Data::Passkey) => Rows::Passkey,
        (None, Data::Copy) => Rows::Copy,
        (None, Data::Recall) => Rows::Recall,
    };
    let mut r = if a.curriculum {
        if a.data.is_some() {
            return Err(miette!("--curriculum is the passkey recipe; it has no use for --data"));
        }
        Recipe::passkey()
    } else {
        Recipe { fan_in: a.fan_in, ..Recipe::plain(rows, a.len, a.batch, a.steps) }
    };
    r.seed = a.seed;
    r.accumulate = a.accumulate;
    r.carry_share = a.state_passing;
    let o = &mut r.optim;
    if !a.curriculum {
        (o.warmup, o.floor) = (a.warmup.min(a.steps), a.lr_floor);
    }
    if let Some(lr) = a.lr {
        o.lr = lr;
    }
    (o.weight_decay, o.clip) = (a.weight_decay, a.clip);
    Ok(r)
}

/// Whether rows go on from the states of rows before.
fn carry(r: &Recipe) -> Carry {
    if r.carry_share > 0.0 { Carry::States } else { Carry::Zero }
}

/// The sizes of the stage with the most tokens a step.
fn largest(r: &Recipe) -> Option<Bindings> {
    let s = r.stages.iter().max_by_key(|s| s.len.saturating_mul(s.rows))?;
    Some(Bindings::new([("N", s.rows), ("L", s.len)]))
}

fn already(out: &Path) -> Report {
    miette!(
        help = format!("give another --out, or go on with it: rambac train --resume {}", out.display()),
        "{} already holds a run",
        out.display()
    )
}

/// A tokenizer.json and where it was read.
pub struct TokenizerFile {
    origin: String,
    json: Vec<u8>,
}

/// A training run.
pub struct Run {
    pub config: Config,
    pub state: RunState,
    trainer: Trainer,
    pool: Arc<rayon::ThreadPool>,
    /// Of every stage.
    tasks: Arc<Vec<MixTask>>,
    validation: Option<TextTask>,
    folder: CheckpointDir,
    metrics: Metrics,
    /// The tokenizer's file, copied into every checkpoint.
    tokenizer: Option<TokenizerFile>,
    /// Steps between checkpoints; 0: only at the end.
    pub save_every: u64,
    pub json: bool,
    /// Draw a dashboard in place of the bar.
    pub tui: bool,
    pub profile: Option<Profile>,
    /// The file of the attention, if it came from one.
    pub attention: Option<PathBuf>,
    /// Total time after which the run stops by itself.
    pub time_limit: Option<Duration>,
}

impl Run {
    /// A new run in `out`.
    pub fn start(
        config: Config,
        weights: Option<&Path>,
        state: RunState,
        tokenizer: Option<TokenizerFile>,
        out: &Path,
        on: On,
        pool: Arc<rayon::ThreadPool>,
    ) -> Result<Self> {
        if out.is_dir() && !CheckpointDir::open(out, Some(3)).and_then(|f| f.steps()).map_err(wrap)?.is_empty() {
            return Err(already(out));
        }
        // Weights, two moments and gradients: before anything is drawn or written.
        let need = usize::try_from(config.n_parameters()).unwrap_or(usize::MAX).saturating_mul(16);
        let what = format!("training {} parameters", show::count(config.n_parameters()));
        machine::room(what, need, "train a smaller model")?;
        let rule = if state.recipe.fan_in { InitRule::FanIn } else { InitRule::Normal };
        let store = model::parameters(&config, weights, rule, state.recipe.seed)?;
        let folder = || CheckpointDir::open(out, Some(3)).map_err(wrap);
        Self::build(config, state, tokenizer, store, folder, on, pool)
    }

    /// Goes on with the newest checkpoint of `dir`, writing to `out` or to `dir` itself.
    pub fn resume(dir: &Path, out: Option<&Path>, place: TrainPlace, pool: Arc<rayon::ThreadPool>) -> Result<Self> {
        // Through `latest`: a checkpoint's own folder stands for the run that it lies in.
        let dir = &dir.canonicalize().unwrap_or_else(|_| dir.into());
        let c = Checkpoint::open(dir).map_err(wrap)?;
        let home = if c.path == *dir && c.step.is_some() { dir.parent().unwrap_or(dir) } else { dir };
        let mut state: RunState = serde_json::from_str(&c.trainer)
            .map_err(|e| miette!("{}: trainer.json is not a training state: {e}", c.path.display()))?;
        state.precision = place.precision.unwrap_or(state.precision);
        let config = Config::from_json(&c.config, &c.path.join("config.json").to_string_lossy()).map_err(wrap)?.config;
        let mut store = model::parameters(&config, Some(&c.path), InitRule::Normal, 0)?;
        for name in c.state.names() {
            let (shape, v) = c.state.get_f32(name).map_err(wrap)?;
            store.insert(name, Tensor::f32(&shape, v));
        }
        let moments = |p: &String| moment_names(p).into_iter().chain([STEP.to_string()]).collect::<Vec<_>>();
        let names: Vec<String> = config.parameters().iter().flat_map(|s| moments(&s.name)).collect();
        if let Some(lost) = names.iter().find(|n| state.position.step > 0 && store.get(n).is_none()) {
            return Err(miette!("{}: state.safetensors lacks {lost}; this checkpoint cannot go on", c.path.display()));
        }
        if let Some(d) = &state.data {
            d.check()?;
        }
        let path = c.path.join("tokenizer.json");
        let tokenizer = match std::fs::read(&path) {
            Ok(json) => Some(TokenizerFile { origin: path.display().to_string(), json }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(miette!("{}: {e}", path.display())),
        };
        let folder = CheckpointDir::open(out.unwrap_or(home), Some(3)).map_err(wrap)?;
        let other = out.is_some_and(|o| o.canonicalize().is_ok_and(|o| o != home));
        if other && !folder.steps().map_err(wrap)?.is_empty() {
            return Err(already(folder.path()));
        }
        Self::build(config, state, tokenizer, store, || Ok(folder), place.device, pool)
    }

    /// Opens the folder last: a run that is refused leaves none.
    fn build(
        config: Config,
        state: RunState,
        tokenizer_file: Option<TokenizerFile>,
        store: Store,
        folder: impl FnOnce() -> Result<CheckpointDir>,
        on: On,
        pool: Arc<rayon::ThreadPool>,
    ) -> Result<Self> {
        let r = &state.recipe;
        let tokenizer = match &tokenizer_file {
            Some(f) => Tokenizer::from_json(&f.json, &f.origin).map_err(wrap)?,
            None => Tokenizer::bytes(),
        };
        tokenizer.check_vocab(config.vocab_size).map_err(wrap)?;
        let text = match &state.data {
            Some(d) => Some(Text::open(&d.path, &tokenizer).map_err(wrap)?),
            None => None,
        };
        let train = text.as_ref().map(|t| t.task(r.seed, Split::Train));
        let validation = text.as_ref().map(|t| t.task(r.seed, Split::Validation));
        let tasks = r.tasks(train.as_ref()).map_err(wrap)?;
        let unit = match &config.attention {
            Some(_) => stack::segment_unit(&config).map_err(|e| miette!("{e}"))?,
            None => config.chunk_size,
        };
        for (t, s) in tasks.iter().zip(&r.stages) {
            // Finds a row that is too short or a chunk that does not divide before anything is compiled.
            t.row(0, 0, s.len).map_err(wrap)?;
            if config.num_upper_groups > 0 && !s.len.is_multiple_of(unit) {
                let whose =
                    if config.attention.is_some() { "what its attention reads," } else { "the model's chunk_size" };
                return Err(miette!(
                    help = show::nearest(s.len, unit),
                    "--len {}: not divisible by {whose} {unit}",
                    s.len
                ));
            }
            if t.vocab_size() > config.vocab_size {
                return Err(miette!(
                    "the task {} has ids up to {}, the model's vocab_size is {}",
                    t.name(),
                    t.vocab_size() - 1,
                    config.vocab_size
                ));
            }
        }
        let loss = stack::loss(&config, carry(r), false).map_err(wrap)?;
        let adamw = model::adamw(r);
        let specs = config.parameters();
        let decays = |name: &str| specs.iter().any(|s| s.name == name && s.decay);
        let dims: Vec<Bindings> = r.stages.iter().map(|s| Bindings::new([("N", s.rows), ("L", s.len)])).collect();
        let memory = MemoryArgs { recompute: state.recompute, memory_limit: state.memory_limit }.choice(dims.clone());
        let at = (on, state.precision, dims);
        let mut trainer = trainer(&loss, &adamw, decays, r.accumulate, &memory, store, at, &pool)?;
        if let (On::Cpu, Some(dims)) = (on, largest(r)) {
            let plan = trainer.plan(&dims).map_err(error::train)?;
            let help = "use a smaller model, a shorter --len, a smaller --batch, or --memory-limit";
            machine::room(format!("a step at {dims}"), plan.peak(), help)?;
        }
        let folder = folder()?;
        let metrics = Metrics::open(folder.path(), state.position.step)?;
        Ok(Self {
            config,
            state,
            trainer,
            pool,
            tasks: Arc::new(tasks),
            validation,
            folder,
            metrics,
            tokenizer: tokenizer_file,
            save_every: 0,
            json: false,
            tui: false,
            profile: None,
            attention: None,
            time_limit: None,
        })
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The weights as they were at the last checkpoint, or at the end.
    pub fn store(&self) -> &Store {
        &self.trainer.store
    }

    /// Prints what the largest stage needs before anything runs.
    pub fn announce(&mut self) -> Result<()> {
        let Some(dims) = largest(&self.state.recipe) else { return Ok(()) };
        let plan = self.trainer.plan(&dims).map_err(error::train)?;
        eprintln!(
            "{} parameters, {} tokens in {}\npeak memory {}: {} of activations at {dims}, {} of weights and optimiser",
            show::count(self.config.n_parameters()),
            show::count(self.state.recipe.tokens()),
            show::plural(self.state.recipe.stages.len(), "stage"),
            show::bytes(plan.peak()),
            show::bytes(plan.arena),
            show::bytes(plan.persistent),
        );
        Ok(())
    }

    fn dashboard(&mut self) -> Result<Dashboard> {
        let r = &self.state.recipe;
        let (stages, tokens) = (r.stages.len(), r.tokens());
        let planned =
            largest(r).map(|d| self.trainer.plan(&d)).transpose().map_err(error::train)?.map_or(0, |p| p.peak());
        let parameters = show::count(self.config.n_parameters());
        let title = format!("{parameters} parameters into {}", self.folder().display());
        Dashboard::start(About { title, stages, tokens, planned }, interrupt)
    }

    /// A trace of the first steps.
    fn watched(&mut self, path: &Path, steps: u64) -> Result<Profile> {
        let parts = self.state.recipe.accumulate as u64;
        let Some(machine) = self.trainer.machine() else { return Profile::create(path, steps) };
        // Every micro-batch is a run of a program, and so is the update where it is one of its own.
        let mut p = Profile::create(path, steps * if parts > 1 { parts + 1 } else { 1 })?;
        p.device(machine)?;
        self.trainer.watch(steps as usize).map_err(error::train)?;
        Ok(p)
    }

    /// Writes a checkpoint.
    pub fn save(&mut self) -> Result<PathBuf> {
        self.trainer.sync().map_err(error::train)?;
        let is_weight = |n: &str| !n.starts_with("optim.") && !n.starts_with("carry.") && !n.starts_with("accum.");
        let tensors = |weights: bool| -> Vec<TensorRef<'_>> {
            let of = self.trainer.store.0.iter().filter(|(n, _)| is_weight(n) == weights);
            let floats = |t| Tensor::as_f32(t).expect("BUG: params and states are f32");
            of.map(|(n, t)| TensorRef::f32(n.as_str(), &t.shape, floats(t))).collect()
        };
        let trainer = serde_json::to_string_pretty(&self.state).into_diagnostic()?;
        let files: Vec<(&str, &[u8])> = self.tokenizer.iter().map(|t| ("tokenizer.json", t.json.as_slice())).collect();
        let snapshot = Snapshot {
            config: &self.config.to_json(),
            weights: &tensors(true),
            state: &tensors(false),
            trainer: &trainer,
            files: &files,
        };
        self.folder.save(self.state.position.step, &snapshot).map_err(wrap)
    }
}

/// The trainer of a loss on a device, for batches of these sizes.
#[allow(clippy::too_many_arguments)]
pub fn trainer(
    loss: &Graph,
    adamw: &AdamW,
    decays: impl Fn(&str) -> bool,
    parts: usize,
    memory: &Memory,
    store: Store,
    (on, precision, sizes): (On, PrecisionArg, Vec<Bindings>),
    pool: &Arc<rayon::ThreadPool>,
) -> Result<Trainer> {
    if !on.gpu() {
        if on == On::Reference || precision == PrecisionArg::Bf16 {
            let what = if on == On::Reference { "--device reference" } else { "--precision bf16 on the CPU" };
            return Err(miette!(
                help = "use --device cuda:0, or --device cpu --precision f32",
                "{what}: training runs on the CPU in f32, and on GPUs in f32 or bf16"
            ));
        }
        return Trainer::new(loss, adamw, decays, parts, memory, store, pool.clone()).map_err(error::train);
    }
    let gpu = Box::new(Gpu::open(on)?.at(sizes));
    // Kernels are compiled several at a time.
    let decaying: std::collections::HashSet<String> =
        loss.sources().filter(|(_, s)| decays(&s.name)).map(|(_, s)| s.name.clone()).collect();
    let make = || {
        let decays = |n: &str| decaying.contains(n);
        Trainer::on_gpu(loss, adamw, decays, parts, memory, precision.into(), store, gpu)
    };
    pool.install(make).map_err(error::train)
}
