//! `rambac tune`: measures the ways in which a model's steps can run on a device, and keeps what was fastest.

use crate::cli::Tune;
use crate::cmd::explain::model_step;
use crate::device::{On, maker_name};
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
use rambac_runtime::gpu::{self, Device, Measurer, Placement, archs};
use serde_json::json;
use std::collections::HashSet;
use std::process::ExitCode;
use std::sync::Arc;

/// Runs the verb.
pub fn run(a: &Tune, pool: Arc<rayon::ThreadPool>) -> Result<ExitCode> {
    pool.install(|| measure(a))
}

fn graph(a: &Tune) -> Result<Graph> {
    Ok(match model::resolve_with(&a.model, &a.attention)? {
        Named::Model { config, .. } if a.train => model_step(&config, &AdamW::default())?,
        Named::Model { config, .. } => stack::loss(&config, Carry::Zero, false).map_err(wrap)?,
        Named::Ir { graph, .. } => graph,
    })
}

fn measure(a: &Tune) -> Result<ExitCode> {
    let On::Cuda(_) = a.device else {
        return Err(miette!("--device {}: only a GPU has times to measure, such as cuda:0", a.device));
    };
    // Open until the end: the driver would make and end the device's context for every candidate.
    let first = a.device.open()?;
    let (name, capability) = (maker_name(first.name()).to_string(), first.capability());
    let Some(arch) = archs(capability).first().copied() else {
        return Err(miette!("{name} is too old: kernels are made for sm_80 and later"));
    };
    let options = Options { precision: a.precision.into(), ..Options::default() };
    let program = lower_for(&optimise(&graph(a)?, &options), Kernels::Gpu);
    let known = |n: &str| program.syms.iter().any(|s| s.as_str() == n);
    let dims = Bindings::new([("N", a.batch), ("L", a.len)].into_iter().filter(|(n, _)| known(n)));
    let emitted = emit(program, Target::of(arch)).map_err(wrap)?;
    let nvrtc = Nvrtc::open_any().map_err(wrap)?;
    let cache = Cache::standard();
    let on = a.device;
    let open = || on.open().map_err(|e| e.to_string());
    let mut device = Measurer {
        name: name.clone(),
        target: emitted.target.clone(),
        nvrtc: &nvrtc,
        cache: &cache,
        placement: Placement::Arena,
        open,
        clock: gpu::clock,
        lost: false,
    };
    let mut seen = HashSet::new();
    let (mut all, mut wrong, mut known) = (vec![], vec![], false);
    for (s, step) in emitted.steps.iter().zip(&emitted.program.steps) {
        if a.op.as_ref().is_some_and(|op| op != step.op.mnemonic()) || !seen.insert(Arc::as_ptr(&s.forms)) {
            known |= a.op.as_deref() == Some(step.op.mnemonic());
            continue;
        }
        match tune(step, &emitted.target, &dims, &mut device as &mut dyn Measure, &cache) {
            Ok(c) => all.push(c),
            Err(TuneError::NoneRight { step, candidates, .. }) => wrong.push((step, candidates)),
            Err(e) => {
                print(a, &name, &all);
                return Err(wrap(e));
            }
        }
    }
    if let (Some(op), true, false) = (&a.op, all.is_empty() && wrong.is_empty(), known) {
        let mut ops: Vec<&str> = emitted.program.steps.iter().map(|s| s.op.mnemonic()).collect();
        ops.sort_unstable();
        ops.dedup();
        return Err(miette!(
            help = format!("its ops are {}", ops.join(", ")),
            "--op {op}: {} has no such step",
            a.model
        ));
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
