//! Whole models: a training step of `tiny`, and the parts that a session runs, every op against its definition.

use crate::each_op::{Run, check_graph};
use crate::graphs::{SLACK, run};
use crate::harness::Case;
use crate::rig::Rig;
use rambac_ir::ops::SourceKind;
use rambac_ir::testing::{Grown, Rng};
use rambac_ir::{Bindings, DType, Graph, HostArray};
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, InitRule, ModelType, init_tensor, preset};
use rambac_passes::train_step::{AdamW, train_step};
use rambac_passes::{Options, optimise};
use std::collections::HashMap;

pub const ALL: &[Case] =
    &[("tiny_training_step", ramba), ("mamba2_training_step", mamba2), ("tiny_session_parts", parts)];

/// Weights as they begin, inputs at random, all else zero.
pub fn with_values(graph: &Graph, c: &Config, dims: Bindings) -> Grown {
    let mut rng = Rng(3);
    let specs = c.parameters_with(InitRule::FanIn);
    let mut sources = HashMap::new();
    for (_, s) in graph.sources() {
        let ty = s.ty.bind(&dims).expect("the test binds every symbol");
        let n = ty.elements();
        let spec = specs.iter().find(|p| p.name == s.name);
        let mut numbers = |lo: f64, hi: f64| (0..n).map(|_| rng.uniform(lo, hi)).collect::<Vec<_>>();
        let a = match (s.kind, spec) {
            (_, Some(p)) => HostArray::f32(&ty.shape, init_tensor(p, 5).into_iter().map(f64::from)),
            (SourceKind::Input, _) if ty.dtype == DType::I32 && s.name != "start" => {
                HostArray::from_f64(&ty, numbers(0.0, 200.0))
            }
            (SourceKind::Input, _) if ty.dtype == DType::F32 => {
                let mut a = HostArray::from_f64(&ty, numbers(-1.0, 1.0));
                a.round_to_dtype();
                a
            }
            _ => HostArray::filled(&ty, 0.0),
        };
        sources.insert(s.name.clone(), a);
    }
    Grown { graph: graph.clone(), dims, sources }
}

fn check(rig: &Rig, g: &Graph, c: &Config, dims: Bindings) -> Result<(), String> {
    let g = optimise(g, &Options::default());
    let like = with_values(&g, c, dims);
    let run = |g: &Graph, like: &Grown| run(rig, g, like);
    check_graph(&Run { run: &run, slack: SLACK }, &g, &like).map_err(|e| e.to_string())
}

fn training(rig: &Rig, c: &Config) -> Result<String, String> {
    let loss = stack::loss(c, Carry::States, false).map_err(|e| format!("{e:?}"))?;
    let step = train_step(&loss, &AdamW { warmup: 0, ..AdamW::default() }, |n| n.ends_with("proj.weight"))
        .map_err(|e| e.to_string())?;
    // Not a multiple of the kernels' blocks, and more chunks than a token selects.
    let len = c.chunk_size * 10;
    check(rig, &step, c, Bindings::new([("N", 2), ("L", len)]))?;
    Ok(format!(", 2 x {len} tokens, {} nodes", step.nodes.len()))
}

fn ramba(rig: &Rig) -> Result<String, String> {
    training(rig, &preset("tiny").map_err(|e| e.to_string())?)
}

fn mamba2(rig: &Rig) -> Result<String, String> {
    let tiny = preset("tiny").map_err(|e| e.to_string())?;
    training(rig, &Config { model_type: ModelType::Mamba2, num_upper_groups: 0, ..tiny })
}

fn parts(rig: &Rig) -> Result<String, String> {
    let c = preset("tiny").map_err(|e| e.to_string())?;
    let parts = [stack::lower(&c).map(Some), stack::chunks(&c), stack::upper(&c), stack::head(&c).map(Some)];
    let mut ran = 0;
    for g in parts {
        let Some(g) = g.map_err(|e| format!("{e:?}"))? else { continue };
        for l in [1, c.chunk_size * 2] {
            let dims: Vec<(&str, usize)> =
                g.syms.iter().map(|s| (s.as_str(), if s.as_str() == "L" { l } else { 2 })).collect();
            let dims = Bindings::new(dims);
            // The encoder takes whole chunks.
            if g.nodes.iter().flat_map(|n| &n.tys).all(|t| t.bind(&dims).is_ok()) {
                check(rig, &g, &c, dims)?;
                ran += 1;
            }
        }
    }
    Ok(format!(", {ran} programs"))
}
