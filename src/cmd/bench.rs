//! `rambac bench`: how fast a training step, a forward, one op, prefill or decoding runs, against what this machine can do.
//!
//! FLOPs and bytes are counted from the ops' definitions, not measured; the machine's own rates (a large product, a
//! large copy) are measured in the same run, so that a busy or slow machine shows.

mod infer;

use crate::cli::{Bench, MemoryArgs, Weights, Work};
use crate::cmd::train::trainer;
use crate::device::On;
use crate::error::{self, Result, warn, wrap};
use crate::machine::{self, Rates};
use crate::model;
use crate::show::{self, Table};
use crate::work::{self, Sums};
use miette::miette;
use rambac_codegen::{Memory, MemoryPlan, Program, lower};
use rambac_ir::ops::*;
use rambac_ir::{Bindings, Builder, Cost, DType, Dim, Graph, Ty, Value};
use rambac_models::data::rng;
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, InitRule};
use rambac_passes::train_step::AdamW;
use rambac_passes::{Options, gradients, optimise};
use rambac_runtime::executor::StepTimes;
use rambac_runtime::{Executor, MicroBatch, Store, Tensor};
use rand::Rng;
use rand::seq::index::sample;
use serde_json::{Value as Json, json};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs before the timed ones: the first one maps memory, the second one warms caches.
const WARM_UP: usize = 2;

