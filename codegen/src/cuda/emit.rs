//! All steps of a Program as forms, with every kernel once.

use super::form::{Form, Kernel};
use super::join::{Joined, join};
use super::ops::{Site, Unsupported, forms};
use super::target::Target;
use crate::program::{Program, Step, View};
use crate::{MemoryPlan, plan_with};
use rambac_ir::{Bindings, DimError};
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// A step that can't run on a GPU.
#[derive(Debug, thiserror::Error)]
#[error("{program}: step {step} ({op}, {types}) can't run on {arch}: {why}")]
pub struct EmitError {
    pub program: String,
    pub step: usize,
    pub op: &'static str,
    pub types: String,
    pub arch: &'static str,
    pub why: Unsupported,
}

/// The ways a step can run, best first; the last has no conditions.
#[derive(Clone, Debug)]
pub struct GpuStep {
    /// Shared by all steps that are alike, as those of a model's layers are.
    pub forms: Arc<Vec<Form>>,
    /// How it stands to the steps around it.
    pub joined: Joined,
}

impl GpuStep {
    /// The form that runs under `b`.
    ///
    /// # Errors
    /// A dim without a value.
    pub fn form(&self, b: &Bindings) -> Result<&Form, DimError> {
        for f in self.forms.iter() {
            let holds = f.needs.iter().chain(&f.when).map(|c| c.holds(b)).collect::<Result<Vec<_>, _>>()?;
            if holds.iter().all(|&h| h) {
                return Ok(f);
            }
        }
        unreachable!("BUG: `emit` checks that the last form always runs")
    }
}

/// A Program for GPUs.
#[derive(Clone, Debug)]
pub struct GpuProgram {
    /// Steps that do the work of others too have their operands and results behind their own, see [`join`].
    pub program: Arc<Program>,
    pub target: Target,
    /// As many as the program has.
    pub steps: Vec<GpuStep>,
    /// Every kernel of every form, once.
    pub kernels: Vec<Kernel>,
}

impl GpuProgram {
    /// The form of every step under `b`.
    ///
    /// # Errors
    /// A dim without a value.
    pub fn forms(&self, b: &Bindings) -> Result<Vec<&Form>, DimError> {
        self.steps.iter().map(|s| s.form(b)).collect()
    }

    /// The memory plan, with the workspace of the forms that run under `b`.
    ///
    /// # Errors
    /// A dim without a value; more bytes in all than can be addressed.
    pub fn plan(&self, b: &Bindings) -> Result<MemoryPlan, DimError> {
        let taken = self.forms(b)?.iter().map(|f| f.workspace_bytes(b)).collect::<Result<_, _>>()?;
        plan_with(&self.program, b, taken)
    }
}

/// Chooses the forms of every step.
///
/// # Errors
/// A step whose op, types or layout no kernel takes, with the reason.
pub fn emit(program: impl Into<Arc<Program>>, target: Target) -> Result<GpuProgram, EmitError> {
    let (program, joined) = join(program.into(), &target);
    let (mut steps, mut kernels) = (Vec::<GpuStep>::new(), Vec::<Kernel>::new());
    let mut sites: HashMap<u64, Vec<usize>> = HashMap::new();
    let mut known: HashMap<String, usize> = HashMap::new();
    for (i, s) in program.steps.iter().enumerate() {
        let like = sites.entry(site_hash(s)).or_default();
        if let Some(&at) = like.iter().find(|&&at| joined[at] == joined[i] && alike(&program.steps[at], s)) {
            steps.push(steps[at].clone());
            continue;
        }
        like.push(i);
        let site = Site { inputs: &s.inputs, outputs: &s.outputs, target: &target, joined: &joined[i] };
        let forms = forms(&s.op, &site).map_err(|why| EmitError {
            program: program.name.clone(),
            step: i,
            op: s.op.mnemonic(),
            types: s.inputs.iter().map(|v| v.ty.to_string()).collect::<Vec<_>>().join(", "),
            arch: target.arch.name(),
            why,
        })?;
        let always = |f: &Form| f.needs.is_empty() && f.when.is_empty();
        assert!(forms.last().is_some_and(always), "BUG: {} has no form for all sizes", s.op.mnemonic());
        for k in forms.iter().flat_map(Form::launches).map(|l| &l.kernel) {
            match known.get(&k.name) {
                Some(&at) => assert_eq!(kernels[at], *k, "BUG: two kernels have the name {}", k.name),
                None => {
                    known.insert(k.name.clone(), kernels.len());
                    kernels.push(k.clone());
                }
            }
        }
        steps.push(GpuStep { forms: Arc::new(forms), joined: joined[i].clone() });
    }
    Ok(GpuProgram { program, target, steps, kernels })
}

/// Of what decides a step's forms, or a part of that.
fn site_hash(s: &Step) -> u64 {
    let mut h = DefaultHasher::new();
    s.op.mnemonic().hash(&mut h);
    s.inputs.iter().chain(&s.outputs).for_each(|v| v.ty.hash(&mut h));
    h.finish()
}

/// Whether two steps have the same forms: all but where their buffers are.
fn alike(a: &Step, b: &Step) -> bool {
    let same = |x: &[View], y: &[View]| {
        let one = |(x, y): (&View, &View)| (&x.ty, &x.offset, &x.strided) == (&y.ty, &y.offset, &y.strided);
        x.len() == y.len() && x.iter().zip(y).all(one)
    };
    a.op == b.op && same(&a.inputs, &b.inputs) && same(&a.outputs, &b.outputs)
}
