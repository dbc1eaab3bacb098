//! Measured choices with the simulator as the device: its counts are the clock.

use crate::harness::Case;
use crate::rig::{Rig, cache};
use rambac_codegen::cuda::choices::Verdict;
use rambac_codegen::cuda::tune::{TuneError, measured, tune};
use rambac_codegen::cuda::{Arch, Cache, GpuProgram, Target, emit};
use rambac_codegen::{Kernels, lower_for};
use rambac_driver::testing::{Fault, Faulty, Late};
use rambac_ir::{Bindings, text};
use rambac_runtime::gpu::{Bytes, GpuError, Machine, Measurer, Placement, ProgramId, Timed, clock as device_clock};
use rambac_simulator::Options;
use rambac_simulator::device::Simulator;
use tempfile::TempDir;

pub const ALL: &[Case] = &[
    ("measured_choices", measured_choices),
    ("choices_by_a_device's_clock", by_clock),
    ("choices_of_a_lost_device", lost),
];

/// An attention, the conv of a strided operand, and a text's attention to itself, whose chunks must stay whole.
const GRAPHS: [(&str, &[(&str, usize)]); 3] = [
    (
        "graph attend(N, L, C) {
  %q = input \"q\" : bf16[N, L, 4, 32]
  %k = input \"k\" : bf16[N, 32*C, 1, 32]
  %v = input \"v\" : bf16[N, 32*C, 1, 32]
  %i = input \"i\" : i32[N, L, 1, 2]
  %n = input \"n\" : i32[N, L, 1]
  %w = input \"w\" : bf16[N, L, 1, 2]
  %y = chunk_attention %q, %k, %v, %i, %n, %w {chunk = 32, scale = 0.25}
  return \"y\" = %y
}
",
        &[("N", 1), ("L", 40), ("C", 4)],
    ),
    (
        "graph conv(N, L) {
  %x = input \"x\" : f32[N, L, 48]
  %s = slice %x {axis = 2, start = 16, end = 48}
  %w = input \"w\" : f32[32, 1, 4]
  %bias = input \"bias\" : f32[32]
  %s0 = input \"s0\" : f32[N, 3, 32]
  %y, %t = causal_conv1d %s, %w, %bias, %s0
  return \"y\" = %y, \"t\" = %t
}
",
        &[("N", 1), ("L", 70)],
    ),
    (
        "graph chunks(N, L) {
  %q = input \"q\" : bf16[N, L, 4, 32]
  %k = input \"k\" : bf16[N, L, 1, 32]
  %v = input \"v\" : bf16[N, L, 1, 32]
  %i = input \"i\" : i32[N, L, 1, 2]
  %n = input \"n\" : i32[N, L, 1]
  %w = input \"w\" : bf16[N, L, 1, 2]
  %y = chunk_attention %q, %k, %v, %i, %n, %w {chunk = 32, scale = 0.25}
  return \"y\" = %y
}
",
        &[("N", 4), ("L", 256)],
    ),
];

type Clocked = Result<Timed, GpuError>;

/// As many seconds as there were instructions of warps.
fn clock(m: &mut Machine<Simulator>, id: ProgramId, b: &Bindings, inputs: &[(&str, &Bytes)]) -> Clocked {
    let out = m.run(id, b, inputs)?;
    Ok((out, m.device().take_counts().iter().map(|c| c.warp_instructions as f64).sum()))
}

/// A graph as a program, and its sizes.
fn program((graph, sizes): (&str, &[(&str, usize)])) -> Result<(GpuProgram, Bindings), String> {
    let graph = text::parse(graph).map_err(|e| format!("{e:?}"))?;
    let p = emit(lower_for(&graph, Kernels::Gpu), Target::of(Arch::Sm80)).map_err(|e| e.to_string())?;
    Ok((p, Bindings::new(sizes.iter().copied())))
}

