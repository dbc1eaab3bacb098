//! `rambac bench`: how fast a training step, a forward, one op, prefill or decoding runs, against what this machine can do.
//!
//! FLOPs and bytes are counted from the ops' definitions, not measured; the machine's own rates (a large product, a
//! large copy) are measured in the same run, so that a busy or slow machine shows.

mod device;
mod infer;
mod ops;

use crate::cli::{Bench, MemoryArgs, PrecisionArg, Weights, Work};
use crate::cmd::train::trainer;
use crate::device::On;
use crate::error::{self, Result, warn, wrap};
use crate::machine::{self, Rates};
use crate::model;
use crate::profile::Profile;
use crate::show::{self, Table};
use crate::work::{self, Sums};
use miette::miette;
use rambac_codegen::{Memory, MemoryPlan, Program, lower};
use rambac_ir::{Bindings, Cost, DType, Graph};
use rambac_models::data::rng;
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, InitRule};
use rambac_passes::optimise;
use rambac_passes::train_step::AdamW;
use rambac_runtime::executor::StepTimes;
use rambac_runtime::{Executor, MicroBatch, Store, Tensor};
use rand::Rng;
use serde_json::{Value as Json, json};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs before the timed ones: the first one maps memory, the second one warms caches.
const WARM_UP: usize = 2;

