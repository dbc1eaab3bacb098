//! A training step that gave NaN or infinity: run again on the same batch, the first value that is not finite.
//!
//! On the CPU a step whose gradient's norm is not finite leaves parameters and moments as they were (`Executor::guard`), so the
//! step can be done again; it is done without the passes, so that what is found has the name and the line that its author gave it.

use crate::error::{self, Result};
use crate::{machine, show};
use miette::{Report, miette};
use rambac_codegen::lower;
use rambac_ir::graph::Loc;
use rambac_ir::{Diagnostic, Graph, NodeId};
use rambac_models::Config;
use rambac_models::stack::{self, Carry};
use rambac_passes::train_step::gradient_graph;
use rambac_passes::{Options, optimise};
use rambac_runtime::{Executor, MicroBatch, Store, Tensor, TrainError};
use std::path::Path;
use std::sync::Arc;

/// What a step was made of.
pub struct Failed<'a> {
    pub config: &'a Config,
    pub carry: Carry,
    /// Its batch and the parameters from before it, where they are still there.
    pub again: Option<(&'a [MicroBatch], &'a mut Store)>,
    /// The file of the attention, if it came from one.
    pub attention: Option<&'a Path>,
}

/// The error of a step, with what can be found out; `next` says what can be gone on from.
pub fn explain(e: TrainError, mut f: Failed, pool: &Arc<rayon::ThreadPool>, next: Option<String>) -> Report {
    let TrainError::NotFinite { step, loss, grad_norm } = e else { return error::train(e) };
    let what = format!("step {}: the loss is {loss} and the gradient's norm {grad_norm}", step + 1);
    let found = match f.again.take() {
        // What stops an update is the norm.
        Some(_) if grad_norm.is_finite() => {
            Found::told("the loss overflows where its gradient does not, and parameters have been replaced by then")
        }
        Some((batch, store)) => find(&f, batch, store, pool)
            .unwrap_or_else(|e| Found::told(format!("it could not be run again to see where that begins: {e}"))),
        None => Found::told("a GPU has replaced its parameters by then; a run on the CPU tells where it begins"),
    };
    if let Some(d) = found.diagnostic {
        let text = f.config.attention.as_ref().map_or("", |a| &a.text);
        let path = f.attention.map_or_else(|| Path::new("attention in config.json").into(), Path::to_path_buf);
        error::report(error::findings(&path, text, vec![d]));
    }
    let help: Vec<String> = [found.help, next].into_iter().flatten().collect();
    match help.is_empty() {
        true => miette!("{what}; {}", found.message),
        false => miette!(help = help.join("\n"), "{what}; {}", found.message),
    }
}

/// What running again gave.
#[derive(Default)]
struct Found {
    message: String,
    help: Option<String>,
    /// Of a line of the attention's text.
    diagnostic: Option<Diagnostic>,
}

impl Found {
    fn told(message: impl Into<String>) -> Self {
        Self { message: message.into(), ..Self::default() }
    }
}

/// NaN and infinity, but for the -inf of what is hidden.
fn bad(t: &Tensor) -> bool {
    t.as_f32().is_some_and(|v| v.iter().any(|v| v.is_nan() || *v == f32::INFINITY))
}

fn find(f: &Failed, batch: &[MicroBatch], store: &mut Store, pool: &Arc<rayon::ThreadPool>) -> Result<Found> {
    let broken = f
        .config
        .parameters()
        .into_iter()
        .find(|p| store.get(&p.name).and_then(Tensor::as_f32).is_some_and(|v| v.iter().any(|v| !v.is_finite())));
    if let Some(p) = broken {
        return Ok(Found::told(format!("the parameter {} is not finite before it", p.name)));
    }
    let loss = stack::loss(f.config, f.carry, false).map_err(error::wrap)?;
    let g = gradient_graph(&loss).map_err(error::wrap)?;
    let mut e = Executor::new(lower(&g), pool.clone());
    for m in batch {
        let need = e.plan(&m.dims).map_err(error::wrap)?.peak();
        if machine::memory().is_some_and(|(_, free)| need > free) {
            e = Executor::new(lower(&optimise(&g, &Options::default())), pool.clone());
        }
        let views: Vec<_> = m.inputs.iter().map(|(n, t)| (*n, t.view())).collect();
        let mut seen = |y: &[Tensor]| y.iter().any(bad);
        let at = e.run_until(&m.dims, &views, store, &mut seen).map_err(error::wrap)?;
        if let Some(at) = at {
            return Ok(told(e.program().steps[at].node, &e.program().graph));
        }
    }
    if !matches!(f.carry, Carry::Zero) {
        return Ok(Found::told("run again on the same batch from the states that it left, every value is finite"));
    }
    let mut found = Found::told("run again, every value is finite, so it is the sum of squares that overflows");
    found.help = Some("gradients are too large: lower --lr, or make --warmup longer".into());
    Ok(found)
}

/// Where `node` stands, for people.
fn told(node: NodeId, g: &Graph) -> Found {
    let n = g.node(node);
    let (label, op) = (g.label(node.result(0)), n.op.mnemonic());
    let backward = n.scope.as_deref().is_some_and(|s| s == "grad" || s.starts_with("grad."));
    let scope = n.scope.as_deref().map(|s| s.strip_prefix("grad.").unwrap_or(s));
    let place = scope.map_or(String::new(), |s| format!(" of {s}"));
    let phase = if backward { "in the backward" } else { "in the forward" };
    let message =
        format!("run again on the same batch, {label} = {op}{place} is the first that is not finite, {phase}");
    let help = match op {
        "div" => "divide by a sum that can be 0 only after max with a small number",
        "log" | "sqrt" | "rsqrt" => "its operand comes to 0 or below: max with a small number before it",
        "exp" => "its operand is too large: take the largest away before it, or use softmax",
        _ if backward => {
            "the values are finite and their gradients are not: a lower --lr, or --clip, if they grew; sqrt, log and \
                          div have none at 0"
        }
        _ => "values have grown too large if this is not the first step: lower --lr, or make --warmup longer",
    };
    let diagnostic = matches!(n.loc, Loc::Text(_)).then(|| {
        Diagnostic::error(format!("{label} = {op}: NaN or infinity comes out here, {phase}"))
            .on(node, &n.loc)
            .help(help)
    });
    let help = diagnostic.is_none().then(|| help.to_string());
    Found { message, help, diagnostic }
}

/// What there is to go on from.
pub fn checkpoints(folder: &Path, steps: &[u64]) -> String {
    match steps.last() {
        Some(step) => format!(
            "the last whole checkpoint is of step {}: rambac train --resume {} goes on from it, and comes here again unless the \
             cause is gone",
            show::count(*step),
            folder.display()
        ),
        None => "no checkpoint was written yet".into(),
    }
}
