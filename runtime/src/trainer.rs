//! Training: compiled steps over a store.
//!
//! A step is one Program (or two with gradient accumulation) and a pure function of the store and the batch, so a run
//! that stops and goes on gives the same bits as one that never stopped.

use crate::executor::{ExecError, Executor, StepTimes};
use crate::store::Store;
use crate::tensor::{Tensor, TensorRef};
use rambac_codegen::lower;
use rambac_ir::ops::SourceKind;
use rambac_ir::{Bindings, Graph};
use rambac_passes::train_step::{AdamW, accumulate, apply, train_step};
use rambac_passes::{AutodiffError, Options, optimise};
use std::sync::Arc;

/// Why training can't go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error(transparent)]
    Autodiff(#[from] AutodiffError),
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error(
        "step {step}: the loss is {loss} and the gradient's norm {grad_norm}; lower the learning rate (or check the \
         data), the last checkpoint is whole"
    )]
    NotFinite { step: u64, loss: f32, grad_norm: f32 },
    #[error("{given} micro-batches for {expected} accumulation parts")]
    Parts { expected: usize, given: usize },
}

/// What one step reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean over the step's labelled tokens.
    pub loss: f32,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f32,
    pub lr: f32,
}

/// One micro-batch.
pub struct MicroBatch {
    pub dims: Bindings,
    pub inputs: Vec<(&'static str, Tensor)>,
}

impl MicroBatch {
    fn views(&self) -> Vec<(&str, TensorRef<'_>)> {
        self.inputs.iter().map(|(n, t)| (*n, t.view())).collect()
    }
}

enum Programs {
    Whole(Executor),
    Parts { accumulate: Executor, apply: Executor, parts: usize },
}

/// See the module's comment.
pub struct Trainer {
    programs: Programs,
    pub store: Store,
}

impl Trainer {
    /// Compiles the step of a loss graph.  `params` must hold every param; missing states start at zero.
    ///
    /// # Errors
    /// An op without a gradient.
    pub fn new(
        loss: &Graph,
        opt: &AdamW,
        decays: impl Fn(&str) -> bool,
        parts: usize,
        options: &Options,
        params: Store,
        pool: Arc<rayon::ThreadPool>,
    ) -> Result<Self, TrainError> {
        let compile = |g: Graph| Executor::new(lower(&optimise(&g, options)), pool.clone());
        let programs = if parts <= 1 {
            Programs::Whole(compile(train_step(loss, opt, decays)?))
        } else {
            let (accumulate, apply) = (compile(accumulate(loss)?), compile(apply(loss, opt, decays)?));
            Programs::Parts { accumulate, apply, parts }
        };
        Ok(Self { programs, store: params })
    }

    /// The executor whose memory and cost stand for the step.
    pub fn main_executor(&mut self) -> &mut Executor {
        match &mut self.programs {
            Programs::Whole(e) | Programs::Parts { accumulate: e, .. } => e,
        }
    }

    /// States that the store lacks, or that have another shape (carried states of another batch size), become zero.
    fn prepare(&mut self, dims: &Bindings) -> Result<(), ExecError> {
        let executors: Vec<&Executor> = match &self.programs {
            Programs::Whole(e) => vec![e],
            Programs::Parts { accumulate, apply, .. } => vec![accumulate, apply],
        };
        for e in executors {
            for s in e.program().sources.iter().filter(|s| s.kind == SourceKind::State) {
                let ty = s.ty.bind(dims)?;
                let other_batch = |t: &Tensor| s.name.starts_with("carry.") && t.ty() != ty;
                if self.store.get(&s.name).is_none_or(other_batch) {
                    self.store.insert(s.name.clone(), Tensor::zeros(&ty));
                }
            }
        }
        Ok(())
    }

    /// One step over `batch`, which has as many micro-batches as the trainer has parts.
    ///
    /// # Errors
    /// A refused input, or a loss or gradient that is not finite (the store is then spoilt; go back to the last checkpoint).
    pub fn step(&mut self, step: u64, batch: &[MicroBatch]) -> Result<StepReport, TrainError> {
        self.step_timed(step, batch, None)
    }

    /// As [`step`](Self::step); adds the time of every step of [`main_executor`](Self::main_executor)'s program to
    /// `times`.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_timed(
        &mut self,
        step: u64,
        batch: &[MicroBatch],
        mut times: Option<&mut StepTimes>,
    ) -> Result<StepReport, TrainError> {
        let expected = match &self.programs {
            Programs::Whole(_) => 1,
            Programs::Parts { parts, .. } => *parts,
        };
        if batch.len() != expected {
            return Err(TrainError::Parts { expected, given: batch.len() });
        }
        for m in batch {
            self.prepare(&m.dims)?;
        }
        let scalar = |out: &[(String, Tensor)], name: &str| {
            out.iter().find(|(n, _)| n == name).and_then(|(_, t)| t.as_f32()?.first().copied()).unwrap_or(f32::NAN)
        };
        let (loss, last) = match &mut self.programs {
            Programs::Whole(e) => {
                let out = e.run_timed(&batch[0].dims, &batch[0].views(), &mut self.store, times)?;
                (scalar(&out, "loss"), out)
            }
            Programs::Parts { accumulate, apply, .. } => {
                let (mut sum, mut tokens) = (0.0, 0.0);
                for m in batch {
                    let times = times.as_deref_mut();
                    let out = accumulate.run_timed(&m.dims, &m.views(), &mut self.store, times)?;
                    sum += scalar(&out, "loss_sum");
                    tokens += scalar(&out, "tokens");
                }
                (sum / tokens.max(1e-6), apply.run(&Bindings::default(), &[], &mut self.store)?)
            }
        };
        let grad_norm = scalar(&last, "grad_norm");
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(TrainError::NotFinite { step, loss, grad_norm });
        }
        Ok(StepReport { loss, grad_norm, lr: scalar(&last, "lr") })
    }
}
