//! Gradients in mixed precision: what the bf16 graph means, what its kernels make of it, and how far both are from f32.

use crate::graphs;
use crate::harness::Case;
use crate::models::with_values;
use crate::rig::Rig;
use rambac_ir::interp::{self, Precision as Rounding};
use rambac_ir::testing::Grown;
use rambac_ir::verify::verify;
use rambac_ir::{Bindings, DType, Graph, HostArray};
use rambac_models::stack::{self, Carry};
use rambac_models::{Config, ModelType, preset};
use rambac_passes::mixed::{SHADOW, halves};
use rambac_passes::train_step::gradient_graph;
use rambac_passes::{Options, Precision, Recompute, optimise};
use std::collections::HashMap;

pub const ALL: &[Case] = &[("bf16_gradients_ramba", ramba), ("bf16_gradients_mamba2", mamba2)];

/// Largest distance of a gradient, as a part of its norm: of the kernels from the graph's meaning (what they round between
/// products of one op), and of either from f32.  A rounding to bf16 is 2⁻⁹ at most.
const KERNELS: f64 = 0.03;
const ROUNDING: f64 = 0.08;
/// How much farther gradients of decays, steps and skips may be: a number a head, sums over all tokens, in which large terms cancel.
const CANCELLED: f64 = 3.0;

fn norm(x: impl Iterator<Item = f64>) -> f64 {
    x.map(|v| v * v).sum::<f64>().sqrt()
}

fn distance(a: &HostArray, b: &HostArray) -> f64 {
    norm(a.f().iter().zip(b.f()).map(|(a, b)| a - b)) / norm(b.f().iter().copied()).max(1e-12)
}

/// Every output of the second within `most` of the first; the worst, and whose it is.
fn compare(
    what: &str,
    want: &[(String, HostArray)],
    got: &HashMap<String, HostArray>,
    most: f64,
) -> Result<(f64, String), String> {
    let mut worst = (0f64, String::new());
    for (name, w) in want.iter().filter(|(n, _)| n.starts_with("grad.") || n == "loss") {
        let d = distance(&got[name], w);
        let cancels = [".A_log", ".dt_bias", ".D"].iter().any(|n| name.ends_with(n));
        let most = if cancels { CANCELLED * most } else { most };
        if d.is_nan() || d > most {
            return Err(format!("{what}: {name} is {d:.4} of its norm away, {most} allowed"));
        }
        if d > worst.0 {
            worst = (d, name.clone());
        }
    }
    Ok(worst)
}

/// Values of `like` for the sources of `g`: bf16 copies of parameters are their parameters, rounded.
fn sources(g: &Graph, like: &Grown) -> HashMap<String, HostArray> {
    let value = |name: &str, dtype: DType| {
        let a = &like.sources[name.strip_prefix(SHADOW).unwrap_or(name)];
        if a.dtype == dtype {
            return a.clone();
        }
        let mut a = HostArray::float(dtype, &a.shape, a.f().to_vec());
        a.round_to_dtype();
        a
    };
    g.sources().map(|(_, s)| (s.name.clone(), value(&s.name, s.ty.dtype))).collect()
}

fn gradients(rig: &Rig, c: &Config) -> Result<String, String> {
    let loss = stack::loss(c, Carry::States, false).map_err(|e| format!("{e:?}"))?;
    let step = gradient_graph(&loss).map_err(|e| e.to_string())?;
    let dims = Bindings::new([("N", 2), ("L", c.chunk_size * 6)]);
    let like = with_values(&step, c, dims.clone());
    let exact = interp::outputs(&step, &dims, &like.sources, Rounding::Exact).map_err(|e| e.to_string())?;
    let mut report = String::new();
    for recompute in [Recompute::Nothing, Recompute::All] {
        let options = Options { precision: Precision::Bf16, recompute, ..Options::default() };
        let g = optimise(&step, &options);
        verify(&g).map_err(|e| format!("{e:?}"))?;
        let narrow = Grown { graph: g.clone(), dims: dims.clone(), sources: sources(&g, &like) };
        let meant = interp::outputs(&g, &dims, &narrow.sources, Rounding::Typed).map_err(|e| e.to_string())?;
        let of = |all: &[(String, HostArray)]| all.iter().cloned().collect::<HashMap<_, _>>();
        let rounding = compare("the graph against f32", &exact, &of(&meant), ROUNDING)?;
        let (ran, _) = graphs::run(rig, &g, &narrow)?;
        let ran: HashMap<String, HostArray> = ran.into_iter().map(|(n, t)| (n, t.to_host())).collect();
        let kernels = compare("kernels against the graph", &meant, &ran, KERNELS)?;
        compare("kernels against f32", &exact, &ran, ROUNDING)?;
        report = format!(
            ", bf16 is {:.4} away from f32 ({}), kernels {:.4} from bf16 ({})",
            rounding.0, rounding.1, kernels.0, kernels.1
        );
        // What the table promises was taken: no op that it names works on f32, and nothing is rounded in a step of its own but
        // sources and what is moved.
        let program = rambac_codegen::lower_for(&g, rambac_codegen::Kernels::Gpu);
        for s in &program.steps {
            let half = |i: &usize| s.inputs[*i].ty.dtype == DType::BF16;
            if !halves(&s.op).operands.iter().all(half) {
                return Err(format!("a step {} works on f32: {:?}", s.op.mnemonic(), s.inputs));
            }
        }
    }
    Ok(report)
}

fn tiny() -> Result<Config, String> {
    preset("tiny").map_err(|e| e.to_string())
}

fn ramba(rig: &Rig) -> Result<String, String> {
    // All chunks that a token sees are chosen: which ones are is a decision that rounding may turn.
    gradients(rig, &Config { chunk_topk: 8, ..tiny()? })
}

fn mamba2(rig: &Rig) -> Result<String, String> {
    gradients(rig, &Config { model_type: ModelType::Mamba2, num_upper_groups: 0, ..tiny()? })
}