/// Runs the verb.
pub fn run(a: &Bench, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let (config, weights) = model::config(&a.preset)?;
    let config = a.attention.apply(config)?;
    if config.attention.is_some() && matches!(a.what, Work::Select | Work::Attend) {
        return Err(miette!(
            help = "rambac bench train --attention VARIANT --profile times every op of the stack",
            "bench select and attend are about hierarchical sparse attention: leave --attention out"
        ));
    }
    placed(a)?;
    if matches!(a.what, Work::Prefill | Work::Decode) {
        no_trace(a)?;
        return infer::run(a, &config, weights.as_deref(), pool);
    }
    if !config.is_plain() && a.what != Work::Scan && !a.len.is_multiple_of(config.chunk_size) {
        let s = config.chunk_size;
        return Err(miette!(
            help = show::nearest(a.len, s),
            "--len {} is not a multiple of {s}, the chunk size of {}",
            a.len,
            a.preset
        ));
    }
    if a.weights == Weights::Bf16 && a.what != Work::Forward {
        let why = if a.what == Work::Train { "training updates f32 weights" } else { "one op reads no weights" };
        return Err(miette!("--weights bf16: {why}; it is for forward, prefill and decode"));
    }
    if config.is_plain() && matches!(a.what, Work::Select | Work::Attend) {
        return Err(miette!(
            help = "bench scan, or give a model with chunks, such as --preset small",
            "{} is a plain Mamba-2: it selects no chunks",
            a.preset
        ));
    }
    no_trace(a)?;
    // At first, so that what can't be timed is known at once.
    let device = a.place.device.gpu().then(|| device::limits(a.place.device, a.place.precision.unwrap_or_default()));
    let device = device.transpose()?;
    let b = Bencher { a, config, dims: Bindings::new([("N", a.batch), ("L", a.len)]), pool };
    let results = match a.what {
        Work::Train => vec![b.train()?],
        Work::Forward => vec![b.forward()?],
        Work::Select => b.op(b.select()?, "selection")?,
        Work::Attend => b.op(b.attend()?, "chunk_attention")?,
        Work::Scan => b.op(b.scan()?, "selective_scan")?,
        Work::Prefill | Work::Decode => unreachable!("BUG: handled above"),
    };
    // Before this machine's rates are measured, which takes memory of its own.
    let rss = machine::peak_rss();
    let limits = device.unwrap_or_else(|| Limits::of(machine::rates(&b.pool)));
    for r in &results {
        if a.json {
            println!("{}", b.json(r, &limits, rss));
        } else {
            b.print(r, &limits, rss);
        }
        if a.profile.is_some() {
            profile(&r.name, r.sums(), &limits, a.json);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses places where there is nothing to time, and what the CPU or a GPU alone does.
fn placed(a: &Bench) -> Result<()> {
    let on = a.place.device;
    if (a.memory.recompute || a.memory.memory_limit.is_some()) && a.what != Work::Train {
        return Err(miette!("--recompute and --memory-limit are for bench train: nothing else keeps activations"));
    }
    if matches!(a.what, Work::Prefill | Work::Decode) && a.place.precision.is_some() {
        return Err(miette!("--precision is for training and single ops: prefill and decode have --weights bf16"));
    }
    match on {
        On::Cpu if a.place.precision == Some(PrecisionArg::Bf16) => Err(miette!(
            help = "add --device cuda:0; on the CPU, --weights bf16 keeps weights in bf16",
            "--precision bf16 is for GPUs"
        )),
        On::Cpu | On::Cuda(_) => Ok(()),
        _ => Err(miette!(
            help = "use --device cpu or cuda:0; simulate and run tell what the simulator counts",
            "--device {on}: it has no clock, so there is nothing to time"
        )),
    }
}

/// What a machine or a device reaches in plain work.
struct Limits {
    /// Whose rates they are, and whether that is a GPU.
    of: String,
    gpu: bool,
    /// What `gemm` is the rate of.
    products: String,
    /// FLOP/s.
    gemm: f64,
    /// Bytes read and written per second.
    copy: f64,
}

impl Limits {
    fn of(r: Rates) -> Limits {
        Limits { of: "this machine".into(), gpu: false, products: "large products".into(), gemm: r.gemm, copy: r.copy }
    }

    /// `this machine's`
    fn whose(&self) -> &'static str {
        if self.gpu { "this GPU's" } else { "this machine's" }
    }

    /// Seconds that work takes at least at these rates.
    fn floor(&self, c: Cost) -> f64 {
        (c.flops / self.gemm).max(c.bytes / self.copy)
    }
}

/// Refuses a trace of what has none.
fn no_trace(a: &Bench) -> Result<()> {
    if matches!(&a.profile, Some(Some(_))) && !matches!(a.what, Work::Train | Work::Forward) {
        return Err(miette!(
            "--profile FILE: traces are of train and forward; --profile alone prints the times of ops"
        ));
    }
    Ok(())
}

/// What was timed.
struct Timed {
    /// `train`, `select forward`, …
    name: String,
    /// Seconds of each run, sorted.
    seconds: Vec<f64>,
    cost: Cost,
    plan: MemoryPlan,
    program: Program,
    costs: Vec<Cost>,
    /// Time of each step, all runs together.
    steps: StepTimes,
    /// Bytes of a device in use.
    device: Option<usize>,
}

impl Timed {
    fn median(&self) -> f64 {
        median(&self.seconds)
    }

    /// Time and work of one run by kind of op and phase.
    fn sums(&self) -> Kinds {
        let mut sums = Sums::new();
        add_steps(&mut sums, &self.program, &self.steps, &self.costs, self.seconds.len() as f64);
        sums
    }
}

/// The middle of sorted values.
fn median(s: &[f64]) -> f64 {
    let n = s.len();
    if n % 2 == 1 { s[n / 2] } else { (s[n / 2 - 1] + s[n / 2]) / 2.0 }
}

/// Sums by kind of op and phase.
type Kinds = Sums<(&'static str, &'static str)>;

/// Adds a program's steps: `times` of `runs` runs, `costs` of one.
fn add_steps(sums: &mut Kinds, p: &Program, times: &[Duration], costs: &[Cost], runs: f64) {
    for ((step, t), cost) in p.steps.iter().zip(times).zip(costs) {
        let phase = work::phase(p.graph.node(step.node).scope.as_deref());
        sums.add((work::kind(step), phase), t.as_secs_f64() / runs, *cost);
    }
}

struct Bencher<'a> {
    a: &'a Bench,
    config: Config,
    dims: Bindings,
    pool: Arc<rayon::ThreadPool>,
}

impl Bencher<'_> {
    /// Random tokens, each labelled with the next one.
    fn batch(&self) -> MicroBatch {
        let (n, l) = (self.a.batch, self.a.len);
        let mut r = rng::stream(0, "bench", &[]);
        let mut ids = vec![];
        let mut labels = vec![];
        for _ in 0..n {
            let row: Vec<i32> = (0..=l).map(|_| r.random_range(0..self.config.vocab_size) as i32).collect();
            ids.extend(&row[..l]);
            labels.extend(&row[1..]);
        }
        MicroBatch {
            dims: self.dims.clone(),
            inputs: vec![
                ("input_ids", Tensor::i32(&[n, l], ids)),
                ("labels", Tensor::i32(&[n, l], labels)),
                ("loss_weights", Tensor::f32(&[n, l], vec![1.0; n * l])),
            ],
        }
    }

    fn memory(&self) -> Memory {
        self.a.memory.choice(vec![self.dims.clone()])
    }

    fn loss(&self) -> Result<Graph> {
        stack::loss(&self.config, Carry::Zero, false).map_err(wrap)
    }

    fn train(&self) -> Result<Timed> {
        let decays: std::collections::HashSet<String> =
            self.config.parameters().into_iter().filter(|p| p.decay).map(|p| p.name).collect();
        let opt = AdamW { steps: 1_000_000, ..AdamW::default() };
        // Without parameters at first: whether they fit is known only from the plan.
        let place = self.a.place;
        let at = (place.device, place.precision.unwrap_or_default(), vec![self.dims.clone()]);
        let (loss, memory) = (self.loss()?, self.memory());
        let decays = |name: &str| decays.contains(name);
        let mut t = trainer(&loss, &opt, decays, 1, &memory, Store::default(), at, &self.pool)?;
        let plan = t.plan(&self.dims).map_err(error::train)?;
        if place.device == On::Cpu {
            self.fits(&plan)?;
        }
        t.store = model::parameters(&self.config, None, InitRule::default(), 0)?;
        let batch = [self.batch()];
        let mut step = 0;
        let mut run = |times: Option<&mut StepTimes>| {
            step += 1;
            t.step_timed(step, &batch, times).map(drop).map_err(error::train)
        };
        let (seconds, steps, last) = match place.device {
            On::Cpu => self.time(run)?,
            // Step by step it takes longer: in a run of its own.
            _ => {
                let (seconds, ..) = self.time(|_| run(None))?;
                let mut steps = StepTimes::new();
                run(Some(&mut steps))?;
                let last = steps.clone();
                steps.iter_mut().for_each(|t| *t *= self.a.runs as u32);
                (seconds, steps, last)
            }
        };
        self.trace("train", t.program(), &last)?;
        self.timed("train", t.program().clone(), plan, seconds, steps)
    }

    fn forward(&self) -> Result<Timed> {
        if self.a.place.device.gpu() {
            let params = model::parameters(&self.config, None, InitRule::default(), 0)?;
            return self.forward_on_device(&self.loss()?, &params, &self.batch());
        }
        let mut e = Executor::new(lower(&optimise(&self.loss()?, &self.a.weights.options())), self.pool.clone());
        let plan = e.plan(&self.dims).map_err(wrap)?;
        self.fits(&plan)?;
        let mut store = model::parameters(&self.config, None, InitRule::default(), 0)?;
        for s in e.program().sources.iter().filter(|s| s.ty.dtype == DType::BF16) {
            if let Some(t) = store.0.get_mut(&s.name) {
                t.narrow();
            }
        }
        let batch = self.batch();
        let views: Vec<_> = batch.inputs.iter().map(|(n, t)| (*n, t.view())).collect();
        let (seconds, steps, last) =
            self.time(|times| e.run_timed(&self.dims, &views, &mut store, times).map(drop).map_err(wrap))?;
        self.trace("forward", e.program(), &last)?;
        self.timed("forward", e.program().clone(), plan, seconds, steps)
    }

    /// Refuses what this machine cannot hold, before it is allocated.
    fn fits(&self, plan: &MemoryPlan) -> Result<()> {
        match machine::memory() {
            Some((total, free)) => self.room(plan, "this machine", total, free),
            None => Ok(()),
        }
    }

    fn room(&self, plan: &MemoryPlan, on: &str, total: usize, free: usize) -> Result<()> {
        let need = show::bytes(plan.peak());
        if plan.peak() > total {
            return Err(miette!(
                help = "use a smaller model, a shorter --len, a smaller --batch, or --memory-limit",
                "{} at {} needs {need}, but {on} has {}",
                self.a.preset,
                self.dims,
                show::bytes(total)
            ));
        }
        if plan.peak() > free {
            warn(format!("this needs {need}, but only {} are free", show::bytes(free)));
        }
        Ok(())
    }

    /// Seconds of every run, sorted, the time of every step over all of them, and in the last.
    fn time(
        &self,
        mut f: impl FnMut(Option<&mut StepTimes>) -> Result<()>,
    ) -> Result<(Vec<f64>, StepTimes, StepTimes)> {
        for _ in 0..WARM_UP {
            f(None)?;
        }
        let (mut steps, mut last) = (StepTimes::new(), StepTimes::new());
        let mut seconds = vec![];
        for _ in 0..self.a.runs {
            last.clear();
            let t = Instant::now();
            f(Some(&mut last))?;
            seconds.push(t.elapsed().as_secs_f64());
            steps.resize(last.len(), Duration::ZERO);
            steps.iter_mut().zip(&last).for_each(|(s, t)| *s += *t);
        }
        seconds.sort_by(f64::total_cmp);
        Ok((seconds, steps, last))
    }

    /// Writes a run as a trace, if one was asked for.
    fn trace(&self, name: &str, p: &Program, times: &StepTimes) -> Result<()> {
        let Some(Some(path)) = &self.a.profile else { return Ok(()) };
        let mut profile = Profile::create(path, 1)?;
        // It has ended: the trace begins with it all the same.
        profile.run(name, p, &self.dims, (Instant::now(), 1), times, &[])
    }

    fn timed(
        &self,
        name: &str,
        program: Program,
        plan: MemoryPlan,
        seconds: Vec<f64>,
        steps: StepTimes,
    ) -> Result<Timed> {
        let costs = program.costs(&self.dims).map_err(wrap)?;
        let cost = costs.iter().copied().sum();
        Ok(Timed { name: name.into(), seconds, cost, plan, program, costs, steps, device: None })
    }

    fn tokens_per_s(&self, r: &Timed) -> f64 {
        (self.a.batch * self.a.len) as f64 / r.median()
    }

    fn json(&self, r: &Timed, limits: &Limits, rss: usize) -> Json {
        let (t, c) = (r.median(), r.cost);
        json!({
            "bench": r.name, "preset": self.a.preset, "len": self.a.len, "batch": self.a.batch,
            "device": self.a.place.device.to_string(), "on": limits.of, "precision": self.precision(),
            "selections": (self.a.what == Work::Attend).then(|| format!("{:?}", self.a.selections).to_lowercase()),
            "recompute": self.a.memory.recompute, "memory_limit": self.a.memory.memory_limit, "threads": self.pool.current_num_threads(), "runs": r.seconds.len(),
            "tokens_per_s": self.tokens_per_s(r),
            "seconds": t, "seconds_min": r.seconds[0], "seconds_max": r.seconds[r.seconds.len() - 1],
            "flops": c.flops, "bytes": c.bytes, "floor_seconds": limits.floor(c), "times_floor": t / limits.floor(c),
            "peak_bytes": r.plan.peak(), "arena_bytes": r.plan.arena, "persistent_bytes": r.plan.persistent,
            "peak_rss_bytes": rss, "device_bytes": r.device,
            "gflop_per_s": c.flops / t / 1e9, "gb_per_s": c.bytes / t / 1e9,
            "machine_gemm_gflop_per_s": limits.gemm / 1e9, "machine_copy_gb_per_s": limits.copy / 1e9,
            "gemm_fraction": c.flops / t / limits.gemm, "copy_fraction": c.bytes / t / limits.copy,
        })
    }

    fn precision(&self) -> &'static str {
        if self.a.place.precision == Some(PrecisionArg::Bf16) { "bf16" } else { "f32" }
    }

    fn print(&self, r: &Timed, limits: &Limits, rss: usize) {
        let t = r.median();
        let recompute = match self.a.memory {
            MemoryArgs { recompute: true, .. } => ", recomputing activations".into(),
            MemoryArgs { memory_limit: Some(limit), .. } => format!(" within {}", show::bytes(limit)),
            _ => String::new(),
        };
        println!(
            "{} of {} ({} parameters) at {}{recompute}, {}",
            r.name,
            self.a.preset,
            show::si(self.config.n_parameters() as f64, ""),
            self.dims,
            match limits.gpu {
                true => format!("in {} on {}", self.precision(), limits.of),
                false => show::plural(self.pool.current_num_threads(), "thread"),
            }
        );
        println!("  speed     {} tokens/s", show::count(self.tokens_per_s(r) as u64));
        println!(
            "  time      {} (median of {}; {} to {})",
            show::seconds(t),
            show::plural(r.seconds.len(), "run"),
            show::seconds(r.seconds[0]),
            show::seconds(r.seconds[r.seconds.len() - 1])
        );
        print_work(r.cost.flops, t, limits);
        println!(
            "  traffic   {}: {}, {} of {} large copies ({})",
            show::si(r.cost.bytes, "B"),
            show::si(r.cost.bytes / t, "B/s"),
            show::share(r.cost.bytes / t, limits.copy),
            limits.whose(),
            show::si(limits.copy, "B/s")
        );
        let floor = limits.floor(r.cost);
        println!(
            "  floor     {}, the longer of the two at these rates: the time is {:.2} x that",
            show::seconds(floor),
            t / floor
        );
        println!(
            "  memory    {} planned ({} of activations), {} {}",
            show::bytes(r.plan.peak()),
            show::bytes(r.plan.arena),
            show::bytes(r.device.unwrap_or(rss)),
            match r.device {
                Some(_) => "in use on the device",
                None if limits.gpu => "resident on the host at its peak",
                None => "resident at its peak",
            }
        );
    }
}

