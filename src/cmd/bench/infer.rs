//! `rambac bench prefill` and `decode`: a session as `generate` runs it.
//!
//! Decoding one token reads every weight once, so its limit is the bytes of the weights over the rate at which this
//! machine reads an array of that size; prefill's is its FLOPs over the rate of large products.  Both rates are measured
//! in the same run.

use super::{Kinds, Limits, WARM_UP, add_steps, device, median, print_work, profile};
use crate::cli::{Bench, PrecisionArg, Weights, Work};
use crate::device::{Inferring, On};
use crate::error::{Result, wrap};
use crate::machine::{self, ReadRate};
use crate::model;
use crate::show;
use crate::work::Sums;
use miette::miette;
use rambac_codegen::Program;
use rambac_cpu::team;
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::{Bindings, Cost, Ty};
use rambac_models::Config;
use rambac_models::data::rng;
use rambac_runtime::executor::StepTimes;
use rambac_runtime::{Session, SessionGraphs, SessionOptions};
use rand::Rng;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tokens that are fed at once in prefill.
const SEGMENT: usize = 4096;
/// Least tokens of a timed run of decoding.
const TOKENS: usize = 32;

/// Runs the verb.
pub fn run(a: &Bench, config: &Config, weights: Option<&Path>, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    let on = a.place.device;
    let precision = if a.weights == Weights::Bf16 { PrecisionArg::Bf16 } else { PrecisionArg::F32 };
    let limits = on.gpu().then(|| device::limits(on, precision)).transpose()?;
    // Runs of decoding go on behind each other, and one more is watched.
    let more = if a.what == Work::Decode { (a.runs + 2).saturating_mul(tokens(config)) } else { 0 };
    let room = a.len.saturating_add(more);
    let graphs = model::session_graphs(config, room)?;
    if on == On::Cpu {
        fits(a, config, &graphs)?;
    }
    let options = SessionOptions { sequences: a.batch, passes: a.weights.options(), ..SessionOptions::default() };
    let params = model::parameters_for(&graphs, &options.passes, config, weights)?;
    let how = Inferring { on, memory: None, segment: SEGMENT, options: &options };
    let mut session = crate::device::session(&how, &graphs, params, &pool)?;
    let programs = match on.gpu() {
        true => crate::device::gpu_programs(&graphs, &options.passes)
            .named()
            .into_iter()
            // Another way to run the upper half.
            .filter(|p| p.0 != "upper_flash")
            .map(|p| p.1.clone())
            .collect(),
        false => session.parts().into_iter().map(|p| p.program().clone()).collect(),
    };
    let rng = rng::stream(0, "bench", &[]);
    let mut b = Infer { a, config, session, programs, rng, logits: vec![] };
    let r = if a.what == Work::Decode { b.decode()? } else { b.prefill()? };
    // Before this machine's rates are measured, which takes memory of its own.
    let rss = machine::peak_rss();
    let (limits, read) = match limits {
        Some(l) => {
            let read = ReadRate { median: l.copy, best: l.copy };
            (l, read)
        }
        None => (Limits::of(machine::rates(&pool)), machine::read_rate(&pool, r.cost.bytes as usize)),
    };
    b.print(&r, &limits, read, rss);
    if a.profile.is_some() {
        profile(r.name, r.sums, &limits, a.json);
    }
    Ok(ExitCode::SUCCESS)
}

/// Tokens of a timed run of decoding: whole chunks, so that every run completes as many of them.
fn tokens(config: &Config) -> usize {
    TOKENS.next_multiple_of(if config.is_plain() { 1 } else { config.chunk_size })
}

/// Refuses what no session can hold, before it is allocated.
fn fits(a: &Bench, config: &Config, graphs: &SessionGraphs) -> Result<()> {
    if i32::try_from(a.len).is_err() {
        return Err(miette!("--len {}: a sequence of more than {} tokens cannot be counted", a.len, i32::MAX));
    }
    let dims = Bindings::new([("N", a.batch)]);
    let sources = graphs.named().into_iter().flat_map(|(_, g)| g.sources()).map(|(_, s)| s);
    // Parts share their states by name.
    let states: BTreeMap<&str, &Ty> =
        sources.filter(|s| s.kind == SourceKind::State).map(|s| (s.name.as_str(), &s.ty)).collect();
    let mut bytes = usize::try_from(config.n_parameters()).unwrap_or(usize::MAX).saturating_mul(4);
    for ty in states.values() {
        bytes = bytes.saturating_add(ty.bind(&dims).map_err(wrap)?.bytes());
    }
    machine::room(
        format!("{} with {} sequences", a.preset, show::count(a.batch as u64)),
        bytes,
        "use a smaller --batch",
    )
}

