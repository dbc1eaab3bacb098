//! What a training step makes of stored gradients: clipping by the global norm and AdamW (arXiv 1711.05101) in f64, written down
//! apart from the graph that does it.
//!
//! The step is one from the middle of a run: the moments are not zero, the learning rate is on its cosine.  First moments are
//! half as large as gradients and have the parameters' pattern; second ones are what the gradients' mean squares are, so
//! that no element's update is its gradient's sign.

use rambac_ir::HostArray;
use rambac_models::Config;
use rambac_passes::train_step::{AdamW, STEP, moment_names};
use std::collections::{BTreeMap, HashMap};
use std::f64::consts::PI;

/// Prefix of what was added to a parameter.
pub const UPDATE: &str = "update.";

/// Steps done before this one.
const DONE: f64 = 29.0;

/// One step of a model whose gradients are known.
pub struct Step {
    pub optimiser: AdamW,
    /// Name, whether it decays, gradient.
    params: Vec<(String, bool, HostArray)>,
    /// Global norm of the gradient.
    norm: f64,
}

fn mean_square(a: &HostArray) -> f64 {
    (0..a.len()).map(|i| a.get(i).powi(2)).sum::<f64>() / a.len().max(1) as f64
}

fn map(a: &HostArray, f: impl Fn(usize) -> f64) -> HostArray {
    let mut out = HostArray::f32(&a.shape, (0..a.len()).map(f));
    out.round_to_dtype();
    out
}

impl Step {
    /// The step, if the gradient of every parameter is stored.
    pub fn of(
        config: &Config,
        given: &HashMap<String, HostArray>,
        expected: &BTreeMap<String, HostArray>,
    ) -> Option<Step> {
        let one = |p: rambac_models::ParamSpec| {
            let d = expected.get(&format!("grad.{}", p.name))?;
            (d.shape == given.get(&p.name)?.shape).then(|| (p.name, p.decay, d.clone()))
        };
        let params = config.parameters().into_iter().map(one).collect::<Option<Vec<_>>>()?;
        let norm = params.iter().map(|(_, _, d)| mean_square(d) * d.len() as f64).sum::<f64>().sqrt();
        let optimiser = AdamW { lr: 0.02, warmup: 10, hold: 20, steps: 100, clip: 0.6 * norm, ..AdamW::default() };
        Some(Step { optimiser, params, norm })
    }

    pub fn decays(&self, name: &str) -> bool {
        self.params.iter().any(|p| p.0 == name && p.1)
    }

    /// Adds the states before the step.
    pub fn states(&self, given: &mut HashMap<String, HostArray>) {
        given.insert(STEP.into(), HostArray::f32(&[], [DONE]));
        for (name, _, d) in &self.params {
            let p = &given[name];
            let scale = |a: &HostArray| mean_square(a).sqrt().max(1e-8);
            let by = 0.5 * scale(d) / scale(p);
            let [m, v] = moment_names(name);
            let (first, second) = (map(p, |i| by * p.get(i)), map(p, |_| scale(d).powi(2)));
            given.insert(m, first);
            given.insert(v, second);
        }
    }

    /// Adds the states after the step and what it adds to the parameters.
    pub fn expect(&self, given: &HashMap<String, HostArray>, expected: &mut BTreeMap<String, HostArray>) {
        let o = &self.optimiser;
        let t = DONE + 1.0;
        let done = (t - o.hold.max(o.warmup) as f64) / (o.steps - o.hold.max(o.warmup)) as f64;
        let cosine = o.floor + (1.0 - o.floor) * 0.5 * (1.0 + (PI * done.clamp(0.0, 1.0)).cos());
        let lr = o.lr * cosine * (t / o.warmup as f64).min(1.0);
        let shrink = (o.clip / (self.norm + 1e-6)).min(1.0);
        let scalar = |v: f64| HostArray::f32(&[], [v]);
        expected.insert("grad_norm".into(), scalar(self.norm));
        expected.insert("lr".into(), scalar(lr));
        expected.insert(STEP.into(), scalar(t));
        for (name, decays, d) in &self.params {
            let [m, v] = moment_names(name);
            let (p, m0, v0) = (&given[name], &given[&m], &given[&v]);
            let g = |i: usize| shrink * d.get(i);
            let first = |i: usize| o.beta1 * m0.get(i) + (1.0 - o.beta1) * g(i);
            let second = |i: usize| o.beta2 * v0.get(i) + (1.0 - o.beta2) * g(i).powi(2);
            let delta = |i: usize| {
                let (m, v) = (first(i) / (1.0 - o.beta1.powf(t)), second(i) / (1.0 - o.beta2.powf(t)));
                let decay = if *decays { lr * o.weight_decay * p.get(i) } else { 0.0 };
                -decay - lr * m / (v.sqrt() + o.eps)
            };
            let new = [(UPDATE.to_string() + name, map(p, delta)), (m, map(p, first)), (v, map(p, second))];
            expected.extend(new);
        }
    }
}
