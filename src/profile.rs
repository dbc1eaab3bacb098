//! `--profile FILE`: the first runs of a program as a trace for Perfetto.

use crate::error::Result;
use miette::{Report, miette};
use rambac_codegen::Program;
use rambac_ir::{Bindings, Cost};
use rambac_runtime::executor::StepTimes;
use rambac_runtime::trace::{CPU_RUNS, CPU_STEPS, Trace};
use serde_json::{Map, Value as Json, json};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A trace that ends by itself after some runs, so that a long training does not fill the disk.
pub struct Profile {
    /// `None` when it has ended.
    trace: Option<Trace>,
    path: PathBuf,
    left: u64,
}

impl Profile {
    /// A new trace of `runs` runs.
    ///
    /// # Errors
    /// A file that can't be written.
    pub fn create(path: &Path, runs: u64) -> Result<Self> {
        let trace = Trace::create(path).map_err(|e| fail(path, e))?;
        Ok(Self { trace: Some(trace), path: path.into(), left: runs })
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
        let mut costs = p.costs(dims).map_err(crate::error::wrap)?;
        let often = batches as f64;
        costs.iter_mut().for_each(|c| *c = Cost { flops: c.flops * often, bytes: c.bytes * often });
        // What is told after it ended took at least as long as its steps.
        let steps: f64 = times.iter().map(|t| t.as_secs_f64()).sum();
        let (start, seconds) = (trace.at(began), began.elapsed().as_secs_f64().max(steps));
        let all: Cost = costs.iter().copied().sum();
        let mut args: Map<String, Json> = numbers.iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
        args.insert("dims".into(), json!(dims.to_string()));
        args.insert("flops".into(), json!(all.flops));
        args.insert("bytes".into(), json!(all.bytes));
        let write = || -> std::io::Result<()> {
            trace.slice(CPU_RUNS, name, "run", start, seconds, args)?;
            trace.program(CPU_STEPS, p, &costs, start, times)?;
            numbers.iter().try_for_each(|(k, v)| trace.counter(CPU_RUNS.device, k, start + seconds, *v))
        };
        write().map_err(|e| fail(&self.path, e))?;
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

fn fail(path: &Path, e: std::io::Error) -> Report {
    miette!("--profile {}: {e}", path.display())
}
