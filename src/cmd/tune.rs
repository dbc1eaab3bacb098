//! `rambac tune`: measures the ways in which a model's steps can run on a device, and keeps what was fastest.

use crate::cli::Tune;
use crate::cmd::explain::model_step;
use crate::device::On;
use crate::error::{Result, warn, wrap};
use crate::model::{self, Named};
use crate::show::{self, Table};
use miette::miette;
use rambac_codegen::cuda::choices::{Choice, Verdict};
use rambac_codegen::cuda::tune::{Measure, TuneError, tune};
use rambac_codegen::cuda::{Cache, Target, emit};
use rambac_codegen::nvrtc::Nvrtc;
use rambac_codegen::{Kernels, lower_for};
use rambac_ir::{Bindings, Graph};
use rambac_models::stack::{self, Carry};
use rambac_passes::train_step::AdamW;
use rambac_passes::{Options, optimise};
use rambac_runtime::gpu::{Bytes, Device, Machine, Measurer, Placement, ProgramId, Timed, archs};
use serde_json::json;
use std::collections::HashSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// Runs that are timed together, and how often that is done; the shortest counts.
const RUNS: [usize; 2] = [10, 3];

/// Runs the verb.
pub fn run(a: &Tune, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    pool.install(|| measure(a))
}

fn graph(a: &Tune) -> Result<Graph> {
    Ok(match model::resolve(&a.model)? {
        Named::Model { config, .. } if a.train => model_step(&config, &AdamW::default())?,
        Named::Model { config, .. } => stack::loss(&config, Carry::Zero, false).map_err(wrap)?,
        Named::Ir { graph, .. } => graph,
    })
}

/// Operands and results stay on the device: what is timed is launches and a copy of the results.
fn clock(
    m: &mut Machine<Box<dyn Device>>,
    id: ProgramId,
    dims: &Bindings,
    inputs: &[(&str, &Bytes)],
) -> std::result::Result<Timed, String> {
    let text = |e: rambac_runtime::gpu::GpuError| e.to_string();
    let out = m.run(id, dims, inputs).map_err(text)?;
    inputs.iter().try_for_each(|(n, b)| m.set(n, b)).map_err(text)?;
    let names: Vec<String> = out.iter().map(|(n, _)| format!("kept.{n}")).collect();
    let keep: Vec<(&str, &str)> = out.iter().zip(&names).map(|((n, _), k)| (n.as_str(), k.as_str())).collect();
    let mut shortest = f64::INFINITY;
    for _ in 0..RUNS[1] {
        let began = Instant::now();
        for _ in 0..RUNS[0] {
            m.run_keeping(id, dims, &[], &keep).map_err(text)?;
        }
        shortest = shortest.min(began.elapsed().as_secs_f64() / RUNS[0] as f64);
    }
    Ok((out, shortest))
}

fn measure(a: &Tune) -> Result<ExitCode> {
    let On::Cuda(_) = a.device else {
        return Err(miette!("--device {}: only a GPU has times to measure, such as cuda:0", a.device));
    };
    let first = a.device.open()?;
    let (name, capability) = (first.name().to_string(), first.capability());
    drop(first);
    // What stands before the brackets is where it is plugged in.
    let name = name.split_once('(').map_or(name.as_str(), |n| n.1.trim_end_matches(')')).to_string();
    let Some(arch) = archs(capability).first().copied() else {
        return Err(miette!("{name} is too old: kernels are made for sm_80 and later"));
    };
    let options = Options { precision: a.precision.into(), ..Options::default() };
    let program = lower_for(&optimise(&graph(a)?, &options), Kernels::Gpu);
    let known = |n: &str| program.syms.iter().any(|s| s.as_str() == n);
    let dims = Bindings::new([("N", a.batch), ("L", a.len)].into_iter().filter(|(n, _)| known(n)));
    let gpu = emit(program, Target::of(arch)).map_err(wrap)?;
    let nvrtc = Nvrtc::open_any().map_err(wrap)?;
    let cache = Cache::standard();
    let on = a.device;
    let open = || on.open().map_err(|e| e.to_string());
    let mut device = Measurer {
        name: name.clone(),
        target: gpu.target.clone(),
        nvrtc: &nvrtc,
        cache: &cache,
        placement: Placement::Arena,
        open,
        clock,
    };
    let mut seen = HashSet::new();
    let (mut all, mut wrong) = (vec![], vec![]);
    for (s, step) in gpu.steps.iter().zip(&gpu.program.steps) {
        if a.op.as_ref().is_some_and(|op| op != step.op.mnemonic()) || !seen.insert(Arc::as_ptr(&s.forms)) {
            continue;
        }
        match tune(step, &gpu.target, &dims, &mut device as &mut dyn Measure, &cache) {
            Ok(c) => all.push(c),
            Err(TuneError::NoneRight { step, candidates, .. }) => wrong.push((step, candidates)),
            Err(e) => return Err(wrap(e)),
        }
    }
    print(a, &name, &all);
    for (step, candidates) in &wrong {
        warn(format!("{step}: nothing is right"));
        for c in candidates {
            if let Verdict::Refused(why) = &c.verdict {
                eprintln!("  {}: {}", c.form, show::wrapped(why, 96, "    "));
            }
        }
    }
    if let Some(t) = cache.trouble() {
        warn(t);
    }
    Ok(if wrong.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(a: &Tune, device: &str, all: &[Choice]) {
    if a.json {
        for c in all {
            println!("{}", json!({ "device": device, "step": c.step, "chosen": c.chosen, "candidates": c.candidates }));
        }
        return;
    }
    println!("{}: {} measured on {device}", a.model, show::plural(all.len(), "step"));
    for c in all {
        println!("\n{}", show::wrapped(&c.step, 98, "  "));
        let mut t = Table::new(1, &["form", "µs", "", "why"]);
        for (i, x) in c.candidates.iter().enumerate() {
            let (time, why) = match &x.verdict {
                Verdict::Seconds(s) => (format!("{:.1}", s * 1e6), &x.why),
                Verdict::Refused(why) => ("wrong".into(), why),
            };
            let mark = match (i == c.chosen, i) {
                (true, 0) => "chosen, as predicted",
                (true, _) => "chosen",
                (false, 0) => "predicted",
                _ => "",
            };
            t.row([x.form.clone(), time, mark.into(), show::fit(why, 60)]);
        }
        t.print();
    }
}