/// Runs the verb.
pub fn run(a: &Bench, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let (config, weights) = model::config(&a.preset)?;
    if matches!(a.what, Work::Prefill | Work::Decode) {
        return infer::run(a, &config, weights.as_deref(), pool);
    }
    if !config.is_plain() && a.what != Work::Scan && !a.len.is_multiple_of(config.chunk_size) {
        let s = config.chunk_size;
        return Err(miette!(
            help = format!("use --len {}", (a.len / s).max(1) * s),
            "--len {} is not a multiple of {s}, the chunk size of {}",
            a.len,
            a.preset
        ));
    }
    let elsewhere = a.place.device != On::Cpu || a.place.precision.is_some();
    if elsewhere && (a.what != Work::Train || a.profile) {
        return Err(miette!("--device and --precision are for bench train, without --profile"));
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
    let b = Bencher { a, config, dims: Bindings::new([("N", a.batch), ("L", a.len)]), pool };
    let results = match a.what {
        Work::Train => vec![b.train()?],
        Work::Forward => vec![b.forward()?],
        Work::Select => b.op(b.select()?, "selection")?,
        Work::Attend => b.op(b.attend()?, "chunk_attention")?,
        Work::Scan => b.op(b.scan()?, "selective_scan")?,
        Work::Prefill | Work::Decode => unreachable!("BUG: handled above"),
    };
    // Before the rates are measured, which takes memory of its own.
    let rss = machine::peak_rss();
    let rates = machine::rates(&b.pool);
    for r in &results {
        if a.json {
            println!("{}", b.json(r, rates, rss));
        } else {
            b.print(r, rates, rss);
        }
        if a.profile {
            profile(&r.name, r.sums(), a.json);
        }
    }
    Ok(ExitCode::SUCCESS)
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
        let at = (place.device, place.precision.unwrap_or_default());
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
        let (seconds, steps) = self.time(|times| {
            step += 1;
            t.step_timed(step, &batch, times).map(drop).map_err(error::train)
        })?;
        self.timed("train", t.program().clone(), plan, seconds, steps)
    }

    fn forward(&self) -> Result<Timed> {
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
        let (seconds, steps) =
            self.time(|times| e.run_timed(&self.dims, &views, &mut store, times).map(drop).map_err(wrap))?;
        self.timed("forward", e.program().clone(), plan, seconds, steps)
    }

    /// Refuses what this machine cannot hold, before it is allocated.
    fn fits(&self, plan: &MemoryPlan) -> Result<()> {
        let Some((total, free)) = machine::memory() else { return Ok(()) };
        let need = show::bytes(plan.peak());
        if plan.peak() > total {
            return Err(miette!(
                help = "use a smaller model, a shorter --len, a smaller --batch, or --memory-limit",
                "{} at {} needs {need}, but this machine has {}",
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

    /// Seconds of every run, sorted, and the time of every step over all of them.
    fn time(&self, mut f: impl FnMut(Option<&mut StepTimes>) -> Result<()>) -> Result<(Vec<f64>, StepTimes)> {
        for _ in 0..WARM_UP {
            f(None)?;
        }
        let mut steps = StepTimes::new();
        let mut seconds = vec![];
        for _ in 0..self.a.runs {
            let t = Instant::now();
            f(Some(&mut steps))?;
            seconds.push(t.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        Ok((seconds, steps))
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
        Ok(Timed { name: name.into(), seconds, cost, plan, program, costs, steps })
    }

    fn dim_list(&self, tail: &[usize]) -> Vec<Dim> {
        [Dim::sym("N"), Dim::sym("L")].into_iter().chain(tail.iter().map(|&d| Dim::int(d))).collect()
    }

    /// A float input `[N, L, tail..]`.
    fn tokens(&self, b: &mut Builder, name: &str, tail: &[usize]) -> Value {
        b.input(name, Ty::f32(self.dim_list(tail)))
    }

    fn select(&self) -> Result<(Graph, Value)> {
        let c = &self.config;
        let (h, r) = (c.num_kv_heads, c.retrieval_head_dim());
        let mut b = Builder::new("select", &["N", "L"]);
        let q = self.tokens(&mut b, "q", &[h, r]);
        let chunks = Dim::sym("L").checked_div(c.chunk_size as u64).unwrap_or(Dim::int(0));
        let lm = b.input("landmarks", Ty::f32([Dim::sym("N"), chunks, Dim::int(h), Dim::int(r)]));
        let start = b.constant(0.0, Ty::i32([Dim::sym("N")]));
        let s = b.push(Score { chunk: c.chunk_size, scale: 1.0 / (r as f64).sqrt() }, &[q, lm, start]);
        let i = b.push_all(Select { k: c.chunk_topk, order: Order::Recent }, &[s]);
        let rule = if c.enable_softmax { Weighting::Softmax } else { Weighting::StickBreaking };
        let w = b.push(Weigh { rule }, &[s, i[0], i[1]]);
        b.output("indices", i[0]);
        b.output("weights", w);
        Ok((b.finish().map_err(wrap)?, w))
    }

    fn attend(&self) -> Result<(Graph, Value)> {
        let c = &self.config;
        let (heads, h, d, k) = (c.num_attention_heads, c.num_kv_heads, c.attention_head_dim(), c.chunk_topk);
        let mut b = Builder::new("attend", &["N", "L"]);
        let q = self.tokens(&mut b, "q", &[heads, d]);
        let keys = self.tokens(&mut b, "k", &[h, d]);
        let v = self.tokens(&mut b, "v", &[h, d]);
        let i = b.input("indices", Ty::i32(self.dim_list(&[h, k])));
        let n = b.input("count", Ty::i32(self.dim_list(&[h])));
        let w = self.tokens(&mut b, "w", &[h, k]);
        let off_by_one = if c.enable_softmax1 { 1.0 } else { 0.0 };
        let attend = Attend { chunk: c.chunk_size, scale: 1.0 / (d as f64).sqrt(), off_by_one };
        let o = b.push(attend, &[q, keys, v, i, n]);
        let y = b.push(Aggregate {}, &[o, w]);
        b.output("y", y);
        Ok((b.finish().map_err(wrap)?, y))
    }

    fn scan(&self) -> Result<(Graph, Value)> {
        let c = &self.config;
        let (m, p, g, r) = (c.n_ssm_heads(), c.head_dim, c.n_groups, c.state_size);
        let mut b = Builder::new("scan", &["N", "L"]);
        let x = self.tokens(&mut b, "x", &[m, p]);
        let dt = self.tokens(&mut b, "dt", &[m]);
        let a = b.input("a", Ty::f32([m]));
        let bs = self.tokens(&mut b, "b", &[g, r]);
        let cs = self.tokens(&mut b, "c", &[g, r]);
        let d = b.input("d", Ty::f32([m]));
        let h0 = b.constant(0.0, Ty::f32([Dim::sym("N"), Dim::int(m), Dim::int(p), Dim::int(r)]));
        let y = b.push(SelectiveScan { block: c.mamba_chunk_size }, &[x, dt, a, bs, cs, d, h0]);
        b.output("y", y);
        Ok((b.finish().map_err(wrap)?, y))
    }

    /// Forward and backward of the one op `fused` of a graph whose result is `y`.
    fn op(&self, (g, y): (Graph, Value), fused: &str) -> Result<Vec<Timed>> {
        let wrt: Vec<(String, Value)> =
            g.sources().filter(|(_, s)| s.ty.dtype.is_float()).map(|(id, s)| (s.name.clone(), id.result(0))).collect();
        // The forward's results stay outputs: fusion needs the forward beside its gradient.
        let mut b = Builder::extend(g.clone());
        let ty = b.ty(y).clone();
        let dy = b.input("dy", ty);
        let loss = b.mul(y, dy);
        let loss = b.sum_all(loss);
        let values: Vec<Value> = wrt.iter().map(|w| w.1).collect();
        let (back, grads) = gradients(b.finish().map_err(wrap)?, loss, &values).map_err(wrap)?;
        let mut b = Builder::extend(back);
        wrt.iter().zip(grads).for_each(|((name, _), d)| b.output(&format!("grad.{name}"), d));
        let back = b.finish().map_err(wrap)?;
        let gradient = format!("{fused}_grad");
        Ok(vec![self.op_alone(&g, "forward", fused)?, self.op_alone(&back, "backward", &gradient)?])
    }

    /// Only the steps `op` of a program count.
    fn op_alone(&self, g: &Graph, direction: &str, op: &str) -> Result<Timed> {
        let mut e = Executor::new(lower(&optimise(g, &Options::default())), self.pool.clone());
        let plan = e.plan(&self.dims).map_err(wrap)?;
        self.fits(&plan)?;
        let mut inputs = vec![];
        for s in &e.program().sources {
            inputs.push((s.name.clone(), self.filled(&s.name, &s.ty)?));
        }
        let views: Vec<_> = inputs.iter().map(|(n, t)| (n.as_str(), t.view())).collect();
        let (mut store, mut seconds, mut steps) = (Store::default(), vec![], StepTimes::new());
        let wanted: Vec<bool> = e.program().steps.iter().map(|s| s.op.mnemonic() == op).collect();
        if !wanted.contains(&true) {
            return Err(miette!("BUG: the program of {} holds no {op}", g.name));
        }
        for run in 0..WARM_UP + self.a.runs {
            let mut times = StepTimes::new();
            e.run_timed(&self.dims, &views, &mut store, Some(&mut times)).map_err(wrap)?;
            if run >= WARM_UP {
                seconds.push(times.iter().zip(&wanted).filter(|(_, w)| **w).map(|(t, _)| t.as_secs_f64()).sum());
                steps.resize(times.len(), Default::default());
                steps.iter_mut().zip(&times).for_each(|(s, t)| *s += *t);
            }
        }
        seconds.sort_by(f64::total_cmp);
        let mut t = self.timed(&format!("{} {direction}", g.name), e.program().clone(), plan, seconds, steps)?;
        t.cost = t.costs.iter().zip(&wanted).filter(|(_, w)| **w).map(|(c, _)| *c).sum();
        Ok(t)
    }

    /// A plausible value for an input of one of the op programs.
    fn filled(&self, name: &str, ty: &Ty) -> Result<Tensor> {
        let ty = ty.bind(&self.dims).map_err(wrap)?;
        let mut r = rng::stream(0, "bench", &name.bytes().map(u64::from).collect::<Vec<_>>());
        let n = ty.elements();
        if ty.dtype == DType::I32 {
            let (chunk, heads) = (self.config.chunk_size, self.config.num_kv_heads);
            let k = self.config.chunk_topk;
            let visible = |row: usize| row / heads % self.a.len / chunk;
            if name == "count" {
                return Ok(Tensor::i32(&ty.shape, (0..n).map(|row| visible(row).min(k) as i32).collect()));
            }
            // Every token chooses among all the chunks it sees: the hardest case for caches.
            let mut indices = vec![0; n];
            for (row, slots) in indices.chunks_exact_mut(k).enumerate() {
                let mut chosen = sample(&mut r, visible(row), visible(row).min(k)).into_vec();
                chosen.sort_by(|a, b| b.cmp(a));
                slots.iter_mut().zip(chosen).for_each(|(s, c)| *s = c as i32);
            }
            return Ok(Tensor::i32(&ty.shape, indices));
        }
        let (low, high) = match name {
            "dt" => (1e-3, 0.1),
            "a" => (-8.0, -1.0),
            "w" => (0.0, 0.2),
            _ => (-1.0, 1.0),
        };
        Ok(Tensor::f32(&ty.shape, (0..n).map(|_| r.random_range(low..high)).collect()))
    }

    fn tokens_per_s(&self, r: &Timed) -> f64 {
        (self.a.batch * self.a.len) as f64 / r.median()
    }

    fn json(&self, r: &Timed, rates: Rates, rss: usize) -> Json {
        let t = r.median();
        json!({
            "bench": r.name, "preset": self.a.preset, "len": self.a.len, "batch": self.a.batch,
            "recompute": self.a.memory.recompute, "memory_limit": self.a.memory.memory_limit, "threads": self.pool.current_num_threads(), "runs": r.seconds.len(),
            "tokens_per_s": self.tokens_per_s(r),
            "seconds": t, "seconds_min": r.seconds[0], "seconds_max": r.seconds[r.seconds.len() - 1],
            "flops": r.cost.flops, "bytes": r.cost.bytes,
            "peak_bytes": r.plan.peak(), "arena_bytes": r.plan.arena, "persistent_bytes": r.plan.persistent,
            "peak_rss_bytes": rss,
            "gflop_per_s": r.cost.flops / t / 1e9, "gb_per_s": r.cost.bytes / t / 1e9,
            "machine_gemm_gflop_per_s": rates.gemm / 1e9, "machine_copy_gb_per_s": rates.copy / 1e9,
            "gemm_fraction": r.cost.flops / t / rates.gemm, "copy_fraction": r.cost.bytes / t / rates.copy,
        })
    }

    fn print(&self, r: &Timed, rates: Rates, rss: usize) {
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
            show::plural(self.pool.current_num_threads(), "thread")
        );
        println!("  speed     {} tokens/s", show::count(self.tokens_per_s(r) as u64));
        println!(
            "  time      {} (median of {}; {} to {})",
            show::seconds(t),
            show::plural(r.seconds.len(), "run"),
            show::seconds(r.seconds[0]),
            show::seconds(r.seconds[r.seconds.len() - 1])
        );
        print_work(r.cost.flops, t, rates.gemm);
        println!(
            "  traffic   {}: {}, {} of this machine's large copies ({})",
            show::si(r.cost.bytes, "B"),
            show::si(r.cost.bytes / t, "B/s"),
            show::share(r.cost.bytes / t, rates.copy),
            show::si(rates.copy, "B/s")
        );
        println!(
            "  memory    {} planned ({} of activations), {} resident at its peak",
            show::bytes(r.plan.peak()),
            show::bytes(r.plan.arena),
            show::bytes(rss)
        );
    }
}

/// The line of a report on FLOPs: how many, how fast, beside the rate of large products.
fn print_work(flops: f64, seconds: f64, gemm: f64) {
    println!(
        "  work      {}: {}, {} of this machine's large products ({})",
        show::si(flops, "FLOP"),
        show::si(flops / seconds, "FLOP/s"),
        show::share(flops / seconds, gemm),
        show::si(gemm, "FLOP/s")
    );
}

/// Prints the time per kind of op, longest first.
fn profile(name: &str, sums: Kinds, as_json: bool) {
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
                    "gflop_per_s": l.cost.flops / l.seconds / 1e9, "gb_per_s": l.cost.bytes / l.seconds / 1e9,
                })
            );
        }
        return;
    }
    println!();
    let mut table = Table::new(2, &["op", "phase", "steps", "time", "share", "GFLOP/s", "GB/s"]);
    for ((op, phase), l) in &lines {
        let rate = |work: f64| if work > 0.0 { show::digits(work / l.seconds / 1e9) } else { "-".into() };
        table.row([
            op.to_string(),
            phase.to_string(),
            l.steps.to_string(),
            format!("{:.2} ms", l.seconds * 1e3),
            show::share(l.seconds, total),
            rate(l.cost.flops),
            rate(l.cost.bytes),
        ]);
    }
    let steps = lines.iter().map(|l| l.1.steps).sum::<usize>().to_string();
    table.row(["all".into(), String::new(), steps, format!("{:.2} ms", total * 1e3), "100 %".into()]);
    table.print();
}