/// The line of a report on FLOPs: how many, how fast, beside the rate of large products.
fn print_work(flops: f64, seconds: f64, limits: &Limits) {
    println!(
        "  work      {}: {}, {} of {} {} ({})",
        show::si(flops, "FLOP"),
        show::si(flops / seconds, "FLOP/s"),
        show::share(flops / seconds, limits.gemm),
        limits.whose(),
        limits.products,
        show::si(limits.gemm, "FLOP/s")
    );
}

/// Prints the time per kind of op, longest first, beside what its work takes at least.
fn profile(name: &str, sums: Kinds, limits: &Limits, as_json: bool) {
    let total = sums.seconds();
    let mut lines = sums.lines;
    lines.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
    if as_json {
        for ((op, phase), l) in &lines {
            println!(
                "{}",
                json!({
                    "profile": name, "op": op, "phase": phase, "steps": l.steps, "seconds": l.seconds,
                    "share": l.seconds / total, "flops": l.cost.flops, "bytes": l.cost.bytes,
                    "floor_seconds": limits.floor(l.cost),
                    "gflop_per_s": l.cost.flops / l.seconds / 1e9, "gb_per_s": l.cost.bytes / l.seconds / 1e9,
                })
            );
        }
        return;
    }
    println!();
    let mut table = Table::new(2, &["op", "phase", "steps", "time", "share", "GFLOP/s", "GB/s", "floor", "x floor"]);
    let ms = |s: f64| format!("{:.2} ms", s * 1e3);
    for ((op, phase), l) in &lines {
        let rate = |work: f64| if work > 0.0 { show::digits(work / l.seconds / 1e9) } else { "-".into() };
        let floor = limits.floor(l.cost);
        table.row([
            op.to_string(),
            phase.to_string(),
            l.steps.to_string(),
            ms(l.seconds),
            show::share(l.seconds, total),
            rate(l.cost.flops),
            rate(l.cost.bytes),
            ms(floor),
            if floor > 0.0 { format!("{:.1}", l.seconds / floor) } else { "-".into() },
        ]);
    }
    let steps = lines.iter().map(|l| l.1.steps).sum::<usize>().to_string();
    let floor: f64 = lines.iter().map(|l| limits.floor(l.1.cost)).sum();
    let none = String::new;
    table.row([
        "all".into(),
        none(),
        steps,
        ms(total),
        "100 %".into(),
        none(),
        none(),
        ms(floor),
        format!("{:.1}", total / floor),
    ]);
    table.print();
}
