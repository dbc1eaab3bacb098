//! From a loss to a training step: gradients, clipping by global norm, AdamW and its schedule, all in one graph.
//!
//! AdamW (arXiv 1711.05101) with bias correction; the learning rate warms up linearly and then follows a cosine to a
//! floor.  The step counter and the moments are states, so a step is a pure function of the store and the batch.
//! With gradient accumulation the step is two graphs: [`accumulate`] adds a micro-batch's gradients into states,
//! [`apply`] updates from them.

use crate::autodiff::{AutodiffError, GRAD, gradients};
use crate::fuse_norm::fuse_norm;
use crate::mixed::shadow_name;
use rambac_ir::ops::{SourceKind, SumSquares, UnaryFn};
use rambac_ir::{Builder, DType, Graph, Ty, Value};
use std::f64::consts::PI;

/// The optimiser's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Peak learning rate.
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Decoupled decay of the parameters for which `decays` says so.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; 0 turns clipping off.
    pub clip: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Steps before the cosine begins; at least the warm-up.
    pub hold: u64,
    /// Steps of the whole schedule.
    pub steps: u64,
    /// Final learning rate as a part of the peak.
    pub floor: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            clip: 1.0,
            warmup: 100,
            hold: 0,
            steps: 1000,
            floor: 0.1,
        }
    }
}

/// Name of the step counter, an f32 scalar that counts finished steps.
pub const STEP: &str = "optim.step";

/// Name of the output that is the global norm of the gradient before clipping.
pub const GRAD_NORM: &str = "grad_norm";

/// Name of the accumulated number of tokens.
pub const TOKENS: &str = "accum.tokens";

/// Names of a parameter's moments.
pub fn moment_names(param: &str) -> [String; 2] {
    [format!("optim.m.{param}"), format!("optim.v.{param}")]
}

/// Name of a parameter's accumulated gradient.
pub fn accumulator_name(param: &str) -> String {
    format!("accum.{param}")
}

fn params(g: &Graph) -> Vec<(String, Value)> {
    g.sources().filter(|(_, s)| s.kind == SourceKind::Param).map(|(id, s)| (s.name.clone(), id.result(0))).collect()
}

/// Name, value and gradient of a parameter; of an accumulated gradient, the sum.
type Grad = (String, Value, Value);

fn with_gradients(loss: &Graph, of: &str) -> Result<(Graph, Vec<Grad>), AutodiffError> {
    // Before autodiff, so that the gradient is of the fused norm.
    let loss = &fuse_norm(loss);
    let l = loss.output(of).unwrap_or_else(|| panic!("BUG: a loss graph has the output `{of}`"));
    let params = params(loss);
    let wrt: Vec<Value> = params.iter().map(|p| p.1).collect();
    let (g, grads) = gradients(loss.clone(), l, &wrt)?;
    Ok((g, params.into_iter().zip(grads).map(|((name, p), d)| (name, p, d)).collect()))
}

/// The gradient of every parameter as outputs `grad.<name>`, beside the outputs of `loss`.
///
/// # Errors
/// As [`gradients`].
pub fn gradient_graph(loss: &Graph) -> Result<Graph, AutodiffError> {
    let (g, grads) = with_gradients(loss, "loss")?;
    let mut b = Builder::extend(g);
    grads.iter().for_each(|(name, _, d)| b.output(&format!("grad.{name}"), *d));
    built(b)
}

/// One whole step: the outputs of `loss`, then `grad_norm` and `lr`, and the updates.
///
/// # Errors
/// As [`gradients`].
pub fn train_step(loss: &Graph, opt: &AdamW, decays: impl Fn(&str) -> bool) -> Result<Graph, AutodiffError> {
    let (g, grads) = with_gradients(loss, "loss")?;
    let mut b = Builder::extend(g);
    update(&mut b, opt, &grads, None, decays);
    built(b)
}

/// As [`train_step`]; the gradient of every parameter is an output `grad.<name>`, too, for comparison.
///
/// # Errors
/// As [`gradients`].
pub fn train_step_with_gradients(
    loss: &Graph,
    opt: &AdamW,
    decays: impl Fn(&str) -> bool,
) -> Result<Graph, AutodiffError> {
    let (g, grads) = with_gradients(loss, "loss")?;
    let mut b = Builder::extend(g);
    grads.iter().for_each(|(name, _, d)| b.output(&format!("grad.{name}"), *d));
    update(&mut b, opt, &grads, None, decays);
    built(b)
}

/// A micro-batch: adds every gradient of `loss_sum` into its accumulator, and `tokens` into theirs, so that the step's
/// mean is over all tokens, however they fall into micro-batches.
///
/// # Errors
/// As [`gradients`].
pub fn accumulate(loss: &Graph) -> Result<Graph, AutodiffError> {
    let (g, grads) = with_gradients(loss, "loss_sum")?;
    let mut b = Builder::extend(g);
    b.enter(GRAD);
    let tokens = b.graph().output("tokens").expect("BUG: a loss graph has the output `tokens`");
    let sum = b.state(TOKENS, Ty::scalar(DType::F32));
    let sum = b.add(sum, tokens);
    b.output(TOKENS, sum);
    for (name, p, d) in &grads {
        let ty = b.ty(*p).clone();
        let sum = b.state(&accumulator_name(name), ty);
        let sum = b.add(sum, *d);
        b.output(&accumulator_name(name), sum);
    }
    b.leave();
    built(b)
}