fn measured_choices(rig: &Rig) -> Result<String, String> {
    let dir = TempDir::new().map_err(|e| e.to_string())?;
    let (kept, compiled) = (Cache::at(dir.path()), cache());
    let mut said = String::new();
    for graph in GRAPHS {
        let (p, b) = program(graph)?;
        let mut device = Measurer {
            name: "the simulator".into(),
            target: p.target.clone(),
            nvrtc: &rig.nvrtc,
            cache: &compiled,
            placement: Placement::Apart,
            open: || Ok(Simulator::strict(Options::default())),
            clock,
            lost: false,
        };
        let step = p.program.steps.last().ok_or("no step")?;
        let c = tune(step, &p.target, &b, &mut device, &kept).map_err(|e| e.to_string())?;
        for x in &c.candidates {
            match &x.verdict {
                Verdict::Refused(why) => return Err(format!("{} is refused: {why}", x.form)),
                Verdict::Seconds(s) if *s < c.best().1 => {
                    return Err(format!("{} takes less than what was chosen", x.form));
                }
                Verdict::Seconds(_) => {}
            }
        }
        let m = measured(&p, &b, "the simulator", &kept).map_err(|e| e.to_string())?.ok_or("it was not kept")?;
        let form = m.steps.last().ok_or("no step")?.form(&b).map_err(|e| e.to_string())?;
        if !form.measured || form.name != c.best().0.form {
            return Err(format!("{} runs, {} was measured", form.name, c.best().0.form));
        }
        said += &format!(", {}: {} of {}", p.program.name, form.name, c.candidates.len());
    }
    Ok(said)
}

/// What every launch of a device takes that counts launches.
const TICK: f64 = 1e-3;

/// The conv's candidates on a device whose clock counts launches: all take as long as they have launches.
fn by_clock(rig: &Rig) -> Result<String, String> {
    let dir = TempDir::new().map_err(|e| e.to_string())?;
    let (kept, compiled) = (Cache::at(dir.path()), cache());
    let (p, b) = program(GRAPHS[1])?;
    let simulator = Simulator::strict(Options::default());
    let mut device = Measurer {
        name: "a clock".into(),
        target: p.target.clone(),
        nvrtc: &rig.nvrtc,
        cache: &compiled,
        placement: Placement::Arena,
        open: || Ok(Late::ticking(simulator.like(), TICK)),
        clock: device_clock,
        lost: false,
    };
    let step = p.program.steps.last().ok_or("no step")?;
    let c = tune(step, &p.target, &b, &mut device, &kept).map_err(|e| e.to_string())?;
    for x in &c.candidates {
        match x.verdict {
            // Whole launches, whatever was copied before and after.
            Verdict::Seconds(s) if s > 0.0 && (s / TICK).fract().min(1.0 - (s / TICK).fract()) < 1e-6 => {}
            _ => return Err(format!("{}: {:?}", x.form, x.verdict)),
        }
    }
    // A device without a clock tells nothing.
    let mut none = Measurer {
        name: "none".into(),
        target: p.target.clone(),
        nvrtc: &rig.nvrtc,
        cache: &compiled,
        placement: Placement::Arena,
        open: || Ok(Late::new(simulator.like())),
        clock: device_clock,
        lost: false,
    };
    match tune(step, &p.target, &b, &mut none, &kept) {
        Err(TuneError::NoneRight { candidates, .. }) if format!("{candidates:?}").contains("no clock") => {}
        other => return Err(format!("without a clock: {other:?}")),
    }
    Ok(format!(", {} in {} launches", c.best().0.form, c.best().1 / TICK))
}

/// A candidate that takes the device with it is named, and nothing is kept of its step.
fn lost(rig: &Rig) -> Result<String, String> {
    let dir = TempDir::new().map_err(|e| e.to_string())?;
    let (kept, compiled) = (Cache::at(dir.path()), cache());
    let (p, b) = program(GRAPHS[1])?;
    let simulator = Simulator::strict(Options::default());
    // The second candidate's device is lost after a few calls.
    let mut opened = 0;
    let open = || {
        opened += 1;
        let fails = if opened > 2 { Some((12, Fault::Lost)) } else { None };
        Ok(Faulty::new(Late::ticking(simulator.like(), TICK), fails))
    };
    let mut device = Measurer {
        name: "a faulty one".into(),
        target: p.target.clone(),
        nvrtc: &rig.nvrtc,
        cache: &compiled,
        placement: Placement::Arena,
        open,
        clock: device_clock,
        lost: false,
    };
    let step = p.program.steps.last().ok_or("no step")?;
    match tune(step, &p.target, &b, &mut device, &kept) {
        Err(e @ TuneError::Lost { .. }) if e.to_string().contains("took the device with it") => {}
        other => return Err(format!("{other:?}")),
    }
    match measured(&p, &b, "a faulty one", &kept).map_err(|e| e.to_string())? {
        None => Ok(String::new()),
        Some(_) => Err("a choice was kept".into()),
    }
}
