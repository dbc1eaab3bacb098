//! Traces in the form that Perfetto and chrome://tracing read: slices on tracks, written as they happen.
//!
//! One file is one JSON array of events (Trace Event Format); a file that was cut short still opens.  Times are seconds since
//! the trace began.  A device is a process of the trace, and each of its queues a track.  Whoever runs programs can write
//! here: [`Trace::program`] takes a program's steps with their measured times.

use rambac_codegen::Program;
use rambac_ir::Cost;
use serde_json::{Map, Value as Json, json};
use std::fs::File;
use std::io::{BufWriter, Result, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Where slices lie: a process and a thread of it, as the form calls them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Track {
    pub device: u32,
    pub queue: u32,
}

/// The CPU's steps.
pub const CPU_STEPS: Track = Track { device: 1, queue: 2 };
/// Whole runs on the CPU, over their steps.
pub const CPU_RUNS: Track = Track { device: 1, queue: 1 };

/// A device's steps, one after another.
pub const DEVICE_STEPS: Track = Track { device: 2, queue: 2 };
/// Whole runs on a device, over their steps.
pub const DEVICE_RUNS: Track = Track { device: 2, queue: 1 };
/// Copies to a device and back.
pub const DEVICE_COPIES: Track = Track { device: 2, queue: 3 };

/// A trace being written.
pub struct Trace {
    out: BufWriter<File>,
    began: Instant,
    first: bool,
}

impl Trace {
    /// A new file that begins now, with the tracks of the CPU.
    ///
    /// # Errors
    /// A file that can't be written.
    pub fn create(path: &Path) -> Result<Self> {
        let mut t = Self { out: BufWriter::new(File::create(path)?), began: Instant::now(), first: true };
        t.out.write_all(b"[")?;
        t.name(CPU_RUNS, "CPU", "runs")?;
        t.name(CPU_STEPS, "CPU", "steps")?;
        Ok(t)
    }

    /// Seconds since the trace began.
    pub fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// The time of `t`, 0 if it was before the trace.
    pub fn at(&self, t: Instant) -> f64 {
        t.saturating_duration_since(self.began).as_secs_f64()
    }

    fn event(&mut self, e: Json) -> Result<()> {
        let between = if std::mem::take(&mut self.first) { "\n" } else { ",\n" };
        write!(self.out, "{between}{e}")
    }

    /// Names a track and its device.
    ///
    /// # Errors
    /// A full disk.
    pub fn name(&mut self, t: Track, device: &str, queue: &str) -> Result<()> {
        self.event(json!({ "ph": "M", "name": "process_name", "pid": t.device, "args": { "name": device } }))?;
        self.event(
            json!({ "ph": "M", "name": "thread_name", "pid": t.device, "tid": t.queue, "args": { "name": queue } }),
        )
    }

    /// Something that took from `start` for `seconds`; `args` are shown when it is clicked.
    ///
    /// # Errors
    /// A full disk.
    pub fn slice(
        &mut self,
        t: Track,
        name: &str,
        category: &str,
        start: f64,
        seconds: f64,
        args: Map<String, Json>,
    ) -> Result<()> {
        // Microseconds, to the nanosecond.
        let us = |s: f64| (s * 1e9).round() / 1e3;
        self.event(json!({
            "ph": "X", "name": name, "cat": category, "pid": t.device, "tid": t.queue, "ts": us(start), "dur": us(seconds),
            "args": args,
        }))
    }

    /// A number over time, such as a loss.
    ///
    /// # Errors
    /// A full disk.
    pub fn counter(&mut self, device: u32, name: &str, at: f64, value: f64) -> Result<()> {
        let ts = (at * 1e9).round() / 1e3;
        self.event(json!({ "ph": "C", "name": name, "pid": device, "ts": ts, "args": { "value": value } }))
    }

    /// The steps of a run of `p` that began at `start`, with their measured times and predicted work: laid end to end, for
    /// steps run one after another; `more` adds to what is told of a step.  Returns when the last one ended.
    ///
    /// # Errors
    /// A full disk.
    pub fn program(
        &mut self,
        t: Track,
        p: &Program,
        costs: &[Cost],
        start: f64,
        times: &[Duration],
        more: &dyn Fn(usize, &mut Map<String, Json>),
    ) -> Result<f64> {
        let mut at = start;
        for (i, ((step, cost), time)) in p.steps.iter().zip(costs).zip(times).enumerate() {
            let (seconds, node) = (time.as_secs_f64(), p.graph.node(step.node));
            let mut args = Map::new();
            let result = step.outputs.first().map(|v| v.ty.to_string());
            args.insert("step".into(), json!(i));
            args.insert("node".into(), json!(p.graph.label(step.node.result(0))));
            args.insert("scope".into(), json!(node.scope.as_deref()));
            args.insert("result".into(), json!(result));
            args.insert("flops".into(), json!(cost.flops));
            args.insert("bytes".into(), json!(cost.bytes));
            if seconds > 0.0 {
                args.insert("gflop_per_s".into(), json!((cost.flops / seconds / 1e7).round() / 100.0));
                args.insert("gb_per_s".into(), json!((cost.bytes / seconds / 1e7).round() / 100.0));
            }
            more(i, &mut args);
            let phase = match node.scope.as_deref() {
                Some(s) if s == "grad" || s.starts_with("grad.") => "backward",
                Some(s) if s == "optim" || s.starts_with("optim.") => "update",
                _ => "forward",
            };
            self.slice(t, step.op.mnemonic(), phase, at, seconds, args)?;
            at += seconds;
        }
        Ok(at)
    }

    /// Ends the file.
    ///
    /// # Errors
    /// A full disk.
    pub fn finish(mut self) -> Result<()> {
        self.out.write_all(b"\n]\n")?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rambac_ir::{Bindings, Builder, Ty};

    #[test]
    fn steps_end_to_end() {
        let mut b = Builder::new("g", &["N"]);
        let n = rambac_ir::Dim::sym("N");
        let x = b.input("x", Ty::f32([n.clone(), rambac_ir::Dim::int(4)]));
        let w = b.param("w", Ty::f32([3usize, 4]));
        let y = b.scoped("grad.layers.1", |b| b.linear(x, w));
        b.output("y", y);
        let p = rambac_codegen::lower(&b.finish().unwrap());
        let costs = p.costs(&Bindings::new([("N", 2)])).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.json");
        let mut t = Trace::create(&path).unwrap();
        let times = vec![Duration::from_micros(1500); p.steps.len()];
        let end = t.program(CPU_STEPS, &p, &costs, 0.25, &times, &|_, _| {}).unwrap();
        assert!((end - 0.25 - 0.0015 * p.steps.len() as f64).abs() < 1e-12);
        t.counter(1, "loss", end, 2.5).unwrap();
        t.finish().unwrap();
        let all: Vec<Json> = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let slices: Vec<&Json> = all.iter().filter(|e| e["ph"] == "X").collect();
        assert_eq!(slices.len(), p.steps.len());
        let product = slices.iter().find(|e| e["name"] == "matmul").unwrap();
        assert_eq!((product["cat"].as_str(), product["dur"].as_f64()), (Some("backward"), Some(1500.0)));
        assert_eq!(product["args"]["flops"].as_f64(), Some(2.0 * 2.0 * 3.0 * 4.0));
        assert!(slices.windows(2).all(|w| w[0]["ts"].as_f64() < w[1]["ts"].as_f64()));
        assert!(all.iter().any(|e| e["ph"] == "C") && all.iter().filter(|e| e["ph"] == "M").count() == 4);
    }
}