/// The update from the accumulators; empties them.  Of `shadowed` parameters it also writes the bf16 copies that the graph
/// of a micro-batch reads in mixed precision.
///
/// # Errors
/// As [`gradients`].
pub fn apply(
    loss: &Graph,
    opt: &AdamW,
    decays: impl Fn(&str) -> bool,
    shadowed: &[&str],
) -> Result<Graph, AutodiffError> {
    let mut b = Builder::new("apply", &[]);
    let mut grads = vec![];
    let scalar = Ty::scalar(DType::F32);
    let tokens = b.state(TOKENS, scalar.clone());
    let least = b.scalar_like(1e-6, tokens);
    let tokens = b.max(tokens, least);
    let zero = b.constant(0.0, scalar);
    b.output(TOKENS, zero);
    for (name, v) in params(loss) {
        let ty = loss.ty(v).clone();
        let p = b.param(&name, ty.clone());
        let sum = b.state(&accumulator_name(&name), ty.clone());
        let zero = b.constant(0.0, ty);
        b.output(&accumulator_name(&name), zero);
        grads.push((name, p, sum));
    }
    update(&mut b, opt, &grads, Some(tokens), decays);
    b.enter("optim");
    for name in shadowed {
        let new = b.graph().output(name).expect("BUG: shadows are of parameters");
        let ty = b.ty(new).with_dtype(DType::BF16);
        b.state(&shadow_name(name), ty);
        let half = b.cast(new, DType::BF16);
        b.output(&shadow_name(name), half);
    }
    b.leave();
    built(b)
}

fn built(b: Builder) -> Result<Graph, AutodiffError> {
    b.finish().map_err(|e| AutodiffError::IllTyped { op: "the training step", error: e.to_string() })
}

/// The update from gradients, or from their sums over so many tokens.
fn update(b: &mut Builder, opt: &AdamW, grads: &[Grad], tokens: Option<Value>, decays: impl Fn(&str) -> bool) {
    b.enter("optim");
    let scalar = Ty::scalar(DType::F32);
    let c = |b: &mut Builder, v: f64| b.constant(v, Ty::scalar(DType::F32));
    let done = b.state(STEP, scalar);
    let one = c(b, 1.0);
    let t = b.add(done, one);
    b.output(STEP, t);

    let norm = {
        let all: Vec<Value> = grads.iter().map(|g| g.2).collect();
        let sum = if all.is_empty() { one } else { b.push(SumSquares {}, &all) };
        let norm = b.sqrt(sum);
        match tokens {
            Some(t) => b.div(norm, t),
            None => norm,
        }
    };
    b.output(GRAD_NORM, norm);
    let shrink = (opt.clip > 0.0).then(|| {
        let eps = c(b, 1e-6);
        let n = b.add(norm, eps);
        let clip = c(b, opt.clip);
        let s = b.div(clip, n);
        b.min(s, one)
    });

    let lr = {
        let warm = b.scale(t, 1.0 / opt.warmup.max(1) as f64);
        let warm = b.min(warm, one);
        let hold = opt.hold.max(opt.warmup);
        let span = opt.steps.saturating_sub(hold).max(1) as f64;
        let start = c(b, hold as f64);
        let p = b.sub(t, start);
        let p = b.scale(p, 1.0 / span);
        let zero = c(b, 0.0);
        let p = b.max(p, zero);
        let p = b.min(p, one);
        let p = b.scale(p, PI);
        let p = b.unary(UnaryFn::Cos, p);
        let p = b.scale(p, 0.5 * (1.0 - opt.floor));
        let mid = c(b, 0.5 * (1.0 + opt.floor));
        let p = b.add(p, mid);
        let p = b.mul(p, warm);
        b.scale(p, opt.lr)
    };
    b.output("lr", lr);
    // 1 - beta^t
    let correction = |b: &mut Builder, beta: f64| {
        let e = b.scale(t, beta.ln());
        let e = b.exp(e);
        b.sub(one, e)
    };
    let c1 = correction(b, opt.beta1);
    let c2 = correction(b, opt.beta2);
    let rate = b.div(lr, c1);
    let keep = {
        let d = b.scale(lr, opt.weight_decay);
        b.sub(one, d)
    };

    for (name, p, d) in grads {
        let ty = b.ty(*p).clone();
        let [mn, vn] = moment_names(name);
        let d = match tokens {
            Some(t) => b.div(*d, t),
            None => *d,
        };
        let g = match shrink {
            Some(s) => b.mul(d, s),
            None => d,
        };
        let ema = |b: &mut Builder, state: Value, x: Value, beta: f64| {
            let old = b.scale(state, beta);
            let new = b.scale(x, 1.0 - beta);
            b.add(old, new)
        };
        let m = b.state(&mn, ty.clone());
        let m = ema(b, m, g, opt.beta1);
        let v = b.state(&vn, ty.clone());
        let g2 = b.square(g);
        let v = ema(b, v, g2, opt.beta2);
        let denom = b.div(v, c2);
        let denom = b.sqrt(denom);
        let eps = b.constant(opt.eps, ty);
        let denom = b.add(denom, eps);
        let dir = b.div(m, denom);
        let dir = b.mul(dir, rate);
        let old = if decays(name) && opt.weight_decay > 0.0 { b.mul(*p, keep) } else { *p };
        let new = b.sub(old, dir);
        b.output(&mn, m);
        b.output(&vn, v);
        b.output(name, new);
    }
    b.leave();
}