/// What was timed; everything for one token of every sequence (decode), or for all their texts (prefill).
struct Timed {
    name: &'static str,
    tokens: usize,
    /// Of every run, sorted.
    seconds: Vec<f64>,
    cost: Cost,
    /// Activations and chunk memory at the largest, weights and states.
    arena: usize,
    memory: usize,
    sums: Kinds,
}

struct Infer<'a> {
    a: &'a Bench,
    config: &'a Config,
    session: Session,
    /// Its parts, in the order in which a token meets them.
    programs: Vec<Program>,
    rng: rand_chacha::ChaCha8Rng,
    logits: Vec<f32>,
}

impl Infer<'_> {
    fn ids(&mut self, n: usize) -> Vec<i32> {
        (0..n).map(|_| self.rng.random_range(0..self.config.vocab_size) as i32).collect()
    }

    /// Reads a text into every sequence; the last tokens' logits.
    fn read(&mut self, ids: &[i32]) -> Result<Vec<f32>> {
        let mut last = vec![];
        for seq in 0..self.a.batch {
            let mut hidden = vec![];
            for segment in ids.chunks(SEGMENT) {
                hidden = self.session.read(seq, segment).map_err(wrap)?;
            }
            last.extend_from_slice(&hidden);
        }
        self.session.logits(&last).map_err(wrap)
    }

    /// One more token in every sequence; the logits.
    fn step(&mut self, ids: &[i32]) -> Result<&[f32]> {
        self.session.decode_into(ids, &mut self.logits).map_err(wrap)?;
        Ok(&self.logits)
    }

    fn record(&mut self) {
        self.session.parts().into_iter().for_each(|p| p.record());
    }

    fn decode(&mut self) -> Result<Timed> {
        let context = self.ids(self.a.len);
        self.read(&context)?;
        let s = if self.config.is_plain() { 1 } else { self.config.chunk_size };
        let tokens = tokens(self.config);
        let mut seconds = vec![];
        let pool = self.session.pool().clone();
        // As `generate` does.
        team::awake(&pool, || {
            for run in 0..=self.a.runs {
                let n = self.a.batch;
                let ids = self.ids(tokens * n);
                if run == 1 {
                    self.record();
                }
                let t = Instant::now();
                for ids in ids.chunks(n) {
                    std::hint::black_box(self.step(ids)?);
                }
                if run > 0 {
                    seconds.push(t.elapsed().as_secs_f64() / tokens as f64);
                }
            }
            Result::Ok(())
        })?;
        seconds.sort_by(f64::total_cmp);
        let n = self.a.batch;
        let one = |b: &mut Self| {
            let ids = b.ids(n);
            b.step(&ids).map(drop)
        };
        let done = self.watched(tokens, one)?.unwrap_or((tokens * self.a.runs) as f64);
        let chunks = self.session.chunks(0).map_or(0, |c| c.chunks());
        let (mut cost, mut sums, mut arena) = (Cost::default(), Sums::new(), vec![]);
        let recorded = self.recorded();
        for (p, times) in self.programs.iter().zip(&recorded) {
            let dims = match p.name.as_str() {
                "chunks" => Bindings::new([("N", 1), ("B", 1)]),
                "head" => Bindings::new([("N", 1), ("L", n)]),
                _ => Bindings::new([("N", n), ("L", 1), ("C", chunks)]),
            };
            // A sequence makes a chunk once in `s` tokens.
            let often = if p.name == "chunks" { n as f64 / s as f64 } else { 1.0 };
            let costs: Vec<Cost> = p.costs(&dims).map_err(wrap)?.into_iter().map(|c| scaled(c, often)).collect();
            add_steps(&mut sums, p, times, &costs, done);
            cost.flops += costs.iter().map(|c| c.flops).sum::<f64>();
            cost.bytes += weight_bytes(p, &dims)? * often;
            arena.push((p.name.clone(), dims));
        }
        let arena = self.arena(&arena)?;
        Ok(Timed { name: "decode", tokens: n, seconds, cost, arena, memory: self.memory(), sums })
    }

    fn prefill(&mut self) -> Result<Timed> {
        let (n, ids) = (self.a.batch, self.ids(self.a.len));
        let mut seconds = vec![];
        for run in 0..WARM_UP + self.a.runs {
            self.session.reset().map_err(wrap)?;
            if run == WARM_UP {
                self.record();
            }
            let t = Instant::now();
            std::hint::black_box(self.read(&ids)?);
            if run >= WARM_UP {
                seconds.push(t.elapsed().as_secs_f64());
            }
        }
        seconds.sort_by(f64::total_cmp);
        let s = if self.config.is_plain() { usize::MAX } else { self.config.chunk_size };
        let (mut cost, mut sums, mut arena) = (Cost::default(), Sums::new(), vec![]);
        let one = |b: &mut Self| {
            b.session.reset().map_err(wrap)?;
            b.read(&ids).map(drop)
        };
        let runs = self.watched(1, one)?.unwrap_or(self.a.runs as f64);
        let recorded = self.recorded();
        for (p, times) in self.programs.iter().zip(&recorded) {
            let mut whole = vec![Cost::default(); p.steps.len()];
            let head = p.name == "head";
            let starts: Vec<usize> = if head { vec![ids.len() - 1] } else { (0..ids.len()).step_by(SEGMENT).collect() };
            for start in starts {
                let end = (start + SEGMENT).min(ids.len());
                let (l, done, before) = (if head { n } else { end - start }, end / s, start / s);
                let dims = Bindings::new([("N", 1), ("L", l), ("B", done - before), ("C", done)]);
                if p.name == "chunks" && done == before {
                    continue;
                }
                let costs = p.costs(&dims).map_err(wrap)?;
                // Texts are read one after another, their last tokens' logits made together.
                let often = if head { 1.0 } else { n as f64 };
                whole.iter_mut().zip(costs).for_each(|(w, c)| *w = *w + scaled(c, often));
                arena.push((p.name.clone(), dims));
            }
            cost = cost + whole.iter().copied().sum();
            add_steps(&mut sums, p, times, &whole, runs);
        }
        let arena = self.arena(&arena)?;
        Ok(Timed { name: "prefill", tokens: n * ids.len(), seconds, cost, arena, memory: self.memory(), sums })
    }

    /// On a device, if the times of ops are asked for: runs apart from those that were timed, op by op; how many.
    fn watched(&mut self, runs: usize, one: impl Fn(&mut Self) -> Result<()>) -> Result<Option<f64>> {
        match self.session.device().filter(|_| self.a.profile.is_some()) {
            Some((machine, _)) => machine.watch(usize::MAX).map_err(wrap)?,
            None => return Ok(None),
        }
        (0..runs).try_for_each(|_| one(self))?;
        Ok(Some(runs as f64))
    }

    /// What the parts took since [`record`](Self::record), or in the runs that were [`watched`](Self::watched).
    fn recorded(&mut self) -> Vec<StepTimes> {
        let Some((machine, _)) = self.session.device() else {
            return self.session.parts().into_iter().map(|p| p.recorded().to_vec()).collect();
        };
        let mut all = vec![StepTimes::new(); self.programs.len()];
        for t in machine.watched() {
            let name = &machine.program(t.program).program.name;
            if let Some(i) = self.programs.iter().position(|p| p.name == *name) {
                all[i].resize(t.steps.len(), Duration::ZERO);
                all[i].iter_mut().zip(&t.steps).for_each(|(sum, s)| *sum += Duration::from_secs_f64(s.max(0.0)));
            }
        }
        all
    }

    /// Bytes of activations: of every part the most at these sizes; a device has one arena for all.
    fn arena(&mut self, sizes: &[(String, Bindings)]) -> Result<usize> {
        let (mut sum, gpu) = (0, self.a.place.device.gpu());
        for (i, p) in self.programs.iter().enumerate().filter(|_| !gpu) {
            let mut most = 0;
            for (_, dims) in sizes.iter().filter(|(name, _)| *name == p.name) {
                most = most.max(self.session.parts()[i].plan(dims).map_err(wrap)?.arena);
            }
            sum += most;
        }
        Ok(sum)
    }

    /// Bytes of the chunk memory.
    fn memory(&self) -> usize {
        (0..self.a.batch).filter_map(|seq| self.session.chunks(seq)).map(|c| c.bytes()).sum()
    }

    fn print(&self, r: &Timed, limits: &Limits, read: ReadRate, rss: usize) {
        let (a, t) = (self.a, median(&r.seconds));
        let persistent = self.session.bytes();
        let peak = persistent + r.arena + r.memory;
        let (tokens_per_s, least, most) = (r.tokens as f64 / t, r.seconds[0], r.seconds[r.seconds.len() - 1]);
        let (threads, decode) = (self.session.pool().current_num_threads(), r.name == "decode");
        let weights = if a.weights == Weights::Bf16 { "bf16" } else { "f32" };
        if a.json {
            let line = json!({
                "bench": r.name, "preset": a.preset, "len": a.len, "batch": a.batch, "weights": weights, "threads": threads,
                "device": a.place.device.to_string(), "on": limits.of,
                "runs": r.seconds.len(), "tokens_per_s": tokens_per_s,
                "seconds": t, "seconds_min": least, "seconds_max": most,
                "flops": r.cost.flops, "bytes": r.cost.bytes,
                "peak_bytes": peak, "arena_bytes": r.arena, "persistent_bytes": persistent,
                "memory_bytes": r.memory, "peak_rss_bytes": rss,
                "gflop_per_s": r.cost.flops / t / 1e9, "gb_per_s": r.cost.bytes / t / 1e9,
                "machine_gemm_gflop_per_s": limits.gemm / 1e9, "machine_read_gb_per_s": read.median / 1e9,
                "machine_read_best_gb_per_s": read.best / 1e9,
                "gemm_fraction": r.cost.flops / t / limits.gemm, "read_fraction": r.cost.bytes / t / read.median,
            });
            println!("{line}");
            return;
        }
        println!(
            "{} of {} ({} parameters, {weights}) {} {} x {}, {}",
            r.name,
            a.preset,
            show::si(self.config.n_parameters() as f64, ""),
            if decode { "after" } else { "of" },
            a.batch,
            show::plural(a.len, "token"),
            if a.place.device.gpu() { limits.of.clone() } else { show::plural(threads, "thread") }
        );
        println!("  speed     {} tokens/s", show::rate(tokens_per_s));
        println!(
            "  time      {}{} (median of {}; {} to {})",
            show::seconds(t),
            if decode { " a token" } else { "" },
            show::plural(r.seconds.len(), "run"),
            show::seconds(least),
            show::seconds(most)
        );
        print_work(r.cost.flops, t, limits);
        println!(
            "  {}   {}: {}, {} of {} {}",
            if decode { "weights" } else { "traffic" },
            show::si(r.cost.bytes, "B"),
            show::si(r.cost.bytes / t, "B/s"),
            show::share(r.cost.bytes / t, read.median),
            limits.whose(),
            match a.place.device.gpu() {
                true => format!("large copies ({})", show::si(read.median, "B/s")),
                false => format!(
                    "reads of as much ({}, the median; {} at best)",
                    show::si(read.median, "B/s"),
                    show::si(read.best, "B/s")
                ),
            }
        );
        println!(
            "  memory    {} planned ({} of weights and states, {} of activations, {} of chunks), {} resident at its peak",
            show::bytes(peak),
            show::bytes(persistent),
            show::bytes(r.arena),
            show::bytes(r.memory),
            show::bytes(rss)
        );
    }
}

fn scaled(c: Cost, by: f64) -> Cost {
    Cost { flops: c.flops * by, bytes: c.bytes * by }
}

/// Bytes of weights that one run of `p` reads: all of them, of a table that is only looked up in the rows looked up.
fn weight_bytes(p: &Program, dims: &Bindings) -> Result<f64> {
    let mut all = 0.0;
    for slot in p.sources.iter().filter(|s| s.kind == SourceKind::Param) {
        let mut whole = false;
        for step in &p.steps {
            for v in step.inputs.iter().filter(|v| v.buffer == slot.buffer) {
                match step.op {
                    Op::Embedding(_) => {
                        let rows = step.inputs[0].ty.bind(dims).map_err(wrap)?.elements();
                        let table = v.ty.bind(dims).map_err(wrap)?;
                        all += (rows * table.bytes() / table.shape[0].max(1)) as f64;
                    }
                    _ => whole = true,
                }
            }
        }
        if whole {
            all += slot.ty.bind(dims).map_err(wrap)?.bytes() as f64;
        }
    }
    Ok(all)
}
