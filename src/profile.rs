//! `--profile FILE`: the first runs of programs as a trace for Perfetto.

use crate::error::{Result, warn, wrap};
use crate::show;
use miette::{Report, miette};
use rambac_codegen::Program;
use rambac_codegen::cuda::GpuProgram;
use rambac_ir::{Bindings, Cost};
use rambac_runtime::Session;
use rambac_runtime::executor::StepTimes;
use rambac_runtime::gpu::{Machine, Rates, RunTimes};
use rambac_runtime::trace::{CPU_RUNS, CPU_STEPS, DEVICE_COPIES, DEVICE_RUNS, DEVICE_STEPS, Trace};
use serde_json::{Map, Value as Json, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Runs of a session's parts in a trace.
const PARTS: u64 = 512;

/// A trace that ends by itself after some runs, so that a long training does not fill the disk.
pub struct Profile {
    /// `None` when it has ended.
    trace: Option<Trace>,
    path: PathBuf,
    left: u64,
    /// Rates of the device whose runs are watched, where it has a clock.
    rates: Option<Rates>,
}

impl Profile {
    /// A new trace of `runs` runs.
    ///
    /// # Errors
    /// A file that can't be written.
    pub fn create(path: &Path, runs: u64) -> Result<Self> {
        let trace = Trace::create(path).map_err(|e| fail(path, e))?;
        Ok(Self { trace: Some(trace), path: path.into(), left: runs, rates: None })
    }

    /// Where the times of a run's steps go; `None` once the trace has ended.
    pub fn times(this: &Option<Self>) -> Option<StepTimes> {
        this.as_ref().filter(|p| p.left > 0).map(|_| StepTimes::new())
    }

    /// Writes a run of `p` at `dims` that began at `began` and has just ended, with `numbers` such as its loss.  `times` are
    /// those of as many runs as it had micro-batches.
    ///
    /// # Errors
    /// A full disk.
    pub fn run(
        &mut self,
        name: &str,
        p: &Program,
        dims: &Bindings,
        (began, batches): (Instant, usize),
        times: &StepTimes,
        numbers: &[(&str, f64)],
    ) -> Result<()> {
        let Some(trace) = self.trace.as_mut().filter(|_| self.left > 0) else { return Ok(()) };
        let mut costs = p.costs(dims).map_err(wrap)?;
        let often = batches as f64;
        costs.iter_mut().for_each(|c| *c = Cost { flops: c.flops * often, bytes: c.bytes * often });
        // What is told after it ended took at least as long as its steps.
        let steps: f64 = times.iter().map(|t| t.as_secs_f64()).sum();
        let (start, seconds) = (trace.at(began), began.elapsed().as_secs_f64().max(steps));
        let args = whole(dims, costs.iter().copied().sum(), numbers);
        let write = || -> std::io::Result<()> {
            trace.slice(CPU_RUNS, name, "run", start, seconds, args)?;
            trace.program(CPU_STEPS, p, &costs, start, times, &|_, _| {})?;
            numbers.iter().try_for_each(|(k, v)| trace.counter(CPU_RUNS.device, k, start + seconds, *v))
        };
        write().map_err(|e| fail(&self.path, e))?;
        self.count()
    }

    /// Measures a device and names its tracks.
    ///
    /// # Errors
    /// The device fails; a full disk.
    pub fn device(&mut self, m: &mut Machine) -> Result<()> {
        self.rates = m.rates().map_err(wrap)?;
        let clock = if self.rates.is_some() { "its own clock" } else { "the time that simulating it took" };
        let name = format!("{} ({clock})", m.device().name());
        let Some(trace) = &mut self.trace else { return Ok(()) };
        let tracks = [(DEVICE_RUNS, "runs"), (DEVICE_STEPS, "steps"), (DEVICE_COPIES, "copies")];
        let named = tracks.into_iter().try_for_each(|(t, queue)| trace.name(t, &name, queue));
        named.map_err(|e| fail(&self.path, e))?;
        match self.rates {
            Some(r) => eprintln!(
                "--profile: steps are started one by one, so runs take longer than without; limits are rates of this device, \
                 measured now: copies {}, products {} in bf16 and {} in f32",
                show::si(r.copy, "B/s"),
                show::si(r.bf16, "FLOP/s"),
                show::si(r.f32, "FLOP/s")
            ),
            None => {
                warn("--profile: the simulator has no clock: the trace shows how long it took to simulate each step")
            }
        }
        Ok(())
    }

    /// Writes a run on a device, with `numbers` such as its loss.
    ///
    /// # Errors
    /// A full disk.
    pub fn device_run(&mut self, name: &str, gpu: &GpuProgram, t: &RunTimes, numbers: &[(&str, f64)]) -> Result<()> {
        let Some(trace) = self.trace.as_mut().filter(|_| self.left > 0) else { return Ok(()) };
        let p = &gpu.program;
        let (costs, forms) = (p.costs(&t.dims).map_err(wrap)?, gpu.forms(&t.dims).map_err(wrap)?);
        let alive = gpu.plan(&t.dims).map_err(wrap)?.alive;
        let mut args = whole(&t.dims, costs.iter().copied().sum(), numbers);
        let floors = self.rates.map(|r| r.floors(p, &t.dims)).transpose().map_err(wrap)?;
        let floor = |i: usize| floors.as_ref().map(|f| f[i]);
        if let Some(f) = &floors {
            let sum: f64 = f.iter().map(|f| f.seconds()).sum();
            args.insert("floor_us".into(), json!(micros(sum)));
            args.insert("of_limit".into(), json!(ratio(sum, t.steps.iter().sum())));
        }
        args.insert("device_bytes".into(), json!(t.bytes));
        args.insert("host_ahead".into(), json!(t.ahead));
        let more = |i: usize, args: &mut Map<String, Json>| {
            args.insert("form".into(), json!(forms[i].name));
            if let Some(f) = floor(i) {
                args.insert("floor_us".into(), json!(micros(f.seconds())));
                args.insert("limited_by".into(), json!(f.limit()));
                args.insert("of_limit".into(), json!(ratio(f.seconds(), t.steps[i])));
            }
        };
        let times: Vec<Duration> = t.steps.iter().map(|s| Duration::from_secs_f64(s.max(0.0))).collect();
        let copy = |(bytes, seconds): (usize, f64)| {
            let mut args = Map::new();
            args.insert("bytes".into(), json!(bytes));
            args.insert("gb_per_s".into(), json!((ratio(bytes as f64, seconds) / 1e7).round() / 100.0));
            args
        };
        let write = || -> std::io::Result<()> {
            let start = trace.at(t.began);
            trace.slice(DEVICE_RUNS, name, "run", start, t.seconds(), args)?;
            trace.slice(DEVICE_COPIES, "inputs", "copy", start, t.inputs.1, copy(t.inputs))?;
            let mut at = start + t.inputs.1;
            if t.gathering > 0.0 {
                trace.slice(DEVICE_COPIES, "chosen chunks", "copy", at, t.gathering, Map::new())?;
                at += t.gathering;
            }
            let end = trace.program(DEVICE_STEPS, p, &costs, at, &times, &more)?;
            for (bytes, seconds) in alive.iter().zip(&t.steps) {
                trace.counter(DEVICE_RUNS.device, "activations alive (bytes)", at, *bytes as f64)?;
                at += seconds;
            }
            trace.counter(DEVICE_RUNS.device, "device memory (bytes)", end, t.bytes as f64)?;
            trace.slice(DEVICE_COPIES, "results", "copy", end, t.results.1, copy(t.results))?;
            numbers.iter().try_for_each(|(k, v)| trace.counter(DEVICE_RUNS.device, k, end, *v))
        };
        write().map_err(|e| fail(&self.path, e))?;
        self.count()
    }

    /// A trace of the next runs of a session's parts.
    ///
    /// # Errors
    /// As [`device`](Self::device); the session runs on this machine's cores.
    pub fn session(path: &Path, s: &mut Session) -> Result<Self> {
        let Some((machine, _)) = s.device() else {
            return Err(miette!(
                "--profile: traces of inference are of devices: add --device cuda:0; bench decode --profile times ops on the cpu"
            ));
        };
        let mut p = Self::create(path, PARTS)?;
        p.device(machine)?;
        machine.watch(PARTS as usize).map_err(wrap)?;
        Ok(p)
    }

    /// Writes what a session's parts did since the last call.
    ///
    /// # Errors
    /// A full disk.
    pub fn note(&mut self, s: &mut Session) -> Result<()> {
        let Some((machine, _)) = s.device() else { return Ok(()) };
        for t in &machine.watched() {
            let gpu = machine.program(t.program).clone();
            self.device_run(&gpu.program.name, &gpu, t, &[])?;
        }
        Ok(())
    }

    fn count(&mut self) -> Result<()> {
        self.left -= 1;
        if self.left == 0 { self.finish() } else { Ok(()) }
    }

    /// Ends the file, if it has not ended.
    ///
    /// # Errors
    /// A full disk.
    pub fn finish(&mut self) -> Result<()> {
        self.trace.take().map_or(Ok(()), Trace::finish).map_err(|e| fail(&self.path, e))
    }
}

/// What is told of a whole run.
fn whole(dims: &Bindings, all: Cost, numbers: &[(&str, f64)]) -> Map<String, Json> {
    let mut args: Map<String, Json> = numbers.iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
    args.insert("dims".into(), json!(dims.to_string()));
    args.insert("flops".into(), json!(all.flops));
    args.insert("bytes".into(), json!(all.bytes));
    args
}

fn micros(seconds: f64) -> f64 {
    (seconds * 1e9).round() / 1e3
}

/// `a / b` to three digits behind the point, 0 of nothing.
fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { (a / b * 1e3).round() / 1e3 } else { 0.0 }
}

fn fail(path: &Path, e: std::io::Error) -> Report {
    miette!("--profile {}: {e}", path.display())
}
