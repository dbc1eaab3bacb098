//! Grown graphs: every op of a program against its definition, optimised and not.

use crate::each_op::{Ran, Run, check_graph};
use crate::harness::Case;
use crate::rig::{Rig, schedules};
use crate::support::{as_f32, config, with_gradients};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rambac_codegen::cuda::{Arch, Target, emit};
use rambac_codegen::{Kernels, lower_for};
use rambac_ir::Graph;
use rambac_ir::ops::{Op, SourceKind};
use rambac_ir::testing::{Grown, grow, has_gradient};
use rambac_passes::{Options, optimise};
use rambac_runtime::Store;
use rambac_runtime::gpu::{Bytes, Placement};
use std::sync::Arc;

pub const ALL: &[Case] = &[("grown_graphs", every_op), ("grown_gradients", every_gradient)];

/// How much less exact products of TF32 parts and the special function unit are than the CPU's f32.
pub const SLACK: f64 = 4.0;

/// Runs a graph once, in an arena or with every buffer apart; findings are errors.
pub fn run(rig: &Rig, g: &Graph, like: &Grown) -> Result<Ran, String> {
    let program = emit(lower_for(g, Kernels::Gpu), Target::of(rig.arch())).map_err(|e| e.to_string())?;
    let code = rig.compile(&program.kernels, &program.target)?;
    // The schedule follows from the graph, so that a failure comes again.
    let o = schedules()[g.nodes.len() % 3];
    let placement = if g.nodes.len().is_multiple_of(2) { Placement::Arena } else { Placement::Apart };
    let mut e = rig.machine(o, placement)?;
    let id = e.load(Arc::new(program), &code).map_err(|e| e.to_string())?;
    let mut inputs = vec![];
    let mut kept = vec![];
    for (_, s) in g.sources() {
        let b = Bytes::from_host(&like.sources[&s.name]);
        match s.kind {
            SourceKind::Input => inputs.push((s.name.clone(), b)),
            _ => {
                e.set(&s.name, &b).map_err(|e| e.to_string())?;
                kept.push(s.name.clone());
            }
        }
    }
    let inputs: Vec<(&str, &Bytes)> = inputs.iter().map(|(n, b)| (n.as_str(), b)).collect();
    let out = e.run(id, &like.dims, &inputs).map_err(|e| e.to_string())?;
    let mut store = Store::default();
    for name in kept {
        let b = e.get(&name).map_err(|e| e.to_string())?.ok_or("BUG: it was set")?;
        store.insert(name, b.to_tensor());
    }
    Ok((out.into_iter().map(|(n, b)| (n, b.to_tensor())).collect(), store))
}

/// Reasons that are true of any GPU: a symbol where kernels need a number.
const NOT_FOR_GPUS: &[&str] = &["must have an integer size", "must be a number"];

/// Grown graphs of any ops.
fn grown(max_steps: usize, differentiable: bool) -> impl Strategy<Value = Grown> {
    let all = Op::mnemonics().into_iter().enumerate().filter(move |(_, m)| !differentiable || has_gradient(m));
    let able: Vec<u16> = (0..all.count()).map(|i| i as u16).collect();
    let step = (proptest::sample::select(able), any::<u64>());
    (any::<u64>(), proptest::collection::vec(step, 1..=max_steps))
        .prop_map(move |(seed, steps)| grow(seed, &steps, differentiable))
}

/// Kernels need sizes of heads and channels when they are compiled: graphs where symbols decide these are not for GPUs.
fn fits(g: &Graph) -> bool {
    let e = emit(lower_for(g, Kernels::Gpu), Target::of(Arch::Sm80));
    !e.is_err_and(|e| NOT_FOR_GPUS.iter().any(|r| e.to_string().contains(r)))
}

/// `false`: a symbol decides what a kernel must know.
fn all_forms(rig: &Rig, g: &Graph, like: &Grown) -> Result<bool, TestCaseError> {
    let run = |g: &Graph, like: &Grown| run(rig, g, like);
    let run = Run { run: &run, slack: SLACK };
    let optimised = optimise(g, &Options::default());
    if !fits(g) || !fits(&optimised) {
        return Ok(false);
    }
    check_graph(&run, g, like)?;
    check_graph(&run, &optimised, like)?;
    Ok(true)
}

fn property(
    s: impl Strategy<Value = Grown>,
    f: impl Fn(Grown) -> Result<bool, TestCaseError>,
) -> Result<String, String> {
    const CASES: u32 = 32;
    let ran = std::cell::Cell::new(0);
    let one = |g| {
        ran.set(ran.get() + u32::from(f(g)?));
        Ok(())
    };
    TestRunner::new(config(CASES)).run(&s, one).map_err(|e| e.to_string())?;
    let text = format!(", {} graphs; {} were not for GPUs", ran.get(), CASES - ran.get());
    if 2 * ran.get() < CASES { Err(format!("too few{text}")) } else { Ok(text) }
}

fn every_op(rig: &Rig) -> Result<String, String> {
    property(grown(12, false), |g| {
        let g = as_f32(&g);
        all_forms(rig, &g.graph, &g)
    })
}

fn every_gradient(rig: &Rig) -> Result<String, String> {
    property(grown(8, true), |g| {
        let g = as_f32(&g);
        all_forms(rig, &with_gradients(&g.graph), &g)
    })
}
